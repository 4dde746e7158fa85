"""The project's pages as the tests read them: code blocks, links, and the names that headings have as link targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"build", ".venv", "vendor", ".git", ".hypothesis", ".pytest_cache"}


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: where it begins, the word behind the fence ("python", "sh", ...), and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every Markdown page of the project, README first."""
    found = (p for p in ROOT.rglob("*.md") if not SKIPPED.intersection(p.relative_to(ROOT).parts[:-1]))
    return sorted(found, key=lambda p: (p != ROOT / "README.md", p))


def code_blocks(page: Path) -> Iterator[CodeBlock]:
    """The page's fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield CodeBlock(page, text.count("\n", 0, block.start()) + 1, block[1], block[2])


def prose(page: Path) -> str:
    """The page without its code, in blocks and in lines, which holds no links."""
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


def links(page: Path) -> list[str]:
    """What the page links to: targets of links and pictures."""
    found = re.findall(r"\]\(([^()\s]+)\)|<(?:img|a)[^>]* (?:src|href)=\"([^\"]+)\"", prose(page))
    return [markdown or html for markdown, html in found]


def anchors(page: Path) -> set[str]:
    """The link targets that GitHub makes of the page's headings."""
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

"""README.md as a package index shows it, for the build backend: an index has no files beside the page, so a relative
link or picture leads nowhere there.

With `Source` among pyproject.toml's URLs, links and pictures lead to the version's files in that repository. Without it
a link becomes its text with the file's path behind it, and a picture goes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["dynamic_metadata", "index_page"]

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^()\s]+)\)")


def index_page(text: str, source: str | None, version: str) -> str:
    """The page with no relative link left in it.

    Args:
        source: the repository's address, as a forge has it; None where there is none yet.
        version: of the release; its tag is `v` with this behind it.
    """

    def replaced(link: re.Match[str]) -> str:
        picture, shown, target = link.groups()
        if source is not None:
            kind = "raw" if picture else "blob"
            return f"{picture}[{shown}]({source}/{kind}/v{version}/{target})"
        if picture:
            return ""
        return shown if target in shown else f"{shown} ({target})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(replaced, text))


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this adds to [project], as scikit-build-core asks for them in the project's folder."""
    text = Path("README.md").read_text(encoding="utf-8")
    page = index_page(text, project.get("urls", {}).get("Source"), project["version"])
    return {"readme": {"content-type": "text/markdown", "text": page}}

"""Fill-in-the-middle markers inside prompts, as each family's clients write them."""

from __future__ import annotations

import pytest

from pydiffgguf.server.endpoints.fim import Gap, is_marker, split

P, S = "def f(a):\n    return a", "\n\nprint(f(1))\n"


@pytest.mark.parametrize(
    "prompt",
    [
        f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
        f"<|fim_suffix|>{S}<|fim_prefix|>{P}<|fim_middle|>",
        f"<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
        f"<fim_suffix>{S}<fim_prefix>{P}<fim_middle>",
        f"<PRE> {P} <SUF>{S} <MID>",
        f"<｜fim▁begin｜>{P}<｜fim▁hole｜>{S}<｜fim▁end｜>",  # noqa: RUF001
        f"[SUFFIX]{S}[PREFIX]{P}",
        f"[PREFIX]{P}[SUFFIX]{S}",
        f"<|code_prefix|>{P}<|code_suffix|>{S}<|code_middle|>",
        f"<|code_suffix|>{S}<|code_prefix|>{P}<|code_middle|>",
        f"<[fim-prefix]>{P}<[fim-suffix]>{S}<[fim-middle]>",
        f"<[fim-suffix]>{S}<[fim-prefix]>{P}<[fim-middle]>",
        f"{P}<|fim_suffix|>{S}<|fim_middle|>",
    ],
)
def test_every_familys_markers_become_the_sides_of_a_gap(prompt: str) -> None:
    """Prefix first or suffix first."""
    assert split(prompt) == Gap(P, S)


@pytest.mark.parametrize(
    "prompt",
    [
        "plain text",
        f"<|fim_prefix|>{P}",
        f"<|fim_prefix|>{P}<|fim_suffix|>{S}",
        f"<|fim_prefix|>{P}<|fim_middle|>",
        f"<fim_suffix>{S}<fim_middle>",
        f"<PRE> {P}<SUF>{S}<MID>",
        f"<|fim_middle|>{P}<|fim_suffix|>{S}",
        "[PREFIX] without the other",
    ],
)
def test_an_incomplete_set_is_ordinary_text(prompt: str) -> None:
    """Documents may speak of markers."""
    assert split(prompt) is None


def test_markers_that_the_document_quotes_stay_in_it() -> None:
    """The first prefix marker, the first suffix marker behind it and the last middle marker count."""
    quoted = f"<|fim_prefix|>{P} # <|fim_prefix|><|fim_suffix|>{S}<|fim_middle|> is quoted<|fim_middle|>"
    assert split(quoted) == Gap(f"{P} # <|fim_prefix|>", f"{S}<|fim_middle|> is quoted")


def test_text_behind_the_middle_marker_is_the_prefixs_end() -> None:
    """Some clients write the line's head there."""
    assert split(f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|> + ") == Gap(f"{P} + ", S)


def test_files_before_the_first_marker_are_extra() -> None:
    """Named by the rest of their separator's line; the repository's name is left out."""
    prompt = (
        "<|repo_name|>mine\n<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n"
        f"<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>"
    )
    assert split(prompt) == Gap(P, S, (("a.py", "A = 1\n"), ("b.py", "B = 2\n")))
    codestral = f"+++++ a.py\nA = 1\n+++++ b.py\nB = 2\n[SUFFIX]{S}[PREFIX]{P}"
    assert split(codestral) == Gap(P, S, (("a.py", "A = 1\n"), ("b.py", "B = 2\n")))
    glm = f"###PATH:a.py\nA = 1\n<|code_prefix|>{P}<|code_suffix|>{S}<|code_middle|>"
    assert split(glm) == Gap(P, S, (("a.py", "A = 1\n"),))


def test_an_end_of_text_for_a_suffix_is_none() -> None:
    """Continue's provider for Mercury writes it."""
    assert split(f"<|fim_prefix|>{P}<|fim_suffix|><|endoftext|><|fim_middle|>") == Gap(P, "")


def test_stop_strings_that_are_markers_are_known() -> None:
    """The lists that Zed and Continue send; a newline or a word is none."""
    for text in ("<|endoftext|>", "<|fim_prefix|>", "<fim_middle>", " <SUF>", "[PREFIX]", "<|file_sep|>", "<EOT>"):
        assert is_marker(text), text
    assert not is_marker("\n\n") and not is_marker("def ")

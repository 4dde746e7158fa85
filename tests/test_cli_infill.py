"""The command infill: where the gap is, what is printed and written, and what is refused. Over the demo model."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from pseudo_terminal import Pty
from streams import as_stream

from pydiffgguf import DiffusionModel, cli, demo_model_path
from pydiffgguf.cli import commands
from pydiffgguf.text.document import Document, Position

MODEL = str(demo_model_path())
QUICK = ["--gap", "2", "--steps", "3", "--mode", "raw", "--threads", "1"]
BEFORE, BEHIND = "Anna has a red", " in the garden.\nShe likes it.\n"


@pytest.fixture(scope="module")
def expected() -> str:
    """What the library puts between BEFORE and BEHIND with QUICK's options."""
    with DiffusionModel(MODEL, n_threads=1) as model:
        return model.infill(BEFORE, BEHIND, gap=2, steps=3, mode="raw").text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((BEFORE + BEHIND).encode())
    return path


def at(text: str = BEFORE) -> list[str]:
    """The option --at for the place behind a text."""
    return ["--at", f"{text.count(chr(10)) + 1}:{len(text.rpartition(chr(10))[2]) + 1}"]


def run(*arguments: str) -> int:
    return cli.main(["infill", MODEL, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of bad usage: exit code 2, nothing on stdout."""
    with pytest.raises(SystemExit) as info:
        run(*arguments)
    assert info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1].removeprefix("pydiffgguf infill: error: ")


# ---------------------------------------------------------------------------------------------------- three forms


def test_every_form_prints_the_same_text_alone(
    file: Path, tmp_path: Path, expected: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Two files, a template, a place in a file: the gap's bytes and no newline, in a process of its own too."""
    (tmp_path / "before").write_text(BEFORE)
    (tmp_path / "behind").write_text(BEHIND)
    forms = [
        ["--prefix-file", str(tmp_path / "before"), "--suffix-file", str(tmp_path / "behind")],
        ["--template", f"{BEFORE}<gap/>{BEHIND}"],
        [str(file), *at()],
    ]
    for form in forms:
        assert run(*form, *QUICK) == 0
        sys.stdout.flush()
        assert capfdbinary.readouterr() == (expected.encode(), b"")
    command = [sys.executable, "-m", "pydiffgguf", "infill", MODEL, *forms[-1], *QUICK]
    process = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, expected.encode(), b"")


def test_a_marker_may_tell_the_length(expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As --gap does."""
    assert run("--template", f"{BEFORE}<gap len=2/>{BEHIND}", *QUICK[2:]) == 0
    assert capsys.readouterr().out == expected


def test_several_gaps_are_json_strings_on_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a newline in a filling ends no line; --json has the whole text too."""
    template = "Anna has a <gap len=2/> in the <gap min=1 max=2/>.\n"
    assert run("--template", template, *QUICK[2:]) == 0
    lines = capsys.readouterr().out.splitlines()
    texts = [json.loads(line) for line in lines]
    assert len(texts) == 2
    assert run("--template", template, *QUICK[2:], "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["text", "gaps", "steps", "seconds", "finish_reason"]
    assert result["text"] == f"Anna has a {texts[0]} in the {texts[1]}.\n"
    assert [gap["text"] for gap in result["gaps"]] == texts
    assert result["steps"] == sum(gap["steps"] for gap in result["gaps"])


def test_standard_input_is_a_file(
    expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named -, as for the prompt of generate."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((BEFORE + BEHIND).encode()), "utf-8"))
    assert run("-", *at(), *QUICK) == 0
    assert capsys.readouterr().out == expected


def test_json_is_one_object(file: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the ranked candidates and what it cost; only numbers that JSON has."""
    assert run(str(file), *at(), *QUICK, "-n", "3", "--seed", "5", "--json") == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    result = json.loads(out, parse_constant=pytest.fail)
    assert list(result) == [
        *("text", "gap_tokens", "score", "candidates", "steps", "seconds", "finish_reason", "seed", "mode", "stats")
    ]
    best = result["candidates"][0]
    assert set(best) == {"text", "gap_tokens", "score", "confidence", "healed"}
    assert (result["text"], result["gap_tokens"], result["score"]) == (best["text"], 2, best["score"])
    assert 1 <= len(result["candidates"]) <= 3
    assert (result["finish_reason"], result["seed"], result["mode"]) == ("stop", 5, "raw")
    assert result["steps"] == result["stats"]["forwards"] > 0
    assert result["seconds"] > 0


def test_options_reach_the_library(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the names that the Python interface has; what is not given is not handed on."""
    calls: list[tuple[Any, ...]] = []
    whole = DiffusionModel.stream_infill

    def record(self: DiffusionModel, *texts: str, **options: Any) -> Any:
        calls.append((*texts, options))
        return whole(self, *texts, gap=1, mode="raw", max_steps=1)

    monkeypatch.setattr(DiffusionModel, "stream_infill", record)
    other = tmp_path / "other.txt"
    other.write_text("Ben.\n")
    flags = "--gap auto --min-gap 1 --max-gap 3 --mode chat --no-heal -n 2 --seed 9 --steps 4 --t-max 0.5"
    assert run(str(file), *at(), *flags.split(), "--time-limit", "2", "--extra", str(other)) == 0
    assert run(str(file), "--at", "1") == 0
    assert calls == [
        (
            BEFORE,
            BEHIND,
            {
                **{"gap": "auto", "min_gap": 1, "max_gap": 3, "mode": "chat", "heal": False, "n": 2, "seed": 9},
                **{"steps": 4, "t_max": 0.5, "time_limit_s": 2.0, "extra": [(str(other), "Ben.\n")]},
            },
        ),
        (BEFORE + " in the garden.", "\nShe likes it.\n", {}),
    ]
    capsys.readouterr()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no place for a gap: give FILE --at LINE[:COL], --prefix-file F --suffix-file F, or --template TEXT"),
        ("FILE --at 1 --template a<gap/>b", "there are too many places for a gap: give FILE --at"),
        ("--prefix-file FILE --template a<gap/>b", "there are too many places for a gap: give FILE --at"),
        ("FILE", "FILE does not say where its gap is: give --at LINE[:COL] too"),
        ("FILE --at 1 --at-offset 1", "--at and --at-offset name one place"),
        ("FILE --at 1 --unit utf-8", "--unit says what --at-offset counts"),
        ("FILE --at-offset 100000", "--at-offset: "),
        ("--at-offset 1", "--at needs the FILE"),
        ("--at 1", "--at needs the FILE that it counts in: pydiffgguf infill MODEL FILE --at LINE[:COL]"),
        ("--prefix-file FILE", "--prefix-file and --suffix-file go together; either file may be empty"),
        ("--suffix-file FILE", "--prefix-file and --suffix-file go together; either file may be empty"),
        ("--template a<gap/>b --in-place", "--in-place writes into a file: give FILE --at LINE[:COL]"),
        ("- --at 1 --in-place", "--in-place writes into a file: give FILE --at LINE[:COL]"),
        ("--prefix-file - --suffix-file -", "- is standard input, and can be read but once"),
        ("FILE --at 1 --min-gap 4 --max-gap 2", "--min-gap 4 is more than --max-gap 2: give a --max-gap of at least 4"),
        ("FILE --at 1 --min-gap 129", "--min-gap 129 is more than --max-gap 128"),
        ("FILE --at 1 --gap 2 --max-gap 3", "--min-gap and --max-gap bound a gap of unknown length: leave them out"),
        ("FILE --at 1 --gap 0", "argument --gap: '0' must be a number of tokens, at least 1, or auto"),
        ("FILE --at 1 --gap some", "argument --gap: 'some' must be a number of tokens, at least 1, or auto"),
        ("FILE --at 1 --max-gap 0", "argument --max-gap: '0' must be a number, at least 1"),
        ("FILE --at 1 -n 0", "argument -n: '0' must be a number, at least 1"),
        ("FILE --at 1 --mode other", "argument --mode: invalid choice"),
        ("FILE --at one", "argument --at: 'one' is no position: write LINE or LINE:COL"),
        ("FILE --at 1:", "argument --at: '1:' is no position"),
        ("FILE --at 1:2:3", "argument --at: '1:2:3' is no position"),
        ("FILE --at 4", "--at: line 4 is not in FILE: lines are from 1 to 3"),
        ("FILE --at 0", "--at: line 0 is not in FILE: lines are from 1 to 3"),
        ("FILE --at 2:15", "--at: column 15 is not in line 2 of FILE: columns are from 1 to 14"),
        ("FILE --at 2:0", "--at: column 0 is not in line 2 of FILE: columns are from 1 to 14"),
        ("FILE --at 1:4 --until line", "--until says where a text ends that nothing follows"),
        ("--template a<gap/>b<gap/> --until line", "--until says where a text ends that nothing follows"),
        ("FILE --at 3 --gap 3 --until line", "--until and --gap N both say how long the gap is"),
        ("--template a", "--template: the template has no gap: mark it with <gap/>"),
        ("--template <gap/><gap/>b", "--template: two gaps are side by side"),
        ("--template a<gap/>b<gap/>c --gap 2", "--gap is for one gap, and the template has several"),
        ("--template a<gap/>b<gap/>c -n 2", "-n ranks the fillings of one gap, and the template has several"),
        ("--template a<gap$len=3/>b --gap 2", "the template says that its gap has 3 tokens: leave out --gap"),
    ],
)
def test_bad_usage_says_what_to_give(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    """Before the model is opened."""
    monkeypatch.setattr(commands, "open_model", lambda args: pytest.fail("opened"))
    words = [word.replace("FILE", str(file)).replace("$", " ") for word in arguments.split()]
    assert message in refused(capsys, *words).replace(str(file), "FILE")


def test_failures_are_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is missing or is not text: exit code 1; a value that the library refuses: 2, by its flag."""
    (tmp_path / "binary").write_bytes(b"ab\xff")
    binary, none = str(tmp_path / "binary"), str(tmp_path / "none")
    for arguments, message, code in (
        ([none, "--at", "1"], f"{none}: No such file or directory", 1),
        ([binary, "--at", "1", "--in-place"], f"{binary} is not UTF-8 text: byte 2 is 0xff", 1),
        ([str(file), *at(), "--extra", binary], f"{binary} is not UTF-8 text: byte 2 is 0xff", 1),
        ([str(file), *at(), "--steps", "0"], "--steps is 0", 2),
        ([str(file), *at(), "-n", "65"], "-n is 65: it must be from 1 to 64", 2),
    ):
        assert run(*arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"pydiffgguf: error: [^\n]+\n", err)
        assert message in err
    assert (tmp_path / "binary").read_bytes() == b"ab\xff"


# ------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_in_place_changes_nothing_else(
    tmp_path: Path, expected: str, capsys: pytest.CaptureFixture[str], newline: str, bom: bytes
) -> None:
    """Line ends, byte order mark and permissions stay; the model reads the same text whatever they are."""
    path = tmp_path / "text.txt"
    before, behind = BEFORE.encode(), BEHIND.replace("\n", newline).encode()
    path.write_bytes(bom + before + behind)
    path.chmod(0o640)
    assert run(str(path), *at(), *QUICK, "--in-place") == 0
    assert capsys.readouterr() == ("", "")
    assert path.read_bytes() == bom + before + expected.replace("\n", newline).encode() + behind
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give a file away")
def test_in_place_keeps_the_owner(file: Path, expected: str) -> None:
    """Whoever runs it."""
    os.chown(file, 12345, 54321)
    assert run(str(file), *at(), *QUICK, "--in-place") == 0
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 54321)
    assert file.read_text() == BEFORE + expected + BEHIND


def test_in_place_with_json_prints_the_object(file: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both: the file for the text, the object for the rest."""
    assert run(str(file), *at(), *QUICK, "--in-place", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    assert file.read_text() == BEFORE + expected + BEHIND


@pytest.mark.parametrize("unit", ["characters", "utf-8", "utf-16"])
def test_a_place_can_be_an_offset(tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str) -> None:
    """Counted as the editor counts: a character beyond the basic plane is 4 bytes, and 2 units of UTF-16."""
    path = tmp_path / "text.txt"
    path.write_text("\U0001f600\n" + BEFORE + BEHIND, encoding="utf-8")
    n = {"characters": 2, "utf-8": 5, "utf-16": 3}[unit] + len(BEFORE)
    assert run(str(path), "--at-offset", str(n), "--unit", unit, *QUICK) == 0
    by_offset = capsys.readouterr().out
    assert run(str(path), "--at", f"2:{len(BEFORE) + 1}", *QUICK) == 0
    assert capsys.readouterr().out == by_offset


def test_in_place_follows_a_link(file: Path, tmp_path: Path, expected: str) -> None:
    """The link stays one."""
    link = tmp_path / "link"
    link.symlink_to(file.name)
    assert run(str(link), *at(), *QUICK, "--in-place") == 0
    assert link.is_symlink()
    assert file.read_text() == BEFORE + expected + BEHIND


def fail_at_replace(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def replace(*names: object) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("pydiffgguf.text.document.os.replace", replace)


def fail_while_denoising(error: type[BaseException]) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def spoil(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        whole = DiffusionModel.stream_infill

        def stream(self: DiffusionModel, *texts: str, **options: Any) -> Any:
            def play() -> Generator[Any, None, Any]:
                yield next(whole(self, *texts, **options))
                raise error("spoilt")

            return as_stream(play)

        monkeypatch.setattr(DiffusionModel, "stream_infill", stream)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (fail_while_denoising(ValueError), 1, "spoilt"),
        (fail_while_denoising(KeyboardInterrupt), 130, ""),
    ],
)
def test_a_failed_run_leaves_the_file(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[pytest.MonkeyPatch, Path], None],
    code: int,
    message: str,
) -> None:
    """As it was, without anything beside it."""
    spoil(monkeypatch, file)
    assert run(str(file), *at(), *QUICK, "--in-place") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert file.read_text() == BEFORE + BEHIND
    assert os.listdir(file.parent) == [file.name]


def test_a_filling_that_cannot_be_written_is_printed(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], expected: str
) -> None:
    """The file is as it was, and the text that took a while is on stdout; the message names FILE."""
    fail_at_replace(monkeypatch, file)
    assert run(str(file), *at(), *QUICK, "--in-place") == 1
    assert capsys.readouterr() == (expected, f"pydiffgguf: error: {file}: No space left on device\n")
    assert file.read_text() == BEFORE + BEHIND
    assert os.listdir(file.parent) == [file.name]


def read_only(file: Path) -> None:
    file.chmod(0o444)


def second_name(file: Path) -> None:
    os.link(file, file.with_name("other name"))


@pytest.mark.skipif(os.name == "nt", reason="permissions and links of POSIX")
@pytest.mark.parametrize(
    ("spoil", "message"), [(read_only, "the file is read-only"), (second_name, "has 2 names (hard links)")]
)
def test_what_would_refuse_the_filling_is_said_first(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    """Before the model is opened."""
    spoil(file)
    monkeypatch.setattr(commands, "open_model", lambda args: pytest.fail("opened"))
    assert run(str(file), *at(), "--in-place") == 1
    assert message in capsys.readouterr().err
    assert file.read_text() == BEFORE + BEHIND


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX's")
def test_a_pipe_cannot_be_written_in_place(tmp_path: Path) -> None:
    """It would be read twice, and the second time there is nothing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"text",))
    writer.start()
    document = Document(str(pipe))
    writer.join()
    with pytest.raises(ValueError, match="is not a regular file"):
        document.check_writable()


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("one\ntwo\nthree\n", b"one\r\ntwo\nthree\n"),
        ("one\ntwo!\nthree\n", b"one\r\ntwo!\nthree\n"),
        ("\none\ntwo\nthree\n", b"\none\r\ntwo\nthree\n"),
        ("one\nthree\n", b"one\r\nthree\n"),
        ("", b""),
        ("one\ntwo\nthree\none\ntwo\nthree\n", b"one\r\ntwo\nthree\none\ntwo\nthree\n"),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_writing_keeps_mixed_line_ends(tmp_path: Path, text: str, raw: bytes, bom: bytes) -> None:
    """Outside of what changed; and a second write finds the file as the first one left it."""
    path = tmp_path / "mixed.txt"
    path.write_bytes(bom + b"one\r\ntwo\nthree\n")
    document = Document(str(path))
    document.write(text)
    assert path.read_bytes() == bom + raw
    document.write(text + "more")
    assert path.read_bytes() == bom + raw + b"more"


def test_a_file_that_changed_meanwhile_is_left(file: Path) -> None:
    """Somebody else's text is worth more than the filling."""
    document = Document(str(file))
    file.write_text("new")
    with pytest.raises(ValueError, match=r"has changed since it was read: nothing is written"):
        document.insert(0, "x")
    assert file.read_text() == "new"


@pytest.mark.parametrize(
    ("data", "position", "prefix", "inserted"),
    [
        (b"", "1", "", b"x\ny"),
        (b"", "1:1", "", b"x\ny"),
        (b"ab\ncd", "1", "ab", b"abx\ny\ncd"),
        (b"ab\ncd", "2:1", "ab\n", b"ab\nx\nycd"),
        (b"ab\r\ncd\r\n", "1", "ab", b"abx\r\ny\r\ncd\r\n"),
        (b"ab\r\ncd\r\n", "2:2", "ab\nc", b"ab\r\ncx\r\nyd\r\n"),
        (b"ab\r\ncd\r\n", "3", "ab\ncd\n", b"ab\r\ncd\r\nx\r\ny"),
        (b"ab\r\ncd\nef\n", "3:1", "ab\ncd\n", b"ab\r\ncd\nx\nyef\n"),
        (b"a\rb\n", "1", "a", b"ax\ny\rb\n"),
        (b"a\rb\rc", "2", "a\nb", b"a\rbx\ry\rc"),
        ("é日\U0001f600z\n".encode(), "1:4", "é日\U0001f600", "é日\U0001f600x\nyz\n".encode()),
        (b"\xef\xbb\xbfab\n", "1:1", "", b"\xef\xbb\xbfx\nyab\n"),
    ],
)
def test_positions(tmp_path: Path, data: bytes, position: str, prefix: str, inserted: bytes) -> None:
    """Characters from 1; a CRLF or a lone CR is one line end, a byte order mark no character."""
    path = tmp_path / "file"
    path.write_bytes(data)
    document = Document(str(path))
    offset = document.offset(Position.parse(position))
    assert document.text[:offset] == prefix
    document.insert(offset, "x\ny")
    assert path.read_bytes() == inserted


# ------------------------------------------------------------------------------------------------------- terminal


def test_on_a_terminal(file: Path, expected: str) -> None:
    """The canvas between its texts is drawn, then the text and what it took; the cursor is back."""
    child = Pty("infill", MODEL, str(file), *at(), *QUICK, "--in-place")
    assert child.wait() == 0
    assert child.shown.count("\x1b[?25l") == child.shown.count("\x1b[?25h") == 1
    assert "2 tokens, " in child.shown
    assert re.search(rf"{BEFORE}.* in the garden\.", re.sub(r"\x1b\[[0-9;]*m", "", child.shown))
    assert "\x1b[1;2;36m" not in child.shown  # a free row in the colour of the pinned ones
    assert file.read_text() == BEFORE + expected + BEHIND

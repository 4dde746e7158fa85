"""The command line: arguments, output, exit codes. Most of it over a fake model with the real one's surface."""

from __future__ import annotations

import builtins
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from streams import as_stream

import pydiffgguf
from pydiffgguf import DiffusionModel, Stream, cli, demo_model_path
from pydiffgguf.cli import arguments as cli_arguments
from pydiffgguf.cli import bench, chat, talk
from pydiffgguf.engine.conversation import read_messages
from pydiffgguf.errors import ContextOverflowError, ModelFormatError
from pydiffgguf.generate import Block, DenoiseStep, Event, Generation, Stats
from pydiffgguf.text.tokenizer import Tokenizer

TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{value:02X}>" for value in range(256)), "a", "b", "ab"]


class FakeModel:
    """DiffusionModel's surface as far as the commands use it; `script` is what a generation yields or raises."""

    script: ClassVar[list[Event | BaseException]] = []
    opened: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    calls: ClassVar[list[tuple[str, Any, dict[str, Any]]]] = []
    closed: ClassVar[int] = 0
    n_ctx = 512

    def __init__(self, path: Path, **options: Any) -> None:
        self.opened.append((str(path), options))
        self.tokenizer = Tokenizer.from_gguf(
            TOKENS, None, ["a b"], bos_id=2, eos_id=1, unk_id=3, pad_id=0, add_bos=True
        )

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        FakeModel.closed += 1

    def stream(self, prompt: str, **options: Any) -> Stream[Event, Generation]:
        self.calls.append(("stream", prompt, options))
        return as_stream(self._play)

    def stream_chat(self, messages: list[dict[str, str]], **options: Any) -> Stream[Event, Generation]:
        self.calls.append(("stream_chat", [dict(message) for message in messages], options))
        return as_stream(self._play)

    def save_conversation(self, path: str, messages: list[dict[str, str]], *, thinking: bool) -> bool:
        Path(path).write_text(json.dumps({"messages": messages}), encoding="utf-8")
        return False

    def load_conversation(self, path: str, *, thinking: bool) -> list[dict[str, Any]]:
        return read_messages(path)

    def _play(self) -> Generator[Event, None, Generation]:
        text = ""
        tokens: list[int] = []
        for event in self.script:
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Block):
                text += event.text
                tokens += event.tokens
            yield event
        stats = Stats(5, 3, steps=[4, 2], prefill_s=0.5, denoise_s=1.5, generated_tokens=len(tokens))
        return Generation(text, tokens, "stop", stats, "because")


def denoise_step(n: int = 0) -> DenoiseStep:
    return DenoiseStep(0, n, 48, np.array([260, 261, 1], np.int32), np.ones(3, bool), np.zeros(3), "ab", 0.1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    monkeypatch.setattr(pydiffgguf, "DiffusionModel", FakeModel, raising=False)
    FakeModel.script = [denoise_step(), Block("a\n", [260]), denoise_step(), Block("b", [261])]
    FakeModel.opened, FakeModel.calls, FakeModel.closed = [], [], 0
    return FakeModel


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Sets standard input."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return give


# ------------------------------------------------------------------------------------------------------- generate


def test_generate_prints_the_text(fake: type[FakeModel], capsys: pytest.CaptureFixture[str]) -> None:
    """Plain when piped: the text, one newline, nothing on stderr; the model is closed."""
    assert cli.main(["generate", "m.gguf", "-p", "hello"]) == 0
    assert capsys.readouterr() == ("a\nb\n", "")
    assert fake.opened == [("m.gguf", {})]
    assert fake.calls == [("stream", "hello", {"raw": False})]
    assert fake.closed == 1


def test_generate_hands_on_every_option(fake: type[FakeModel]) -> None:
    """Each flag under the name that the Python interface has."""
    flags = (
        "--raw -n 9 --seed 7 --steps 12 --max-steps 3 --t-min 0.1 --t-max 0.9 --entropy-bound 0.2 "
        "--stability-threshold 2 --confidence-threshold 0.01 --time-limit 1.5 --stop X --stop Y "
        "--ctx 512 --threads 3 --gpu-layers 4 --type-kv f32 --verbose"
    )
    assert cli.main(["generate", "m.gguf", "-p", "hello", *flags.split()]) == 0
    assert fake.opened == [
        ("m.gguf", {"n_ctx": 512, "n_threads": 3, "n_gpu_layers": 4, "type_kv": "f32", "verbose": True})
    ]
    options = {
        "raw": True,
        "max_tokens": 9,
        "seed": 7,
        "steps": 12,
        "max_steps": 3,
        "t_min": 0.1,
        "t_max": 0.9,
        "entropy_bound": 0.2,
        "stability_threshold": 2,
        "confidence_threshold": 0.01,
        "time_limit_s": 1.5,
        "stop": ["X", "Y"],
    }
    assert fake.calls == [("stream", "hello", options)]


def test_every_sampling_option_is_a_flag() -> None:
    """The list here and the engine's are the same."""
    from pydiffgguf.session import SAMPLING_OPTIONS

    assert {name for name, _, _ in cli_arguments.SAMPLING} | {"time_limit_s"} == set(SAMPLING_OPTIONS)


def test_generate_json_is_one_object(fake: type[FakeModel], capsys: pytest.CaptureFixture[str]) -> None:
    """With text, tokens, steps, seconds and finish_reason, and the thoughts apart."""
    assert cli.main(["generate", "m.gguf", "-p", "hello", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert json.loads(out) == {
        "text": "a\nb",
        "reasoning": "because",
        "tokens": [260, 261],
        "finish_reason": "stop",
        "steps": [4, 2],
        "seconds": 2.0,
        "prefill_s": 0.5,
        "denoise_s": 1.5,
        "tokens_per_forward": 2 / 6,
        "tokens_per_second": 1.0,
        "prompt_tokens": 3,
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("data", "prompt"), [(b"hi", "hi"), (b"hi\n", "hi"), (b"hi\r\n", "hi"), (b"hi\n\n", "hi\n"), ("é".encode(), "é")]
)
def test_the_prompt_comes_from_stdin_or_a_file(
    fake: type[FakeModel], typed: Callable[[bytes], None], tmp_path: Path, data: bytes, prompt: str
) -> None:
    """Less one last newline, which editors and echo add."""
    (tmp_path / "prompt.txt").write_bytes(data)
    for arguments in ([], ["-f", "-"], ["-f", str(tmp_path / "prompt.txt")]):
        typed(data)
        assert cli.main(["generate", "m.gguf", *arguments]) == 0
    assert [call[1] for call in fake.calls] == [prompt] * 3


def test_a_prompt_that_is_not_text_is_an_error(
    fake: type[FakeModel], typed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is replaced in silence."""
    typed(b"abc\xff")
    assert cli.main(["generate", "m.gguf"]) == 1
    assert capsys.readouterr() == ("", "pydiffgguf: error: standard input is not UTF-8 text: byte 3 is 0xff\n")


def test_thinking_goes_through_the_chat(fake: type[FakeModel]) -> None:
    """One user turn, with the thought channel asked for."""
    assert cli.main(["generate", "m.gguf", "-p", "hello", "--thinking"]) == 0
    assert fake.calls == [("stream_chat", [{"role": "user", "content": "hello"}], {"thinking": True})]


def test_a_terminal_shows_the_canvas_and_a_summary(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And --no-live shows neither."""
    monkeypatch.setattr(talk, "is_live_terminal", lambda _: True)
    assert cli.main(["generate", "m.gguf", "-p", "hello"]) == 0
    out, _ = capsys.readouterr()
    assert out.endswith("a\nb\n2 tokens, 4+2 steps in 2 canvases, 2.0 s, 1.0 tokens/s, stop\n")
    assert cli.main(["generate", "m.gguf", "-p", "hello", "--no-live"]) == 0
    assert capsys.readouterr().out == "a\nb\n"


# ----------------------------------------------------------------------------------------------------------- chat


def play_chat(
    monkeypatch: pytest.MonkeyPatch, lines: list[str | BaseException], *arguments: str, model: str = "m.gguf"
) -> int:
    """An interactive chat: what is typed at each prompt, then Ctrl-D."""

    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed: Iterator[str | BaseException] = iter([*lines, EOFError()])

    def read(_: str = "") -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(builtins, "input", read)
    return cli.main(["chat", model, *arguments])


def test_chat_keeps_the_conversation(fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn hands on all earlier ones, the system turn first, and never the thoughts."""
    assert play_chat(monkeypatch, ["one", "", "two"], "--system", "be brief", "--seed", "3") == 0
    system, one = {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}
    answer, two = {"role": "assistant", "content": "a\nb"}, {"role": "user", "content": "two"}
    assert [call[1] for call in fake.calls] == [[system, one], [system, one, answer, two]]
    assert [call[2] for call in fake.calls] == [{"thinking": False, "seed": 3}] * 2
    assert len(fake.opened) == 1


def test_chat_commands(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/clear forgets all but the system turn, /exit leaves; other slashes are text or are told."""
    lines: list[str | BaseException] = ["one", "/clear", "/help", "/nonsense", "/usr/bin is what?", "/exit", "late"]
    assert play_chat(monkeypatch, lines, "--system", "s") == 0
    assert [len(call[1]) for call in fake.calls] == [2, 2]
    assert fake.calls[1][1][1]["content"] == "/usr/bin is what?"
    out, _ = capsys.readouterr()
    assert "no such command: /nonsense" in out
    assert out.count("/clear") >= 2


def test_chat_takes_turns_back(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/retry asks again without the answer, /undo forgets both, /system changes the system turn, and the status line
    says how much of the context is used."""
    lines: list[str | BaseException] = ["/retry", "/undo", "one", "/retry", "two", "/undo", "/system S", "three"]
    assert play_chat(monkeypatch, lines) == 0
    contents = [[message["content"] for message in call[1]] for call in fake.calls]
    assert contents == [["one"], ["one"], ["one", "a\nb", "two"], ["S", "one", "a\nb", "three"]]
    out, _ = capsys.readouterr()
    assert "nothing to answer again" in out
    assert "nothing to take back" in out
    assert "context 5 of 512" in " ".join(out.split())


def test_a_message_of_several_lines(fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two fences, and as a terminal hands over what was pasted."""
    lines: list[str | BaseException] = ['"""', "def f():", "    pass", '"""', '"""a', 'b"""', "pasted\n/clear"]
    assert play_chat(monkeypatch, lines) == 0
    assert [call[1][-1]["content"] for call in fake.calls] == ["def f():\n    pass", "a\nb", "pasted\n/clear"]


def test_a_conversation_is_saved_and_goes_on(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has the messages; a second save does not overwrite it, and what is not one is refused."""
    path = tmp_path / "talk.json"
    assert play_chat(monkeypatch, ["/save", "one", f"/save {path}", f"/save {path}"], "--system", "s") == 0
    saved = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    (tmp_path / "other.json").write_text('{"messages": [{"role": "user"}]}', encoding="utf-8")
    assert play_chat(monkeypatch, [f"/load {tmp_path / 'other.json'}", f"/load {path}", "two"]) == 0
    assert fake.calls[-1][1] == [*saved, {"role": "user", "content": "two"}]
    out = " ".join(capsys.readouterr().out.split())
    for text in ("/save needs a file's name", "File exists", "it holds tool calls"):
        assert text in out


def test_a_saved_conversation_is_not_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real model: /save writes the cache beside the messages, and after /load only the new turn is read."""
    path, seen = tmp_path / "talk.json", []
    summarize = chat.summary

    def watched(result: Generation) -> str:
        seen.append(result.stats)
        return summarize(result)

    monkeypatch.setattr(chat, "summary", watched)
    options = ("--seed", "1", "--steps", "2", "-n", "8")
    words = "Put in order: 9 7 1. " * 12
    assert play_chat(monkeypatch, [words, f"/save {path}"], *options, model="demo") == 0
    assert play_chat(monkeypatch, [f"/load {path}", "And now?"], *options, model="demo") == 0
    first, later = seen
    assert later.prompt_tokens > first.prompt_tokens > 100
    assert later.reused_tokens >= first.prompt_tokens - 8
    (tmp_path / "talk.json").unlink()
    assert play_chat(monkeypatch, ["One", f"/save {path}"], *options, model="demo") == 0
    assert "talk.json.cache: File exists" in "".join(capsys.readouterr().out.split("\n"))
    assert not path.exists()


def test_a_full_conversation_says_what_to_do(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a way out, and only where there is something to take back."""
    scripts = iter([[Block("x", [260])], [ContextOverflowError("does not fit")]])
    play = FakeModel._play

    def next_script(self: FakeModel) -> Generator[Event, None, Generation]:
        FakeModel.script = list(next(scripts))
        return play(self)

    monkeypatch.setattr(FakeModel, "_play", next_script)
    assert play_chat(monkeypatch, ["one", "two"]) == 0
    assert "The conversation is full: /undo takes back a turn" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_only(fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished of it stays in the conversation; at the prompt, Ctrl-C drops the line and nothing else."""
    scripts = iter([[Block("par", [260]), KeyboardInterrupt()], [KeyboardInterrupt()], [Block("x", [260])]])
    play = FakeModel._play

    def next_script(self: FakeModel) -> Generator[Event, None, Generation]:
        FakeModel.script = list(next(scripts))
        return play(self)

    monkeypatch.setattr(FakeModel, "_play", next_script)
    assert play_chat(monkeypatch, ["one", "two", KeyboardInterrupt(), "three"]) == 0
    last = [message["content"] for message in fake.calls[-1][1]]
    assert last == ["one", "par", "three"]
    assert fake.closed == 1


def test_an_error_ends_a_turn_not_the_chat(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal the reason is shown and the turn forgotten."""
    fake.script = [ContextOverflowError("does not\nfit")]
    assert play_chat(monkeypatch, ["one", "two"]) == 0
    assert [len(call[1]) for call in fake.calls] == [1, 1]
    assert capsys.readouterr().out.count("error: does not fit\n") == 2


def test_chat_without_a_terminal(
    fake: type[FakeModel], typed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line is a turn, the answers are all that is printed, and an error is the command's."""
    typed(b"one\n\ntwo\n")
    assert cli.main(["chat", "m.gguf"]) == 0
    assert capsys.readouterr() == ("a\nb\na\nb\n", "")
    assert [len(call[1]) for call in fake.calls] == [1, 3]
    fake.script = [ContextOverflowError("does not fit")]
    typed(b"one\n")
    assert cli.main(["chat", "m.gguf"]) == 1
    assert capsys.readouterr().err == "pydiffgguf: error: does not fit\n"


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelFormatError("key x is\n  missing"), "key x is missing"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "m.gguf"), "m.gguf: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("the prompt is empty"), "the prompt is empty"),
        (KeyError("oops"), "KeyError: 'oops' (--debug shows where)"),
        (RuntimeError(), "RuntimeError (--debug shows where)"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(
    fake: type[FakeModel], capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    """Whatever went wrong; --debug shows the traceback instead, before or after the command's name."""
    fake.script = [error]
    assert cli.main(["generate", "m.gguf", "-p", "x"]) == 1
    assert capsys.readouterr() == ("", f"pydiffgguf: error: {line}\n")
    for arguments in (["--debug", "generate", "m.gguf"], ["generate", "m.gguf", "--debug"]):
        assert cli.main([*arguments, "-p", "x"]) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interruption_is_exit_code_130(fake: type[FakeModel], capsys: pytest.CaptureFixture[str]) -> None:
    """The finished text stays, nothing is complained about, the model is closed."""
    fake.script = [Block("some", [260]), KeyboardInterrupt()]
    assert cli.main(["generate", "m.gguf", "-p", "x"]) == 130
    assert capsys.readouterr() == ("some\n", "")
    assert fake.closed == 1


def test_warnings_are_one_line(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the path and the line of source that Python adds."""

    def warning(self: FakeModel, prompt: str, **_: Any) -> Stream[Event, Generation]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("m.gguf: no encoder scalars", UserWarning, stacklevel=2)
        return as_stream(self._play)

    monkeypatch.setattr(FakeModel, "stream", warning)
    assert cli.main(["generate", "m.gguf", "-p", "x"]) == 0
    assert capsys.readouterr().err == "pydiffgguf: warning: m.gguf: no encoder scalars\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "no such command: 'nonsense': choose from demo, "),
        (["run", "m.gguf"], "no such command: 'run'; did you mean chat or generate?"),
        (["genrate", "m.gguf"], "did you mean generate?"),
        (["generate"], "required: MODEL"),
        (["generate", "m.gguf", "-p", "x", "--nonsense"], "unrecognized arguments: --nonsense"),
        (
            ["generate", "m.gguf", "-p", "x", "--temp", "1"],
            "unrecognized arguments: --temp 1: the temperature follows a schedule: --t-min",
        ),
        (["generate", "m.gguf", "-p", "x", "--thread", "1"], "did you mean --threads?"),
        (["generate", "-m", "m.gguf", "-p", "x"], "the model is the first argument"),
        (["generate", "m.gguf", "-p", "x", "--se", "1"], "unrecognized arguments: --se"),
        (["generate", "m.gguf", "-p", "x", "-f", "y"], "not allowed with argument"),
        (["generate", "m.gguf", "-p", "x", "--steps", "many"], "--steps: 'many' is not a whole number"),
        (["generate", "m.gguf", "-p", "x", "--gpu-layers", "some"], "'some' is not a number of layers, auto or all"),
        (["generate", "m.gguf", "-p", "x", "--tensor-split", "a,b"], "'a,b' is not a list of numbers such as 3,1"),
        (["generate", "m.gguf", "-p", "x", "--raw", "--thinking"], "--thinking needs the chat template"),
        (["convert", "somewhere"], "required: -o/--out"),
    ],
)
def test_bad_usage_is_exit_code_2(
    fake: type[FakeModel], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """With one line and a hint; nothing is abbreviated or ignored, and no model is opened."""
    with pytest.raises(SystemExit) as info:
        cli.main(arguments)
    assert info.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert fake.opened == []


def test_other_programs_spellings_are_taken(fake: type[FakeModel]) -> None:
    """What llama.cpp's users type by habit, where the meaning is the same."""
    flags = ["-ngl", "-1", "-c", "4096", "-t", "2", "--n-predict", "9"]
    assert cli.main(["generate", "m.gguf", "-p", "x", *flags]) == 0
    ((_, options),) = fake.opened
    assert options == {"n_gpu_layers": 2**31 - 1, "n_ctx": 4096, "n_threads": 2}


def test_generate_on_a_terminal_needs_a_prompt(
    fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not wait for a text that nobody knows to type."""
    monkeypatch.setattr(sys, "stdin", type("Tty", (io.StringIO,), {"isatty": lambda self: True})())
    with pytest.raises(SystemExit) as info:
        cli.main(["generate", "m.gguf"])
    assert info.value.code == 2
    assert "a prompt is needed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "generate", "infill", "chat", "convert", "inspect", "bench", "doctor"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Every command's help ends in a line that can be pasted, and every example is understood."""
    with pytest.raises(SystemExit) as info:
        cli.main([command, "--help"])
    assert info.value.code == 0
    out, _ = capsys.readouterr()
    examples = out.split("examples:\n")[1].splitlines()
    assert examples
    for example in examples:
        words = re.findall(r'"[^"]*"|[^\s"]+', example.split("pydiffgguf ", 1)[1].split(" > ")[0])
        cli_arguments._parser().parse_args([word.strip('"') for word in words])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The package's own, with another flag beside it or alone."""
    assert cli.main(["--version"]) == 0
    with pytest.raises(SystemExit) as info:
        cli.main(["--debug", "--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out == f"pydiffgguf {pydiffgguf.__version__}\n" * 2


# ---------------------------------------------------------------------------------------------- over a real model


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "pydiffgguf", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_generate_over_a_real_model(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and object agree, for the same seed."""
    arguments = ["generate", str(tiny_gguf), "-p", "hello", "--seed", "7", "-n", "40", "--max-steps", "3"]
    assert cli.main(arguments) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert text == result["text"] + ("" if result["text"].endswith("\n") else "\n")
    assert len(result["tokens"]) <= 40
    assert all(1 <= steps <= 3 for steps in result["steps"])
    assert result["seed"] == 7
    assert result["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("flags", "line", "code"),
    [
        (["--steps", "0"], "--steps is 0: ", 2),
        (["--t-min", "nan"], "--t-min is nan: ", 2),
        (["-n", "0"], "--max-tokens is 0: ", 2),
        (["--seed", "-2"], "--seed is -2: ", 2),
        (["--time-limit", "inf"], "--time-limit is inf: ", 2),
        (["--stop", ""], "--stop: an empty string", 2),
        (["--threads", "0"], "--threads is 0: ", 2),
        (["--type-kv", "f8"], "--type-kv is 'f8': ", 2),
        (["--sampler", "greedy"], "--sampler is 'greedy': ", 2),
        (["--ctx", "5"], "", 1),
        (["--gpu-layers", "3"], "", 1),
    ],
)
def test_values_out_of_range_are_told(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str], flags: list[str], line: str, code: int
) -> None:
    """In one line that names the flag as it was typed; exit code 2, but 1 for what this file or machine cannot do."""
    assert cli.main(["generate", str(tiny_gguf), "-p", "hello", *flags]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"pydiffgguf: error: {line}")
    assert err.count("\n") == 1


def test_files_that_are_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file, a directory, an empty file, not a GGUF: for every command that opens one."""
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "other.gguf").write_bytes(b"not a model" * 100)
    for name in ("missing.gguf", "", "empty.gguf", "other.gguf"):
        path = str(tmp_path / name)
        for command in (["generate", path, "-p", "x"], ["chat", path], ["inspect", path], ["bench", path]):
            assert cli.main(command) == 1
            out, err = capsys.readouterr()
            assert out == ""
            assert re.fullmatch(r"pydiffgguf: error: [^\n]+\n", err)


def test_bench_measures(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures as a table and as one object."""
    arguments = ["bench", str(tiny_gguf), "--prefill", "20", "--repeat", "2", "-n", "40", "--steps", "3"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prefill"]["tokens"] == 20
    assert 0 < result["prefill"]["seconds"] < 60
    assert 0 < result["denoise"]["step_s"] < 60
    assert 2 <= result["denoise"]["steps_measured"] <= 6
    assert 1 <= result["generation"]["steps_per_canvas"] <= 3
    assert result["memory"]["weights"] > 100_000
    assert result["memory"]["peak_rss"] > 10_000_000
    parts = result["denoise"]["parts_s"]
    assert set(parts) == {"products", "experts", "attention", "head", "self_conditioning", "sampling", "other"}
    assert all(seconds > 0 for seconds in parts.values())
    assert 0 < result["denoise"]["flop_per_second"] < 100 * result["denoise"]["ceiling_flop_per_second"]
    assert cli.main(arguments) == 0
    out, _ = capsys.readouterr()
    for word in ("prefill", "denoise step", "steps per canvas", "tokens/s", "peak memory", "20 tokens"):
        assert word in out
    for flag in ("--repeat", "--prefill"):
        assert cli.main(["bench", str(tiny_gguf), flag, "0"]) == 2
        assert capsys.readouterr().err == f"pydiffgguf: error: {flag} is 0: at least 1\n"


def test_product_flop_counts_two_for_each_weight_a_row_meets() -> None:
    """Of the demo model: everything but the six experts of eight that a row does not meet, times 64 rows."""
    with DiffusionModel(demo_model_path()) as model:
        weights = sum(math.prod(t.shape) for t in model.tensors() if len(t.shape) > 1)
        idle = sum(math.prod(t.shape) for t in model.tensors() if len(t.shape) > 2) * 6 // 8
        assert bench.product_flop(model) == 2 * 64 * (weights - idle)


def test_inspect_over_a_real_file(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, or one object; tensors only when asked for."""
    assert cli.main(["inspect", str(tiny_gguf)]) == 0
    assert "diffusion.canvas_length" in capsys.readouterr().out
    assert cli.main(["inspect", str(tiny_gguf), "--json"]) == 0
    assert "tensors" not in json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", str(tiny_gguf), "--json", "--tensors", "--ctx", "64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tensors"]) == report["n_tensors"]
    assert report["memory"]["n_ctx"] == 64


def test_convert_over_a_real_checkpoint(tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that the library writes, and a line about it; errors leave the old file."""
    out = tmp_path / "out.gguf"
    assert cli.main(["convert", str(tiny_gguf.parent / "checkpoint"), "-o", str(out), "--type", "f32"]) == 0
    assert out.stat().st_size == tiny_gguf.stat().st_size
    assert capsys.readouterr().out.startswith(f"{out}: ")
    before = out.read_bytes()
    for source, kind, code in ((str(tmp_path / "none"), "f32", 1), (str(tiny_gguf.parent / "checkpoint"), "q9", 2)):
        assert cli.main(["convert", source, "-o", str(out), "--type", kind]) == code
        assert re.fullmatch(r"pydiffgguf: error: [^\n]+\n", capsys.readouterr().err)
    assert out.read_bytes() == before
    assert cli.main(["convert", "owner/repo", "-o", str(out)]) == 1
    assert capsys.readouterr().err.endswith("a repository is written hf:owner/repo\n")


def test_a_broken_pipe_is_quiet(tiny_gguf: Path) -> None:
    """`| head -c 1` ends the command without a word."""
    with subprocess.Popen(
        [sys.executable, "-m", "pydiffgguf", "inspect", str(tiny_gguf), "--tensors", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_output_that_the_terminal_cannot_encode_is_escaped(tmp_path: Path) -> None:
    """An ASCII-only stdout gets backslashes, not a UnicodeEncodeError."""
    process = run("inspect", str(tmp_path / "日本.gguf"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 1
    assert "\\u65e5\\u672c.gguf: No such file" in process.stderr


def test_the_command_imports_little() -> None:
    """--help and --version load no numpy, no rich, no tokenizers, and not the engine."""
    code = (
        "import sys\nfrom pydiffgguf import cli\n"
        "cli.main(['--version'])\nprint('argparse' in sys.modules)\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('numpy', 'rich', 'jinja2', 'tokenizers', 'huggingface_hub', 'gguf',"
        " 'pydiffgguf._binding.native') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout.splitlines()[1] == "False"
    assert process.stdout.splitlines()[-1] == "[]"


def test_the_answers_form_can_be_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A schema as text or in a file, an expression, a grammar, choices."""
    grammar, schema = tmp_path / "g.lark", tmp_path / "s.json"
    grammar.write_text('start: "x" | "y"\n', encoding="utf-8")
    schema.write_text('{"type": "integer"}', encoding="utf-8")
    for form, expected in [
        (["--regex", "[ab]{3}"], "[ab]{3}"),
        (["--json-schema", '{"type": "boolean"}'], "true|false"),
        (["--json-schema", str(schema)], r"-?\d+"),
        (["--grammar", str(grammar)], "x|y"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
    ]:
        assert cli.main(["generate", "demo", "-p", "Hi", "-n", "12", "--seed", "1", "--no-live", *form]) == 0
        assert re.fullmatch(expected, capsys.readouterr().out.strip())
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "demo", "-p", "Hi", "--json-schema", "{"])

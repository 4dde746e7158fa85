"""The commands ``generate``, ``infill`` and ``chat``: one answer, one gap, and a conversation."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from pydiffgguf.cli.terminal import (
    LiveCanvas,
    Output,
    PlainOutput,
    SilentOutput,
    infill_summary,
    is_live_terminal,
    summary,
)
from pydiffgguf.errors import DiffGGUFError

if TYPE_CHECKING:
    from pydiffgguf.generate import Event, Generation
    from pydiffgguf.infill import Fill, Infill
    from pydiffgguf.model import DiffusionModel

__all__ = ["Chat", "fill_template", "follow", "generate_once", "infill_once"]

_Result = TypeVar("_Result")

CHAT_HELP = """\
/clear  forget the conversation, keep the system turn
/help   this
/exit   leave; so does Ctrl-D. Ctrl-C stops an answer"""


def follow(
    stream: Generator[Event, None, _Result], output: Output, text_of: Callable[[_Result], str] | None = None
) -> _Result:
    """Hands a stream's events to an output; returns the result. An exception, Ctrl-C too, closes both.

    Args:
        text_of: the finished text, for streams that tell it with the result and not by blocks.
    """
    from pydiffgguf.generate import Block, DenoiseStep

    with contextlib.closing(stream), output:
        while True:
            try:
                event = next(stream)
            except StopIteration as end:
                result: _Result = end.value
                if text_of is not None:
                    output.block(Block(text_of(result), []))
                return result
            if isinstance(event, DenoiseStep):
                output.step(event)
            else:
                output.block(event)


def make_output(model: DiffusionModel, live: bool, *, prefix: str = "", exact: bool = False) -> Output:
    """The live canvas where stdout is a terminal that can show it, else plain text; `exact`: into a pipe without a
    newline that is not the model's."""
    if live and is_live_terminal(sys.stdout):
        return LiveCanvas(Console(highlight=False), model.tokenizer, prefix=prefix)
    terminal = sys.stdout.isatty()
    return PlainOutput(sys.stdout, escaped=terminal, newline=terminal or not exact)


def generate_once(
    model: DiffusionModel,
    prompt: str,
    *,
    raw: bool,
    thinking: bool,
    as_json: bool,
    live: bool,
    options: Mapping[str, Any],
) -> int:
    """Generates from a prompt and prints the text, or one JSON object; returns the exit code."""
    if thinking:
        stream = model.stream_chat([{"role": "user", "content": prompt}], thinking=True, **options)
    else:
        stream = model.stream(prompt, raw=raw, **options)
    if as_json:
        result = follow(stream, SilentOutput())
        print(json.dumps(as_dict(result), allow_nan=False))
        return 0
    result = follow(stream, make_output(model, live))
    if live and is_live_terminal(sys.stdout):
        _aside(summary(result))
    return 0


def infill_once(
    model: DiffusionModel,
    prefix: str,
    suffix: str,
    *,
    as_json: bool,
    live: bool,
    insert: Callable[[str], None] | None,
    options: Mapping[str, Any],
) -> int:
    """Fills a gap and prints the filling alone, or one JSON object; returns the exit code.

    Args:
        insert: puts the filling where it belongs; then it is printed on the live canvas only. If it raises, the filling
            is printed after all, and the exception goes on.
    """
    stream = model.stream_infill(prefix, suffix, **options)
    silent = as_json or (insert is not None and not (live and is_live_terminal(sys.stdout)))
    output: Output = SilentOutput() if silent else make_output(model, live, prefix=prefix, exact=True)
    result = follow(stream, output, lambda infill: infill.text)
    failure: OSError | ValueError | None = None
    if insert is not None:
        try:
            insert(result.text)
        except (OSError, ValueError) as error:
            failure = error
    if as_json:
        print(json.dumps(infill_dict(result), allow_nan=False))
    elif failure is not None and isinstance(output, SilentOutput):
        sys.stdout.write(result.text)  # minutes may have gone into it: it is not thrown away with the file
    if failure is not None:
        sys.stdout.flush()
        raise failure
    if not as_json and live and is_live_terminal(sys.stdout):
        _aside(infill_summary([result]))
    return 0


def fill_template(
    model: DiffusionModel, template: str, *, as_json: bool, live: bool, options: Mapping[str, Any]
) -> int:
    """Fills several gaps and prints each as a JSON string on a line, or one JSON object; returns the exit code."""
    stream = model.stream_fill(template, **options)
    output: Output = SilentOutput() if as_json else make_output(model, live)
    result = follow(stream, output, lambda fill: "\n".join(json.dumps(gap.text) for gap in fill.gaps))
    if as_json:
        print(json.dumps(fill_dict(result), allow_nan=False))
    elif live and is_live_terminal(sys.stdout):
        _aside(infill_summary(result.gaps))
    return 0


def infill_dict(result: Infill) -> dict[str, Any]:
    """An Infill in JSON types; a score without a value is null."""
    stats = result.stats
    candidates = [asdict(candidate) for candidate in result.candidates]
    for candidate in candidates:
        candidate["score"] = _finite(candidate["score"])
    return {
        "text": result.text,
        "gap_tokens": result.gap_tokens,
        "score": _finite(result.score),
        "candidates": candidates,
        "steps": stats.forwards,
        "seconds": stats.prefill_s + stats.denoise_s + stats.score_s,
        "finish_reason": result.finish_reason,
        "seed": stats.seed,
        "mode": stats.mode,
        "stats": {
            name: getattr(stats, name)
            for name in (
                "prompt_tokens",
                "reused_tokens",
                "encoded_tokens",
                "dropped_tokens",
                "candidates",
                "forwards",
                "rows",
                "prefill_s",
                "denoise_s",
                "score_s",
            )
        },
    }


def fill_dict(result: Fill) -> dict[str, Any]:
    """A Fill in JSON types: the whole text, and what an infill gives of each gap."""
    gaps = [infill_dict(gap) for gap in result.gaps]
    return {
        "text": result.text,
        "gaps": gaps,
        "steps": sum(gap["steps"] for gap in gaps),
        "seconds": sum(gap["seconds"] for gap in gaps),
        "finish_reason": result.finish_reason,
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def as_dict(result: Generation) -> dict[str, Any]:
    """A Generation in JSON types."""
    stats = result.stats
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "steps": stats.steps,
        "seconds": stats.prefill_s + stats.denoise_s,
        "prefill_s": stats.prefill_s,
        "denoise_s": stats.denoise_s,
        "tokens_per_forward": stats.tokens_per_forward,
        "tokens_per_second": stats.tokens_per_second,
        "prompt_tokens": stats.prompt_tokens,
        "seed": stats.seed,
    }


def _aside(text: str) -> None:
    Console(highlight=False, markup=False, soft_wrap=True).print(text, style="dim")


class Chat:
    """A conversation on stdin and stdout. Without a terminal every line of stdin is a turn, and the first error ends
    it; on a terminal an error ends only its turn.

    Args:
        system: the system turn, or None.
        options: keyword arguments of DiffusionModel.chat.
    """

    def __init__(
        self, model: DiffusionModel, system: str | None, *, thinking: bool, live: bool, options: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._thinking = thinking
        self._live = live
        self._options = options
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._system)
        self._interactive = sys.stdin.isatty()

    def run(self) -> int:
        """Talks until /exit or the end of input; Ctrl-C at the prompt raises KeyboardInterrupt."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then has line editing and history
            _aside("/help lists the commands, /exit or Ctrl-D leaves")
        while True:
            try:
                line = input("> " if self._interactive else "").strip()
            except EOFError:
                if self._interactive:
                    print()
                return 0
            if line == "/exit":
                return 0
            if re.fullmatch(r"/[a-z]*", line):
                self._command(line)
            elif line:
                self._turn(line)

    def _command(self, line: str) -> None:
        if line == "/clear":
            self._messages = list(self._system)
            _aside("the conversation is forgotten")
        elif line == "/help":
            print(CHAT_HELP)
        else:
            print(f"no such command: {line}\n{CHAT_HELP}")

    def _turn(self, line: str) -> None:
        output = _Recording(make_output(self._model, self._live))
        turn = {"role": "user", "content": line}
        try:
            stream = self._model.stream_chat([*self._messages, turn], thinking=self._thinking, **self._options)
            result = follow(stream, output)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            _aside("stopped")
        except (DiffGGUFError, ValueError) as error:
            if not self._interactive:
                raise
            print(f"error: {' '.join(str(error).split())}")
            return
        else:
            if self._interactive:
                _aside(summary(result))
            output.text = result.text
        # A stopped answer stays in the conversation as far as it was finished; without any, the turn did not happen.
        if output.text:
            self._messages += [turn, {"role": "assistant", "content": output.text}]


class _Recording:
    """An output that also remembers the text."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.text = ""

    def __enter__(self) -> _Recording:
        self._output.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._output.__exit__(*details)

    def step(self, event: Any) -> None:
        self._output.step(event)

    def block(self, event: Any) -> None:
        self.text += event.text
        self._output.block(event)

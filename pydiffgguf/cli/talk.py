"""The commands ``generate`` and ``infill``: one answer, one gap; and how a stream reaches the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from pydiffgguf.cli.json_lines import JsonLines, LineWriter
from pydiffgguf.cli.terminal import (
    LiveCanvas,
    Output,
    PlainOutput,
    SilentOutput,
    infill_summary,
    is_live_terminal,
    summary,
)

if TYPE_CHECKING:
    from pydiffgguf.engine.call import Stream
    from pydiffgguf.generate import Event, Generation
    from pydiffgguf.infill import Fill, Infill
    from pydiffgguf.model import DiffusionModel

__all__ = ["aside", "fill_template", "follow", "generate_once", "infill_once", "make_output"]

_Result = TypeVar("_Result")


def follow(stream: Stream[Event, _Result], output: Output, text_of: Callable[[_Result], str] | None = None) -> _Result:
    """Hands a stream's events to an output; returns the result. An exception, Ctrl-C too, closes both.

    Args:
        text_of: the finished text, for streams that tell it with the result and not by blocks.
    """
    from pydiffgguf.generate import Block, DenoiseStep, Prefill

    with stream, output:
        for event in stream:
            if isinstance(event, Prefill):
                output.prefill(event)
            elif isinstance(event, DenoiseStep):
                output.step(event)
            else:
                output.block(event)
        if text_of is not None:
            output.block(Block(text_of(stream.result), []))
        return stream.result


def make_output(
    model: DiffusionModel, live: bool, *, prefix: str = "", exact: bool = False, pace_s: float = 0.0
) -> Output:
    """The live canvas where stdout is a terminal that can show it, else plain text; `exact`: into a pipe without a
    newline that is not the model's. `prefix` and `pace_s` are LiveCanvas's."""
    if live and is_live_terminal(sys.stdout):
        return LiveCanvas(Console(highlight=False), model.tokenizer, prefix=prefix, pace_s=pace_s)
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
    json_lines: bool = False,
) -> int:
    """Generates from a prompt and prints the text, or one JSON object; returns the exit code."""
    if thinking:
        stream = model.stream_chat([{"role": "user", "content": prompt}], thinking=True, **options)
    else:
        stream = model.stream(prompt, raw=raw, **options)
    if json_lines:
        _print_lines(stream, as_dict)
        return 0
    if as_json:
        result = follow(stream, SilentOutput())
        print(json.dumps(as_dict(result), allow_nan=False))
        return 0
    result = follow(stream, make_output(model, live))
    if live and is_live_terminal(sys.stdout):
        aside(summary(result))
    return 0


def _print_lines(stream: Stream[Event, _Result], as_fields: Callable[[_Result], dict[str, Any]]) -> None:
    output = JsonLines(LineWriter(sys.stdout))
    output.write("result", **as_fields(follow(stream, output)))


def infill_once(
    model: DiffusionModel,
    prefix: str,
    suffix: str,
    *,
    as_json: bool,
    live: bool,
    insert: Callable[[str], None] | None,
    options: Mapping[str, Any],
    json_lines: bool = False,
) -> int:
    """Fills a gap and prints the filling alone, or one JSON object; returns the exit code.

    Args:
        insert: puts the filling where it belongs; then it is printed on the live canvas only. If it raises, the filling
            is printed after all, and the exception goes on.
    """
    stream = model.stream_infill(prefix, suffix, **options)
    if json_lines:
        _print_lines(stream, infill_dict)
        return 0
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
        aside(infill_summary([result]))
    return 0


def fill_template(
    model: DiffusionModel,
    template: str,
    *,
    as_json: bool,
    live: bool,
    options: Mapping[str, Any],
    json_lines: bool = False,
) -> int:
    """Fills several gaps and prints each as a JSON string on a line, or one JSON object; returns the exit code."""
    stream = model.stream_fill(template, **options)
    if json_lines:
        _print_lines(stream, fill_dict)
        return 0
    output: Output = SilentOutput() if as_json else make_output(model, live)
    result = follow(stream, output, lambda fill: "\n".join(json.dumps(gap.text) for gap in fill.gaps))
    if as_json:
        print(json.dumps(fill_dict(result), allow_nan=False))
    elif live and is_live_terminal(sys.stdout):
        aside(infill_summary(result.gaps))
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


def aside(text: str) -> None:
    """A line beside the conversation, dimmed where the terminal can."""
    Console(highlight=False, markup=False, soft_wrap=True).print(text, style="dim")

"""Spans of a text written anew between what surrounds them, and the probabilities of given options."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pydiffgguf._arguments import integer, real, seed_of
from pydiffgguf._binding import functions
from pydiffgguf._binding.records import Int32Array
from pydiffgguf._log import logger
from pydiffgguf.engine.call import OutOfTime
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.options import Cancel
from pydiffgguf.errors import ContextOverflowError
from pydiffgguf.generate import Stats, encode_prompt
from pydiffgguf.read import log_probabilities
from pydiffgguf.session import CanvasBatch, CanvasSpec, resolve_sampling
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = ["Choice", "Edit", "choose", "edit"]


@dataclass(frozen=True)
class Edit:
    """A text with spans written anew. `text`: all of it. `spans`: the new text of each, in the order of the text.
    `finish_reason`: "stop", or "length" where time_limit_s ended it early. `dropped_tokens`: of the text's beginning,
    as many as n_ctx had no room for before the last canvas."""

    text: str
    spans: list[str]
    finish_reason: str
    stats: Stats
    dropped_tokens: int = 0


class Choice(dict[str, dict[str, float]]):
    """Slot -> option -> probability, with what it cost in `stats`: a pass for each draw and length of options."""

    def __init__(self, probabilities: Mapping[str, dict[str, float]], stats: Stats) -> None:
        super().__init__(probabilities)
        self.stats = stats


def _prompt(engine: Engine, before: Sequence[int]) -> tuple[list[int], int]:
    """What is encoded before a canvas, and how many tokens of the text's head n_ctx has no room for: they are the
    farthest from what is asked."""
    tokenizer = engine.tokenizer
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = [*start, *before]
    if not ids:
        raise ValueError("nothing is before the canvas, and this vocabulary has no bos token: begin with some text")
    over = max(0, len(ids) - engine.n_ctx + engine.config.canvas_length)
    return [*start, *before[over:]], over


def _check_spans(text: str, spans: object) -> list[tuple[int, int]]:
    if not isinstance(spans, Sequence):
        raise TypeError(f"spans must be a list of pairs (start, end), not {type(spans).__name__}")
    checked = []
    for i, span in enumerate(spans):
        if not isinstance(span, (tuple, list)) or len(span) != 2:
            raise TypeError(f"spans[{i}] must be a pair (start, end) of character positions, but is {span!r}")
        start = integer(f"the start of spans[{i}]", span[0], 0, len(text))
        end = integer(f"the end of spans[{i}]", span[1], 0, len(text))
        if start >= end:
            raise ValueError(f"spans[{i}] is ({start}, {end}): its start must be before its end")
        checked.append((start, end))
    checked.sort()
    for (_, end), (start, _) in pairwise(checked):
        if start < end:
            raise ValueError(f"two spans overlap: one ends at {end}, the next begins at {start}; make one of them")
    if not checked:
        raise ValueError("spans is empty: say which characters are to be written anew, as (start, end)")
    return checked


def edit(engine: Engine, text: str, spans: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> Edit:
    """See `DiffusionModel.edit`.

    Args:
        options: `EditOptions`; other names are not looked at.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    where = _check_spans(text, spans)
    share = real("strength", options.get("strength", 1.0))
    if not 0.0 < share <= 1.0:
        raise ValueError(f"strength is {share}: it must be in (0, 1]")
    seed = seed_of(options.get("seed", 0))
    sampling, limit = resolve_sampling(engine.sampling, options)
    call = engine.call(options, limit)
    call.begin()
    ids, places = _cut(engine.tokenizer, text, where)
    given = ids.copy()
    stats = Stats(seed=seed, prompt_tokens=0, lora=dict(call.adapters.names))
    dropped = 0
    in_time = True
    for first, end, free in _windows(places, len(ids), engine.config.canvas_length):
        if not in_time:
            break
        spec = CanvasSpec(
            n_rows=end - first,
            pinned=np.where(free, -1, ids[first:end]).astype(np.int32),
            canvas=_renoised(ids[first:end], free, share, seed, len(stats.steps), engine.config.n_vocab),
            seed=seed,
            canvas_index=len(stats.steps),
        )
        prompt, dropped = _prompt(engine, ids[:first].tolist())
        try:
            with engine.pool.take(prompt, call) as session:
                stats.prompt_tokens += len(prompt)
                for _ in encode_prompt(session, prompt, stats, call):
                    pass
                batch = CanvasBatch(session, [spec], sampling)
                while True:
                    began = time.monotonic()
                    [step] = batch.step()
                    stats.denoise_s += time.monotonic() - began
                    in_time = not call.late()
                    if step.finished or not in_time:
                        break
        except OutOfTime:
            in_time = False
            break
        in_time = in_time or step.finished
        stats.steps.append(step.step + 1)
        stats.generated_tokens += int(free.sum())
        ids[first:end] = step.argmax
    texts: list[str] = []
    result, at = "", 0
    for (start, stop), (row, end) in zip(where, places, strict=True):
        # A vocabulary that lacks characters has one token for all of them: what did not change is not read back.
        same = np.array_equal(ids[row:end], given[row:end])
        texts.append(text[start:stop] if same else engine.tokenizer.decode(ids[row:end].tolist(), skip_special=True))
        result += text[at:start] + texts[-1]
        at = stop
    reason = "stop" if in_time else "length"
    if dropped:
        logger.warning("edit: n_ctx %d had no room for %d tokens of the text's beginning", engine.n_ctx, dropped)
    logger.debug("edited: %s, %s", reason, stats)
    return Edit(result + text[at:], texts, reason, stats, dropped)


def _cut(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Int32Array, list[tuple[int, int]]]:
    """The text's ids, cut where the spans are, and where the spans' ids are among them."""
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    at = 0
    for start, end in spans:
        ids += tokenizer.encode(text[at:start], special=False)
        first = len(ids)
        ids += tokenizer.encode(text[start:end], special=False)
        places.append((first, len(ids)))
        at = end
    return np.array(ids + tokenizer.encode(text[at:], special=False), dtype=np.int32), places


def _windows(
    places: Sequence[tuple[int, int]], n: int, canvas: int
) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Canvases that cover all spans, from left to right: (first row, end, which rows are free). A canvas begins with a
    span and holds as many whole ones as fit; a span that is longer than a canvas takes several."""
    k = 0
    first = places[0][0]
    while k < len(places):
        end = min(first + canvas, n)
        free = np.zeros(end - first, dtype=np.bool_)
        free[: places[k][1] - first] = True
        if places[k][1] > end:
            yield first, end, free
            first = end
            continue
        k += 1
        while k < len(places) and places[k][1] <= end:
            free[places[k][0] - first : places[k][1] - first] = True
            k += 1
        yield first, end, free
        first = places[k][0] if k < len(places) else n


def _renoised(
    ids: Int32Array, free: np.ndarray, share: float, seed: int, canvas_index: int, n_vocab: int
) -> Int32Array:
    """The canvas to start from: of the free rows a share, rounded up, holds random ids, the others their own. Which
    rows is a pure function of seed, canvas and row, as the ids are."""
    order = functions.noise_uniform(seed, canvas_index, 2**32 - 1, len(ids))
    noise = functions.noise_canvas(seed, canvas_index, len(ids), n_vocab)
    rows = np.flatnonzero(free)
    chosen = rows[np.argsort(order[rows], kind="stable")][: int(np.ceil(share * len(rows)))]
    start: Int32Array = ids.copy()
    start[chosen] = noise[chosen]
    return start


def choose(
    engine: Engine,
    template: str,
    slots: Mapping[str, Sequence[str]],
    *,
    draws: int,
    seed: int | None,
    cancel: Cancel | None,
    lora: Mapping[str, float] | None,
) -> Choice:
    """See `DiffusionModel.choose`."""
    if not isinstance(template, str):
        raise TypeError(f"template must be a str, not {type(template).__name__}")
    integer("draws", draws, 1, 1024)
    seed = seed_of(seed)
    call = engine.call({"cancel": cancel, "lora": lora})
    found = _slots(template, slots)
    tokenizer, canvas = engine.tokenizer, engine.config.canvas_length
    options = {name: [tokenizer.encode(option, special=False) for option in slots[name]] for name, _, _ in found}
    before = tokenizer.encode(template[: found[0][1]], special=False)
    between: list[list[int]] = []
    for i, (_, _, end) in enumerate(found):
        following = found[i + 1][1] if i + 1 < len(found) else None
        between.append(tokenizer.encode(template[end:following], special=False))
    result: dict[str, dict[str, float]] = {}
    prompt, over = _prompt(engine, before)
    if over:
        raise ContextOverflowError(
            f"the text before the first slot has {len(prompt) + over} tokens, but n_ctx {engine.n_ctx} leaves room for "
            f"{len(prompt)} before a canvas of {canvas}; shorten it, or open the model with a larger n_ctx"
        )
    stats = Stats(seed=seed, prompt_tokens=len(prompt), lora=dict(call.adapters.names))
    with engine.pool.take(prompt, call) as session:
        for _ in encode_prompt(session, prompt, stats, call):
            pass
        for asked, (name, _, _) in enumerate(found):
            lengths = [len(options[other][0]) for other, _, _ in found]
            table = np.zeros((draws, len(options[name])))
            for n in sorted({len(ids) for ids in options[name]}):
                pinned, first = _canvas(asked, n, lengths, between, canvas)
                same = [i for i, ids in enumerate(options[name]) if len(ids) == n]
                for draw in range(draws):
                    call.check_cancelled()
                    logs = log_probabilities(session, pinned, range(first, first + n), seed, draw, stats)
                    for i in same:
                        table[draw, i] = logs[np.arange(n), options[name][i]].sum()
            # The mean of probabilities, in logarithms: the greatest is taken out first.
            weights = np.exp(table - table.max()).mean(axis=0)
            result[name] = dict(zip(slots[name], (weights / weights.sum()).tolist(), strict=True))
    logger.debug("chose: %s", stats)
    return Choice(result, stats)


def _canvas(
    asked: int, n: int, lengths: Sequence[int], between: Sequence[list[int]], canvas: int
) -> tuple[list[int], int]:
    """The canvas on which an option of `n` tokens in slot number `asked` is weighed, ids and -1 in the slots, and the
    option's first row. `lengths`: rows of the other slots; `between`: the ids behind each slot."""
    sizes = [*lengths[:asked], n, *lengths[asked + 1 :]]
    first = sum(sizes[:asked]) + sum(map(len, between[:asked]))
    if first + n > canvas:
        raise ContextOverflowError(
            f"the template from its first slot to the end of slot number {asked + 1} takes {first + n} tokens on the "
            f"canvas, which has {canvas}; ask about slots that are nearer to each other"
        )
    return [id_ for size, text in zip(sizes, between, strict=True) for id_ in [*[-1] * size, *text]][:canvas], first


def _slots(template: str, slots: object) -> list[tuple[str, int, int]]:
    """(name, start, end) of each slot's marker, in the template's order."""
    if not isinstance(slots, Mapping):
        raise TypeError(f"slots must be a dict of options by slot name, not {type(slots).__name__}")
    if not slots:
        raise ValueError("slots is empty: name each slot and its options, as in slots={'answer': ['yes', 'no']}")
    found = []
    for name, options in slots.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"slot {name!r}: a name must be an identifier")
        if (
            isinstance(options, str)
            or not isinstance(options, Sequence)
            or not all(isinstance(o, str) for o in options)
        ):
            raise TypeError(f"the options of slot {name!r} must be a list of strings")
        if not options or not all(options):
            raise ValueError(f"slot {name!r} has no options, or an empty one: give the texts that it may take")
        if len(set(options)) != len(options):
            raise ValueError(f"slot {name!r} has the same option twice")
        places = [m.span() for m in re.finditer(rf"<{name}\s*/>", template)]
        if len(places) != 1:
            raise ValueError(f"slot {name!r}: the template must hold <{name}/> once, but holds it {len(places)} times")
        found.append((name, *places[0]))
    return sorted(found, key=lambda slot: slot[1])

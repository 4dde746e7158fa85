"""Spans of a text written anew between what surrounds them, and the probabilities of given options."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffgguf import _native
from pydiffgguf._arguments import MAX_SEED, integer, real
from pydiffgguf._records import Int32Array
from pydiffgguf.generate import Stats, encode_prompt
from pydiffgguf.infill import overflow
from pydiffgguf.session import CanvasBatch, CanvasSpec, resolve_sampling

if TYPE_CHECKING:
    from pydiffgguf.model import DiffusionModel

__all__ = ["Edit", "choose", "edit"]


@dataclass(frozen=True)
class Edit:
    """A text with spans written anew. `text`: all of it. `spans`: what stands in each now, in the order of the text.
    `steps`: denoise steps of each canvas. `finish_reason`: "stop", or "length" where time_limit_s ended it early."""

    text: str
    spans: list[str]
    steps: list[int]
    finish_reason: str
    seed: int


@dataclass(frozen=True)
class _Piece:
    """Consecutive ids of a text; `span`: whether they are to be written anew."""

    ids: list[int]
    span: bool


def _prompt(model: DiffusionModel, before: Sequence[int]) -> list[int]:
    tokenizer = model.tokenizer
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = [*start, *before]
    if not ids:
        raise ValueError("nothing stands before the canvas, and this vocabulary has no bos token: begin with some text")
    room = model.n_ctx - model.config.canvas_length
    if len(ids) > room:  # the head of a long text is the farthest from what is asked
        ids = [*start, *ids[len(ids) - room + len(start) :]]
    return ids


def _check_spans(text: str, spans: Sequence[object]) -> list[tuple[int, int]]:
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


def edit(
    model: DiffusionModel, text: str, spans: Sequence[tuple[int, int]], *, strength: float, seed: int, **sampling: Any
) -> Edit:
    """See `DiffusionModel.edit`."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    where = _check_spans(text, spans)
    share = real("strength", strength)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"strength is {share}: it must be in (0, 1]")
    integer("seed", seed, 0, MAX_SEED)
    options, limit = resolve_sampling(model.sampling, sampling)
    deadline = None if limit is None else time.monotonic() + limit
    encode, canvas = model.tokenizer.encode, model.config.canvas_length
    pieces: list[_Piece] = []
    at = 0
    for start, end in where:
        pieces.append(_Piece(encode(text[at:start], special=False), False))
        pieces.append(_Piece(encode(text[start:end], special=False), True))
        at = end
    pieces.append(_Piece(encode(text[at:], special=False), False))

    written: dict[int, list[int]] = {}
    steps: list[int] = []
    reason = "stop"
    before: list[int] = []
    i = 0
    while i < len(pieces):
        if not pieces[i].span:
            before += pieces[i].ids
            i += 1
            continue
        # As many spans as one canvas holds, and what text behind them it has room for.
        rows: list[tuple[int, int]] = []
        last = i
        n = 0
        for k in range(i, len(pieces)):
            if pieces[k].span:
                if n + len(pieces[k].ids) > canvas:
                    break
                last = k
            rows += [(id_, k) for id_ in pieces[k].ids]
            n = len(rows)
        if n == 0 or len(pieces[i].ids) > canvas:
            raise overflow(len(pieces[i].ids), canvas, "a span")
        rows = rows[:canvas]
        ids = np.array([id_ for id_, _ in rows], dtype=np.int32)
        free = np.array([pieces[k].span and k <= last for _, k in rows])
        with model.session_for(prompt := _prompt(model, before)) as session:
            encode_prompt(session, prompt, Stats(seed=seed, prompt_tokens=len(prompt)))
            spec = CanvasSpec(
                n_rows=len(rows),
                pinned=np.where(free, -1, ids).astype(np.int32),
                canvas=_renoised(ids, free, share, seed, len(steps), model.config.n_vocab),
                seed=seed,
                canvas_index=len(steps),
            )
            batch = CanvasBatch(session, [spec], options)
            while True:
                [step] = batch.step()
                late = deadline is not None and time.monotonic() >= deadline
                if step.finished or late:
                    break
        if late and not step.finished:
            reason = "length"
        steps.append(step.step + 1)
        for k in range(i, last + 1):
            if pieces[k].span:
                written[k] = [int(id_) for id_, (_, of) in zip(step.argmax, rows, strict=True) if of == k]
            before += written.get(k, pieces[k].ids)
        i = last + 1
    texts = [model.tokenizer.decode(written[k], skip_special=True) for k in sorted(written)]
    result, at = "", 0
    for (start, end), new in zip(where, texts, strict=True):
        result += text[at:start] + new
        at = end
    return Edit(result + text[at:], texts, steps, reason, seed)


def _renoised(
    ids: Int32Array, free: np.ndarray, share: float, seed: int, canvas_index: int, n_vocab: int
) -> Int32Array:
    """The canvas to start from: of the free rows a share, rounded up, holds random ids, the others their own. Which
    rows is a pure function of seed, canvas and row, as the ids are."""
    order = _native.noise_uniform(seed, canvas_index, 2**32 - 1, len(ids))
    noise = _native.noise_canvas(seed, canvas_index, len(ids), n_vocab)
    rows = np.flatnonzero(free)
    chosen = rows[np.argsort(order[rows], kind="stable")][: int(np.ceil(share * len(rows)))]
    start: Int32Array = ids.copy()
    start[chosen] = noise[chosen]
    return start


def choose(
    model: DiffusionModel, template: str, slots: Mapping[str, Sequence[str]], *, draws: int, seed: int
) -> dict[str, dict[str, float]]:
    """See `DiffusionModel.choose`."""
    if not isinstance(template, str):
        raise TypeError(f"template must be a str, not {type(template).__name__}")
    integer("draws", draws, 1, 1024)
    integer("seed", seed, 0, MAX_SEED)
    found = _slots(template, slots)
    tokenizer, canvas = model.tokenizer, model.config.canvas_length
    options = {name: [tokenizer.encode(option, special=False) for option in slots[name]] for name, _, _ in found}
    before = tokenizer.encode(template[: found[0][1]], special=False)
    between: list[list[int]] = []
    for i, (_, _, end) in enumerate(found):
        following = found[i + 1][1] if i + 1 < len(found) else None
        between.append(tokenizer.encode(template[end:following], special=False))
    sampling = replace(model.sampling, max_steps=1)
    result: dict[str, dict[str, float]] = {}
    with model.session_for(prompt := _prompt(model, before)) as session:
        encode_prompt(session, prompt, Stats(seed=seed, prompt_tokens=len(prompt)))
        for asked, (name, _, _) in enumerate(found):
            specs: list[CanvasSpec] = []
            rows: list[slice] = []
            for draw in range(draws):
                for ids in options[name]:
                    lengths = [len(options[other][0]) for other, _, _ in found]
                    lengths[asked] = len(ids)
                    first = sum(lengths[:asked]) + sum(map(len, between[:asked]))
                    pinned = [id_ for n, text in zip(lengths, between, strict=True) for id_ in [*[-1] * n, *text]]
                    if first + len(ids) > canvas:
                        raise overflow(first + len(ids), canvas, f"the template up to slot {name!r}")
                    pinned = pinned[:canvas]
                    watched = [-1] * len(pinned)
                    watched[first : first + len(ids)] = ids
                    specs.append(CanvasSpec(len(pinned), pinned, watched=watched, seed=seed, canvas_index=draw))
                    rows.append(slice(first, first + len(ids)))
            scores: list[float] = []
            for group, where in _passes(specs, rows, session.n_rows):
                for step, here in zip(CanvasBatch(session, group, sampling).step(), where, strict=True):
                    assert step.logprob is not None
                    scores.append(float(step.logprob[here].sum()))
            table = np.array(scores).reshape(draws, len(options[name]))
            # The mean of probabilities, in logarithms: the greatest is taken out first.
            weights = np.exp(table - table.max()).mean(axis=0)
            result[name] = dict(zip(slots[name], (weights / weights.sum()).tolist(), strict=True))
    return result


def _passes(
    specs: Sequence[CanvasSpec], rows: Sequence[slice], most: int
) -> list[tuple[list[CanvasSpec], list[slice]]]:
    """Canvases in groups that fit into one pass."""
    groups: list[tuple[list[CanvasSpec], list[slice]]] = []
    filled = most
    for spec, where in zip(specs, rows, strict=True):
        n = spec.n_rows or most
        if filled + n > most:
            groups.append(([], []))
            filled = 0
        groups[-1][0].append(spec)
        groups[-1][1].append(where)
        filled += n
    return groups


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

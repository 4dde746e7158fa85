"""Infill: prefix and suffix in, the middle out. `layout.py` says where the text goes, `search.py` finds the tokens."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from pydiffgguf._arguments import flag, int32, integer, seed_of
from pydiffgguf._binding.records import Sampling
from pydiffgguf._log import logger
from pydiffgguf.engine.call import Call, OutOfTime, Stream
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.options import Gap, Until
from pydiffgguf.errors import CancelledError
from pydiffgguf.gap.layout import Layout, check_extra, fence_around, lay_out, resolve_mode
from pydiffgguf.gap.search import Draft, Filled, SearchStats, fill_hole, write_on
from pydiffgguf.generate import DenoiseStep, FinishReason, Prefill, Stats, encode_prompt
from pydiffgguf.session import Session, resolve_sampling
from pydiffgguf.structured.constraint import Grammar, read_constraint
from pydiffgguf.text.document import newline_of, plain
from pydiffgguf.text.joint import complete, is_blank_line, without_indentation, without_repeat
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = ["Candidate", "Fill", "Infill", "InfillStats", "stream_fill", "stream_infill"]

#: Rows that a later gap of unknown length takes on the canvas while an earlier one is filled.
NOMINAL_GAP = 4


@dataclass(frozen=True)
class Candidate:
    """One filling. `gap_tokens`: free tokens it took, the healed one among them. `score`: natural log of the
    probability that the causal pass gives to it and the suffix's first tokens. `confidence`: mean natural log of the
    probability that the last denoise step gave to its free tokens. `healed`: its first token goes on with the prefix's
    last word."""

    text: str
    gap_tokens: int
    score: float
    confidence: float
    healed: bool


@dataclass
class InfillStats:
    """What an infill cost.

    `prompt_tokens`: tokens in the cache, of which `reused_tokens` were there from an earlier call; `encoded_tokens`
    were not. `dropped_tokens`: context that n_ctx had no room for. `candidates`: lengths and joints that were tried.
    `forwards`: denoise passes, each over as many candidates as there are rows for; `rows`: rows in all of them.
    `lora`: the adapters that ran, with their scales.
    Seconds: `prefill_s` for the prompt, `denoise_s`, `score_s` for the causal judge. `seed` gives the same text again.
    """

    seed: int
    mode: str
    prompt_tokens: int
    reused_tokens: int
    dropped_tokens: int
    prefill_s: float
    lora: dict[str, float] = field(default_factory=dict)
    search: SearchStats = field(default_factory=SearchStats)

    @property
    def encoded_tokens(self) -> int:
        return self.prompt_tokens - self.reused_tokens

    @property
    def candidates(self) -> int:
        return self.search.candidates

    @property
    def forwards(self) -> int:
        return self.search.forwards

    @property
    def rows(self) -> int:
        return self.search.rows

    @property
    def denoise_s(self) -> float:
        return self.search.denoise_s

    @property
    def score_s(self) -> float:
        return self.search.score_s

    @classmethod
    def total(cls, parts: Sequence[InfillStats]) -> InfillStats:
        """The sums over several gaps of one call; there must be one."""

        def added(records: Sequence[Any]) -> dict[str, Any]:
            shared = ("seed", "mode", "lora", "search", "out_of_time")
            names = [f.name for f in fields(records[0]) if f.name not in shared]
            return {name: sum(getattr(record, name) for record in records) for name in names}

        searches = [part.search for part in parts]
        search = SearchStats(**added(searches), out_of_time=any(s.out_of_time for s in searches))
        return cls(parts[0].seed, parts[0].mode, lora=parts[0].lora, **added(parts), search=search)


@dataclass(frozen=True)
class Infill:
    """A filled gap: prefix + `text` + suffix is the document. `gap_tokens`, `score`: as in `Candidate`. `candidates`:
    at most `n`, the best first, no text twice; none after a cancel, when `text` is the last draft. `finish_reason`:
    "stop"; "length" where time_limit_s ended it early, or a text without a suffix came to no end within max_gap;
    "cancelled"."""

    text: str
    gap_tokens: int
    score: float
    candidates: list[Candidate]
    finish_reason: FinishReason
    stats: InfillStats


@dataclass(frozen=True)
class Fill:
    """A filled template. `text`: all of it, markers replaced. `gaps`: the infill of each, in the template's order;
    those that a cancel left out are missing, and their markers are still in the text. `finish_reason`: as in `Infill`.
    `stats`: of all gaps together, the cancelled one among them."""

    text: str
    gaps: list[Infill]
    finish_reason: FinishReason
    stats: InfillStats


@dataclass(frozen=True)
class _Options:
    """Checked arguments of an infill."""

    gap: Gap
    min_gap: int
    max_gap: int
    n: int
    extra: list[tuple[str, str]]
    seed: int
    mode: str
    heal: bool
    ends: bool
    until: Until | None
    sampling: Sampling
    grammar: Grammar | None = None


@dataclass(frozen=True)
class _Place:
    """The text around a gap as the model reads it, lines ended by a newline alone; and what they end with in truth.
    `open_end`: nothing follows that would say how long the gap is."""

    prefix: str
    suffix: str
    newline: str
    open_end: bool = False

    @classmethod
    def of(cls, prefix: str, suffix: str, newline: str | None = None, open_end: bool = False) -> _Place:
        """`newline`: None for the most frequent one around the gap."""
        return cls(plain(prefix), plain(suffix), newline or newline_of(prefix + suffix), open_end)

    def end_of(self, text: str, options: _Options) -> int | None:
        """Characters of a text without a suffix up to where it is complete; None while it is not."""
        n = complete(self.prefix, text, options.until or "end")
        if options.mode == "chat":  # the answer quotes the file, so the block's end is the file's
            fence = fence_around([self.prefix, *(other for _, other in options.extra)])
            at = text.find("\n" + fence)
            return n if at < 0 else min(at, len(text) if n is None else n)
        return n

    def with_line_ends(self, text: str) -> str:
        return text if self.newline == "\n" else text.replace("\n", self.newline)

    def finished(self, text: str, options: _Options) -> str:
        """A filling as it goes into the document."""
        text = plain(text)
        if self.open_end:
            text = text[: self.end_of(text, options)]
        if options.gap == "auto":
            text = without_indentation(self.prefix, text)
            text = without_repeat(self.prefix, text, self.suffix)
        return self.with_line_ends(text)


def _check(engine: Engine, options: Mapping[str, Any]) -> tuple[_Options, Call]:
    """Raises TypeError and ValueError as `DiffusionModel.infill` says."""
    gap = options.get("gap", "auto")
    if isinstance(gap, str):
        if gap != "auto":
            raise ValueError(f"gap is {gap!r}: it must be a number of tokens, or 'auto'")
    elif (gap := int32("gap", gap)) == 0:
        raise ValueError(
            "gap is 0: there is nothing to fill between prefix and suffix; give the number of tokens, or gap='auto'"
        )
    min_gap, max_gap = int32("min_gap", options.get("min_gap", 0)), int32("max_gap", options.get("max_gap", 128), 1)
    if min_gap > max_gap:
        raise ValueError(f"min_gap is {min_gap}: it must be at most max_gap, {max_gap}")
    if not isinstance(gap, str) and min_gap > gap:
        raise ValueError(f"min_gap is {min_gap}, but the gap is to have {gap} tokens: leave it out, or give gap='auto'")
    until = options.get("until")
    if until not in (None, "line", "block", "end"):
        raise ValueError(f"until is {until!r}: it must be 'line', 'block' or 'end'")
    if until is not None and gap != "auto":
        raise ValueError(f"until is {until!r}, but the gap is to have {gap} tokens: leave one of them out")
    sampling, limit = resolve_sampling(engine.sampling, options)
    constraint = read_constraint(options)
    grammar = None if constraint is None else Grammar(constraint, engine.tables)
    if grammar is not None:
        grammar.nearest("", max_gap if gap == "auto" else gap)
    file_mode, has_template = engine.native.metadata.get("diffusion.infill_mode"), bool(engine.prompts.template)
    checked = _Options(
        gap=gap,
        min_gap=min_gap,
        max_gap=max_gap,
        n=integer("n", options.get("n", 1), 1, 64),
        extra=check_extra(options.get("extra", ())),
        seed=seed_of(options.get("seed", 0)),
        mode=resolve_mode(options.get("mode", "auto"), file_mode, has_template),
        heal=flag("heal", options.get("heal", True)),
        ends=flag("ends", options.get("ends", True)),
        until=until,
        sampling=sampling,
        grammar=grammar,
    )
    return checked, engine.call(options, limit)


def stream_infill(
    engine: Engine, prefix: str, suffix: str, options: Mapping[str, Any]
) -> Stream[Prefill | DenoiseStep, Infill]:
    """See `DiffusionModel.stream_infill`; the arguments are checked here, not at the first event.

    Args:
        options: `InfillOptions`; other names are not looked at.
    """
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, not {type(text).__name__}")
    checked, call = _check(engine, options)
    if checked.until is not None and suffix.strip():
        raise ValueError("until is for the end of a text: where a suffix follows, it says where the gap ends")
    place = _Place.of(prefix, suffix, open_end=checked.gap == "auto" and (not suffix or checked.until is not None))
    layout = _lay_out(engine, place, checked)
    return Stream(_one(engine, place, layout, checked, call), call)


def _lay_out(engine: Engine, place: _Place, options: _Options, later: Sequence[int] = ()) -> Layout:
    layout = lay_out(
        engine.tokenizer,
        place.prefix,
        "" if place.open_end else place.suffix,
        gap=options.gap,
        min_gap=options.min_gap,
        max_gap=options.max_gap,
        extra=options.extra,
        heal=options.heal,
        canvas=engine.config.canvas_length,
        n_ctx=engine.n_ctx,
        chat=engine.prompts.turn if options.mode == "chat" else None,
        later=later,
        ends=options.ends and not place.open_end,
    )
    if options.grammar is not None:
        refused: Callable[[Sequence[int]], bool] = _Unfit(engine.tokenizer, layout.head_text, options.grammar)
        return replace(layout, hole=replace(layout.hole, refused=refused))
    if options.gap != "auto" or not is_blank_line(place.prefix):
        return layout
    # White space alone is no answer on a line that holds nothing else.
    blank = _Blank(engine.tokenizer, layout.head_text)
    return replace(layout, hole=replace(layout.hole, refused=blank))


@dataclass(frozen=True)
class _Blank:
    """Whether a filling is white space alone."""

    tokenizer: Tokenizer
    head_text: str

    def __call__(self, tokens: Sequence[int]) -> bool:
        return not self.tokenizer.decode(tokens, skip_special=True)[len(self.head_text) :].strip()


@dataclass(frozen=True)
class _Unfit:
    """Whether a filling is none that the constraint takes."""

    tokenizer: Tokenizer
    head_text: str
    grammar: Grammar

    def __call__(self, tokens: Sequence[int]) -> bool:
        return not self.grammar.accepts(self.tokenizer.decode(tokens, skip_special=True)[len(self.head_text) :])


def _obeying(candidates: Sequence[Candidate], grammar: Grammar, options: _Options) -> list[Candidate]:
    """The candidates, each changed as little as makes the constraint take it: those that needed no change first."""
    most = options.max_gap if options.gap == "auto" else options.gap
    by_text: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: not grammar.accepts(candidate.text)):
        text = grammar.nearest(candidate.text, most)
        if text != candidate.text:
            n_tokens = len(grammar.tables.tokenizer.encode(text, special=False))
            candidate = replace(candidate, text=text, gap_tokens=n_tokens)
        by_text.setdefault(text, candidate)
    return list(by_text.values())


def _one(
    engine: Engine, place: _Place, layout: Layout, options: _Options, call: Call
) -> Generator[Prefill | DenoiseStep, None, Infill]:
    call.begin()
    return (yield from _run(engine, place, layout, options, call))


def _run(
    engine: Engine, place: _Place, layout: Layout, options: _Options, call: Call
) -> Generator[Prefill | DenoiseStep, None, Infill]:
    tokenizer = engine.tokenizer
    cost = Stats(seed=options.seed, prompt_tokens=len(layout.prompt))
    stats = InfillStats(
        options.seed, options.mode, len(layout.prompt), 0, layout.dropped, 0.0, dict(call.adapters.names)
    )
    last = ""
    found: list[Filled] = []
    reason: FinishReason = "stop"

    def show(draft: Draft) -> DenoiseStep:
        nonlocal last
        event = _event(tokenizer, place, layout, draft, call)
        last = event.text
        return event

    try:
        with engine.pool.take(layout.prompt, call) as session:
            yield from encode_prompt(session, layout.prompt, cost, call)
            drafts = _drafts(engine, session, place, layout, options, stats.search, call)
            with closing(drafts):  # before the session goes back to the pool
                found, whole = yield from _shown(drafts, show)
                reason = "stop" if whole else "length"
    except CancelledError:
        reason = "cancelled"
    except OutOfTime:
        reason = "length"
    if stats.search.out_of_time and reason == "stop":
        reason = "length"
    stats.reused_tokens, stats.prefill_s = cost.reused_tokens, cost.prefill_s
    if layout.dropped:
        logger.warning("infill: n_ctx %d had no room for %d tokens of context", engine.n_ctx, layout.dropped)
    logger.debug("infilled: %s, %s", reason, stats)
    by_text: dict[str, Candidate] = {}  # other tokens may read the same: a word as typed and healed, say
    for filled in found:
        candidate = _candidate(tokenizer, place, layout, filled, options)
        by_text.setdefault(candidate.text, candidate)
    candidates = list(by_text.values())
    if options.grammar is not None and reason != "cancelled":
        nothing = Candidate("", 0, float("-inf"), 0.0, False)
        candidates = _obeying(candidates or [nothing], options.grammar, options)
    best = candidates[0] if candidates else Candidate(last, 0, float("-inf"), 0.0, False)
    return Infill(best.text, best.gap_tokens, best.score, candidates, reason, stats)


def _drafts(
    engine: Engine,
    session: Session,
    place: _Place,
    layout: Layout,
    options: _Options,
    stats: SearchStats,
    call: Call,
) -> Generator[Draft, None, tuple[list[Filled], bool]]:
    """The fillings, best first, and whether the best is whole: a text without a suffix may not have come to its end."""
    if not place.open_end:
        found = yield from fill_hole(
            session,
            layout.hole,
            gap=options.gap,
            min_gap=max(options.min_gap, int(is_blank_line(place.prefix))),
            max_gap=options.max_gap,
            n=options.n,
            sampling=options.sampling,
            stats=stats,
            seed=options.seed,
            deadline=call.deadline,
        )
        return found, True

    def enough(tokens: Sequence[int]) -> int | None:
        text = _text(engine.tokenizer, layout, tokens)
        n = place.end_of(text, options)
        if n is None:
            return None
        characters = len(layout.head_text) + n
        read = engine.tokenizer.decode
        return bisect.bisect_left(range(len(tokens)), characters, key=lambda i: len(read(tokens[:i], True)))

    return (
        yield from write_on(
            session,
            layout.hole,
            max_gap=options.max_gap,
            sampling=options.sampling,
            stats=stats,
            enough=enough,
            n=options.n,
            seed=options.seed,
            deadline=call.deadline,
        )
    )


def _shown(
    drafts: Generator[Draft, None, tuple[list[Filled], bool]], show: Callable[[Draft], DenoiseStep]
) -> Generator[DenoiseStep, None, tuple[list[Filled], bool]]:
    """The drafts as events, and what they come to."""
    results: list[tuple[list[Filled], bool]] = []

    def whole() -> Generator[Draft, None, None]:
        results.append((yield from drafts))

    for draft in whole():
        yield show(draft)
    return results[0]


def _text(tokenizer: Tokenizer, layout: Layout, tokens: Sequence[int]) -> str:
    """A filling's text without the word that it begins with; bytes that no character ends are left out."""
    return tokenizer.decode(tokens, skip_special=True)[len(layout.head_text) :]


def _candidate(tokenizer: Tokenizer, place: _Place, layout: Layout, filled: Filled, options: _Options) -> Candidate:
    text = place.finished(_text(tokenizer, layout, filled.tokens), options)
    return Candidate(text, filled.gap_tokens, filled.score, filled.confidence, filled.healed)


def _event(tokenizer: Tokenizer, place: _Place, layout: Layout, draft: Draft, call: Call) -> DenoiseStep:
    step = draft.step
    shown = DenoiseStep(
        draft.canvas,
        step.step,
        step.steps,
        step.argmax,
        step.accepted,
        step.entropy,
        "",
        call.elapsed_s,
        draft.pinned,
    )
    return shown.read_late(lambda: (place.with_line_ends(_text(tokenizer, layout, draft.tokens)), ""))


# ------------------------------------------------------------------------------------------------------ many gaps

_MARKER = re.compile(r"<gap\b([^<>]*?)/>")
_ESCAPED = re.compile(r"<\\(\\*gap\b[^<>]*?/>)")
_ATTRIBUTE = re.compile(r"\s*(\w+)=(\S+?)(?=\s|\Z)")


@dataclass(frozen=True)
class _Marker:
    """A gap of a template: where its marker stands, and what it says of the length."""

    start: int
    end: int
    gap: Gap
    min_gap: int
    max_gap: int

    @property
    def nominal(self) -> int:
        return min(NOMINAL_GAP, self.max_gap) if self.gap == "auto" else self.gap


def parse_template(template: str, min_gap: int = 0, max_gap: int = 128) -> list[_Marker]:
    """The markers ``<gap/>``, ``<gap max=8/>``, ``<gap min=2 max=8/>``, ``<gap len=3/>`` of a template; a ``<\\gap/>``
    is none (`literal`). Raises ValueError for a template without a marker, two that touch, an attribute that is
    unknown, doubled or at odds with another one, or a length that is not a number."""
    if not isinstance(template, str):
        raise TypeError(f"template must be a str, not {type(template).__name__}")
    markers: list[_Marker] = []
    for found in _MARKER.finditer(template):
        values = {"min": min_gap, "max": max_gap}
        rest = _ATTRIBUTE.sub("", found[1])
        if rest.strip():
            raise ValueError(
                f"{found[0]}: {rest.strip()!r} is no attribute; write <gap/>, <gap max=8/> or <gap len=3/>"
            )
        given: set[str] = set()
        for name, value in _ATTRIBUTE.findall(found[1]):
            if name not in ("min", "max", "len"):
                raise ValueError(f"{found[0]}: unknown attribute {name!r}; there are min, max and len")
            if not value.isdecimal():
                raise ValueError(f"{found[0]}: {name} is {value!r}: it must be a number of tokens")
            if name in given:
                raise ValueError(f"{found[0]}: {name} is given twice")
            given.add(name)
            values[name] = int32(f"{name} of {found[0]}", int(value), 0 if name == "min" else 1)
        if "len" in given and len(given) > 1:
            raise ValueError(f"{found[0]}: len says how long the gap is; leave out min and max")
        if values["min"] > values["max"]:
            raise ValueError(f"{found[0]}: min is {values['min']}: it must be at most max, {values['max']}")
        if markers and markers[-1].end == found.start():
            raise ValueError("two gaps are side by side: make one of them, or put text between")
        markers.append(_Marker(*found.span(), values.get("len", "auto"), values["min"], values["max"]))
    if not markers:
        raise ValueError("the template has no gap: mark it with <gap/>")
    return markers


def literal(text: str) -> str:
    """The text between markers, as it is meant: ``<\\gap/>`` is the text ``<gap/>``, one more backslash one more."""
    return _ESCAPED.sub(r"<\1", text)


def stream_fill(engine: Engine, template: str, options: Mapping[str, Any]) -> Stream[Prefill | DenoiseStep, Fill]:
    """See `DiffusionModel.fill`. Gaps are filled from left to right: each sees the text before it, what was filled
    there included, and behind it the rest of the template, where later gaps are free rows of their own length, or of a
    nominal one.

    Args:
        options: `FillOptions`; other names are not looked at.
    """
    checked, call = _check(engine, {**options, "gap": "auto", "n": 1})
    markers = parse_template(template, checked.min_gap, checked.max_gap)
    return Stream(_fill(engine, template, markers, checked, call), call)


def _fill(
    engine: Engine, template: str, markers: list[_Marker], options: _Options, call: Call
) -> Generator[Prefill | DenoiseStep, None, Fill]:
    call.begin()
    encode = engine.tokenizer.encode
    text = literal(template[: markers[0].start])
    gaps: list[Infill] = []
    costs: list[InfillStats] = []
    reason: FinishReason = "stop"
    for i, marker in enumerate(markers):
        following = [*markers[i + 1 :], None]
        suffix = literal(template[marker.end : markers[i + 1].start if i + 1 < len(markers) else None])
        later: list[int] = []
        for here, after in pairwise(following):
            assert here is not None  # the last one alone is
            between = plain(literal(template[here.end : after.start if after else None]))
            later += [-1] * here.nominal + encode(between, special=False)
        mine = replace(options, gap=marker.gap, min_gap=marker.min_gap, max_gap=marker.max_gap)
        open_end = marker.gap == "auto" and not template[marker.end :]
        place = _Place.of(text, suffix, newline_of(template), open_end)
        infill = yield from _run(engine, place, _lay_out(engine, place, mine, later), mine, call)
        costs.append(infill.stats)
        if infill.finish_reason != "stop":
            reason = infill.finish_reason
        if infill.finish_reason == "cancelled":
            return Fill(text + template[marker.start :], gaps, reason, InfillStats.total(costs))
        gaps.append(infill)
        text += infill.text + suffix
    return Fill(text, gaps, reason, InfillStats.total(costs))

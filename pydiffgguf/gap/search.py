"""One hole: the tokens between an encoded prefix and a suffix, of known or unknown length.

A candidate is a length, laid out on a canvas of its own: the gap's rows are free, the suffix is pinned behind them.
Candidates share every pass over the weights (`CanvasBatch`). All lengths get one denoise step in which the suffix's
first rows are free as well: where the length is right, the model writes the suffix there of its own accord. The lengths
where it does so most are denoised to the end, and the causal pass over what they wrote decides. What else was tried,
and what it was worth, is in docs/INFILL.md; `benchmarks/length_scores.py` measures it.

Nothing here knows text. The session's prefix is the text before the hole, and is as it was afterwards, unless the
gap is longer than one canvas (`fill_hole`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pydiffgguf._binding.records import BoolArray, Float64Array, Int32Array, RawStep, Sampling
from pydiffgguf.engine.options import Gap
from pydiffgguf.errors import ContextOverflowError
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session

__all__ = ["Draft", "Filled", "Hole", "SearchStats", "fill_hole", "suffix_rows", "write_on"]

#: Rows of suffix behind a gap whose length is being looked for, and tokens of it that the causal pass judges. More cost
#: more and tell no more: the suffix's first words say whether the gap joins.
SUFFIX_ROWS = 16
#: Of them, rows that are left free where a length is tried.
FREE_ROWS = 6
#: Denoise steps that every length gets: a second one did not choose better (docs/INFILL.md).
PROBE_STEPS = 1
#: Candidates that go on to the end, at the most; once one of them has converged, the others get RACE times its steps.
#: Canvases of a wrong length seldom settle: without the race they took nine tenths of the passes.
FINALISTS = 4
RACE = 2
#: Up to here every length is tried: the right one shows at that length alone. From here on lengths grow by GROWTH, and
#: the surroundings of the best are looked at afterwards.
DENSE_LENGTHS = 32
GROWTH = 1.25


def suffix_rows(canvas: int) -> int:
    """Rows of a canvas that are kept for the suffix's first tokens, however long the gap: half of a small one."""
    return min(SUFFIX_ROWS, canvas // 2)


@dataclass(frozen=True)
class Hole:
    """What is known of a gap.

    `head`: ids between the session's prefix and the gap, pinned. `healed`: ids that may replace all of
    `head`, as the gap's first token; empty: none. `suffix`: the ids that follow, as many as there are or may be of use,
    -1 for a row that a later gap leaves free. `end_ids`: ids that end a text, which are therefore never in a gap.
    `refused`: told a filling's tokens, whether any other one is better."""

    suffix: Sequence[int]
    head: Sequence[int] = ()
    healed: Sequence[int] = ()
    end_ids: frozenset[int] = frozenset()
    refused: Callable[[Sequence[int]], bool] = field(default=lambda tokens: False, compare=False)

    @property
    def known_suffix(self) -> list[int]:
        """The suffix's first ids, up to SUFFIX_ROWS, before a later gap."""
        return list(itertools.takewhile(lambda id_: id_ >= 0, self.suffix[:SUFFIX_ROWS]))

    def longest_gap(self, canvas: int) -> int:
        """Tokens of a gap that one canvas of this many rows holds together with the suffix's first ones."""
        return canvas - len(self.head) - min(len(self.suffix), suffix_rows(canvas))


@dataclass(frozen=True)
class Filled:
    """One filling. `tokens`: those between the session's prefix and the suffix: the hole's head, or the token
    that healed it, and the gap. `gap_tokens`: those of them that were free. `score`: natural log of the probability
    that the causal pass gives to `tokens` and the suffix's first tokens; greater is better. `confidence`: mean natural
    log of the probability that the last denoise step gave to the free tokens; 0 without any. `converged`: the canvas
    was stable and confident before its steps (or the time) ran out. `steps`: denoise steps of its last canvas."""

    tokens: list[int]
    gap_tokens: int
    healed: bool
    score: float
    confidence: float
    converged: bool
    steps: int


@dataclass(frozen=True)
class Draft:
    """One denoise step of the candidate that looks best so far. `canvas` counts the canvases that a gap takes, from 0.
    `pinned` bool [n_rows]: the head and the suffix, which `step` has as they are known even where a probe left
    them free. `tokens`: the filling so far, as in Filled, from the gap's first canvas on."""

    canvas: int
    step: RawStep
    pinned: BoolArray
    tokens: list[int]


@dataclass
class SearchStats:
    """The cost of a hole. `candidates`: lengths (and forms of the joint) that were tried. `forwards`: denoise passes,
    each over all candidates at a time. `rows`: rows in all of them. `denoise_s`, `score_s`: seconds. `out_of_time`: the
    deadline came before the end."""

    candidates: int = 0
    forwards: int = 0
    rows: int = 0
    denoise_s: float = 0.0
    score_s: float = 0.0
    out_of_time: bool = False


@dataclass(frozen=True)
class _Candidate:
    """A layout: `head` pinned rows (unless healed), `length` free ones, the suffix behind them."""

    hole: Hole
    length: int
    healed: bool
    draw: int  # tells apart candidates of the same layout

    @property
    def start(self) -> int:
        """First free row."""
        return 0 if self.healed else len(self.hole.head)

    @property
    def end(self) -> int:
        """One past the last free row."""
        return self.start + self.length

    def rows(self, most: int) -> int:
        return min(self.end + len(self.hole.suffix), most)

    def known(self, most: int) -> Int32Array:
        """The id of each row on a canvas of at most `most` rows, -1 where it is to be found."""
        n = self.rows(most)
        ids: Int32Array = np.full(n, -1, dtype=np.int32)
        ids[: self.start] = self.hole.head[: self.start]
        ids[self.end :] = self.hole.suffix[: n - self.end]
        return ids

    def spec(self, most: int, seed: int, canvas: int, free: int, healed: Int32Array) -> CanvasSpec:
        """On a canvas of at most `most` rows, the suffix's first `free` rows watched instead of pinned. Its draws
        depend on the layout alone, not on who else is tried. `healed`: the hole's, int32."""
        pinned = self.known(most)
        watched = np.full(len(pinned), -1, dtype=np.int32)
        watched[self.end :] = pinned[self.end :]
        pinned[self.end : self.end + free] = -1
        return CanvasSpec(
            n_rows=len(pinned),
            pinned=pinned,
            watched=watched,
            allowed={0: healed} if self.healed else None,
            seed=seed,
            canvas_index=(canvas << 24) + (self.draw << 12) + (self.length << 1) + self.healed,
        )


@dataclass
class _State:
    """How far a candidate has come."""

    candidate: _Candidate
    step: RawStep
    rows: int

    @property
    def free(self) -> slice:
        return slice(self.candidate.start, self.candidate.end)

    @property
    def tokens(self) -> list[int]:
        return [int(id_) for id_ in self.step.argmax[: self.candidate.end]]

    @property
    def confidence(self) -> float:
        """Mean log-probability of the free rows' argmax."""
        assert self.step.logprob is not None
        free = self.step.logprob[self.free]
        return float(free.mean()) if free.size else 0.0

    @property
    def joint(self) -> float:
        """Log-probability of the suffix's tokens where their rows are free."""
        assert self.step.logprob is not None
        return float(self.step.logprob[self.free.stop : self.free.stop + FREE_ROWS].sum())

    def draft(self, canvas: int, before: Sequence[int]) -> Draft:
        """`before`: tokens of the gap's earlier canvases."""
        known = self.candidate.known(self.rows)
        pinned: BoolArray = known >= 0
        step = replace(
            self.step,
            argmax=np.where(pinned, known, self.step.argmax),
            accepted=self.step.accepted & ~pinned,
            entropy=np.where(pinned, 0.0, self.step.entropy),
        )
        return Draft(canvas, step, pinned, [*before, *self.tokens])


class _Search:
    """What the steps of one search share."""

    def __init__(
        self,
        session: Session,
        hole: Hole,
        sampling: Sampling,
        seed: int,
        deadline: float | None,
        stats: SearchStats,
        canvas: int = 0,
        before: Sequence[int] = (),
    ) -> None:
        self.session = session
        self.hole = hole
        # Once: behind a space it is half of the vocabulary, and every length has a healed form.
        self.healed = np.asarray(hole.healed, dtype=np.int32)
        self.sampling = sampling
        self.seed = seed
        self.deadline = deadline
        self.stats = stats
        self.canvas = canvas
        self.before = before  # tokens of the gap's earlier canvases
        self.longest_race: int | None = None  # steps that are left to the slower candidates

    def _on(self, hole: Hole, canvas: int, before: Sequence[int]) -> _Search:
        return _Search(self.session, hole, self.sampling, self.seed, self.deadline, self.stats, canvas, before)

    def without_suffix(self) -> _Search:
        """The search on the same canvas, all of which is gap."""
        return self._on(replace(self.hole, suffix=()), self.canvas, self.before)

    def following(self, tokens: Sequence[int]) -> _Search:
        """The search on the gap's next canvas, behind a canvas of `tokens`."""
        hole = Hole(self.hole.suffix, end_ids=self.hole.end_ids)
        return self._on(hole, self.canvas + 1, [*self.before, *tokens])

    def late(self) -> bool:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.stats.out_of_time = True
        return self.stats.out_of_time

    def forms(self, length: int, draws: int = 1) -> list[_Candidate]:
        """The hole at one length: as typed, and healed where that is possible."""
        plain = [_Candidate(self.hole, length, False, draw) for draw in range(draws)]
        return plain + [replace(c, healed=True) for c in plain if self.hole.healed and length > 0]

    def probe(self, lengths: Sequence[int]) -> Generator[Draft, None, list[_State]]:
        """Tries lengths: a step or so each, the suffix's first rows free."""
        most = self.sampling.max_steps
        sampling = replace(self.sampling, max_steps=min(most, PROBE_STEPS) if most else PROBE_STEPS)
        known = len(self.hole.known_suffix)
        candidates = [form for length in lengths for form in self.forms(length)]
        return self._run(candidates, SUFFIX_ROWS, sampling, min(FREE_ROWS, known))

    def finish(self, candidates: Sequence[_Candidate], race: bool = False) -> Generator[Draft, None, list[_State]]:
        """Denoises candidates to the end, with as much suffix as a canvas holds; in a race, those that are much slower
        than the first to converge are left as they are then."""
        self.longest_race = self.sampling.steps if race else None
        return self._run(candidates, self.session.config.canvas_length, self.sampling, 0)

    def _run(
        self, candidates: Sequence[_Candidate], behind: int, sampling: Sampling, free: int
    ) -> Generator[Draft, None, list[_State]]:
        """With `behind` rows of suffix, as many candidates at a time as the session has rows for; those that time ran
        out on are missing, except the first."""
        most = self.session.config.canvas_length
        states: list[_State] = []
        self.stats.candidates += len(candidates)
        for group in _groups(candidates, lambda c: c.rows(min(most, c.end + behind)), self.session.n_rows):
            if states and self.late():
                break
            states += yield from self._run_group(group, behind, sampling, free)
        return states

    def _run_group(
        self, group: Sequence[_Candidate], behind: int, sampling: Sampling, free: int
    ) -> Generator[Draft, None, list[_State]]:
        most = self.session.config.canvas_length
        specs = [c.spec(min(most, c.end + behind), self.seed, self.canvas, free, self.healed) for c in group]
        batch = CanvasBatch(self.session, specs, sampling)
        rows = [spec.rows(most) for spec in specs]
        while True:
            began = time.monotonic()
            steps = batch.step()
            self.stats.denoise_s += time.monotonic() - began
            self.stats.forwards += 1
            self.stats.rows += sum(rows)
            states = [_State(*each) for each in zip(group, steps, rows, strict=True)]
            best = max(states, key=lambda state: state.joint if free else state.confidence)
            yield best.draft(self.canvas, self.before)
            if self.longest_race is not None:
                converged = [s.step.step + 1 for s in states if s.step.converged]
                self.longest_race = min([self.longest_race, *(RACE * n for n in converged)])
            made = max(step.step for step in steps) + 1
            if batch.finished or self.late() or made >= (self.longest_race or made + 1):
                return states

    def judge(self, states: Sequence[_State]) -> list[Filled]:
        """Scores fillings by the causal pass over them and the suffix's first tokens. Greatest first; of equal texts
        the better one stays; those that hold an end token, or that the hole refuses, are left out, unless all are."""
        began = time.monotonic()
        most = self.session.config.canvas_length
        known = self.hole.known_suffix
        texts = [[*s.tokens, *known][:most] for s in states]
        scores = self.session.score([text for text in texts if text])
        self.stats.score_s += time.monotonic() - began
        by_text = iter(scores)
        best: dict[tuple[int, ...], Filled] = {}
        for state, text in zip(states, texts, strict=True):
            filled = self.filled(state, next(by_text) if text else np.zeros(0))
            twin = best.get(tuple(filled.tokens))
            if twin is None or filled.score > twin.score:
                best[tuple(filled.tokens)] = filled
        ranked = sorted(best.values(), key=lambda filled: -filled.score)
        fit = [filled for filled in ranked if self.hole.end_ids.isdisjoint(filled.tokens)] or ranked
        return [filled for filled in fit if not self.hole.refused(filled.tokens)] or fit

    def judge_open(
        self, states: Sequence[_State], enough: Callable[[Sequence[int]], int | None]
    ) -> list[tuple[Filled, bool]]:
        """Texts that nothing follows, each up to its end where it has one, and whether it has; best first."""
        cut: list[tuple[_State, list[int], bool]] = []
        for state in states:
            tokens = list(itertools.takewhile(lambda id_: id_ not in self.hole.end_ids, state.tokens))
            n = enough([*self.before, *tokens])
            ended = n is not None or len(tokens) < len(state.tokens)
            cut.append((state, tokens if n is None else tokens[: max(0, n - len(self.before))], ended))
        began = time.monotonic()
        scores = iter(self.session.score([tokens for _, tokens, _ in cut if tokens]))
        self.stats.score_s += time.monotonic() - began
        found: list[tuple[bool, float, Filled, bool]] = []
        for state, tokens, ended in cut:
            logprobs = next(scores) if tokens else np.zeros(0)
            filled = self.filled(state, logprobs)
            filled = replace(filled, tokens=tokens, gap_tokens=max(0, len(tokens) - state.candidate.start))
            mean = float(logprobs.mean()) if tokens else -np.inf
            found.append((self.hole.refused([*self.before, *tokens]), -mean, filled, ended))
        found.sort(key=lambda one: one[:2])
        return [(filled, ended) for _, _, filled, ended in found]

    def filled(self, state: _State, logprobs: Float64Array) -> Filled:
        c = state.candidate
        return Filled(
            state.tokens,
            c.length,
            c.healed,
            float(logprobs.sum()),
            state.confidence,
            state.step.converged,
            state.step.step + 1,
        )


def _groups(
    candidates: Sequence[_Candidate], rows: Callable[[_Candidate], int], most: int
) -> Iterator[list[_Candidate]]:
    """Candidates in their order, cut where the next one would not fit into a pass."""
    group: list[_Candidate] = []
    filled = 0
    for candidate in candidates:
        n = rows(candidate)
        if group and filled + n > most:
            yield group
            group, filled = [], 0
        group.append(candidate)
        filled += n
    if group:
        yield group


def trial_lengths(least: int, most: int) -> list[int]:
    """The lengths that are tried first: all up to DENSE_LENGTHS, then ever fewer."""
    lengths = list(range(least, min(most, max(DENSE_LENGTHS, least)) + 1))
    while lengths and lengths[-1] < most:
        lengths.append(min(most, max(lengths[-1] + 1, round(lengths[-1] * GROWTH))))
    return lengths


def _surroundings(length: int, tried: Sequence[int]) -> list[int]:
    """The lengths around a tried one up to its tried neighbours."""
    at = tried.index(length)
    low = tried[at - 1] if at else length
    high = tried[at + 1] if at + 1 < len(tried) else length
    return [n for n in range(low + 1, high) if n != length]


def fill_hole(
    session: Session,
    hole: Hole,
    *,
    gap: Gap,
    sampling: Sampling,
    stats: SearchStats,
    min_gap: int = 0,
    max_gap: int = 128,
    n: int = 1,
    seed: int = 0,
    deadline: float | None = None,
) -> Generator[Draft, None, list[Filled]]:
    """Fills a hole behind the session's prefix, which is as it was afterwards; yields a Draft after every denoise pass.

    Args:
        gap: tokens of the gap, or "auto": from `min_gap` to `max_gap` of them are tried. A healed token is one of them.
        n: how many different fillings are wanted; the list may hold fewer. Of a known length they differ in their
        draws. seed: keys all draws. deadline: `time.monotonic()` after which the best so far is returned; one denoise
        pass is always made.

    Returns fillings, best first, at least one.

    Raises:
        ContextOverflowError: a gap longer than one canvas does not fit n_ctx.
        CancelledError: the prefix is as it was, unless the gap is longer than one canvas; see `session.n_past`.
    """
    search = _Search(session, hole, sampling, seed, deadline, stats)
    room = hole.longest_gap(session.config.canvas_length)
    if gap == "auto":
        found = [] if min_gap > room else (yield from _unknown(search, min_gap, min(max_gap, room), n))
        if max_gap > room and _goes_on(search, found):
            longer = yield from _beyond_one_canvas(search, min_gap, max_gap, n)
            found += longer
            if longer:  # per token, since the two kinds differ in length by a canvas and more
                found.sort(key=lambda filled: -filled.score / (len(filled.tokens) + len(hole.known_suffix)))
        if not found:
            raise _no_room(session, hole, min_gap)
        return found[:n]
    if gap > room:
        return (yield from _over_several(search, gap))
    states = yield from search.finish(search.forms(gap, draws=n))
    return search.judge(states)[:n]


def _goes_on(search: _Search, found: Sequence[Filled]) -> bool:
    """Whether to look at gaps longer than those of `found`: one filling at least is always made."""
    return not found or not (any(filled.converged for filled in found) or search.late())


def _unknown(search: _Search, least: int, most: int, n: int) -> Generator[Draft, None, list[Filled]]:
    """The fillings of one canvas at most, of all lengths from `least` to `most`."""
    tried = trial_lengths(least, most)
    states = yield from search.probe(tried)
    best = max(states, key=lambda state: state.joint)
    if not search.late():
        states += yield from search.probe(_surroundings(best.candidate.length, tried))
    ranked = sorted(states, key=lambda state: -state.joint)[: max(FINALISTS, n)]
    if not search.late():
        ranked = yield from search.finish([state.candidate for state in ranked], race=n == 1)
    return search.judge(ranked)[:n]


def _over_several(search: _Search, gap: int) -> Generator[Draft, None, list[Filled]]:
    """A gap longer than one canvas: whole canvases of it are denoised and encoded, then the rest before the suffix."""
    session, canvas = search.session, search.session.config.canvas_length
    kept = session.n_past
    if kept + len(search.hole.head) + gap + canvas > session.n_ctx:
        raise _no_room(session, search.hole, gap)
    done: list[Filled] = []
    try:
        left = gap
        while left > (room := search.hole.longest_gap(canvas)):
            # The last canvas keeps some gap: rows that see the suffix.
            take = min(canvas - len(search.hole.head), left - max(1, room // 2))
            whole = search.without_suffix()
            states = yield from whole.finish(whole.forms(take))
            done.append(whole.judge(states)[0])
            session.encode(done[-1].tokens)
            left -= take
            search = search.following(done[-1].tokens)
        states = yield from search.finish(search.forms(left))
        done.append(search.judge(states)[0])
    finally:
        session.truncate(kept)
    return [_joined(done)]


def _beyond_one_canvas(search: _Search, least: int, most: int, n: int) -> Generator[Draft, None, list[Filled]]:
    """Fillings of more tokens than one canvas holds beside the suffix, up to `most`: as many as it would hold are
    denoised on a canvas of their own and encoded, and the rest is looked for behind them."""
    session, canvas = search.session, search.session.config.canvas_length
    kept = session.n_past
    size = min(search.hole.longest_gap(canvas), most - 1)
    if kept + len(search.hole.head) + size + canvas > session.n_ctx:
        return []
    whole = search.without_suffix()
    states = yield from whole.finish(whole.forms(size))
    first = whole.judge(states)[0]
    try:
        session.encode(first.tokens)
        rest = search.following(first.tokens)
        least, left = max(1, least - first.gap_tokens), most - first.gap_tokens
        room = rest.hole.longest_gap(canvas)
        found = [] if least > room else (yield from _unknown(rest, least, min(left, room), n))
        if left > room and _goes_on(rest, found):
            found += yield from _beyond_one_canvas(rest, least, left, n)
    finally:
        session.truncate(kept)
    return [_joined([first, filled]) for filled in found]


def write_on(
    session: Session,
    hole: Hole,
    *,
    max_gap: int,
    sampling: Sampling,
    stats: SearchStats,
    enough: Callable[[Sequence[int]], int | None],
    n: int = 1,
    seed: int = 0,
    deadline: float | None = None,
) -> Generator[Draft, None, tuple[list[Filled], bool]]:
    """Writes on behind the session's prefix and the hole's head, where no suffix says how long: canvas after canvas, up
    to an end token, to where it is enough, or to `max_gap` tokens. The prefix is as it was afterwards.

    Args:
        enough: told the tokens so far, the head's among them: how many of them count where they are complete, None
            while they are not.
        n: how many different fillings are wanted; a text of several canvases has one.

    Returns fillings, best first, by their mean score for a token; and whether the best came to its end.
    """
    search = _Search(session, replace(hole, suffix=()), sampling, seed, deadline, stats)
    canvas, kept = session.config.canvas_length, session.n_past
    done: list[Filled] = []
    try:
        while True:
            left = max_gap - sum(filled.gap_tokens for filled in done)
            length = min(canvas - len(search.hole.head), left)
            states = yield from search.finish(search.forms(length, draws=1 if done else n))
            ranked = search.judge_open(states, enough)
            best, ended = ranked[0]
            whole = [*done, best]
            room = session.n_past + len(best.tokens) + canvas <= session.n_ctx
            if ended or best.gap_tokens >= left or not room or search.late():
                return [_joined(whole)] if done else [filled for filled, _ in ranked[:n]], ended
            session.encode(best.tokens)
            search = search.following(best.tokens)
            done = whole
    finally:
        session.truncate(kept)


def _no_room(session: Session, hole: Hole, gap: int) -> ContextOverflowError:
    room = session.n_ctx - session.n_past - len(hole.head) - session.config.canvas_length
    return ContextOverflowError(
        f"a gap of {gap} tokens after {session.n_past} does not fit: n_ctx {session.n_ctx} leaves room for "
        f"{max(0, room)}; open the model with a larger n_ctx"
    )


def _joined(parts: Sequence[Filled]) -> Filled:
    """Fillings of consecutive canvases as one."""
    gap_tokens = sum(part.gap_tokens for part in parts)
    confidence = sum(part.confidence * part.gap_tokens for part in parts) / max(1, gap_tokens)
    return Filled(
        [token for part in parts for token in part.tokens],
        gap_tokens,
        parts[0].healed,
        sum(part.score for part in parts),
        confidence,
        all(part.converged for part in parts),
        parts[-1].steps,
    )

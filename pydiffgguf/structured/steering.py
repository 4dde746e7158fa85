"""Steers the canvases of an answer so that it obeys a grammar, by what their argmax says after each step.

The argmax is walked through the grammar, row by row. A row whose token is refused gets a mask from the next step on,
and keeps one as long as the walk reaches it; what is right when the canvas has converged is pinned, and the first row
behind it restricted. When steps or tokens run out, the longest right head is closed by its shortest known ending.
Masks are a function of the argmax alone, so seeds reproduce.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffgguf._binding.records import Int32Array, Mask
from pydiffgguf.errors import DiffGGUFError, UnsupportedError
from pydiffgguf.structured.constraint import Grammar
from pydiffgguf.structured.tables import engine

if TYPE_CHECKING:
    import llguidance

__all__ = ["ConstraintStats", "Rules", "Steering"]


@dataclass
class ConstraintStats:
    """What a constraint did. `refused`: tokens that the grammar refused, counted in every step; `masks`: masks that
    were made; `pinned`: tokens that were pinned; `closed_tokens`: those of an ending that the model did not write.
    `grammar_s`: seconds in the grammar. `engine`: its name and version."""

    refused: int = 0
    masks: int = 0
    pinned: int = 0
    closed_tokens: int = 0
    grammar_s: float = 0.0
    engine: str = ""


@dataclass(frozen=True, eq=False)
class Rules:
    """What the next step obeys; see `CanvasBatch.rules`."""

    pinned: Int32Array
    masks: dict[int, Mask]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Rules)
            and np.array_equal(self.pinned, other.pinned)
            and self.masks.keys() == other.masks.keys()
            and all(np.array_equal(mask, other.masks[row]) for row, mask in self.masks.items())
        )


@dataclass
class _Path:
    """The right head of a canvas. `tokens`: without an end token; `ended`: one is behind them; `row`: where the walk
    stopped, or the canvas's end."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    row: int = 0


class Steering:
    """One answer.

    Args:
        grammar: what it must be.
        n_tokens: the most tokens that it may have, over all canvases.
        n_rows: rows of a canvas.
        markers: those that open and close a thought, which may come first, of tokens that the grammar does not know;
            None where there are none. `open_thought`: the prompt has opened it.
        thought_tokens: the most that it may have before it is closed; None for any number.

    Raises ValueError where no answer fits n_tokens, UnsupportedError where no ending is known.
    """

    def __init__(
        self,
        grammar: Grammar,
        n_tokens: int,
        n_rows: int,
        *,
        markers: tuple[int, int] | None = None,
        open_thought: bool = False,
        thought_tokens: int | None = None,
    ) -> None:
        self._grammar = grammar
        self._tables = grammar.tables
        self._matcher = grammar.matcher()
        self._symbols: list[int] = []
        self._n_rows = n_rows
        self._left = n_tokens
        self._markers = markers
        self._thinks = open_thought
        self._thought_left = thought_tokens
        self._began = False
        self.stats = ConstraintStats(engine=engine().get_version())
        shortest = self._ending([])
        if shortest is None:
            raise UnsupportedError("no text is known that this constraint takes: it cannot be enforced")
        if len(shortest) > n_tokens:
            raise ValueError(
                f"max_tokens and n_ctx leave {n_tokens} tokens, but the constraint's shortest answer needs at least "
                f"{len(shortest)}"
            )
        self.finished = False
        self._begin_canvas()

    # ------------------------------------------------------------------------------------------------- one canvas

    def _begin_canvas(self) -> None:
        self._head: list[int] = []  # pinned rows
        self._sticky: set[int] = set()
        self._end_only: set[int] = set()
        self._path = _Path()
        self._cached: dict[tuple[int, ...], Mask] = {}

    def rules(self) -> Rules:
        """Those of a canvas's first step: what the grammar forces, and a mask behind it."""
        with _Timed(self.stats):
            if not self._free_to_think():
                matcher = self._matcher.deep_copy()
                forced = self._forced(matcher, self._n_rows - 1)
                self._head = forced[: self._longest(forced)]
                at = matcher if len(self._head) == len(forced) else self._at(self._head)
                if at is not None:
                    self._sticky = {len(self._head)}
                    return self._made({len(self._head): self._mask(at, self._head)})
            return self._made({})

    def _free_to_think(self) -> bool:
        return self._thinks or (self._markers is not None and not self._began)

    def after(self, argmax: Int32Array, finished: bool, steps_left: bool) -> Rules | None:
        """The next step's rules, from the step's argmax; None where the canvas is done.

        Args:
            finished: the sampler says that it makes no further step; steps_left: because it has converged.
        """
        with _Timed(self.stats):
            masks = self._walk(argmax.tolist())
            path = self._path
            if not finished:
                return self._made(masks)
            whole = path.ended or path.row == self._n_rows
            if (whole and self._agrees(argmax)) or not steps_left:
                return None
            # Stable, and not right: what is right is pinned, and the next row may be nothing else.
            kept = path.tokens[: self._longest(path.tokens, len(self._head))]
            matcher = self._at(kept)
            if matcher is None:
                return None
            if self._thought_open(kept):
                # The model ends within its thought: that is over, and the answer begins.
                assert self._markers is not None
                forced = [self._markers[1]]
            else:
                forced = self._forced(matcher, self._n_rows - len(kept))
            head = [*kept, *forced]
            head = head[: self._longest(head, len(kept))]
            self.stats.pinned += len(head) - len(self._head)
            self._head = head
            row = len(head)
            at = matcher if row == len(kept) + len(forced) else self._at(head)
            if row == self._n_rows or at is None:
                return None
            self._sticky.add(row)
            return self._made({**{r: m for r, m in masks.items() if r > row}, row: self._mask(at, head)})

    @property
    def valid_tokens(self) -> int:
        """How many of the last step's first tokens the grammar takes."""
        return len(self._path.tokens)

    def _agrees(self, argmax: Int32Array) -> bool:
        n = len(self._path.tokens)
        return bool(argmax[:n].tolist() == self._path.tokens)

    def _made(self, masks: dict[int, Mask]) -> Rules:
        pinned = np.full(self._n_rows, -1, dtype=np.int32)
        pinned[: len(self._head)] = self._head
        return Rules(pinned, {row: mask for row, mask in masks.items() if row >= len(self._head)})

    def _walk(self, argmax: Sequence[int]) -> dict[int, Mask]:
        """Follows the argmax behind the pinned rows; returns the masks for the next step."""
        tokens: list[int] = list(self._head)
        masks: dict[int, Mask] = {}
        sticky: set[int] = set()
        could_end: dict[int, bool] = {}
        row = len(tokens)
        matcher, row = self._past_thought(argmax, tokens, masks, sticky)
        ended = False
        stopped = matcher is None
        while not stopped and row < self._n_rows:
            assert matcher is not None
            token = argmax[row]
            is_end = token in self._tables.tokenizer.end_ids
            restricted = row in self._sticky
            if restricted:
                ends = row in self._end_only and matcher.is_accepting()
                masks[row] = self._ends_mask if ends else self._mask(matcher, tokens)
                sticky.add(row)
                could_end[row] = matcher.is_accepting()
            if row in self._end_only and matcher.is_accepting():
                ended = True
                break
            if is_end:
                if matcher.is_accepting():
                    ended = True
                    break
            elif token not in self._tables.special and matcher.try_consume_tokens([token]) == 1:
                tokens.append(token)
                row += 1
                continue
            self.stats.refused += 1
            if row not in masks:
                masks[row] = self._mask(matcher, tokens)
                sticky.add(row)
                could_end[row] = matcher.is_accepting()
            if matcher.is_accepting() and not (masks[row] & ~self._ends_mask).any():
                ended = True  # nothing but the end
                break
            only = _only(masks[row])
            if only is not None and matcher.try_consume_tokens([only]) == 1:
                tokens.append(only)
                row += 1
                continue
            stopped = True
        if stopped and matcher is not None:
            self._end_where_nothing_follows(row, sticky, could_end, masks)
        self._sticky = sticky
        self._path = _Path(tokens, ended, row)
        return masks

    def _end_where_nothing_follows(
        self, row: int, sticky: set[int], could_end: dict[int, bool], masks: dict[int, Mask]
    ) -> None:
        """Where all rows from one at which the text could have ended up to here were restricted, what was forced there
        led nowhere: that row may only end."""
        first = row
        best = None
        while first - 1 in sticky and first > len(self._head):
            first -= 1
            if could_end.get(first):
                best = first
        if best is not None:
            self._end_only.add(best)
            masks[best] = self._ends_mask

    def _past_thought(
        self, argmax: Sequence[int], tokens: list[int], masks: dict[int, Mask], sticky: set[int]
    ) -> tuple[llguidance.LLMatcher | None, int]:
        """The matcher, and the row where the answer begins; None where the thought goes on."""
        row = len(tokens)
        if not self._free_to_think():
            return self._at(tokens), row
        assert self._markers is not None
        opening, closing = self._markers
        if closing in tokens or (not self._thinks and (not argmax or argmax[0] != opening)):
            return self._at(tokens), row
        while row < self._n_rows:
            token = argmax[row]
            if token in self._tables.tokenizer.end_ids:
                # A thought has to be closed.
                masks[row] = ~self._ends_mask & self._tables.everything
                sticky.add(row)
                self.stats.refused += 1
                return None, row
            tokens.append(token)
            row += 1
            if token == closing:
                return self._matcher.deep_copy(), row
        return None, row

    # ------------------------------------------------------------------------------------------------- its end

    def commit(self) -> tuple[list[int], bool]:
        """(tokens that the canvas adds, whether they came to their own end), when no further step is made. `finished`
        says whether the answer is whole; otherwise another canvas follows, which the tokens fill."""
        with _Timed(self.stats):
            path = self._path
            self._began = True
            closed = self._cut_thought(path.tokens)
            if closed is not None and self._may_go_on(closed):
                self._take(closed)
                self._begin_canvas()
                return closed, False
            if path.ended and len(path.tokens) <= self._left:
                self._take(path.tokens)
                self.finished = True
                return path.tokens, True
            if len(path.tokens) == self._n_rows and self._may_go_on(path.tokens):
                self._take(path.tokens)
                self._begin_canvas()
                return path.tokens, False
            return self._close(path.tokens), False

    def close(self) -> list[int]:
        """The tokens that make the answer whole at once, behind what was committed."""
        with _Timed(self.stats):
            return self._close([])

    def _cut_thought(self, tokens: list[int]) -> list[int] | None:
        """The canvas's first tokens with a thought that is closed at its limit; None where it keeps within it. What is
        behind the thought belongs to one that was longer, and is forgotten."""
        limit, n = self._thought_left, self._thought(tokens)
        if limit is None or n < limit or (n == limit and not self._thought_goes_on(tokens)):
            return None
        assert self._markers is not None
        return [*tokens[:limit], self._markers[1]]

    def _may_go_on(self, tokens: Sequence[int]) -> bool:
        ending = self._ending(tokens)
        return ending is not None and len(tokens) + len(ending) <= self._left and self._left > len(tokens)

    def _close(self, tokens: list[int]) -> list[int]:
        kept = tokens[: self._longest(tokens)]
        ending = self._ending(kept)
        if ending is None or len(kept) + len(ending) > self._left:
            raise DiffGGUFError("the constraint's known ending was lost")
        self.stats.closed_tokens += len(ending)
        self._take([*kept, *ending])
        self.finished = True
        return [*kept, *ending]

    def _longest(self, tokens: Sequence[int], least: int = 0) -> int:
        """How many of the tokens may stay so that the rest has room. The first `least` are known to."""
        n = min(len(tokens), self._left)
        back = 1
        while n > least:
            ending = self._ending(tokens[:n])
            if ending is not None and n + len(ending) <= self._left:
                return n
            n -= back
            back *= 2
        return least

    def _take(self, tokens: Sequence[int]) -> None:
        thought = self._thought(tokens)
        answer = tokens[thought:]
        if answer and self._matcher.try_consume_tokens(list(answer)) != len(answer):
            raise DiffGGUFError("the grammar refuses what it took before")
        self._symbols += self._symbols_of(answer)
        self._thinks = thought == len(tokens) and self._thought_goes_on(tokens)
        if self._thought_left is not None:
            self._thought_left = self._thought_left - thought if self._thinks else None
        self._left -= len(tokens)

    # ------------------------------------------------------------------------------------------------- the grammar

    def _thought(self, tokens: Sequence[int]) -> int:
        """How many of a canvas's first tokens are a thought."""
        if (
            not self._markers
            or not tokens
            or not (self._thinks or (not self._symbols and tokens[0] == self._markers[0]))
        ):
            return 0
        if self._markers[1] in tokens:
            return list(tokens).index(self._markers[1]) + 1
        return len(tokens)

    def _thought_goes_on(self, tokens: Sequence[int]) -> bool:
        return bool(
            self._markers and tokens and self._markers[1] not in tokens and self._thought(tokens) == len(tokens)
        )

    def _thought_open(self, tokens: Sequence[int]) -> bool:
        """Whether the thought goes on behind what was committed and these."""
        return self._thought_goes_on(tokens) or (self._thinks and not tokens)

    def _ending(self, tokens: Sequence[int]) -> list[int] | None:
        """The tokens that end the answer behind what was committed and these."""
        thought = self._thought(tokens)
        closing = [self._markers[1]] if self._markers and self._thought_open(tokens) else []
        answer = [*tokens[thought:]]
        symbols = self._grammar.endings([*self._symbols, *self._symbols_of(answer)])
        if symbols is None:
            return None
        try:
            ids = self._grammar.tokens_of(symbols)
        except UnsupportedError:
            return None
        matcher = self._at(answer)
        if matcher is None or matcher.try_consume_tokens(ids) != len(ids) or not matcher.is_accepting():
            return None
        return [*closing, *ids]

    def _at(self, tokens: Sequence[int]) -> llguidance.LLMatcher | None:
        """The matcher behind what was committed and these; None where it refuses them."""
        matcher = self._matcher.deep_copy()
        answer = list(tokens[self._thought(tokens) :])
        if answer and matcher.try_consume_tokens(answer) != len(answer):
            return None
        return matcher

    def _symbols_of(self, tokens: Sequence[int]) -> list[int]:
        symbols: list[int] = []
        for token in tokens:
            number = self._tables.symbols.number.get(token)
            symbols += self._tables.bytes_of[token] if number is None else [number]
        return symbols

    def _forced(self, matcher: llguidance.LLMatcher, most: int) -> list[int]:
        """Tokens that must come; the matcher is moved behind them."""
        forced: list[int] = list(matcher.compute_ff_tokens())[: max(0, most)]
        forced = forced[: matcher.try_consume_tokens(forced)]
        return forced

    def _mask(self, matcher: llguidance.LLMatcher, tokens: Sequence[int]) -> Mask:
        key = tuple(tokens)
        if key not in self._cached:
            self.stats.masks += 1
            words: Any = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
            mask = words[: len(self._tables.doubles)] & self._tables.doubles
            self._cached[key] = mask if mask.any() else words[: len(self._tables.doubles)].copy()
        return self._cached[key]

    @property
    def _ends_mask(self) -> Mask:
        return self._tables.ends_mask

    def parsed(self) -> Any:
        """The value of the whole answer, for JSON. A text that another parser refuses is a defect."""
        data = bytes(symbol for symbol in self._symbols if symbol < 256)
        if not self._matcher.is_accepting():
            raise DiffGGUFError("the grammar does not take the answer that it led to")
        try:
            return self._grammar.parsed(data)
        except ValueError as error:
            raise DiffGGUFError(f"the grammar led to an answer that is not JSON: {error}") from None


def _only(mask: Mask) -> int | None:
    """The one id of a mask; None where there are more."""
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    word = int(mask[words[0]])
    return None if word & (word - 1) else int(words[0]) * 32 + word.bit_length() - 1


class _Timed:
    def __init__(self, stats: ConstraintStats) -> None:
        self._stats = stats

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stats.grammar_s += time.perf_counter() - self._began

"""A model's turn, read from its tokens: thoughts, answer and tool calls apart.

Structure is what special tokens write, never what text spells: an answer may quote ``<|channel>`` or ``<|tool_call>``.
Models leave markers out, double them, or use one where they mean its name, and all of that is read here.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydiffgguf.text.calls import CALL_CLOSE, CALL_OPEN, QUOTE, Quoted, ToolCall, parse_calls
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = ["TextView", "Turn", "until_end"]

CHANNEL_OPEN = "<|channel>"
CHANNEL_CLOSE = "<channel|>"
THOUGHT = "thought"

_NAME_LINE = re.compile(r"\s*\w+[ \t]*\n")
_NAME_BEGUN = re.compile(r"\s*\w*[ \t]*(?:\n|\Z)")
#: A marker behind one of these is quoted.
_QUOTES = ("`", "'", '"', "\u201c", "\u2018", "(")


@dataclass(frozen=True)
class Turn:
    """`text`: the answer. `reasoning`: the thoughts; several are joined by a newline. `n_thought`: tokens of thoughts,
    their markers among them. `thinks`: the last thought is not closed. `rows`: which
    tokens `text` is made of."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    n_thought: int = 0
    thinks: bool = False
    rows: list[int] = field(default_factory=list)


def until_end(tokens: Sequence[int], end_ids: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there was one."""
    for i, token in enumerate(tokens):
        if token in end_ids:
            return list(tokens[:i]), True
    return list(tokens), False


@dataclass
class _Piece:
    """Tokens between markers, `first` being the place of the first one; `opener`: the marker before them, "" at the
    beginning."""

    opener: str
    tokens: list[int]
    first: int


class TextView:
    """How tokens of a turn read. Without a tokenizer everything reads "".

    Args:
        lead: tokens that the turn begins with and that are not part of what is read: a thought that the prompt opened.
    """

    def __init__(self, tokenizer: Tokenizer | None, lead: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._lead = list(lead)
        self._hidden: frozenset[int] = frozenset()
        self._markers: dict[int, str] = {}
        self._quote: int | None = None
        if tokenizer is not None:
            marked = {text: tokenizer.token_id(text) for text in (CHANNEL_OPEN, CHANNEL_CLOSE, CALL_OPEN, CALL_CLOSE)}
            self._markers = {id_: text for text, id_ in marked.items() if id_ is not None}
            self._quote = tokenizer.token_id(QUOTE)
            self._hidden = tokenizer.special_ids - self._markers.keys()

    def behind(self, prompt: Sequence[int]) -> TextView:
        """The view of a turn that the prompt has begun: where it has opened a thought, the turn is in it."""
        for i in range(len(prompt) - 1, -1, -1):
            marker = self._markers.get(prompt[i])
            if marker == CHANNEL_CLOSE or prompt[i] in self._ends:
                break
            if marker == CHANNEL_OPEN:
                return TextView(self._tokenizer, prompt[i:])
        return self if not self._lead else TextView(self._tokenizer)

    @property
    def _ends(self) -> frozenset[int]:
        return frozenset() if self._tokenizer is None else self._tokenizer.end_ids

    def read(self, tokens: Sequence[int], *, ended: bool = True) -> Turn:
        """What the tokens say. While a turn has not `ended`, a channel or a call that is open is held back from the
        text, as it may still be closed."""
        if self._tokenizer is None:
            return Turn()
        return _Reading(self, self._pieces(tokens), ended).turn(len(self._lead))

    def answer(self, tokens: Sequence[int], *, ended: bool = True) -> str:
        return self.read(tokens, ended=ended).text

    def tokens_within(self, tokens: list[int], n_characters: int) -> list[int]:
        """The longest head of `tokens` whose answer has at most `n_characters` characters."""

        def length(n: int) -> int:
            return len(self.answer(tokens[:n], ended=False))

        return tokens[: bisect.bisect_right(range(len(tokens) + 1), n_characters, key=length) - 1]

    def thought_limit(self, tokens: Sequence[int], limit: int) -> int | None:
        """How many of the tokens stay where thoughts take more than `limit` tokens, or take as many and go on; None
        where they are within it."""
        turn = self.read(tokens, ended=False)
        if turn.n_thought < limit or (turn.n_thought == limit and not turn.thinks):
            return None
        n = bisect.bisect_left(
            range(len(tokens) + 1), limit, key=lambda n: self.read(tokens[:n], ended=False).n_thought
        )
        return n

    @property
    def channel_ids(self) -> tuple[int, int] | None:
        """The tokens that open and close a thought; None where the vocabulary has none."""
        if self._tokenizer is None:
            return None
        opening, closing = self._tokenizer.token_id(CHANNEL_OPEN), self._tokenizer.token_id(CHANNEL_CLOSE)
        return None if opening is None or closing is None else (opening, closing)

    @property
    def in_thought(self) -> bool:
        """The prompt has opened a thought."""
        return bool(self._lead)

    @property
    def close_id(self) -> int | None:
        """The token that closes a thought."""
        return None if self._tokenizer is None else self._tokenizer.token_id(CHANNEL_CLOSE)

    # ------------------------------------------------------------------------------------------------------ pieces

    def _pieces(self, tokens: Iterable[int]) -> list[_Piece]:
        pieces = [_Piece("", [], 0)]
        for i, token in enumerate((*self._lead, *tokens)):
            marker = self._markers.get(token)
            if marker is None:
                pieces[-1].tokens.append(token)
            else:
                pieces.append(_Piece(marker, [], i + 1))
        return pieces

    def decode(self, tokens: Iterable[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(token for token in tokens if token not in self._hidden)

    def quoted(self, tokens: Iterable[int]) -> Quoted:
        """Text and quoted strings, alternating, the first and the last being text."""
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == self._quote:
                parts.append([])
            else:
                parts[-1].append(token)
        return [self.decode(part) for part in parts]


class _Reading:
    """One pass over the pieces of a turn."""

    def __init__(self, view: TextView, pieces: list[_Piece], ended: bool) -> None:
        self._view = view
        self._pieces = pieces
        self._ended = ended
        self._text = ""
        self._rows: list[int] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []
        self._n_thought = 0
        self._after_structure = False  # nothing of the answer came since the last thought or call
        self._held = False  # the channel that was read last is open

    def turn(self, n_lead: int) -> Turn:
        thinks = False
        first = self._pieces[0]
        if self._lacks_opener(self._view.decode(first.tokens)):
            self._think(self._view.decode(first.tokens), len(first.tokens))
            thinks = len(self._pieces) == 1
        else:
            self._say(first)
        i = 1
        while i < len(self._pieces):
            self._held = False
            opener = self._pieces[i].opener
            if opener == CHANNEL_OPEN:
                used = self._channel(i)
                thinks = self._held
            elif opener == CALL_OPEN:
                used = self._call(i)
            else:
                used = 1
                self._close(self._pieces[i])
            i += used
        n_thought = max(0, self._n_thought - n_lead)
        reasoning = "\n".join(thought for thought in self._thoughts if thought)
        rows = [row - n_lead for row in self._rows if row >= n_lead]
        return Turn(self._text, reasoning, self._calls, n_thought, thinks, rows)

    def _lacks_opener(self, text: str) -> bool:
        """The turn begins with the name of a thought, and a closing marker, or nothing as yet, is behind it."""
        name, newline, _ = text.partition("\n")
        if len(self._pieces) > 1:
            return self._pieces[1].opener == CHANNEL_CLOSE and name.strip() == THOUGHT
        return not self._ended and name.strip() == THOUGHT and bool(newline)

    def _think(self, body: str, n_tokens: int) -> None:
        name, newline, thought = body.partition("\n")
        # only the channel's name is on the first line; while streaming it may be half there
        known = name.strip() == THOUGHT if newline else THOUGHT.startswith(name.strip())
        self._thoughts.append((thought if known else body).strip())
        self._n_thought += n_tokens
        self._after_structure = True

    def _say(self, piece: _Piece, before: str = "") -> None:
        """Takes a piece into the answer, with its marker's text `before` it."""
        text = before + self._view.decode(piece.tokens)
        self._add(text, range(piece.first - bool(before), piece.first + len(piece.tokens)))

    def _add(self, text: str, rows: range) -> None:
        self._text += text.lstrip("\n") if self._after_structure else text
        self._after_structure = self._after_structure and not text.strip("\n")
        self._rows += rows

    def _opener(self, i: int) -> str:
        """The marker of piece `i`; "" behind the last."""
        return self._pieces[i].opener if i < len(self._pieces) else ""

    def _channel(self, i: int) -> int:
        """Reads the channel that piece `i` opens; returns how many pieces that took. Sets `_held` where it is open."""
        tokens = self._pieces[i].tokens
        following = self._opener(i + 1)
        body = self._view.decode(tokens)
        if following == CHANNEL_OPEN and not body.strip():
            self._n_thought += 1 + len(tokens)  # the marker is there twice
            return 1
        name, newline, _ = body.partition("\n")
        is_thought = name.strip() == THOUGHT if newline else THOUGHT.startswith(name.strip())
        quotes = bool(self._text.strip()) and not self._after_structure
        if following == CHANNEL_CLOSE and (is_thought or not quotes or _NAME_LINE.match(body)):
            self._think(body, 2 + len(tokens))
            self._say(self._pieces[i + 1])
            return 2
        # Unfinished. One with another name is known for a channel by its end only.
        may_be_one = not self._ended and not following and _NAME_BEGUN.match(body)
        if name.strip() == THOUGHT or (not following and is_thought) or may_be_one:
            self._think(body, 1 + len(tokens))
            self._held = not following
            return 1
        # A name without a meaning: quoted in the answer, or a marker too many.
        self._say(self._pieces[i], CHANNEL_OPEN if quotes else "")
        return 1

    def _close(self, piece: _Piece) -> None:
        """A closing marker without its opener: a quotation, or one too many."""
        self._say(piece, piece.opener if self._text.endswith(_QUOTES) else "")

    def _call(self, i: int) -> int:
        """Reads the call that piece `i` opens; returns how many pieces that took."""
        quoted = self._view.quoted(self._pieces[i].tokens)
        closed = self._opener(i + 1) == CALL_CLOSE
        calls = parse_calls(quoted) if closed else None
        if not closed and not self._ended and not self._opener(i + 1):
            return 1  # it may still be closed
        if calls:
            self._calls += calls
            self._after_structure = True
        else:
            # Cut by the end, or no call: text as the model wrote it.
            piece = self._pieces[i]
            text = CALL_OPEN + QUOTE.join(quoted) + (CALL_CLOSE if closed else "")
            self._add(text, range(piece.first - 1, piece.first + len(piece.tokens) + closed))
        if closed:
            self._say(self._pieces[i + 1])
        return 2 if closed else 1

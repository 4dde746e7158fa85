"""Task generators of the demo model: Sudoku, one-answer questions, small stories, small Python functions.

Everything is drawn from a `random.Random` that the caller seeds. An item belongs to the held-out split when the
SHA-256 of its content starts below one tenth of the hash range; training asks for `split="train"` and redraws until
the hash falls on the other side, so no held-out puzzle, question or document is ever trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

HELD_OUT_SHARE = 0.1

NAMES = ["Anna", "Ben", "Dora", "Emma", "Finn", "Hugo", "Iris", "Jack", "Kate", "Leo", "Mia", "Sam"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "pink"]
OBJECTS = ["ball", "cup", "hat", "book", "key", "lamp", "coin", "drum", "kite", "bell"]
PLACES = ["park", "garden", "school", "forest", "market", "library", "station", "castle"]
ANIMALS = ["dog", "cat", "horse", "rabbit", "duck", "goat", "mouse", "parrot"]
FOODS = ["bread", "soup", "cake", "rice", "cheese", "salad", "fish", "corn"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def held_out(content: str) -> bool:
    """True when `content` belongs to the held-out tenth; decided by its SHA-256 alone."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


# --- Sudoku ---------------------------------------------------------------------------------------------------------


def _all_grids() -> list[str]:
    """The 288 solved 4x4 grids, each as 16 digits in reading order."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    grids = []
    for four in itertools.product(rows, repeat=4):
        g = "".join(four)
        if all(len({g[r * 4 + c] for r in range(4)}) == 4 for c in range(4)) and all(
            len({g[(br + i) * 4 + bc + j] for i in (0, 1) for j in (0, 1)}) == 4 for br in (0, 2) for bc in (0, 2)
        ):
            grids.append(g)
    return grids


GRIDS = _all_grids()


def solutions(puzzle: str) -> list[str]:
    """All solved grids that agree with `puzzle` (16 characters, `.` for a blank)."""
    givens = [(i, c) for i, c in enumerate(puzzle) if c != "."]
    return [g for g in GRIDS if all(g[i] == c for i, c in givens)]


def grid_text(cells: str) -> str:
    """Four lines of four cells with a newline between them."""
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))


@dataclass(frozen=True)
class Sudoku:
    """One 4x4 puzzle (16 characters, `.` for a blank) and its only solution."""

    puzzle: str
    solution: str


def sudoku(rng: Random, split: str, blanks: tuple[int, int] = (5, 11)) -> Sudoku:
    """A puzzle with exactly one solution and `blanks` (inclusive range) cells missing, of the given split."""
    while True:
        solution = rng.choice(GRIDS)
        want = rng.randint(*blanks)
        cells = list(solution)
        for i in rng.sample(range(16), 16):
            if want == 0:
                break
            kept, cells[i] = cells[i], "."
            if len(solutions("".join(cells))) > 1:
                cells[i] = kept
            else:
                want -= 1
        puzzle = "".join(cells)
        if want == 0 and held_out(puzzle) == (split == "test"):
            return Sudoku(puzzle, solution)


SUDOKU_QUESTION = "Solve this Sudoku:\n"
SUDOKU_HEADER = "Sudoku:\n"


def sudoku_prompt(s: Sudoku) -> str:
    """The user's turn that asks for the solved grid."""
    return SUDOKU_QUESTION + grid_text(s.puzzle)


# --- questions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A user turn, its only right answer, and a short thought that leads to it (used when thinking is on)."""

    kind: str
    prompt: str
    answer: str
    thought: str


def _asked(rng: Random, question: str) -> str:
    """The question, plainly or in somebody's mouth."""
    if rng.random() < 0.5:
        return question[0].upper() + question[1:]
    return f"{rng.choice(NAMES)} asks: {question}"


def _day(rng: Random) -> Question:
    i = rng.randrange(len(DAYS))
    step, side = rng.choice([(1, "after"), (-1, "before")])
    prompt = _asked(rng, f"what day comes {side} {DAYS[i]}?")
    return Question("day", prompt, f"{DAYS[(i + step) % len(DAYS)]}.", "Go through the week.")


def _next(rng: Random) -> Question:
    a = rng.randint(1, 8)
    step, side = rng.choice([(1, "after"), (-1, "before")])
    prompt = _asked(rng, f"which number comes {side} {a}?")
    return Question("next", prompt, f"{a + step} comes {side} {a}.", "Count.")


def _bigger(rng: Random) -> Question:
    a, b = rng.sample(range(10), 2)
    word, other = rng.choice([("bigger", min), ("smaller", max)])
    n = other(a, b)
    m = a + b - n
    return Question("compare", _asked(rng, f"which is {word}, {a} or {b}?"), f"{m} is {word} than {n}.", "Compare.")


def _order(rng: Random) -> Question:
    digits = rng.sample(range(10), 3)
    shown, answer = (" ".join(str(i) for i in order) for order in (digits, sorted(digits)))
    return Question("order", _asked(rng, f"put in order: {shown}."), answer, "Compare.")


QUESTION_KINDS: list[Callable[[Random], Question]] = [_day, _next, _bigger, _order]


def question(rng: Random, split: str) -> Question:
    """A question of a random kind and of the given split (decided by its prompt)."""
    while True:
        q = rng.choice(QUESTION_KINDS)(rng)
        if held_out(q.prompt) == (split == "test"):
            return q


# --- documents ------------------------------------------------------------------------------------------------------

Values = dict[str, str]


@dataclass(frozen=True)
class Template:
    """A document rendered from fields. `text` names fields as `<<field>>` or `<<derived>>`.

    Fields: name -> the values it may take; derived: name -> (function, names of the fields it depends on);
    distinct: groups of fields that never share a value.
    """

    name: str
    text: str
    fields: dict[str, list[str]]
    derived: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = field(default_factory=dict)
    distinct: tuple[tuple[str, ...], ...] = ()

    def segments(self) -> list[tuple[str, str]]:
        """The text cut into ("lit", text) and ("var", name), in order."""
        out: list[tuple[str, str]] = []
        rest = self.text
        while rest:
            a = rest.find("<<")
            if a < 0:
                out.append(("lit", rest))
                break
            if a:
                out.append(("lit", rest[:a]))
            b = rest.index(">>", a)
            out.append(("var", rest[a + 2 : b]))
            rest = rest[b + 2 :]
        return out

    def value(self, name: str, values: Values) -> str:
        """The text of a field or derived field under `values`."""
        if name in self.derived:
            fn, needs = self.derived[name]
            return fn(*(values[n] for n in needs))
        return values[name]

    def needs(self, name: str) -> tuple[str, ...]:
        """The fields that the text of `name` depends on."""
        return self.derived[name][1] if name in self.derived else (name,)

    def render(self, values: Values) -> str:
        """The whole document."""
        return "".join(s if k == "lit" else self.value(s, values) for k, s in self.segments())

    def allowed(self, values: Values) -> bool:
        """True unless two fields of one distinct group share a value (fields not set yet do not count)."""
        for group in self.distinct:
            seen = [values[n] for n in group if n in values]
            if len(set(seen)) != len(seen):
                return False
        return True

    def bind(self, names: tuple[str, ...], values: Values) -> Iterator[Values]:
        """Every way to give the unset fields among `names` a value, beside the present ones."""
        free = [n for n in names if n not in values]
        for combo in itertools.product(*(self.fields[n] for n in free)):
            new = {**values, **dict(zip(free, combo, strict=True))}
            if self.allowed(new):
                yield new


def _match(t: Template, segs: list[tuple[str, str]], text: str, values: Values, back: bool) -> Iterator[Values]:
    """Bindings under which the segments begin (or, with `back`, end) with `text`."""
    if not text:
        yield values
        return
    if not segs:
        return
    kind, s = segs[-1] if back else segs[0]
    rest = segs[:-1] if back else segs[1:]
    for new in [values] if kind == "lit" else t.bind(t.needs(s), values):
        piece = s if kind == "lit" else t.value(s, new)
        n = min(len(piece), len(text))
        agree = piece[len(piece) - n :] == text[len(text) - n :] if back else piece[:n] == text[:n]
        if agree:
            yield from _match(t, rest, text[: len(text) - n] if back else text[n:], new, back)


def determined(prefix: str, gap: str, suffix: str) -> bool:
    """True when no document of any template, of any field values, fits prefix and suffix with another middle.

    The other middle may have any length, so a gap that passes is determined even when its length is unknown.
    """
    whole = prefix + gap + suffix
    for t in TEMPLATES:
        segs = t.segments()
        for some in _match(t, segs, prefix, {}, back=False):
            for more in _match(t, segs, suffix, some, back=True):
                for values in t.bind(tuple(t.fields), more):
                    text = t.render(values)
                    if text != whole and len(text) >= len(prefix) + len(suffix):
                        return False
    return True


VARS = ["price", "width", "height", "speed", "weight", "count", "score", "level"]
LISTS = ["items", "words", "names", "cards", "boxes", "coins", "lines", "files"]
OPS = {"add": ("+", "Add"), "sub": ("-", "Subtract"), "mul": ("*", "Multiply")}
PICKS = {"max": "largest", "min": "smallest", "sum": "sum", "len": "number", "sorted": "order"}
DIGITS = [str(i) for i in range(2, 10)]

SHORT: list[Template] = [
    Template(
        "gift",
        "On <<day>> <<p>> found a <<c>> <<o>> in the <<l>>. <<p>> gave the <<c>> <<o>> to <<q>>. "
        "<<q>> took the <<o>> home that <<day>> and never went back to the <<l>>.",
        {"day": DAYS, "p": NAMES, "q": NAMES, "c": COLOURS, "o": OBJECTS, "l": PLACES},
        distinct=(("p", "q"),),
    ),
    Template(
        "pet",
        "There is a <<c>> <<a>> at the <<l>>. The <<c>> <<a>> belongs to <<p>>, who feeds it <<f>> every <<day>>. "
        "When <<p>> brings <<f>> to the <<l>> on <<day>>, the <<a>> is happy.",
        {"c": COLOURS, "a": ANIMALS, "l": PLACES, "p": NAMES, "f": FOODS, "day": DAYS},
    ),
    Template(
        "meal",
        "Last night <<p>> and <<q>> wanted <<x>>. They went to the <<l>> to buy <<x>>, but the <<l>> had only <<y>>. "
        "So <<p>> cooked the <<y>> and <<q>> ate it without <<x>>.",
        {"p": NAMES, "q": NAMES, "x": FOODS, "y": FOODS, "l": PLACES},
        distinct=(("p", "q"), ("x", "y")),
    ),
    Template(
        "trip",
        "Tomorrow <<p>> will meet <<q>> at the <<l>>. <<p>> will bring the <<c>> <<o>>, and <<q>> will bring <<f>>. "
        "Behind the <<l>> they will share the <<f>>, and <<p>> will leave the <<c>> <<o>> with <<q>>.",
        {"p": NAMES, "q": NAMES, "l": PLACES, "c": COLOURS, "o": OBJECTS, "f": FOODS},
        distinct=(("p", "q"),),
    ),
    Template(
        "operator",
        'def <<op>>_<<a>>_<<b>>(<<a>>, <<b>>):\n    """<<Op>> <<a>> and <<b>>."""\n    return <<a>> <<sym>> <<b>>\n\n'
        "assert <<op>>_<<a>>_<<b>>(<<x>>, <<y>>) == <<x>> <<sym>> <<y>>\n",
        {"op": list(OPS), "a": VARS, "b": VARS, "x": DIGITS, "y": DIGITS},
        {"Op": (lambda op: OPS[op][1], ("op",)), "sym": (lambda op: OPS[op][0], ("op",))},
        distinct=(("a", "b"),),
    ),
    Template(
        "builtin",
        'def <<f>>_of_<<i>>(<<i>>):\n    """Return the <<w>> of the <<i>>."""\n    return <<f>>(<<i>>)\n\n'
        "<<i>> = [<<x>>, <<y>>, <<z>>]\nassert <<f>>_of_<<i>>(<<i>>) == <<f>>([<<x>>, <<y>>, <<z>>])\n",
        {"f": list(PICKS), "i": LISTS, "x": DIGITS, "y": DIGITS, "z": DIGITS},
        {"w": (lambda f: PICKS[f], ("f",))},
    ),
    Template(
        "check",
        'def <<a>>_is_<<w>>(<<a>>):\n    """Tell whether <<a>> is <<w>> <<n>>."""\n    return <<a>> <<sym>> <<n>>\n\n'
        "<<a>> = <<n>>\nprint(<<a>>_is_<<w>>(<<a>>))\n",
        {"a": VARS, "w": ["above", "below"], "n": [str(i) for i in range(10, 100)]},
        {"sym": (lambda w: ">" if w == "above" else "<", ("w",))},
    ),
    Template(
        "loop",
        'def show_<<i>>(<<i>>, <<a>>):\n    """Print all <<i>> with <<a>>."""\n'
        "    for x in <<i>>:\n        print(x, <<a>>)\n\nshow_<<i>>(<<i>>, <<a>>)\n",
        {"i": LISTS, "a": VARS},
    ),
]


def chain(names: str, joint: str) -> Template:
    """Some short templates, one after the other, each with fields of its own."""
    parts = [next(t for t in SHORT if t.name == n) for n in names.split()]
    texts: list[str] = []
    fields: dict[str, list[str]] = {}
    derived: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {}
    distinct: list[tuple[str, ...]] = []
    for i, t in enumerate(parts):
        texts.append(t.text.replace(">>", f"{i}>>"))
        fields |= {f"{n}{i}": v for n, v in t.fields.items()}
        derived |= {f"{n}{i}": (fn, tuple(f"{k}{i}" for k in needs)) for n, (fn, needs) in t.derived.items()}
        distinct += [tuple(f"{n}{i}" for n in group) for group in t.distinct]
    return Template("+".join(names.split()), joint.join(texts), fields, derived, tuple(distinct))


ENGLISH_NAMES = ("gift", "pet", "meal", "trip")
ENGLISH = [t for t in SHORT if t.name in ENGLISH_NAMES]
PYTHON = [t for t in SHORT if t.name not in ENGLISH_NAMES]
LONG_ENGLISH = [chain(n, "\n\n") for n in ("gift meal", "pet trip", "meal pet", "trip gift", "pet gift meal")]
LONG_PYTHON = [
    chain(n, "\n\n")
    for n in ("operator check", "builtin loop", "loop operator", "check builtin", "operator loop check")
]
TEMPLATES = [*ENGLISH, *PYTHON, *LONG_ENGLISH, *LONG_PYTHON]


def document(rng: Random, split: str, templates: list[Template]) -> tuple[str, str]:
    """(template name, text) of a random document of the given split (decided by its text)."""
    while True:
        t = rng.choice(templates)
        values: Values = {n: rng.choice(v) for n, v in t.fields.items()}
        if not t.allowed(values):
            continue
        text = t.render(values)
        if held_out(text) == (split == "test"):
            return t.name, text


def corpus(seed: int, n: int) -> Iterator[str]:
    """`n` training texts of every kind, for the tokenizer."""
    rng = Random(seed)
    for _ in range(n):
        yield document(rng, "train", ENGLISH)[1]
        yield document(rng, "train", PYTHON)[1]
        q = question(rng, "train")
        yield q.prompt
        yield q.answer
        yield q.thought
    for _ in range(max(1, n // 20)):
        for w in [SUDOKU_QUESTION, SUDOKU_HEADER, "user", "model", "system", "thought", *DAYS]:
            yield w
            yield " " + w

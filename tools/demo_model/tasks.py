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

NAMES = [
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Finn",
    "Gina",
    "Hugo",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Vera",
    "Will",
    "Zoe",
    "Adam",
    "Clara",
    "Eric",
    "Fay",
    "Gus",
    "Hana",
    "Ivan",
    "June",
]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "pink", "gray", "purple"]
OBJECTS = [
    "ball",
    "cup",
    "hat",
    "book",
    "key",
    "lamp",
    "coin",
    "drum",
    "kite",
    "bell",
    "spoon",
    "shoe",
    "rope",
    "doll",
    "map",
    "box",
    "pen",
    "ring",
]
PLACES = [
    "park",
    "garden",
    "kitchen",
    "school",
    "forest",
    "market",
    "library",
    "museum",
    "station",
    "harbor",
    "barn",
    "castle",
]
ANIMALS = ["dog", "cat", "horse", "rabbit", "duck", "goat", "mouse", "sheep", "parrot", "turtle"]
FOODS = ["bread", "soup", "cake", "rice", "cheese", "salad", "pie", "fish", "corn", "pasta"]
FEELINGS = ["happy", "sad", "tired", "proud", "calm", "angry"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "new"),
    ("full", "empty"),
    ("open", "closed"),
    ("dark", "light"),
    ("early", "late"),
    ("hard", "soft"),
    ("high", "low"),
    ("long", "short"),
    ("loud", "quiet"),
    ("rich", "poor"),
    ("wet", "dry"),
    ("strong", "weak"),
    ("wide", "narrow"),
    ("clean", "dirty"),
    ("near", "far"),
]


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


# Questions are about digits and days. A net of this size learns in minutes to carry ten digits from the prompt into the
# answer and to compare them; carrying hundreds of words, or the table of sums, it did not learn in an hour.


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


def _repeat(rng: Random) -> Question:
    pools = [NAMES, COLOURS, OBJECTS, PLACES, ANIMALS, FOODS]
    words = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(3, 9))]
    line = " ".join(words)
    return Question("repeat", f"Repeat: {line}", line, f"Say {words[0]} first.")


def _sort(rng: Random) -> Question:
    pools = {"name": NAMES, "color": COLOURS, "object": OBJECTS, "place": PLACES, "animal": ANIMALS, "food": FOODS}
    labels = rng.sample(list(pools), rng.randint(2, 5))
    words = {k: rng.choice(pools[k]) for k in labels}
    mixed = rng.sample(labels, len(labels))
    prompt = "Words: " + " ".join(words[k] for k in mixed) + ". Sort: " + ", ".join(labels)
    answer = ", ".join(f"{k} {words[k]}" for k in labels)
    return Question("sort", prompt, answer, f"The {labels[0]} is {words[labels[0]]}.")


# Dense copying: every token of the answer stands in the prompt. Learnt first, it carries the sparse questions.
DRILLS: list[Callable[[Random], Question]] = [_repeat, _sort]
QUESTION_KINDS: list[Callable[[Random], Question]] = [_day, _next, _bigger, _order]


def question(rng: Random, split: str, drill: float = 0.0) -> Question:
    """A question of a random kind (a drill with probability `drill`) and of the given split (decided by its prompt)."""
    while True:
        q = rng.choice(DRILLS if drill and rng.random() < drill else QUESTION_KINDS)(rng)
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


PEOPLE = list(NAMES)
VARS = ["price", "cost", "width", "height", "speed", "weight", "count", "total", "score", "level", "size", "rate"]
LISTS = ["items", "words", "names", "cards", "boxes", "coins", "lines", "files", "notes", "parts"]
OPS = {"add": ("+", "Add"), "sub": ("-", "Subtract"), "mul": ("*", "Multiply")}
PICKS = {"max": "largest", "min": "smallest", "sum": "sum", "len": "number", "sorted": "order"}
DIGITS = [str(i) for i in range(2, 10)]

TEMPLATES: list[Template] = [
    Template(
        "gift",
        "On <<day>> <<p>> found a <<c>> <<o>> in the <<l>>. <<p>> gave the <<c>> <<o>> to <<q>>. "
        "<<q>> took the <<o>> home on <<day>> and never went back to the <<l>>.",
        {"day": list(DAYS), "p": PEOPLE, "q": PEOPLE, "c": list(COLOURS), "o": list(OBJECTS), "l": list(PLACES)},
        distinct=(("p", "q"),),
    ),
    Template(
        "pet",
        "<<p>> has a <<c>> <<a>>. The <<a>> is called <<q>>. Every <<day>> <<p>> takes <<q>> to the <<l>>. "
        "In the <<l>> the <<c>> <<a>> is <<f>>. <<p>> is <<f>> on <<day>> too.",
        {
            "p": PEOPLE,
            "q": PEOPLE,
            "c": list(COLOURS),
            "a": list(ANIMALS),
            "day": list(DAYS),
            "l": list(PLACES),
            "f": list(FEELINGS),
        },
        distinct=(("p", "q"),),
    ),
    Template(
        "meal",
        "<<p>> and <<q>> wanted <<x>>. They walked to the <<l>> to buy <<x>>. The <<l>> had no <<x>>, so <<p>> got "
        "<<y>>. <<q>> ate the <<y>> with <<p>>.",
        {"p": PEOPLE, "q": PEOPLE, "x": list(FOODS), "y": list(FOODS), "l": list(PLACES)},
        distinct=(("p", "q"), ("x", "y")),
    ),
    Template(
        "lost",
        "<<p>> lost a <<o>> and felt <<f>>. The <<o>> was <<c>>. <<q>> looked for the <<c>> <<o>> in the <<l>>, and "
        "<<r>> looked in the <<m>>. On <<day>> <<r>> saw the <<c>> <<o>> in the <<m>>, not in the <<l>>. <<r>> told "
        "<<q>>, and <<q>> told <<p>>. Since that <<day>> <<p>> is not <<f>>. <<p>> keeps the <<o>> near <<q>> "
        "and <<r>>.",
        {
            "p": PEOPLE,
            "q": PEOPLE,
            "r": PEOPLE,
            "o": list(OBJECTS),
            "c": list(COLOURS),
            "l": list(PLACES),
            "m": list(PLACES),
            "day": list(DAYS),
            "f": list(FEELINGS),
        },
        distinct=(("p", "q", "r"), ("l", "m")),
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
        "    for x in <<i>>:\n"
        "        print(x, <<a>>)\n    return <<a>>\n\n"
        "show_<<i>>([<<x>>, <<y>>], <<n>>)  # <<a>> = <<n>>, <<i>> = [<<x>>, <<y>>]\n",
        {"i": LISTS, "a": VARS, "x": DIGITS, "y": DIGITS, "n": DIGITS},
    ),
]
STORIES = [t for t in TEMPLATES if t.name in ("gift", "pet", "meal", "lost")]
PYTHON = [t for t in TEMPLATES if t not in STORIES]


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
        yield document(rng, "train", STORIES)[1]
        yield document(rng, "train", PYTHON)[1]
        q = question(rng, "train")
        yield q.prompt
        yield q.answer
        yield q.thought
    rare = [SUDOKU_QUESTION, SUDOKU_HEADER, "user", "model", "system", "thought", *DAYS, *MONTHS]
    rare += [w for pair in OPPOSITES for w in pair]
    for _ in range(max(1, n // 20)):
        for w in rare:
            yield w
            yield " " + w

"""Pinned rows over ten thousand random patterns, seeds and options: never one of them changed, in any step.

Through the loop on a net so small that all its canvases take seconds (beside the CPU with two thousand patterns, at
every place but the one that has more parts than the net has layers), and through the sampler alone. What pins mean
beyond that, and that free rows get what they should, is held against transformers in tests/parity/test_pinned.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from places import PLACES, Place
from tiny_checkpoint import make_checkpoint

from pydiffgguf._binding.records import Sampling
from pydiffgguf.convert import convert
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session

Ids = npt.NDArray[np.int32]

PATTERNS, PATTERNS_ELSEWHERE = 10_000, 2_000
CANVAS, VOCAB, ROWS = 12, 48, 400


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, place: Place) -> Iterator[Session]:
    """Two layers, a sliding and a full one; 12 rows, 48 ids; behind a prefix longer than the window."""
    folder = tmp_path_factory.mktemp("smallest")
    make_checkpoint(
        folder / "net",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=32,
        sliding_window=6,
        canvas_length=CANVAS,
    )
    convert(folder / "net", folder / "net.gguf", type="f32", allow_missing_tokenizer=True)
    with (
        place.open(folder / "net.gguf", type_kv="f32", n_ctx=64, n_threads=1) as model,
        model.session(n_rows=ROWS) as session,
    ):
        session.encode(np.arange(10))
        yield session


def random_pins(rng: np.random.Generator, n: int) -> Ids:
    """A pattern for n rows: scattered with any density, a gap between a head and a tail, everything, or nothing."""
    kind = rng.integers(10)
    if kind == 0:
        free = np.full(n, bool(rng.integers(2)))
    elif kind < 5:
        first, last = sorted(rng.integers(0, n + 1, 2))
        free = (np.arange(n) >= first) & (np.arange(n) < last)
    else:
        free = rng.random(n) < rng.random()
    return np.where(free, -1, rng.integers(VOCAB, size=n)).astype(np.int32)


def random_sampling(rng: np.random.Generator) -> Sampling:
    """Options from all over their ranges, the corners of each among them."""
    steps = int(rng.integers(1, 6))
    t_min = float(rng.choice([0.0, 0.01, 0.4, 1.0]))
    return Sampling(
        steps=steps,
        max_steps=int(rng.integers(0, steps + 2)),
        stability_threshold=int(rng.integers(0, 4)),
        t_min=t_min,
        t_max=t_min + float(rng.choice([0.01, 0.4, 5.0])),
        entropy_bound=float(rng.choice([0.0, 0.1, 3.0, 1e6])),
        confidence_threshold=float(rng.choice([0.0, 0.005, 1.0, 1e6])),
    )


def random_spec(rng: np.random.Generator) -> CanvasSpec:
    """A canvas of 1 to C rows; a third each start from ids of the caller, have watched ids, have restricted rows."""
    n = int(rng.integers(1, CANVAS + 1))
    given = rng.random(3) < 1 / 3
    rows = rng.permutation(n)[: rng.integers(1, 4)].tolist()
    return CanvasSpec(
        n_rows=n,
        pinned=random_pins(rng, n),
        canvas=rng.integers(VOCAB, size=n) if given[0] else None,
        watched=rng.integers(-1, VOCAB, size=n) if given[1] else None,
        allowed={row: rng.permutation(VOCAB)[: rng.integers(1, 5)] for row in rows} if given[2] else None,
        seed=int(rng.integers(2**63)),
        canvas_index=int(rng.integers(2**31)),
    )


class Draws:
    """Noise of the caller for canvases of any length: what `HandedNoise` is to the parity tests, without torch."""

    def __init__(self, rows: dict[int, int]) -> None:
        self.rows = rows

    def canvas(self, c: int) -> Ids:
        return np.random.default_rng([c, 0]).integers(VOCAB, size=self.rows[c], dtype=np.int32)

    def uniform(self, c: int, step: int) -> npt.NDArray[np.float64]:
        return np.random.default_rng([c, step, 1]).random(self.rows[c])

    def renoise(self, c: int, step: int) -> Ids:
        return np.random.default_rng([c, step, 2]).integers(VOCAB, size=self.rows[c], dtype=np.int32)


@dataclass
class Count:
    """What was seen: canvases, their steps, and pinned rows in those steps."""

    canvases: int = 0
    steps: int = 0
    pinned_rows: int = 0
    free_rows: int = 0
    changed: int = 0

    def see(self, pins: Ids, step: Any) -> None:
        """One step of one canvas. What pinned rows report besides their ids is checked too."""
        fixed = pins >= 0
        self.steps += 1
        self.pinned_rows += int(fixed.sum())
        self.free_rows += int((~fixed).sum())
        self.changed += int((step.canvas[fixed] != pins[fixed]).sum() + (step.argmax[fixed] != pins[fixed]).sum())
        assert not step.accepted[fixed].any() and not step.entropy[fixed].any()
        assert step.accepted[~fixed].any() == (~fixed).any()
        if getattr(step, "logprob", None) is not None:
            assert not step.logprob[fixed].any() and (step.logprob[~fixed] <= 0).all()


@pytest.mark.parametrize(
    "place", [name for name in PLACES if name != "two servers and the CPU"], indirect=True, scope="session"
)
def test_the_loop_never_changes_a_pinned_row(session: Session, place: Place) -> None:
    """10,000 different patterns, over 13,000 canvases in batches of 1 to 40, every batch with other options, every
    second one with draws of its own: every step's next canvas and argmax hold every pin."""
    wanted = PATTERNS if place.name == "cpu" else PATTERNS_ELSEWHERE
    rng = np.random.default_rng(4)
    count = Count()
    patterns: set[bytes] = set()
    while len(patterns) < wanted:
        group = [random_spec(rng) for _ in range(rng.integers(1, 41))]
        while sum(spec.n_rows or 0 for spec in group) > ROWS:
            group.pop()
        # Canvas indices key the caller's draws, so they must not be the same twice.
        noise = Draws({s.canvas_index: s.n_rows or 0 for s in group}) if rng.integers(2) else None
        batch = CanvasBatch(session, group, random_sampling(rng), noise=noise)
        live = [True] * len(group)
        while not batch.finished:
            for i, step in enumerate(batch.step()):
                if live[i]:
                    count.see(np.asarray(group[i].pinned), step)
                    live[i] = not step.finished
            if rng.integers(8) == 0:
                dropped = int(rng.integers(len(group)))
                batch.drop(dropped)
                live[dropped] = False
        count.canvases += len(group)
        patterns |= {np.asarray(spec.pinned).tobytes() for spec in group}
    assert len(patterns) >= wanted and count.canvases >= len(patterns)
    assert count.steps > 1.5 * wanted and count.pinned_rows > 5 * wanted and count.free_rows > 5 * wanted
    assert count.changed == 0


@pytest.mark.parametrize("place", ["cpu"], indirect=True, scope="session")
def test_the_sampler_never_changes_a_pinned_row(session: Session) -> None:
    """10,000 patterns on handed-in logits, each with options and a step of its own. The logits of pinned rows speak
    against the pin: another id is certain, or they are not even numbers."""
    rng = np.random.default_rng(5)
    count = Count()
    while count.canvases < PATTERNS:
        n = int(rng.integers(1, CANVAS + 1))
        pins, options = random_pins(rng, n), random_sampling(rng)
        z = (rng.standard_normal((n, VOCAB)) * rng.choice([0.1, 3.0, 30.0])).astype(np.float32)
        fixed = np.flatnonzero(pins >= 0)
        z[fixed, (pins[fixed] + 1) % VOCAB] = 1e6
        z[fixed[rng.random(len(fixed)) < 0.1]] = np.nan
        c = count.canvases
        step = session.sample(
            z,
            int(rng.integers(options.steps)),
            Draws({c: n}),
            pinned=pins,
            canvas_index=c,
            **{name: value for name, value in vars(options).items() if value or name != "max_steps"},
        )
        count.see(pins, step)
        count.canvases += 1
    assert count.canvases == count.steps == PATTERNS
    assert count.pinned_rows > 2 * PATTERNS and count.free_rows > 2 * PATTERNS
    assert count.changed == 0


def test_a_changed_pin_would_be_counted() -> None:
    """The counting can fail: a step that has another id in a pinned row."""

    class Step:
        canvas, argmax = np.array([3, 5]), np.array([4, 5])
        accepted, entropy = np.array([False, True]), np.array([0.0, 1.0])

    count = Count()
    count.see(np.array([3, -1], np.int32), Step)
    count.see(np.array([4, -1], np.int32), Step)
    count.see(np.array([9, -1], np.int32), Step)
    assert count.changed == 1 + 1 + 2

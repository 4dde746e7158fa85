"""Pinned and restricted rows, canvases of any length, alone and side by side: step by step against the plain loop over
transformers' model (tests/reference.py, `pinned_loop`).

transformers itself has none of these. That loop without them walks `generate()`'s path (test_reference.py), and its
rules for them are written out in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from canvas_batches import own_steps
from demo_tasks import Demo, tasks
from nets import Net, Report, relative_error
from once import once
from places import Place
from reference import (
    HandedNoise,
    Ids,
    Model,
    ReferenceCanvas,
    ReferencePrefix,
    Sampling,
    attention,
    pinned_loop,
    takes_path,
)
from test_trajectory import PATH_ENTROPY

from pydiffgguf._binding.records import RawStep
from pydiffgguf.session import Canvas, CanvasSpec, Session, Step, resolve_sampling

pytestmark = pytest.mark.parity

SAMPLING = Sampling(steps=10, entropy_bound=2.0, confidence_threshold=0.2)


@dataclass(frozen=True)
class Pair:
    """One net on both sides, behind the same prompt."""

    net: Net
    session: Session
    prompt: tuple[int, ...]

    @property
    def prefix(self) -> ReferencePrefix:
        return prefix_behind(self.net.model, self.prompt)

    def noise(self, seed: int, n_rows: int | None = None) -> HandedNoise:
        return HandedNoise(seed, self.net.canvas_length if n_rows is None else n_rows, self.net.vocab_size)

    def pins(self, kind: str) -> Ids:
        """A pattern of pinned rows, int32 [C]: the id, or -1 where the row is free."""
        rows = np.arange(self.net.canvas_length)
        c = len(rows)
        pinned = {
            "none": np.zeros(c, bool),
            "first": rows == 0,
            "last": rows == c - 1,
            "suffix": rows >= c // 3,  # an infill: the gap, then what follows it
            "both ends": (rows < c // 4) | (rows >= c - c // 4),
            "every other": rows % 2 == 1,
            "all but one": rows != c // 2,
            "random": np.random.default_rng(9).random(c) < 0.5,
        }[kind]
        return np.where(pinned, self.net.ids(77, c), -1).astype(np.int32)


PATTERNS = ["none", "first", "last", "suffix", "both ends", "every other", "all but one", "random"]


@pytest.fixture(scope="module", params=["one_kv_head", "alternating"])
def pair(request: pytest.FixtureRequest, walker: Callable[[str], Net], place: Place) -> Iterator[Pair]:
    net = walker(request.param)
    prompt = tuple(net.ids(3, 33).tolist())
    with place.open(net.gguf(), type_kv="f32", n_ctx=512, n_threads=1) as model:
        session = model.session()
        session.encode(prompt)
        yield Pair(net, session, prompt)


@cache
def prefix_behind(model: Model, prompt: tuple[int, ...]) -> ReferencePrefix:
    """Nothing is appended to it: it serves every canvas behind this prompt."""
    prefix = ReferencePrefix(model)
    prefix.encode(prompt)
    return prefix


Allowed = tuple[tuple[int, tuple[int, ...]], ...]
"""Rows that may take some ids only, and which."""


@once
def _path(
    model: Model,
    prompt: tuple[int, ...],
    seed: int,
    pins: tuple[int, ...],
    sampling: Sampling,
    canvas_index: int,
    allowed: Allowed,
    attn: str,
) -> list[ReferenceCanvas]:
    noise = HandedNoise(seed, len(pins), model.config.text_config.vocab_size)
    with attention(model, attn):
        return [
            pinned_loop(
                prefix_behind(model, prompt),
                noise,
                np.array(pins, np.int32),
                sampling,
                canvas_index=canvas_index,
                allowed=dict(allowed),
            )
        ]


def path_of(
    model: Model,
    prompt: Sequence[int],
    seed: int,
    pins: Ids,
    sampling: Sampling,
    canvas_index: int,
    allowed: Mapping[int, Sequence[int]] | None = None,
) -> Callable[[str], list[ReferenceCanvas]]:
    """The plain loop's path under an attention by name, one canvas, once for all places: for `takes_path`."""
    rows: Allowed = tuple((row, tuple(ids)) for row, ids in (allowed or {}).items())
    return partial(_path, model, tuple(prompt), seed, tuple(pins.tolist()), sampling, canvas_index, rows)


def check_path(got: Sequence[Step | RawStep], expected: ReferenceCanvas, where: str, entropy: float = 5e-4) -> None:
    """Every step has the reference's rows; `entropy`: how far apart the rows' entropies may be. Along a path rounding
    is fed back by self-conditioning; measured on these nets 1e-4 nats at most."""
    assert len(got) == len(expected.steps), where
    for n, (mine, theirs) in enumerate(zip(got, expected.steps, strict=True)):
        for name in ("argmax", "accepted", "canvas"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), f"{where}, step {n}: {name}"
        np.testing.assert_allclose(mine.entropy, theirs.entropy, rtol=0, atol=entropy, err_msg=f"{where}, step {n}")


def run(pair: Pair, pins: Ids | None, seed: int, sampling: Sampling = SAMPLING, canvas_index: int = 0) -> Canvas:
    options = {name: value for name, value in asdict(sampling).items() if value is not None}
    return pair.session.run_canvas(
        noise=pair.noise(seed), canvas_index=canvas_index, pinned=pins, trace=True, **options
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pinned_canvas_takes_the_plain_loops_path(pair: Pair, pattern: str) -> None:
    """The same accepted rows, argmax canvas, next canvas and stop at every step, for each pattern and three seeds.

    Another path counts for nothing where the plain loop's own eager and sdpa runs part; at most one seed of the three.
    """
    pins = pair.pins(pattern)
    counted = 0
    for seed in range(3):
        got = run(pair, pins, seed, canvas_index=seed)

        def check(expected: list[ReferenceCanvas], got: Canvas = got, seed: int = seed) -> None:
            check_path(got.trace, expected[0], f"seed {seed}")
            assert np.array_equal(got.tokens, expected[0].tokens)

        counted += takes_path(path_of(pair.net.model, pair.prompt, seed, pins, SAMPLING, seed), check)
    assert counted >= 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pinned_rows_hold_their_ids_and_take_no_part(pair: Pair, pattern: str) -> None:
    """At every step a pinned row has its id on the next canvas and as its argmax, is not accepted, has entropy 0."""
    pins = pair.pins(pattern)
    fixed = pins >= 0
    for step in run(pair, pins, seed=4).trace:
        assert np.array_equal(step.canvas[fixed], pins[fixed])
        assert np.array_equal(step.argmax[fixed], pins[fixed])
        assert not step.accepted[fixed].any()
        assert (step.entropy[fixed] == 0).all()
        assert step.accepted[~fixed].any()


def test_no_pins_and_pins_of_minus_one_are_the_same(pair: Pair) -> None:
    """pinned=None and all -1 give the same bits."""
    without, free = run(pair, None, 5), run(pair, pair.pins("none"), 5)
    assert without.steps == free.steps
    for a, b in zip(without.trace, free.trace, strict=True):
        assert np.array_equal(a.canvas, b.canvas) and np.array_equal(a.entropy, b.entropy)


def test_first_step_has_no_self_conditioning_from_pins(pair: Pair) -> None:
    """The first pass of a pinned canvas is one decoder pass without any signal over the canvas with the pins on it;
    the second is conditioned by one-hots on the pinned rows."""
    pins = pair.pins("every other")
    fixed = pins >= 0
    noise = pair.noise(6)
    trace = run(pair, pins, 6).trace
    first = np.where(fixed, pins, noise.canvas(0)).astype(np.int32)
    z = pair.session.denoise(first)
    assert np.array_equal(z.argmax(-1)[~fixed], trace[0].argmax[~fixed])

    processed = z / np.float32(SAMPLING.temperature(0))
    processed[fixed] = -np.inf
    processed[fixed, pins[fixed]] = 0.0
    z = pair.session.denoise(trace[0].canvas, processed)
    entropy = pair.session.sample(
        z, 1, noise, SAMPLING.steps, pinned=pins, t_min=SAMPLING.t_min, t_max=SAMPLING.t_max
    ).entropy
    np.testing.assert_allclose(entropy, trace[1].entropy, rtol=0, atol=1e-5)


def test_one_hot_conditioning_equals_the_reference(pair: Pair) -> None:
    """Rows of -inf with a single 0, as pinned rows feed themselves back: finite logits, those of the reference."""
    net = pair.net
    canvas = net.ids(1, net.canvas_length)
    signal = np.full((net.canvas_length, net.vocab_size), -np.inf, np.float32)
    signal[np.arange(net.canvas_length), net.ids(2, net.canvas_length)] = 0.0
    got = pair.session.denoise(canvas, signal)
    assert relative_error(got, pair.prefix.denoise(canvas, torch.from_numpy(signal)).numpy()) <= 2e-5


def test_a_long_pinned_suffix_does_not_make_the_canvas_confident(pair: Pair) -> None:
    """With all rows but one pinned, a stop needs that row's own entropy below the threshold, not the diluted mean."""
    pins = pair.pins("all but one")
    free = pins < 0
    strict = Sampling(steps=10, entropy_bound=2.0, confidence_threshold=1e-6, stability_threshold=0)
    for step in run(pair, pins, 7, strict).trace[:-1]:
        assert step.entropy[free].mean() >= strict.confidence_threshold
    barely = Sampling(
        steps=10, entropy_bound=2.0, confidence_threshold=float(run(pair, pins, 7, strict).trace[0].entropy[free].max())
    )
    run_barely = run(pair, pins, 7, barely)
    assert run_barely.steps > 1  # stability 1: one step is never enough


def test_all_rows_pinned_ends_at_once(pair: Pair) -> None:
    """Nothing is free: the canvas is its pins, its mean entropy is 0, and it stops as soon as stability allows."""
    pins = pair.net.ids(8, pair.net.canvas_length)
    for threshold in (0, 1, 3):
        sampling = Sampling(steps=10, stability_threshold=threshold)
        got = run(pair, pins, 8, sampling)
        assert np.array_equal(got.tokens, pins)
        assert got.steps == threshold + 1
        assert not any(step.accepted.any() for step in got.trace)
        assert got.steps == len(pinned_loop(pair.prefix, pair.noise(8), pins, sampling).steps)


@pytest.mark.parametrize("bad", [-2, 10**6])
def test_a_pin_that_is_no_id_is_refused(pair: Pair, bad: int) -> None:
    """Only -1 means free; the message names the row."""
    pins = pair.pins("none")
    pins[3] = bad
    with pytest.raises(ValueError, match=r"pinned\[3\]"):
        run(pair, pins, 0)


def test_pins_of_another_length_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="pinned"):
        run(pair, pair.pins("none")[:-1], 0)


# --------------------------------------------------------------------------------------------------- infill's layouts

#: What an infill puts on a canvas of n rows: True where a row is pinned. The gap is what is not.
LAYOUTS: dict[str, Callable[[int], npt.NDArray[np.bool_]]] = {
    "gap alone": lambda n: np.zeros(n, bool),
    "gap and suffix": lambda n: np.arange(n) >= max(1, n // 2),
    "head and gap": lambda n: np.arange(n) < n // 3,
    "head, gap and suffix": lambda n: (np.arange(n) < n // 4) | (np.arange(n) >= max(n // 4 + 1, 3 * n // 4)),
    "islands": lambda n: np.arange(n) % 5 >= 3,
}


@dataclass(frozen=True)
class Layout:
    """A canvas as infill lays it out: its name, its pins, int32 [n_rows], and rows that may take some ids only."""

    name: str
    pins: Ids
    allowed: dict[int, list[int]]

    def spec(self, canvas_index: int) -> CanvasSpec:
        return CanvasSpec(
            n_rows=len(self.pins), pinned=self.pins, allowed=self.allowed or None, canvas_index=canvas_index
        )


def layouts(net: Net) -> list[Layout]:
    """Every layout at five lengths from one row to the whole canvas; every second one with two rows restricted, one of
    them to two ids and one to twenty, wherever they fall, on pins too."""
    c = net.canvas_length
    made = []
    for name, pinned in LAYOUTS.items():
        for n in sorted({1, 2, 7, 2 * c // 3, c}):
            ids = np.random.default_rng([n, len(name)]).integers(net.vocab_size, size=n)
            pins = np.where(pinned(n), ids, -1).astype(np.int32)
            allowed = {}
            if len(made) % 2:
                some = np.random.default_rng(n).permutation(net.vocab_size).tolist()
                allowed = {0: some[:2], n - 1: some[2:22]}
            made.append(Layout(f"{name}, {n} rows{', restricted' if allowed else ''}", pins, allowed))
    return made


class NoiseOfEach:
    """The draws of several canvases, each of its own length: canvas c has those of `HandedNoise(seed, rows[c], V)`."""

    def __init__(self, seed: int, rows: Mapping[int, int], vocab_size: int) -> None:
        self.of = {c: HandedNoise(seed, n, vocab_size) for c, n in rows.items()}

    def canvas(self, c: int) -> Ids:
        return self.of[c].canvas(c)

    def uniform(self, c: int, step: int) -> npt.NDArray[np.float64]:
        return self.of[c].uniform(c, step)

    def renoise(self, c: int, step: int) -> Ids:
        return self.of[c].renoise(c, step)


def run_batch(
    session: Session, specs: Sequence[CanvasSpec], sampling: Sampling, noise: NoiseOfEach
) -> list[list[RawStep]]:
    """Each canvas's own steps, denoised side by side, with this module's options over the file's."""
    options, _ = resolve_sampling(session._defaults, asdict(sampling))
    return own_steps(session, specs, options, noise)


@pytest.mark.parametrize("name", ["one_kv_head", "alternating", "full_first", "many_experts"])
def test_infill_layouts_take_the_plain_loops_path_alone_and_side_by_side(
    walker: Callable[[str], Net], place: Place, name: str, report: Report
) -> None:
    """25 canvases of all layouts and lengths (8 of them beside the CPU): every row of every step of each, first alone,
    then all in one batch, is that of its own single run over transformers' model."""
    net = walker(name)
    prompt, seed = net.ids(5, 40).tolist(), 11
    laid_out = place.some(list(enumerate(layouts(net))), 8)
    rows = {c: len(layout.pins) for c, layout in laid_out}
    noise = NoiseOfEach(seed, rows, net.vocab_size)
    lengths = []
    with (
        place.open(net.gguf(), type_kv="f32", n_ctx=512, n_threads=1) as model,
        model.session(n_rows=max(net.canvas_length, sum(rows.values()))) as session,
    ):
        session.encode(prompt)
        specs = [layout.spec(c) for c, layout in laid_out]
        together = run_batch(session, specs, SAMPLING, noise)
        for (c, layout), spec, among in zip(laid_out, specs, together, strict=True):
            [alone] = run_batch(session, [spec], SAMPLING, noise)

            def check(
                expected: list[ReferenceCanvas],
                alone: list[RawStep] = alone,
                among: list[RawStep] = among,
                layout: Layout = layout,
            ) -> None:
                check_path(alone, expected[0], f"{layout.name}, alone")
                check_path(among, expected[0], f"{layout.name}, side by side")

            path = path_of(net.model, prompt, seed, layout.pins, SAMPLING, c, layout.allowed)
            if takes_path(path, check):
                lengths.append(len(alone))
    undecided = len(laid_out) - len(lengths)
    report(
        f"infill layouts, {name}: {len(lengths)} canvases of 1 to {net.canvas_length} rows equal, alone and in one "
        f"batch; {undecided} undecided by the reference itself; {min(lengths)} to {max(lengths)} steps"
    )
    assert undecided <= len(laid_out) // 8
    assert min(lengths) < max(lengths), "all stopped at once: nothing was left standing between others"


def test_infill_of_the_demo_model_takes_the_plain_loops_path(demo: Demo, place: Place, report: Report) -> None:
    """Gaps of its own held-out tasks (20 of them; 10 beside the CPU) behind their prefix, the near suffix pinned:
    canvases of the right length and of one token less and more in a batch; the file's own sampler values."""
    chosen = place.some(tasks("infill")[::10], 10)
    most = demo.opened.config.canvas_length
    undecided, compared, right = 0, 0, 0
    for task in chosen:
        prefix_ids = demo.opened.tokenize(task["prefix"], add_bos=True)
        gap = demo.opened.tokenize(task["gap"])
        suffix = demo.opened.tokenize(task["suffix"])
        lengths = [n for n in (len(gap) - 1, len(gap), len(gap) + 1) if 0 < n < most]
        pins = [np.array([*[-1] * n, *suffix[: most - n]], np.int32) for n in lengths]
        noise = NoiseOfEach(task["id"], dict(enumerate(map(len, pins))), demo.opened.config.n_vocab)
        with demo.opened.session(n_rows=3 * most) as session:
            session.encode(prefix_ids)
            specs = [CanvasSpec(n_rows=len(p), pinned=p, canvas_index=c) for c, p in enumerate(pins)]
            together = run_batch(session, specs, demo.sampling, noise)
        for c, (n, got) in enumerate(zip(lengths, together, strict=True)):
            where = f"task {task['id']}, gap of {n}"

            def check(expected: list[ReferenceCanvas], got: list[RawStep] = got, where: str = where) -> None:
                check_path(got, expected[0], where, entropy=PATH_ENTROPY)

            path = path_of(demo.reference, prefix_ids, task["id"], pins[c], demo.sampling, canvas_index=c)
            if not takes_path(path, check):
                undecided += 1
                continue
            compared += 1
            right += n == len(gap) and got[-1].argmax[:n].tolist() == gap
    report(
        f"infill layouts, demo model: {compared} canvases equal, {undecided} undecided by the reference itself; "
        f"{right} of {len(chosen)} gaps of the right length filled as they were"
    )
    assert undecided <= compared // 8

"""The CUDA kernels' bodies (csrc/cuda), compiled for the host, against the C++ sampler and the engine's own loop.

No GPU is needed: a block's threads are loops here, each phase from first to last thread or backwards, so a race within
a phase shows as a difference between the two. What only a GPU can show (shuffles, launches, speed) is for
benchmarks/gpu_first_hour.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel
from pydiffgguf._binding import functions
from pydiffgguf._binding.functions import sample
from pydiffgguf._binding.records import Sampling

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="compiles csrc/cuda for the host: there is no C++ compiler")

# RowType in csrc/cuda/dequantize.h, in its order.
ROW_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

# What the signal of a row may leave out (csrc/base/signal_cut.h): relative to its length, for an embedding in floats
# and for a quantized one; and how much of the row that is for the kernels.
ERRORS = (1e-6, 1e-4)
LOST, LOST_QUANTIZED = (error / 16 for error in ERRORS)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The bodies as a library."""
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    names = ("tests/kernels/host", "tests/kernels/host_device", "csrc/cuda/device_loop", "csrc/sample/sampling")
    sources = [ROOT / f"{name}.cpp" for name in names]
    warnings = [f"-W{name}" for name in ("all", "extra", "shadow", "conversion", "no-sign-conversion", "error")]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", *warnings]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    assert COMPILER is not None
    subprocess.run([COMPILER, *flags, *includes, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(values: npt.NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if values is None else values.ctypes.data)


class Rows(NamedTuple):
    """What process_row leaves, by row; `logits`: as it leaves them; `candidates`: tokens and probabilities."""

    argmax: npt.NDArray[np.int32]
    draw: npt.NDArray[np.int32]
    entropy: npt.NDArray[np.float64]
    logprob: npt.NDArray[np.float64]
    broken: npt.NDArray[np.bool_]
    logits: Floats
    candidates: list[dict[int, float]]
    counts: npt.NDArray[np.int32]


def process(
    kernels: ctypes.CDLL,
    z: Floats,
    t: float,
    u: npt.NDArray[np.float64],
    *,
    softcap: float = 0.0,
    pinned: npt.NDArray[np.int32] | None = None,
    watched: npt.NDArray[np.int32] | None = None,
    allowed: list[int] | None = None,
    keeps: bool = True,
    backwards: bool = False,
    capacity: int = 64,
    lost: float = LOST,
) -> Rows:
    """process_row on each row of z [C, V]."""
    n, n_vocab = z.shape
    logits = np.array(z, dtype=np.float32, order="C")
    ids = None if allowed is None else np.array(allowed, dtype=np.int32)
    argmax, draw, counts = (np.full(n, -7, dtype=np.int32) for _ in range(3))
    entropy, logprob, broken = np.full(n, -7.0), np.full(n, -7.0), np.zeros(n, dtype=np.uint8)
    tokens = np.full((n, capacity), -1, dtype=np.int32)
    probabilities = np.full((n, capacity), np.nan, dtype=np.float32)
    kernels.dgk_rows(
        pointer(logits),
        n,
        n_vocab,
        ctypes.c_float(softcap),
        ctypes.c_float(t),
        pointer(u),
        pointer(pinned),
        pointer(watched),
        pointer(ids),
        0 if ids is None else len(ids),
        int(keeps),
        int(backwards),
        *map(pointer, (argmax, draw, entropy, logprob, broken)),
        capacity,
        ctypes.c_double(lost),
        *map(pointer, (tokens, probabilities, counts)),
    )
    found = [
        dict(zip(tokens[i, :k].tolist(), probabilities[i, :k].tolist(), strict=True)) if k <= capacity else {}
        for i, k in enumerate(counts.tolist())
    ]
    return Rows(argmax, draw, entropy, logprob, broken.view(np.bool_), logits, found, counts)


class Reference(NamedTuple):
    argmax: npt.NDArray[np.int32]
    draw: npt.NDArray[np.int32]
    entropy: npt.NDArray[np.float64]


def reference(z: Floats, t: float, u: npt.NDArray[np.float64]) -> Reference:
    """The C++ sampler's rows; with no bound on entropy every draw stands on the next canvas."""
    options = Sampling(
        steps=1,
        max_steps=0,
        stability_threshold=1,
        t_min=t,
        t_max=t,
        entropy_bound=1e9,
        confidence_threshold=0.005,
    )
    renoise = np.zeros(len(z), dtype=np.int32)
    out = sample(z, options, step=0, uniform=u, renoise=renoise)
    assert out.accepted.all()
    return Reference(out.argmax, out.canvas, out.entropy)


def awkward_rows(rng: np.random.Generator, n: int, n_vocab: int) -> Floats:
    """n rows of n_vocab logits: of every scale, with ties, infinities, and all but one-hot."""
    scale = rng.choice([0.01, 0.5, 2.0, 6.0, 15.0], size=(n, 1))
    z = (rng.standard_normal((n, n_vocab)) * scale).astype(np.float32)
    for i in range(n):
        match rng.integers(8):
            case 0:  # ties, at the top too
                z[i] = np.round(z[i])
            case 1:  # nothing but ties
                z[i] = z[i, 0]
            case 2:  # most are impossible
                z[i, rng.random(n_vocab) < 0.9] = -np.inf
                z[i, rng.integers(n_vocab)] = 1.0
            case 3:  # all but one are
                one = z[i, 0]
                z[i] = -np.inf
                z[i, rng.integers(n_vocab)] = one
            case 4:  # confident, as a settled row is
                z[i, rng.integers(n_vocab)] = z[i].max() + rng.choice([5.0, 12.0, 30.0, 80.0])
    return z


# Around the borders of lanes, tiles, and rounds of 16 tiles; the released vocabulary at the end. Packed by hand (fmt:
# skip): formatted, it has a line for each of 18 sizes.
SIZES = {
    1: 40, 2: 200, 3: 200, 31: 400, 32: 400, 33: 400, 257: 1500, 511: 1500, 512: 1000, 513: 1000, 1025: 1000,
    1537: 1000, 4099: 1000, 8191: 200, 8192: 150, 8193: 150, 32771: 60, 262144: 24,
}  # fmt: skip


def test_ten_thousand_rows_are_as_the_sampler_has_them(kernels: ctypes.CDLL) -> None:
    """Argmax and draw are the C++ sampler's, entropy its own within 1e-6 or 1e-7 nat, whichever is more: the two sum in
    different orders, and exp differs by an ulp."""
    rng = np.random.default_rng(20)
    total = 0
    for n_vocab, n in SIZES.items():
        z = awkward_rows(rng, n, n_vocab)
        u = rng.random(n)
        u[rng.random(n) < 0.02] = 0.0
        t = float(rng.choice([0.408, 0.6, 0.8, 1.0]))
        ours, theirs = process(kernels, z, t, u), reference(z, t, u)
        assert not ours.broken.any()
        np.testing.assert_array_equal(ours.argmax, theirs.argmax, err_msg=f"argmax at {n_vocab} logits")
        np.testing.assert_array_equal(ours.draw, theirs.draw, err_msg=f"draw at {n_vocab} logits")
        np.testing.assert_allclose(ours.entropy, theirs.entropy, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(ours.logits, z / np.float32(t))
        total += n
    assert total >= 10_000


def test_the_greatest_u_draws_what_is_possible(kernels: ctypes.CDLL) -> None:
    """u just below 1 lies within the sums' rounding of the end: the draw is one of the last ids that have weight."""
    z = awkward_rows(np.random.default_rng(28), 300, 2050)
    rows = process(kernels, z, 0.8, np.full(300, 1.0 - 2.0**-53))
    for row, drawn in zip(z.astype(np.float64) / 0.8, rows.draw, strict=True):
        p = np.exp(row - row.max())
        assert p[drawn] > 0.0
        assert p[drawn + 1 :].sum() <= 1e-6 * p.sum()


def test_threads_may_go_through_a_phase_in_any_order(kernels: ctypes.CDLL) -> None:
    """Backwards, every bit is the same: no thread reads what another one writes before the barrier."""
    rng = np.random.default_rng(21)
    z = awkward_rows(rng, 60, 3001)
    u = rng.random(60)
    watched = rng.integers(-1, 3001, 60).astype(np.int32)
    forth, back = (
        process(kernels, z, 0.6, u, softcap=30.0, watched=watched, backwards=backwards) for backwards in (False, True)
    )
    for name in ("argmax", "draw", "entropy", "logprob", "logits", "counts"):
        np.testing.assert_array_equal(getattr(forth, name), getattr(back, name), err_msg=name)
    assert forth.candidates == back.candidates


def test_the_softcap_is_that_of_the_graph(kernels: ctypes.CDLL) -> None:
    """Raw logits and a softcap give what softcapped logits give, and the logits stay raw where nobody wants them."""
    rng = np.random.default_rng(22)
    z = (rng.standard_normal((40, 5000)) * 40).astype(np.float32)
    u = rng.random(40)
    capped = np.tanh(z * np.float32(1.0 / 30.0)) * np.float32(30.0)
    ours, theirs = process(kernels, z, 0.8, u, softcap=30.0, keeps=False), reference(capped, 0.8, u)
    np.testing.assert_array_equal(ours.argmax, theirs.argmax)
    np.testing.assert_array_equal(ours.draw, theirs.draw)
    # numpy's tanh differs from libm's by an ulp, 2e-6 at 30, which is 2e-6 of a probability.
    np.testing.assert_allclose(ours.entropy, theirs.entropy, rtol=5e-6, atol=1e-7)
    np.testing.assert_array_equal(ours.logits, z)


def test_broken_rows_are_told(kernels: ctypes.CDLL) -> None:
    """NaN anywhere, +inf, or nothing but -inf: the row says so, and its neighbours are whole."""
    z = np.random.default_rng(23).standard_normal((5, 3000)).astype(np.float32)
    z[1, 2999], z[2, 17], z[3] = np.nan, np.inf, -np.inf
    rows = process(kernels, z, 0.5, np.full(5, 0.5))
    assert rows.broken.tolist() == [False, True, True, True, False]


def test_candidates_are_the_softmax_but_for_rounding(kernels: ctypes.CDLL) -> None:
    """All tokens except some that together weigh no more than may be lost, with their probabilities; a row with more
    than there is room for says how many, and writes none."""
    rng = np.random.default_rng(24)
    z = np.concatenate([awkward_rows(rng, 30, 4099), (rng.standard_normal((10, 4099)) * 0.1).astype(np.float32)])
    rows = process(kernels, z, 0.5, rng.random(40), capacity=512)
    for i, row in enumerate(z.astype(np.float64) / 0.5):
        p = np.exp(row - row.max())
        p /= p.sum()
        if rows.counts[i] > 512:
            assert np.sort(p)[: 4099 - 512].sum() > LOST
            assert rows.candidates[i] == {}
            continue
        found = rows.candidates[i]
        assert len(found) == rows.counts[i]
        rest = np.delete(p, list(found))
        assert rest.sum() <= LOST * (1 + 1e-5)  # whose terms are float32
        np.testing.assert_allclose(list(found.values()), p[list(found)], rtol=2e-5)  # exp of a float32 difference
    assert (rows.counts > 512).sum() >= 10


@pytest.mark.parametrize(("error", "lost"), [(ERRORS[0], LOST), (ERRORS[1], LOST_QUANTIZED)])
def test_a_wide_tail_is_cut_by_its_mass(kernels: ctypes.CDLL, error: float, lost: float) -> None:
    """Confident rows of the released vocabulary with a wide tail (p = 0.999, logits spread by 4, t = 0.8): a bound on
    each token alone kept ten times as many as there is room for. What is left out by its measured mass keeps the
    signal's error, and a quantized embedding's fits."""
    rng = np.random.default_rng(33)
    n_vocab = 262144
    z = np.tanh((rng.standard_normal((3, n_vocab)) * 4 - 5) / 30) * 30
    z[:, 77] = 20.0
    rows = process(kernels, z.astype(np.float32), 0.8, np.full(3, 0.5), capacity=131072, lost=lost)
    embedding = rng.standard_normal((n_vocab, 16)).astype(np.float32)
    exact = softmax(rows.logits) @ embedding
    for i, found in enumerate(rows.candidates):
        each_alone = int((rows.logits[i] - rows.logits[i].max() > -np.log(n_vocab) - 24 * np.log(2)).sum())
        assert 1 < len(found) == rows.counts[i]
        if lost == LOST_QUANTIZED:
            assert rows.counts[i] < 8192 < each_alone  # 5,300 and 87,000
        signal = np.array(list(found.values())) @ embedding[list(found)]
        assert np.linalg.norm(signal - exact[i]) <= error * np.linalg.norm(exact[i])


def test_a_pinned_row_is_one_hot(kernels: ctypes.CDLL) -> None:
    z = np.random.default_rng(25).standard_normal((3, 700)).astype(np.float32)
    rows = process(kernels, z, 0.5, np.zeros(3), pinned=np.array([-1, 699, 0], dtype=np.int32))
    assert rows.argmax[1:].tolist() == rows.draw[1:].tolist() == [699, 0]
    assert rows.entropy[1:].tolist() == rows.logprob[1:].tolist() == [0.0, 0.0]
    assert rows.candidates[1:] == [{699: 1.0}, {0: 1.0}]
    expected = np.full((2, 700), -np.inf, dtype=np.float32)
    expected[0, 699] = expected[1, 0] = 0.0
    np.testing.assert_array_equal(rows.logits[1:], expected)


def test_a_row_takes_what_it_may(kernels: ctypes.CDLL) -> None:
    """As if all other logits were -inf; what is watched is told from before that, at temperature 1."""
    rng = np.random.default_rng(26)
    z = rng.standard_normal((50, 2500)).astype(np.float32)
    u = rng.random(50)
    allowed = sorted(rng.choice(2500, 1100, replace=False).tolist())
    watched = rng.integers(0, 2500, 50).astype(np.int32)
    rows = process(kernels, z, 0.7, u, allowed=allowed, watched=watched, capacity=2500)
    cut = np.full_like(z, -np.inf)
    cut[:, allowed] = z[:, allowed]
    theirs = reference(cut, 0.7, u)
    np.testing.assert_array_equal(rows.argmax, theirs.argmax)
    np.testing.assert_array_equal(rows.draw, theirs.draw)
    np.testing.assert_allclose(rows.entropy, theirs.entropy, rtol=1e-6)
    np.testing.assert_array_equal(rows.logits, cut / np.float32(0.7))
    assert all(set(found) <= set(allowed) for found in rows.candidates)
    wide = z.astype(np.float64)
    expected = wide[np.arange(50), watched] - np.log(np.exp(wide).sum(axis=1))
    np.testing.assert_allclose(rows.logprob, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ROW_TYPES)
def test_rows_are_dequantized_as_ggml_does(kernels: ctypes.CDLL, name: str) -> None:
    """Bit for bit what gguf makes of the same bytes."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n = 2816
    rng = np.random.default_rng(27)
    if name in ("F32", "F16", "BF16", "Q8_0"):
        values = rng.standard_normal(n).astype(np.float32)
        values[:4] = [0.0, -0.0, 1e-7, 60000.0]  # 1e-7: a subnormal half
        raw = gguf.quantize(values, kind).view(np.uint8).ravel()
    else:
        raw = rng.integers(0, 256, n // block * size).astype(np.uint8).reshape(-1, size)
        scale = rng.standard_normal((len(raw), 2)).astype(np.float16).view(np.uint8)
        at = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210)}[name]
        raw[:, at] = scale[:, : at.stop - at.start]  # random bytes as a scale may be NaN
        raw = raw.ravel()
    out = np.empty(n, dtype=np.float32)
    kernels.dgk_dequantize(ROW_TYPES.index(name), pointer(raw), n, pointer(out))
    np.testing.assert_array_equal(out, gguf.dequantize(raw, kind).ravel()[:n])


class SamplingStruct(ctypes.Structure):
    """dg_sampling."""

    _fields_ = (
        ("steps", ctypes.c_int32),
        ("max_steps", ctypes.c_int32),
        ("stability_threshold", ctypes.c_int32),
        ("t_min", ctypes.c_double),
        ("t_max", ctypes.c_double),
        ("entropy_bound", ctypes.c_double),
        ("confidence_threshold", ctypes.c_double),
    )


class CanvasStruct(ctypes.Structure):
    """dg_canvas_options."""

    _fields_ = (
        ("sampling", SamplingStruct),
        ("seed", ctypes.c_uint64),
        ("canvas_index", ctypes.c_uint32),
        ("n_rows", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("pinned", "canvas", "watched", "allowed_ends", "allowed_ids")),
        ("quiet", ctypes.c_bool),
    )


class NoiseStruct(ctypes.Structure):
    """dg_noise."""

    _fields_ = (("uniform", ctypes.c_void_p), ("renoise", ctypes.c_void_p))


class Decision(NamedTuple):
    """What a step of one canvas left."""

    argmax: npt.NDArray[np.int32]
    canvas: npt.NDArray[np.int32]
    accepted: npt.NDArray[np.bool_]
    entropy: npt.NDArray[np.float64]
    logprob: npt.NDArray[np.float64]
    mean_entropy: float
    converged: bool
    finished: bool


class DeviceLoop:
    """dg::cuda::DeviceLoop on the host; `logits` [R, V], `ids` [R] and `soft` [R, n_embd] are the session's tensors."""

    def __init__(self, kernels: ctypes.CDLL, n_rows: int, embedding: Floats, capacity: int, backwards: bool) -> None:
        self.library = kernels
        kernels.dgk_loop_new.restype = ctypes.c_void_p
        kernels.dgk_loop_error.restype = ctypes.c_char_p
        self.n_rows, (n_vocab, n_embd) = n_rows, embedding.shape
        self.logits = np.full((n_rows, n_vocab), np.nan, dtype=np.float32)
        self.ids = np.full(n_rows, -1, dtype=np.int32)
        self.soft = np.full((n_rows, n_embd), np.nan, dtype=np.float32)
        self.embedding = embedding
        arrays = (pointer(a) for a in (self.logits, self.ids, self.soft, embedding))
        self.handle = ctypes.c_void_p(
            kernels.dgk_loop_new(
                n_rows, n_vocab, ctypes.c_float(0), *arrays, 0, n_embd, capacity, ctypes.c_double(LOST), int(backwards)
            )
        )

    def call(self, name: str, *args: Any) -> None:
        if getattr(self.library, f"dgk_loop_{name}")(self.handle, *args):
            raise RuntimeError(self.library.dgk_loop_error(self.handle).decode())

    def begin(self, specs: list[CanvasSpec], sampling: Sampling) -> None:
        kept: list[npt.NDArray[np.int32]] = []

        def keep(values: Any) -> int | None:
            if values is None:
                return None
            kept.append(np.array(values, dtype=np.int32))
            return kept[-1].ctypes.data

        structs = (CanvasStruct * len(specs))()
        for struct, spec in zip(structs, specs, strict=True):
            assert spec.n_rows is not None
            ranges = [list(np.asarray((spec.allowed or {}).get(row, []))) for row in range(spec.n_rows)]
            struct.sampling = SamplingStruct(**vars(sampling))
            struct.seed, struct.canvas_index, struct.n_rows = spec.seed, spec.canvas_index, spec.n_rows
            struct.pinned, struct.canvas, struct.watched = keep(spec.pinned), keep(spec.canvas), keep(spec.watched)
            if spec.allowed:
                struct.allowed_ends = keep(np.cumsum([len(ids) for ids in ranges]))
                struct.allowed_ids = keep([token for ids in ranges for token in ids])
        self.call("begin", structs, len(specs))

    def place(self, which: list[int]) -> None:
        self.call("place", (ctypes.c_int32 * len(which))(*which), len(which))

    def step(self, noise: Any = None) -> None:
        self.call("step", noise)

    def count(self, what: str) -> int:
        """ "uploads", or "arguments": how often those of a launch were not those of the one before."""
        return int(getattr(self.library, f"dgk_loop_{what}")(self.handle))

    @property
    def flat(self) -> list[int]:
        """Rows that the last step left out of the signal."""
        rows = np.empty(self.n_rows, dtype=np.int32)
        return rows[: self.library.dgk_loop_flat(self.handle, pointer(rows))].tolist()

    def read(self, index: int, n: int) -> Decision:
        argmax, canvas = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
        accepted, entropy, logprob = np.empty(n, dtype=np.uint8), np.empty(n), np.full(n, np.nan)
        mean, flags = ctypes.c_double(), (ctypes.c_int32 * 2)()
        arrays = map(pointer, (argmax, canvas, accepted, entropy, logprob))
        self.call("read", index, *arrays, ctypes.byref(mean), flags)
        return Decision(
            argmax, canvas, accepted.view(np.bool_), entropy, logprob, mean.value, bool(flags[0]), bool(flags[1])
        )

    def close(self) -> None:
        self.library.dgk_loop_free(self.handle)


def softmax(z: Floats) -> npt.NDArray[np.float64]:
    p = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backwards", [False, True])
def test_whole_trajectories_are_the_engines(kernels: ctypes.CDLL, tiny_gguf: Path, backwards: bool) -> None:
    """Canvases side by side, free, pinned, watched and restricted, one of them dropped on the way: every step of the
    device's loop, fed with the same passes, leaves what the engine's loop leaves, and stops where it does.

    And what a CUDA graph wants: no step reads what the host wrote since the last one, and the arguments of launches
    change only when a canvas leaves.
    """
    sampling = Sampling(
        steps=12,
        max_steps=10,
        stability_threshold=1,
        t_min=0.05,
        t_max=0.3,
        entropy_bound=3.0,
        confidence_threshold=1.5,
    )
    rng = np.random.default_rng(30)
    pinned = np.where(rng.random(20) < 0.4, rng.integers(0, 512, 20), -1)
    specs = [
        CanvasSpec(n_rows=32, seed=1),
        CanvasSpec(n_rows=7, seed=2, canvas_index=3),
        CanvasSpec(n_rows=20, seed=3, pinned=pinned, watched=rng.integers(-1, 512, 20)),
        CanvasSpec(n_rows=9, seed=4, allowed={0: [7], 2: [300, 5, 300, 44], 8: rng.permutation(512)[:100]}),
    ]
    (tensor,) = [t for t in gguf.GGUFReader(tiny_gguf).tensors if t.name == "token_embd.weight"]
    embedding = np.ascontiguousarray(tensor.data, dtype=np.float32)
    n_rows = sum(spec.rows(32) for spec in specs)
    prompt = rng.integers(0, 512, 11)
    with DiffusionModel(tiny_gguf) as model, model.session(n_rows=n_rows) as engine, model.session() as passes:
        engine.encode(prompt)
        passes.encode(prompt)
        batch = CanvasBatch(engine, specs, sampling)
        before = [np.asarray(step.canvas) for step in first_canvases(model, prompt, specs, sampling, n_rows)]
        loop = DeviceLoop(kernels, n_rows, embedding, capacity=512, backwards=backwards)
        loop.begin([replace(s, canvas=c) for s, c in zip(specs, before, strict=True)], sampling)
        signals: list[Floats | None] = [None] * len(specs)
        live = list(range(len(specs)))
        n_steps = [0] * len(specs)
        n_placed = 1
        while live:
            theirs = batch.step()
            place = 0
            for i in live:
                n = specs[i].rows(32)
                canvas = loop.ids[place : place + n]
                loop.logits[place : place + n] = passes.denoise(canvas, signals[i], n_rows=n)
                place += n
            uploads = loop.count("uploads")
            loop.step()
            assert loop.count("uploads") == uploads, "a step depends on what the host wrote"
            assert loop.flat == []
            place = 0
            for i in live:
                n = specs[i].rows(32)
                ours = loop.read(i, n)
                for name in ("argmax", "canvas", "accepted", "converged", "finished"):
                    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs[i], name), err_msg=name)
                # The engine computes the canvases in one pass, this test each alone: 2.6e-7 of the logits apart.
                np.testing.assert_allclose(ours.entropy, theirs[i].entropy, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(ours.mean_entropy, theirs[i].mean_entropy, rtol=1e-4)
                if theirs[i].logprob is not None:
                    np.testing.assert_allclose(ours.logprob, theirs[i].logprob, rtol=1e-4, atol=1e-5)
                signals[i] = loop.logits[place : place + n].copy()
                expected = softmax(signals[i]) @ embedding.astype(np.float64) * np.sqrt(embedding.shape[1])
                error = np.linalg.norm(loop.soft[place : place + n] - expected) / np.linalg.norm(expected)
                assert error < 2e-6  # sums of up to 512 float32 terms
                n_steps[i] += 1
                place += n
            going = [i for i in live if not theirs[i].finished]
            if n_steps[0] == 3:
                batch.drop(1)
                going = [i for i in going if i != 1]
            if going != live:
                loop.place(going)
                live = going
                n_placed += 1 if going else 0
        assert n_steps[1] <= 3
        assert loop.count("arguments") == n_placed, "a captured graph would have to be captured again"
        assert len(set(n_steps)) > 1, "all canvases stopped together: nothing was moved"
        loop.close()


def first_canvases(
    model: DiffusionModel, prompt: Any, specs: list[CanvasSpec], sampling: Sampling, n_rows: int
) -> list[Any]:
    """The canvases that the engine starts from: what RawStep.canvas shows of a canvas dropped before its first step."""
    with model.session(n_rows=n_rows + 1) as session:
        session.encode(prompt)
        batch = CanvasBatch(session, [*specs, CanvasSpec(n_rows=1)], sampling)
        for i in range(len(specs)):
            batch.drop(i)
        return batch.step()[:-1]


def test_handed_in_draws_replace_the_generators(kernels: ctypes.CDLL) -> None:
    """One step with the caller's draws, then one with Philox's again, as the C++ sampler has them."""
    rng = np.random.default_rng(31)
    embedding = rng.standard_normal((300, 8)).astype(np.float32)
    sampling = Sampling(
        steps=4,
        max_steps=0,
        stability_threshold=1,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=20.0,
        confidence_threshold=0.005,
    )
    loop = DeviceLoop(kernels, 16, embedding, capacity=300, backwards=False)
    loop.begin([CanvasSpec(n_rows=16, seed=9, canvas=np.zeros(16))], sampling)
    uniform, renoise = rng.random(16), rng.integers(0, 300, 16).astype(np.int32)
    noise = NoiseStruct(uniform.ctypes.data, renoise.ctypes.data)
    for step, draws in enumerate(
        [
            (uniform, renoise),
            (functions.noise_uniform(9, 0, 1, 16), functions.noise_renoise(9, 0, 1, 16, 300)),
        ]
    ):
        z = (rng.standard_normal((16, 300)) * 4).astype(np.float32)
        loop.logits[:] = z
        loop.step(ctypes.byref(noise) if step == 0 else None)
        ours = loop.read(0, 16)
        theirs = sample(z, sampling, step=step, uniform=draws[0], renoise=draws[1])
        for name in ("argmax", "canvas", "accepted"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        assert 0 < theirs.accepted.sum() < 16
    loop.close()


def test_the_device_says_which_rows_are_flat(kernels: ctypes.CDLL) -> None:
    """A flat row does not fit into its candidates: the caller is told, the processed logits are there for it, and the
    other row is gathered all the same."""
    rng = np.random.default_rng(32)
    loop = DeviceLoop(kernels, 2, rng.standard_normal((300, 8)).astype(np.float32), capacity=20, backwards=False)
    sampling = Sampling(4, 0, 1, 0.5, 0.5, 0.1, 0.005)
    loop.begin([CanvasSpec(n_rows=2, canvas=np.zeros(2))], sampling)
    z = np.zeros((2, 300), dtype=np.float32)
    z[0, 5] = 40.0
    loop.logits[:] = z
    loop.step()
    assert loop.flat == [1]
    assert np.isfinite(loop.soft[0]).all() and np.isnan(loop.soft[1]).all()
    np.testing.assert_array_equal(loop.logits, z * 2)
    loop.logits[:] = z[0]
    loop.step()
    assert loop.flat == []
    loop.logits[:] = np.nan
    with pytest.raises(RuntimeError, match="NaN"):
        loop.step()
    loop.close()


def test_what_the_device_cannot_take_is_refused(kernels: ctypes.CDLL) -> None:
    """A canvas of more rows than one block sorts, and more rows than the session has, are told before anything runs; no
    canvas is under way then."""
    loop = DeviceLoop(kernels, 1100, np.ones((8, 4), dtype=np.float32), capacity=8, backwards=False)
    sampling = Sampling(4, 0, 1, 0.5, 0.5, 0.1, 0.005)
    with pytest.raises(RuntimeError, match="1025 rows: the device's sampler takes 1024"):
        loop.begin([CanvasSpec(n_rows=1025, canvas=np.zeros(1025))], sampling)
    with pytest.raises(RuntimeError, match="more rows than the session's 1100"):
        loop.begin([CanvasSpec(n_rows=n, canvas=np.zeros(n)) for n in (1000, 101)], sampling)
    with pytest.raises(RuntimeError, match="canvas 0 is not under way"):
        loop.read(0, 1000)
    loop.close()

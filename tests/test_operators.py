"""The CPU's own operators (csrc/cpu) against ggml's, on nets of every kind of weights.

ggml's operators serve devices and are what the own ones must agree with; parity with transformers is tested apart
(tests/parity). Rows are compared by the norm of the difference over the norm of the row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapes
from gguf import GGUFReader, dequantize
from gguf_rewrite import rewrite
from levels import DISTINCT, LEVELS

from pydiffgguf import DiffusionModel, demo_model_path
from pydiffgguf.session import CanvasBatch, CanvasSpec, Session

#: Awkward on purpose: nothing but the rows that K types need divides by what a vector or a tile holds.
SMALL: dict[str, Any] = dict(
    vocab_size=1037,
    hidden_size=256,
    intermediate_size=512,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_hidden_layers=4,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=64,
    num_global_key_value_heads=1,
    global_head_dim=128,
    sliding_window=19,
    num_experts=7,
    top_k_experts=3,
    moe_intermediate_size=256,
    canvas_length=37,
    max_position_embeddings=512,
)
C, V = 37, 1037
QUANTIZED = ("q8_0", "q4_0", "q5_0", "q4_k", "q5_k", "q6_k")

Rows = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """net(kind) -> a file of this type; net("exact KIND") -> gguf-py's values of that file, in float32."""
    folder = tmp_path_factory.mktemp("nets")

    @cache
    def write(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if kind.startswith("exact "):
            source = write(kind.removeprefix("exact "))
            tensors = {
                t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in GGUFReader(source).tensors
            }
            rewrite(source, path, tensors=tensors)
        else:
            shapes.write(path, "small", type=kind)
        return path

    return write


def ids(n: int, first: int = 0) -> npt.NDArray[np.int32]:
    return np.array([(797 * (first + i) + 5) % V for i in range(n)], dtype=np.int32)


def worst(a: Rows, b: Rows) -> float:
    """The greatest relative error of a row."""
    return float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max())


def usual(a: Rows, b: Rows) -> float:
    """The median relative error of the rows."""
    return float(np.median(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))


def two_passes(session: Session, n_rows: int = C) -> Rows:
    """A pass behind a prefix longer than the window, and one that is conditioned on its logits."""
    session.encode(ids(61))
    first = session.denoise(ids(n_rows, 7), n_rows=n_rows)
    second = session.denoise(ids(n_rows, 7), self_conditioning=first / np.float32(0.6), n_rows=n_rows)
    return np.concatenate([first, second])


@pytest.mark.parametrize("level", DISTINCT)
@pytest.mark.parametrize("n_batch", [7, 512])
def test_float32_agrees_with_ggml(net: Callable[[str], Path], level: str, n_batch: int) -> None:
    """Weights and cache in float32: what is left are orders of sums."""
    with (
        DiffusionModel(net("f32"), cpu=level, n_threads=1, type_kv="f32", n_batch=n_batch) as model,
        model.session() as own,
        model.session(ggml_operators=True) as ggml,
    ):
        assert worst(two_passes(own), two_passes(ggml)) < 5e-6


def test_no_graph_is_made_behind_the_first_canvas(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With ggml's operators, as on a device: later canvases, in steps of two passes, and their encoding find theirs.
    ggml's scheduler logs each graph that it is given, and a GPU captures each."""
    monkeypatch.setenv("GGML_SCHED_DEBUG", "1")
    caplog.set_level(logging.DEBUG, "pydiffgguf.ggml")
    made = []
    with (
        DiffusionModel(demo_model_path(), n_gpu_layers=0) as model,
        model.session(n_rows=320, ggml_operators=True) as session,
    ):
        session.encode(np.arange(40))
        for first in (0, 5):
            caplog.clear()
            batch = CanvasBatch(session, [CanvasSpec(seed=first + i) for i in range(5)], model.sampling)
            for _ in range(2):
                batch.step()
            session.encode(np.arange(64))
            made.append(sum("SPLIT #0" in line for line in caplog.messages))
    assert made[0] >= 3 and made[1] == 0


def test_what_a_view_has_beyond_a_pass_is_masked(net: Callable[[str], Path]) -> None:
    """ggml's operators read 512 rows of the cache where a pass sees fewer. With those behind it zero, or full
    of another text's keys and values, logits are the same to the bit; and with a cache that ends where the pass does,
    except for the order of sums (in float32: where activations become integers, a build of ggml for this processor
    moved most rows by 2e-3)."""
    prefix = ids(70) % 896
    for path, type_kv in ((demo_model_path(), "f16"), (net("f32"), "f32")):
        with (
            DiffusionModel(path, type_kv=type_kv, n_gpu_layers=0) as model,
            model.session(ggml_operators=True) as session,
        ):
            rows = ids(model.config.canvas_length) % 896
            session.encode(prefix)
            zeros = session.denoise(rows)
            session.reset()
            session.encode(ids(300, 3) % 896)
            session.reset()
            session.encode(prefix)
            np.testing.assert_array_equal(session.denoise(rows), zeros)
    with (
        DiffusionModel(net("f32"), type_kv="f32", n_gpu_layers=0, n_ctx=70 + C) as model,
        model.session(ggml_operators=True) as session,
    ):
        session.encode(prefix)
        assert worst(session.denoise(rows), zeros) < 5e-6


@pytest.mark.parametrize(("type_kv", "bound"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)])
def test_a_cache_of_any_type_is_read_as_it_is(net: Callable[[str], Path], type_kv: str, bound: float) -> None:
    """Against a float32 cache: the type's rounding of keys and values, in most rows (a few choose another expert for
    it), and no more of it than with ggml's operators, which round the queries too."""
    path = net("f32")
    with DiffusionModel(path, n_threads=1, type_kv="f32") as model, model.session() as session:
        exact = two_passes(session)
    with (
        DiffusionModel(path, n_threads=1, type_kv=type_kv) as model,
        model.session() as own,
        model.session(ggml_operators=True) as ggml,
    ):
        error, ggmls = usual(two_passes(own), exact), usual(two_passes(ggml), exact)
        assert error < bound and error < 1.2 * ggmls


@pytest.mark.parametrize(
    ("level", "kind"),
    [(level, kind) for level in DISTINCT for kind in (*QUANTIZED, "f16")]
    + [(level, "bf16") for level in LEVELS[-2:]]
    + [(LEVELS[-1], kind) for kind in ("iq4_nl", "q4_1", "q3_k")],
)
def test_quantized_weights_are_those_of_the_file(net: Callable[[str], Path], level: str, kind: str) -> None:
    """Against gguf-py's values of the same file. Products in float32 leave orders of sums; the others round
    activations, which costs at most what it costs ggml, and less than a misread scale or nibble would: a
    percent or two in most rows (a few choose another expert for it)."""
    with (
        DiffusionModel(net(f"exact {kind}"), cpu=level, n_threads=1, type_kv="f32") as model,
        model.session() as session,
    ):
        exact = two_passes(session)
    with (
        DiffusionModel(net(kind), cpu=level, n_threads=1, type_kv="f32") as model,
        model.session() as own,
        model.session(ggml_operators=True) as ggml,
    ):
        error, ggmls = usual(two_passes(own), exact), usual(two_passes(ggml), exact)
        kernels = {tensor.kernel for tensor in model.tensors()}
    bounds = {"8-bit integers": 0.03, "bfloat16": 0.01, "16-bit integers": 2e-4, "float32": 5e-6}
    assert error < max(bounds.get(kernel, 0.0) for kernel in kernels)
    assert error < 1.2 * ggmls


@pytest.mark.parametrize("level", DISTINCT)
@pytest.mark.parametrize("kind", ("f32", "q4_k", "q6_k"))
def test_threads_change_no_bit(net: Callable[[str], Path], level: str, kind: str) -> None:
    """Which thread takes which rows, experts and heads is chance; what comes out is not."""
    results = []
    for n_threads in (1, 2, 3):
        with DiffusionModel(net(kind), cpu=level, n_threads=n_threads) as model, model.session() as session:
            results.append(two_passes(session))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("level", DISTINCT)
@pytest.mark.parametrize("kind", ("f32", "q8_0", "q4_k"))
def test_a_row_has_the_same_bits_among_any_number_of_rows(net: Callable[[str], Path], level: str, kind: str) -> None:
    """Texts scored side by side and alone, one token and many: products, experts and attention give a row what it has
    alone."""
    with DiffusionModel(net(kind), cpu=level, n_threads=1) as model, model.session(n_rows=4 * C) as session:
        session.encode(ids(40))
        texts = [ids(n, 100 + n) for n in (1, 2, 13, 33, C)]
        together = session.score(texts)
        for text, logprob in zip(texts, together, strict=True):
            assert np.array_equal(session.score([text])[0], logprob)


def test_a_prompt_in_chunks_gives_the_same_canvas(net: Callable[[str], Path]) -> None:
    """Chunks of 5, 16 and all. A sliding layer's ring is as long as the chunk wants it, so its blocks of keys begin
    elsewhere: orders of sums."""
    results = []
    for n_batch in (5, 16, 512):
        with (
            DiffusionModel(net("f32"), n_threads=1, type_kv="f32", n_batch=n_batch) as model,
            model.session() as session,
        ):
            session.encode(ids(61))
            results.append(session.denoise(ids(C)))
    assert worst(results[0], results[2]) < 5e-6 and worst(results[1], results[2]) < 5e-6


def signal_rows(rng: np.random.Generator) -> Rows:
    """Processed logits of every kind: one-hot, peaked, between, flat, and with ids that may not be taken."""
    z = rng.normal(size=(C, V)).astype(np.float32)
    spread = np.geomspace(0.01, 60, C).astype(np.float32)
    z *= spread[:, None]
    z[3, rng.permutation(V)[:1000]] = -np.inf
    z[5] = -np.inf
    z[5, 17] = 0.0
    return z


@pytest.mark.parametrize("level", DISTINCT)
def test_the_signal_is_that_of_the_whole_vocabulary(net: Callable[[str], Path], level: str) -> None:
    """Gathered and dense rows side by side against the product with the whole embedding. The signal's error is bounded
    by 1e-6; the net behind it adds its own rounding (5e-6 here in float32, as in the first test)."""
    signal = signal_rows(np.random.default_rng(4))
    with (
        DiffusionModel(net("f32"), cpu=level, n_threads=2, type_kv="f32") as model,
        model.session() as own,
        model.session(ggml_operators=True) as ggml,
    ):
        for session in (own, ggml):
            session.encode(ids(20))
        canvas = ids(C)
        a, b = (s.denoise(canvas, self_conditioning=signal) for s in (own, ggml))
        assert worst(a, b) < 1e-5
        assert worst(a, own.denoise(canvas)) > 0.01  # the signal matters


@pytest.mark.parametrize("level", [level for level in DISTINCT if level in ("sse4", "avx2")])
def test_the_signal_of_a_quantized_embedding_keeps_its_budget(net: Callable[[str], Path], level: str) -> None:
    """Q8_0 against the same values in float32. These levels round activations to 16 bits, so that the budget of 1e-4
    shows (7e-5 to 1e-4 here); 8 bits make it 2e-2 with a signal and without."""
    signal = signal_rows(np.random.default_rng(4))
    results = []
    for kind in ("q8_0", "exact q8_0"):
        with (
            DiffusionModel(net(kind), cpu=level, n_threads=2, type_kv="f32") as model,
            model.session() as session,
        ):
            session.encode(ids(20))
            results.append(session.denoise(ids(C), self_conditioning=signal))
    assert worst(results[0], results[1]) < 2e-4


@pytest.mark.parametrize("level", DISTINCT)
def test_many_rows_of_one_expert_and_none_of_another(net: Callable[[str], Path], level: str) -> None:
    """The same id everywhere: all rows go to the same experts, and the others get none."""
    with (
        DiffusionModel(net("f32"), cpu=level, n_threads=2, type_kv="f32", n_batch=300) as model,
        model.session() as own,
        model.session(ggml_operators=True) as ggml,
    ):
        results = []
        for session in (own, ggml):
            session.encode(np.full(300, 9))
            results.append(session.denoise(np.full(C, 11)))
        assert worst(results[0], results[1]) < 5e-6


def test_timings_cover_a_step(net: Callable[[str], Path]) -> None:
    """Every part of a step takes time, and nothing is counted when it is off."""
    with DiffusionModel(net("q4_k"), n_threads=1) as model, model.session() as session:
        session.encode(ids(20))
        assert not any(vars(session.timings).values())
        session.profile()
        session.run_canvas(steps=3, confidence_threshold=0.0)
        assert all(seconds > 0 for seconds in vars(session.timings).values())
        session.profile(False)
        assert not any(vars(session.timings).values())


def test_kernels_are_named(net: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """`verbose` says what products are computed in, for which types."""
    with DiffusionModel(net("q4_k"), verbose=True) as model:
        kernels = {tensor.kernel for tensor in model.tensors()}
    assert kernels <= {"8-bit integers", "16-bit integers", "bfloat16", "float32", "ggml"}
    assert "of Q4_K" in capsys.readouterr().err


def test_canvases_side_by_side_have_the_bits_they_have_alone(net: Callable[[str], Path]) -> None:
    """Rows of several canvases share experts and tiles; two steps, with self-conditioning."""
    with DiffusionModel(net("q4_k"), n_threads=2) as model, model.session(n_rows=4 * C) as session:
        session.encode(ids(30))
        specs = [CanvasSpec(n_rows=n, seed=n) for n in (1, 11, C)]

        def steps(group: list[CanvasSpec]) -> list[list[Any]]:
            batch = CanvasBatch(session, group, session._defaults)
            return [batch.step() for _ in range(2)]

        together = steps(specs)
        for i, spec in enumerate(specs):
            for step, alone in zip(together, steps([spec]), strict=True):
                assert np.array_equal(step[i].entropy, alone[0].entropy)
                assert np.array_equal(step[i].canvas, alone[0].canvas)

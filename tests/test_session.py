"""The low level: one session's state after every call, good or bad."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from pydiffgguf import CancelledError, ContextOverflowError, DiffusionModel, ModelFormatError, Session, SessionBusyError
from pydiffgguf.convert import convert

PROMPT = [2, 40, 41, 42, 43, 60, 61]


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[DiffusionModel]:
    with DiffusionModel(tiny_gguf, n_ctx=256, type_kv="f32") as model:
        yield model


@pytest.fixture
def session(model: DiffusionModel) -> Iterator[Session]:
    with model.session() as session:
        session.encode(PROMPT)
        yield session


def some_canvas(model: DiffusionModel, seed: int = 0) -> np.ndarray:
    c = model.config
    return np.random.default_rng(seed).integers(0, c.n_vocab, c.canvas_length, dtype=np.int32)


def test_a_full_context_refuses_more_and_stays_as_it_was(model: DiffusionModel, session: Session) -> None:
    room = session.n_ctx - model.config.canvas_length - session.n_past
    with pytest.raises(ContextOverflowError, match=f"leaves room for {room}"):
        session.encode([5] * (room + 1))
    assert session.n_past == len(PROMPT)
    session.encode([5] * room)
    assert session.n_past == session.n_ctx - model.config.canvas_length
    session.denoise(some_canvas(model))


@pytest.mark.parametrize("ids", [[], [-1], [512], [2**31]])
def test_bad_ids_change_nothing(session: Session, ids: list[int]) -> None:
    with pytest.raises(ValueError):
        session.encode(ids)
    assert session.tokens().tolist() == PROMPT


def test_nothing_encoded_is_a_value_error(model: DiffusionModel) -> None:
    with model.session() as session:
        with pytest.raises(ValueError, match="nothing is encoded"):
            session.denoise(some_canvas(model))
        with pytest.raises(ValueError, match="nothing is encoded"):
            session.run_canvas()


def test_denoising_changes_neither_the_prefix_nor_a_second_result(model: DiffusionModel, session: Session) -> None:
    canvas = some_canvas(model)
    first = session.denoise(canvas)
    session.denoise(some_canvas(model, 1), first / np.float32(0.8))
    session.run_canvas(seed=5, steps=3)
    assert session.tokens().tolist() == PROMPT
    np.testing.assert_array_equal(session.denoise(canvas), first)


def test_a_zero_signal_is_not_a_uniform_one(model: DiffusionModel, session: Session) -> None:
    canvas = some_canvas(model)
    zeros = np.zeros((len(canvas), model.config.n_vocab), np.float32)
    assert np.abs(session.denoise(canvas) - session.denoise(canvas, zeros)).max() > 1e-3


def test_save_and_load_give_the_same_logits_and_refuse_strangers(
    model: DiffusionModel, session: Session, tmp_path: Path
) -> None:
    """Also with more tokens than the window, so that the rings have wrapped."""
    session.encode(list(range(20, 150)))
    canvas = some_canvas(model)
    expected = session.denoise(canvas)
    path = tmp_path / "prefix"
    session.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["prefix"]
    with model.session() as other:
        other.encode([7, 8, 9])
        other.load(path)
        assert other.tokens().tolist() == session.tokens().tolist()
        np.testing.assert_array_equal(other.denoise(canvas), expected)
        least = path.read_bytes()[:20] + (-(2**31)).to_bytes(4, "little", signed=True) + path.read_bytes()[24:]
        for content in (b"", b"nonsense" * 10, path.read_bytes()[:-1], b"DGPREF01" + b"\xff" * 200, least):
            broken = tmp_path / "broken"
            broken.write_bytes(content)
            with pytest.raises(ModelFormatError):
                other.load(broken)
            assert other.n_past == 0


@pytest.mark.parametrize("change", ["a matrix", "a type"])
def test_a_prefix_of_another_model_is_refused(session: Session, tiny_gguf: Path, tmp_path: Path, change: str) -> None:
    """Also of one that differs in the values of a matrix alone, or in the type of its weights."""
    other = tmp_path / "other.gguf"
    if change == "a type":
        convert(tiny_gguf, other, type="bf16")
    else:
        shutil.copy(tiny_gguf, other)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(other, "r+").tensors}
        weights = tensors["blk.2.ffn_up.weight"].data
        weights[:] = np.roll(weights, 1, axis=0)
        weights.flush()
    session.save(tmp_path / "prefix")
    with (
        DiffusionModel(other, n_ctx=256, type_kv="f32") as model,
        model.session() as stranger,
        pytest.raises(ModelFormatError, match="another model"),
    ):
        stranger.load(tmp_path / "prefix")


def test_two_sessions_may_save_to_one_path(model: DiffusionModel, tmp_path: Path) -> None:
    """What is read there is the one's prefix or the other's, at any time: each writes to a file of its own first."""
    path = tmp_path / "prefix"
    failures: list[Exception] = []

    def save(length: int) -> None:
        with model.session() as writer:
            writer.encode(PROMPT * length)
            try:
                for _ in range(60):
                    writer.save(path)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=save, args=(length,)) for length in (1, 30)]
    for thread in threads:
        thread.start()
    with model.session() as reader:
        while any(thread.is_alive() for thread in threads):
            if path.exists():
                reader.load(path)
                assert reader.n_past in (len(PROMPT), 30 * len(PROMPT))
    for thread in threads:
        thread.join()
    assert failures == []
    assert [p.name for p in tmp_path.iterdir()] == ["prefix"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody write to a mapped file")
def test_a_touched_file_is_the_same_and_a_written_one_is_not(tiny_gguf: Path, tmp_path: Path) -> None:
    """Not the time of the change counts, but the bytes; and the system's note of it, which nobody sets back."""
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, path)
    with DiffusionModel(path, n_ctx=256, n_gpu_layers=0) as model, model.session() as session:
        session.encode(PROMPT)
        canvas = some_canvas(model)
        before = session.denoise(canvas)
        times = path.stat()
        os.utime(path)
        path.chmod(0o600)
        np.testing.assert_array_equal(session.denoise(canvas), before)
        with path.open("r+b") as file:
            file.seek(-256, os.SEEK_END)
            file.write(b"\x01" * 256)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(OSError, match="was changed"):
            session.denoise(canvas)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_signal_that_is_no_number_is_refused(session: Session, model: DiffusionModel, value: float) -> None:
    """A row of NaN, and one without a finite maximum; ids that a row may not take are -inf, and that is fine."""
    canvas = some_canvas(model)
    signal = np.zeros((len(canvas), model.config.n_vocab), np.float32)
    signal[5] = value
    with pytest.raises(ValueError, match="self_conditioning: row 5"):
        session.denoise(canvas, signal)
    signal[5] = 0.0
    signal[5, 1:] = -np.inf
    assert np.isfinite(session.denoise(canvas, signal)).all()


def test_passes_in_turns_build_no_graph_anew(tiny_gguf: Path) -> None:
    """Canvases of one row and of two in turns take the time that each takes alone: 1.0 times, and 1.2 while a graph was
    built each time."""
    with DiffusionModel(tiny_gguf, n_ctx=256, n_gpu_layers=0, n_threads=1) as model, model.session() as session:
        session.encode(PROMPT)

        def time_of(*lengths: int) -> float:
            for n in lengths:
                session.denoise(np.arange(20, 20 + n, dtype=np.int32), n_rows=n)
            began = time.thread_time()
            for n in lengths:
                session.denoise(np.arange(20, 20 + n, dtype=np.int32), n_rows=n)
            return time.thread_time() - began

        # the three in turns, so that a slow moment of the machine meets each of them
        both, one, two = np.min([[time_of(1, 2), time_of(1), time_of(2)] for _ in range(300)], axis=0)
        assert both < 1.1 * (one + two)


def test_truncating_back_gives_the_same_logits(model: DiffusionModel, session: Session) -> None:
    canvas = some_canvas(model)
    expected = session.denoise(canvas)
    session.encode(list(range(20, 40)))
    session.truncate(len(PROMPT))
    np.testing.assert_array_equal(session.denoise(canvas), expected)
    with pytest.raises(ValueError):
        session.truncate(len(PROMPT) + 1)
    session.reset()
    assert session.n_past == 0


@pytest.mark.parametrize("pins", [[], [0], list(range(32)), [3, 4, 5, 31]])
def test_pinned_rows_never_change_and_take_no_part(model: DiffusionModel, session: Session, pins: list[int]) -> None:
    pinned = np.full(model.config.canvas_length, -1, np.int32)
    pinned[pins] = np.arange(100, 100 + len(pins))
    result = session.run_canvas(seed=4, pinned=pinned, trace=True, steps=6)
    free = pinned < 0
    for step in result.trace:
        for ids in (step.argmax, step.canvas):
            np.testing.assert_array_equal(ids[~free], pinned[~free])
        assert not step.accepted[~free].any()
        assert not step.entropy[~free].any()
        assert step.accepted[free].any() or not free.any()
    np.testing.assert_array_equal(result.tokens[~free], pinned[~free])


def test_no_pins_is_the_plain_loop(session: Session, model: DiffusionModel) -> None:
    none = np.full(model.config.canvas_length, -1, np.int32)
    a, b = session.run_canvas(seed=9, steps=5), session.run_canvas(seed=9, steps=5, pinned=none)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_cap_cuts_the_run_and_leaves_the_schedule_alone(session: Session) -> None:
    full = session.run_canvas(seed=2, steps=12, trace=True)
    capped = session.run_canvas(seed=2, steps=12, max_steps=4, trace=True)
    assert (full.steps, capped.steps) == (12, 4)
    for a, b in zip(full.trace, capped.trace, strict=False):
        np.testing.assert_array_equal(a.canvas, b.canvas)
        np.testing.assert_array_equal(a.entropy, b.entropy)


def test_a_true_result_of_on_step_ends_the_canvas(session: Session) -> None:
    seen: list[int] = []

    def on_step(step: object) -> bool:
        seen.append(1)
        return len(seen) == 3

    assert session.run_canvas(seed=2, steps=12, on_step=on_step).steps == 3


def test_an_exception_in_on_step_comes_back_and_the_session_goes_on(session: Session) -> None:
    def on_step(step: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.run_canvas(on_step=on_step)
    assert session.run_canvas(seed=2, steps=2).steps == 2


@pytest.mark.parametrize("pinned", [[0], np.full(32, -2), np.full(32, 512), np.full(32, 1.5)])
def test_bad_pins_are_refused(session: Session, pinned: object) -> None:
    with pytest.raises((ValueError, TypeError), match="pinned"):
        session.run_canvas(pinned=pinned)  # type: ignore[arg-type]


def test_threads_do_not_change_a_bit(tiny_gguf: Path) -> None:
    canvases = []
    for n_threads in (1, 2):
        with DiffusionModel(tiny_gguf, n_ctx=256, n_threads=n_threads) as model, model.session() as session:
            assert session.n_threads == n_threads
            session.encode(list(range(20, 120)))
            trace = session.run_canvas(seed=3, steps=8, trace=True).trace
            canvases.append(np.stack([step.canvas for step in trace]))
            canvases.append(np.stack([step.entropy for step in trace]))
    np.testing.assert_array_equal(canvases[0], canvases[2])
    np.testing.assert_array_equal(canvases[1], canvases[3])


def test_a_second_thread_gets_busy_and_harms_nothing(session: Session, model: DiffusionModel) -> None:
    """One thread denoises without pause; the other's calls either work or raise SessionBusyError."""
    canvas = some_canvas(model)
    expected = session.denoise(canvas)
    done = threading.Event()
    outcomes: list[object] = []

    def work() -> None:
        while not done.is_set():
            try:
                outcomes.append(np.array_equal(session.denoise(canvas), expected))
            except SessionBusyError:
                outcomes.append("busy")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while ("busy" not in outcomes or True not in outcomes) and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert "busy" in outcomes
    assert True in outcomes
    assert False not in outcomes


def test_cancel_from_another_thread_stops_and_leaves_the_session_usable(session: Session) -> None:
    timer = threading.Timer(0.05, session.cancel)
    timer.start()
    with pytest.raises(CancelledError):
        for _ in range(10_000):
            session.run_canvas(steps=1000, confidence_threshold=0.0)
    timer.join()
    assert session.tokens().tolist() == PROMPT
    assert session.run_canvas(seed=1, steps=2).steps == 2


def test_the_prediction_of_memory_is_what_a_session_takes(model: DiffusionModel) -> None:
    with model.session() as session:
        assert model.memory(n_ctx=256) == session.memory
    assert model.memory(n_ctx=64).kv_cache < model.memory(n_ctx=256).kv_cache

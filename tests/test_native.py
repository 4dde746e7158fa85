"""The C boundary as Python sees it: errors, lifetimes, threads, signals and the arrays that cross it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pydiffgguf import DiffusionModel, errors
from pydiffgguf._binding import functions, library
from pydiffgguf._binding.native import NativeModel, NativeSession
from pydiffgguf._binding.records import CanvasSpec, Sampling

PROMPT = [2, 20, 21, 22, 23]


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[NativeModel]:
    model = NativeModel(tiny_gguf)
    yield model
    model.close()


@pytest.fixture
def session(model: NativeModel) -> Iterator[NativeSession]:
    session = NativeSession(model, n_ctx=128, n_threads=1)
    yield session
    session.close()


@pytest.fixture
def endless(model: NativeModel) -> Sampling:
    """Sampling that never converges: a loop of a million steps, for calls that something must stop."""
    return replace(model.sampling, steps=1_000_000, confidence_threshold=0.0)


# ----------------------------------------------------------------------------------------------------------- errors


def test_every_status_has_an_exception() -> None:
    """No status of the header is left without an exception, and each message arrives as it was written."""
    statuses = {name: getattr(library.lib, name) for name in dir(library.lib) if name.startswith("DG_ERROR_")}
    assert set(statuses.values()) == set(library.EXCEPTIONS)
    for name, status in statuses.items():

        def fail(message: Any, size: int, status: int = status, text: bytes = name.encode()) -> int:
            library.ffi.memmove(message, text, len(text))
            assert size > len(text)
            return status

        with pytest.raises(library.EXCEPTIONS[status], match=f"^{name}$") as caught:
            library.call(fail)
        assert type(caught.value) is library.EXCEPTIONS[status]


def test_files_that_cannot_be_opened_raise_the_exact_os_error(tmp_path: Path) -> None:
    """Absent, a folder, a broken link: the builtin exception with errno and file name, as open() raises it."""
    with pytest.raises(FileNotFoundError) as absent:
        NativeModel(tmp_path / "absent.gguf")
    assert absent.value.filename == os.fspath(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        NativeModel(tmp_path)
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        NativeModel(tmp_path / "link.gguf")
    with pytest.raises(ValueError, match="NUL"):
        NativeModel("a\0b.gguf")


def test_a_file_that_is_no_gguf_is_a_format_error(tmp_path: Path) -> None:
    """Content, not the file's name, decides."""
    for content in (b"", b"GG", b"hello, world" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(errors.ModelFormatError):
            NativeModel(tmp_path / "x.gguf")


def test_a_path_that_is_not_ascii_opens(tiny_gguf: Path, tmp_path: Path) -> None:
    """Paths go to C in the file system's encoding."""
    path = tmp_path / "größe 模型.gguf"
    path.symlink_to(tiny_gguf)
    NativeModel(path).close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_ctx": -1}, ValueError, "n_ctx is -1"),
        ({"n_ctx": 32}, errors.ContextOverflowError, "33"),
        ({"n_ctx": 2**31}, ValueError, "n_ctx is 2147483648"),
        ({"n_ctx": 64.0}, TypeError, r"n_ctx must be an integer, but is 64\.0"),
        ({"n_ctx": True}, TypeError, "n_ctx must be an integer, but is True"),
        ({"n_batch": 0}, ValueError, "n_batch is 0"),
        ({"n_threads": -2}, ValueError, "n_threads is -2"),
        ({"type_kv": "q9_9"}, ValueError, "type_kv is 'q9_9'.*'f32'"),
    ],
)
def test_a_bad_session_option_names_itself_its_value_and_the_range(
    model: NativeModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The same for a session that is made and for one that is only predicted."""
    with pytest.raises(error, match=message):
        NativeSession(model, **options)
    with pytest.raises(error, match=message):
        model.memory(**options)


def test_asking_for_gpu_layers_on_a_cpu_build_is_unsupported(tiny_gguf: Path) -> None:
    """-1, as many as fit, is fine: that is none."""
    assert set(functions.build_info()["backends"]) == {"CPU", "RPC"}
    with pytest.raises(errors.UnsupportedError, match="GGML_CUDA"):
        NativeModel(tiny_gguf, n_gpu_layers=3)
    NativeModel(tiny_gguf, n_gpu_layers=-1).close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"steps": 0}, ValueError),
        ({"steps": 2.0}, TypeError),
        ({"max_steps": -1}, ValueError),
        ({"stability_threshold": -1}, ValueError),
        ({"t_min": float("nan")}, ValueError),
        ({"t_max": float("inf")}, ValueError),
        ({"t_max": "hot"}, TypeError),
        ({"entropy_bound": -0.1}, ValueError),
        ({"confidence_threshold": float("nan")}, ValueError),
    ],
)
def test_a_bad_sampling_option_names_itself(
    session: NativeSession, model: NativeModel, change: dict[str, Any], error: type[Exception]
) -> None:
    """Out of range is a ValueError, of another type a TypeError; the session stays usable."""
    session.encode(PROMPT)
    with pytest.raises(error, match=next(iter(change))):
        session.canvas_begin([CanvasSpec()], replace(model.sampling, **change))
    session.canvas_begin([CanvasSpec()], model.sampling)


# ----------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "ids must hold integers, but has dtype float64"),
        (["a"], TypeError, "ids must hold integers"),
        ([True, False], TypeError, "ids must hold integers, but has dtype bool"),
        ([[1, 2]], ValueError, r"ids has shape \[1, 2\]: it must be \[any\]"),
        (5, ValueError, r"ids has shape \[\]"),
        ([1, 2**40], ValueError, "must fit into int32"),
        ([1, 512], ValueError, "512"),
        ([1, -1], ValueError, "-1"),
        ([], ValueError, "ids|n is 0|empty"),
        (list(range(97)), errors.ContextOverflowError, "129|97"),
    ],
)
def test_bad_ids_change_nothing(session: NativeSession, ids: Any, error: type[Exception], message: str) -> None:
    """The message names the argument, what it is and what it must be; the prefix is as before."""
    session.encode(PROMPT)
    with pytest.raises(error, match=message):
        session.encode(ids)
    assert session.tokens().tolist() == PROMPT


def test_denoise_wants_arrays_of_its_own_shape_and_type(session: NativeSession) -> None:
    """A canvas of C ids; a self-conditioning of exactly float32 [C, V]: nothing is rounded or broadcast in silence."""
    session.encode(PROMPT)
    canvas = np.zeros(32, dtype=np.int32)
    with pytest.raises(ValueError, match=r"canvas has shape \[31\]: it must be \[32\]"):
        session.denoise(canvas[:31])
    with pytest.raises(ValueError, match=r"self_conditioning has shape \[32, 511\]: it must be \[32, 512\]"):
        session.denoise(canvas, np.zeros((32, 511), dtype=np.float32))
    with pytest.raises(TypeError, match="self_conditioning must have dtype float32, but has int64"):
        session.denoise(canvas, np.zeros((32, 512), dtype=np.int64))  # type: ignore[arg-type]


def test_the_layout_of_an_array_does_not_matter(session: NativeSession) -> None:
    """Strided, Fortran-ordered, read-only and foreign-endian arrays give what their plain copies give."""
    session.encode(PROMPT)
    canvas = np.arange(32, dtype=np.int32)
    signal = np.random.default_rng(0).normal(size=(32, 512)).astype(np.float32)
    expected = session.denoise(canvas, signal)
    assert expected.shape == (32, 512)
    assert expected.dtype == np.float32
    wide = np.zeros(64, dtype=">i8")
    wide[::2] = canvas
    frozen = np.asfortranarray(signal)
    frozen.flags.writeable = False
    assert np.array_equal(session.denoise(wide[::2], frozen), expected)
    assert np.array_equal(session.denoise(canvas.tolist(), signal[:, ::-1][:, ::-1]), expected)


def test_results_are_copies(session: NativeSession, model: NativeModel) -> None:
    """A step's arrays live on, unchanged, through the next step and the end of the session."""
    session.encode(PROMPT)
    session.canvas_begin([CanvasSpec(seed=1)], model.sampling)
    [first] = session.canvas_step()
    kept = [array.copy() for array in (first.argmax, first.canvas, first.accepted, first.entropy)]
    session.canvas_step()
    session.close()
    for array, copy in zip((first.argmax, first.canvas, first.accepted, first.entropy), kept, strict=True):
        assert np.array_equal(array, copy)
    assert (first.argmax.dtype, first.accepted.dtype, first.entropy.dtype) == (np.int32, np.bool_, np.float64)


def test_the_loop_uses_the_draws_it_says_it_uses(session: NativeSession, model: NativeModel) -> None:
    """A canvas under a seed and the same canvas with that seed's draws handed in are the same, step for step."""
    session.encode(PROMPT)
    seed, index, c, v = 2**63 + 5, 3, model.config.canvas_length, model.config.n_vocab
    session.canvas_begin([CanvasSpec(seed=seed, canvas_index=index)], model.sampling)
    alone = [session.canvas_step()[0] for _ in range(4)]
    session.canvas_begin([CanvasSpec(canvas=functions.noise_canvas(seed, index, c, v))], model.sampling)
    for step, expected in enumerate(alone):
        uniform = functions.noise_uniform(seed, index, step, c)
        [handed] = session.canvas_step([(uniform, functions.noise_renoise(seed, index, step, c, v))])
        assert np.array_equal(handed.canvas, expected.canvas)
        assert np.array_equal(handed.accepted, expected.accepted)
        assert handed.mean_entropy == expected.mean_entropy


def test_the_sampler_alone_is_the_sampler_of_the_loop(session: NativeSession, model: NativeModel) -> None:
    """sample() on the logits of the first step gives that step."""
    session.encode(PROMPT)
    c, v = model.config.canvas_length, model.config.n_vocab
    uniform, renoise = functions.noise_uniform(9, 0, 0, c), functions.noise_renoise(9, 0, 0, c, v)
    logits = session.denoise(functions.noise_canvas(9, 0, c, v))
    sampled = functions.sample(logits, model.sampling, step=0, uniform=uniform, renoise=renoise)
    session.canvas_begin([CanvasSpec(seed=9)], model.sampling)
    [step] = session.canvas_step()
    assert np.array_equal(sampled.argmax, step.argmax)
    assert np.array_equal(sampled.canvas, step.canvas)
    assert np.array_equal(sampled.accepted, step.accepted)
    assert np.array_equal(sampled.entropy, step.entropy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"uniform": np.full(3, 1.0)}, ValueError, "uniform"),
        ({"uniform": np.full(3, np.nan)}, ValueError, "uniform"),
        ({"uniform": np.zeros(3, dtype=np.int64)}, TypeError, "uniform must have dtype float64"),
        ({"renoise": np.full(3, 7)}, ValueError, "renoise"),
        ({"renoise": np.zeros(2, dtype=np.int32)}, ValueError, r"renoise has shape \[2\]: it must be \[3\]"),
        ({"pinned": [-2, 0, 0]}, ValueError, "pinned"),
        ({"step": -1}, ValueError, "step is -1"),
        ({"step": 24}, ValueError, "step is 24"),
        ({"z": np.zeros((0, 7), dtype=np.float32)}, ValueError, "rows of z is 0|uniform has shape"),
    ],
)
def test_sample_names_a_bad_argument(
    model: NativeModel, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Each argument is checked before anything is computed."""
    good: dict[str, Any] = {
        "z": np.zeros((3, 7), dtype=np.float32),
        "step": 0,
        "uniform": np.zeros(3),
        "renoise": np.zeros(3, dtype=np.int32),
    }
    functions.sample(sampling=model.sampling, **good)
    with pytest.raises(error, match=message):
        functions.sample(sampling=model.sampling, **{**good, **change})


# --------------------------------------------------------------------------------------------------------- metadata


def test_metadata_is_what_the_gguf_package_reads(tiny_gguf: Path, model: NativeModel) -> None:
    """Every key, type and value of the file, arrays and strings included, against another reader."""
    reader = gguf.GGUFReader(tiny_gguf)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(model.metadata) == list(fields)
    for name, field in fields.items():
        expected = field.contents()
        assert model.metadata[name] == expected, name
        assert type(model.metadata[name]) is type(expected), name
    assert len(model.metadata["tokenizer.ggml.tokens"]) == model.config.n_vocab  # type: ignore[arg-type]


def test_tensors_are_what_the_gguf_package_reads(tiny_gguf: Path, model: NativeModel) -> None:
    """Names in the file's order, types, ggml shapes and sizes, against another reader."""
    expected = [
        (t.name, t.tensor_type.name.lower(), tuple(t.shape.tolist()), t.n_bytes)
        for t in gguf.GGUFReader(tiny_gguf).tensors
    ]
    assert [(t.name, t.type, t.shape, t.n_bytes) for t in model.tensors()] == expected


def test_config_comes_from_the_file(model: NativeModel) -> None:
    """Shapes and the sampler's values of the checkpoint that the fixture made."""
    config = model.config
    assert (config.n_vocab, config.n_embd, config.n_layer, config.canvas_length) == (512, 128, 6, 32)
    assert [layer.sliding for layer in config.layers] == [True] * 5 + [False]
    assert [(layer.n_head_kv, layer.head_dim) for layer in config.layers] == [(2, 32)] * 5 + [(1, 64)]
    assert (model.sampling.steps, model.sampling.stability_threshold) == (24, 2)
    assert model.sampling.t_min == pytest.approx(0.3)
    assert model.warnings == []


# ----------------------------------------------------------------------------------------------- lifetimes and close


def test_close_frees_the_model_though_it_is_still_named(tiny_gguf: Path) -> None:
    """Whoever keeps the closed object or its metadata keeps none of the weights, and no server's connection. Without
    the garbage collector: a name that lives on in a loop is no reason to wait for it."""
    gc.disable()
    try:
        model = DiffusionModel(tiny_gguf)
        metadata = model.metadata
        name = metadata["general.architecture"]
        model.generate([5, 6], steps=1, max_tokens=1)
        pointer = weakref.ref(model._engine.native._pointer)
        model.close()
        assert pointer() is None
    finally:
        gc.enable()
    assert metadata["general.architecture"] == name
    with pytest.raises(errors.ModelClosedError):
        metadata["diffusion-gemma.block_count"]


def test_close_is_idempotent_and_ends_all_use(tiny_gguf: Path) -> None:
    """After close, a second close is fine and everything else says that the thing is closed."""
    model = NativeModel(tiny_gguf)
    session = NativeSession(model, n_ctx=64)
    session.close()
    session.close()
    session.cancel()
    assert session.closed
    uses: list[Callable[[], object]] = [
        lambda: session.n_past,
        session.tokens,
        lambda: session.encode(PROMPT),
        lambda: session.truncate(0),
        lambda: session.save(tiny_gguf.parent / "never"),
        lambda: session.load(tiny_gguf),
        lambda: session.denoise([0] * 32),
        lambda: session.canvas_begin([CanvasSpec()], model.sampling),
        session.canvas_step,
        session.clear_cancel,
    ]
    for use in uses:
        with pytest.raises(errors.ModelClosedError, match="session is closed"):
            use()
    model.close()
    model.close()
    assert model.closed
    for use in (model.tensors, model.memory, lambda: model.metadata, lambda: NativeSession(model)):
        with pytest.raises(errors.ModelClosedError, match=r"tiny\.gguf is closed"):
            use()


def test_a_session_keeps_its_model_alive(tiny_gguf: Path) -> None:
    """The model may be closed first; the session then still computes, and the same numbers."""
    model = NativeModel(tiny_gguf)
    session = NativeSession(model, n_ctx=64, n_threads=1)
    session.encode(PROMPT)
    before = session.denoise([5] * 32)
    model.close()
    assert np.array_equal(session.denoise([5] * 32), before)


def test_objects_left_open_at_exit_do_no_harm(tiny_gguf: Path) -> None:
    """Neither a model, nor a session under way, nor a reference cycle around them disturbs the interpreter's end."""
    script = f"""
        import pydiffgguf._binding.native as native
        model = native.NativeModel({os.fspath(tiny_gguf)!r})
        session = native.NativeSession(model, n_ctx=64)
        session.encode({PROMPT})
        session.canvas_begin([native.CanvasSpec()], model.sampling)
        session.canvas_step()
        session.itself = session
        model.session = session
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ------------------------------------------------------------------------------------------------ threads and signals


def run_until_stopped(session: NativeSession, sampling: Sampling) -> Exception:
    """Steps through a canvas until something stops it; returns that."""
    try:
        session.canvas_begin([CanvasSpec()], sampling)
        while True:
            session.canvas_step()
    except (errors.DiffGGUFError, ValueError) as error:
        return error


def start(session: NativeSession, sampling: Sampling) -> tuple[threading.Thread, list[Exception]]:
    """run_until_stopped on another thread, and where its result will be."""
    results: list[Exception] = []
    thread = threading.Thread(target=lambda: results.append(run_until_stopped(session, sampling)))
    thread.start()
    return thread, results


def test_cancel_from_another_thread(session: NativeSession, endless: Sampling) -> None:
    """The running call raises CancelledError soon, the prefix stays, and the session goes on being usable."""
    session.encode(PROMPT)
    thread, results = start(session, endless)
    time.sleep(0.1)
    session.cancel()
    thread.join(timeout=20)
    assert [type(result) for result in results] == [errors.CancelledError]
    assert session.tokens().tolist() == PROMPT
    session.canvas_begin([CanvasSpec()], endless)
    assert session.canvas_step()[0].step == 0


def test_a_cancel_that_meets_no_call_waits_for_the_next(session: NativeSession) -> None:
    """It stops the next call that computes, once, unless it is forgotten before."""
    session.cancel()
    with pytest.raises(errors.CancelledError):
        session.encode(PROMPT)
    assert session.n_past == 0
    session.cancel()
    session.clear_cancel()
    session.encode(PROMPT)
    assert session.n_past == len(PROMPT)


def test_a_second_thread_is_told_that_the_session_is_busy(model: NativeModel) -> None:
    """It gets SessionBusyError, and the call it met is not disturbed."""
    session = NativeSession(model, n_ctx=1024, n_threads=1, n_batch=1024)
    results: list[BaseException | None] = []

    def encode() -> None:
        try:
            session.encode([2, *range(20, 420)] * 2)
            results.append(None)
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=encode)
    thread.start()
    busy = 0
    while thread.is_alive():
        try:
            session.truncate(0)
        except errors.SessionBusyError:
            busy += 1
        time.sleep(0.001)
    thread.join()
    assert results == [None]
    assert busy > 0


def test_closing_a_busy_session_stops_its_call(model: NativeModel, endless: Sampling) -> None:
    """close() returns at once; the call on the other thread ends by itself and the memory is freed after it."""
    session = NativeSession(model, n_ctx=64, n_threads=1)
    session.encode(PROMPT)
    thread, results = start(session, endless)
    time.sleep(0.1)
    session.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert type(results[0]) in (errors.CancelledError, errors.ModelClosedError)


INTERRUPT = """
    import signal, sys, threading, time
    import pydiffgguf._binding.native as native
    model = native.NativeModel(sys.argv[1])
    session = native.NativeSession(model, n_ctx=2048, n_threads=1, n_batch=2048)
    ids = [2, *range(20, 420)] * 4
    started = time.monotonic()
    session.encode(ids)
    whole = time.monotonic() - started
    session.truncate(0)
    threading.Timer(whole / 4, signal.raise_signal, [signal.SIGINT]).start()
    started = time.monotonic()
    try:
        session.encode(ids)
    except KeyboardInterrupt as error:
        seconds = time.monotonic() - started
        assert error.__traceback__ is not None
        assert session.n_past == 0, session.n_past
        session.encode(ids[:5])
        assert session.n_past == 5
        print(f"{seconds / whole:.3f}")
"""


def test_ctrl_c_stops_a_long_call(tiny_gguf: Path) -> None:
    """One long C call on the main thread: SIGINT raises KeyboardInterrupt in its midst, and the session lives on."""
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPT), os.fspath(tiny_gguf)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) < 0.9


def test_an_exception_of_a_signal_handler_reaches_the_caller(session: NativeSession, endless: Sampling) -> None:
    """Whatever a handler raises, not only KeyboardInterrupt, comes out of the call that was running."""

    class Alarm(Exception):
        pass

    def ring(_number: int, _frame: object) -> None:
        raise Alarm

    session.encode(PROMPT)
    previous = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Alarm):
            run_until_stopped(session, endless)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert session.tokens().tolist() == PROMPT


# ------------------------------------------------------------------------------------------------------ save and load


def test_a_saved_prefix_comes_back(model: NativeModel, tmp_path: Path) -> None:
    """Tokens and cache: the same logits as before."""
    first = NativeSession(model, n_ctx=128, n_threads=1)
    first.encode(PROMPT * 5)
    first.save(tmp_path / "prefix")
    second = NativeSession(model, n_ctx=96, n_threads=1)
    second.encode([2, 40, 41])
    second.load(tmp_path / "prefix")
    assert second.tokens().tolist() == PROMPT * 5
    assert np.array_equal(second.denoise([7] * 32), first.denoise([7] * 32))


def test_a_failed_load_leaves_an_empty_prefix(session: NativeSession, tmp_path: Path) -> None:
    """A file that is cut anywhere is refused; one that is absent changes nothing."""
    session.encode(PROMPT)
    session.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    with pytest.raises(FileNotFoundError):
        session.load(tmp_path / "absent")
    assert session.n_past == len(PROMPT)
    for size in {*range(0, 64, 7), len(whole) // 2, len(whole) - 1}:
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(errors.ModelFormatError):
            session.load(tmp_path / "cut")
        assert session.n_past == 0
    session.load(tmp_path / "whole")
    assert session.n_past == len(PROMPT)
    with pytest.raises(OSError):
        session.save(tmp_path / "absent" / "prefix")

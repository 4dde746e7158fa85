"""`signal_copy`: the self-conditioning signal of a device's operators as one product with a transposed embedding in
half precision, which takes memory and is counted."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import two_layers
from gguf_rewrite import DROP, read_tensor, rewrite
from places import LOCAL, PLACES, Place, Servers, furthest_apart, on_servers, place_of
from rpc_servers import Relay, rpc_server

from pydiffgguf import CanvasBatch, CanvasSpec, DiffusionModel, OutOfMemoryError, UnsupportedError, cli
from pydiffgguf.convert.inspection.fit import plan
from pydiffgguf.convert.inspection.inspect import inspect_file

PROMPT = [2, 40, 41, 42, 43, 60, 61]

# The copy rounds each number of the embedding to 11 bits, and backends may round the probabilities so, too: each by up
# to 2^-11 of itself, so no number of the signal moves by more than 2^-10 of the magnitudes that it is the sum of. These
# nets' logits move by a tenth of that (1.1e-4 of the greatest, measured on a server).
TOLERANCE = 2.0**-10

DEVICES: dict[str, Callable[[Servers], dict[str, Any]]] = {
    **{name: make for name, make in PLACES.items() if name not in ("cpu", "operators")},
    "experts on the CPU": lambda servers: {**on_servers(servers()[0]), "n_cpu_moe": 3},
    "host's sampler": lambda servers: {**on_servers(servers()[0]), "sampler": "host"},
}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Place:
    return place_of(request, DEVICES)


@pytest.fixture(scope="module")
def there(tiny_gguf: Path, device: Place) -> Iterator[DiffusionModel]:
    with device.open(tiny_gguf, n_ctx=256, type_kv="f32", signal_copy=True) as model:
        yield model


def test_logits_are_the_cpus_but_for_half_precision(here: DiffusionModel, there: DiffusionModel) -> None:
    """Of logits that are flat, as they come, and peaked; to the bit the same each time."""
    canvas = np.arange(32, dtype=np.int32) * 7
    with here.session() as a, there.session() as b, there.session() as again:
        for session in (a, b, again):
            session.encode(PROMPT)
        first = a.denoise(canvas)
        for factor in (0.0, 1.0, 30.0):
            conditioned = b.denoise(canvas, first * np.float32(factor))
            assert 0 < furthest_apart(conditioned, a.denoise(canvas, first * np.float32(factor))) <= TOLERANCE
            np.testing.assert_array_equal(conditioned, again.denoise(canvas, first * np.float32(factor)))


def test_trajectories_are_the_cpus(here: DiffusionModel, there: DiffusionModel) -> None:
    """Two canvases side by side, one of them with pins: every argmax and accepted row, and entropies within what the
    logits are apart by."""
    pinned = np.full(32, -1, dtype=np.int32)
    pinned[::3] = 9
    rows: list[list[Any]] = []
    for model in (here, there, there):
        with model.session(n_rows=64) as session:
            session.encode(PROMPT)
            specs = [CanvasSpec(seed=1), CanvasSpec(seed=2, pinned=pinned)]
            batch = CanvasBatch(session, specs, replace(model.sampling, steps=6, confidence_threshold=0.0))
            rows.append([])
            while not batch.finished:
                rows[-1] += batch.step()
    assert len(rows[0]) == 12
    for ours, theirs, again in zip(*rows, strict=True):
        np.testing.assert_array_equal(theirs.argmax, ours.argmax)
        np.testing.assert_array_equal(theirs.accepted, ours.accepted)
        np.testing.assert_allclose(theirs.entropy, ours.entropy, rtol=0, atol=10 * TOLERANCE)
        np.testing.assert_array_equal(again.entropy, theirs.entropy)


@pytest.mark.skipif(bool(LOCAL), reason="a GPU sums in an order of its own")
def test_a_certain_row_has_its_tokens_own_embedding(tmp_path: Path, servers: tuple[str, str]) -> None:
    """All of the probability on one id, and an embedding that half precision has: the same to the bit with and without
    the copy, whose product is scaled by a power of two."""
    two_layers.write(tmp_path / "x.gguf", "f16")
    logits = []
    for copied in (False, True):
        with DiffusionModel(tmp_path / "x.gguf", n_ctx=128, **on_servers(servers[0]), signal_copy=copied) as model:
            canvas = np.arange(64, dtype=np.int32) * 60
            certain = np.full((64, 4096), -1e4, dtype=np.float32)
            certain[np.arange(64), canvas] = 0.0
            with model.session() as session:
                session.encode(PROMPT)
                logits.append(session.denoise(canvas, certain))
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("type", ["f32", "q6_k", "q8_0", "iq4_nl"])
def test_every_type_is_transposed(tmp_path: Path, servers: tuple[str, str], type: str) -> None:
    """In blocks of 1, 32 and 256 numbers, with a vocabulary that no tile divides: rows that are certain of an id get
    that id's embedding, and no other's. A quantized model's next product rounds what differs by 2^-11."""
    two_layers.write(tmp_path / "x.gguf", type, vocab_size=4001)
    canvas = np.arange(64, dtype=np.int32) * 62
    logits = []
    for copied in (False, True):
        options = {"n_ctx": 128, "signal_copy": copied, **on_servers(servers[0])}
        with DiffusionModel(tmp_path / "x.gguf", **options) as model, model.session() as session:
            session.encode(PROMPT)
            for ids in (canvas, canvas[::-1]):
                certain = np.full((64, 4001), -1e4, dtype=np.float32)
                certain[np.arange(64), ids] = 0.0
                logits.append(session.denoise(canvas, certain))
    plain, other, copied_plain, copied_other = logits
    assert np.linalg.norm(copied_plain - plain) < 0.2 * np.linalg.norm(other - plain)
    assert np.linalg.norm(copied_other - other) < 0.2 * np.linalg.norm(other - plain)


def test_its_memory_is_counted(here: DiffusionModel, there: DiffusionModel) -> None:
    """Once for all sessions, apart from the weights, on the main device."""
    c = here.config
    assert here.memory().signal_copy == 0
    predicted = there.memory()
    assert predicted.signal_copy == 2 * c.n_vocab * c.n_embd
    *others, main = there.devices()
    assert main.is_main and main.weights >= predicted.signal_copy
    assert main.weights + sum(d.weights for d in others) == predicted.weights_on_devices + predicted.signal_copy
    with there.session() as session:
        assert session.memory.signal_copy == predicted.signal_copy


def test_auto_and_fit_make_room_for_it(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device that has just enough for all layers without it has not with it, and has with its bytes more; what
    `inspect --fit` shows adds up."""
    report = inspect_file(tiny_gguf, n_ctx=256)
    copy = 2 * 512 * 128
    size = next(n for n in range(500_000_000, 600_000_000, 10_000) if plan(report, n).is_whole)
    for free, whole in ((size - 10_000, False), (size + copy - 10_000, False), (size + copy, True)):
        planned = plan(report, free, signal_copy=True)
        assert planned.is_whole == whole
        assert sum(share.device for share in planned.shares) + planned.free == free
        assert copy in [share.device for share in planned.shares]
        with rpc_server() as (server, _):
            relay = Relay(server, memory_free=free)
            with DiffusionModel(tiny_gguf, n_ctx=256, rpc=[relay.endpoint], signal_copy=True) as model:
                assert (sum(d.n_layers for d in model.devices()) == 6) == whole
            relay.close()
    assert cli.main(["inspect", str(tiny_gguf), "--fit", "1GB", "--signal-copy"]) == 0
    assert "the signal's copy of the embedding" in capsys.readouterr().out


def test_it_is_refused_where_it_would_be_of_no_use(
    tiny_gguf: Path, tmp_path: Path, servers: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not ignored: with the head on the CPU, because of no device or of a device too small, and without a signal."""
    with pytest.raises(UnsupportedError, match="the head is on the CPU, which gathers"):
        DiffusionModel(tiny_gguf, n_gpu_layers=0, signal_copy=True)
    with rpc_server() as (server, _):
        relay = Relay(server, memory_free=1000)
        with pytest.raises(UnsupportedError, match="no device has room for the head and that copy"):
            DiffusionModel(tiny_gguf, rpc=[relay.endpoint], signal_copy=True)
        relay.close()
    names = ("pre_norm", "gate", "up", "down")
    rewrite(tiny_gguf, tmp_path / "x.gguf", tensors={f"self_cond_{name}.weight": DROP for name in names})
    with pytest.raises(UnsupportedError, match="no self-conditioning"):
        DiffusionModel(tmp_path / "x.gguf", **on_servers(servers[0]), signal_copy=True)
    with pytest.raises(UnsupportedError, match="no self-conditioning"):
        plan(inspect_file(tmp_path / "x.gguf"), 10**9, signal_copy=True)
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tiny_gguf), "--signal-copy"])
    assert "--signal-copy goes with --fit SIZE" in capsys.readouterr().err


def test_numbers_beyond_half_precision_are_refused(tiny_gguf: Path, tmp_path: Path, servers: tuple[str, str]) -> None:
    """Rather than made infinite; without the copy the file serves."""
    embedding = read_tensor(tiny_gguf, "token_embd.weight").copy()
    embedding[17, 5] = 1e5
    rewrite(tiny_gguf, tmp_path / "x.gguf", tensors={"token_embd.weight": embedding})
    options = on_servers(servers[0])
    with pytest.raises(UnsupportedError, match="signal_copy: the embedding of token 17 holds a number"):
        DiffusionModel(tmp_path / "x.gguf", **options, signal_copy=True)
    DiffusionModel(tmp_path / "x.gguf", **options).close()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
@pytest.mark.skipif(bool(LOCAL), reason="a server of this build allocates on a GPU")
def test_a_device_that_refuses_the_memory_says_what_for(tmp_path: Path) -> None:
    """The weights fit there, 41 MB, with what they are sent in; the copy of 134 MB does not."""
    two_layers.write(tmp_path / "x.gguf", "q4_0", vocab_size=262_144)
    with rpc_server() as (server, process):
        DiffusionModel(tmp_path / "x.gguf", n_ctx=128, rpc=[server]).close()  # what the server itself needs is there
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        (size,) = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize")]
        limit = size + 120_000_000
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(OutOfMemoryError, match=r"refused 134217728 bytes for the embedding's transposed copy"):
            DiffusionModel(tmp_path / "x.gguf", n_ctx=128, rpc=[server], signal_copy=True)
        DiffusionModel(tmp_path / "x.gguf", n_ctx=128, rpc=[server]).close()

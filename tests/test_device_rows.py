"""Logits that a device made, sampled by the CPU a piece at a time: `sampler="host"` with the head elsewhere, and
canvases with sets of allowed ids wherever operators sample the others."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import two_layers
from gguf_rewrite import read_tensor, rewrite
from places import on_servers
from rpc_servers import Relay, rpc_server

from pydiffgguf import CanvasBatch, CanvasSpec, DeviceError, DiffGGUFError, DiffusionModel
from pydiffgguf._binding.records import RawStep

PROMPT = [2, *(3 + i * 7 % 500 for i in range(150))]

# Of entropies and log-probabilities. Signals differ by 1e-6 of their length: the CPU leaves out as much of a row where
# it gathers tokens, and a device, which multiplies with all of them, rounds by as much. Measured with AVX-512: 1.3e-5.
# Other processors add in other orders, so there is room for eight times that.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def there(tiny_gguf: Path, servers: tuple[str, str]) -> Iterator[DiffusionModel]:
    options = {"n_ctx": 256, "type_kv": "f32", "sampler": "host"}
    with DiffusionModel(tiny_gguf, **options, **on_servers(servers[0])) as model:
        yield model


def specs(n: int) -> list[CanvasSpec]:
    """n canvases of up to 32 rows: free ones, with pins and watched ids, with allowed ids, and short ones."""
    pinned = np.full(32, -1, dtype=np.int32)
    pinned[::3] = 40 + np.arange(11)
    watched = np.where(np.arange(32) % 2 == 0, 17, -1)
    kinds = [{}, {"pinned": pinned, "watched": watched}, {"n_rows": 16, "allowed": {0: [5, 6, 7], 2: [100]}}]
    return [CanvasSpec(seed=i, **kinds[i % 3]) for i in range(n)]


def steps(model: DiffusionModel, canvases: list[CanvasSpec], **options: bool) -> list[list[RawStep]]:
    sampling = replace(model.sampling, steps=6, confidence_threshold=0.0)
    with model.session(n_rows=32 * len(canvases), **options) as session:
        session.encode(PROMPT)
        batch = CanvasBatch(session, canvases, sampling)
        found = []
        while not batch.finished:
            found.append(batch.step())
        return found


@pytest.mark.parametrize("n", [1, 3, 10], ids=["one pass of one", "side by side", "two passes"])
def test_rows_are_sampled_as_on_the_cpu(here: DiffusionModel, there: DiffusionModel, n: int) -> None:
    """Both sides compute with ggml's operators. In the first step, from the same logits, all is equal to the bit; then
    every argmax, draw and accepted row is."""
    for i, (ours, theirs) in enumerate(
        zip(steps(here, specs(n), ggml_operators=True), steps(there, specs(n)), strict=True)
    ):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x.argmax, y.argmax)
            np.testing.assert_array_equal(x.canvas, y.canvas)
            np.testing.assert_array_equal(x.accepted, y.accepted)
            tolerance = 0.0 if i == 0 else TOLERANCE
            np.testing.assert_allclose(y.entropy, x.entropy, rtol=0, atol=tolerance)
            assert (x.logprob is None) == (y.logprob is None)
            if x.logprob is not None and y.logprob is not None:
                np.testing.assert_allclose(y.logprob, x.logprob, rtol=0, atol=tolerance)


def test_a_row_without_a_number_ends_the_canvas(tiny_gguf: Path, tmp_path: Path, servers: tuple[str, str]) -> None:
    """As on the CPU: the same error, and the canvas makes no further step; the session does."""
    embedding = read_tensor(tiny_gguf, "token_embd.weight").copy()
    embedding[300] = np.nan
    rewrite(tiny_gguf, tmp_path / "x.gguf", tensors={"token_embd.weight": embedding})
    messages = []
    for options in ({"n_gpu_layers": 0}, {**on_servers(servers[0]), "sampler": "host"}):
        with DiffusionModel(tmp_path / "x.gguf", n_ctx=256, **options) as model, model.session() as session:
            session.encode(PROMPT)
            canvas = np.arange(32, dtype=np.int32)
            batch = CanvasBatch(session, [CanvasSpec(canvas=canvas)], model.sampling)
            with pytest.raises(DiffGGUFError, match="NaN") as error:
                batch.step()
            with pytest.raises(ValueError, match="under way"):
                batch.step()
            assert session.denoise(canvas).shape == (32, 512)
            messages.append(str(error.value))
    assert messages[0] == messages[1]


class Breaking(Relay):
    """A relay that hangs up on both sides behind so many bytes for the client."""

    last: int | None = None

    def _pass_on(self, source: socket.socket, target: socket.socket, count: str) -> None:
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and (self.last is None or self.received < self.last):
                setattr(self, count, getattr(self, count) + len(data))
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_a_server_lost_while_threads_read_logits_is_an_error(tmp_path: Path) -> None:
    """Whichever thread meets it: several pieces, two threads."""
    two_layers.write(tmp_path / "x.gguf", "q8_0", vocab_size=65_536)
    with rpc_server() as (server, _):
        relay = Breaking(server)
        options = {"rpc": [relay.endpoint], "n_ctx": 128, "n_threads": 2, "sampler": "host"}
        with DiffusionModel(tmp_path / "x.gguf", **options) as model, model.session() as session:
            session.encode([2, 3, 4])
            batch = CanvasBatch(session, [CanvasSpec(seed=1)], model.sampling)
            batch.step()
            for_a_step = relay.received
            batch.step()
            for_a_step = relay.received - for_a_step
            assert for_a_step > 64 * 65_536 * 4
            relay.last = relay.received + for_a_step // 2
            with pytest.raises(DeviceError, match="lost"):
                batch.step()
        relay.close()


# By how much this process's anonymous memory grows in a session's first two steps.
GROWN = """
import ctypes, re, sys
from pathlib import Path
from pydiffgguf import DiffusionModel

def held():
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(re.search(r"Anonymous:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

with DiffusionModel(sys.argv[1], n_ctx=512, n_threads=2, sampler="host", rpc=sys.argv[2:]) as model:
    with model.session() as session:
        session.encode([2, 3, 4])
        before = held()
        session.run_canvas(seed=1, max_steps=2)
        print(held() - before, session.memory.logits)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_of_logits_is_never_here_as_a_whole(tmp_path: Path) -> None:
    """67 MB on a server, which two threads take 4 MiB at a time."""
    two_layers.write(tmp_path / "x.gguf", "q8_0", vocab_size=65_536, hidden_size=64, canvas_length=256)
    with rpc_server() as (server, _):
        command = [sys.executable, "-c", GROWN, str(tmp_path / "x.gguf"), server]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, logits = map(int, done.stdout.split())
    assert logits == 4 * 65_536 * 256
    assert grown < logits / 4, grown

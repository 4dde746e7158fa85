"""Files made to do harm, and files that change while they are open: a typed error of one line, never a dead process."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
from gguf import GGUFReader
from hostile_headers import HOSTILE, gguf_bytes, gguf_text, tensor_info, u32

from pydiffgguf import DiffusionModel, ModelFormatError, OutOfMemoryError, UnsupportedError

#: A whole model of 58,688 bytes, 13,504 of them header; the fuzzers start from it too.
SMALL = Path(__file__).parent / "fuzz" / "corpus" / "open" / "tiny-q8_0.gguf"


def open_whole(path: Path, use_mmap: bool = True) -> None:
    """Everything that opening a file for text does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with DiffusionModel(path, use_mmap=use_mmap) as model:
            assert model.tokenizer.n_vocab > 0
            assert model.chat_template is None or isinstance(model.chat_template, str)


@pytest.mark.parametrize("case", HOSTILE)
def test_the_engine_refuses_hostile_headers_at_once(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[case][0])
    began = time.monotonic()
    with pytest.raises(ModelFormatError) as caught:
        DiffusionModel(path)
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (gguf_bytes([], [tensor_info("t", (2**32, 2**32))]), "at most 2\\^48 elements"),  # the product wraps to 0
        (gguf_bytes([], [tensor_info("t", (3, 2**62, 2))]), "at most 2\\^48 elements"),
        (gguf_bytes([], [tensor_info("t", (2**63,))]), "dimension 0 of tensor t is -9223372036854775808"),
        (
            gguf_bytes([], [tensor_info("t", (32,), kind=0x7D000000)]),
            "type number 2097152000, which ggml does not have",
        ),
        (gguf_bytes([gguf_text("k") + struct.pack("<IIQ", 9, 13, 1)], []), "key k has the value type 13"),
        (gguf_bytes([u32("general.alignment", 1)], []), "general.alignment is 1, expected a power of 2 from 8"),
        (gguf_bytes([u32("general.alignment", 2**31)], []), "general.alignment is 2147483648"),
        (gguf_bytes([gguf_text("a\0b") + struct.pack("<IB", 0, 0)], []), "a key, at byte .*, holds a NUL"),
        (gguf_bytes([], [tensor_info("t" * 64, (4,))]), "has 64 bytes, expected 1 to 63"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 65537, 0), "65537 tensors, expected at most 65536"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 4097), "4097 keys, expected at most 4096"),
    ],
)
def test_what_ggml_would_compute_with_is_checked_before(tmp_path: Path, data: bytes, match: str) -> None:
    """Found by fuzzing: ggml's reader multiplied these extents, and loaded these types into enums, before it looked."""
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=match):
        DiffusionModel(path)


def test_strings_of_a_file_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    """Escape sequences and line breaks in what an error quotes are question marks."""
    path = tmp_path / "x.gguf"
    data = SMALL.read_bytes()
    assert data.count(b"diffusion-gemma") > 1
    path.write_bytes(data.replace(b"diffusion-gemma", b"\x1b[2Jdiff\r\ngemma", 1))
    with pytest.raises(ModelFormatError, match=r'"\?\[2Jdiff\?\?gemma"'):
        DiffusionModel(path)


def test_a_changed_byte_of_the_header_is_refused_or_harmless(tmp_path: Path) -> None:
    """2000 single bytes; benchmarks/robustness.py changes every one."""
    path = tmp_path / "x.gguf"
    data = bytearray(SMALL.read_bytes())
    rng = random.Random(7)
    end = GGUFReader(SMALL).data_offset
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(2000):
        at = rng.randrange(end)
        old = data[at]
        data[at] ^= rng.choice((0x01, 0x80, 0xFF))
        path.write_bytes(data)
        data[at] = old
        try:
            open_whole(path)
            outcomes["opened"] += 1
        except (ModelFormatError, UnsupportedError) as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 200


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


CHANGED = """
    import os, shutil, sys
    from pydiffgguf import DiffusionModel
    path, change, use_mmap = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
    with DiffusionModel(path, use_mmap=use_mmap, n_ctx=64) as model:
        before = model.generate("hello", max_tokens=8, seed=1).tokens
        if change == "truncated":
            os.truncate(path, 20_000)
        elif change == "overwritten":
            with open(path, "r+b") as file:
                file.seek(20_000)
                file.write(bytes(20_000))
        else:
            shutil.copy(path, path + ".new")
            os.truncate(path + ".new", 20_000)
            os.replace(path + ".new", path)
        try:
            print(model.generate("hello", max_tokens=8, seed=1).tokens == before)
        except OSError as error:
            print(error)
"""


@pytest.mark.parametrize(
    ("change", "use_mmap", "expected"),
    [
        ("truncated", True, "changed after it was opened"),
        ("truncated", False, "True"),
        ("overwritten", True, "changed after it was opened"),
        ("overwritten", False, "True"),
        ("replaced", True, "True"),  # the old file lives as long as it is mapped
        ("replaced", False, "True"),
    ],
)
def test_a_file_that_changes_while_it_is_open_is_an_error_or_no_matter(
    tmp_path: Path, change: str, use_mmap: bool, expected: str
) -> None:
    """In a process of its own: reading a page that is gone from a mapped file would end it with SIGBUS."""
    path = tmp_path / "x.gguf"
    shutil.copy(SMALL, path)
    done = run(CHANGED, path, change, use_mmap)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, use_mmap: bool) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(OSError, match="not a regular file"):
        DiffusionModel(tmp_path / "pipe.gguf", use_mmap=use_mmap)


# ------------------------------------------------------------------------------------------------------------ memory

LIMITED = """
    import ctypes, resource, sys
    import numpy, tokenizers
    from pydiffgguf import DiffusionModel, OutOfMemoryError
    path, spare, n_ctx, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    used = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if " kB" in line}
    limit, key = (resource.RLIMIT_AS, "VmSize") if kind == "AS" else (resource.RLIMIT_DATA, "VmData")
    resource.setrlimit(limit, (used[key] + spare, resource.RLIM_INFINITY))
    for chunk in map(int, sys.argv[5:]):  # leave no block of so many bytes
        while malloc(chunk):
            pass
    try:
        with DiffusionModel(path, n_ctx=n_ctx, n_batch=n_ctx) as model:
            model.generate([2, 20, 21], max_tokens=8, seed=1)
        print("worked")
    except (OutOfMemoryError, MemoryError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are read from Linux's /proc")
@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_a_session_that_does_not_fit_is_refused_with_both_figures(tiny_gguf: Path, kind: str) -> None:
    done = run(LIMITED, tiny_gguf, 16 << 20, 4096, kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        rf"OutOfMemoryError a session.* needs \d+\.\d MiB of memory, and RLIMIT_{kind} leaves \d+\.\d MiB", done.stdout
    ), done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are read from Linux's /proc")
def test_a_file_that_does_not_fit_is_refused_with_both_figures(tiny_gguf: Path, tmp_path: Path) -> None:
    """A sparse file of 64 GiB: it takes no disk, and reading it would take the machine's memory."""
    path = tmp_path / "huge.gguf"
    shutil.copy(tiny_gguf, path)
    os.truncate(path, 64 << 30)
    with pytest.raises(OutOfMemoryError, match=r"the file needs 65536\.0 MiB of memory, and .* leaves \d+"):
        DiffusionModel(path, use_mmap=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limits are read from Linux's /proc")
def test_running_out_anywhere_is_an_error_with_the_process_alive(tiny_gguf: Path) -> None:
    """From no spare memory at all to enough, so that the refusal meets another allocation each time: Python's, ours,
    ggml's headers and buffers, and threads' stacks. Without a chat template: CPython 3.11 itself says SystemError when
    it runs out inside jinja2."""
    outcomes = set()
    for mebibytes in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 512):
        done = run(LIMITED, tiny_gguf, mebibytes << 20, 512, "AS")
        assert done.returncode == 0, (mebibytes, done.stderr)
        outcomes.add(done.stdout.split()[0])
    assert "worked" in outcomes
    assert len(outcomes) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are read from Linux's /proc")
@pytest.mark.parametrize("chunk", [60_000, 30_000, 10_000, 6_000])
def test_the_heap_may_be_full_when_the_engine_is_first_entered(tiny_gguf: Path, chunk: int) -> None:
    """glibc ends a process that has no memory for a thread's copy of a library's thread-local data. With ggml's tiles
    for AMX that was 67,265 bytes, at the first call."""
    done = run(LIMITED, tiny_gguf, 0, 512, "AS", chunk)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[0] in ("OutOfMemoryError", "MemoryError")

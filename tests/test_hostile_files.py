"""Files made to do harm, and files that change while they are open: a typed error of one line, never a dead process."""

from __future__ import annotations

import random
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

from pydiffgguf import DiffusionModel, ModelFormatError, UnsupportedError

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
        (gguf_bytes([], [tensor_info("t", (32,), kind=0x7D000000)]), "type 2097152000, which does not exist"),
        (gguf_bytes([gguf_text("k") + struct.pack("<IIQ", 9, 13, 1)], []), "key k has the value type 13"),
        (gguf_bytes([u32("general.alignment", 1)], []), "general.alignment is 1, expected a power of 2 from 8"),
        (gguf_bytes([u32("general.alignment", 2**31)], []), "general.alignment is 2147483648"),
        (gguf_bytes([gguf_text("a\0b") + struct.pack("<IB", 0, 0)], []), "a key, at byte .*, holds a NUL"),
        (gguf_bytes([], [tensor_info("t" * 64, (4,))]), "has 64 bytes, expected 1 to 63"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 16385, 0), "16385 tensors, expected at most 16384"),
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

"""The output on the disk: whole under its final name, or not there; and the memory that writing takes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_files import read_keys
from tiny_checkpoint import SMALL_TEXT_CONFIG, write_safetensors

from pydiffgguf.convert import ConvertProgress, convert
from pydiffgguf.convert.source.checkpoint import wanted_tensors
from pydiffgguf.convert.source.config import parse_config


def test_an_unknown_type_lists_the_known_ones(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type: 'q9', expected one of f32, f16, bf16, q8_0"):
        convert(source, tmp_path / "x.gguf", type="q9")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_the_old_output(
    source: Path, tmp_path: Path, interruption: type[BaseException]
) -> None:
    """Ctrl-C, or an error in the progress callback, at any tensor: no partial file, the old file untouched."""
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")
    for stop_at in (0, 1, 70, 143, 144):

        def stop(progress: ConvertProgress, at: int = stop_at) -> None:
            assert (tmp_path / "x.gguf.part").exists()
            if progress.index == at:
                raise interruption

        with pytest.raises(interruption):
            convert(source, out, progress=stop)
        assert out.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["x.gguf"]


def test_a_link_as_output_stays_a_link(source: Path, tmp_path: Path) -> None:
    """What it names is replaced, also in another folder, and made where it is not there yet."""
    (tmp_path / "models").mkdir()
    for there in (True, False):
        target, link = tmp_path / "models" / f"{there}.gguf", tmp_path / f"{there}.gguf"
        if there:
            target.write_bytes(b"old")
        link.symlink_to(target)
        convert(source, link)
        assert link.is_symlink()
        assert read_keys(target)
    assert sorted(os.listdir(tmp_path / "models")) == ["False.gguf", "True.gguf"]


def test_an_output_with_other_names_is_refused(source: Path, tmp_path: Path) -> None:
    """The other name of a hard link would keep the old content; nothing is written."""
    (tmp_path / "a.gguf").write_bytes(b"old")
    os.link(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(FileExistsError, match=r"2 names \(hard links\)"):
        convert(source, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf"]


def test_progress_counts_up_to_the_whole(source: Path, tmp_path: Path) -> None:
    """Every tensor is announced in order; the bytes grow to exactly the tensor data's size."""
    seen: list[ConvertProgress] = []
    convert(source, tmp_path / "x.gguf", progress=seen.append)
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert list(dict.fromkeys(p.tensor for p in seen)) == [*(t.name for t in tensors), ""]
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert (seen[-1].index, seen[-1].bytes_done) == (seen[-1].count, seen[-1].bytes_total)
    data = (tmp_path / "x.gguf").stat().st_size - tensors[0].data_offset
    assert seen[-1].bytes_total == data


def test_room_is_checked_before_the_first_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with less free than the output needs: ENOSPC at once, in one line with both numbers."""
    (tmp_path / "x.gguf").write_bytes(b"old")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 2000, 2000))
    seen: list[ConvertProgress] = []
    with pytest.raises(OSError, match=r"it needs 8\.\d MB, 2\.0 kB are free") as caught:
        convert(source, tmp_path / "x.gguf", type="f32", progress=seen.append)
    assert caught.value.errno == errno.ENOSPC
    assert not seen
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_what_a_killed_run_left_counts_as_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale partial file is emptied before the room is checked: it may be what fills the disk."""
    part = tmp_path / "x.gguf.part"
    part.write_bytes(bytes(10_000_000))
    disk = 12_000_000
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(disk, 0, disk - part.stat().st_size)
    )
    convert(source, tmp_path / "x.gguf", type="f32")
    assert os.listdir(tmp_path) == ["x.gguf"]


def run_script(script: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("limit", [0, 100, 20_000, 1_000_000, 7_367_000])
def test_a_disk_that_fills_gives_one_error_and_leaves_the_old_output(source: Path, tmp_path: Path, limit: int) -> None:
    """The system refuses a write in the header, in the middle, near the end: one line, no partial file."""
    (tmp_path / "x.gguf").write_bytes(b"old")
    script = """
        import resource, sys
        from pydiffgguf.convert import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
        try:
            convert(sys.argv[1], sys.argv[2], type="f32")
        except OSError as e:
            print(e.errno, e)
    """
    done = run_script(script, source, tmp_path / "x.gguf", limit)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert "no room for the output" in done.stdout
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_conversion_never_shows_a_broken_file(source: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: the old output stays; the next run overwrites what was left and succeeds."""
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")
    script = """
        import os, signal, sys
        from pydiffgguf.convert import convert
        def die(p):
            if p.index == 100:
                os.kill(os.getpid(), signal.SIGKILL)
        convert(sys.argv[1], sys.argv[2], type="f32", progress=die)
    """
    done = run_script(script, source, out)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.gguf", "x.gguf.part"]
    convert(source, out, type="f32")
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert len(gguf.GGUFReader(out).tensors) == 144


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_two_conversions_into_one_file_do_not_mix(source: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and the first ends well."""
    out = tmp_path / "x.gguf"
    refusals = []

    def second(progress: ConvertProgress) -> None:
        if progress.index == 10 and not refusals:
            with pytest.raises(BlockingIOError, match="another conversion") as caught:
                convert(source, out, type="f32")
            refusals.append(caught.value)

    convert(source, out, type="q8_0", progress=second)
    assert refusals
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert read_keys(out)["general.file_type"][1] == 7


def test_outputs_that_cannot_be_made_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        convert(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        convert(source, tmp_path / "no" / "x.gguf")
    with pytest.raises(FileExistsError, match="not a regular file"):
        convert(source, os.devnull)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A tensor of 205 MB, and its experts of 67 MB, pass through under 100 MB of Python's and numpy's memory."""
    config = {
        "model_type": "diffusion_gemma",
        "canvas_length": 8,
        "text_config": SMALL_TEXT_CONFIG
        | {"num_hidden_layers": 1, "vocab_size": 200_000, "hidden_size": 512, "moe_intermediate_size": 8192},
    }
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for _, _, shape, names in wanted_tensors(parse_config(config, "config.json")):
        if names:
            size = 2 * int(np.prod(shape))
            header[names[0]] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    file = tmp_path / "src" / "model.safetensors"
    write_safetensors(file, header, b"")
    os.truncate(file, file.stat().st_size + end)  # zeros that take no room
    tracemalloc.start()
    try:
        report = convert(tmp_path / "src", tmp_path / "x.gguf", type="bf16", allow_missing_tokenizer=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.n_bytes > 300e6
    assert peak < 100e6


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_twenty_kills_at_random_moments_leave_no_broken_file(source: Path, tmp_path: Path) -> None:
    """kill -9 at moments spread over the conversion: under the final name stands nothing, or the whole file; a run
    after all of them succeeds and leaves nothing else. A pause at each piece makes it last half a second."""
    out, whole = tmp_path / "x.gguf", tmp_path / "whole.gguf"
    convert(source, whole, type="q4_k_m")
    script = (
        "import sys, time; from pydiffgguf.convert import convert; print(flush=True); "
        "convert(sys.argv[1], sys.argv[2], type='q4_k_m', progress=lambda _: time.sleep(0.002))"
    )
    rng = random.Random(20)
    unfinished = 0
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", script, source, out], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.random() * 0.5)
        child.kill()
        child.wait()
        child.stdout.close()
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
        else:
            unfinished += 1
    assert unfinished > 5
    convert(source, out, type="q4_k_m")
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.gguf", "x.gguf"]

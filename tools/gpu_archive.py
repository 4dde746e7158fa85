"""One archive for the first hour on a machine with CUDA and no network: `python tools/gpu_archive.py OUT.tar`.

It holds this repository as it is in HEAD, ggml's pinned source inside it, and the wheels that building, running and
checking take on Python 3.12 for Linux on x86-64; torch, CUDA and a C++ compiler are presumed there. There:

    python3 -m tarfile -e OUT.tar && python3 gpu_first_hour/repository/benchmarks/gpu_first_hour.py --out results

The wheels are those of gpu_archive.lock, each with its hash; `--lock` writes that file anew from what pyproject.toml
asks for. Wheels are compressed one by one, and a tar of them hardly shrinks: each is written again with its files as
they are, and the whole is compressed with xz (62 MB of wheels become 45), under whatever name. Python's tarfile and
tar -xf read it. The same commit and the same lock give the same bytes. MANIFEST.json has the hash of every file; the
script's first stage checks them. An archive of more than 60 MB is an error, and is not written.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LOCK = Path(__file__).with_suffix(".lock")
FOLDER = "gpu_first_hour"
MOST = 60_000_000
#: Of the machine that the archive is for.
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
#: What building takes besides what pyproject.toml names.
BUILD = ("cmake>=3.25", "ninja>=1.11")
#: Those of the tests' packages that the first hour's checks take.
CHECKS = ("pytest", "pytest-xdist", "transformers")
#: Files get the time of the oldest date that a zip can hold.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class ArchiveError(Exception):
    """The archive cannot be made, or is too large."""


def name_of(requirement: str) -> str:
    """The normalized name of the package in a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]).lower()


def requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """What building, running and checking need: pip's words, without pip itself and torch."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    checks = [r for r in (*extras["test"], *extras["test-light"]) if name_of(r) in CHECKS]
    build = [r for r in project["build-system"]["requires"] if name_of(r) != "pip"]
    return [*project["project"]["dependencies"], *build, *BUILD, *checks]


def locked(path: Path = LOCK) -> dict[str, tuple[str, str]]:
    """name -> (version, SHA-256 of its wheel). Raises ArchiveError for a line that is no pin."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line)
            if pin is None:
                raise ArchiveError(f"{path.name}: {line!r} is no pin")
            found[pin[1]] = (pin[2], pin[3])
    return found


def download(folder: Path, arguments: Sequence[str]) -> list[Path]:
    """The wheels that pip finds for the other machine, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", f"--dest={folder}"]
    command += [f"--platform={name}_x86_64" for name in PLATFORMS]
    if subprocess.run([*command, *arguments]).returncode != 0:
        raise ArchiveError("pip could not download the wheels")
    return sorted(folder.glob("*.whl"))


def write_lock(path: Path = LOCK) -> None:
    """Pins what pip takes for `requirements()` today, with what those need."""
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for wheel in download(Path(folder), requirements()):
            name, version = wheel.name.split("-")[:2]
            lines.append(f"{name_of(name)}=={version} --hash=sha256:{digest(wheel.read_bytes())}")
    head = "# Written by gpu_archive.py --lock: wheels for CPython 3.12, Linux, x86-64.\n"
    path.write_text(head + "".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(wheel: bytes) -> bytes:
    """The wheel with its files uncompressed and undated; what is in them, and their modes, stay."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(wheel)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            entry = zipfile.ZipInfo(info.filename, ZIP_DATE)
            entry.external_attr, entry.create_system = info.external_attr, info.create_system
            new.writestr(entry, old.read(info))
    return out.getvalue()


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode != 0:
        raise ArchiveError(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def repository(folder: Path) -> None:
    """HEAD in `folder`, with ggml's pinned source in vendor/ggml, whose hash vendor/fetch.py checks."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", "HEAD"))) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    if subprocess.run([sys.executable, str(folder / "vendor" / "fetch.py")]).returncode != 0:
        raise ArchiveError("ggml's source could not be fetched")


def files_below(folder: Path) -> Iterator[tuple[str, bytes, bool]]:
    """(name, bytes, executable) of each file, in the order of names."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_symlink():
            raise ArchiveError(f"{path.relative_to(folder)} is a link: the archive holds files alone")
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix(), path.read_bytes(), os.access(path, os.X_OK)


def pack(out: Path, files: Iterable[tuple[str, bytes, bool]], facts: dict[str, Any], *, most: int = MOST) -> int:
    """Writes the files and a manifest of them; returns the archive's bytes. The same files give the same bytes.

    Raises ArchiveError, and leaves what was at `out`, when the archive is larger than `most` bytes.
    """
    every = list(files)
    manifest = facts | {"files": {name: digest(data) for name, data, _ in every}}
    text = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    packed = io.BytesIO()
    with (
        lzma.LZMAFile(packed, "w", preset=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, data, executable in [("MANIFEST.json", text, False), *every]:
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")  # no date, no owner
            entry.size, entry.mode = len(data), 0o755 if executable else 0o644
            tar.addfile(entry, io.BytesIO(data))
    size = packed.tell()
    if size > most:
        raise ArchiveError(f"the archive has {size:,} bytes: more than {most:,}")
    part = out.with_name(out.name + ".part")
    part.write_bytes(packed.getvalue())
    os.replace(part, out)
    return size


def make(out: Path) -> int:
    """Makes the archive; returns its size in bytes. Raises ArchiveError."""
    if git("status", "--porcelain"):
        print("the working tree differs from HEAD: the archive holds HEAD", file=sys.stderr)
    pins = locked()
    with tempfile.TemporaryDirectory() as name:
        tree, wheels = Path(name, "repository"), Path(name, "wheels")
        tree.mkdir()
        wheels.mkdir()
        repository(tree)
        lines = Path(name, "lock.txt")
        lines.write_text("".join(f"{k}=={v} --hash=sha256:{h}\n" for k, (v, h) in pins.items()), encoding="utf-8")
        found = download(wheels, ["--no-deps", "--require-hashes", "--requirement", str(lines)])
        files = [(f"repository/{path}", data, executable) for path, data, executable in files_below(tree)]
        files += [(f"wheels/{wheel.name}", stored(wheel.read_bytes()), False) for wheel in found]
        upstream = {wheel.name: digest(wheel.read_bytes()) for wheel in found}
    facts = {"commit": git("rev-parse", "HEAD").decode().strip(), "python": PYTHON, "wheels": upstream}
    return pack(out, files, facts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the archive for the first hour on a machine with CUDA.")
    parser.add_argument("out", metavar="OUT.tar", type=Path, nargs="?", help="where it goes; replaced when it is whole")
    parser.add_argument("--lock", action="store_true", help=f"write tools/{LOCK.name} anew, and no archive")
    args = parser.parse_args(argv)
    if args.lock == (args.out is not None):
        parser.error("expected either OUT.tar or --lock")
    try:
        if args.lock:
            write_lock()
        else:
            size = make(args.out)
            print(f"{args.out}: {size:,} bytes")
    except (ArchiveError, OSError) as error:
        print(f"gpu_archive: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

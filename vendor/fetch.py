"""Puts ggml's source, as pinned in requirements.txt beside this file and with our patches, into vendor/ggml.

CMake runs this on every configure; it does nothing when the pinned source is there already, so a source release, which
carries vendor/ggml, builds without a network. The download goes through pip, with its settings, proxies and cache, and
is accepted only with the pinned SHA-256. Run it by hand to fetch ahead of time: python vendor/fetch.py
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent
REQUIREMENTS = VENDOR / "requirements.txt"
TARGET = VENDOR / "ggml"
PATCHES = VENDOR / "patches"
FOLDER = "ggml"  # inside the archive, behind its NAME-VERSION/ folder


def read_pin() -> str:
    """The requirement line, which names the version and the hash, and the patches' own hash: what vendor/ggml/.pin must
    hold to be current."""
    lines = [line.strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    (pin,) = [line for line in lines if "--hash=" in line]
    digest = hashlib.sha256(b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in patches()))
    return f"{pin} patches:{digest.hexdigest()}"


def patches() -> list[Path]:
    """vendor/patches/*.patch in order: unified diffs against the pinned source, each with its reason on top."""
    return sorted(PATCHES.glob("*.patch"))


def apply_patch(patch: Path, folder: Path) -> None:
    """Applies a unified diff to the files in `folder`. The source is pinned, so there is nothing to guess: every line
    of context must stand exactly where the patch says. Raises ValueError otherwise."""
    lines = patch.read_text(encoding="utf-8").splitlines()
    source: list[str] = []
    target: Path | None = None
    shift = 0  # lines that earlier hunks of the file have added
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("+++ "):
            target, shift = folder / line[4:].split("\t")[0].partition("/")[2], 0
            source = target.read_text(encoding="utf-8").split("\n")
        hunk = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
        if hunk is None or target is None:
            continue
        n_old, n_new = (int(group or 1) for group in hunk.group(2, 3))
        body: list[str] = []
        while sum(row[0] in " -" for row in body) < n_old or sum(row[0] in " +" for row in body) < n_new:
            body.append(lines[at] or " ")
            at += 1
        first = int(hunk.group(1)) - 1 + shift
        old = [row[1:] for row in body if row[0] in " -"]
        new = [row[1:] for row in body if row[0] in " +"]
        if source[first : first + n_old] != old:
            raise ValueError(f"{patch.name} does not fit {target.name} at line {first + 1}")
        source[first : first + n_old] = new
        shift += n_new - n_old
        target.write_text("\n".join(source), encoding="utf-8")


def is_current(pin: str) -> bool:
    stamp = TARGET / ".pin"
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == pin


def download(folder: Path) -> Path:
    """Downloads the pinned source archive into `folder` and returns its path.

    `pip download` asks the archive for its metadata, which takes a build environment. With the usual
    `--no-binary :all:` pip builds that environment's own packages from source as well: 69 s instead of 8 s, hence the
    narrower option in requirements.txt.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(REQUIREMENTS), "--dest", str(folder)]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks only the archive's ggml folder into `folder` and returns where it now lies."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.split("/")[1:2] == [FOLDER]]
        # Python before 3.10.12 and 3.11.4 has no extraction filters; the hash has already vouched for the content.
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, members=members, filter="data")
        else:
            tar.extractall(folder, members=members)
    (unpacked,) = folder.glob(f"*/{FOLDER}")
    return unpacked


def main() -> int:
    pin = read_pin()
    if is_current(pin):
        return 0
    # Everything happens in a sibling of the target, so that the last step is a rename: an interrupted run leaves no
    # half of a source tree behind, and of two runs at once one simply comes second.
    with tempfile.TemporaryDirectory(prefix=".ggml-", suffix=".tmp", dir=VENDOR) as name:
        folder = Path(name)
        try:
            archive = download(folder)
        except (subprocess.CalledProcessError, OSError) as error:
            print(
                f"vendor/fetch.py: ggml's source could not be downloaded ({error}).\n"
                "Without a network, build from a source release of pydiffgguf, which carries it, or use an installed "
                "ggml: CMAKE_ARGS=-DPYDIFFGGUF_SYSTEM_GGML=ON",
                file=sys.stderr,
            )
            return 1
        fresh = unpack(archive, folder / "source")
        for patch in patches():
            apply_patch(patch, fresh)
        (fresh / ".pin").write_text(pin + "\n", encoding="utf-8")
        if TARGET.exists():
            TARGET.rename(folder / "old")
        try:
            fresh.rename(TARGET)
        except OSError:
            if not is_current(pin):
                raise
    return 0


if __name__ == "__main__":
    sys.exit(main())

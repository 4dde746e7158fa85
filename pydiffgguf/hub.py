"""Models by name: ``hf:OWNER/REPO[:PATTERN]``, fetched through huggingface_hub, with its cache and its progress bar."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from pydiffgguf.errors import UnsupportedError

__all__ = ["choose_file", "resolve_checkpoint", "resolve_hub", "resolve_model"]

PREFIX = "hf:"

_REPO_ID = r"[\w.-]+/[\w.-]+"
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
#: GGUF files that are no models: projectors for images, and statistics for quantizing.
_OTHER_GGUF = re.compile(r"^(mmproj|imatrix)|imatrix", re.IGNORECASE)


def resolve_model(spec: str) -> Path:
    """The file that a model is named by: a path as it is, or ``hf:OWNER/REPO[:PATTERN]``, downloaded when it is not in
    the cache. Without a pattern the repository must hold one model; see `choose_file`.

    Raises:
        ValueError: the name is not of that form, or the pattern matches none or several files.
        UnsupportedError: the model is split into several files.
        OSError: no such repository or revision, no access, no network, no room.
    """
    if not spec.startswith(PREFIX):
        return Path(spec)
    repo_id, _, pattern = spec[len(PREFIX) :].partition(":")
    if not re.fullmatch(_REPO_ID, repo_id):
        raise ValueError(f"{spec!r} is not of the form hf:OWNER/REPO or hf:OWNER/REPO:PATTERN")
    return resolve_hub(repo_id, pattern or "*")


def resolve_checkpoint(spec: str) -> Path:
    """The checkpoint folder that a name means: a path as it is, or ``hf:OWNER/REPO``, whose configuration, tokenizer
    and safetensors are downloaded when they are not in the cache.

    Raises:
        ValueError: the name is not of that form.
        OSError: as in `resolve_model`; the message for a folder that is missing says how a repository is written.
    """
    if not spec.startswith(PREFIX):
        path = Path(spec)
        if not path.exists():
            hint = f"; a repository is written {PREFIX}{spec}" if re.fullmatch(_REPO_ID, spec) else ""
            raise FileNotFoundError(f"{spec}: no such folder{hint}")
        return path
    repo_id = spec[len(PREFIX) :]
    if not re.fullmatch(_REPO_ID, repo_id):
        raise ValueError(f"{spec!r} is not of the form hf:OWNER/REPO")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise _one_line(repo_id, error) from error


def resolve_hub(repo_id: str, pattern: str, *, revision: str | None = None) -> Path:
    """Downloads the file of a repository that `pattern` names, unless it is cached; see `choose_file` and
    `resolve_model`. `revision`: branch, tag or commit; None for the main branch."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    files, cached_only = _list_files(repo_id, revision)
    name = choose_file(files, pattern, f"{PREFIX}{repo_id}")
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=cached_only))
    except (EntryNotFoundError, OSError) as error:
        raise _one_line(repo_id, error) from error


def choose_file(files: Iterable[str], pattern: str, where: str) -> str:
    """The one model among a repository's files that a pattern names: a file's whole name, a glob (``*Q4_K_M.gguf``), or
    a word of the name between ``-``, ``.`` and ``/`` (``Q4_K_M``, which ``Q4_K`` is not); upper and lower case are the
    same.

    Args:
        where: what the messages call the repository.

    Raises:
        ValueError: none or several match; the message names the models that there are.
        UnsupportedError: the one that matches is split (``-00001-of-00003.gguf``).
    """
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        name = PurePosixPath(file).name
        if name.lower().endswith(".gguf") and not _OTHER_GGUF.search(name):
            models.setdefault(_PART.sub("", file), []).append(file)
    if not models:
        raise ValueError(f"{where} holds no GGUF model")
    found = [model for model in models if _matches(model, models[model], pattern)]
    if len(found) != 1:
        what = "matches none" if not found else f"matches {len(found)}"
        raise ValueError(f"{where}: {pattern!r} {what} of its models: {', '.join(found or models)}")
    parts = models[found[0]]
    if len(parts) > 1 or _PART.search(parts[0]):
        raise UnsupportedError(f"{where}: {found[0]} is split into {len(parts)} files, and only whole files open")
    return parts[0]


def _matches(model: str, parts: list[str], pattern: str) -> bool:
    wanted = pattern.lower()
    for name in (model.lower(), *(part.lower() for part in parts)):
        if any(c in wanted for c in "*?["):
            matched = fnmatch.fnmatchcase(name, wanted) or fnmatch.fnmatchcase(PurePosixPath(name).name, wanted)
        else:
            word = re.search(rf"(^|[-./]){re.escape(wanted)}([-./]|$)", name)
            matched = wanted in (name, PurePosixPath(name).name) or word is not None
        if matched:
            return True
    return False


def _list_files(repo_id: str, revision: str | None) -> tuple[list[str], bool]:
    """(file names, whether they are only those in the cache): from the hub, or without a network from the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(repo_id, revision=revision), False
    except (HfHubHTTPError, ValueError) as error:
        raise _one_line(repo_id, error) from error
    except Exception as error:  # no network: of httpx's own kind, which huggingface_hub has renamed between versions
        cached = _cached_files(repo_id, revision)
        if not cached:
            raise ConnectionError(
                f"{PREFIX}{repo_id} is not in the cache, and the hub cannot be reached: {_first_line(error)}"
            ) from error
        return cached, True


def _cached_files(repo_id: str, revision: str | None) -> list[str]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return [
        file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        for repo in repos
        if repo.repo_id == repo_id and repo.repo_type == "model"
        for snapshot in repo.revisions
        if (revision or "main") in (*snapshot.refs, snapshot.commit_hash)
        for file in snapshot.files
    ]


def _one_line(repo_id: str, error: Exception) -> Exception:
    """huggingface_hub's messages run over several lines and end in advice."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{PREFIX}{repo_id}"
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{where}: access must be asked for on its page first, then `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(f"{where}: no such repository, or a private one; `hf auth login` if it is yours")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{where}: no such revision")
    if isinstance(error, ValueError):
        return ValueError(f"{where}: {_first_line(error)}")
    return OSError(f"{where}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

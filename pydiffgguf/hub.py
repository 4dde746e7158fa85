"""Models by name: ``hf:OWNER/REPO[:PATTERN]``, fetched through huggingface_hub, with its cache and its progress bar."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from pydiffgguf.engine.options import Progress

__all__ = ["choose_files", "resolve_hub", "resolve_model", "resolve_source"]

PREFIX = "hf:"

#: How long the hub may take to say which files a repository has.
TIMEOUT_S = 30

_REPO_ID = r"[\w.-]+/[\w.-]+"
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
#: GGUF files that are no models: projectors for images, and statistics for quantizing.
_OTHER_GGUF = re.compile(r"^(mmproj|imatrix)|imatrix", re.IGNORECASE)

#: What a checkpoint has besides its weights, as far as the converter reads it.
_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def resolve_model(spec: str, progress: Callable[[Progress], object] | None = None) -> Path:
    """The file that a model is named by: a path as it is, or ``hf:OWNER/REPO[:PATTERN]``, downloaded when it is not in
    the cache; of a model in several files the first. Without a pattern the repository must hold one model; see
    `choose_files`.

    Raises:
        ValueError: the name is not of that form, or the pattern matches none or several models.
        OSError: no such repository or revision, no access, no network, no room.
    """
    if not spec.startswith(PREFIX):
        return Path(spec)
    repo_id, _, pattern = spec[len(PREFIX) :].partition(":")
    if not re.fullmatch(_REPO_ID, repo_id):
        raise ValueError(f"{spec!r} is not of the form hf:OWNER/REPO or hf:OWNER/REPO:PATTERN")
    return resolve_hub(repo_id, pattern or "*", progress=progress)


def resolve_source(spec: str) -> Path:
    """What to convert, by name: a path as it is; ``hf:OWNER/REPO``, a checkpoint's folder, of which configuration,
    tokenizer and those safetensors are downloaded that its index names, when they are not in the cache; or
    ``hf:OWNER/REPO:PATTERN``, a GGUF file as in `resolve_model`.

    Raises:
        ValueError: the name is not of that form.
        OSError: as in `resolve_model`; the message for a folder that is missing says how a repository is written.
        ModelFormatError: the index of the weights is no JSON.
    """
    from pydiffgguf.convert.source.checkpoint import INDEX, SINGLE
    from pydiffgguf.convert.source.config import read_json

    if not spec.startswith(PREFIX):
        path = Path(spec)
        if not path.exists():
            hint = f"; a repository is written {PREFIX}{spec}" if re.fullmatch(_REPO_ID, spec) else ""
            raise FileNotFoundError(f"{spec}: no such folder{hint}")
        return path
    repo_id, _, pattern = spec[len(PREFIX) :].partition(":")
    if pattern:
        return resolve_model(spec)
    if not re.fullmatch(_REPO_ID, repo_id):
        raise ValueError(f"{spec!r} is not of the form hf:OWNER/REPO")
    folder = _snapshot(repo_id, [*_CHECKPOINT_FILES, INDEX])
    weights = {SINGLE}
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        weights = {name for name in files.values() if isinstance(name, str)} if isinstance(files, dict) else set()
    return _snapshot(repo_id, [*_CHECKPOINT_FILES, INDEX, *sorted(weights)])


def _snapshot(repo_id: str, names: list[str]) -> Path:
    """The folder with a repository's files of these names, as far as there are any."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[_literal(name) for name in names]))
    except Exception as error:
        raise _one_line(repo_id, error) from error


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def resolve_hub(
    repo_id: str,
    pattern: str,
    *,
    revision: str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Path:
    """Downloads the model of a repository that `pattern` names, unless it is cached, and returns its first file; see
    `choose_files` and `resolve_model`. `revision`: branch, tag or commit; None for the main branch. `progress`: called
    while bytes come, in place of the bar on stderr."""
    files, cached_only = _list_files(repo_id, revision)
    where = f"{PREFIX}{repo_id}{' in the cache' if cached_only else ''}"
    names = choose_files(files, pattern, where)
    paths = [_fetch(repo_id, name, revision, cached_only, progress) for name in names]
    if len({path.parent for path in paths}) > 1:
        raise OSError(f"{where}: it changed while its {len(paths)} files were fetched; once more, please")
    return paths[0]


def _fetch(
    repo_id: str, name: str, revision: str | None, cached_only: bool, progress: Callable[[Progress], object] | None
) -> Path:
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {} if progress is None else {"tqdm_class": _reporting(name, progress)}
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=cached_only, **options))
    except Exception as error:
        raise _one_line(repo_id, error) from error


def _reporting(name: str, progress: Callable[[Progress], object]) -> type:
    """A bar for huggingface_hub that draws nothing and tells the caller instead."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._done = int(options.get("initial") or 0)
            super().__init__(*arguments, **{**options, "disable": True})
            self._total = int(options.get("total") or 0)
            progress(Progress("downloading", name, self._done, self._total))

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            progress(Progress("downloading", name, self._done, max(self._total, self._done)))
            return None

    return Reporting


def choose_files(files: Iterable[str], pattern: str, where: str) -> list[str]:
    """The files, in order, of the one model among a repository's files that a pattern names: a file's whole name, a
    glob (``*Q4_K_M.gguf``), or a word of the name between ``-``, ``.`` and ``/`` (``Q4_K_M``, which ``Q4_K`` is not);
    upper and lower case are the same. The parts of a split model (``-00001-of-00003.gguf``) are named by what stands
    before, or by any of them.

    Args:
        where: what the messages call the repository.

    Raises:
        ValueError: none or several match; the message names the models that there are. Or parts are missing.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        name = PurePosixPath(file).name
        if name.lower().endswith(".gguf") and not _OTHER_GGUF.search(name):
            part = _PART.search(file)
            shown = f"{_PART.sub('', file)} ({int(part[2])} files)" if part and int(part[2]) > 1 else file
            models.setdefault(shown, []).append(file)
    if not models:
        raise ValueError(f"{where} holds no GGUF model")
    found = [shown for shown, parts in models.items() if any(_matches(part, pattern) for part in parts)]
    if len(found) != 1:
        what = "matches none" if not found else f"matches {len(found)}"
        raise ValueError(f"{where}: {pattern!r} {what} of its models: {', '.join(found or models)}")
    parts = models[found[0]]
    part = _PART.search(parts[0])
    count = int(part[2]) if part else 1
    if count != len(parts):
        there = {int(match[1]) for match in map(_PART.search, parts) if match}
        missing = [n for n in range(1, count + 1) if n not in there]
        raise ValueError(f"{where}: of {found[0]}, part {', '.join(map(str, missing[:8]))} is not there")
    return parts


def _matches(file: str, pattern: str) -> bool:
    wanted = pattern.lower()
    for name in (file.lower(), _PART.sub("", file).lower()):
        last = PurePosixPath(name).name
        if any(c in wanted for c in "*?["):
            matched = fnmatch.fnmatchcase(name, wanted) or fnmatch.fnmatchcase(last, wanted)
        else:
            word = re.search(rf"(^|[-./]){re.escape(wanted)}([-./]|$)", name)
            matched = wanted in (name, last) or word is not None
        if matched:
            return True
    return False


def _list_files(repo_id: str, revision: str | None) -> tuple[list[str], bool]:
    """(file names, whether they are only those in the cache): from the hub, or from the cache when the hub does not
    answer, with a warning unless it was told to stay offline (HF_HUB_OFFLINE)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        # Not list_repo_files, which tries again for about 20 s when there is no network.
        info = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT_S)
        return [file.rfilename for file in info.siblings or ()], False
    except Exception as error:
        # No network: an exception of httpx's own kind, which huggingface_hub has renamed between versions.
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or isinstance(error, ValueError):
            raise _one_line(repo_id, error) from error
        cached = _cached_files(repo_id, revision)
        if not cached:
            raise ConnectionError(
                f"{PREFIX}{repo_id} is not in the cache, and the hub cannot be reached: {_first_line(error)}"
            ) from error
        if not isinstance(error, OfflineModeIsEnabled):
            warnings.warn(
                f"{PREFIX}{repo_id}: the hub cannot be reached, the cache serves: {_first_line(error)}", stacklevel=5
            )
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
    """What happened, and what helps: huggingface_hub's messages run over several lines."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{PREFIX}{repo_id}"
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{where}: access must be asked for on its page, then `hf auth login` (or HF_TOKEN)")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{where}: no such repository, or a private one: `hf auth login` (or HF_TOKEN) if you may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{where}: no such revision")
    if isinstance(error, ValueError):
        return ValueError(f"{where}: {_first_line(error)}")
    return OSError(f"{where}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__

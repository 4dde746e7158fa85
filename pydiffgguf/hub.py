"""Models by name: ``demo``, or ``hf:OWNER/REPO[@REVISION][:PATTERN]``, fetched through huggingface_hub."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydiffgguf.engine.options import Progress

if TYPE_CHECKING:
    from pydiffgguf._binding.file import ByteSource
    from pydiffgguf._binding.library import StrPath

__all__ = [
    "Access",
    "choose_files",
    "demo_model_path",
    "open_header",
    "resolve_adapter",
    "resolve_hub",
    "resolve_model",
    "resolve_source",
]

PREFIX = "hf:"

#: How long the hub may take to say which files a repository has: with something of the repository in the cache, and
#: without. A hub that accepts and never answers, as behind a captive portal, is away.
TIMEOUT_S, TIMEOUT_WITHOUT_CACHE_S = 5, 30

_REPO_ID = r"[\w.-]+/[\w.-]+"
_NAME = re.compile(rf"(?P<repo>{_REPO_ID})(?:@(?P<revision>[^:\s]+))?(?::(?P<pattern>.+))?")
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
#: GGUF files that are no models: projectors for images, statistics for quantizing, adapters.
_OTHER_GGUF = re.compile(r"mmproj|imatrix|(^|[-_.])(q?lora|adapter)([-_.]|$)", re.IGNORECASE)

#: What the model that comes with the package is called, for every command.
DEMO = "demo"

#: What an adapter's folder has, and what tells another form of it.
_ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "automodel_peft_config.json",
    "adapters.safetensors",
)

#: What a checkpoint has besides its weights, as far as the converter reads it.
_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Access:
    """How a repository is reached: huggingface_hub's own options. `progress`: called
    while bytes come, in place of the bars on stderr; what it raises ends the download."""

    revision: str | None = None
    cache_dir: str | None = None
    token: bool | str | None = None
    local_files_only: bool = False
    progress: Callable[[Progress], object] | None = None


def demo_model_path() -> Path:
    """The bundled demo model: a toy that shows the machinery (docs/DEMO_MODEL.md)."""
    return Path(__file__).parent / "data" / "demo.gguf"


def _parse(spec: str) -> tuple[str, Access, str]:
    """(repository, its revision, pattern or "") of a name that begins with PREFIX."""
    match = _NAME.fullmatch(spec, len(PREFIX))
    if match is None:
        raise ValueError(f"{spec!r} is not of the form hf:OWNER/REPO, hf:OWNER/REPO:PATTERN or hf:OWNER/REPO@REVISION")
    return match["repo"], Access(revision=match["revision"]), match["pattern"] or ""


def resolve_model(spec: str, progress: Callable[[Progress], object] | None = None) -> Path:
    """The file that a model is named by: a path as it is; ``demo``, the model that comes with the package, where there
    is no file of that name; or ``hf:OWNER/REPO[@REVISION][:PATTERN]``, downloaded when it is not in the cache; of a
    model in several files the first. Without a pattern the repository must hold one model; see `choose_files`.

    Raises:
        ValueError: the name is not of that form, or the pattern matches none or several models.
        OSError: no such repository or revision, no access, no network, no room.
    """
    if spec == DEMO and not Path(spec).exists():
        return demo_model_path()
    if not spec.startswith(PREFIX):
        return Path(spec)
    repo_id, access, pattern = _parse(spec)
    return resolve_hub(repo_id, pattern or "*", replace(access, progress=progress))


def open_header(spec: str) -> tuple[Path, ByteSource | None]:
    """What `inspect` reads of a model: the path, and where it is: None for this machine. Of a name that begins with
    ``hf:`` nothing is downloaded; what of the file is not in the cache is read in ranges. Raises as `resolve_model`."""
    if not spec.startswith(PREFIX):
        return resolve_model(spec), None
    repo_id, access, pattern = _parse(spec)
    names, cached_only = _find(repo_id, pattern or "*", access)
    cached = _in_cache(repo_id, names, access)
    if cached is not None or cached_only:
        return (cached or _fetch_all(repo_id, names, access, cached_only)), None
    return Path(names[0]), _Ranges(repo_id, access)


def resolve_adapter(source: StrPath) -> tuple[Path, str | None]:
    """(path, name) of an adapter: a path as it is, and no name; of ``hf:OWNER/REPO[@REVISION][:SUBFOLDER or FILE]`` its
    PEFT folder, or its GGUF file, downloaded when it is not in the cache, and the repository's or folder's name."""
    spec = os.fspath(source)
    if not spec.startswith(PREFIX):
        if not os.path.exists(spec):
            raise FileNotFoundError(errno.ENOENT, "no such adapter", spec)
        return Path(spec), None
    repo_id, access, inner = _parse(spec)
    inner = inner.strip("/")
    name = PurePosixPath(inner or repo_id).name
    if inner.lower().endswith(".gguf"):
        return _fetch(repo_id, inner, access, False), name[: -len(".gguf")]
    prefix = f"{inner}/" if inner else ""
    folder = _snapshot(repo_id, access, [prefix + file for file in _ADAPTER_FILES])
    if not any((folder / prefix / file).is_file() for file in _ADAPTER_FILES):
        where = f"{PREFIX}{repo_id}{':' if inner else ''}{inner}"
        raise FileNotFoundError(f"{where} holds no {_ADAPTER_FILES[0]}: name a folder that has one, or a .gguf file")
    return (folder / inner if inner else folder), name


class _Ranges:
    """Files of a repository, read in parts."""

    def __init__(self, repo_id: str, access: Access) -> None:
        self._repo_id, self._access = repo_id, access

    def size(self, path: str) -> int:
        from huggingface_hub import get_hf_file_metadata

        try:
            found = get_hf_file_metadata(self._url(path), token=self._access.token)
        except Exception as error:
            raise _told(self._repo_id, error) from error
        if found.size is None:
            raise OSError(f"{PREFIX}{self._repo_id}: the hub does not tell the size of {path}")
        return found.size

    def read(self, path: str, offset: int, n: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        headers = {**build_hf_headers(token=self._access.token), "Range": f"bytes={offset}-{offset + n - 1}"}
        try:
            answer = get_session().get(self._url(path), headers=headers, timeout=TIMEOUT_WITHOUT_CACHE_S)
            answer.raise_for_status()
        except Exception as error:
            raise _told(self._repo_id, error) from error
        if answer.status_code != 206 or len(answer.content) != n:
            raise OSError(f"{PREFIX}{self._repo_id}: the server sends no parts of files: download {path} first")
        content: bytes = answer.content
        return content

    def _url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repo_id, PurePosixPath(path).as_posix(), revision=self._access.revision)


def resolve_source(spec: str) -> Path:
    """What to convert, by name: a path as it is; ``hf:OWNER/REPO``, a checkpoint's folder, of which configuration,
    tokenizer and those safetensors are downloaded that its index names, when they are not in the cache; or
    ``hf:OWNER/REPO:PATTERN``, a GGUF file as in `resolve_model`.

    Raises:
        ValueError: the name is not of that form.
        OSError: as in `resolve_model`; the message for a folder that is missing says how a repository is written.
        ModelFormatError: the index of the weights is not JSON.
    """
    from pydiffgguf.convert.source.checkpoint import INDEX, SINGLE
    from pydiffgguf.convert.source.config import read_json

    if not spec.startswith(PREFIX):
        path = Path(spec)
        if not path.exists():
            hint = f"; a repository is written {PREFIX}{spec}" if re.fullmatch(_REPO_ID, spec) else ""
            raise FileNotFoundError(f"{spec}: no such folder{hint}")
        return path
    repo_id, access, pattern = _parse(spec)
    if pattern:
        return resolve_model(spec)
    folder = _snapshot(repo_id, access, [*_CHECKPOINT_FILES, INDEX])
    weights = {SINGLE}
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        weights = {name for name in files.values() if isinstance(name, str)} if isinstance(files, dict) else set()
    return _snapshot(repo_id, access, [*_CHECKPOINT_FILES, INDEX, *sorted(weights)])


def _snapshot(repo_id: str, access: Access, names: list[str]) -> Path:
    """The folder with a repository's files of these names, as far as there are any."""
    from huggingface_hub import snapshot_download

    patterns = [_literal(name) for name in names]
    try:
        return Path(snapshot_download(repo_id, revision=access.revision, allow_patterns=patterns))
    except Exception as error:
        raise _told(repo_id, error) from error


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def resolve_hub(repo_id: str, pattern: str, access: Access = Access()) -> Path:
    """Downloads the model of a repository that `pattern` names, unless it is cached, and returns its first file; see
    `choose_files` and `resolve_model`."""
    names, cached_only = _find(repo_id, pattern, access)
    return _fetch_all(repo_id, names, access, cached_only)


def _find(repo_id: str, pattern: str, access: Access) -> tuple[list[str], bool]:
    """(names of a model's files, whether only the cache was asked)."""
    files, cached_only = _list_files(repo_id, access)
    where = f"{PREFIX}{repo_id}{' in the cache' if cached_only else ''}"
    return choose_files(files, pattern, where), cached_only


def _fetch_all(repo_id: str, names: list[str], access: Access, cached_only: bool) -> Path:
    paths = [_fetch(repo_id, name, access, cached_only) for name in names]
    if len({path.parent for path in paths}) > 1:
        raise OSError(f"{PREFIX}{repo_id}: it changed while its {len(paths)} files were fetched: try again")
    return paths[0]


def _fetch(repo_id: str, name: str, access: Access, cached_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    failures: list[BaseException] = []

    def fetch(cached_only: bool) -> Path:
        return Path(
            hf_hub_download(
                repo_id,
                name,
                revision=access.revision,
                cache_dir=access.cache_dir,
                token=access.token,
                local_files_only=cached_only,
                tqdm_class=None if access.progress is None else _reporting(name, access.progress, failures),
            )
        )

    try:
        return fetch(cached_only)
    except PermissionError:  # a cache that may only be read can still hold the file
        with contextlib.suppress(Exception):
            return fetch(True)
        raise
    except Exception as error:
        if failures:
            raise failures[0] from None
        raise _told(repo_id, error) from error


def _in_cache(repo_id: str, names: list[str], access: Access) -> Path | None:
    """The first of a model's files, when all of them are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = [
        try_to_load_from_cache(repo_id, name, cache_dir=access.cache_dir, revision=access.revision) for name in names
    ]
    return Path(str(found[0])) if all(isinstance(path, str) for path in found) else None


def _reporting(name: str, progress: Callable[[Progress], object], failures: list[BaseException]) -> type:
    """A bar for huggingface_hub that draws nothing and tells the caller instead; what the caller raises is kept in
    `failures`, as huggingface_hub may put another error around it."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._done = int(options.get("initial") or 0)
            super().__init__(*arguments, **{**options, "disable": True})
            self._total = int(options.get("total") or 0)
            self._tell()

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            self._tell()
            return None

        def _tell(self) -> None:
            try:
                progress(Progress("downloading", name, self._done, max(self._total, self._done)))
            except BaseException as error:
                failures.append(error)
                raise

    return Reporting


def choose_files(files: Iterable[str], pattern: str, where: str) -> list[str]:
    """The files, in order, of the one model among a repository's files that a pattern names: a file's whole name, a
    glob (``*Q4_K_M.gguf``), or a word of the name between ``-``, ``.`` and ``/`` (``Q4_K_M``, which ``Q4_K`` is not);
    upper and lower case are the same. The parts of a split model (``-00001-of-00003.gguf``) are named by what stands
    before, or by any of them. Projectors, importance matrices and adapters are no models; their whole name finds them.

    Args:
        where: what the messages call the repository.

    Raises:
        ValueError: none or several match; the message names the models that there are. Or parts are missing.
    """
    models: dict[str, list[str]] = {}
    files = sorted(files)
    if pattern in files and _OTHER_GGUF.search(PurePosixPath(pattern).name):
        return [pattern]
    for file in files:
        name = PurePosixPath(file).name
        if name.lower().endswith(".gguf") and not _OTHER_GGUF.search(name):
            part = _PART.search(file)
            shown = f"{_PART.sub('', file)} ({int(part[2])} files)" if part and int(part[2]) > 1 else file
            models.setdefault(shown, []).append(file)
    if not models:
        raise ValueError(f"{where} holds no GGUF model")
    found = [shown for shown, parts in models.items() if any(_matches(part, pattern) for part in parts)]
    if len(found) != 1:
        listed = ", ".join(found or models)
        if pattern == "*":
            raise ValueError(f"{where} holds {len(models)} models; name one behind a colon, by a word of it: {listed}")
        what = "matches none" if not found else f"matches {len(found)}"
        raise ValueError(f"{where}: {pattern!r} {what} of its models: {listed}")
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


def _list_files(repo_id: str, access: Access) -> tuple[list[str], bool]:
    """(file names, whether they are only those in the cache): from the hub, or from the cache when the hub does not
    answer, with a warning unless it was told to stay offline (HF_HUB_OFFLINE)."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        if access.local_files_only:
            raise OfflineModeIsEnabled("local_files_only")
        folder = Path(access.cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
        timeout = TIMEOUT_S if folder.is_dir() else TIMEOUT_WITHOUT_CACHE_S
        # Not list_repo_files, which tries again for about 20 s when there is no network.
        info = HfApi(token=access.token).model_info(repo_id, revision=access.revision, timeout=timeout)
        return [file.rfilename for file in info.siblings or ()], False
    except Exception as error:
        # No network: an exception of httpx's own kind, which huggingface_hub has renamed between versions.
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if answered or isinstance(error, ValueError):
            raise _told(repo_id, error) from error
        cached = _cached_files(repo_id, access)
        if not cached:
            raise ConnectionError(
                f"{PREFIX}{repo_id} is not in the cache, and the hub cannot be reached: {_first_line(error)}"
            ) from error
        if not isinstance(error, OfflineModeIsEnabled):
            warnings.warn(
                f"{PREFIX}{repo_id}: the hub cannot be reached, the cache serves: {_first_line(error)}", stacklevel=5
            )
        return cached, True


def _cached_files(repo_id: str, access: Access) -> list[str]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(access.cache_dir or constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return [
        file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        for repo in repos
        if repo.repo_id == repo_id and repo.repo_type == "model"
        for snapshot in repo.revisions
        if (access.revision or "main") in (*snapshot.refs, snapshot.commit_hash)
        for file in snapshot.files
    ]


def _told(repo_id: str, error: Exception) -> Exception:
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

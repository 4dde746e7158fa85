"""How a model is named and opened: what the constructor's arguments must be, and what a wrong name was meant for."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydiffgguf._arguments import flag, int32, integer
from pydiffgguf._binding.native import NativeModel
from pydiffgguf.engine.options import Progress

__all__ = ["find", "model_options", "open_native", "session_options"]

#: More layers than a model may have.
ALL_LAYERS = 2**31 - 1

_URL = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:resolve|blob|raw)/[^/]+/(\S+?))?/*(?:\?.*)?"
)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find(path: object, progress: Callable[[Progress], object] | None = None) -> Path:
    """The file that the constructor's argument names: a path, or ``hf:OWNER/REPO[:PATTERN]``, which is downloaded when
    it is not in the cache.

    Raises TypeError for what is no path; FileNotFoundError, which says how a repository is written, for what looks
    like one; and what `hub.resolve_model` raises.
    """
    if isinstance(path, (bytes, bytearray)) or not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a Path, not {type(path).__name__}")
    name = os.fspath(path)
    if isinstance(name, bytes):
        raise TypeError("path must be a path of type str, not bytes")
    if name.startswith("hf:"):
        from pydiffgguf.hub import resolve_model

        return resolve_model(name, progress=progress)
    if not os.path.exists(name) and (hint := _meant(name)):
        raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}; {hint}", name)
    return Path(name)


def _meant(name: str) -> str:
    if name == "demo":
        return "the bundled model is demo_model_path()"
    url = _URL.fullmatch(name)
    if url is not None:
        return f'a repository is written "hf:{url[1]}{":" + url[2] if url[2] else ""}"'
    if re.match(r"https?:", name):
        return "download the file first, and give its path"
    if name.startswith("~"):
        return f'"~" is not the home folder here: give os.path.expanduser({name!r})'
    repository, _, pattern = name.partition(":")
    if _REPOSITORY.fullmatch(repository) and not name.lower().endswith(".gguf"):
        return f'a repository is written "hf:{repository}{":" + pattern if pattern else ""}"'
    return ""


def session_options(n_ctx: object, n_batch: object, n_threads: object, type_kv: str, sampler: str) -> dict[str, Any]:
    """A NativeSession's options, from the constructor's."""
    return {
        "n_ctx": 0 if n_ctx is None else int32("n_ctx", n_ctx, 1),
        "n_batch": int32("n_batch", n_batch, 1),
        "n_threads": 0 if n_threads is None else integer("n_threads", n_threads, 1, 512),
        "type_kv": type_kv,
        "sampler": sampler,
    }


def model_options(
    n_gpu_layers: object,
    n_cpu_moe: object,
    tensor_split: Sequence[float] | None,
    main_gpu: object,
    offload_kv: object,
    signal_copy: object,
    rpc: object,
    cpu: object,
    use_mmap: object,
) -> dict[str, Any]:
    """A NativeModel's options, from the constructor's."""
    return {
        "n_gpu_layers": _n_gpu_layers(n_gpu_layers),
        "n_cpu_moe": int32("n_cpu_moe", n_cpu_moe),
        "tensor_split": tensor_split or (),
        "main_gpu": -1 if main_gpu is None else int32("main_gpu", main_gpu),
        "offload_kv": flag("offload_kv", offload_kv),
        "signal_copy": flag("signal_copy", signal_copy),
        "rpc": _addresses(rpc),
        "cpu": _level_name(cpu),
        "use_mmap": flag("use_mmap", use_mmap),
    }


def _n_gpu_layers(value: object) -> int:
    """For C, where -1 is what fits. To a caller -1 and "all" are all layers, as in llama.cpp."""
    if value is None or value == "auto":
        return -1
    if value == "all" or (value == -1 and not isinstance(value, bool)):
        return ALL_LAYERS
    if isinstance(value, str):
        raise ValueError(f'n_gpu_layers is {value!r}: it must be "auto", "all" or a number')
    return int32("n_gpu_layers", value)


def _addresses(rpc: object) -> list[str]:
    if rpc is None:
        return []
    if isinstance(rpc, str) or not isinstance(rpc, Sequence) or not all(isinstance(each, str) for each in rpc):
        raise TypeError(f'rpc must be a list of "host:port", but is {rpc!r:.60}')
    return list(rpc)


def _level_name(cpu: object) -> str:
    if cpu is None:
        return ""
    if not isinstance(cpu, str):
        raise TypeError(f"cpu must be a level's name or None, not {type(cpu).__name__}")
    if not cpu or "\0" in cpu:
        raise ValueError(f"cpu is {cpu!r}: it must be a level's name, as `pydiffgguf doctor` lists them, or None")
    return cpu


def open_native(
    path: Path,
    options: Mapping[str, Any],
    expected: Mapping[str, Any],
    progress: Callable[[Progress], object] | None = None,
) -> NativeModel:
    """Opens the file. `expected`: options of the sessions that "as many layers as fit" makes room for."""

    def tell(done: int) -> None:
        if progress is not None:
            progress(Progress("opening", path.name, done, size))

    size = path.stat().st_size if path.is_file() else 0
    tell(0)
    native = NativeModel(path, **options, expected=expected)
    tell(size)
    return native

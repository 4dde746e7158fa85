"""What transformers gives is computed once a run, whichever of pytest-xdist's processes asks first: the places that are
compared with it are spread over the processes, and each of them would compute it."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar

import torch
from nets import Net
from reference import Model

_Result = TypeVar("_Result")

#: Where the processes of this run find each other's results; None: this is the only one. conftest.py sets it.
shared: Path | None = None


@cache
def _digest(model: Model) -> str:
    """Of a model's figures and weights: a net that two processes made from one seed is the same."""
    weights = hashlib.sha256(f"{model.config.canvas_length} {model.config.text_config.to_json_string()}".encode())
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode() + value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


def _key(part: object) -> str:
    if isinstance(part, Net):
        return _digest(part.model)
    return _digest(part) if isinstance(part, torch.nn.Module) else repr(part)


def once(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """functools.cache, and a file for the other processes. Arguments are models, nets, and what `repr` tells apart."""

    @cache
    @wraps(function)
    def get(*args: object) -> _Result:
        if shared is None:
            return function(*args)
        name = "\n".join([function.__module__, function.__qualname__, *map(_key, args)])
        path = shared / hashlib.sha256(name.encode()).hexdigest()
        if path.exists():
            result: _Result = pickle.loads(path.read_bytes())
            return result
        result = function(*args)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(result))
        part.replace(path)
        return result

    return get

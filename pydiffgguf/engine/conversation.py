"""A conversation in a file, with what the model has read of it beside: taken up again, it is not read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf._binding.library import StrPath
from pydiffgguf._log import logger
from pydiffgguf.engine.core import Engine
from pydiffgguf.engine.pool import common_head
from pydiffgguf.errors import DiffGGUFError
from pydiffgguf.text.files import replace_file

__all__ = ["CACHE", "load_cache", "read_messages", "save_conversation"]

#: The cache's name is the conversation's with this behind it.
CACHE = ".cache"


def save_conversation(engine: Engine, path: StrPath, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> bool:
    """Writes the messages as JSON, and beside them the cache of the session that has read them; returns whether there
    was one. `ids`: the prompt that the messages become."""
    path = Path(path)
    data = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=1)
    with engine.pool.take(ids, engine.call()) as session:
        # As the pool has it: a session with less in common has read something else.
        cached = 2 * common_head(session, np.asarray(ids, np.int32)) >= session.n_past > 0
        if cached:
            session.save(path.with_name(path.name + CACHE))
    replace_file(path, data.encode("utf-8"))
    return cached


def read_messages(path: StrPath) -> list[dict[str, Any]]:
    """The messages of a saved conversation. Raises ValueError for a file that holds none."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    messages = saved.get("messages") if isinstance(saved, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{path} is no saved conversation: {{"messages": [{{"role": ..., "content": ...}}]}}')
    return messages


def load_cache(engine: Engine, path: StrPath, ids: Sequence[int]) -> bool:
    """Reads the cache beside a conversation, of which `ids` are the prompt, into a session that the next call finds.
    False, and a line in the log, where it is missing or belongs to another model."""
    cache = Path(path).with_name(Path(path).name + CACHE)
    with engine.pool.take(ids, engine.call()) as session:
        if common_head(session, np.asarray(ids, np.int32)) == len(ids):
            return True
        try:
            session.load(cache)
        except (OSError, DiffGGUFError) as error:
            logger.warning("%s: the conversation will be read again: %s", cache, error)
            return False
    return True

"""Collects an importance matrix: runs a text through a model, as prompts and as canvases; sums what each matrix met.

A diffusion model meets clean text only in its prompt; on the canvas it meets every mixture of right and random tokens,
with and without the signal of the step before. All of these are run, so that the matrix weighs what generation does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pydiffgguf._arguments import MAX_SEED, integer

from . import imatrix

if TYPE_CHECKING:
    from pydiffgguf.model import DiffusionModel

#: Shares of a canvas that are random: from the pure noise that a canvas starts with to the text that it ends as.
NOISE_LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)

#: Tokens of text before a canvas, at most.
PREFIX = 512


@dataclass(frozen=True)
class CollectProgress:
    """Handed to the progress callback after each chunk: how many of them are done, and seconds since the first."""

    done: int
    count: int
    elapsed_s: float


@dataclass(frozen=True)
class CollectReport:
    """What was collected: `tensors` matrices over `chunks` pieces of text; `idle` lists experts' tensors of which some
    expert was never chosen, with their number: more text, or another, would reach them."""

    path: Path
    tensors: int
    chunks: int
    tokens: int
    idle: dict[str, int]
    seconds: float


def collect(
    model: DiffusionModel,
    text: str,
    out: str | Path,
    *,
    chunks: int | None = None,
    seed: int = 0,
    dataset: str = "text",
    progress: Callable[[CollectProgress], None] | None = None,
) -> CollectReport:
    """Writes the importance matrix of `model` over `text` to `out`, in llama.cpp's imatrix GGUF format.

    The text is cut into chunks of a prefix, at most 512 tokens, and one canvas, the text behind it. The prefix is
    encoded; the canvas is denoised at each of NOISE_LEVELS, without self-conditioning and then with the signal of that
    first pass. `chunks`: the most that are run; None: all. `seed`: of the random tokens. `dataset`: the text's name,
    for the file. The same arguments give the same file.

    Raises ValueError for a text shorter than one chunk, what the model raises, and OSError when `out` cannot be
    written; an old `out` is then as it was.
    """
    started = time.monotonic()
    if chunks is not None:
        integer("chunks", chunks, 1, 2**31 - 1)
    rng = np.random.default_rng(integer("seed", seed, 0, MAX_SEED))
    ids = np.array(model.tokenize(text, add_bos=False, special=False), dtype=np.int32)
    canvas = model.config.canvas_length
    sampling = model.sampling
    temperature = np.float32((sampling.t_min + sampling.t_max) / 2)
    with model.session() as session:
        prefix = min(PREFIX, session.n_ctx - canvas - 1)
        pieces = cut(ids, prefix, canvas)
        if not pieces:
            raise ValueError(f"the text has {ids.size} tokens: a canvas and one before it need at least {canvas + 1}")
        pieces = pieces[:chunks]
        bos = model.tokenizer.bos_id
        session.collect(True)
        for i, piece in enumerate(pieces):
            before, target = piece[:-canvas], piece[-canvas:]
            session.reset()
            session.encode(before if bos is None else np.concatenate([[bos], before]))
            for level in NOISE_LEVELS:
                noised = rng.random(canvas) < level
                rows = np.where(noised, rng.integers(0, model.config.n_vocab, canvas), target).astype(np.int32)
                z = session.denoise(rows)
                z /= temperature
                session.denoise(rows, z)
            if progress:
                progress(CollectProgress(i + 1, len(pieces), time.monotonic() - started))
        sums, counts = session.importance()
    imatrix.save(Path(out), sums, counts, [dataset], len(pieces), prefix + canvas)
    idle = {name: int((n == 0).sum()) for name, n in counts.items() if (n == 0).any()}
    return CollectReport(
        Path(out), len(sums), len(pieces), int(sum(p.size for p in pieces)), idle, time.monotonic() - started
    )


def cut(ids: npt.NDArray[np.int32], prefix: int, canvas: int) -> Sequence[npt.NDArray[np.int32]]:
    """Chunks of `prefix` + `canvas` ids; a shorter text gives a single shorter one, with at least one id of prefix."""
    size = prefix + canvas
    whole = [ids[i : i + size] for i in range(0, ids.size - size + 1, size)]
    return whole or ([ids] if ids.size > canvas else [])

"""What the self-conditioning signal costs by how peaked the rows are, at the released vocabulary and width.

    python benchmarks/self_conditioning.py -o /tmp/embedding.gguf

Writes a net of two layers with the released embedding (262,144 x 2,816, in the type that Q4_K_M gives it) unless the
file is there, and conditions a pass of 256 rows on synthetic logits: Gaussian, with one logit raised in most rows, as a
net that knows them has it. The time is that of the signal alone (`Session.timings`), with the CPU's own operators and
with ggml's, which multiply the whole vocabulary; the error is that of the pass's logits between the two.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import shapes

from pydiffgguf import DiffusionModel
from pydiffgguf.session import Session

#: Nats by which the highest logit of a row stands above Gaussian ones of deviation 1, and the share of rows that have
#: it; the others are Gaussian. 262,144 Gaussian logits weigh as much as one that is 13 higher than their mean.
KINDS = {
    "certain: 40 above, all rows": (40.0, 1.0),
    "peaked: 25 above, all rows": (25.0, 1.0),
    "peaked, 240 of 256 rows": (25.0, 240 / 256),
    "peaked, 128 of 256 rows": (25.0, 128 / 256),
    "flat, all rows": (0.0, 0.0),
}


def write(path: Path) -> None:
    released = shapes.SHAPES["26b-a4b"]
    shapes.SHAPES["embedding"] = {
        **released,
        "num_hidden_layers": 2,
        "layer_types": released["layer_types"][4:6],
        "num_experts": 8,
    }
    shapes.write(path, "embedding", type="q4_k_m")


def rows(n_vocab: int, n_rows: int, above: float, share: float) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(1)
    z = rng.standard_normal((n_rows, n_vocab), np.float32)
    for row in rng.permutation(n_rows)[: round(share * n_rows)]:
        z[row, rng.integers(n_vocab)] += above
    return z


def measure(session: Session, z: npt.NDArray[np.float32], repeat: int) -> tuple[float, npt.NDArray[np.float32]]:
    """Median seconds of the signal, and the logits of the pass behind it."""
    times = []
    for _ in range(repeat):
        session.profile()
        logits = session.denoise(np.arange(len(z)), self_conditioning=z)
        times.append(session.timings.self_conditioning)
    return statistics.median(times), logits


def compare(path: Path, threads: int, repeat: int) -> Iterator[tuple[str, float, float, float]]:
    with (
        DiffusionModel(path, n_ctx=512, n_threads=threads) as model,
        model.session() as own,
        model.session(ggml_operators=True) as ggml,
    ):
        for session in (own, ggml):
            session.encode(np.arange(10))
            session.denoise(np.arange(2), self_conditioning=np.zeros((2, model.config.n_vocab), np.float32), n_rows=2)
        for name, (above, share) in KINDS.items():
            z = rows(model.config.n_vocab, model.config.canvas_length, above, share)
            mine, a = measure(own, z, repeat)
            whole, b = measure(ggml, z, 1)
            error = np.median(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1))
            yield name, mine, whole, float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the self-conditioning signal at the released width.")
    parser.add_argument("-o", "--file", type=Path, default=Path("embedding.gguf"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if not args.file.exists():
        write(args.file)
    print("| rows | own, s | ggml's, s | gain | error of the logits |\n| --- | --- | --- | --- | --- |")
    for name, mine, whole, error in compare(args.file, args.threads, args.repeat):
        print(f"| {name} | {mine:.3f} | {whole:.3f} | {whole / mine:.0f} x | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()

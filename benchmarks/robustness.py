"""Counts what must never go wrong: changed bytes, cancels, threads, and memory over many rounds.

    python benchmarks/robustness.py bytes|cancels|generations|busy|rounds|streams [--file MODEL] [--count N]

Each prints its counts, and exits with 1 when one of them is wrong. The tests run small versions of the same functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf import CancelledError, DiffusionModel, ModelFormatError, OutOfMemoryError, Stream, UnsupportedError
from pydiffgguf._binding.native import NativeModel, NativeSession
from pydiffgguf._binding.records import CanvasSpec
from pydiffgguf.convert.inspection.gguf_file import read_head
from pydiffgguf.errors import SessionBusyError

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "pydiffgguf" / "data" / "demo.gguf"
#: 95,648 bytes, 13,504 of them header.
SMALL = ROOT / "tests" / "fuzz" / "corpus" / "open" / "tiny-f16.gguf"
CHANGES = (0x01, 0x80, 0xFF)

# ---------------------------------------------------------------------------------------------------- changed bytes


def change_bytes(source: Path, folder: Path, changes: Iterable[tuple[int, int]]) -> Counter[str]:
    """Opens the file with one byte changed (position, bits flipped), once for each of `changes`; outcomes by name.
    Whatever is none of the three errors, or has more than one line, is raised."""
    data = source.read_bytes()
    path = folder / "changed.gguf"
    outcomes: Counter[str] = Counter()
    path.write_bytes(data)
    for at, bits in changes:
        with path.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(bytes((data[at] ^ bits,)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with DiffusionModel(path) as model:
                    assert model.tokenizer.n_vocab == model.config.n_vocab
                    assert model.chat_template is None or isinstance(model.chat_template, str)
            outcomes["opened"] += 1
        except (ModelFormatError, UnsupportedError, OutOfMemoryError) as error:
            if "\n" in str(error):
                raise AssertionError(f"byte {at} ^ {bits:#x}: more than one line: {error}") from error
            outcomes[type(error).__name__] += 1
        with path.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(data[at : at + 1])
    return outcomes


# ---------------------------------------------------------------------------------------------------------- cancels


@dataclass
class Cancels:
    """What `cancel_at_random` saw. Seconds; latencies from the call of cancel() to the exception in the other thread,
    of those cancels that met a running call."""

    met: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class _Canceller:
    """A thread that calls cancel() once, some seconds after it is asked to."""

    def __init__(self, session: NativeSession) -> None:
        self._session = session
        self._asked = threading.Semaphore(0)
        self._delay: float | None = 0.0
        self.called = 0.0
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while True:
            self._asked.acquire()
            if self._delay is None:
                return
            time.sleep(self._delay)
            self.called = time.perf_counter()
            self._session.cancel()

    def ask(self, delay: float | None) -> None:
        self._delay = delay
        self._asked.release()

    def stop(self) -> None:
        self.ask(None)
        self._thread.join()


def cancel_at_random(file: Path, count: int, rows: int | None = None, seed: int = 0, steps: int = 4) -> Cancels:
    """One session encodes, scores and denoises canvases of `rows` rows (None: the canvas length) without pause, while
    another thread cancels at random moments, `count` times. After each, the prefix must be what the header says, and
    what follows must have the very numbers of an undisturbed run: a step that was cancelled is repeated, an encoding
    goes on from its last whole chunk."""
    seen = Cancels()
    rng = random.Random(seed)
    model = NativeModel(file)
    batch = 16
    session = NativeSession(model, n_ctx=256, n_threads=1, n_batch=batch)
    sampling = dataclasses.replace(model.sampling, steps=steps, confidence_threshold=0.0)
    ids = rng.choices(range(20, model.config.n_vocab), k=3 * batch - 5)
    texts = [ids[:7], ids[7:10]]
    seeds = (1, 2, 3)

    session.encode(ids)
    scores = session.score(texts)
    expected = {}
    for canvas_seed in seeds:
        session.canvas_begin([CanvasSpec(rows, seed=canvas_seed)], sampling)
        for i in range(steps):
            began = time.perf_counter()
            step = session.canvas_step()[0]
            seen.steps.append(time.perf_counter() - began)
            expected[canvas_seed, i] = (step.argmax.tolist(), step.canvas.tolist(), step.entropy.tolist())
    longest = 1.3 * statistics.median(seen.steps)

    canceller = _Canceller(session)
    state = ("encode", 0, 0)  # what comes next: its kind, the canvas's seed, the step
    done = 0
    canceller.ask(rng.random() * longest)
    session.truncate(0)
    while done < count:
        kind, canvas_seed, i = state
        began = time.perf_counter()
        try:
            if kind == "encode":
                session.encode(ids[session.n_past :])
                state = ("score", 0, 0)
            elif kind == "score":
                if any((a != b).any() for a, b in zip(session.score(texts), scores, strict=True)):
                    seen.wrong.append("scores")
                state = ("begin", seeds[0], 0)
            elif kind == "begin":
                session.canvas_begin([CanvasSpec(rows, seed=canvas_seed)], sampling)
                state = ("step", canvas_seed, 0)
            else:
                step = session.canvas_step()[0]
                if (step.argmax.tolist(), step.canvas.tolist(), step.entropy.tolist()) != expected[canvas_seed, i]:
                    seen.wrong.append(f"step {i} of canvas {canvas_seed}")
                if i + 1 < steps:
                    state = ("step", canvas_seed, i + 1)
                elif canvas_seed != seeds[-1]:
                    state = ("begin", canvas_seed + 1, 0)
                else:
                    session.truncate(0)
                    state = ("encode", 0, 0)
        except CancelledError:
            now = time.perf_counter()
            if canceller.called > began:
                seen.latencies.append(now - canceller.called)
            seen.met[kind] += 1
            held = session.tokens().tolist()
            if held != ids[: len(held)] or (len(held) % batch if kind == "encode" else len(held) != len(ids)):
                seen.wrong.append(f"{kind}: the prefix has {len(held)} tokens")
                session.truncate(0)
                state = ("encode", 0, 0)
            done += 1
            if done < count:
                canceller.ask(rng.random() * longest)
    canceller.stop()
    session.close()
    model.close()
    return seen


# ---------------------------------------------------------------------------------------------------------- threads


def generate_in_threads(file: Path, count: int, n_threads: int = 8) -> int:
    """Generations on `n_threads` threads that share one model, against the same on one thread; how many differ."""
    options = {"max_tokens": 24, "steps": 6}
    with DiffusionModel(file, n_ctx=256, n_threads=1) as model:
        prompts = [f"{'What is two and three? ' * (i % 4)}Who has key {i % 25}?" for i in range(count)]
        kinds = sorted({(prompt, i % 7) for i, prompt in enumerate(prompts)})
        alone = {kind: model.generate(kind[0], seed=kind[1], **options) for kind in kinds}

        def differs(i: int) -> bool:
            result = model.generate(prompts[i], seed=i % 7, **options)
            expected = alone[prompts[i], i % 7]
            return (result.text, result.tokens) != (expected.text, expected.tokens)

        with ThreadPoolExecutor(n_threads) as pool:
            return sum(pool.map(differs, range(count)))


def collide(file: Path, count: int) -> Counter[str]:
    """Two threads call one session all the time, until `count` calls have met a call of the other thread: they get
    SessionBusyError, once for each call that works, and that one has the right numbers. Counts "right", "busy" and
    "wrong"."""
    model = NativeModel(file)
    session = NativeSession(model, n_ctx=128, n_threads=1)
    session.encode([2, *range(20, 40)])
    texts = [np.arange(20, 28, dtype=np.int32)]
    (expected,) = session.score(texts)
    seen: Counter[str] = Counter()
    finished = [0, 0]  # calls that worked, by thread

    def work(me: int) -> None:
        while seen["busy"] < count and not seen["wrong"]:
            others = finished[1 - me]
            try:
                (scores,) = session.score(texts)
            except SessionBusyError:
                seen["busy"] += 1
                deadline = time.monotonic() + 10
                while finished[1 - me] == others and time.monotonic() < deadline:
                    time.sleep(0)
                continue
            except BaseException as error:
                seen["wrong"] += 1
                raise error
            seen["right" if (scores == expected).all() else "wrong"] += 1
            finished[me] += 1

    threads = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    model.close()
    return seen


# ----------------------------------------------------------------------------------------------------------- rounds


def resident_bytes() -> int:
    """Of this process; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_over_rounds(file: Path, count: int) -> list[int]:
    """Opens, generates and closes, `count` times; resident bytes after each round."""
    sizes = []
    for i in range(count):
        with DiffusionModel(file, n_ctx=256, n_threads=1) as model:
            model.generate("Who has the key?", max_tokens=8, steps=2, seed=i)
            with model.session() as session:
                session.encode([2, 20, 21])
        sizes.append(resident_bytes())
    return sizes


# ---------------------------------------------------------------------------------------------------------- streams


def cancel_one_of_two(file: Path, count: int, seed: int = 0) -> tuple[list[float], int]:
    """Two streams of one model at work on two threads; a third thread cancels one at a random moment, `count` times.
    Returns the seconds from each cancel to that stream's end, and how often something was wrong: the stream ended
    otherwise, or the other one, which is let go on for a few steps, did not go on."""
    rng = random.Random(seed)
    endless: dict[str, Any] = {"steps": 100_000, "confidence_threshold": 0.0, "seed": 1}
    latencies, wrong = [], 0
    with DiffusionModel(file, n_threads=1) as model, ThreadPoolExecutor(2) as threads:
        for _ in range(count):
            one, other = (model.stream(prompt, raw=True, **endless) for prompt in ("Put in order", "On Sunday"))
            steps = [0]

            def follow(stream: Stream[Any, Any] = other, steps: list[int] = steps) -> str:
                for _ in stream:
                    steps[0] += 1
                reason: str = stream.result.finish_reason
                return reason

            def end(stream: Stream[Any, Any] = one) -> tuple[str, float]:
                for _ in stream:
                    pass
                return stream.result.finish_reason, time.monotonic()

            ended, going = threads.submit(end), threads.submit(follow)
            time.sleep(0.05 * rng.random())
            called = time.monotonic()
            one.cancel()
            reason, at = ended.result()
            latencies.append(at - called)
            before = steps[0]
            while steps[0] < before + 3 and not going.done():
                time.sleep(0.001)
            wrong += reason != "cancelled" or going.done()
            other.cancel()
            wrong += going.result() != "cancelled"
    return latencies, wrong


# ------------------------------------------------------------------------------------------------------------- main


def run_bytes(file: Path, count: int) -> bool:
    end = read_head(file).data_offset
    places = range(end) if count == 0 else sorted(random.Random(0).sample(range(end), count))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        outcomes = change_bytes(file, Path(folder), ((at, bits) for at in places for bits in CHANGES))
    print(f"{file.name}: {file.stat().st_size} bytes, a header of {end}")
    print(f"{len(places)} positions, {len(CHANGES)} values each: {outcomes.total()} files, {dict(outcomes)}")
    return outcomes.total() == len(places) * len(CHANGES)


def run_cancels(file: Path, count: int, rows: int | None) -> bool:
    seen = cancel_at_random(file, count or 100_000, rows)
    late = sorted(seen.latencies)
    step = statistics.median(seen.steps)
    print(f"{seen.met.total()} cancels, by the call they met: {dict(seen.met)}")
    print(f"a step takes {1e3 * step:.2f} ms (median of {len(seen.steps)})")
    print(
        f"latency of the {len(late)} that met a running call: median {1e3 * statistics.median(late):.3f} ms, "
        f"99 % below {1e3 * late[int(0.99 * len(late))]:.3f} ms, 99.9 % below {1e3 * late[int(0.999 * len(late))]:.3f} "
        f"ms, maximum {1e3 * late[-1]:.3f} ms"
    )
    print(f"later than one step: {sum(seconds > step for seconds in late)}")
    print(f"wrong states: {len(seen.wrong)} {seen.wrong[:5]}")
    return not seen.wrong


def run_generations(file: Path, count: int) -> bool:
    count = count or 1000
    different = generate_in_threads(file, count)
    print(f"{count} generations on 8 threads, one model: {different} differ from those on one thread")
    return different == 0


def run_busy(file: Path, count: int) -> bool:
    seen = collide(file, count or 10_000)
    print(
        f"two threads on one session: {seen['right']} calls worked, {seen['busy']} met one and were told so, ", end=""
    )
    print(f"{seen['wrong']} went wrong")
    return seen["wrong"] == 0


def run_rounds(file: Path, count: int) -> bool:
    sizes = memory_over_rounds(file, count or 500)
    shown = {i + 1: f"{sizes[i] / 2**20:.1f}" for i in sorted({0, 9, 49, 99, 249, len(sizes) - 1}) if i < len(sizes)}
    print(f"resident MiB after round: {shown}")
    return sizes[-1] - sizes[len(sizes) // 5] < 2**20


def run_streams(file: Path, count: int) -> bool:
    latencies, wrong = cancel_one_of_two(file, count or 1000)
    late = sorted(latencies)
    print(
        f"one of two streams cancelled, {len(late)} times: it ended after {1e3 * statistics.median(late):.2f} ms "
        f"(median), 99 % within {1e3 * late[int(0.99 * len(late))]:.2f} ms, all within {1e3 * late[-1]:.2f} ms; "
        f"{wrong} wrong"
    )
    return wrong == 0


RUNS: dict[str, tuple[Callable[..., bool], Path]] = {
    "bytes": (run_bytes, SMALL),
    "cancels": (run_cancels, DEMO),
    "generations": (run_generations, DEMO),
    "busy": (run_busy, DEMO),
    "rounds": (run_rounds, DEMO),
    "streams": (run_streams, DEMO),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--file", type=Path, help="a GGUF file (default: the demo model; for bytes a smaller one)")
    parser.add_argument("--count", type=int, default=0, help="how often (default: what the results were made with)")
    parser.add_argument("--rows", type=int, help="cancels: rows of a canvas (default: the canvas length)")
    options = parser.parse_args()
    run, file = RUNS[options.what]
    rows = (options.rows,) if options.what == "cancels" else ()
    began = time.monotonic()
    right = run(options.file or file, options.count, *rows)
    print(f"{time.monotonic() - began:.0f} s; {'as it must be' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

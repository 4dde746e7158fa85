"""Counts for ``/metrics``, in Prometheus' text form. No label comes from a request."""

from __future__ import annotations

import bisect
import threading
from collections import Counter

__all__ = ["Metrics"]

#: Upper bounds of the histogram of steps, in seconds.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Metrics:
    """Counters; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._steps = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def request(self, endpoint: str, status: int) -> None:
        with self._lock:
            self._requests[endpoint, status] += 1

    def tokens(self, *, prompt: int, cached: int, completion: int) -> None:
        with self._lock:
            self._tokens.update(prompt=prompt, cached=cached, completion=completion)

    def step(self, seconds: float) -> None:
        with self._lock:
            self._steps[bisect.bisect_left(BOUNDS, seconds)] += 1
            self._seconds += seconds

    def text(self, *, waiting: int, running: int, cancelled: int, superseded: int) -> str:
        """The page."""
        lines: list[str] = []

        def family(name: str, kind: str, text: str) -> str:
            full = f"pydiffgguf_{name}"
            lines.extend((f"# HELP {full} {text}", f"# TYPE {full} {kind}"))
            return full

        with self._lock:
            name = family("requests_total", "counter", "Requests by endpoint and status.")
            for (endpoint, status), count in sorted(self._requests.items()):
                lines.append(f'{name}{{endpoint="{endpoint}",status="{status}"}} {count}')
            name = family("tokens_total", "counter", "Tokens: encoded or cached prompts, and what was answered.")
            for kind in ("prompt", "cached", "completion"):
                lines.append(f'{name}{{kind="{kind}"}} {self._tokens[kind]}')
            name = family("step_seconds", "histogram", "Seconds of a denoise step or a chunk of a prompt.")
            total = 0
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), self._steps, strict=True):
                total += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
            lines.extend((f"{name}_sum {self._seconds:.6f}", f"{name}_count {total}"))
        for kind, (label, value, text) in [
            ("gauge", ("requests_waiting", waiting, "Requests in the queue.")),
            ("gauge", ("requests_running", running, "Requests under way.")),
            ("counter", ("requests_cancelled_total", cancelled, "Requests whose client left.")),
            ("counter", ("requests_superseded_total", superseded, "Requests replaced by a newer one.")),
        ]:
            lines.append(f"{family(label, kind, text)} {value}")
        return "\n".join(lines) + "\n"

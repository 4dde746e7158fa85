"""What chat and completions share: the fields that say how to generate, and generations one after the other."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from pydiffgguf.server.endpoints.looking import lora_options
from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.fields import Fields
from pydiffgguf.server.service import Service

__all__ = ["MAX_STOP", "MAX_STOPS", "Diffusion", "How", "Series", "seed_of"]

MAX_STOPS, MAX_STOP = 32, 256
MAX_GENERATIONS = 8
FRAMES = (None, False, True, "tokens")
#: Options of the Python interface, which checks them.
SAMPLING = {
    "steps": "integer",
    "t_min": "number",
    "t_max": "number",
    "entropy_bound": "number",
    "stability_threshold": "integer",
    "confidence_threshold": "number",
    "max_steps": "integer",
}


@dataclass(frozen=True)
class Diffusion:
    """The field ``diffusion``: `frames` None, "text" or "tokens"; `sampling`: options of the Python interface;
    `time_limit`: seconds, the server's or less."""

    frames: str | None
    sampling: dict[str, Any]
    time_limit: float
    extra: dict[str, Any]

    @classmethod
    def read(
        cls, fields: Fields, time_limit: float, extra: Callable[[Fields], dict[str, Any]] | None = None
    ) -> Diffusion:
        """Args: `extra`: reads further keys."""
        given = fields.inside("diffusion")
        frames = given.take("frames", enum=[*FRAMES])
        if frames not in FRAMES or isinstance(frames, int) != isinstance(frames, bool):
            raise given.wrong("frames", 'false, true or "tokens"', frames)
        limit = given.number("time_limit_s", low=0)
        if limit == 0:
            raise given.wrong("time_limit_s", "above 0", limit)
        sampling = {name: given.take(name, type=kind) for name, kind in SAMPLING.items()}
        others = {} if extra is None else extra(given)
        given.no_more()
        return cls(
            "tokens" if frames == "tokens" else "text" if frames else None,
            {name: value for name, value in sampling.items() if value is not None},
            time_limit if limit is None else min(limit, time_limit),
            {name: value for name, value in others.items() if value is not None},
        )


def seed_of(fields: Fields, default: int | None = None) -> int:
    """The seed: absent, -1 and 4294967295 (llama-server's "random") draw one; other negatives count from 2^64. A
    temperature of 0 asks for the same answer each time: seed 0."""
    temperature = fields.peek("temperature")
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    if seed is None and default is None and temperature in (0, 0.0) and not isinstance(temperature, bool):
        return 0
    if seed is None and default is not None:
        return default
    if seed in (None, -1, 2**32 - 1):
        return secrets.randbits(53)  # what a page, whose numbers are floats, can hand back
    return seed % 2**64


@dataclass(frozen=True)
class How:
    """The fields that chat and completions have in common."""

    max_tokens: int
    warm_up: bool
    stop: list[str]
    seed: int
    n: int
    stream: bool
    include_usage: bool
    constraint: dict[str, Any]
    lora: dict[str, Any]
    diffusion: Diffusion

    @classmethod
    def read(cls, fields: Fields, service: Service, limits: Sequence[str], default: int) -> How:
        """Args: `limits`: names of the field that says how long the answer may be, the first present one counts."""
        settings = service.settings
        longest: int | None = None
        for name in limits:
            value = fields.integer(name, -1, 2**31 - 1)
            if value == 0 and name != "n_predict":
                raise fields.wrong(name, "at least 1, or -1", value)
            longest = value if longest is None else longest
        options = fields.inside("stream_options")
        return cls(
            max_tokens=min(default if longest in (None, -1, 0) else longest, settings.max_tokens),
            warm_up=longest == 0,
            stop=fields.strings("stop", MAX_STOPS, MAX_STOP),
            seed=seed_of(fields),
            n=fields.integer("n", 1, 4) or 1,
            stream=fields.boolean("stream"),
            include_usage=options.boolean("include_usage"),
            constraint=_constraint(fields),
            lora=lora_options(fields, service.model),
            diffusion=Diffusion.read(fields, settings.time_limit, _settle),
        )

    def limited(self, call: Callable[..., Any], left: float) -> Any:
        """The stream that `call` makes with these options, of at most `left` seconds. Of a warm-up, whose prompt goes
        into the cache, one step is made, and thrown away."""
        sampling = {**self.diffusion.sampling, "max_steps": 1} if self.warm_up else self.diffusion.sampling
        options = {**self.constraint, **self.lora, **sampling, **self.diffusion.extra}
        return call(max_tokens=self.max_tokens, stop=self.stop, time_limit_s=left, **options)

    def seeds(self) -> list[int]:
        """One for each of `n` choices."""
        return [(self.seed + i) % 2**64 for i in range(self.n)]


def _settle(fields: Fields) -> dict[str, Any]:
    return {"settle": fields.integer("settle", 1, 2**31 - 1)}


def _constraint(fields: Fields) -> dict[str, Any]:
    """What the answer must be, as an option of the Python interface; nothing where it may be any text."""
    form = fields.object("response_format")
    return {} if form is None or form.get("type") == "text" else {"response_format": form}


class Series:
    """Generations one after the other, as one piece of work for the engine.

    Args:
        makers: each makes a stream of the Python interface, told the seconds that are left.
        time_limit: seconds for all of them, counted from the first step.

    Its work yields (index, event) and returns the list of results.
    """

    def __init__(self, makers: Sequence[Callable[[float], Any]], time_limit: float) -> None:
        if len(makers) > MAX_GENERATIONS:
            raise ApiError(400, f"n x prompts is {len(makers)}, at most {MAX_GENERATIONS} are answered", param="n")
        self._makers = makers
        self._time_limit = time_limit
        # The first is made here, off the engine: its arguments are checked before the request waits.
        self._first = makers[0](time_limit)
        self._current: Any = self._first
        self._early = False

    def work(self) -> Generator[tuple[int, Any], None, list[Any]]:
        results = []
        began = time.monotonic()
        for index, make in enumerate(self._makers):
            left = self._time_limit - (time.monotonic() - began)
            if self._early or (index and left <= 0):
                break
            if index:
                self._current = make(left)
            with self._current as stream:
                for event in stream:
                    yield index, event
                results.append(stream.result)
        return results

    def cancel(self) -> None:
        """Ends the generation under way with what there is, from any thread."""
        self._early = True
        self._current.cancel()

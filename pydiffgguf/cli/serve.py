"""The command ``serve``: its arguments become the server's settings."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel
    from pydiffgguf.server.settings import Settings

__all__ = ["add_arguments", "run"]

INSTALL = "the server is an extra: in the source folder, pip install '.[server]'"


def add_arguments(sub: Any) -> None:
    """The arguments besides the model's own."""
    group = sub.add_argument_group("where it listens, and who may ask")
    group.add_argument("--host", metavar="ADDRESS", default="localhost", help="(localhost: 127.0.0.1 and ::1)")
    group.add_argument("--port", type=int, metavar="P", default=8080, help="(8080; 0: any free one)")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        default=[],
        help="a key that every request must bring; repeatable; also the environment's PYDIFFGGUF_API_KEY, which other "
        "users of this machine cannot see",
    )
    group.add_argument("--api-key-file", metavar="F", help="a file with one key a line")
    group.add_argument(
        "--allowed-host", action="append", metavar="NAME", default=[], help="a further name this server is called by"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        default=[],
        help="pages from there may ask, such as http://localhost:3000 (none)",
    )
    group.add_argument("--no-ui", action="store_true", help="without the page at /")
    group.add_argument("--metrics", action="store_true", help="counts at /metrics, for Prometheus")
    group = sub.add_argument_group("what it answers")
    group.add_argument(
        "--alias", action="append", metavar="NAME", default=[], help="the model's name in replies (the file's)"
    )
    group.add_argument("--sessions", type=int, metavar="N", default=2, help="requests under way, a KV cache each (2)")
    group.add_argument("--queue", type=int, metavar="N", default=32, help="requests that may wait (32)")
    group.add_argument(
        "--time-limit", type=float, metavar="S", default=600.0, help="seconds for an answer, waiting not counted (600)"
    )
    group.add_argument("--max-tokens", type=int, metavar="N", default=4096, help="longest answer, and default (4096)")
    group.add_argument("--infill-time-limit", type=float, metavar="S", default=10.0, help="the same for a gap (10)")
    group.add_argument("--infill-max", type=int, metavar="N", default=256, help="longest gap in tokens (256)")
    group.add_argument("--max-body", type=float, metavar="MIB", default=8.0, help="largest request (8)")
    group.add_argument(
        "--strict-params", action="store_true", help="refuse fields that have no effect, in place of naming them"
    )
    group.add_argument("--log-bodies", action="store_true", help="write the head of every request into the log")


def run(args: argparse.Namespace) -> int:
    import logging

    from pydiffgguf.errors import UnsupportedError

    try:
        from pydiffgguf.server.run import Serving, bind
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("starlette", "uvicorn", "anyio", "h11"):
            raise UnsupportedError(INSTALL) from None
        raise
    settings = _settings(args)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("pydiffgguf.server").setLevel(logging.INFO)
    if settings.log_bodies:
        logging.getLogger("pydiffgguf.server").warning("--log-bodies: the log holds what people write")
    sockets = bind(settings.host, settings.port)

    def open_it(told: Callable[[float], None]) -> DiffusionModel:
        from pydiffgguf.cli.commands import open_model

        model: DiffusionModel = open_model(args, progress=lambda part: told(part.done / max(part.total, 1)))
        return model

    return Serving(settings, open_it, sockets, lambda address: print(f"listening on {address}", flush=True)).run()


def _settings(args: argparse.Namespace) -> Settings:
    """Leaves through SystemExit(2) for what is out of range, or would let strangers in."""
    from pydiffgguf.server.settings import Settings, digest, is_loopback

    error = args.command.error
    for name, low, high in (
        ("port", 0, 65535),
        ("sessions", 1, 64),
        ("queue", 0, 4096),
        ("max_tokens", 1, 2**31 - 1),
        ("infill_max", 1, 4096),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            error(f"--{name.replace('_', '-')} is {value}: it must be from {low} to {high}")
    for name in ("time_limit", "infill_time_limit", "max_body"):
        if not 0 < getattr(args, name) < float("inf"):
            error(f"--{name.replace('_', '-')} must be above 0")
    keys = [*args.api_key]
    if os.environ.get("PYDIFFGGUF_API_KEY"):
        keys.append(os.environ["PYDIFFGGUF_API_KEY"])
    if args.api_key_file is not None:
        with open(args.api_key_file, encoding="utf-8") as lines:
            keys += [line.strip() for line in lines if line.strip()]
    if not all(keys) or (args.api_key_file is not None and not keys):
        error("an API key is empty")
    if not is_loopback(args.host) and not keys:
        error(f"--host {args.host} lets other machines ask: give --api-key, or --host localhost")
    for origin in args.cors_origin:
        if "://" not in origin or origin.endswith("/"):
            error(f"--cors-origin {origin}: it must be a scheme and a host, such as http://localhost:3000")
    return Settings(
        host=args.host,
        port=args.port,
        key_digests=tuple(digest(key) for key in keys),
        aliases=tuple(args.alias) or (_stem(args.model),),
        sessions=args.sessions,
        queue=args.queue,
        time_limit=args.time_limit,
        max_tokens=args.max_tokens,
        infill_time_limit=args.infill_time_limit,
        infill_max=args.infill_max,
        max_body=int(args.max_body * 2**20),
        allowed_hosts=tuple(args.allowed_host),
        cors_origins=tuple(args.cors_origin),
        metrics=args.metrics,
        page=not args.no_ui,
        strict_params=args.strict_params,
        log_bodies=args.log_bodies,
    )


def _stem(model: str) -> str:
    """The model's name where no --alias gives one."""
    name = model.removeprefix("hf:").replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(".gguf") or "model"

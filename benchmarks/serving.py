"""The server under load, on this machine's loopback address: ``python benchmarks/serving.py [--only PART ..]``.

It starts ``pydiffgguf serve`` with a model on a free port, asks in six ways one after the other, and ends its own
process. Needs the extras ``server`` and ``test``.

alone       one client: the server's own time of a reply, beside the engine's
keystrokes  gaps, alone and beside four chats that stream
mixed       64 clients: chats and gaps, some of which hang up; every text is compared with the one of its seed
many        10,000 short requests of every kind: memory
full        64 at once into a queue of 32
hostile     slow, oversized, malformed and half-closed connections, while others are served
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from pydiffgguf import DiffusionModel, demo_model_path

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("Which number comes after 3?", "Put in order: 9 0 5.", "Solve this Sudoku:\n42..\n1..4\n..42\n2.1.")
]
GAPS = [
    ("On Sunday Emma found a", " in the school. Emma gave the white cup to Mia.", 8),
    ("def add_scores(scores):\n    total = 0\n    for score in scores:\n        total", "\n    return total\n", 12),
]
SEEDS = range(4)
LONG = {"messages": [{"role": "user", "content": "Write a short poem"}], "max_tokens": 1800, "stream": True}


def percentile(values: list[float], share: float) -> float:
    """In milliseconds, of seconds; 0 of none."""
    return 1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def both(values: list[float]) -> dict[str, float]:
    return {
        "p10_ms": round(percentile(values, 0.1), 2),
        "p50_ms": round(percentile(values, 0.5), 2),
        "p99_ms": round(percentile(values, 0.99), 2),
        "n": len(values),
    }


class Server:
    """The process under test."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "pydiffgguf", "serve", str(model), "--port", "0", "--metrics"]
        # A pipe that nobody reads would stop the server when it is full.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://localhost:(\d+)", self.process.stdout.readline())
        assert found, "the server did not start"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def memory(self) -> float:
        """Resident MB; 0 where the system does not say."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        except OSError:
            return 0.0
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def files(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))
        except OSError:
            return 0

    def stop(self) -> str:
        """Ends it; returns its log."""
        self.process.terminate()
        self.process.communicate(timeout=20)
        self._log.seek(0)
        with self._log as log:
            return log.read()


async def at_rest(client: httpx.AsyncClient) -> bool:
    """Whether nothing waits or runs within five seconds."""
    for _ in range(100):
        text = (await client.get("/metrics")).text
        if "pydiffgguf_requests_waiting 0\n" in text and "pydiffgguf_requests_running 0\n" in text:
            return True
        await asyncio.sleep(0.05)
    return False


def chat_body(which: int, seed: int, stream: bool = False) -> dict[str, Any]:
    return {"messages": CHATS[which], "seed": seed, "max_tokens": 64, "stream": stream}


def gap_body(which: int, seed: int) -> dict[str, Any]:
    prefix, suffix, most = GAPS[which]
    return {"input_prefix": prefix, "input_suffix": suffix, "n_predict": most, "seed": seed}


def expected(model: Path) -> dict[str, str]:
    """The texts that a single caller of the Python interface gets."""
    texts = {}
    with DiffusionModel(model) as one:
        for seed in SEEDS:
            for i, messages in enumerate(CHATS):
                texts[f"chat {i} {seed}"] = one.chat(messages, seed=seed, max_tokens=64).text
            for i, (prefix, suffix, most) in enumerate(GAPS):
                texts[f"gap {i} {seed}"] = one.infill(prefix, suffix, max_gap=most, seed=seed).text
    return texts


class Plain:
    """One connection without a client library, whose own milliseconds would count as the server's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def of(cls, server: Server) -> Plain:
        return cls(*await asyncio.open_connection("127.0.0.1", server.port))

    def close(self) -> None:
        self._writer.close()

    async def ask(self, path: str, body: Any = None) -> tuple[float, Any]:
        """Seconds, and the answer."""
        took, status, answer = await self.answer(path, body)
        assert status == 200, answer
        return took, answer

    async def answer(self, path: str, body: Any = None) -> tuple[float, int, Any]:
        """Seconds, the status, and the answer."""
        content = b"" if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        began = time.perf_counter()
        self._writer.write(head.encode() + content)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", answer)
        assert found is not None, answer
        whole = await self._reader.readexactly(int(found[1]))
        return time.perf_counter() - began, int(answer[9:12]), json.loads(whole)


async def alone(server: Server, rounds: int) -> dict[str, Any]:
    """What the server adds to the engine's time, which each reply tells."""
    plain = await Plain.of(server)
    await plain.ask("/v1/chat/completions", chat_body(0, 0))  # the first makes what all others use
    health, own = [], []
    for i in range(rounds):
        health.append((await plain.ask("/health"))[0])
        took, body = await plain.ask("/v1/chat/completions", chat_body(0, i))
        own.append(took - (body["timings"]["prompt_ms"] + body["timings"]["predicted_ms"]) / 1000)
    plain.close()
    return {"health": both(health), "own_time_of_a_chat": both(own)}


async def keystrokes(server: Server, client: httpx.AsyncClient, rounds: int) -> dict[str, Any]:
    """The client library streams the chats; the gaps go without it."""
    plain = await Plain.of(server)

    async def gaps() -> tuple[list[float], list[float]]:
        times, own = [], []
        for _ in range(rounds):
            took, body = await plain.ask("/infill", gap_body(0, 0))
            assert body["content"] == " white cup", body
            times.append(took)
            own.append(took - (body["timings"]["prompt_ms"] + body["timings"]["predicted_ms"]) / 1000)
        return times, own

    steps: list[float] = []

    async def chat(stop: asyncio.Event) -> int:
        finished = 0
        while not stop.is_set():
            async with client.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                async for line in answer.aiter_lines():
                    if '"timings"' in line:
                        steps.append(json.loads(line[6:])["timings"]["diffusion_step_ms"])
                    if stop.is_set():
                        break
                finished += not stop.is_set()
        return finished

    quiet, own = await gaps()
    stop = asyncio.Event()
    chats = [asyncio.create_task(chat(stop)) for _ in range(4)]
    await asyncio.sleep(0.5)
    busy, _ = await gaps()
    stop.set()
    finished = sum(await asyncio.gather(*chats))
    plain.close()
    return {
        "alone": both(quiet),
        "own_time_of_a_gap": both(own),
        "beside_four_chats": both(busy),
        "chats_finished": finished,
        "step_of_these_chats_ms": round(sum(steps) / len(steps), 2) if steps else None,
    }


async def mixed(server: Server, client: httpx.AsyncClient, seconds: float, texts: dict[str, str]) -> dict[str, Any]:
    """64 clients. A quarter of the requests hang up at a random moment."""
    count: Counter[str] = Counter()
    times: list[float] = []
    until = time.monotonic() + seconds
    before = (server.memory(), server.files())

    async def one(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            seed, kind = draw.choice(SEEDS), draw.choice(("chat", "chat stream", "gap", "hang up"))
            began = time.perf_counter()
            which = draw.randrange(len(GAPS) if kind == "gap" else len(CHATS))
            try:
                if kind == "hang up":
                    limit = draw.uniform(0.0, 0.3)
                    await client.post("/v1/chat/completions", json=chat_body(which, seed), timeout=limit)
                    text = None
                elif kind == "chat stream":
                    text = await streamed(client, chat_body(which, seed, True))
                elif kind == "chat":
                    answer = await client.post("/v1/chat/completions", json=chat_body(which, seed))
                    text = read(answer, lambda body: body["choices"][0]["message"]["content"])
                else:
                    headers = {"x-client-id": str(number)}
                    answer = await client.post("/infill", json=gap_body(which, seed), headers=headers)
                    text = read(answer, lambda body: body["content"])
            except httpx.TimeoutException:
                count["hung up"] += 1
                continue
            if text is None:
                count["busy or not compared"] += 1
                await asyncio.sleep(0.05)
                continue
            times.append(time.perf_counter() - began)
            count["right" if text == texts[f"{kind.split()[0]} {which} {seed}"] else "WRONG"] += 1

    await asyncio.gather(*(one(number) for number in range(64)))
    rest = await at_rest(client)
    await asyncio.sleep(6)  # idle connections are closed by then
    after = (server.memory(), server.files())
    return {
        "seconds": seconds,
        **count,
        "answers": both(times),
        "at_rest_afterwards": rest,
        "memory_MB": [round(before[0], 1), round(after[0], 1)],
        "open_files": [before[1], after[1]],
    }


def read(answer: httpx.Response, text: Any) -> str | None:
    """The answer's text; None where the queue was full."""
    if answer.status_code == 429:
        return None
    assert answer.status_code == 200, answer.text
    return str(text(answer.json()))


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> str | None:
    parts = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code == 429:
            return None
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    parts.append(choice["delta"].get("content") or "")
    return "".join(parts)


async def many(server: Server, client: httpx.AsyncClient, requests: int) -> dict[str, Any]:
    """Short requests of every kind, eight at a time: whether memory grows."""
    kinds: list[tuple[str, Any]] = [
        ("/tokenize", {"content": "hello"}),
        ("/v1/completions", {"prompt": "def ", "max_tokens": 4, "diffusion": {"max_steps": 1}}),
        ("/v1/chat/completions", {**chat_body(0, 1, True), "diffusion": {"max_steps": 2, "frames": "tokens"}}),
        ("/apply-template", {"messages": CHATS[0]}),
        ("/v1/completions", {"prompt": 5}),
        ("/nothing", {}),
    ]
    left = iter(range(requests))
    at_tenth: list[float] = []

    async def one() -> None:
        for i in left:
            path, body = kinds[i % len(kinds)]
            await client.post(path, json=body)
            if i == requests // 10:
                at_tenth.append(server.memory())

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(8)))
    took = time.perf_counter() - began
    memory = [round(at_tenth[0], 1), round(server.memory(), 1)]
    return {"requests": requests, "per_second": round(requests / took), "memory_MB_at_a_tenth_and_at_the_end": memory}


async def full(server: Server) -> dict[str, Any]:
    """64 connections that are open already ask in the same moment; then, while the queue is full, one asks and asks."""
    count: Counter[int] = Counter()
    refused: list[float] = []
    answers: list[Any] = []
    slow = {**LONG, "stream": False, "max_tokens": 128, "diffusion": {"steps": 150, "confidence_threshold": 0.0}}

    async def one(seed: int) -> None:
        plain = await Plain.of(server)
        everybody.set() if len(answers) == 63 else answers.append(None)
        await everybody.wait()
        took, status, _ = await plain.answer("/v1/chat/completions", {**slow, "seed": seed})
        count[status] += 1
        if status == 429:
            refused.append(took)

    everybody = asyncio.Event()
    all_of_them = asyncio.gather(*(one(seed) for seed in range(64)))
    await asyncio.sleep(0.3)
    again: list[float] = []
    plain = await Plain.of(server)
    for _ in range(500):
        took, status, _ = await plain.answer("/v1/chat/completions", slow)
        if status != 429:
            break
        again.append(took)
    await all_of_them
    return {"statuses": dict(count), "refused_at_once": both(refused), "refused_one_by_one": both(again)}


async def hostile(server: Server, client: httpx.AsyncClient) -> dict[str, Any]:
    """100 connections that send nothing or drop by drop, and others; everybody else is served meanwhile."""
    sent = [
        b"",
        b"GET /health HTTP/1.1\r\nHost: lo",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
    ]
    sent += [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"]
    held = []
    for i in range(100):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent[i % len(sent)])
        half_closed = i % 7 == 0
        if half_closed:
            writer.write_eof()
        held.append((reader, writer, half_closed))
    times = []
    for i in range(200):
        began = time.perf_counter()
        answer = await client.post("/tokenize", json={"content": "hello"})
        assert answer.status_code == 200
        times.append(time.perf_counter() - began)
        if i % 50 == 0:  # each slow sender gives one byte more
            for _, writer, half_closed in held[::5]:
                if not half_closed and not writer.is_closing():
                    writer.write(b"x")
    began = time.perf_counter()
    await asyncio.wait_for(asyncio.gather(*(closed(reader) for reader, _, _ in held)), 40)
    for _, writer, _ in held:
        writer.close()
    return {"others": both(times), "all_closed_after_s": round(time.perf_counter() - began, 1)}


async def closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(65536):
            pass
    except ConnectionError:
        pass


async def run(model: Path, seconds: float, only: list[str]) -> dict[str, Any]:
    texts = expected(model)
    server = Server(model)
    try:
        limits = httpx.Limits(max_connections=80, max_keepalive_connections=80)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits) as client:
            found: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
            parts = {
                "alone": lambda: alone(server, 200),
                "keystrokes": lambda: keystrokes(server, client, 60),
                "mixed": lambda: mixed(server, client, seconds, texts),
                "many": lambda: many(server, client, 10_000),
                "full": lambda: full(server),
                "hostile": lambda: hostile(server, client),
            }
            for name in only or parts:
                found[name] = await parts[name]()
                print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    finally:
        log = server.stop()
    found["tracebacks"] = log.count("Traceback")
    found["requests"] = len(re.findall(r" req_[0-9a-f]+ ", log))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="a GGUF file (the demo model)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the mixed load (60)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="some of the parts above")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures there, too")
    args = parser.parse_args()
    found = asyncio.run(run(args.model, args.seconds, args.only))
    text = json.dumps(found, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The command ``pydiffgguf serve`` as a process: what it prints, refuses, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

SERVE = [sys.executable, "-m", "pydiffgguf", "serve", "demo"]


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address, once it says that it listens."""
    process = subprocess.Popen(
        [*SERVE, "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"listening on (http://localhost:\d+)\n", line)
        assert found, line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_listens_answers_and_ends_on_a_signal(number: signal.Signals) -> None:
    """With exit code 0, and one line a request on stderr."""
    with serving() as (process, url):
        assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
        process.send_signal(number)
        out, err = process.communicate(timeout=15)
        assert process.returncode == 0 and out == ""
        assert re.search(r"GET /health 200 [\d.]+ ms", err) and "Traceback" not in err


def test_what_runs_is_answered_before_it_ends() -> None:
    """A stream that is under way when the signal comes ends as streams end."""
    with serving() as (process, url):
        body = {"prompt": "def ", "max_tokens": 256, "stream": True, "diffusion": {"frames": True}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert list(lines)[-2] == "data: [DONE]"
        process.wait(15)
        assert process.returncode == 0


def test_a_second_signal_ends_it_at_once() -> None:
    """Whatever runs."""
    with serving() as (process, url):
        body = {"prompt": "def ", "max_tokens": 1900, "stream": True, "diffusion": {"steps": 2000}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30, trust_env=False):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            process.wait(4)  # less than the five seconds that a first signal gives
        assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "give --api-key"),
        (["--port", "99999"], "--port is 99999: it must be from 0 to 65535"),
        (["--sessions", "0"], "--sessions is 0"),
        (["--time-limit", "0"], "--time-limit must be above 0"),
        (["--api-key", ""], "an API key is empty"),
        (["--cors-origin", "example.org"], "--cors-origin example.org"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    """Nothing listens then."""
    done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_the_model_is_read() -> None:
    """One line with address and port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*SERVE, "--port", str(port)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and str(port) in done.stderr and done.stderr.count("\n") == 1


def test_a_model_that_cannot_be_opened_ends_it() -> None:
    """With the reason on one line."""
    done = subprocess.run(
        [sys.executable, "-m", "pydiffgguf", "serve", "nothing.gguf", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and "nothing.gguf" in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_it_says_how_to_install_it() -> None:
    """The rest of the command line works without."""
    script = (
        "import sys; sys.modules['starlette'] = None; sys.modules['uvicorn'] = None\n"
        "from pydiffgguf.cli import main; sys.exit(main(['serve', 'demo.gguf']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "pydiffgguf: error: the server is an extra: in the source folder, pip install '.[server]'\n"


def test_other_commands_import_nothing_of_the_server() -> None:
    """Its libraries are an extra, and cost no other command time."""
    script = (
        "import sys\nfrom pydiffgguf.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in ('starlette', 'uvicorn', 'asyncio')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_key_may_come_from_the_environment() -> None:
    """Where no other user of the machine sees it in a list of processes."""
    os.environ["PYDIFFGGUF_API_KEY"] = "secret"
    try:
        with serving() as (_, url), httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    finally:
        del os.environ["PYDIFFGGUF_API_KEY"]

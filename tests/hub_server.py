"""A hub on loopback, for as much of its protocol as downloading takes: the list of a repository's files, and the files.

Run as a program, this file resolves names against the hub that HF_ENDPOINT names, as JSON lines: a process of its own,
because huggingface_hub reads its environment once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789" * 4


@dataclass
class Repo:
    """A repository. `access`: "public", "gated" (the list is open, the files are not), "private", or "broken" (the
    server answers 503). `token`: what opens a private or gated one."""

    files: dict[str, bytes]
    access: str = "public"
    token: str = "hf_right"


@dataclass
class Hub:
    """`requests`: method and path of everything that was asked for, in order."""

    repos: Mapping[str, Repo]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def downloaded(self) -> list[str]:
        """The files that were fetched, in order."""
        return [
            r.split("/resolve/")[1].partition("/")[2]
            for r in self.requests
            if r.startswith("GET /") and "/resolve/" in r and r.count(" ") == 1
        ]


@contextmanager
def serve(repos: Mapping[str, Repo]) -> Iterator[Hub]:
    """Serves on a free port of 127.0.0.1 until the block ends."""
    hub = Hub(repos)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/").split("/")
            listing = path[:2] == ["api", "models"]
            owner_name = path[2:4] if listing else path[:2]
            repo = hub.repos.get("/".join(owner_name))
            if repo is not None and repo.access == "broken":
                return self.answer(503)
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if repo is None or (repo.access == "private" and given != repo.token):
                return self.answer(401, X_Error_Code="RepoNotFound")
            rest = path[4:] if listing else path[2:]  # tree/REVISION, revision/REVISION, resolve/REVISION/FILE...
            if rest[1:] and rest[1] not in ("main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if listing:
                return self.list_files(repo, rest)
            if repo.access == "gated" and given != repo.token:
                return self.answer(403, X_Error_Code="GatedRepo")
            content = repo.files.get("/".join(rest[2:]))
            if content is None:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            etag = hashlib.sha256(content).hexdigest()
            if wanted := self.headers.get("Range"):
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                hub.requests[-1] += f" {first}-{last}"
                content = content[first : last + 1]
                return self.answer(206, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        def list_files(self, repo: Repo, rest: list[str]) -> None:
            if rest[:1] == ["tree"]:
                value: Any = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in repo.files.items()
                ]
            else:
                value = {"id": "x/y", "sha": COMMIT, "siblings": [{"rfilename": name} for name in repo.files]}
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(url: str, home: Path, **changes: str) -> dict[str, str]:
    """The environment of a process whose hub is at `url` and whose cache is in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **changes,
    }


def resolve(url: str, home: Path, *specs: str, source: bool = False, **changes: str) -> list[dict[str, Any]]:
    """What `resolve_model` (or `resolve_source`) makes of each name: {"path"} or {"error", "message"}, and
    "warnings"."""
    command = [sys.executable, __file__, "resolve_source" if source else "resolve_model", *specs]
    run = subprocess.run(command, env=environment(url, home, **changes), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def main(function: str, specs: list[str]) -> None:
    from pydiffgguf import hub

    for spec in specs:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = {"path": str(getattr(hub, function)(spec))}
            except Exception as error:
                result = {"error": type(error).__name__, "message": str(error)}
        ours = [str(w.message) for w in caught if "hub" in str(w.message)]
        print(json.dumps({**result, "warnings": ours}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Who may ask, from where, and how much: the lines of docs/SERVER.md's security list."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from serving import QUESTION, Running, read_all, running, soon

from pydiffgguf.server.guard import POLICY
from pydiffgguf.server.settings import digest, is_loopback

KEY = "a-kéy"


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    """Asks for a key, lets one other site in, waits a second for heads and bodies."""
    with running(
        key_digests=(digest(KEY), digest("second")),
        cors_origins=("http://friend.example",),
        allowed_hosts=("desk.lan",),
        max_body=20_000,
        arrival=1.0,
        connections=12,
    ) as one:
        yield one


def key(**headers: str) -> dict[str, str | bytes]:
    return {"Authorization": f"Bearer {KEY}".encode(), **headers}


def head(*lines: str) -> bytes:
    return "\r\n".join(["GET /health HTTP/1.1", *lines, "Connection: close", "", ""]).encode()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("desk.lan", 403),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.5", 403),
        ("", 403),
    ],
)
def test_only_the_servers_own_names_are_hosts(server: Running, host: str, status: int) -> None:
    """A name that an attacker's DNS points here is turned away."""
    assert server.client.get("/health", headers={"Host": host}).status_code == status


def test_two_hosts_or_none_are_refused(server: Running) -> None:
    """Proxies and servers differ over which of two counts."""
    two = server.raw(head("Host: localhost", "Host: evil.example"))
    none = server.raw(head())
    assert two.split()[1] in (b"400", b"403") and none.split()[1] in (b"400", b"403")
    assert b'"ok"' not in two + none


def test_a_further_host_can_be_allowed(locked: Running) -> None:
    """--allowed-host lets one in."""
    assert locked.client.get("/health", headers={"Host": "desk.lan:80"}).status_code == 200


def test_ip_literals_are_hosts_of_a_server_that_listens_everywhere() -> None:
    """Bound to other than loopback, numbers are let in: a name cannot be rebound to them."""
    with running(host="0.0.0.0", key_digests=(digest("k"),)) as everywhere:
        ask = everywhere.client.get
        assert ask("/health", headers={"Host": "192.168.1.5:8080"}).status_code == 200
        assert ask("/health", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "https://localhost", "http://localhost:1", "file://"]
)
def test_pages_of_other_origins_are_refused(server: Running, origin: str) -> None:
    """Whatever they ask for, before the body is read."""
    answer = server.post("/v1/chat/completions", {"messages": QUESTION}, Origin=origin)
    assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
    assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_page_may_ask(server: Running) -> None:
    """Its Origin is this scheme and Host."""
    answer = server.post("/tokenize", {"content": "a"}, Origin=f"http://localhost:{server.port}")
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_a_form_of_a_page_is_refused(server: Running) -> None:
    """text/plain needs no preflight, so a page's POST must say JSON."""
    headers = {"Origin": f"http://localhost:{server.port}", "Content-Type": "text/plain"}
    answer = server.client.post("/tokenize", content='{"content":"a"}', headers=headers)
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("site", "status"), [("none", 200), ("same-origin", 200), ("cross-site", 403), ("same-site", 403)]
)
def test_fetches_of_other_sites_are_refused(server: Running, site: str, status: int) -> None:
    """Sec-Fetch-Site, which a page cannot forge."""
    assert server.client.get("/health", headers={"Sec-Fetch-Site": site}).status_code == status


def test_a_link_to_the_page_may_be_followed(server: Running) -> None:
    """A top-level navigation from elsewhere shows the page, and nothing else."""
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.client.get("/", headers=headers).status_code == 200
    assert server.client.get("/", headers={**headers, "Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert server.client.get("/props", headers=headers).status_code == 403


def test_a_listed_origin_gets_cors_headers(locked: Running) -> None:
    """That one origin, no credentials, no star; with the preflight that comes before the key."""
    origin = "http://friend.example"
    preflight = locked.client.options("/v1/models", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == origin
    answer = locked.client.get("/v1/models", headers=key(Origin=origin))
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["vary"] == "Origin" and "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Basic {KEY}".encode()}, 401),
        ({"Authorization": "Bearer \xff\xfe".encode("latin-1")}, 401),
        ({"Authorization": f"Bearer {KEY}".encode()}, 200),
        ({"Authorization": "bearer second"}, 200),
        ({"x-api-key": "second"}, 200),
    ],
)
def test_the_key_is_asked_for(locked: Running, headers: dict[str, str], status: int) -> None:
    """As Bearer or x-api-key; bytes that are no ASCII are a wrong key, not a crash."""
    answer = locked.client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"


def test_health_and_the_page_need_no_key(locked: Running) -> None:
    """Everything else does."""
    for path in ("/health", "/v1/health", "/", "/ui/app.js", "/ui/app.css"):
        assert locked.client.get(path).status_code == 200, path
    for path in ("/props", "/v1/models", "/lora-adapters", "/ui", "/nothing"):
        assert locked.client.get(path).status_code == 401, path


def test_without_a_key_any_authorization_is_taken(server: Running) -> None:
    """llama.vim sends an empty Bearer in any case."""
    assert server.client.get("/v1/models", headers={"Authorization": "Bearer"}).status_code == 200


def test_a_key_never_reaches_the_log(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does a body, an answer or a query; control characters are escaped."""
    with caplog.at_level("INFO", logger="pydiffgguf.server"):
        answer = locked.client.get("/v1/models/%0aINJECTED?secret=query", headers=key())
        assert answer.status_code == 404
        locked.client.post("/tokenize", json={"content": "my diary"}, headers=key())
        assert soon(lambda: "/tokenize" in caplog.text)
    assert answer.headers["x-request-id"] in caplog.text
    assert not {word for word in (KEY, "secret", "diary", "\nINJECTED") if word in caplog.text}


def test_a_large_body_is_refused_whatever_its_length_says(locked: Running) -> None:
    """By its Content-Length, or as it comes in chunks."""
    body = b'{"content":"' + b"x" * 30_000 + b'"}'
    for content in (body, iter([body[:10_000], body[10_000:]])):
        answer = locked.client.post("/tokenize", content=content, headers=key())
        assert answer.status_code == 413 and answer.json()["error"]["type"] == "invalid_request_error"


def test_large_headers_are_refused(server: Running) -> None:
    """Also where they came in one piece, which the HTTP library lets through."""
    assert server.client.get("/health", headers={"X-Long": "x" * 33_000}).status_code == 431


def test_a_body_that_does_not_come_ends_in_408(locked: Running) -> None:
    """After the time for it; others are served meanwhile."""
    with locked.connect() as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nx-api-key: second\r\nContent-Length: 100\r\n\r\n{")
        assert locked.client.get("/health").status_code == 200
        sock.settimeout(5)
        assert b" 408 " in read_all(sock).splitlines()[0]


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_silent_connection_is_closed(locked: Running, sent: bytes) -> None:
    """Nothing sent, half a line, half a head."""
    began = time.monotonic()
    assert locked.raw(sent) == b""
    assert time.monotonic() - began < 6


def test_a_head_that_trickles_after_a_reply_is_closed(locked: Running) -> None:
    """The library's own timer ends with the first byte of the next request."""
    with locked.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sock.settimeout(5)
        got = b""
        while b'{"status":"ok"}' not in got:
            got += sock.recv(65536)
        sock.sendall(b"GET")
        assert read_all(sock) == b""


def test_connections_beyond_the_limit_are_closed(locked: Running) -> None:
    """And those within it are served."""
    held = [locked.connect() for _ in range(40)]
    try:
        answered = 0
        for sock in held:
            sock.settimeout(3)
            try:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answered += b"200 OK" in read_all(sock)
            except (ConnectionError, BrokenPipeError):
                pass
        assert 1 <= answered <= 12
    finally:
        for sock in held:
            sock.close()
    assert soon(lambda: _healthy(locked))


def _healthy(one: Running) -> bool:
    try:
        return one.client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/9.9\r\nConnection: close\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_http_ends_its_connection_alone(server: Running, garbage: bytes) -> None:
    """The server goes on."""
    server.raw(garbage)
    assert server.client.get("/health").status_code == 200


def test_a_half_closed_connection_still_gets_its_answer(server: Running) -> None:
    """A client that ends its own side has asked nevertheless."""
    with server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(5)
        assert b'{"status":"ok"}' in read_all(sock)


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/ui/../guard.py",
        "/ui/%2e%2e/guard.py",
        "/ui/app.js/../../x",
        "//etc/passwd",
        "/ui/guard.py",
    ],
)
def test_no_path_reaches_the_file_system(server: Running, path: str) -> None:
    """The page's files are a fixed table."""
    raw = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert raw.split()[1] == b"404"


def test_every_answer_has_the_safe_headers(server: Running) -> None:
    """Errors too; the page has its policy besides, and no answer names the server's software."""
    for path in ("/", "/health", "/nothing", "/ui/app.js"):
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers
    assert server.client.get("/").headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("desk", False),
    ],
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    """Any other name may be anybody's address."""
    assert is_loopback(host) == loopback


def test_both_loopback_addresses_answer(server: Running) -> None:
    """Programs that write localhost try one or the other first."""
    for host in ("127.0.0.1", "[::1]"):
        if host == "[::1]" and not _has_ipv6():
            continue
        answer = httpx.get(f"http://{host}:{server.port}/health", trust_env=False)
        assert json.loads(answer.content) == {"status": "ok"}


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True

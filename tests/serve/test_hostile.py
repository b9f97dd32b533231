"""What no proper client sends: slow and endless heads and bodies, broken HTTP, odd paths and headers."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from serve import limits, protocol
from tests.serve.http import wait_until
from tests.serve.test_bad_input import JSON, problem


@pytest.fixture
def raw(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=60) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict[str, object]]:
    """Return status and problem of an answer after which the connection is closed."""
    received = bytearray()
    while chunk := connection.recv(2**16):
        received += chunk
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, head
    assert b"connection: close" in head.lower()
    told = json.loads(body)
    assert told["status"] == int(head.split()[1])
    assert told["request_id"].encode() in head
    return told["status"], told


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n", b"\r\n\r\n"])
def test_a_slow_head(
    raw: socket.socket, monkeypatch: pytest.MonkeyPatch, client: httpx.Client, sent: bytes
) -> None:
    raw.close()
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=60) as slow:
        slow.sendall(sent)
        status, told = answer(slow)
    assert status == 408
    assert "headers took longer" in str(told["detail"])


def test_a_slow_second_head(raw: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
    assert raw.recv(2**16).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    raw.sendall(b"GET /health/li")
    assert answer(raw)[0] == 408


def test_a_slow_body(raw: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.3)
    raw.sendall(b"POST /recommend HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{")
    status, told = answer(raw)
    assert (status, told["instance"]) == (408, "/recommend")


@pytest.mark.slow
def test_a_body_that_nobody_wants(raw: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered before it was all there; it may not go on for ever, not even a byte at a time."""
    monkeypatch.setattr(protocol, "UNWANTED_S", 0.3)
    raw.sendall(b"PUT /catalog HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
    assert b" 401 " in raw.recv(2**16)

    def is_closed() -> bool:
        try:
            raw.sendall(b"x")
        except OSError:
            return True
        time.sleep(0.05)
        return False

    wait_until(is_closed)


def test_endless_headers(raw: socket.socket, client: httpx.Client) -> None:
    raw.sendall(b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(7000)))
    status, told = answer(raw)
    assert (status, "longer than 65536" in str(told["detail"])) == (431, True)
    assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://x HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"POST /recommend HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /recommend HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /recommend HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=[
        "words",
        "version",
        "bytes",
        "no-path",
        "connect",
        "header",
        "null",
        "smuggle",
        "minus",
        "huge",
        "tls",
    ],
)
def test_what_is_not_http(raw: socket.socket, client: httpx.Client, sent: bytes) -> None:
    raw.sendall(sent)
    assert answer(raw)[0] in (400, 404, 408)
    assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/recommend/%00",
        "/%ff%fe",
        "/recommend/",
        "//recommend",
        "/RECOMMEND",
        "/catalog/..%2f..%2fmodel",
        "/" + "a" * 60_000,
        "/docs/../metrics/x",
        "/%0d%0aset-cookie:%20a=b",
    ],
)
def test_paths(client: httpx.Client, path: str) -> None:
    request = client.build_request("POST", "/x", json={})
    request.url = request.url.copy_with(raw_path=path.encode())
    response = client.send(request)
    assert "set-cookie" not in response.headers
    problem(response, 404)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "json" * 1000},
        {"x-request-id": "x" * 5000},
        {"x-request-id": b"\xff\xfe"},
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": "Bearer " + "x" * 50_000},
        {
            "upgrade": "websocket",
            "connection": "upgrade",
            "sec-websocket-key": "x",
            "sec-websocket-version": "13",
        },
        {"expect": "100-continue"},
        {"host": "evil.example"},
        {"cookie": "a=b;" * 5000},
        {"range": "bytes=0-1"},
        {"accept-encoding": "\x7f"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_headers(client: httpx.Client, headers: dict[str, str]) -> None:
    body = json.dumps({"history": ["i1"], "k": "wrong"}).encode()
    response = client.post("/recommend", content=body, headers=JSON | headers)  # type: ignore[arg-type]
    assert "k" in problem(response, 422) if response.status_code != 400 else True
    assert response.headers.get_list("x-request-id")[0].isascii()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"history":["' + b'i1","' * 1_000_000 + b'i1"]}', 413),
        (b'{"history":["' + b'i1","' * 150_000 + b'i1"]}', 422),
        (b'{"history_titles":["' + b"x" * 2_000_000 + b'"]}', 422),
        (b'{"history":["i1"],"k":NaN}', 422),
        (b'{"history":["i1"],"k":Infinity}', 422),
        (b'{"history":["i1"],"k":1e400}', 422),
        (b'{"history":["i1"],"k":' + b"9" * 400 + b"}", 422),
        (b'{"history":["i1"],"k":-0}', 422),
        (b'{"history":["i1"],"filters":{"a":{"min":NaN}}}', 422),
        (b'{"history":["i1"],"filters":{"a":{"min":1e400}}}', 422),
        (b'{"history":["i1"],"filters":{"a":{"min":' + b"9" * 4000 + b"}}}", 422),
        (b'{"history":["\\u0000"],"k":1}', 200),
        (b'\xef\xbb\xbf{"history":["i1"]}', 400),
        (b'{"history":["i1"]} {}', 400),
        ('{"history":["i1"]}'.encode("utf-16"), 400),
    ],
    ids=lambda value: value[:24].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_bodies(client: httpx.Client, body: bytes, status: int) -> None:
    response = client.post("/recommend", content=body, headers=JSON)
    if status == 200:
        assert response.status_code == 200, response.text
    else:
        problem(response, status)


def test_requests_one_after_another_on_one_connection(raw: socket.socket) -> None:
    """Pipelined: every one is answered, in order."""
    one = b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-request-id: %d\r\n\r\n"
    raw.sendall(b"".join(one % n for n in range(50)))
    received = b""
    until = time.monotonic() + 60
    while received.count(b"HTTP/1.1 200") < 50 and time.monotonic() < until:
        received += raw.recv(2**16)
    places = [received.index(b"x-request-id: %d\r\n" % n) for n in range(50)]
    assert places == sorted(places)


def test_who_does_not_read_is_left(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WRITE_S", 0.2)
    port, asked, received = client.base_url.port or 0, 2000, bytearray()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        ends = ("127.0.0.1", port), connection.getsockname()

        def held() -> bool:
            return ends in [(each.laddr, each.raddr) for each in psutil.Process().net_connections("tcp4")]

        wait_until(held)
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * asked)
        wait_until(lambda: not held())
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(2**16):
                received += chunk
    assert 0 < received.count(b"HTTP/1.1 200") < asked


def test_many_idle_connections_keep_nobody_out(client: httpx.Client) -> None:
    idle = [socket.create_connection(("127.0.0.1", client.base_url.port or 0)) for _ in range(200)]
    assert client.post("/recommend", json={"history": ["i1"]}).status_code == 200
    for connection in idle:
        connection.close()
    wait_until(lambda: client.get("/health/live").status_code == 200)

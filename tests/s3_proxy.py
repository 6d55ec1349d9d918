"""A way to an S3 server on which things go wrong: connections are cut, answers lost, bytes and headers changed.

Signatures cover what a client sends, so that only answers can be changed unseen; the server notices changed bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

_TIMEOUT_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]

    @property
    def path(self) -> str:
        return urllib.parse.unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, str]:
        text = self.target.partition("?")[2]
        return dict(urllib.parse.parse_qsl(text, keep_blank_values=True))

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    @property
    def kind(self) -> str:
        """What is asked for, in a word or two: ``put``, ``part``, ``create``, ``complete``, ``retain``, ``head``…"""
        for name in ("retention", "object-lock", "versioning", "versions", "uploads"):
            if name in self.query:
                return f"{self.method.lower()} {name}"
        if "uploadId" in self.query:
            return {"PUT": "part", "POST": "complete", "DELETE": "abort"}[self.method]
        return "list" if "list-type" in self.query else self.method.lower()


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def without(self, *names: str) -> Answer:
        kept = tuple((key, value) for key, value in self.headers if key.lower() not in names)
        return dataclasses.replace(self, headers=kept)

    def having(self, name: str, value: str) -> Answer:
        changed = self.without(name.lower())
        return dataclasses.replace(changed, headers=(*changed.headers, (name, value)))


@dataclasses.dataclass(slots=True)
class Rule:
    """What happens to the next ``times`` requests of a kind (a prefix of it; empty: to all).

    ``cut_request_at``: the connection breaks after so many bytes of its body. ``instead``: an answer that the server
    is not asked for. ``change_body``: before it is passed on. ``answer``: what becomes of the server's; None: it is
    lost. ``cut_answer_at``: so many bytes of the answer's body come through.
    """

    kind: str = ""
    times: int = 1
    path: str = ""
    cut_request_at: int | None = None
    instead: Answer | None = None
    change_body: Callable[[bytes], bytes] | None = None
    answer: Callable[[Answer], Answer | None] | None = None
    cut_answer_at: int | None = None

    def takes(self, request: Request) -> bool:
        if self.times == 0 or not request.kind.startswith(self.kind) or self.path not in request.path:
            return False
        self.times -= 1
        return True


def error(status: int, code: str, message: str = "") -> Answer:
    told = f"<Message>{message}</Message>" if message else ""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code>{told}</Error>'.encode() if code else b""
    return Answer(status, (("Content-Type", "application/xml"),), body)


class Proxy:
    """Listens on a port of its own. ``rules`` are asked in order; ``requests`` are all that came."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.rules: list[Rule] = []
        self.requests: list[Request] = []
        self._upstream = port
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"

    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(_TIMEOUT_SECONDS)
        # Clients may go away at any time.
        with contextlib.suppress(OSError, ValueError), self._secured(connection) as secured:
            self._converse(secured)

    def _secured(self, connection: socket.socket) -> socket.socket:
        return self._tls.wrap_socket(connection, server_side=True) if self._tls else connection

    def _converse(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as incoming:
            while (request := _read_head(incoming)) is not None:
                if not self._exchange(connection, incoming, request):
                    # Reset, so that the client notices at once.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return

    def _exchange(self, connection: socket.socket, incoming: BinaryIO, request: Request) -> bool:
        """False: the connection breaks now."""
        with self._lock:
            self.requests.append(request)
            rule = next((rule for rule in self.rules if rule.takes(request)), Rule())
        if request.header("Expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(request.header("Content-Length") or 0)
        if rule.cut_request_at is not None and length > rule.cut_request_at:
            incoming.read(rule.cut_request_at)
            return False
        body = incoming.read(length)
        if rule.change_body is not None:
            body = rule.change_body(body)
        answer: Answer | None = rule.instead or self._pass_on(request, body)
        if rule.answer is not None and answer is not None:
            answer = rule.answer(answer)
        if answer is None:
            return False
        return _write(connection, request, answer, rule.cut_answer_at)

    def _pass_on(self, request: Request, body: bytes) -> Answer:
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=_TIMEOUT_SECONDS)
        try:
            upstream.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            found = upstream.getresponse()
            return Answer(found.status, tuple(found.getheaders()), found.read())
        finally:
            upstream.close()


@contextlib.contextmanager
def proxy_to(port: int, rules: Sequence[Rule] = (), tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    proxy = Proxy(port, tls)
    proxy.rules.extend(rules)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def _read_head(incoming: BinaryIO) -> Request | None:
    first = incoming.readline().decode("latin-1").split()
    if len(first) != 3:
        return None
    headers = []
    while line := incoming.readline().decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers.append((name, value.strip()))
    return Request(first[0], first[1], tuple(headers))


def _write(connection: socket.socket, request: Request, answer: Answer, cut_at: int | None) -> bool:
    lines = [f"HTTP/1.1 {answer.status} -"]
    plain = answer.without("transfer-encoding", "connection")
    if request.method != "HEAD":
        plain = plain.having("Content-Length", str(len(answer.body)))
    lines += [f"{name}: {value}" for name, value in plain.headers]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    body = b"" if request.method == "HEAD" else answer.body
    connection.sendall(head + (body if cut_at is None else body[:cut_at]))
    return cut_at is None or cut_at >= len(body)

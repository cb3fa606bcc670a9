"""A small HTTP/1.1 proxy on loopback that spoils what passes through it, as networks and servers do, and counts it.

with FaultProxy("http://127.0.0.1:8333") as proxy:
    proxy.inject("bitflip", count=2, match="GET /bucket/key")  # the next two such answers have one wrong bit
    ...
    assert proxy.faults["bitflip"] == 2
"""

import random
import select
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSALS = {
    "500": (500, "Internal Server Error", "InternalError"),
    "503": (503, "Slow Down", "SlowDown"),
    "expired400": (400, "Bad Request", "ExpiredToken"),
    "expired403": (403, "Forbidden", "ExpiredToken"),
}
# What happens to the body of an answer: one bit wrong; half of it under a length that fits; half of it, then the
# connection is closed, hangs, or is reset.
DAMAGES = ("bitflip", "short", "fin", "stall", "reset_mid")
# The request never arrives; or it arrives with one bit wrong, or is done and its answer lost.
LOSSES = ("reset", "upload_bitflip", "answer_lost")
MODES = (*REFUSALS, *DAMAGES, *LOSSES, "replaced")
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "expect", "date", "server"}


class FaultProxy:
    "A proxy before one server; faults strike the requests whose `METHOD /path` contains `match`, `count` times."

    def __init__(self, upstream: str, seed: int = 0, stall: float = 30.0):
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.stall = stall  # s, unless the client hangs up earlier
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock, self._random = threading.Lock(), random.Random(seed)
        self._rules: dict[str, list] = {}  # match → mode, how often still, what to call before
        self._expired: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def inject(self, mode: str, count: int = 1, match: str = "GET /", before: Callable[[], Any] | None = None) -> None:
        "Spoil the next `count` requests (-1: all until `clear`); `replaced` calls `before` and passes the request on."
        if mode not in MODES:
            raise ValueError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")
        with self._lock:
            self._rules[match] = [mode, count, before]

    def clear(self, match: str | None = None) -> int:
        "Spoil nothing more, or nothing more of what one `match` strikes; how many faults were still to come."
        with self._lock:
            gone = [self._rules.pop(name) for name in list(self._rules) if match in (None, name)]
            if match is None:
                self._expired.clear()
            return sum(count for _, count, _ in gone)

    def expire(self, access_key: str, mode: str = "expired400") -> None:
        "Answer everything that is signed with a key as S3 answers an expired token."
        with self._lock:
            self._expired.add(access_key)
            self._expiry = mode

    def draw(self, name: str, signed: str) -> tuple[str, Callable[[], Any] | None]:
        "The fault for one request; empty: none."
        with self._lock:
            self.requests[name.split()[0]] += 1
            if any(f"Credential={key}/" in signed for key in self._expired):
                self.faults[self._expiry] += 1
                return self._expiry, None
            for match, rule in self._rules.items():
                mode, count, before = rule
                if count and match in name:
                    rule[1] -= 1
                    self.faults[mode] += 1
                    return mode, before
            return "", None

    def damage(self, body: bytes, mode: str) -> bytes:
        "The body that is sent: one bit flipped, or the first half."
        if mode == "short":
            return body[: len(body) // 2]
        with self._lock:
            at = self._random.randrange(8 * len(body))
        return body[: at // 8] + bytes([body[at // 8] ^ 1 << at % 8]) + body[at // 8 + 1 :]


class _Handler(BaseHTTPRequestHandler):
    protocol_version, proxy, disable_nagle_algorithm = "HTTP/1.1", None, True
    wbufsize = -1  # head and body leave together

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, HTTPException):
            pass  # the client hung up

    def _pass(self) -> None:
        proxy: Any = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mode, before = proxy.draw(f"{self.command} {self.path}", self.headers.get("Authorization", ""))
        if mode == "reset":
            return self._reset()
        if mode in REFUSALS:
            return self._refuse(*REFUSALS[mode])
        if before:
            before()
        if mode == "upload_bitflip" and body:
            body = proxy.damage(body, mode)
        status, reason, headers, answer = self._ask(body)
        if mode == "answer_lost":
            return self._reset()
        if not answer or mode not in DAMAGES:
            return self._answer(status, reason, headers, answer)
        if mode in ("bitflip", "short"):
            answer = proxy.damage(answer, mode)
            if "Content-Length" in headers:
                headers["Content-Length"] = str(len(answer))
            return self._answer(status, reason, headers, answer)
        self._answer(status, reason, headers, answer, stop=len(answer) // 2)
        if mode == "reset_mid":
            return self._reset()
        if mode == "stall":
            select.select([self.connection], [], [], proxy.stall)
        self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _ask(self, body: bytes) -> tuple[int, str, dict[str, str], bytes]:
        "The true answer of the server."
        connection = HTTPConnection(self.proxy.upstream, timeout=60)  # type: ignore[attr-defined]
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            answer = response.read()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
            if "Content-Length" not in headers and response.status not in (204, 304):
                headers["Content-Length"] = str(len(answer))
            return response.status, response.reason, headers, answer
        finally:
            connection.close()

    def _answer(self, status: int, reason: str, headers: dict, body: bytes, stop: int | None = None) -> None:
        self.send_response_only(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:stop])
        self.wfile.flush()

    def _refuse(self, status: int, reason: str, code: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{reason}</Message></Error>'
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
        self._answer(status, reason, headers, b"" if self.command == "HEAD" else text.encode())

    def _reset(self) -> None:
        "Close with a reset instead of a goodbye."
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        socket.close(self.connection.detach())

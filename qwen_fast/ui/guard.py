"""The ASGI middleware before the page: which of Gradio's routes are open, how much they take, the cookie that histories
are kept by, and the headers that keep the browser from asking anybody else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import cookie_parser

from ..server.http_io import CONNECTION
from .history import new_token, owner_of
from .texts import Refusal

COOKIE = "qwen_fast_ui"
_COOKIE_SECONDS = 400 * 24 * 3600  # the most that browsers keep one
_BODY_BYTES = 4 * 2**20
_STREAMS_OF_TOKEN = 32  # requests of one browser that stay open; an open page has two at most
_LOOK_S = 0.5  # between two looks whether the process is about to end
_LAST_S = 1.0  # from then on, for the last pictures of an answer
_GET = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/[\w./@-]+|"
    r"/gradio_api/(startup-events|app_id|theme\.css|queue/data|heartbeat/[A-Za-z0-9]+)"
)
_POST = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
_LONG = re.compile(r"/gradio_api/(heartbeat/.*|queue/data)")
_SCRIPT = re.compile(rb"<script\b([^>]*)>(.*?)</script\s*>", re.DOTALL | re.IGNORECASE)
_ELSEWHERE = re.compile(rb'<(?:link|meta)\b[^>]*"https?://[^>]*>|<script\b[^>]*\bsrc="https?://[^>]*></script>')
_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class _TooLarge(Exception):
    pass


class Guard:
    """app: what has the page under `prefix`. connections: open at once. closing: whether the process is about to end:
    then requests that stay open for as long as the page does are ended. local: only names of this machine are answered,
    so that no site whose name is made to point here (DNS rebinding) can use the page through its visitor's browser."""

    def __init__(
        self, app: App, prefix: str, connections: int, closing: Callable[[], bool], local: bool = False
    ) -> None:
        self._app, self._prefix, self._connections, self._closing = app, prefix, connections, closing
        self._local = local
        self._open = 0
        self._streams: dict[str, int] = {}  # requests that stay open, by "address ..." and "token ..."

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        path = self._inner(scope)
        if self._local and CONNECTION in scope and not is_loopback(_host_of(scope)):  # FastCGI has no connection
            await _answer(send, 421, b"this page listens on this machine alone, so it answers to localhost alone\n")
        elif path == "" and scope["method"] in ("GET", "HEAD"):
            there = self._prefix.rpartition("/")[2].encode() + b"/"
            await _answer(send, 307, b"", (b"location", there))
        elif path is None or not (_POST if scope["method"] == "POST" else _GET).fullmatch(path):
            await _answer(send, 404, b"not found\n")
        elif scope["method"] not in ("GET", "HEAD", "POST"):
            await _answer(send, 405, b"method not allowed\n")
        elif self._open >= self._connections:
            await _answer(send, 503, b"too many requests are open\n", (b"retry-after", b"1"))
        elif (_declared(scope) or 0) > _BODY_BYTES:
            await _answer(send, 413, b"the body is too large\n", (b"connection", b"close"))
        else:
            self._open += 1
            try:
                await (self._stream if _LONG.fullmatch(path) else self._run)(path, scope, receive, send)
            finally:
                self._open -= 1

    async def _stream(self, path: str, scope: Message, receive: Receive, send: Send) -> None:
        """A request that stays open. Anybody can make up a cookie: one of these no longer counts with the connections
        that have shown nothing, but half of all places is the most for one address."""
        token, address = _token_of(scope), _address_of(scope)
        bounds = {} if address is None else {f"address {address}": max(1, self._connections // 2)}
        if token is not None:
            bounds[f"token {token}"] = _STREAMS_OF_TOKEN
        if any(self._streams.get(key, 0) >= most for key, most in bounds.items()):
            await _answer(send, 429, b"too many pages are open\n", (b"retry-after", b"1"))
            return
        for key in bounds:
            self._streams[key] = self._streams.get(key, 0) + 1
        if CONNECTION in scope and token is not None:
            scope[CONNECTION].admit()
        try:
            await self._run(path, scope, receive, send)
        finally:
            for key in bounds:
                self._streams[key] -= 1
                if not self._streams[key]:
                    del self._streams[key]

    def _inner(self, scope: Message) -> str | None:
        """The path after the prefix; None: not under it."""
        path, root = scope["path"], scope.get("root_path", "").rstrip("/")
        if root and path.startswith(root + "/"):
            path = path[len(root) :]
        if path != self._prefix and not path.startswith(self._prefix + "/"):
            return None
        inner: str = path[len(self._prefix) :]
        return None if ".." in inner else inner

    async def _run(self, path: str, scope: Message, receive: Receive, send: Send) -> None:
        size = 0
        started = False

        async def receive_some() -> Message:
            nonlocal size
            message = await (self._receive_until_closing(receive) if _LONG.fullmatch(path) else receive())
            size += len(message.get("body", b""))
            if size > _BODY_BYTES:
                raise _TooLarge
            return message

        async def send_noting(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *_ALWAYS]}
            await send(message)

        page = _Page(scope, send_noting, self._prefix) if path == "/" else None
        try:
            await self._app(scope, receive_some, page.take if page else send_noting)
        except _TooLarge:
            if not started:
                await _answer(send, 413, b"the body is too large\n", (b"connection", b"close"))

    async def _receive_until_closing(self, receive: Receive) -> Message:
        waiting = asyncio.ensure_future(receive())
        try:
            while not waiting.done():
                if self._closing():
                    await asyncio.wait({waiting}, timeout=_LAST_S)
                    return waiting.result() if waiting.done() else {"type": "http.disconnect"}
                await asyncio.wait({waiting}, timeout=_LOOK_S)
            return waiting.result()
        finally:
            waiting.cancel()


class _Page:
    """The HTML of the page: collected, freed of what lies elsewhere, and sent with its policy and cookie."""

    def __init__(self, scope: Message, send: Send, prefix: str) -> None:
        self._scope, self._send = scope, send
        self._path = scope.get("root_path", "").rstrip("/") + prefix  # now: a mount changes the scope
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = local_only(b"".join(self._parts))
        kept = (b"content-length", b"etag", b"last-modified", b"cache-control")
        headers = [pair for pair in self._start.get("headers", ()) if pair[0].lower() not in kept]
        headers += [
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"content-security-policy", policy(body)),
        ]
        if _token_of(self._scope) is None:
            headers.append((b"set-cookie", self._cookie()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _cookie(self) -> bytes:
        """Lax, not Strict: whoever follows a link to the page keeps the history that they have."""
        secure = "; Secure" if self._scope.get("scheme") == "https" else ""
        value = f"{COOKIE}={new_token()}; Path={self._path}; Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Lax{secure}"
        return value.encode("latin-1")


def local_only(page: bytes) -> bytes:
    """The page without elements of its head that name other hosts."""
    return _ELSEWHERE.sub(b"", page)


def policy(page: bytes) -> bytes:
    """The Content-Security-Policy of the page: nothing from other hosts, and of scripts only this server's files and
    those that the page came with, by their hashes. So neither inline scripts nor javascript: links of a model work."""
    hashes = [
        base64.b64encode(hashlib.sha256(found[2]).digest()).decode()
        for found in _SCRIPT.finditer(page)
        if b"src=" not in found[1]
    ]
    scripts = " ".join(f"'sha256-{one}'" for one in hashes)
    rules = (
        "default-src 'self'",
        f"script-src 'self' {scripts}",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'self'",
    )
    return "; ".join(rules).encode()


def _token_of(scope: Message) -> str | None:
    """The cookie that a request brings, where it is one of ours. Read as the page reads it, whatever stands beside it."""
    cookies: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name.lower() == b"cookie":
            cookies.update(cookie_parser(value.decode("latin-1")))
    token = cookies.get(COOKIE)
    try:
        owner_of(token)
    except Refusal:
        return None
    return token


def _address_of(scope: Message) -> str | None:
    """Of the client, as connections.address_of() has it; None where it has none."""
    try:
        address = ipaddress.ip_address(str((scope.get("client") or ("",))[0]).partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _host_of(scope: Message) -> str:
    """The Host header without its port."""
    value = next((value for name, value in scope["headers"] if name.lower() == b"host"), b"").decode("latin-1")
    return re.sub(r":\d*$", "", value.strip())


def is_loopback(host: str) -> bool:
    """Whether it is a name or an address of this machine alone."""
    plain = host.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if plain == "localhost" or plain.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(plain).is_loopback
    except ValueError:
        return False


def _declared(scope: Message) -> int | None:
    value = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
    return int(value) if value.isdigit() and len(value) < 20 else None


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    plain = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode()), *headers, *_ALWAYS]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": body})

"""`qwen-fast cgi --connect unix:/run/qwen.sock`: a CGI program that hands its request to a FastCGI server.

For web servers that speak CGI only. It streams both ways and keeps nothing; if the client goes away it closes the
connection, which ends the request. Standard library only, so that it starts in a few hundredths of a second.

The web server's command must not pass arguments on: some servers make arguments of a query string.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Mapping, Sequence

from . import fastcgi_records as fcgi
from .fastcgi_address import connect, parse_address

USAGE = """usage: qwen-fast cgi --connect ADDRESS

Hands a CGI request to the FastCGI server at ADDRESS: unix:/path/of/the.sock or 127.0.0.1:PORT. For a web server's
configuration; it reads the request from the environment and standard input, and writes the response.
"""
CONNECT_SECONDS = 10.0
_REQUEST_ID = 1
_CHUNK = 65_536
_VARIABLES = {  # beside HTTP_*
    b"AUTH_TYPE", b"CONTENT_LENGTH", b"CONTENT_TYPE", b"DOCUMENT_ROOT", b"DOCUMENT_URI", b"GATEWAY_INTERFACE",
    b"HTTPS", b"PATH_INFO", b"PATH_TRANSLATED", b"QUERY_STRING", b"REDIRECT_HTTP_AUTHORIZATION", b"REMOTE_ADDR",
    b"REMOTE_HOST", b"REMOTE_PORT", b"REMOTE_USER", b"REQUEST_METHOD", b"REQUEST_SCHEME", b"REQUEST_URI",
    b"SCRIPT_NAME", b"SERVER_ADDR", b"SERVER_NAME", b"SERVER_PORT", b"SERVER_PROTOCOL", b"SERVER_SOFTWARE",
}  # fmt: skip


class ClientGone(Exception):
    """Nobody reads the response any more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 (the response broke off), 2 (wrong arguments)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if len(arguments) == 1 and arguments[0].startswith("--connect="):
        arguments = arguments[0].split("=", 1)
    if len(arguments) != 2 or arguments[0] != "--connect":
        print(USAGE, end="", file=sys.stderr)
        return 2
    try:
        address = parse_address(arguments[1])
    except ValueError as error:
        print(f"qwen-fast: error: {error}", file=sys.stderr)
        return 2
    return serve(address, os.environb, 0, 1)


def serve(address: str | tuple[str, int], environment: Mapping[bytes, bytes], stdin: int, stdout: int) -> int:
    """One request: its variables from `environment`, its body from the descriptor `stdin`, the answer to `stdout`."""
    try:
        connection = connect(address, CONNECT_SECONDS)
    except OSError as error:
        print(f"qwen-fast: error: no FastCGI server at {address}: {error}", file=sys.stderr)
        return _answer_error(stdout, 503, "the model server cannot be reached; try again later")
    with connection:
        exchange = Exchange(connection, environment, stdin, stdout)
        try:
            exchange.run()
        except ClientGone:
            return 1
        except (OSError, fcgi.ProtocolError) as error:
            print(f"qwen-fast: error: {error or type(error).__name__}", file=sys.stderr)
            return 1 if exchange.answering else _answer_error(stdout, 502, "the model server gave no answer")
    return 0 if exchange.complete else 1


def parameters(environment: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """What of the environment belongs to the request: the variables of CGI, and the request's headers."""
    return [(name, value) for name, value in environment.items() if name in _VARIABLES or name.startswith(b"HTTP_")]


class Exchange:
    """A request on its way to the server while the response comes back."""

    def __init__(self, connection: socket.socket, environment: Mapping[bytes, bytes], stdin: int, stdout: int) -> None:
        connection.setblocking(False)
        self.answering = False  # something was written to stdout
        self.complete = False  # the server said that this was all
        self._connection = connection
        self._stdin = stdin
        self._stdout = stdout
        params = fcgi.stream(fcgi.PARAMS, _REQUEST_ID, fcgi.encode_pairs(parameters(environment)))
        self._to_send = bytearray(fcgi.begin_request(_REQUEST_ID) + params + fcgi.record(fcgi.PARAMS, _REQUEST_ID))
        self._received = bytearray()
        length = environment.get(b"CONTENT_LENGTH", b"")
        # None: until standard input ends, which a server does for a body that came in chunks.
        self._body_left: int | None = int(length) if length.isdigit() and len(length) <= 18 else 0
        if not length and environment.get(b"HTTP_TRANSFER_ENCODING"):
            self._body_left = None
        self._body_ended = False
        if self._body_left == 0:
            self._end_body()

    def run(self) -> None:
        """Raises ClientGone, OSError, or ProtocolError."""
        while not self.complete:
            for descriptor, events in self._poll():
                if descriptor == self._stdout:
                    raise ClientGone
                if descriptor == self._stdin:
                    self._read_body()
                    continue
                if events & select.POLLOUT:
                    self._send()
                if events & ~select.POLLOUT and not self._read_answer():
                    raise ConnectionError("the FastCGI server closed the connection before the end of its answer")

    def _poll(self) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(self._stdout, 0)  # an error there means that the reader has gone
        poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._to_send else 0))
        if not self._body_ended and len(self._to_send) < _CHUNK:
            poll.register(self._stdin, select.POLLIN)
        return poll.poll()

    def _send(self) -> None:
        try:
            del self._to_send[: self._connection.send(self._to_send)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):  # it takes no more of the body, but may have answered
            self._to_send.clear()
            self._body_ended = True

    def _read_body(self) -> None:
        left = self._body_left
        data = os.read(self._stdin, _CHUNK if left is None else min(_CHUNK, left))
        self._to_send += fcgi.stream(fcgi.STDIN, _REQUEST_ID, data)
        if left is not None:
            self._body_left = left - len(data)
        if not data or self._body_left == 0:
            self._end_body()

    def _end_body(self) -> None:
        self._body_ended = True
        self._to_send += fcgi.record(fcgi.STDIN, _REQUEST_ID)

    def _read_answer(self) -> bool:
        """Passes on what the server sends; False at the end of the connection."""
        try:
            data = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return True
        self._received += data
        records, used = fcgi.parse_records(self._received)
        del self._received[:used]
        for kind, request_id, content in records:
            if request_id != _REQUEST_ID:
                continue
            if kind == fcgi.STDOUT:
                self._write(content)
            elif kind == fcgi.STDERR:
                os.write(2, content)
            elif kind == fcgi.END_REQUEST:
                self._end(content)
                return True
        return bool(data)

    def _end(self, content: bytes) -> None:
        if len(content) != fcgi.END_BODY.size:
            raise fcgi.ProtocolError(f"END_REQUEST has {len(content)} bytes; it must have {fcgi.END_BODY.size}")
        _, status = fcgi.END_BODY.unpack(content)
        if not self.answering:
            raise fcgi.ProtocolError(f"the FastCGI server refused the request with protocol status {status}")
        self.complete = True

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        self.answering = self.answering or bool(data)
        while view:
            try:
                view = view[os.write(self._stdout, view) :]
            except BlockingIOError:  # a server may leave its end of the pipe non-blocking
                select.select([], [self._stdout], [])
            except (BrokenPipeError, ConnectionError):
                raise ClientGone from None


def _answer_error(stdout: int, status: int, message: str) -> int:
    kind = "ServiceUnavailableError" if status == 503 else "BadGatewayError"
    body = f'{{"error": {{"message": "{message}", "type": "{kind}", "param": null, "code": {status}}}}}'
    head = (
        f"Status: {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\n\r\n"
    )
    try:
        os.write(stdout, (head + body).encode("ascii"))
    except (BrokenPipeError, ConnectionError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

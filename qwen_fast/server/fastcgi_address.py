"""Where a FastCGI server listens: an address as options give it, and the socket. Standard library only."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from contextlib import suppress

MAX_PATH_BYTES = 107  # of a Unix socket, as Linux has it


def parse_address(text: str) -> str | tuple[str, int]:
    """`unix:/path` as the path; `127.0.0.1:9000`, `[::1]:9000` or the same behind `tcp:` as host and port.

    Raises ValueError for anything else. FastCGI knows no password, and a peer may claim any client address, so only
    loopback addresses are taken: other machines reach the server through a web server.
    """
    if text.startswith("unix:"):
        path = text[len("unix:") :]
        if not path or "\0" in path:
            raise ValueError(f"address {text!r} names no socket; write unix:/path/of/the.sock")
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            raise ValueError(f"the path of socket {path!r} has more than {MAX_PATH_BYTES} bytes")
        return path
    host, colon, port = text.removeprefix("tcp:").rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal() and 0 <= int(port) <= 65535):
        raise ValueError(f"address {text!r} is neither unix:/path nor 127.0.0.1:PORT with a port in 0..65535")
    host = host.removeprefix("[").removesuffix("]")
    try:
        loopback = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(f"address {text!r} is not of this machine; FastCGI over TCP takes 127.0.0.1 and [::1] only")
    return "127.0.0.1" if host == "localhost" else host, int(port)


def bind(address: str | tuple[str, int], mode: int = 0o660) -> socket.socket:
    """A bound socket that does not listen yet. A Unix socket gets `mode` before anyone can connect; a socket file that
    a dead process left behind is replaced, one that is in use is not (OSError)."""
    if not isinstance(address, str):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    else:
        _remove_stale(address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        if isinstance(address, str):
            os.chmod(address, mode)
        return listener
    except OSError as error:
        listener.close()
        shown = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        raise OSError(error.errno, f"cannot listen on {shown}: {os.strerror(error.errno or 0)}") from error


def connect(address: str | tuple[str, int], timeout_seconds: float) -> socket.socket:
    """A connection to the address; OSError if nobody listens there or nobody accepts in time."""
    if not isinstance(address, str):
        return socket.create_connection(address, timeout_seconds)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_seconds)
        connection.connect(address)
        return connection
    except BaseException:
        connection.close()
        raise


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, f"{path} is there and is no socket")
    except FileNotFoundError:
        return
    try:
        connect(path, timeout_seconds=1.0).close()
    except ConnectionRefusedError:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return
    raise OSError(errno.EADDRINUSE, f"another process listens on {path}")

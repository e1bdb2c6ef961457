"""Between FastCGI's variables and ASGI: the parameters of a request become a scope, the start of a response becomes
CGI header lines. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote_from_bytes

from .errors import ApiError

# Between the client and the web server only; the body that reaches us is decoded and has a length of its own.
_CONNECTION_HEADERS = frozenset(
    (b"connection", b"expect", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_METHOD = re.compile(rb"[A-Z-]{1,32}")
_NOT_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class BadRequest(ValueError):
    """The parameters are no request; the message says what is wrong, for the client and for whoever set up the web
    server."""


def request_scope(pairs: Iterable[tuple[bytes, bytes]], state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ASGI scope of a request. Of a variable that is there twice the last counts; headers may be there twice.

    The path is PATH_INFO, or SCRIPT_NAME where there is no PATH_INFO (nginx's fastcgi_params put all of it there):
    behind a CGI script it is what follows the script's name. Raises BadRequest without REQUEST_METHOD or a path, or if
    CONTENT_LENGTH is no number.
    """
    pairs = list(pairs)
    variables = dict(pairs)
    method = variables.get(b"REQUEST_METHOD", b"")
    if not _METHOD.fullmatch(method):
        raise BadRequest(
            f"the FastCGI parameter REQUEST_METHOD is {_shown(method)}: not a method"
            if method
            else "no FastCGI parameter REQUEST_METHOD: the web server's configuration must pass it (nginx: include "
            "fastcgi_params)"
        )
    path = variables.get(b"PATH_INFO") or variables.get(b"SCRIPT_NAME") or b""
    if not path.startswith(b"/"):
        raise BadRequest(
            f"the path is {_shown(path)} (FastCGI parameters PATH_INFO, SCRIPT_NAME); it must begin with /"
        )
    headers = request_headers(pairs, variables)
    content_length(headers)
    secure = variables.get(b"HTTPS", b"").lower() in (b"on", b"1") or variables.get(b"REQUEST_SCHEME") == b"https"
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2" if variables.get(b"SERVER_PROTOCOL", b"").startswith(b"HTTP/2") else "1.1",
        "method": method.decode("ascii"),
        "scheme": "https" if secure else "http",
        "path": path.decode("utf-8", "replace"),
        "raw_path": quote_from_bytes(path, safe="/:@!$&'()*+,;=~").encode("ascii"),
        "query_string": variables.get(b"QUERY_STRING", b""),
        "root_path": "",
        "headers": headers,
        "client": _address(variables, b"REMOTE_ADDR", b"REMOTE_PORT"),
        "server": _address(variables, b"SERVER_NAME", b"SERVER_PORT"),
        "state": dict(state or {}),
    }


def request_headers(
    pairs: Iterable[tuple[bytes, bytes]], variables: Mapping[bytes, bytes]
) -> list[tuple[bytes, bytes]]:
    """The request's headers, names in lower case: HTTP_*, CONTENT_TYPE and CONTENT_LENGTH. Apache keeps Authorization
    from scripts unless a rewrite rule hands it over as REDIRECT_HTTP_AUTHORIZATION: that is taken too."""
    headers = []
    for name, value in pairs:
        if not name.startswith(b"HTTP_"):
            continue
        header = name[5:].lower().replace(b"_", b"-")
        if header in (b"content-type", b"content-length") or header in _CONNECTION_HEADERS:
            continue  # the web server says these without HTTP_
        if _TOKEN.fullmatch(header):
            headers.append((header, value))
    for variable in (b"CONTENT_TYPE", b"CONTENT_LENGTH"):
        if variables.get(variable):
            headers.append((variable.lower().replace(b"_", b"-"), variables[variable]))
    if not any(header == b"authorization" for header, _ in headers):
        passed_on = variables.get(b"REDIRECT_HTTP_AUTHORIZATION")
        if passed_on:
            headers.append((b"authorization", passed_on))
    return headers


def content_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The body's length as the headers say; None if they do not. Raises BadRequest if it is no number."""
    for name, value in headers:
        if name == b"content-length":
            if not re.fullmatch(rb"[0-9]{1,18}", value):
                raise BadRequest(f"Content-Length is {_shown(value)}: not a number of bytes")
            return int(value)
    return None


def response_head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The header lines of a CGI response, the empty line included. Headers about the connection are left out: that is
    the web server's. Raises ValueError for a status that is none, or a header that would break the lines."""
    if not 200 <= status <= 999:
        raise ValueError(f"status {status}; it must be in 200..999")
    lines = [b"Status: %d" % status]
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"response header name {_shown(bytes(name))} has characters that no name may have")
        if _NOT_IN_VALUE.search(value):
            raise ValueError(f"response header {name.decode('ascii')} has control characters in its value")
        if name.lower() not in _CONNECTION_HEADERS and name.lower() != b"status":
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def error_response(status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A CGI response with an error in OpenAI's shape."""
    body = ApiError(status, message).body_bytes()
    described = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
    return response_head(status, (*described, *headers)) + body


def _address(variables: Mapping[bytes, bytes], host: bytes, port: bytes) -> tuple[str, int] | None:
    name = variables.get(host, b"").decode("latin-1")
    number = variables.get(port, b"")
    return (name, int(number) if re.fullmatch(rb"[0-9]{1,5}", number) else 0) if name else None


def _shown(value: bytes) -> str:
    text = value.decode("latin-1")
    return repr(text if len(text) <= 80 else text[:77] + "...")

"""FastCGI 1.0 as bytes: records and name-value pairs, written and read by pure functions.

A record is 8 bytes of header (version, type, request id, content length, padding length), the content and padding.
This module needs nothing but the standard library and no event loop: the server (fastcgi.py) and the client (cgi.py)
share it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

VERSION = 1

BEGIN_REQUEST = 1
ABORT_REQUEST = 2
END_REQUEST = 3
PARAMS = 4
STDIN = 5
STDOUT = 6
STDERR = 7
DATA = 8
GET_VALUES = 9
GET_VALUES_RESULT = 10
UNKNOWN_TYPE = 11

MANAGEMENT = 0  # the request id of records about the connection itself

RESPONDER = 1  # the only role that is served here
KEEP_CONN = 1  # flag of BEGIN_REQUEST

REQUEST_COMPLETE = 0  # protocol status of END_REQUEST
CANT_MPX_CONN = 1
OVERLOADED = 2
UNKNOWN_ROLE = 3

HEADER = struct.Struct(">BBHHBx")
BEGIN_BODY = struct.Struct(">HB5x")
END_BODY = struct.Struct(">IB3x")
MAX_CONTENT = 65535
_CHUNK = 65528  # the largest content that needs no padding to end at a multiple of 8 bytes


class ProtocolError(ValueError):
    """What the peer sent is not FastCGI 1.0."""


class Record(NamedTuple):
    type: int
    request_id: int
    content: bytes


def parse_records(data: bytes | bytearray) -> tuple[list[Record], int]:
    """The whole records at the beginning of `data`, and how many bytes they take; the rest is the beginning of a record
    that has not arrived yet (at most 65,797 bytes). Raises ProtocolError for another version than 1."""
    records = []
    position = 0
    while len(data) - position >= HEADER.size:
        version, kind, request_id, content_length, padding_length = HEADER.unpack_from(data, position)
        if version != VERSION:
            raise ProtocolError(f"FastCGI version {version}; only version {VERSION} is known")
        start = position + HEADER.size
        end = start + content_length + padding_length
        if end > len(data):
            break
        records.append(Record(kind, request_id, bytes(data[start : start + content_length])))
        position = end
    return records, position


def record(kind: int, request_id: int, content: bytes = b"") -> bytes:
    """One record, without padding; ValueError for more than 65,535 bytes."""
    if len(content) > MAX_CONTENT:
        raise ValueError(f"a record's content has {len(content)} bytes; the limit is {MAX_CONTENT}")
    return HEADER.pack(VERSION, kind, request_id, len(content), 0) + content


def stream(kind: int, request_id: int, data: bytes) -> bytes:
    """`data` as records of a stream; nothing for no data, since an empty record ends a stream."""
    if len(data) <= _CHUNK:
        return record(kind, request_id, data) if data else b""
    return b"".join(record(kind, request_id, data[i : i + _CHUNK]) for i in range(0, len(data), _CHUNK))


def begin_request(request_id: int, keep_connection: bool = False, role: int = RESPONDER) -> bytes:
    return record(BEGIN_REQUEST, request_id, BEGIN_BODY.pack(role, KEEP_CONN if keep_connection else 0))


def end_request(request_id: int, protocol_status: int = REQUEST_COMPLETE, app_status: int = 0) -> bytes:
    return record(END_REQUEST, request_id, END_BODY.pack(app_status, protocol_status))


def unknown_type(kind: int) -> bytes:
    return record(UNKNOWN_TYPE, MANAGEMENT, bytes([kind]) + bytes(7))


def encode_pairs(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Name-value pairs as the content of PARAMS and GET_VALUES. A length below 128 takes one byte, others four."""
    parts = []
    for name, value in pairs:
        for length in (len(name), len(value)):
            parts.append(bytes([length]) if length < 0x80 else struct.pack(">I", length | 0x80000000))
        parts += [name, value]
    return b"".join(parts)


def decode_pairs(data: bytes, max_pairs: int) -> list[tuple[bytes, bytes]]:
    """The name-value pairs of a whole stream. Raises ProtocolError if a length points past the end of the data, or if
    there are more than `max_pairs`."""
    pairs: list[tuple[bytes, bytes]] = []
    position = 0
    while position < len(data):
        if len(pairs) == max_pairs:
            raise ProtocolError(f"more than {max_pairs} name-value pairs")
        name_length, position = _length(data, position)
        value_length, position = _length(data, position)
        value_start = position + name_length
        end = value_start + value_length
        if end > len(data):
            raise ProtocolError(f"a name-value pair needs {end - position} bytes; {len(data) - position} are left")
        pairs.append((data[position:value_start], data[value_start:end]))
        position = end
    return pairs


def _length(data: bytes, position: int) -> tuple[int, int]:
    """A length, and the position behind it."""
    size = 1 if position < len(data) and data[position] < 0x80 else 4
    if position + size > len(data):
        raise ProtocolError("name-value pairs end within a length")
    if size == 1:
        return data[position], position + 1
    return int.from_bytes(data[position : position + 4], "big") & 0x7FFFFFFF, position + 4

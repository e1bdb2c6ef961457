"""A request's body from bytes to a JSON object: counted before it is parsed, parsed without holding others up."""

from __future__ import annotations

import json
import json.scanner
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from .config import Limits
from .errors import ApiError, shortened

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_CHUNK = 2**17  # bytes looked at together: between two chunks other threads run
_SMALL_BODY = 32 * 1024  # bytes of one whose integers json itself converts
_QUICK = 8192  # texts, arrays and objects that json's own scanner, which lets no other thread run, may make
_LONG_NUMBER = b"0" * 401
_AS_ZEROS = bytes(ord("0") if code in b"123456789" else code for code in range(256))
_KINDS = numpy.zeros(256, numpy.int8)  # how a byte outside a string changes the depth
_KINDS[[ord("["), ord("{")]] = 1
_KINDS[[ord("]"), ord("}")]] = -1
_JSON_NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}


@dataclass(slots=True)
class Shape:
    """What a JSON text holds, counted without parsing it. texts: strings, keys too; commas: outside strings."""

    depth: int = 0
    containers: int = 0
    texts: int = 0
    commas: int = 0
    escapes: int = 0


def shape_of(body: bytes) -> Shape:
    """In linear time, whatever the body holds: a regular expression of strings is quadratic where one never ends."""
    shape = Shape()
    level = quotes = 0
    rest = b""
    for start in range(0, len(body), _CHUNK):
        part = rest + body[start : start + _CHUNK]
        rest = b""
        if start + _CHUNK < len(body) and (len(part) - len(part.rstrip(b"\\"))) % 2:
            part, rest = part[:-1], b"\\"  # it belongs to what follows
        # Without escaped backslashes and quotes, the quotes before a place say whether it lies in a string.
        bare = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        shape.escapes += (len(part) - len(bare)) // 2 + bare.count(b"\\")
        codes = numpy.frombuffer(bare, dtype=numpy.uint8)
        if not len(codes):
            continue
        before = numpy.cumsum(codes == ord('"'), dtype=numpy.int32) + quotes
        quotes = int(before[-1])
        outside = before & 1 == 0
        steps = _KINDS[codes] * outside
        levels = numpy.cumsum(steps, dtype=numpy.int32)
        shape.depth = max(shape.depth, level + int(levels.max()))
        level += int(levels[-1])
        shape.containers += int(numpy.count_nonzero(steps == 1))
        shape.commas += int(numpy.count_nonzero((codes == ord(",")) & outside))
    shape.texts = (quotes + 1) // 2
    return shape


def _most(body: bytes) -> Shape:
    """What the body can hold at most, by its characters, in strings or not: quicker than to look where each stands."""
    opened = body.count(b"[") + body.count(b"{")
    texts = (body.count(b'"') + 1) // 2
    return Shape(opened, opened, texts, body.count(b","), body.count(b"\\"))


def check_shape(shape: Shape, limits: Limits, what: str = "the body", param: str | None = None) -> None:
    """ApiError 400 where there is more than `limits` allows."""
    if shape.depth > limits.json_depth:
        said = f"{what} is nested {shape.depth} levels deep; the limit is {limits.json_depth}"
        raise ApiError(400, said, param=param)
    for count, noun, limit in (
        (shape.commas, "commas between values", limits.json_values),
        (shape.texts, "texts and keys", limits.json_texts),
        (shape.containers, "arrays and objects", limits.json_containers),
        (shape.escapes, "escape sequences", limits.json_escapes),
    ):
        if count > limit:
            raise ApiError(400, f"{what} holds {count} {noun}; the limit is {limit}", param=param)


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """A JSON object with finite numbers and well-formed text, within limits.json_*. ApiError 400 where it is none."""
    if not body.strip():
        raise ApiError(400, "the body is empty; a JSON object is expected")
    shape = _most(body) if len(body) <= _SMALL_BODY else shape_of(body)
    try:
        check_shape(shape, limits)
    except ApiError:
        shape = shape_of(body)
        check_shape(shape, limits)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    try:
        value = _decoder(body, shape).decode(text)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_JSON_NAMES.get(type(value), 'null')}")
    if _SURROGATE.search(body):
        _refuse_surrogates(value)
    return value


def _refuse_constant(name: str) -> float:
    raise ApiError(400, f"the body holds {name}, which is no JSON number")


def _finite(text: str) -> float:
    _require_ascii(text)
    value = float(text)
    if math.isinf(value):
        raise ApiError(400, f"the body holds {shortened(text, 40)}, a number too large for a float")
    return value


def _bounded(text: str) -> int:
    _require_ascii(text)
    if len(text) > 400:  # a float could not hold it either
        raise ApiError(400, f"the body holds an integer of {len(text)} digits")
    return int(text)


def _require_ascii(text: str) -> None:
    if not text.isascii():  # the patient decoder's pattern takes the digits of every script
        raise ApiError(400, "the body is not valid JSON: a number has digits other than 0 to 9")


class _Decoder(json.JSONDecoder):
    """With checked numbers. These are Python functions, so other threads run between numbers."""

    def __init__(self, parse_int: Callable[[str], int] = _bounded) -> None:
        super().__init__(parse_constant=_refuse_constant, parse_float=_finite, parse_int=parse_int)


class _PatientDecoder(_Decoder):
    """The same, slower: other threads run between all values."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


_QUICK_DECODER = _Decoder(int)  # where no integer is long; json's own scanner takes ASCII digits only


def _decoder(body: bytes, shape: Shape) -> _Decoder:
    """shape: of the body, or what it can hold at most."""
    if shape.texts + shape.containers > _QUICK:
        return _PatientDecoder()
    small = len(body) <= _SMALL_BODY and _LONG_NUMBER not in body.translate(_AS_ZEROS)
    return _QUICK_DECODER if small else _Decoder()


def _refuse_surrogates(value: Any) -> None:
    """ApiError where a text holds half of a surrogate pair, which UTF-8 cannot express."""
    path: list[str] = []

    def walk(item: Any) -> bool:
        if isinstance(item, str):
            return not _encodable(item)
        entries = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, entry in entries:
            if walk(entry) or (isinstance(key, str) and not _encodable(key)):
                path.insert(0, ascii(key).strip("'"))
                return True
        return False

    if walk(value):
        where = shortened(".".join(path))
        raise ApiError(400, f"{where}: the text holds a lone surrogate, which is no character", param=where)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

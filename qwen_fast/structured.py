"""Structured output: what form the generated text must have. Compiling and masks: _grammars.py and _guided.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_SCHEMA_BYTES = 64 * 1024  # of a JSON schema as JSON text, or of a choice list
MAX_SCHEMA_DEPTH = 32  # objects and lists inside each other
MAX_SCHEMA_NODES = 8192  # values of all kinds
MAX_REGEX_BYTES = 8 * 1024
MAX_CHOICES = 4096
MAX_GRAMMAR_BYTES = 128 * 1024
MAX_GBNF_RULES = 500
# Of all multipleOf together, each without its decimal point: the automaton has a state for each remainder.
MAX_MULTIPLES = 10_000
MAX_WHITESPACE_BYTES = 256

_FORMS = ("json", "regex", "choice", "grammar", "json_object")
_MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*(-?[0-9][^\s,}]{0,400})')
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of the output; the fields have vLLM's names, and exactly one of the first five is given:

    json: a JSON schema, as a dict, a bool or JSON text: at most 64 KiB, 32 levels, 8,192 values.
    regex: the whole text matches it: Rust's syntax, no look-around, no back-references; at most 8 KiB.
    choice: the text is one of these; at most 4,096 texts and 64 KiB.
    grammar: a context-free grammar as llguidance takes it (Lark with a rule `start`), or GBNF / EBNF with a rule `root`,
        at most 500 rules; at most 128 KiB.
    json_object: True: any JSON object.

    JSON is written in one line: a space may follow each comma and colon. disable_any_whitespace: it may not.
    whitespace_pattern: a regex for whitespace that may stand, at most once in each place, wherever JSON allows it.
    disable_fallback is accepted and has no effect: there is one backend. disable_additional_properties and
    structural_tag are not built: a value that asks for something raises NotImplementedError.

    ValueError and TypeError name the field, the value and the limit. What only the compiler can see raises ValueError
    when the request is submitted.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: InitVar[bool] = False
    disable_any_whitespace: bool = False
    disable_additional_properties: InitVar[bool] = False
    whitespace_pattern: str | None = None
    structural_tag: InitVar[Any] = None
    source: str = field(default="", init=False, repr=False, compare=False)  # JSON text, regex or grammar

    def __post_init__(self, disable_fallback: bool, disable_additional: bool, structural_tag: Any) -> None:
        for name, value in (("disable_additional_properties", disable_additional), ("structural_tag", structural_tag)):
            if value:
                raise NotImplementedError(f"StructuredOutputsParams({name}={value!r}) is not built; leave {name} out")
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise TypeError(f"json_object must be True or False, got {self.json_object!r}")
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{', '.join(given)} are given" if given else "none is given"
            raise ValueError(f"structured output needs exactly one of {', '.join(_FORMS)}; {found}")
        if not isinstance(self.disable_any_whitespace, bool):
            raise TypeError(f"disable_any_whitespace must be True or False, got {self.disable_any_whitespace!r}")
        if self.whitespace_pattern is not None:
            _text("whitespace_pattern", self.whitespace_pattern, MAX_WHITESPACE_BYTES)
            if self.disable_any_whitespace:
                raise ValueError("whitespace_pattern and disable_any_whitespace cannot both be given")
        object.__setattr__(self, "source", self._checked())

    @property
    def form(self) -> str:
        """The field that is given."""
        return next(name for name in _FORMS if getattr(self, name) is not None)

    @property
    def key(self) -> tuple[str, str, str | None, bool]:
        """Equal for what compiles to the same grammar."""
        return self.form, self.source, self.whitespace_pattern, self.disable_any_whitespace

    def _checked(self) -> str:
        if self.json is not None:
            return checked_schema("json", self.json)
        if self.regex is not None:
            return _text("regex", self.regex, MAX_REGEX_BYTES)
        if self.choice is not None:
            return _checked_choice(self.choice)
        if self.grammar is not None:
            return _checked_grammar(self.grammar)
        return '{"type":"object"}'


def structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """A StructuredOutputsParams from itself, from a dict of its fields, or from an object of vLLM with such fields."""
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if isinstance(value, Mapping):
        known = set(StructuredOutputsParams.__dataclass_fields__) - {"source"}
        unknown = sorted(str(name) for name in value if name not in known)
        if unknown:
            raise ValueError(f"structured_outputs has no field {unknown[0][:64]!r}; the forms are {', '.join(_FORMS)}")
        return StructuredOutputsParams(**value)
    raise TypeError(f"structured_outputs must be StructuredOutputsParams or a dict, got {type(value).__name__}")


def checked_schema(name: str, schema: Any) -> str:
    """A JSON schema as compact JSON text, with keys in their order. `name` is for messages."""
    if isinstance(schema, str):
        text = _text(name, schema, MAX_SCHEMA_BYTES)
        try:
            schema = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from None
    if isinstance(schema, Mapping):
        schema = dict(schema)
    elif not isinstance(schema, bool):
        raise TypeError(f"{name} must be a JSON schema: an object, a boolean or JSON text, got {type(schema).__name__}")
    _measure(name, schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"{name} has {size} bytes, the limit is {MAX_SCHEMA_BYTES}")
    return text


def _no_constant(value: str) -> Any:
    raise ValueError(f"{value} is no JSON number")


def _measure(name: str, schema: Any) -> None:
    """Depth, values and multipleOf of a schema, without recursion."""
    nodes = multiples = 0
    level = [schema]
    depth = 0
    while level:
        depth += 1
        nodes += len(level)
        if nodes > MAX_SCHEMA_NODES:
            raise ValueError(f"{name} has more than {MAX_SCHEMA_NODES} values")
        below: list[Any] = []
        nested = False
        for value in level:
            if isinstance(value, Mapping):
                nested = True
                multiples = _add_multiple(name, multiples, value.get("multipleOf"))
                below += value.values()
            elif isinstance(value, (list, tuple)):
                nested = True
                below += value
        if nested and depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"{name} is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        level = below


def _add_multiple(name: str, before: int, value: Any) -> int:
    """The sum of multipleOf with one more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return before  # not a number: for the compiler to refuse, or a property of that name
    shown = str(value)[:40]
    _, digits, exponent = Decimal(min(value, 10**18) if isinstance(value, int) else str(value)).normalize().as_tuple()
    if not isinstance(exponent, int) or not -9 <= exponent <= 9:
        raise ValueError(f"{name}: multipleOf is {shown}; its limits are 1e-9 and 1e9")
    total = before + int("".join(map(str, digits))) * 10 ** max(exponent, 0)
    if total > MAX_MULTIPLES:
        others = f", with those before it {total}" if before else ""
        raise ValueError(f"{name}: multipleOf is {shown}{others}; without decimal points the limit is {MAX_MULTIPLES}")
    return total


def _checked_choice(choice: Any) -> str:
    if isinstance(choice, (str, bytes)) or not hasattr(choice, "__iter__"):
        raise TypeError(f"choice must be a list of texts, got {type(choice).__name__}")
    texts = list(choice)
    if not texts:
        raise ValueError("choice is empty")
    if len(texts) > MAX_CHOICES:
        raise ValueError(f"choice has {len(texts)} texts, the limit is {MAX_CHOICES}")
    for i, text in enumerate(texts):
        _text(f"choice[{i}]", text, MAX_SCHEMA_BYTES)
    source = json.dumps(texts, ensure_ascii=False)
    if len(source.encode()) > MAX_SCHEMA_BYTES:
        raise ValueError(f"choice has {len(source.encode())} bytes, the limit is {MAX_SCHEMA_BYTES}")
    return source


def _checked_grammar(grammar: Any) -> str:
    text = _text("grammar", grammar, MAX_GRAMMAR_BYTES)
    rules = text.count("::=")
    if rules > MAX_GBNF_RULES:
        raise ValueError(f"grammar has {rules} rules with '::=', the limit is {MAX_GBNF_RULES}")
    multiples = 0
    for match in _MULTIPLE_OF.finditer(_ESCAPED.sub(lambda found: chr(int(found.group(1), 16)), text)):
        try:
            multiples = _add_multiple("grammar", multiples, float(Decimal(match.group(1))))
        except (InvalidOperation, OverflowError):
            raise ValueError(f"grammar: multipleOf is {match.group(1)[:40]}, which is no number") from None
    return text


def _text(name: str, value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate at position {error.start}, which is no text") from None
    if size > limit:
        raise ValueError(f"{name} has {size} bytes, the limit is {limit}")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character at position {value.index(chr(0))}")
    return value

"""The options of `qwen-fast serve`, under vLLM's names; importable without the extra [server]."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from ..options import VLLM_OPTIONS
from .config import Limits, ServerConfig

_LIMIT_HELP = {
    "body_bytes": "bytes of a request body",
    "json_depth": "levels of nesting in a body",
    "messages": "messages of a conversation",
    "prompts": "prompts of a completion request",
    "n": "samples of a prompt",
    "request_seconds": "seconds from a request to the end of its answer",
    "connections": "requests open at once",
    "schema_bytes": "bytes of a JSON schema, regex, grammar or choice list",
    "coalesce_ms": "most milliseconds between two events of a stream under load",
}
_TEXTS = {
    "host": "address to listen on (default 127.0.0.1)",
    "uds": "path of a Unix socket to listen on in place of TCP",
    "fastcgi": "unix:/path or 127.0.0.1:port to speak FastCGI on, beside HTTP",
    "root-path": "path prefix that a proxy strips",
    "api-key-file": "file of API keys, one a line: KEY name=alice requests_per_minute=60 concurrency=8 "
    "tokens_per_minute=100000, all but the key optional, or the same as JSON objects",
    "ssl-keyfile": "TLS: the key",
    "ssl-certfile": "TLS: the certificate",
    "ssl-ca-certs": "TLS: authorities of client certificates",
    "tool-call-parser": "hermes",
    "audit-log": "file for one JSON line per request",
    "otlp-traces-endpoint": "URL of an OTLP collector for traces",
    "response-role": "role of answers (default assistant)",
}
_NUMBERS = {
    "port": (int, "TCP port (default 8000; 0: any that is free)"),
    "ssl-cert-reqs": (int, "TLS: 0, 1 or 2 as in Python's ssl module"),
    "max-num-queued-reqs": (int, "running and waiting sequences beyond which requests get 429 (default 1024)"),
    "max-num-queued-tokens": (int, "waiting prompt tokens beyond which requests get 429 (default 0: no limit)"),
    "shutdown-timeout": (float, "seconds that requests may take to finish after SIGTERM (default 30)"),
}
_SWITCHES = {
    "enable-auto-tool-choice": "accepted; tool calls need no switch",
    "trust-request-chat-template": "take chat_template from requests",
    "parse-special-tokens": "control tokens written out in messages act as such",
    "fastcgi-only": "FastCGI in place of HTTP",
    "allow-credentials": "CORS with credentials",
    "audit-log-text": "prompts and answers go into the audit log",
    "metrics-public": "/metrics needs no key",
    "disable-fastapi-docs": "no /docs and /openapi.json",
    "enable-force-include-usage": "every stream ends with usage",
    "return-tokens-as-token-ids": "log-probabilities name tokens as token_id:N",
}
# Options of vLLM's server that ask for nothing here, with a value or without: what they switch is always so.
_IGNORED_SWITCHES = (
    "enable-prompt-tokens-details",
    "enable-server-load-tracking",
    "enable-request-id-headers",
    "exclude-tools-when-tool-choice-none",
    "disable-log-requests",
    "enable-log-requests",
    "disable-log-stats",
    "disable-frontend-multiprocessing",
    "enable-log-outputs",
)
_IGNORED_VALUES = ("chat-template-content-format", "max-log-len", "lora-modules", "prompt-adapters", "middleware")


def json_or_words(text: str) -> Any:
    """A JSON list of texts, or one text."""
    if not text.startswith("["):
        return [text]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a JSON list: {error}") from None
    if not all(isinstance(one, str) for one in value):
        raise argparse.ArgumentTypeError("a JSON list of texts is expected")
    return value


def octal(text: str) -> int:
    """Permissions as chmod takes them, such as 0660."""
    try:
        return int(text, 8)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not octal, such as 0660") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds everything but the engine's options, which `serve` shares with the other commands."""
    _add_model(parser)
    group = parser.add_argument_group("server")
    for name, text in _TEXTS.items():
        group.add_argument(f"--{name}", metavar="TEXT", help=text)
    for name, (kind, text) in _NUMBERS.items():
        group.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    for name, text in _SWITCHES.items():
        group.add_argument(f"--{name}", action="store_true", help=text)
    group.add_argument(
        "--fastcgi-mode",
        type=octal,
        metavar="MODE",
        help="permissions of FastCGI's Unix socket, octal (default 0660)",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names for requests (default: MODEL); answers carry the first",
    )
    group.add_argument("--api-key", nargs="+", action="extend", metavar="KEY", help="keys that open the server")
    for name in ("origins", "methods", "headers"):
        group.add_argument(
            f"--allowed-{name}", type=json_or_words, metavar="JSON", help=f"CORS: {name}; off by default"
        )
    group.add_argument(
        "--uvicorn-log-level", dest="log_level", choices=["critical", "error", "warning", "info", "debug", "trace"]
    )
    group.add_argument(
        "--no-usage-cost",
        dest="usage_cost",
        action="store_false",
        default=None,
        help="usage in answers without `cost`: bytes, FLOPs, device time and energy of the request",
    )
    access = group.add_mutually_exclusive_group()
    access.add_argument("--access-log", action="store_true", help="a line for each request")
    access.add_argument("--disable-uvicorn-access-log", action="store_true", help=argparse.SUPPRESS)
    limits = parser.add_argument_group("limits of a request")
    for entry in dataclasses.fields(Limits):
        kind = int if isinstance(entry.default, int) else float
        text = _LIMIT_HELP.get(entry.name, f"see Limits.{entry.name}")
        name = entry.name.replace("_", "-")
        limits.add_argument(
            f"--limit-{name}",
            type=kind,
            metavar="N",
            dest=f"limit_{entry.name}",
            help=f"{text} (default {entry.default})",
        )
    _add_ignored(parser)


def _add_ignored(parser: argparse.ArgumentParser) -> None:
    """vLLM's options without an effect here. They are not shown in the help."""
    known = {option for action in parser._actions for option in action.option_strings}
    for name in _IGNORED_SWITCHES:
        if f"--{name}" not in known:
            parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in _IGNORED_VALUES:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    taken = known | {f"--{name}" for name in (*_IGNORED_SWITCHES, *_IGNORED_VALUES)}
    for name in VLLM_OPTIONS:
        option = "--" + name.replace("_", "-")
        if option not in taken:
            parser.add_argument(option, dest=f"vllm_{name}", nargs="?", const=True, help=argparse.SUPPRESS)
            if name.startswith("enable_") or True in _accepted(name):
                parser.add_argument(
                    f"--no-{option[2:]}",
                    dest=f"vllm_{name}",
                    action="store_false",
                    default=None,
                    help=argparse.SUPPRESS,
                )


def _accepted(name: str) -> tuple[Any, ...]:
    accepted = VLLM_OPTIONS[name][0]
    return accepted if isinstance(accepted, tuple) else ()


def _add_model(parser: argparse.ArgumentParser) -> None:
    """vLLM's options about the model that the other commands do not have."""
    parser.add_argument("--generation-config", metavar="TEXT", help="auto, or vllm: ignore generation_config.json")
    parser.add_argument(
        "--override-generation-config",
        type=_object,
        metavar="JSON",
        help='laid over generation_config.json, such as {"temperature":0.5}',
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of requests that bring none (default: random ones)")
    parser.add_argument("--enable-prefix-caching", action="store_true", help=argparse.SUPPRESS)  # the default
    parser.add_argument(
        "--no-enable-prefix-caching", dest="no_prefix_caching", action="store_true", help=argparse.SUPPRESS
    )
    parser.add_argument("--trust-remote-code", action="store_true", help=argparse.SUPPRESS)  # refused, with the reason
    parser.add_argument("-tp", dest="tensor_parallel_size", type=int, help=argparse.SUPPRESS)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is expected")
    return value


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What add_arguments() adds about the model, as keyword arguments for AsyncLLM, which judges them."""
    options = {name: value for name in ("generation_config", "seed") if (value := getattr(args, name)) is not None}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    return {**options, **vllm_options(args)}


def vllm_options(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's engine options that were given and that `serve` itself does not know, for AsyncLLM to judge."""
    found = {}
    for name in VLLM_OPTIONS:
        value = getattr(args, f"vllm_{name}", None)
        if value is not None:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """1, true, {"a": 2}: as JSON where it is some, else the text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def server_config(args: argparse.Namespace) -> ServerConfig:
    """ValueError or TypeError name a value that is out of range."""
    for name in ("lora_modules", "prompt_adapters", "middleware"):
        if getattr(args, name):
            raise NotImplementedError(f"--{name.replace('_', '-')} is not built; leave it out")
    values: dict[str, Any] = {"model": args.model}
    for entry in dataclasses.fields(ServerConfig):
        value = getattr(args, entry.name, None)
        if entry.name in ("model", "limits") or value is None or value == entry.default:
            continue
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    limits = {
        entry.name: value
        for entry in dataclasses.fields(Limits)
        if (value := getattr(args, f"limit_{entry.name}")) is not None
    }
    return ServerConfig(**values, limits=Limits(**limits))

"""The page's only way to a model: OpenAI's API over httpx."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from .texts import Refusal

_CONNECT_S, _SILENCE_S, _SHORT_S = 10.0, 600.0, 5.0
_MAX_LINE_BYTES = 8 * 2**20
_MAX_PAGE_BYTES = 4 * 2**20
_MAX_SHOWN = 500


@dataclass(frozen=True)
class Model:
    """One that the server offers. owner: "qwen_fast", "vllm", whoever the server names."""

    id: str
    owner: str = ""
    max_model_len: int | None = None

    @property
    def counts_as_it_goes(self) -> bool:
        """The server takes stream_options.continuous_usage_stats, which is not OpenAI's."""
        return self.owner in ("qwen_fast", "vllm")


class Backend:
    """url: such as http://127.0.0.1:8000/v1. transport: for a server in the same process. Refusal for all that goes
    wrong with the server."""

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        try:
            urlsplit(url)  # which refuses brackets that httpx lets through
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise ValueError(f"url: {url!r} is no address such as http://127.0.0.1:8000/v1 ({error})") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url must begin with http:// or https://, such as http://127.0.0.1:8000/v1, got {url!r}")
        self._api_key = api_key
        self._root = str(parsed.copy_with(query=None, fragment=None)).rstrip("/")
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            timeout=timeout, transport=transport, limits=limits, follow_redirects=False, trust_env=transport is None
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    def _headers(self, api_key: str) -> dict[str, str]:
        key = (self._api_key or api_key).strip()
        if not key.isascii() or not key.isprintable():
            raise Refusal("bad_api_key")
        return {"authorization": f"Bearer {key}"} if key else {}

    async def models(self, api_key: str = "") -> list[Model]:
        """In the server's order."""
        page = await self._page(f"{self._root}/models", api_key)
        try:
            cards = json.loads(page)["data"]
            return [
                Model(str(card["id"]), str(card.get("owned_by", "")), _whole(card.get("max_model_len")))
                for card in cards[:1000]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refusal("server_unreachable", reason="its list of models is not OpenAI's") from None

    async def metrics(self, api_key: str = "") -> str:
        """The text of /metrics beside /v1; empty where there is none."""
        root = self._root.removesuffix("/v1")
        try:
            return (await self._page(f"{root}/metrics", api_key)).decode("utf-8", "replace")
        except Refusal:
            return ""

    async def _page(self, url: str, api_key: str) -> bytes:
        try:
            async with self._http.stream("GET", url, headers=self._headers(api_key), timeout=_SHORT_S) as response:
                body = await _bounded(response)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if response.status_code != 200:
            raise refusal_of(response.status_code, body)
        return body

    async def chat(self, body: dict[str, Any], api_key: str = "") -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed chat completion. Closing the iterator closes the connection, which ends the
        request."""
        headers = self._headers(api_key)
        url = f"{self._root}/chat/completions"
        began = False
        try:
            async with self._http.stream("POST", url, json={**body, "stream": True}, headers=headers) as response:
                if response.status_code != 200:
                    raise refusal_of(response.status_code, await _bounded(response))
                async with contextlib.aclosing(events(response.aiter_bytes())) as found:
                    async for event in found:
                        if event == "[DONE]":
                            return
                        began = True
                        yield _chunk(event)
        except httpx.HTTPError as error:
            if not began:
                raise _unreachable(error) from None
            raise Refusal("server_broke_off", reason=_said(error)) from None
        raise Refusal("server_broke_off", reason="the stream ended without [DONE]")


def _chunk(event: str) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except (ValueError, RecursionError):
        raise Refusal("server_broke_off", reason=f"not JSON: {event[:80]!a}") from None
    if not isinstance(chunk, dict):
        raise Refusal("server_broke_off", reason=f"not an object: {event[:80]!a}")
    if chunk.get("error"):
        error = chunk["error"]
        message = error.get("message") if isinstance(error, dict) else error
        raise Refusal("server_broke_off", reason=str(message)[:_MAX_SHOWN])
    return chunk


async def events(parts: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """The data of server-sent events, however they are cut. Lines end with \\n or \\r\\n, and nothing else: a JSON text
    may hold U+2028 as it is."""
    buffer = b""
    data: list[str] = []
    async for part in parts:
        *lines, buffer = (buffer + part).split(b"\n")
        if len(buffer) > _MAX_LINE_BYTES:
            raise Refusal("server_broke_off", reason=f"a line of more than {_MAX_LINE_BYTES} bytes")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and data:
                yield "\n".join(data)
                data.clear()


async def _bounded(response: httpx.Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _MAX_PAGE_BYTES:
            break
        parts.append(part)
    return b"".join(parts)


def refusal_of(status: int, body: bytes) -> Refusal:
    """What a server said with a status that is not 200."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError, RecursionError):
        message = body.decode("utf-8", "replace").strip()
    return Refusal("server_refused", status=status, message=message[:_MAX_SHOWN] or "no reason given")


def _said(error: Exception) -> str:
    return str(error)[:_MAX_SHOWN] or type(error).__name__


def _unreachable(error: Exception) -> Refusal:
    return Refusal("server_unreachable", reason=_said(error))


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

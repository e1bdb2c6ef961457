"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..chat import ChatTemplate
from ..outputs import Logprob, StreamOutput
from .bounds import json_bytes
from .errors import ApiError
from .generate import Answer, Prompt, Sequence, handle
from .http_io import Message, Receive, Send
from .protocol import ChatMessage, ChatRequest
from .sampling import cache_salt, output_wish, sampling_params
from .state import DeltaParser, RequestRecord, Server
from .text import TokenNames, dumped, likeliest, prompt_logprobs_json, quoted

_RESERVED_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
_MAX_VARIABLE_CHARS = 1024


class ChatEndpoint:
    """The ASGI application of the route."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await handle(self._server, scope, receive, send, ChatRequest, ChatAnswer)


def messages_of(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As the chat template takes them."""
    return [message.model_dump(exclude_unset=True) for message in messages]


def conversation_length(messages: list[dict[str, Any]], tools: list[Any] | None) -> int:
    """Characters that the template gets, roughly: messages whole, with their tool calls, and tools, as JSON."""
    most = 2**40
    return sum(json_bytes(message, most) for message in messages) + (json_bytes(tools, most) if tools else 0)


def template_variables(values: Mapping[str, Any] | None, llm: Any) -> dict[str, Any] | None:
    """chat_template_kwargs: plain values under names that the server does not use itself. ApiError 400 for others."""
    if not values:
        return None
    reserved = {*_RESERVED_VARIABLES, *llm.tokenizer.special_tokens}
    for name, value in values.items():
        where = f"chat_template_kwargs.{name[:64]}"
        if not name.isidentifier() or name.startswith("_") or name in reserved:
            raise ApiError(400, f"{where!a}: this name cannot be set", param=ascii(where).strip("'"))
        plain = value is None or isinstance(value, (bool, int, float))
        if not plain and not (isinstance(value, str) and len(value) <= _MAX_VARIABLE_CHARS):
            limit = f"a text of at most {_MAX_VARIABLE_CHARS} characters, a number, a boolean or null"
            raise ApiError(400, f"{where}: the value must be {limit}", param=where)
    return dict(values)


class ChatAnswer(Answer):
    def __init__(self, server: Server, request: ChatRequest, record: RequestRecord) -> None:
        config, llm = server.config, server.llm
        if request.chat_template is not None and not config.trust_request_chat_template:
            raise ApiError(400, "chat_template is not taken from requests by this server", param="chat_template")
        wish = output_wish(request)
        self.route = "chat"
        self.stream = bool(request.stream)
        self.num_prompts = 1
        self.params = sampling_params(request, server.forms.structured_outputs(wish), llm.vocab_size)
        self.salt = cache_salt(request, record.principal)
        self.id = f"chatcmpl-{record.request_id}"
        self._server, self._request = server, request
        self._created = int(time.time())
        self._messages = messages_of(request.messages)
        self._tools = list(wish.tools) or None
        self._text_length = conversation_length(self._messages, self._tools)
        self._variables = template_variables(request.chat_template_kwargs, llm)
        self._named = wish.tool_choice == "function"
        self._parsers: list[DeltaParser | None] = [server.forms.parser(wish) for _ in range(self.params.n)]
        self._called = [False] * self.params.n
        as_ids = bool(request.return_tokens_as_token_ids or config.return_tokens_as_token_ids)
        self._names = TokenNames(llm._need_tokenizer(), as_ids)
        self._echo = self._echoed(config.response_role)
        options = request.stream_options
        self.include_usage = bool(config.enable_force_include_usage or (options and options.include_usage))
        self._running_usage = bool(options and options.continuous_usage_stats)
        self._completion_tokens = 0
        self._prompt_tokens = 0
        self._head = (
            f'data: {{"id":{quoted(self.id)},"object":"chat.completion.chunk","created":{self._created},'
            f'"model":{quoted(record.model)},"choices":['
        )
        self._model = record.model
        if config.audit_log_text:
            record.prompt_text, record.output_text = self._messages, {}

    def _echoed(self, role: str) -> str:
        """The beginning of the answer that the request brought itself, where it asks to have it back."""
        last = self._messages[-1]
        content = last.get("content")
        if not self._request.echo or last.get("role") != role or not isinstance(content, str):
            return ""
        return content

    @property
    def text_length(self) -> int:
        return self._text_length

    def render(self) -> list[Prompt]:
        request, llm = self._request, self._server.llm
        text, ids = llm.apply_chat_template(
            self._messages,
            self._tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            split_special_tokens=not self._server.config.parse_special_tokens,
            chat_template=None if request.chat_template is None else self._template_text(request.chat_template),
            chat_template_kwargs=self._variables,
        )
        return [Prompt(text, truncated(ids, request.truncate_prompt_tokens))]

    @staticmethod
    def _template_text(text: str) -> str:
        """Never the path of a file."""
        ChatTemplate(text)
        if "{%" not in text and "{{" not in text:
            raise ApiError(400, "chat_template must be the text of a jinja template", param="chat_template")
        return text

    # -- events

    def begin(self, prompts: list[Prompt]) -> str:
        self._prompt_tokens = len(prompts[0].token_ids)
        role = quoted(self._server.config.response_role)
        more = f',"prompt_token_ids":{dumped(prompts[0].token_ids)}' if self._request.return_token_ids else ""
        events = []
        for index in range(self.params.n):
            choice = f'{{"index":{index},"delta":{{"role":{role},"content":""}},"logprobs":null,"finish_reason":null}}'
            events.append(self._event(choice, more))
            if self._echo:
                events.append(self._event(self._choice(index, f'{{"content":{quoted(self._echo)}}}')))
        return "".join(events)

    def events(self, output: StreamOutput) -> str:
        self._completion_tokens += len(output.token_ids)
        index, parser = output.index, self._parsers[output.index]
        logprobs = dumped(self._logprobs(output.token_ids, output.logprobs)) if output.logprobs else "null"
        ids = dumped(output.token_ids) if self._request.return_token_ids and output.token_ids else ""
        if parser is None:
            deltas = [f'{{"content":{quoted(output.text)}}}'] if output.text or output.logprobs or ids else []
        else:
            found = parser.feed(output.text) + (parser.finish() if output.finished else [])
            self._called[index] = self._called[index] or any("tool_calls" in delta for delta in found)
            deltas = [dumped(delta) for delta in found]
            if not deltas and (output.logprobs or ids):
                deltas = ["{}"]
        text = ""
        for delta in deltas:  # log-probabilities and token ids go with the first
            text += self._event(self._choice(index, delta, logprobs, ids))
            logprobs, ids = "null", ""
        return text + self._end(output) if output.finish_reason is not None else text

    def _choice(self, index: int, delta: str, logprobs: str = "null", ids: str = "") -> str:
        more = f',"token_ids":{ids}' if ids else ""
        return f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":null{more}}}'

    def _event(self, choice: str, more: str = "") -> str:
        if self._running_usage:
            total = self._prompt_tokens + self._completion_tokens
            more += (
                f',"usage":{{"prompt_tokens":{self._prompt_tokens},"completion_tokens":{self._completion_tokens},'
                f'"total_tokens":{total}}}'
            )
        elif self.include_usage:
            more += ',"usage":null'
        return f"{self._head}{choice}]{more}}}\n\n"

    def _end(self, output: StreamOutput) -> str:
        reason = quoted(self._finish_reason(output))
        stop = dumped(output.stop_reason)
        return self._event(
            f'{{"index":{output.index},"delta":{{}},"logprobs":null,"finish_reason":{reason},"stop_reason":{stop}}}'
        )

    def _finish_reason(self, output: StreamOutput) -> str:
        called = self._called[output.index] and not self._named
        return "tool_calls" if called and output.finish_reason == "stop" else str(output.finish_reason)

    def usage_event(self, usage: dict[str, Any]) -> str:
        return f'{self._head}],"usage":{dumped(usage)}}}\n\n'

    # -- the whole response

    def whole(self, prompts: list[Prompt], sequences: list[Sequence], usage: dict[str, Any]) -> dict[str, Any]:
        first = sequences[0].last
        response = {
            "id": self.id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._whole_choice(sequence) for sequence in sequences],
            "usage": usage,
        }
        if self._request.prompt_logprobs is not None and first is not None:
            response["prompt_logprobs"] = prompt_logprobs_json(first.prompt_logprobs)
        if self._request.return_token_ids:
            response["prompt_token_ids"] = prompts[0].token_ids
        return response

    def _whole_choice(self, sequence: Sequence) -> dict[str, Any]:
        assert sequence.last is not None
        message = self._message(sequence)
        logprobs = None
        if self._request.logprobs:
            logprobs = self._logprobs(sequence.token_ids, sequence.logprobs)
        choice = {
            "index": sequence.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(sequence.last),
            "stop_reason": sequence.last.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = sequence.token_ids
        return choice

    def _message(self, sequence: Sequence) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self._server.config.response_role, "content": None, "refusal": None}
        parser = self._parsers[sequence.index]
        if parser is None:
            message["content"] = self._echo + sequence.text
            return message
        deltas = parser.feed(sequence.text) + parser.finish()
        content = "".join(delta.get("content") or "" for delta in deltas)
        calls = joined_calls(deltas)
        self._called[sequence.index] = bool(calls)
        message["content"] = self._echo + content if content or self._echo or not calls else None
        if calls:
            message["tool_calls"] = calls
        return message

    def _logprobs(self, token_ids: list[int], rows: list[dict[int, Logprob]] | None) -> dict[str, Any]:
        count = self._request.top_logprobs or 0
        content = []
        for token_id, row in zip(token_ids, rows or ()):
            entry = self._names.entry(token_id, row[token_id])
            entry["top_logprobs"] = [self._names.entry(one, value) for one, value in likeliest(row, count)]
            content.append(entry)
        return {"content": content, "refusal": None}


def joined_calls(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tool calls of streamed deltas as whole ones."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls") or ():
            call = calls.setdefault(part["index"], {"id": None, "type": "function", "function": {}})
            call["id"] = part.get("id") or call["id"]
            function = part.get("function") or {}
            whole = call["function"]
            whole["name"] = (whole.get("name") or "") + (function.get("name") or "")
            whole["arguments"] = (whole.get("arguments") or "") + (function.get("arguments") or "")
    return [calls[index] for index in sorted(calls)]


def truncated(token_ids: list[int], most: int | None) -> list[int]:
    """The last `most` token ids; all of them for None and -1."""
    if most is None or most == -1:
        return token_ids
    if most == 0:
        raise ApiError(400, "truncate_prompt_tokens is 0, which leaves no prompt", param="truncate_prompt_tokens")
    return token_ids[-most:]

"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any

from ..outputs import Logprob, StreamOutput
from .chat import truncated
from .errors import ApiError
from .generate import Answer, Prompt, Sequence, handle
from .http_io import Message, Receive, Send
from .protocol import CompletionRequest
from .sampling import cache_salt, output_wish, sampling_params
from .state import RequestRecord, Server
from .text import TokenNames, dumped, finite, likeliest, prompt_logprobs_json, quoted


class CompletionEndpoint:
    """The ASGI application of the route."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await handle(self._server, scope, receive, send, CompletionRequest, CompletionAnswer)


class LegacyLogprobs:
    """{"tokens", "token_logprobs", "top_logprobs", "text_offset"} of one sequence, as it grows."""

    def __init__(self, names: TokenNames, count: int, offset: int = 0) -> None:
        self._names, self._count, self._offset = names, count, offset

    def add(self, token_ids: list[int], rows: list[dict[int, Logprob] | None]) -> dict[str, Any]:
        """The next tokens; a row that is None belongs to the first token of a prompt, which nothing predicted."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, row in zip(token_ids, rows):
            entry = row[token_id] if row else self._unpredicted(token_id)
            name = self._names.name(token_id, entry)
            tokens.append(name)
            logprobs.append(finite(entry.logprob) if row else None)
            tops.append(self._top(row) if row else None)
            offsets.append(self._offset)
            self._offset += len(entry.decoded_token)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, row: dict[int, Logprob]) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, entry in likeliest(row, self._count):
            top.setdefault(self._names.name(token_id, entry), finite(entry.logprob))  # broken characters look alike
        return top

    def _unpredicted(self, token_id: int) -> Logprob:
        return Logprob(0.0, 0, self._names.text(token_id))


class CompletionAnswer(Answer):
    def __init__(self, server: Server, request: CompletionRequest, record: RequestRecord) -> None:
        config, llm = server.config, server.llm
        self.route = "completions"
        self.stream = bool(request.stream)
        self.num_prompts = len(request.prompt)
        wish = output_wish(request)
        self.params = sampling_params(request, server.forms.structured_outputs(wish), llm.vocab_size)
        self.salt = cache_salt(request, record.principal)
        self.id = f"cmpl-{record.request_id}"
        self._server, self._request = server, request
        self._created = int(time.time())
        self._model = record.model
        as_ids = bool(request.return_tokens_as_token_ids or config.return_tokens_as_token_ids)
        self._names = TokenNames(llm._need_tokenizer(), as_ids)
        options = request.stream_options
        self.include_usage = bool(config.enable_force_include_usage or (options and options.include_usage))
        self._running_usage = bool(options and options.continuous_usage_stats)
        self._prompts: list[Prompt] = []
        self._completion_tokens = 0
        sequences = self.num_prompts * self.params.n
        self._unsent = [True] * sequences  # nothing of the sequence was sent yet
        self._legacy = [LegacyLogprobs(self._names, request.logprobs or 0) for _ in range(sequences)]
        self._head = (
            f'data: {{"id":{quoted(self.id)},"object":"text_completion","created":{self._created},'
            f'"model":{quoted(record.model)},"choices":['
        )
        if config.audit_log_text:
            record.prompt_text, record.output_text = request.prompt, {}

    @property
    def text_length(self) -> int:
        return sum(len(prompt) if isinstance(prompt, str) else 4 * len(prompt) for prompt in self._request.prompt)

    def render(self) -> list[Prompt]:
        request, llm = self._request, self._server.llm
        prompts = []
        for i, prompt in enumerate(request.prompt):
            if isinstance(prompt, str):
                ids = llm.encode(prompt)
            else:
                ids = prompt
                if ids and max(ids) >= llm.vocab_size:
                    message = f"prompt {i}: token id {max(ids)} is not below the vocabulary's {llm.vocab_size}"
                    raise ApiError(400, message, param="prompt")
            ids = truncated(ids, request.truncate_prompt_tokens)
            kept = isinstance(prompt, str) and request.truncate_prompt_tokens is None
            text = prompt if kept else llm.decode(ids) if request.echo else None
            prompts.append(Prompt(text, ids))
        return prompts

    # -- events

    def begin(self, prompts: list[Prompt]) -> str:
        self._prompts = prompts
        return ""

    def events(self, output: StreamOutput) -> str:
        self._completion_tokens += len(output.token_ids)
        index, text = output.index, output.text
        prompt = self._prompts[index // self.params.n]
        first, self._unsent[index] = self._unsent[index], False
        if first and self._request.echo:
            text = (prompt.text or "") + text
        finished = output.finish_reason is not None
        ids = self._request.return_token_ids
        if not (text or output.logprobs or finished or (ids and output.token_ids)):
            return ""
        logprobs, more = "null", ""
        if output.logprobs:
            logprobs = dumped(self._legacy[index].add(output.token_ids, list(output.logprobs)))
        if ids:
            more = f',"token_ids":{dumped(output.token_ids)}'
            more += f',"prompt_token_ids":{dumped(prompt.token_ids)}' if first else ""
        reason = f'"{output.finish_reason}"' if finished else "null"
        choice = (
            f'{{"index":{index},"text":{quoted(text)},"logprobs":{logprobs},"finish_reason":{reason},'
            f'"stop_reason":{dumped(output.stop_reason)}{more}}}'
        )
        return f"{self._head}{choice}]{self._usage_field()}}}\n\n"

    def _usage_field(self) -> str:
        if self._running_usage:
            before = sum(len(prompt.token_ids) for prompt in self._prompts)
            total = before + self._completion_tokens
            counts = {"prompt_tokens": before, "completion_tokens": self._completion_tokens, "total_tokens": total}
            return f',"usage":{dumped(counts)}'
        return ',"usage":null' if self.include_usage else ""

    def usage_event(self, usage: dict[str, Any]) -> str:
        return f'{self._head}],"usage":{dumped(usage)}}}\n\n'

    # -- the whole response

    def whole(self, prompts: list[Prompt], sequences: list[Sequence], usage: dict[str, Any]) -> dict[str, Any]:
        samples = self.params.n
        choices = []
        for sequence in sequences:
            leader = sequences[sequence.index - sequence.index % samples]
            choices.append(self._whole_choice(prompts[sequence.index // samples], sequence, leader))
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }

    def _whole_choice(self, prompt: Prompt, sequence: Sequence, leader: Sequence) -> dict[str, Any]:
        """leader: the first sample of the prompt, which alone carries the prompt's log-probabilities."""
        request = self._request
        assert sequence.last is not None and leader.last is not None
        text, token_ids = sequence.text, sequence.token_ids
        rows: list[dict[int, Logprob] | None] = list(sequence.logprobs)
        if request.echo:
            text = (prompt.text or "") + text
            token_ids = prompt.token_ids + token_ids
            rows = (leader.last.prompt_logprobs or []) + rows
        choice: dict[str, Any] = {
            "index": sequence.index,
            "text": text,
            "logprobs": None
            if request.logprobs is None
            else LegacyLogprobs(self._names, request.logprobs).add(token_ids, rows),
            "finish_reason": sequence.last.finish_reason,
            "stop_reason": sequence.last.stop_reason,
        }
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(leader.last.prompt_logprobs)
        if request.return_token_ids:
            choice["token_ids"] = sequence.token_ids
            choice["prompt_token_ids"] = prompt.token_ids
        return choice

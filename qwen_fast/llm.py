"""LLM: the engine for scripts and notebooks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._group import Group
from ._logits import logits_array, start_logits
from .base import STREAM_UNREAD_TOKENS, BaseLLM
from .outputs import RequestOutput, StreamOutput
from .params import SamplingParams
from .progress import Progress
from .prompts import conversation_list, one_conversation, params_list, prompt_list

if TYPE_CHECKING:
    import numpy

    from .cost.report import Report

_SWEEP_S = 0.1  # between two looks at all requests of generate(), for the progress display


class LLM(BaseLLM):
    """A loaded model, for scripts and notebooks. Methods may be called from several threads.

    stream() yields text as it comes, generate() and chat() return whole outputs, logits() returns raw scores.
    A context manager; close() ends it. For the options see __init__.
    """

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: int = 0,
    ) -> Iterator[StreamOutput]:
        """A generator of increments, one for each read: StreamOutput(text, token_ids, logprobs, finish_reason, ...).

        prompt: a text, a list of token ids, {"prompt_token_ids": [...]}, or messages (a list of {"role", "content"}),
        to which the chat template is applied. With n > 1 the samples' increments come mixed; see `.index`.

        The request starts with the call. Closing the generator, leaving its loop, or an exception in it (Ctrl-C)
        cancels the request; the engine stays usable. Where nobody reads, generation pauses after 512 tokens.
        cache_salt: requests share cached prompt beginnings only under the same salt.
        """
        group = self._start(
            self._prompt(prompt),
            sampling_params,
            request_id,
            max_unread_tokens=STREAM_UNREAD_TOKENS,
            cache_salt=cache_salt,
        )
        return self._iterate(group)

    def _iterate(self, group: Group) -> Iterator[StreamOutput]:
        yield from group.stream()  # a frame that keeps self, and with it the engine, alive

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """All outputs, in the order of the prompts.

        prompts: a prompt (text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}) or a list of any mix of them.
        sampling_params: one for all, or one for each.
        progress: show a progress display; None: in a notebook and on a terminal. use_tqdm is vLLM's name for it.

        If one prompt is refused or one request fails, or on Ctrl-C, all are cancelled and the exception is raised.
        """
        prompts = prompt_list(prompts)
        many = params_list(sampling_params, len(prompts))
        return self._generate(
            [(lambda p=prompt: self._prompt(p)) for prompt in prompts], many, progress if use_tqdm is None else use_tqdm
        )

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stream: bool = False,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        split_special_tokens: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        use_tqdm: bool | None = None,
    ) -> Any:
        """generate() for conversations: a list of messages, or a list of such lists. A list of RequestOutput.

        stream: the generator of stream() in its place, for one conversation.
        tools: OpenAI's function descriptions. The other options: see apply_chat_template.
        """
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "split_special_tokens": split_special_tokens,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        if stream:
            prompt = self.apply_chat_template(one_conversation(messages), **options)
            (params,) = params_list(sampling_params, 1)
            return self._iterate(self._start(prompt, params, max_unread_tokens=STREAM_UNREAD_TOKENS))
        conversations = conversation_list(messages)
        many = params_list(sampling_params, len(conversations))
        makers = [(lambda c=conversation: self.apply_chat_template(c, **options)) for conversation in conversations]
        return self._generate(makers, many, progress if use_tqdm is None else use_tqdm)

    def logits(self, token_ids: Any, start: int = 0, stop: int | None = None) -> numpy.ndarray:
        """The model's raw logits after each of the positions start .. stop - 1 of token_ids: float32, shape
        (stop - start, vocab_size). stop None: the end. A text is tokenised first. Needs numpy."""
        _, ids = self._prompt(token_ids)
        group = start_logits(self, ids, start, stop)
        (request,) = group.requests
        try:
            while (output := request.read(None)) is None or not output["finished"]:
                pass
        finally:
            group.cancel()
        return logits_array(output, self.vocab_size)

    def cost_report(self, workload: Any = None, **options: Any) -> Report:
        """Measures what this engine costs: memory, time, utilisation, energy, money. A cost.Report, which shows itself in a
        notebook, prints as tables, and has to_json(), to_html() and write(folder).

        workload: None (the workloads of the two studies), "512/128" or (512, 128) (prompt and output tokens), the path of a
        JSONL file of prompts, a cost.Workload, or a list of these.
        options: users (numbers at once), quick (default True: short windows and requests), prices (cost.Prices; none: no
        money), budget_seconds, levers (default True), and fields of cost.Settings.

        Other requests that run meanwhile are in the figures. Levers that need an engine loaded otherwise say `not
        measured`: `qwen-fast cost` measures them. ValueError or TypeError for options that are none.
        """
        from .cost.api import cost_report

        return cost_report(self, workload, **options)

    def _generate(self, makers: list[Any], many: list[SamplingParams], progress: bool | None) -> list[RequestOutput]:
        groups: list[Group] = []
        try:
            with Progress("Generating", len(makers), enabled=progress) as bar:
                for i, (make, params) in enumerate(zip(makers, many)):
                    try:
                        groups.append(self._start(make(), params))
                    except (TypeError, ValueError) as error:
                        if len(makers) > 1 and error.args:
                            error.args = (f"prompt {i}: {error.args[0]}", *error.args[1:])
                        raise
                return self._drain(groups, bar)
        except BaseException:
            for group in groups:
                group.cancel()
            raise

    def _drain(self, groups: list[Group], bar: Progress) -> list[RequestOutput]:
        completions = [group.completions() for group in groups]
        unfinished = [len(group.requests) for group in groups]
        pending = deque((i, index) for i, group in enumerate(groups) for index in range(len(group.requests)))
        tokens = done = 0
        began = time.monotonic()

        def take(i: int, index: int, timeout: float | None) -> None:
            nonlocal tokens, done
            output = groups[i].read(index, timeout)
            if output is None:
                return
            groups[i].collect(completions[i], output)
            tokens += len(output.token_ids)
            if output.finished:
                unfinished[i] -= 1
                done += unfinished[i] == 0

        # Requests run in about the order of submission, so waiting for the first costs nothing; the sweep over those
        # that may run beside it is there for the display.
        window = 2 * self._engine.info()["max_num_seqs"] if bar.enabled else 0
        next_sweep = time.monotonic() + _SWEEP_S
        while pending:
            i, index = pending[0]
            if completions[i][index].finished:
                pending.popleft()
                continue
            take(i, index, _SWEEP_S if bar.enabled else None)
            now = time.monotonic()
            if bar.enabled and now >= next_sweep:
                for position in range(min(window, len(pending))):
                    i, index = pending[position]
                    if not completions[i][index].finished:
                        take(i, index, 0)
                bar.update(done, note=f"{tokens / max(now - began, 1e-9):.0f} tokens/s")
                next_sweep = time.monotonic() + _SWEEP_S
        bar.update(done)
        return [group.result(completion) for group, completion in zip(groups, completions)]

"""The engine requests behind one user request: n samples of a prompt, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .outputs import CompletionOutput, Logprob, RequestOutput, StreamOutput, Timings, Usage

if TYPE_CHECKING:
    from ._engine import Engine, Request
    from ._guidance import GuidedEngine
    from ._guided import GuidedRequest

# Fields of SamplingParams that the engine takes under the same name.
_PASSED = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "priority",
)


class Group:
    """Submits n requests at once and turns their reads into StreamOutput.

    values: SamplingParams.resolved() with bad_words as token ids and a seed. extra: other arguments of Engine.submit.
    decode: the bytes of a token id.
    """

    def __init__(
        self,
        engine: Engine | GuidedEngine,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        values: Mapping[str, Any],
        decode: Callable[[int], bytes],
        extra: Mapping[str, Any],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self._decode = decode
        self._detokenize = values["detokenize"]
        self._has_logprobs = values["logprobs"] is not None
        self._seed = values["seed"]
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._usages: dict[int, Usage] = {}
        self.requests: list[Request | GuidedRequest] = []
        options = {name: values[name] for name in _PASSED}
        leader: Any = None
        try:
            for index in range(values["n"]):
                request = engine.submit(
                    prompt_token_ids,
                    **options,
                    bad_words=values["bad_words"] or None,
                    eos_token_ids=values["eos_token_ids"],
                    seed=self._seed,
                    sample_index=index,
                    leader=leader,
                    **extra,
                )
                options["prompt_logprobs"] = None  # one sample is enough for them
                self.requests.append(request)
                leader = leader or request
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends what has not ended. From any thread."""
        for request in self.requests:
            request.cancel()

    def read(self, index: int, timeout: float | None) -> StreamOutput | None:
        """What is new of a sample, waiting up to `timeout` seconds (None: for ever). A request that failed raises its
        error."""
        while True:
            raw = self.requests[index].read(timeout)
            if raw is None:
                return None
            if raw["finished"] and raw["error"] is not None:
                raise raw["error"]
            if raw["finished"] or raw["token_ids"] or raw["text"]:
                return self._increment(index, raw)
            if timeout is not None:
                return None

    def stream(self) -> Iterator[StreamOutput]:
        """Every increment of every sample, as they come. Cancels what is left when it is closed."""
        pending = list(range(len(self.requests)))
        try:
            while pending:
                # All samples advance in the same steps: wait on one of them, then look at the others. The bound is for
                # the case that the one waited for is queued while others run.
                only = len(pending) == 1
                came = False
                for position, index in enumerate(tuple(pending)):
                    output = self.read(index, None if only else (0.01 if position == 0 else 0))
                    if output is not None:
                        came = True
                        if output.finished:
                            pending.remove(index)
                        yield output
                if not came and not only:
                    pending.append(pending.pop(0))
        finally:
            self.cancel()

    def collect(self, completions: list[CompletionOutput], output: StreamOutput) -> None:
        """Adds an increment to the sample that it belongs to."""
        completion = completions[output.index]
        completion.text += output.text
        completion.token_ids += output.token_ids
        if output.logprobs is not None:
            if completion.logprobs is None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
            completion.logprobs += output.logprobs
            for token_id, row in zip(output.token_ids, output.logprobs):
                completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + row[token_id].logprob
        if output.finished:
            completion.finish_reason = output.finish_reason
            completion.stop_reason = output.stop_reason
            completion.seed = output.seed
            completion.timings = output.timings

    def completions(self) -> list[CompletionOutput]:
        """Empty samples to collect into."""
        return [CompletionOutput(index) for index in range(len(self.requests))]

    def result(self, completions: list[CompletionOutput]) -> RequestOutput:
        """The whole request, with what was read so far."""
        usage = None
        if 0 in self._usages:
            usage = self._usages[0]
            for index, one in self._usages.items():
                usage = usage.plus(one) if index > 0 else usage
        finished = all(completion.finished for completion in completions)
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, completions, self.prompt_logprobs, finished, usage
        )

    def _increment(self, index: int, raw: Mapping[str, Any]) -> StreamOutput:
        output = StreamOutput(
            self.request_id,
            index,
            raw["text"] if self._detokenize else "",
            raw["token_ids"],
            [self._row(row) for row in raw["logprobs"] or ()] if self._has_logprobs else None,
        )
        if raw["finished"]:
            output.finish_reason = raw["finish_reason"]
            output.stop_reason = raw["stop_reason"]
            output.seed = raw["seed"]
            count = raw["num_output_tokens"]
            output.usage = self._usages[index] = Usage.of(raw["usage"])
            output.timings = Timings(
                raw["arrival_time"],
                raw["first_scheduled_time"],
                raw["first_token_time"],
                raw["last_token_time"],
                raw["finished_time"],
                count,
                raw["num_preemptions"],
            )
            rows = raw["prompt_logprobs"]
            if rows is not None:
                output.prompt_logprobs = [None if row is None else self._row(row) for row in rows]
                if index == 0:
                    self.prompt_logprobs = output.prompt_logprobs
        return output

    def _row(self, row: Sequence[tuple[int, float, int]]) -> dict[int, Logprob]:
        decoded: dict[int, Logprob] = {}
        for token_id, logprob, rank in row:
            if token_id >= 0 and token_id not in decoded:  # -1: the logits were not finite
                decoded[token_id] = Logprob(logprob, rank, self._decode(token_id).decode("utf-8", "replace"))
        return decoded

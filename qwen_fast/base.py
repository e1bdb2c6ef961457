"""What LLM and AsyncLLM share: loading, prompts, parameters, and questions about the engine."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._group import Group
from ._guidance import Guidance
from .chat import ChatTemplate, is_conversation, load_chat_template
from .errors import ModelError
from .hub import resolve_model
from .loading import end_tokens, load_engine, load_tokenizer, read_generation_config
from .options import engine_options, merged_overrides, refuse_unknown
from .params import SamplingParams, generation_defaults
from .prompts import refuse_bytes
from .tokenizer import Tokenizer, check_token_ids, read_json_object
from .utils import derived_seed, format_bytes, fresh_seed

if TYPE_CHECKING:
    from ._grammars import CompiledGrammar

STREAM_UNREAD_TOKENS = 512  # a stream that nobody reads pauses after so many tokens


class BaseLLM:
    """A loaded model. Use LLM or AsyncLLM."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        quantization_group_size: int = 128,
        activation_dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        kv_cache_16bit_window: int = 0,
        kv_cache_16bit_layers: Sequence[int] = (),
        lm_head_dtype: str = "auto",
        block_size: int = 32,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        tensor_parallel_size: int = 1,
        tensor_parallel_comm: str = "auto",
        watchdog_seconds: float | None = None,
        seed: int | None = None,
        kv_cache_memory: int | str | None = None,
        kv_cache_tokens: int | None = None,
        memory_utilization: float | None = None,
        gpu_memory_utilization: float | None = None,
        memory: int | str | None = None,
        cpu_offload: str | None = None,
        cpu_offload_gb: float | None = None,
        batch_invariant: bool = False,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        rope_scaling: Mapping[str, Any] | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        load_format: str = "auto",
        num_threads: int | None = None,
        isa: str = "auto",
        max_steps_in_flight: int = 0,
        max_waiting_requests: int = 0,
        dummy_seed: int = 0,
        meter: bool = True,
        tokenizer: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        generation_config: str | Mapping[str, Any] = "auto",
        revision: str | None = None,
        download_dir: str | None = None,
        trust_remote_code: bool = False,
        progress: bool | None = None,
        **vllm_options: Any,
    ) -> None:
        """Loads a model.

        model: "demo" (the small model in the package), a checkpoint directory, or a Hugging Face hub id.
        device: "auto" (a GPU where this build and this machine have one that it can use, else the CPU), "cpu", "cuda",
            or "cuda:1", the GPU of that number.
        dtype: "auto" (as in the checkpoint), "bfloat16", "float16" / "half", "float32".
        quantization: None / "auto" (as the checkpoint is), "none", "w4" (to 4 bits while loading), "awq", "gptq",
            "compressed-tensors". quantization_group_size: 32, 64 or 128, for "w4".
        activation_dtype: "auto" (on the CPU int8 beside 4- and 8-bit weights, on a GPU bfloat16), "int8", "float32".
        kv_cache_dtype: "auto" (dtype), "bfloat16", "float32", "fp8_e4m3" ("fp8"), "int8", "int4", "nf4". Keys of 8 and
            4 bits are stored without k_proj's bias, which is added exactly when they are read; they need a head_dim that
            is a multiple of 32; on a GPU, of 64 or 128, and dtype bfloat16.
        kv_cache_16bit_window: beside such a cache, each query reads the newest so many positions, its own included, in
            16 bits. kv_cache_16bit_layers: indices of layers whose cache has 16 bits. A cache of 16 or 32 bits ignores
            both.
        lm_head_dtype: "auto" (int8 on the CPU where the layers are quantised, and on a GPU with cpu_offload where the
            head is tied to the embedding; else "model"), "model", "int8", "int4".
        block_size: tokens in a KV cache block: 16, 32, 64, 128.
        max_model_len: prompt and output together; None: the checkpoint's, or what the KV cache can hold.
        max_num_seqs, max_num_batched_tokens: sequences and tokens in one step.
        tensor_parallel_size: ranks that each hold a part of every layer. On the CPU they are groups of threads, which
            share num_threads out: no gain in speed, but the same arithmetic. On GPUs each rank has one, from `device`
            on, of one host: at most 8.
        tensor_parallel_comm: how these GPUs reach each other: "auto" (each other's memory where they can, else NCCL),
            "peer" (refused where they cannot), "nccl" (found by the loader or as the package nvidia-nccl-cu13).
        watchdog_seconds: with several ranks, the longest time of a step: a rank that hangs longer fails the engine, and
            GPUs wait for each other at most a quarter of it. A rank that fails does so at once: in both cases every
            request has its error within 5 s. 0: no limit; None: 120 on GPUs, 1800 on the CPU.
        seed: requests without a seed get seeds that follow from it and from their number in order of submission: a
            program run again gives the same outputs. None: fresh seeds.
        kv_cache_memory: bytes, or a text such as "6GiB". kv_cache_tokens: the same in tokens.
        memory_utilization: without a size above, weights and KV cache take this share of the memory that is free: the
            cache what the weights leave, at most max_num_seqs sequences of max_model_len. None: 0.5 (of a GPU's memory
            0.9), and the cache then holds at most 65,536 tokens or two sequences of max_model_len.
            gpu_memory_utilization is an alias.
        memory: weights, workspace and KV cache together take at most this, in bytes or as "6GiB": the cache gets what
            the others leave.
        cpu_offload: "embeddings" keeps the embedding in the host's memory (where it is also the head, the head becomes
            an int8 one on the GPU: see lm_head_dtype). cpu_offload_gb: so many GiB of layers too, whole layers; each
            step then reads them over the bus. With batch_invariant and one lm_head_dtype neither changes a bit. The CPU
            refuses both.
        batch_invariant: the same bits for a request whatever runs beside it. On the CPU always so; on a GPU it costs
            speed, and without it only runs with the same neighbours repeat bit for bit.
        enforce_eager: kernels are launched one by one, no graphs are captured.
        enable_prefix_caching: share the KV cache of equal prompt beginnings.
        rope_scaling: such as {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}.
        hf_overrides: keys laid over config.json.
        load_format: "auto" (safetensors) or "dummy" (random weights in the config's shapes; dummy_seed varies them).
        num_threads: None: the CPUs of this process. isa: "auto", "scalar", "avx2", "avx512", "avx512_vnni".
        max_steps_in_flight: 0 (the backend's choice), 1, 2. max_waiting_requests: more are refused; 0: no limit.
        meter: count what each request takes in bytes, FLOPs, time and energy: outputs' usage, stats()["meter"]. False
            counts tokens only: it is there to measure what metering costs.
        tokenizer: a directory or hub id to take the tokenizer from. chat_template: jinja text or the path of a file.
        generation_config: "auto" (generation_config.json), "vllm" (ignore it), or a dict in its place.
        revision, download_dir: for a hub id.
        trust_remote_code: must stay False: no code of a checkpoint is ever run.
        progress: show a progress bar while loading; None: in a notebook and on a terminal.

        Other options of vLLM are accepted where they ask for nothing that is missing: options.VLLM_OPTIONS lists them.
        What is not built raises NotImplementedError and names the option. A checkpoint that is wrong raises ModelError.
        Without a tokenizer.json only token ids can be prompts.
        """
        refuse_unknown(vllm_options, type(self).__name__)
        if trust_remote_code:
            raise ValueError("trust_remote_code=True is refused: no code of a checkpoint is ever run")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        options = engine_options(
            device=device,
            dtype=dtype,
            quantization=quantization,
            quantization_group_size=quantization_group_size,
            activation_dtype=activation_dtype,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_16bit_window=kv_cache_16bit_window,
            kv_cache_16bit_layers=kv_cache_16bit_layers,
            lm_head_dtype=lm_head_dtype,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            tensor_parallel_size=tensor_parallel_size,
            tensor_parallel_comm=tensor_parallel_comm,
            watchdog_seconds=watchdog_seconds,
            kv_cache_memory=kv_cache_memory,
            kv_cache_tokens=kv_cache_tokens,
            memory_utilization=memory_utilization,
            gpu_memory_utilization=gpu_memory_utilization,
            memory=memory,
            cpu_offload=cpu_offload,
            cpu_offload_gb=cpu_offload_gb,
            batch_invariant=batch_invariant,
            enforce_eager=enforce_eager,
            enable_prefix_caching=enable_prefix_caching,
            rope_scaling=rope_scaling,
            hf_overrides=hf_overrides,
            load_format=load_format,
            num_threads=num_threads,
            isa=isa,
            max_steps_in_flight=max_steps_in_flight,
            max_waiting_requests=max_waiting_requests,
            dummy_seed=dummy_seed,
            meter=meter,
        )
        self.model, self._device = os.fspath(model), device
        self.model_dir = resolve_model(model, revision=revision, download_dir=download_dir)
        self.config = {
            **read_json_object(Path(self.model_dir, "config.json")),
            **merged_overrides(rope_scaling, hf_overrides),
        }
        self.generation_config = read_generation_config(self.model_dir, generation_config)
        try:
            self._defaults = generation_defaults(self.generation_config)
        except ValueError as error:
            raise ModelError(str(error)) from None
        vocab_size = self.config.get("vocab_size")
        self.tokenizer, self._templates = load_tokenizer(
            self.model_dir,
            tokenizer,
            vocab_size if isinstance(vocab_size, int) else None,
            chat_template,
            revision,
            download_dir,
        )
        self._eos_token_ids = end_tokens(self.generation_config, self.config, self.tokenizer)
        self._engine = load_engine(self.model, self.model_dir, options, self.tokenizer, progress)
        self._close = weakref.finalize(self, self._engine.close)  # also at interpreter exit
        info = self._engine.info()
        self.vocab_size: int = info["vocab_size"]
        self.max_model_len: int = info["max_model_len"]
        self._seed = seed
        self._guidance = Guidance(self._engine, self.tokenizer, self.vocab_size, self._eos_token_ids)
        self._seed_numbers = itertools.count()
        self._request_numbers = itertools.count()
        self._loaded()

    def _loaded(self) -> None:
        """For a subclass: the engine is there."""

    # -- questions

    def info(self) -> dict[str, Any]:
        """Shapes, limits and the options as resolved; see _engine.Engine.info."""
        return self._engine.info()

    def stats(self) -> dict[str, Any]:
        """Counters and, under "memory", the bytes of embedding, layers, head, workspace and KV cache."""
        return self._engine.stats()

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids of text; see Tokenizer.encode."""
        return self._need_tokenizer().encode(text, allow_special)

    tokenize = encode

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self._need_tokenizer().decode(token_ids, skip_special_tokens)

    def reset_prefix_cache(self) -> None:
        """Forgets cached prompt beginnings."""
        self._engine.reset_prefix_cache()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def closed(self) -> bool:
        return self._engine.closed

    def close(self) -> None:
        """Ends all requests (finish_reason "abort"). Idempotent; done by itself at interpreter exit."""
        self._close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<{type(self).__name__} {self.model!r}, closed>"
        info, memory = self.info(), self.stats()["memory"]
        cache = format_bytes(memory["kv_cache_bytes"])
        weights = memory["embedding_bytes"] + memory["layers_bytes"] + memory["head_bytes"]
        return (
            f"<{type(self).__name__} {self.model!r} on {info['backend']}: {info['num_layers']} layers, "
            f"{info['quantization']}, weights {format_bytes(weights)}, KV cache {cache}: "
            f"{info['num_blocks'] * info['block_size']} tokens, max_model_len {info['max_model_len']}>"
        )

    # -- prompts

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        split_special_tokens: bool = False,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """The prompt text of messages and its token ids.

        add_generation_prompt: None: True, unless continue_final_message.
        split_special_tokens: control tokens written out in a message's content stay ordinary text (Hugging Face,
            and the default here, turn them into control tokens).
        """
        tokenizer = self._need_tokenizer()
        templates = (
            self._templates if chat_template is None else load_chat_template(self.model_dir, tokenizer, chat_template)
        )
        template: ChatTemplate | None = templates.get("tool_use") if tools else None
        template = template or templates.get("default")
        if template is None:
            raise ModelError(
                f"{self.model}: the checkpoint has no chat template; give chat_template= or prompt with plain text"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        text, quoted = template.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            quote=tokenizer.added_pattern if split_special_tokens else None,
        )
        if not quoted:
            return text, tokenizer.encode(text)
        ids = tokenizer.encode_rendered(text, quoted)
        for mark, content in quoted.items():
            text = text.replace(mark, content)
        return text, ids

    def _prompt(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Text (None for ids) and token ids of anything that a prompt can be."""
        text: str | None
        refuse_bytes(prompt)
        if isinstance(prompt, str):
            text, ids = prompt, self.encode(prompt)
        elif is_conversation(prompt):
            text, ids = self.apply_chat_template(prompt)
        elif isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                text, ids = prompt.get("prompt"), check_token_ids(prompt["prompt_token_ids"], self.vocab_size)
            elif isinstance(prompt.get("prompt"), str):
                return self._prompt(prompt["prompt"])
            else:
                raise ValueError(
                    f"a prompt dict needs 'prompt' (text) or 'prompt_token_ids', got {sorted(map(str, prompt))}"
                )
        elif isinstance(prompt, (list, tuple)) or hasattr(prompt, "tolist"):
            text, ids = None, check_token_ids(prompt, self.vocab_size)
        else:
            raise TypeError(f"a prompt must be a text, token ids, messages or a dict, got {type(prompt).__name__}")
        if not ids:
            raise ValueError("the prompt is empty: it has no tokens")
        return text, ids

    # -- requests

    def _start(
        self,
        prompt: tuple[str | None, list[int]],
        params: SamplingParams | None,
        request_id: str | None = None,
        grammar: CompiledGrammar | None = None,
        **extra: Any,
    ) -> Group:
        """Submits a prompt. grammar: structured_outputs where they are compiled already. extra: other arguments of
        Engine.submit."""
        if params is not None and not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
        values = (params or SamplingParams()).resolved(self._defaults)
        if values["seed"] is None:
            values["seed"] = self._next_seed()
        if values["stop"]:
            self._need_tokenizer()
        values["bad_words"] = self._bad_word_ids(values["bad_words"])
        values["eos_token_ids"] = self._eos_token_ids
        text, ids = prompt
        if values["max_tokens"] > 0 and (params is None or params.max_tokens is None):
            room = self.max_model_len - len(ids)  # generation_config's default must not refuse a long prompt
            values["max_tokens"] = max(1, min(values["max_tokens"], room))
        decode = self.tokenizer.token_bytes if self.tokenizer is not None else lambda token_id: b""
        request_id = request_id or str(next(self._request_numbers))
        form = values["structured_outputs"]
        engine = self._engine if form is None else self._guidance.submitter(form, values["n"], grammar)
        return Group(engine, request_id, text, ids, values, decode, extra)

    def _next_seed(self) -> int:
        return fresh_seed() if self._seed is None else derived_seed(self._seed, next(self._seed_numbers))

    def _bad_word_ids(self, words: Sequence[str | list[int]]) -> list[list[int]]:
        """Of texts; token ids are taken as they are. A word at the start of a text and after a space are different tokens, often different in number too; both are
        banned, the second where the space melts into the first token (else the first ban covers it)."""
        banned: list[list[int]] = []
        for word in words:
            if not isinstance(word, str):
                banned.append(word)
                continue
            bare = self.encode(word.lstrip())
            spaced = self.encode(" " + word.lstrip())
            if bare:
                banned.append(bare)
            if bare and spaced[0] != bare[0] and spaced[1:] != bare:
                banned.append(spaced)
        return banned

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ModelError(
                f"{self.model}: the checkpoint has no tokenizer.json; give tokenizer=, or prompt with token ids"
            )
        return self.tokenizer

    def override_generation_config(self, values: Mapping[str, Any]) -> None:
        """Lays values over generation_config.json: the defaults of requests that begin later. ValueError where one is
        no valid parameter."""
        config = {**self.generation_config, **values}
        self._defaults = generation_defaults(config, "generation_config")
        self.generation_config = config

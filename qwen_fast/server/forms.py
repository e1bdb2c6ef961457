"""Structured output and tool calls of requests: what state.OutputForms asks for."""

from __future__ import annotations

from ..async_llm import AsyncLLM
from ..structured import StructuredOutputsParams
from ..tools import HermesParser, tool_grammar
from .errors import ApiError
from .state import DeltaParser, OutputWish


class Forms:
    """tool_call_parser: "hermes", or None: requests that want tools called are refused."""

    def __init__(self, llm: AsyncLLM, tool_call_parser: str | None = "hermes") -> None:
        self._llm = llm
        self._tool_calls = tool_call_parser is not None
        llm._guidance.prepare()

    def structured_outputs(self, wish: OutputWish) -> StructuredOutputsParams | None:
        if wish.tool_choice != "none" and not self._tool_calls:
            raise ApiError(400, "this server parses no tool calls (tool_call_parser is off)", param="tools")
        try:
            if wish.tool_choice in ("required", "function"):
                tokenizer = self._llm._need_tokenizer()
                return tool_grammar(wish.tools, tokenizer, function=wish.function, parallel=wish.parallel)
            return StructuredOutputsParams(**wish.forms) if wish.forms else None
        except (TypeError, ValueError) as error:
            forced = wish.tool_choice in ("required", "function")
            raise ApiError(400, str(error), param="tools" if forced else next(iter(wish.forms))) from None

    def parser(self, wish: OutputWish) -> DeltaParser | None:
        return None if wish.tool_choice == "none" else HermesParser(parallel=wish.parallel)

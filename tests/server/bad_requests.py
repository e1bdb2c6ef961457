"""Requests that must be refused: what is sent, and the status and the words that come back."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


class Bad(NamedTuple):
    name: str
    path: str
    body: bytes
    status: int
    says: str  # a part of the message
    headers: dict[str, str] = JSON


def chat(name: str, status: int, says: str, **fields: Any) -> Bad:
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 2, **fields}
    return Bad(f"chat: {name}", CHAT, json.dumps(body).encode(), status, says)


def text(name: str, status: int, says: str, **fields: Any) -> Bad:
    body = {"model": "demo", "prompt": "Hi", "max_tokens": 2, **fields}
    return Bad(f"text: {name}", TEXT, json.dumps(body).encode(), status, says)


def raw(name: str, status: int, says: str, body: bytes | str, path: str = CHAT, headers: dict[str, str] = JSON) -> Bad:
    return Bad(f"raw: {name}", path, body if isinstance(body, bytes) else body.encode(), status, says, headers)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi", **fields}]


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, **fields}}]


BODIES = [
    raw("empty", 400, "empty", b""),
    raw("spaces", 400, "empty", b" \n "),
    raw("no JSON", 400, "not valid JSON", "{messages: 1}"),
    raw("cut off", 400, "not valid JSON", '{"messages": [{"role": "user"'),
    raw("two values", 400, "not valid JSON", "{} {}"),
    raw("trailing comma", 400, "not valid JSON", '{"messages": [],}'),
    raw("control character", 400, "not valid JSON", b'{"model": "a\nb"}'),
    raw("an array", 400, "must be a JSON object, got an array", "[]"),
    raw("a string", 400, "must be a JSON object, got a string", '"x"'),
    raw("a number", 400, "must be a JSON object, got a number", "5"),
    raw("null", 400, "must be a JSON object, got null", "null"),
    raw("true", 400, "must be a JSON object, got a boolean", "true"),
    raw("NaN", 400, "NaN", '{"prompt": "x", "temperature": NaN}', TEXT),
    raw("infinity", 400, "-Infinity", '{"prompt": "x", "top_p": -Infinity}', TEXT),
    raw("1e999", 400, "1e999", '{"prompt": "x", "temperature": 1e999}', TEXT),
    raw("NaN in an unknown field", 400, "NaN", '{"prompt": "x", "odd": [NaN]}', TEXT),
    raw("500 digits", 400, "500 digits", '{"prompt": "x", "seed": ' + "9" * 500 + "}", TEXT),
    raw("a million digits", 400, "1000000 digits", '{"prompt": "x", "n": ' + "9" * 1_000_000 + "}", TEXT),
    raw("bad UTF-8", 400, "byte 12 is 0xff", b'{"prompt": "\xff\xfe"}', TEXT),
    raw("overlong UTF-8", 400, "not UTF-8", b'{"prompt": "\xc0\xaf"}', TEXT),
    raw("UTF-8 surrogate", 400, "not UTF-8", b'{"prompt": "\xed\xa0\x80"}', TEXT),
    raw("UTF-16", 400, "", '{"prompt": "x"}'.encode("utf-16"), TEXT),
    raw("lone surrogate", 400, "prompt: the text holds a lone surrogate", '{"prompt": "a\\ud800b"}', TEXT),
    raw("lone surrogate in a message", 400, "messages.0.content", '{"messages":[{"role":"user","content":"\\udfff"}]}'),
    raw("lone surrogate in a key", 400, "lone surrogate", '{"prompt": "x", "\\uD812": 1}', TEXT),
    raw("deep arrays", 400, "nested 33 levels deep; the limit is 32", '{"x":' + "[" * 32 + "]" * 32 + "}"),
    raw("a million brackets", 400, "1000000 levels", "[" * 1_000_000),
    raw("a million objects", 400, "limit is 32", '{"a":' * 200_000 + "1" + "}" * 200_000),
    raw("11 MiB", 413, "10485760 bytes", b'{"prompt": "' + b"x" * (11 * 2**20) + b'"}', TEXT),
    raw("form data", 415, "application/json", "prompt=x", TEXT, {"content-type": "application/x-www-form-urlencoded"}),
    raw("plain text", 415, "application/json", '{"prompt":"x"}', TEXT, {"content-type": "text/plain"}),
    raw("no content type", 415, "application/json", '{"prompt":"x"}', TEXT, {"content-type": ""}),
    raw("gzip", 415, "compressed", b"\x1f\x8b\x08", TEXT, {**JSON, "content-encoding": "gzip"}),
    raw("200 headers", 431, "the limit is 100", "{}", TEXT, {**JSON, **{f"x-{i}": "y" for i in range(200)}}),
    raw("no such route", 404, "no such route: /v1/nothing", "{}", "/v1/nothing"),
    raw("embeddings", 404, "no such route", "{}", "/v1/embeddings"),
]

NUMBERS = [
    *(
        chat(f"{name}={value!r}", 400, name, **{name: value})
        for name, values in {
            "n": (0, -1, 9, 2**31, 10**30, 1.5, "2", True, [1]),
            "max_tokens": (0, -1, 2**31, 10**18, "5", 2.5, False),
            "max_completion_tokens": (0, -5),
            "temperature": (-0.1, 101, 1e300, "hot", True, [0.5], {}),
            "top_p": (0, -1, 1.1, "1"),
            "top_k": (-2, 2**31, 1.5, "all"),
            "min_p": (-0.1, 1.5),
            "presence_penalty": (-2.1, 2.1, "none"),
            "frequency_penalty": (-3, 3),
            "repetition_penalty": (0, -1, 100.5),
            "seed": (2**64, -(2**63) - 1, 1.5, "7"),
            "min_tokens": (-1, 2**40, 3),  # 3: more than max_tokens
            "truncate_prompt_tokens": (-2, 0),
            "prompt_logprobs": (-1, 65, True),
            "priority": (2**31, 1),
        }.items()
        for value in values
    ),
    chat("top_logprobs=-1", 400, "top_logprobs", logprobs=True, top_logprobs=-1),
    chat("top_logprobs=65", 400, "top_logprobs", logprobs=True, top_logprobs=65),
    chat("top_logprobs alone", 400, "top_logprobs needs logprobs=true", top_logprobs=2),
    chat("logprobs=5", 400, "logprobs", logprobs=5),
    text("logprobs=-1", 400, "logprobs", logprobs=-1),
    text("logprobs=true", 400, "logprobs", logprobs=True),
    text("max_tokens=-1", 400, "max_tokens", max_tokens=-1),
    text("best_of=4", 400, "best_of is 4", best_of=4),
    chat("max_tokens over the context", 400, "maximum context length is 4096", max_tokens=4090),
    text("prompt over the context", 400, "maximum context length is 4096", prompt="word " * 5000),
    text("prompt ids over the context", 400, "maximum context length is 4096", prompt=[5] * 4096),
    text("a prompt that fills the context", 400, "maximum context length is 4096", prompt=[5] * 4096, max_tokens=None),
]

LISTS = [
    chat("17 stop strings", 400, "stop has 17 entries; the limit is 16", stop=["x"] * 17),
    chat("a megabyte of stop", 400, "stop.0 has 1000000 bytes; the limit is 256", stop="x" * 1_000_000),
    chat("257 bytes of stop", 400, "stop.1 has 258 bytes", stop=["a", "é" * 129]),
    chat("empty stop", 400, "stop[0] is empty", stop=""),
    chat("empty stop in a list", 400, "stop[1] is empty", stop=["a", ""]),
    chat("stop=5", 400, "stop", stop=5),
    chat("stop=[5]", 400, "stop", stop=[5]),
    chat("stop={}", 400, "stop", stop={}),
    chat("negative stop token", 400, "stop_token_ids.0", stop_token_ids=[-1]),
    chat("stop token beyond the vocabulary", 400, "stop_token_ids: token id 8192", stop_token_ids=[8192]),
    chat("stop token too large", 400, "stop_token_ids.0", stop_token_ids=[2**40]),
    chat("300 stop tokens", 400, "the limit is 256", stop_token_ids=[1] * 300),
    chat("logit_bias=101", 400, "logit_bias", logit_bias={"5": 101}),
    chat("logit_bias a list", 400, "logit_bias", logit_bias=[1, 2]),
    chat("logit_bias of a word", 400, "'fox' is none", logit_bias={"fox": 1}),
    chat("logit_bias of -1", 400, "'-1' is none", logit_bias={"-1": 1}),
    chat("logit_bias beyond the vocabulary", 400, "logit_bias: token id 9000", logit_bias={"9000": 1}),
    chat("logit_bias a text", 400, "logit_bias", logit_bias={"5": "much"}),
    chat("2000 biases", 400, "logit_bias has 2000 entries", logit_bias={str(i): 1 for i in range(2000)}),
    chat("no allowed tokens", 400, "allowed_token_ids", allowed_token_ids=[]),
    chat("allowed tokens beyond the vocabulary", 400, "allowed_token_ids: token id 8192", allowed_token_ids=[8192]),
    chat("bad_words=['']", 400, "bad_words[0] is empty", bad_words=[""]),
    chat("bad_words a text", 400, "bad_words", bad_words="fox"),
    chat("500 bad words", 400, "bad_words has 500 entries", bad_words=["a"] * 500),
    chat("a long bad word", 400, "bad_words.0 has 5000 bytes", bad_words=["a" * 5000]),
]

PROMPTS = [
    text("prompt=''", 400, "prompt is empty", prompt=""),
    text("prompt=[]", 400, "at least one prompt", prompt=[]),
    text("prompt=[[]]", 400, "prompt is empty", prompt=[[]]),
    text("prompt=['']", 400, "prompt is empty", prompt=[""]),
    text("prompt=null", 400, "prompt", prompt=None),
    text("prompt=5", 400, "prompt", prompt=5),
    text("prompt={}", 400, "prompt", prompt={}),
    text("prompt=[true]", 400, "prompt 0", prompt=[True]),
    text("prompt=[-1]", 400, "token id 0", prompt=[-1]),
    text("prompt=[1.5]", 400, "prompt 0", prompt=[1.5]),
    text("prompt=[1,'a']", 400, "token id 1", prompt=[1, "a"]),
    text("prompt=[8192]", 400, "token id 8192 is not below the vocabulary's 8192", prompt=[8192]),
    text("prompt=[2**63]", 400, "token id 0", prompt=[2**63]),
    text("prompt deep", 400, "prompt 0: token id 0", prompt=[[[1]]]),
    text("300 prompts", 400, "prompt has 300 entries; the limit is 256", prompt=["a"] * 300),
    text("100 prompts, n=8", 400, "prompt has 800 entries", prompt=["a"] * 100, n=8),
    text("suffix", 400, "suffix is not supported", suffix="end"),
    text("echo with logprobs in a stream", 400, "cannot be streamed", echo=True, logprobs=1, stream=True),
    raw("no prompt", 400, "prompt: this field is required", '{"model": "demo"}', TEXT),
]

CHATS = [
    raw("no messages", 400, "messages: this field is required", '{"model": "demo"}'),
    chat("messages=[]", 400, "messages", messages=[]),
    chat("messages a text", 400, "messages", messages="Hi"),
    chat("messages=[5]", 400, "messages.0", messages=[5]),
    chat("no role", 400, "messages.0.role: this field is required", messages=[{"content": "x"}]),
    chat("role=5", 400, "messages.0.role", messages=message(role=5)),
    chat("unknown role", 400, "unknown role 'wizard'", messages=message(role="wizard")),
    chat("content=5", 400, "messages.0.content", messages=message(content=5)),
    chat("an image", 400, "only text parts", messages=message(content=[{"type": "image_url", "image_url": {}}])),
    chat("a part without text", 400, "'text' must be a text", messages=message(content=[{"type": "text"}])),
    chat("content deep", 400, "levels deep", messages=message(content=nested(40))),
    chat("3000 messages", 400, "messages has 3000 entries; the limit is 2048", messages=MESSAGES * 3000),
    chat(
        "broken arguments",
        400,
        "arguments are not valid JSON",
        messages=[*MESSAGES, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    ),
    chat("tool_calls=5", 400, "messages.0.tool_calls", messages=message(tool_calls=5)),
    chat("add and continue", 400, "cannot both", add_generation_prompt=True, continue_final_message=True),
    chat("chat_template", 400, "chat_template is not taken", chat_template="{{ 1 }}"),
    chat("template variable messages", 400, "cannot be set", chat_template_kwargs={"messages": []}),
    chat("template variable tools", 400, "cannot be set", chat_template_kwargs={"tools": None}),
    chat("template variable eos_token", 400, "cannot be set", chat_template_kwargs={"eos_token": "x"}),
    chat("template variable __class__", 400, "cannot be set", chat_template_kwargs={"__class__": 1}),
    chat("a template variable with structure", 400, "the value must be", chat_template_kwargs={"x": {"y": 1}}),
    chat("a megabyte of template variable", 400, "1024 characters", chat_template_kwargs={"x": "y" * 1_000_000}),
]

OTHERS = [
    chat("unknown model", 404, "the model 'gpt-4' does not exist", model="gpt-4"),
    chat("empty model", 404, "the model '' does not exist", model=""),
    chat("model=5", 400, "model", model=5),
    chat("model of a megabyte", 400, "model", model="x" * 1_000_000),
    chat("stream='yes'", 400, "stream", stream="yes"),
    chat("stream=1", 400, "stream", stream=1),
    chat("stream_options alone", 400, "stream_options needs stream=true", stream_options={"include_usage": True}),
    chat("stream_options=5", 400, "stream_options", stream=True, stream_options=5),
    chat("include_usage=1", 400, "include_usage", stream=True, stream_options={"include_usage": 1}),
    chat("streamed prompt_logprobs", 400, "prompt_logprobs cannot be streamed", stream=True, prompt_logprobs=1),
    chat("a stream refused before it begins", 400, "unknown role", stream=True, messages=message(role="wizard")),
    chat("beam search", 400, "use_beam_search", use_beam_search=True),
    chat("cache_salt=''", 400, "cache_salt", cache_salt=""),
    chat("request_id with a newline", 400, "request_id", request_id="a\nb"),
    chat("long request_id", 400, "request_id", request_id="a" * 129),
    chat("response_format a text", 400, "response_format", response_format="json"),
    chat("response_format of another type", 400, "response_format.type", response_format={"type": "xml"}),
    chat("json_schema without one", 400, "json_schema.schema", response_format={"type": "json_schema"}),
    chat(
        "json_schema=5",
        400,
        "json_schema.schema",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
    ),
    chat("two forms", 400, "only one form", guided_regex="a+", guided_choice=["a"]),
    chat("no choices", 400, "guided_choice", guided_choice=[]),
    chat("regex=5", 400, "regex", structured_outputs={"regex": 5}),
    chat("a megabyte of regex", 400, "regex has 1000000 bytes; the limit is 65536", guided_regex="a" * 1_000_000),
    chat("a megabyte of grammar", 400, "grammar has 1000000", structured_outputs={"grammar": "x" * 1_000_000}),
    chat("50,000 choices", 400, "choice has ", guided_choice=["ab"] * 50_000),
    chat("a large schema", 400, "json has ", guided_json={"enum": ["x" * 1000] * 100}),
    chat("a large schema as text", 400, "json has ", guided_json='{"enum": [' + '"x",' * 20_000 + '"x"]}'),
    chat("a deep schema", 400, "json is nested 25 levels deep; the limit is 24", guided_json={"x": nested(24)}),
    chat("a tool with a large schema", 400, "parameters has ", tools=function(parameters={"x": "y" * 70_000})),
    chat("a tool with a deep schema", 400, "parameters is nested 26", tools=function(parameters={"x": nested(25)})),
    chat("tools a text", 400, "tools", tools="f"),
    chat("a tool without a function", 400, "tools.0.function: this field is required", tools=[{"type": "function"}]),
    chat("a tool without a name", 400, "tools.0.function.name", tools=[{"type": "function", "function": {}}]),
    chat("a tool with a bad name", 400, "tools.0.function.name", tools=function(name="a b")),
    chat("a tool with a long name", 400, "tools.0.function.name", tools=function(name="a" * 65)),
    chat("a tool with parameters=5", 400, "tools.0.function.parameters", tools=function(parameters=5)),
    chat("two tools of one name", 400, "two functions of one name", tools=function() * 2),
    chat("tool_choice without tools", 400, "tool_choice needs tools", tool_choice="auto"),
    chat("tool_choice of another word", 400, "tool_choice", tools=function(), tool_choice="maybe"),
    chat(
        "tool_choice of an unknown tool",
        400,
        "'g', which is not in tools",
        tools=function(),
        tool_choice={"type": "function", "function": {"name": "g"}},
    ),
    raw("tokenize nothing", 400, "give one of prompt and messages", "{}", "/tokenize"),
    raw("tokenize both", 400, "give one of", '{"prompt": "a", "messages": [{"role": "user"}]}', "/tokenize"),
    raw("tokenize a number", 400, "prompt", '{"prompt": 5}', "/tokenize"),
    raw("tokenize for another model", 404, "does not exist", '{"prompt": "a", "model": "b"}', "/tokenize"),
    raw("detokenize nothing", 400, "tokens: this field is required", "{}", "/detokenize"),
    raw("detokenize a text", 400, "tokens", '{"tokens": "abc"}', "/detokenize"),
    raw("detokenize -1", 400, "tokens: token id 0", '{"tokens": [-1]}', "/detokenize"),
    raw("detokenize beyond the vocabulary", 400, "token id 8192", '{"tokens": [1, 8192]}', "/detokenize"),
]

HOSTILE = [
    chat("regex (", 400, "regex", guided_regex="("),
    chat("regex [z-a]", 400, "regex", guided_regex="[z-a]"),
    chat("regex that looks ahead", 400, "regex", guided_regex="(?=a)b"),
    chat("regex with a back-reference", 400, "regex", guided_regex=r"(a)\1"),
    chat("regex of a million", 400, "too many expressions", guided_regex="((a{1000}){1000}){1000}"),
    chat("regex nested", 400, "regex", guided_regex="(" * 5000 + "a" + ")" * 5000),
    chat("regex that fits nothing", 400, "regex", guided_regex=r"[^\s\S]"),
    chat("schema text that is no JSON", 400, "json", guided_json='{"type": '),
    chat("schema text that is a list", 400, "json", guided_json="[1]"),
    chat("schema of an unknown type", 400, "json", guided_json={"type": "nonsense"}),
    chat("schema type=5", 400, "json", guided_json={"type": 5}),
    chat("schema that refers to nothing", 400, "json", guided_json={"$ref": "#/nowhere"}),
    chat("schema that refers to the net", 400, "json", guided_json={"$ref": "http://127.0.0.1:1/schema.json"}),
    chat("schema that refers to a file", 400, "json", guided_json={"$ref": "file:///etc/passwd"}),
    chat("schema that refers to itself", 400, "json", guided_json={"$ref": "#"}),
    chat("schema pattern (", 400, "json", guided_json={"type": "string", "pattern": "("}),
    chat("schema false", 400, "json", guided_json=False),
    chat("schema of nothing", 400, "json", guided_json={"enum": []}),
    chat("schema of no number", 400, "json", guided_json={"type": "integer", "minimum": 5, "maximum": 4}),
    chat("schema of no text", 400, "json", guided_json={"type": "string", "minLength": 5, "maxLength": 4}),
    chat("grammar without a start", 400, "grammar", structured_outputs={"grammar": "x: y"}),
    chat("grammar that is none", 400, "grammar", structured_outputs={"grammar": "%%%"}),
    chat("choice of nothing", 400, "choice", guided_choice=[""]),
    chat(
        "a forced tool with a broken schema",
        400,
        "tools",
        tools=function(parameters={"type": "nonsense"}),
        tool_choice="required",
    ),
]

TABLE = [*HOSTILE, *BODIES, *NUMBERS, *LISTS, *PROMPTS, *CHATS, *OTHERS]

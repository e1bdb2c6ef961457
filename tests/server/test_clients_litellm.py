"""LiteLLM against the server, as a smoke test. `pip install litellm mcp` holds the openai package at an older version
than the other tests run with: install it into an environment of its own."""

from __future__ import annotations

import asyncio
import json

import pytest
from server_helpers import serving

from qwen_fast.server import ServerConfig

pytestmark = pytest.mark.long

STORY = "Tell me a story about Nora the fox."
MESSAGES = [{"role": "user", "content": STORY}]


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # read on import: no download
        yield pytest.importorskip("litellm")


@pytest.fixture
def options(served):
    return {"model": "openai/demo", "api_base": f"{served.url}/v1", "api_key": "x", "temperature": 0, "max_retries": 0}


@pytest.fixture(scope="module")
def expected(client):
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=12, temperature=0)
    return answer.choices[0].message.content


def test_completion(litellm, options, expected):
    answer = litellm.completion(messages=MESSAGES, max_tokens=12, **options)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_stream(litellm, options, expected):
    more = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=MESSAGES, max_tokens=12, **more, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None)).completion_tokens == 12


def test_acompletion(litellm, options, expected):
    async def run():
        answer = await litellm.acompletion(messages=MESSAGES, max_tokens=12, **options)
        stream = await litellm.acompletion(messages=MESSAGES, max_tokens=12, stream=True, **options)
        return answer.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(run()) == (expected, expected)


def test_text_completion(litellm, options):
    options["model"] = "text-completion-openai/demo"
    answer = litellm.text_completion(prompt="One morning in June,", max_tokens=8, **options)
    assert answer.choices[0].text and answer.usage.completion_tokens == 8


def test_tools_and_schema(litellm, options):
    pytest.importorskip("mcp")  # litellm imports it where a request has tools
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    answer = litellm.completion(messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=200, **options)
    (call, *_) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": parameters, "strict": True}}
    answer = litellm.completion(messages=MESSAGES, response_format=form, max_tokens=50, **options)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": "openai/another"}, "NotFoundError", "'another' does not exist"),
        ({"top_p": 7}, "BadRequestError", "top_p"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "ContextWindowExceededError", "4096 tokens"),
    ],
)
def test_errors(litellm, options, change, error, said):
    with pytest.raises(getattr(litellm, error), match=said):
        litellm.completion(**{"messages": MESSAGES, "max_tokens": 12, **options, **change})


def test_a_wrong_key(litellm, demo, options):
    config = ServerConfig(model="demo", port=0, log_level="warning", api_key=("right",))
    from qwen_fast.server.auth import keys_of

    with serving(demo, config, auth=keys_of(config)) as running:
        options["api_base"] = f"{running.url}/v1"
        with pytest.raises(litellm.AuthenticationError):
            litellm.completion(messages=MESSAGES, max_tokens=2, **options)
        options["api_key"] = "right"
        assert litellm.completion(messages=MESSAGES, max_tokens=2, **options).usage.completion_tokens == 2


def test_a_full_server(litellm, demo, options):
    """429 is a rate limit."""
    from qwen_fast.server.admission import QueueAdmission

    config = ServerConfig(model="demo", port=0, log_level="warning")
    with serving(demo, config, admission=QueueAdmission(1)) as running:
        options["api_base"] = f"{running.url}/v1"
        stream = litellm.completion(
            messages=MESSAGES, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}, **options
        )
        next(iter(stream))
        with pytest.raises(litellm.RateLimitError, match="the limit is 1"):
            litellm.completion(messages=MESSAGES, max_tokens=2, **options)
        assert sum(1 for _ in stream) > 10
        assert litellm.completion(messages=MESSAGES, max_tokens=2, **options).usage.completion_tokens == 2

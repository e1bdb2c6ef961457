"""LangChain's ChatOpenAI against the server, as a smoke test. `pip install langchain-openai` holds the openai package at
an older version than the other tests run with: install it into an environment of its own."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.long

STORY = "Tell me a story about Nora the fox."


class City(BaseModel):
    """Where it happened."""

    city: str = Field(max_length=8)
    days: int = Field(ge=1, le=7)


def get_weather(city: str, days: int = 1) -> str:
    """The weather of a city."""
    return f"{city}: sun for {days} days"


@pytest.fixture(scope="module")
def langchain_openai():
    return pytest.importorskip("langchain_openai")


@pytest.fixture(scope="module")
def model(served, langchain_openai):
    return langchain_openai.ChatOpenAI(
        model="demo", base_url=f"{served.url}/v1", api_key="x", max_tokens=200, temperature=0, max_retries=0
    )


@pytest.fixture(scope="module")
def expected(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": STORY}], max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


def test_invoke(model, expected):
    answer = model.invoke(STORY, max_tokens=12)
    assert answer.content == expected and answer.response_metadata["finish_reason"] == "length"
    usage = answer.usage_metadata
    assert usage["output_tokens"] == 12 and usage["total_tokens"] == usage["input_tokens"] + 12


def test_a_conversation_in_a_batch(model, expected):
    messages = [("system", "Be brief."), ("user", "What is 2 + 3?"), ("assistant", "5"), ("user", "And 3 + 3?")]
    answers = model.batch([STORY, messages], max_tokens=12)
    assert answers[0].content == expected and answers[1].content


def test_stream(model, expected):
    chunks = list(model.stream(STORY, max_tokens=12, stream_usage=True))
    assert len(chunks) > 3 and "".join(chunk.content for chunk in chunks) == expected
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] == 12


def test_asyncio(model, expected):
    async def run():
        text = "".join([chunk.content async for chunk in model.astream(STORY, max_tokens=12)])
        return text, (await model.ainvoke(STORY, max_tokens=12)).content

    assert asyncio.run(run()) == (expected, expected)


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_tools(model, choice):
    with_tools = model.bind_tools([get_weather, City], tool_choice=choice)
    calls = with_tools.invoke("What is the weather in Paris?").tool_calls
    assert calls and all(call["id"] and call["type"] == "tool_call" for call in calls)
    assert all(
        call["name"] in (("get_weather", "City") if choice == "required" else ("get_weather",)) for call in calls
    )
    whole = None
    for chunk in with_tools.stream("What is the weather in Paris?"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        (call["name"], call["args"]) for call in calls
    ]


def test_the_result_of_a_tool(model):
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    call = {"name": "get_weather", "args": {"city": "Rome"}, "id": "call_1"}
    messages = [
        HumanMessage("What is the weather in Rome?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("sun", tool_call_id="call_1"),
    ]
    assert model.bind_tools([get_weather]).invoke(messages, max_tokens=20).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    said = model.with_structured_output(City, method=method).invoke(STORY)
    assert isinstance(said, City) and len(said.city) <= 8 and 1 <= said.days <= 7


def test_errors(served, langchain_openai):
    import openai

    other = langchain_openai.ChatOpenAI(model="another", base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="'another' does not exist"):
        other.invoke(STORY)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        other.bind(model="demo", top_p=2).invoke(STORY)

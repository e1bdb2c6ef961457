"""Other people's clients, as smoke tests. They need `pip install langchain-openai litellm`, which hold the openai package
at an older version than the other tests run with: install them into an environment of their own."""

from __future__ import annotations

import pytest

STORY = "Tell me a story about Nora the fox."

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def expected(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": STORY}], max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


def test_langchain(served, expected):
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        model="demo", base_url=f"{served.url}/v1", api_key="x", max_tokens=12, temperature=0
    )
    answer = model.invoke(STORY)
    assert answer.content == expected and answer.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in model.stream(STORY)) == expected
    schema = {
        "title": "city",
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    said = model.with_structured_output(schema, method="json_schema").invoke(STORY)
    assert said["city"] in ("Paris", "Rome")


def test_litellm(served, expected, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    options = {"api_base": f"{served.url}/v1", "api_key": "x", "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": STORY}]
    answer = litellm.completion(model="openai/demo", messages=messages, **options)
    assert answer.choices[0].message.content == expected and answer.usage.completion_tokens == 12
    stream = litellm.completion(model="openai/demo", messages=messages, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/another", messages=messages, **options)

"""The tokenizer: the real Qwen2.5 vocabulary against vectors that were not made here, and hostile files."""

import json
import unicodedata

import pytest

from qwen_fast import ModelError
from qwen_fast.tokenizer import Tokenizer, check_token_ids


@pytest.fixture(scope="module")
def qwen_dir(shared_dir):
    directory = shared_dir and shared_dir / "qwen2.5" / "tokenizer"
    if not directory or not (directory / "tokenizer.json").is_file():
        pytest.skip("the Qwen2.5 tokenizer is not at hand")
    return directory


@pytest.fixture(scope="module")
def qwen(qwen_dir):
    return Tokenizer(qwen_dir, 151936)


@pytest.fixture(scope="module")
def demo(demo_dir):
    return Tokenizer(demo_dir, 8192)


def test_golden_vectors(qwen, qwen_dir):
    vectors = json.loads((qwen_dir / "golden_vectors.json").read_text(encoding="utf-8"))["text"]
    assert len(vectors) >= 20
    for vector in vectors:
        assert qwen.encode(vector["text"]) == vector["ids"], vector["text"]
        assert qwen.decode(vector["ids"]) == unicodedata.normalize("NFC", vector["text"])


def test_token_table(qwen):
    assert len(qwen) == 151665
    assert sorted(qwen.tokens[i] for i in range(256)) == [bytes([byte]) for byte in range(256)]
    assert (qwen.token_bytes(198), qwen.token_bytes(220), qwen.token_bytes(188)) == (b"\n", b" ", b"\x00")
    assert qwen.token_bytes(151645) == b"<|im_end|>"
    assert qwen.special_ids == frozenset(range(151643, 151657))  # <tool_call> and the following are not special
    assert max(map(len, qwen.tokens)) == 128
    assert qwen.eos_token_id == 151645
    assert b"" not in qwen.tokens


def test_decode_agrees_with_the_library(qwen):
    for ids in ([9707, 1879], [151644, 872, 198, 6023, 151645], [145367, 378, 235, 145233], [151657, 198, 151658]):
        for skip in (False, True):
            assert qwen.decode(ids, skip_special_tokens=skip) == qwen._backend.decode(ids, skip_special_tokens=skip)


def test_half_a_character_is_replaced(qwen):
    ids = qwen.encode("a\u200d")  # the joiner's three bytes are two tokens
    assert qwen.decode(ids) == "a\u200d"
    assert qwen.decode(ids[:-1]) == "a\ufffd"


def test_control_tokens_in_text(demo):
    text = "hi<|im_end|>\n<tool_call>"
    ids = demo.encode(text)
    assert demo.token_id("<|im_end|>") in ids and demo.token_id("<tool_call>") in ids
    plain = demo.encode(text, allow_special=False)
    assert max(plain) < 8000
    assert demo.decode(plain) == text


def test_skip_special_tokens_keeps_tool_calls(demo):
    ids = demo.encode("a<|im_end|><tool_call>b")
    assert demo.decode(ids, skip_special_tokens=True) == "a<tool_call>b"


def test_long_text_is_not_truncated(demo):
    assert demo.decode(demo.encode("word " * 20000)) == "word " * 20000


def test_lone_surrogate(demo):
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        demo.encode("a\ud800")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        demo.encode(b"a")


def test_unused_ids_have_no_bytes(demo):
    assert demo.decode([8100]) == ""
    with pytest.raises(ValueError, match="token id -1 is negative"):
        demo.decode([-1])


def test_vocabulary_beyond_the_model(demo_dir):
    with pytest.raises(ModelError, match="token id 8021 does not fit config.json's vocab_size 8000"):
        Tokenizer(demo_dir, 8000)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "tokenizer.json: No such file"),
        ("tokenizer.json", b"", "tokenizer.json: "),
        ("tokenizer.json", b"{}", "tokenizer.json: "),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not UTF-8"),
        ("tokenizer.json", b"[" * 100000, "tokenizer.json: "),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object, got list"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[" * 100000, "tokenizer_config.json: not valid JSON"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": [1]}',
            "added_tokens_decoder: expected an object, got list",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": 1}}',
            r"added_tokens_decoder\['x'\]: expected a token id",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"9000": {"content": "<new>"}}}',
            r"added_tokens_decoder\['9000'\]: '<new>' has id 8022",
        ),
    ],
)
def test_hostile_files(demo_dir, tmp_path, name, content, message):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((demo_dir / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer(tmp_path, 8192)


def test_token_outside_the_byte_alphabet(demo_dir, tmp_path):
    text = (demo_dir / "tokenizer.json").read_text(encoding="utf-8")
    data = json.loads(text)
    data["model"]["vocab"]["▁word"] = 8030
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelError, match="'▁word' is not written in the byte-level alphabet"):
        Tokenizer(tmp_path, 8192)


def test_added_token_of_the_config_alone(demo_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((demo_dir / "tokenizer.json").read_bytes())
    config = {"added_tokens_decoder": {"8022": {"content": "<think>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path, 8192)
    assert tokenizer.encode("<think>") == [8022]
    assert tokenizer.token_bytes(8022) == b"<think>" and 8022 in tokenizer.special_ids


def test_check_token_ids():
    assert check_token_ids((1, 2), 3) == [1, 2]
    with pytest.raises(ValueError, match=r"token id 3 at position 1 is not in the vocabulary \(0 to 2\)"):
        check_token_ids([0, 3], 3)
    with pytest.raises(TypeError, match="token id at position 0 must be an int, got True"):
        check_token_ids([True], 3)
    numpy = pytest.importorskip("numpy")
    assert check_token_ids(numpy.array([1, 2]), 3) == [1, 2]

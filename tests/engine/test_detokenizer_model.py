"""The C detokenizer against Python: bytes.decode(errors="replace") over the whole stream, and a naive search for stop
strings in it."""

import ctypes
import os
import pathlib
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
SOURCES = "base/status base/alloc engine/utf8 engine/detokenizer".split()
i32, ptr = ctypes.c_int32, ctypes.c_void_p


class Options(ctypes.Structure):
    _fields_ = [("stop", ptr), ("num_stop", i32), ("include", ctypes.c_bool), ("skip_special", ctypes.c_bool)]


class Delta(ctypes.Structure):
    _fields_ = [("text", ptr), ("size_bytes", ctypes.c_size_t), ("stop_index", i32)]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        assert os.environ.get("CI") != "true", "no C compiler"
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("detokenizer") / "detokenizer.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run([*compiler, *flags, *(str(CSRC / f"{s}.c") for s in SOURCES), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.qf_vocabulary_create.argtypes = [ctypes.c_char_p, ptr, ctypes.c_char_p, i32, ptr, ptr]
    library.qf_detokenizer_create.argtypes = [ptr, ptr, ptr, ptr]
    library.qf_detokenizer_push.argtypes = [ptr, i32, ctypes.c_bool, ptr, ptr]
    library.qf_detokenizer_finish.argtypes = [ptr, ptr, ptr]
    library.qf_vocabulary_destroy.argtypes = library.qf_detokenizer_destroy.argtypes = [ptr]
    library.qf_vocabulary_destroy.restype = library.qf_detokenizer_destroy.restype = None
    return library


def run(lib, tokens, special=None, stop=(), include=False, skip_special=False, allow_from=0):
    """[text of each push, and of finish], stop index, push that found it (len(tokens): the end did)."""
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.uint32)
    special = bytes(special or [0] * len(tokens))
    error = ctypes.create_string_buffer(1024)
    vocabulary, self, delta = ptr(), ptr(), Delta()
    count = len(tokens)
    assert 0 == lib.qf_vocabulary_create(
        b"".join(tokens), offsets.ctypes.data, special, count, ctypes.byref(vocabulary), error
    )
    strings = (ctypes.c_char_p * len(stop))(*stop)
    options = Options(ctypes.addressof(strings), len(stop), include, skip_special)
    assert lib.qf_detokenizer_create(vocabulary, ctypes.byref(options), ctypes.byref(self), error) == 0
    texts, found_at = [], None
    for i in range(count + 1):
        if i < count:
            status = lib.qf_detokenizer_push(self, i, i >= allow_from, ctypes.byref(delta), error)
        else:
            status = lib.qf_detokenizer_finish(self, ctypes.byref(delta), error)
        assert status == 0
        texts.append(ctypes.string_at(delta.text, delta.size_bytes))
        if delta.stop_index >= 0 and found_at is None:
            found_at = i
    lib.qf_detokenizer_destroy(self)
    lib.qf_vocabulary_destroy(vocabulary)
    return texts, delta.stop_index, found_at


def decode(data):
    return data.decode("utf-8", errors="replace").encode()


def certain(data):
    """The decoded text of the bytes so far, without a character that may still be completed."""
    for tail in range(min(3, len(data)), 0, -1):
        end = data[len(data) - tail :]
        for length in range(tail + 1, 5):
            # Could more bytes complete it? Try all second bytes, then any continuation.
            for second in [b""] if tail > 1 else [bytes([b]) for b in range(0x80, 0xC0)]:
                whole = (end + second + b"\x80\x80\x80")[:length]
                try:
                    if len(whole) == length and len(whole.decode("utf-8")) == 1:
                        return decode(data[: len(data) - tail])
                except UnicodeDecodeError:
                    pass
    return decode(data)


# Bytes at the edges of the UTF-8 table are drawn far more often than others.
EDGES = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE]
EDGES += [0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
edge_bytes = st.lists(st.sampled_from(EDGES), max_size=6).map(bytes)
pieces = st.one_of(edge_bytes, st.text(max_size=3).filter(str.isprintable).map(str.encode), st.binary(max_size=4))
CONFIG = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_every_pair_and_edge_triple(lib):
    """All pairs of a lead byte and any byte; all triples and quadruples of edge bytes after F0, F4, E0 and ED."""
    streams = [bytes([a, b]) for a in range(0xBE, 0xF7) for b in range(256)]
    streams += [bytes([a, b, c]) for a in EDGES for b in EDGES for c in EDGES]
    data = b"|".join(streams)
    texts, _, _ = run(lib, [data[i : i + 7] for i in range(0, len(data), 7)])
    assert b"".join(texts) == decode(data)


@settings(max_examples=350, **CONFIG)
@given(tokens=st.lists(pieces, max_size=12))
def test_decodes_as_python_does(lib, tokens):
    texts, stop_index, _ = run(lib, tokens)
    assert stop_index == -1
    for i in range(len(tokens)):
        assert b"".join(texts[: i + 1]) == certain(b"".join(tokens[: i + 1]))
    assert b"".join(texts) == decode(b"".join(tokens))


@settings(max_examples=200, **CONFIG)
@given(tokens=st.lists(st.tuples(pieces, st.booleans()), max_size=12))
def test_special_tokens_are_skipped(lib, tokens):
    texts, _, _ = run(lib, [t for t, _ in tokens], special=[s for _, s in tokens], skip_special=True)
    assert b"".join(texts) == decode(b"".join(t for t, s in tokens if not s))


def model(tokens, stop, include, allow_from):
    """Naive: the text byte by byte, with the push that each byte came from."""
    text, origin, data = b"", [], b""
    for i, token in enumerate([*tokens, None]):
        data += token or b""
        new = certain(data) if token is not None else decode(data)
        origin += [i] * (len(new) - len(text))
        text = new
    last = len(tokens) - 1
    for end in range(1, len(text) + 1):
        allowed = min(origin[end - 1], last) >= allow_from
        ending = [s for s in stop if text[:end].endswith(s)]
        if allowed and ending:
            best = max(ending, key=len)
            return text[: end if include else end - len(best)], stop.index(best), origin[end - 1]
    return text, -1, None


letters = st.sampled_from(["a", "b", "ä", "\ufffd"])  # few, so that stop strings are found and overlap
words = st.lists(letters, min_size=1, max_size=4).map("".join)
# With endings of one another, so that several end at once.
stop_strings = st.lists(words.flatmap(lambda w: st.permutations([w, w[1:]])), max_size=2).map(
    lambda pairs: [w.encode() for pair in pairs for w in pair if w]
)
cut_text = st.lists(st.one_of(letters.map(str.encode), st.sampled_from([b"\xe2", b"\xf0\x9f", b"\xff"])), max_size=30)


@settings(max_examples=350, **CONFIG)
@given(data=cut_text.map(b"".join), sizes=st.lists(st.integers(0, 5), min_size=60, max_size=60), stop=stop_strings,
       include=st.booleans(), allow_from=st.sampled_from([0, 0, 0, 2, 5]))  # fmt: skip
def test_stops_as_a_naive_search_does(lib, data, sizes, stop, include, allow_from):
    tokens, at = [], 0
    for size in sizes:
        if at < len(data):
            tokens.append(data[at : at + size])
            at += size
    tokens.append(data[at:])
    texts, stop_index, found_at = run(lib, tokens, stop=stop, include=include, allow_from=allow_from)
    expected = model(tokens, stop, include, allow_from)
    assert (b"".join(texts), stop_index, found_at) == expected
    # What is held back is the longest proper beginning of a stop string, no more and no less.
    for i in range(len(tokens) if found_at is None else found_at):
        sofar = certain(b"".join(tokens[: i + 1]))
        beginnings = [s[:n] for s in stop for n in range(1, len(s))]
        held = max((len(b) for b in beginnings if sofar.endswith(b)), default=0)
        assert b"".join(texts[: i + 1]) == sofar[: len(sofar) - held]

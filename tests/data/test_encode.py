import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from benchmarks.corpus import write_tokenizer
from nemoflow.data import encode, tokenizer
from nemoflow.data.encode import Encoded, Encoder, Sample, has_newer_letters
from nemoflow.errors import NemoflowError

CONTROL = [*small_tokenizer.SPECIAL, "<SPECIAL_77>"]
PIECES = ["</", "s>", " ", "\n", "1", "23", "don't", "!", "é", "中", "x", "snake"]
NEWER = [chr(point) for first, last in encode._NEWER_LETTERS for point in (first, last)]
NEWER_POINTS = {point for first, last in encode._NEWER_LETTERS for point in range(first, last + 1)}


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(root / "tekken")
    stripping = small_tokenizer.write(root / "stripping", lstrip=True)
    overlapping = small_tokenizer.write(root / "overlapping", [{"content": "!</"}, {"content": "</s>!"}])
    others = small_tokenizer.write(root / "others", [{"content": "snake", "special": False}])
    return {
        "tekken": root / "tekken",
        "small": small_tokenizer.write(root / "small"),
        "stripping": stripping,
        "overlapping": overlapping,
        "others": others,
    }


@pytest.fixture(scope="session")
def loaded(directories):
    return {name: tokenizer.load(directory) for name, directory in directories.items()}


@pytest.fixture(scope="session")
def encoders(loaded):
    """(tokenizer, control, end) -> the encoder by gigatoken."""
    return {
        (name, control, end): Encoder(found, "gigatoken", control, end, pytest.fail)
        for name, found in loaded.items()
        for control in ("plain", "control")
        for end in (None, 2)
    }


def by_reference(found: tokenizer.Trained, text: str, control: str, end: int | None) -> list[int]:
    found.engine.encode_special_tokens = control == "plain"
    return found.engine.encode(text, add_special_tokens=False).ids + ([] if end is None else [end])


def documents(encoded: Encoded) -> list[list[int]]:
    assert encoded.ids.dtype.itemsize == 4
    assert encoded.lengths.sum() == len(encoded.ids)
    return [part.tolist() for part in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


texts = st.lists(
    st.one_of(
        st.text(min_size=1),
        st.lists(
            st.sampled_from(
                [*CONTROL, *NEWER, "</", "s>", " ", "\n", "1", "23", "don't", "!", "é", "中", "x", "snake"]
            ),
            min_size=1,
            max_size=12,
        ).map("".join),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("control", ["plain", "control"])
@pytest.mark.parametrize("name", ["tekken", "small", "stripping", "overlapping", "others"])
@settings(deadline=None, max_examples=60)
@given(texts=texts)
def test_ids_are_the_references(loaded, encoders, name, control, end, texts):
    encoder, reference = encoders[name, control, end], Encoder(loaded[name], "tokenizers", control, end)
    assert encoder.engine == "gigatoken"
    encoded = encoder.encode([text.encode() for text in texts])
    assert documents(encoded) == [by_reference(loaded[name], text, control, end) for text in texts]
    other = reference.encode([text.encode() for text in texts])
    assert documents(other) == documents(encoded)
    assert (other.spelled, other.by_reference) == (encoded.spelled, encoded.by_reference)
    assert encoded.by_reference == [i for i, text in enumerate(texts) if not NEWER_POINTS.isdisjoint(map(ord, text))]


def test_where_documents_are_joined_and_where_that_is_not_safe(encoders):
    joined = {name: bool(encoders[name, "plain", 2]._separator) for name, _, _ in encoders}
    assert joined == {"tekken": True, "small": True, "others": True, "stripping": False, "overlapping": False}


def test_text_that_spells_a_control_token(loaded, encoders):
    texts = [b"none", b"an </s> inside", b"</s>", b"a", b"</s></s> [INST] </s>", b"<pad", b"<unk>"]
    spelled = [1, 2, 4, 6]
    plain, control = (encoders["small", kind, 2].encode(texts) for kind in ("plain", "control"))
    assert plain.spelled == control.spelled == spelled
    for number, (as_text, as_token) in enumerate(zip(documents(plain), documents(control), strict=True)):
        assert min(as_text[:-1]) >= len(small_tokenizer.SPECIAL)
        assert (min(as_token[:-1]) < len(small_tokenizer.SPECIAL)) == (number in spelled)
        assert loaded["small"].engine.decode(as_text[:-1], skip_special_tokens=False) == texts[number].decode()


def test_many_texts_that_spell_control_tokens_get_an_engine_that_knows_none(loaded, monkeypatch):
    monkeypatch.setattr(encode, "_LOADING", 10)
    encoder = Encoder(loaded["tekken"], "gigatoken", "plain", 2)
    texts = ["short", "<s> and <SPECIAL_77>, don't", " </s>\n\n", "[INST]12 中", "<s>"]
    encoded = encoder.encode([text.encode() for text in texts])
    assert encoder._fast_plain
    assert encoded.spelled == [1, 2, 3, 4]
    assert documents(encoded) == [by_reference(loaded["tekken"], text, "plain", 2) for text in texts]


@pytest.mark.parametrize("name", ["tekken", "small"])
def test_a_cache_that_has_grown_is_dropped(loaded, monkeypatch, name):
    loads = []
    load = encode._Gigatoken._load
    monkeypatch.setattr(encode._Gigatoken, "_load", lambda self: (loads.append(1), load(self)))
    monkeypatch.setattr(encode, "_MEMORY", 0)
    monkeypatch.setattr(encode, "_CACHE", -(1 << 60))
    encoder = Encoder(loaded[name], "gigatoken", "plain", 2)
    for _ in range(2):
        encoded = encoder.encode([b"some words", b"more of them"])
        assert documents(encoded)[1] == by_reference(loaded[name], "more of them", "plain", 2)
    assert len(loads) == 3


def test_a_tokenizer_that_gigatoken_cannot_load_goes_to_the_reference(tmp_path):
    directory = small_tokenizer.write(tmp_path / "digits")
    content = json.loads((directory / "tokenizer.json").read_text())
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    engine = tokenizer.load(directory).engine
    engine.pre_tokenizer = digits
    (directory / "tokenizer.json").write_text(engine.to_str())
    assert json.loads(engine.to_str())["model"] == content["model"]
    said: list[str] = []
    encoder = Encoder(tokenizer.load(directory), "gigatoken", "plain", 2, said.append)
    assert encoder.engine == "tokenizers"
    assert len(said) == 1
    assert said[0].startswith("tokenizer.engine: gigatoken cannot load this tokenizer (")
    assert documents(encoder.encode([b"12"])) == [by_reference(encoder._tokenizer, "12", "plain", 2)]


def test_an_engine_that_fails_the_probe_is_not_used(loaded, monkeypatch):
    load = encode._Gigatoken._load

    def wrong(self):
        load(self)
        right = self.encode
        self.encode = lambda text: right(text.replace(b"345", b"346"))

    monkeypatch.setattr(encode._Gigatoken, "_load", wrong)
    said: list[str] = []
    assert Encoder(loaded["small"], "gigatoken", progress=said.append).engine == "tokenizers"
    assert said == [
        "tokenizer.engine: gigatoken gives other ids than tokenizers on the probe text; using tokenizers, which is "
        "much slower"
    ]


def test_unknown_engine(loaded):
    with pytest.raises(NemoflowError, match=r"tokenizer\.engine: 'fast' is unknown; known: gigatoken, tokenizers"):
        Encoder(loaded["small"], "fast")


@given(st.text())
def test_newer_letters_in_text(text):
    assert has_newer_letters(text.encode()) == (not NEWER_POINTS.isdisjoint(map(ord, text)))


def test_every_newer_letter_is_found():
    near = {point + step for point in NEWER_POINTS for step in (-64, -1, 0, 1, 64)}
    for point in sorted(near):
        assert has_newer_letters(f"a{chr(point)}b".encode()) == (point in NEWER_POINTS)


def classes(engine_json: str) -> str:
    """A tokenizer.json whose ids tell the class of any code point: its first and last byte merge with each neighbour
    that is in the same word."""
    content = json.loads(engine_json)
    bytes_of = {bytes([b]): text for b, text in enumerate(small_bytes())}
    vocab = {text: number for number, text in enumerate(bytes_of.values())}
    merges = []

    def merge(left: bytes, right: bytes) -> None:
        one, other = ("".join(bytes_of[bytes([b])] for b in part) for part in (left, right))
        merges.append([one, other])
        vocab.setdefault(one + other, len(vocab))

    for near in NEIGHBOURS:
        near_bytes = near.encode()
        for cut in range(1, len(near_bytes)):
            merge(near_bytes[:cut], near_bytes[cut : cut + 1])
        for b in range(0x80, 0xC0):
            merge(bytes([b]), near_bytes)
        for b in range(0xC2, 0xF5):
            merge(near_bytes, bytes([b]))
    content["added_tokens"] = []
    content["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": False}
    return json.dumps(content)


def small_bytes() -> list[str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


ASSIGNED = [*range(0x80, 0x34000), *range(0xE0000, 0xE0200)]  # of the rest nothing is, but for private use
NEIGHBOURS = "aA!1 \n'ö中\u0301"


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("tekken", [p for p in range(0x80, 0x34000) if unicodedata.category(chr(p)) in ("Cn", "Mn", "Nl", "Lm", "So")]),
        pytest.param("tekken", ASSIGNED, marks=pytest.mark.slow),
        pytest.param("small", ASSIGNED, marks=pytest.mark.slow),
    ],
    ids=["tekken-some", "tekken-all", "gpt2-all"],
)
def test_the_engines_agree_on_all_other_code_points(directories, name, points):
    from gigatoken.gigatoken_rs import load_hf_json
    from tokenizers import Tokenizer

    content = classes((directories[name] / "tokenizer.json").read_text())
    fast, reference = load_hf_json(content), Tokenizer.from_str(content)
    different = set()
    points = [p for p in points if not 0xD800 <= p < 0xE000]
    for begin in range(0, len(points), 5000):
        some = points[begin : begin + 5000]
        texts = ["|".join(f"{near}{chr(p)}|{chr(p)}{near}" for near in NEIGHBOURS) for p in some]
        for point, text, expected in zip(some, texts, reference.encode_batch_fast(texts), strict=True):
            if not np.array_equal(fast.encode(text.encode()), expected.ids):
                different.add(point)
    assert different <= NEWER_POINTS
    assert name != "tekken" or different == NEWER_POINTS.intersection(points)


def taken(documents: list[bytes], cuts: list[int]) -> list:
    sample, done = Sample(), 0
    hashes = np.array([int.from_bytes(d[:8].ljust(8), "little") for d in documents], np.uint64)
    for end in sorted({min(cut, len(documents)) for cut in cuts} | {len(documents)}):
        part = documents[done:end]
        ids = np.frombuffer(b"".join(part), np.uint8).astype(np.uint32)
        encoded = Encoded(ids, np.array([len(d) for d in part], np.int64), [], [])
        sample.add(part, hashes[done:end], encoded, lambda i, done=done: done + i)
        done = end
    assert all(bytes(ids.astype(np.uint8)) == text == documents[place] for _, _, text, ids, place in sample._kept)
    return sorted(place for *_, place in sample._kept)


@given(
    st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=80),
    st.lists(st.integers(0, 80)),
    st.integers(1, 9),
)
def test_the_sample_depends_on_the_documents_alone(documents, cuts, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sample, "COUNT", count)
        patch.setattr(Sample, "SIZE", 60)
        places = taken(documents, cuts)
        assert places == taken(documents, [])
    assert places[0] == 0
    assert len(places) <= count
    assert sum(len(documents[place]) for place in places) <= 60


def test_the_sample_leaves_out_what_is_too_long_and_finds_what_differs(loaded):
    encoder = Encoder(loaded["small"], "gigatoken", "plain", 2)
    texts = [b"long " * 40_000, b"first", b"second"]
    encoded = encoder.encode(texts)
    sample = Sample()
    sample.add(texts, np.array([1, 2, 3], np.uint64), encoded, lambda i: (7, i))
    assert next(text for _, _, text, _, _ in sorted(sample._kept, reverse=True)) == b"first"
    assert sample.differing(encoder) is None
    ids = encoded.ids.copy()
    ids[-2] += 1
    sample = Sample()
    sample.add(texts, np.array([1, 2, 3], np.uint64), encoded._replace(ids=ids), lambda i: (7, i))
    assert sample.differing(encoder) == (7, 2)

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemoflow.data.rows import Broken, Split, encodable, read, shards_of
from nemoflow.errors import NemoflowError


def test_split_has_the_fractions_asked_for():
    count = 50_000
    split = Split("1/50", "1/20")
    found = [split.of(str(i).encode()) for i in range(count)]
    for name, share in (("valid", 1 / 50), ("test", 1 / 20)):
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(found.count(name) - count * share) < 5 * deviation


@given(st.binary(), st.fractions(0, 1))
def test_a_document_in_valid_stays_there_when_valid_grows(content, share):
    if Split(str(share)).of(content) == "valid":
        assert Split(str((share + 1) / 2)).of(content) == "valid"


def test_the_split_is_by_the_first_64_bits_of_sha256():
    # echo -n abc | sha256sum: ba7816bf8f01cfea...
    point = Fraction(0xBA7816BF8F01CFEA, 2**64)
    assert Split(str(point)).of(b"abc") == "train"
    assert Split(str(point + Fraction(1, 2**64))).of(b"abc") == "valid"
    assert Split("1/2", str(point - Fraction(1, 2))).of(b"abc") == "train"
    assert Split("1/2", str(point - Fraction(1, 2) + Fraction(1, 2**64))).of(b"abc") == "test"


def test_all_and_nothing():
    assert Split("1").of(b"x") == "valid"
    assert Split("0", "1").of(b"x") == "test"
    assert Split("0").of(b"x") == "train"


def test_broken_lines_are_counted_by_reason_with_the_place_of_the_first(write_source):
    source = write_source([{"text": "a"}, b"", b"{", b'{"text": "\xff"}', b"[1]", b"[" * 200_000, {"text": "b"}])
    broken = Broken()
    shard = source / "shard-00000.jsonl"
    rows = list(read(shard, broken))
    assert [row["text"] for _, _, row in rows] == ["a", "b"]
    assert rows[1][0] == f"{shard}:7"
    assert broken.measures() == {"nested too deeply": 1, "not JSON": 1, "not UTF-8": 1, "not a JSON object": 1}
    assert broken.first == f"{shard}:3: not JSON"


def test_max_broken_is_a_share_and_inclusive():
    broken = Broken()
    broken.add("not JSON", "f:9")
    broken.check(1000, "1/1000")
    with pytest.raises(
        NemoflowError, match=r"f:9: not JSON \(the first of 1 broken rows in 999; max_broken allows 1/1000"
    ):
        broken.check(999, "1/1000")


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(NemoflowError, match=r"no shard-\*\.jsonl here"):
        shards_of(tmp_path)
    with pytest.raises(NemoflowError, match=r"gone\.jsonl: cannot be read \(No such file"):
        list(read(tmp_path / "gone.jsonl", Broken()))


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="lone surrogate"):
        encodable("\ud800", "text")
    assert encodable("\U0001f600", "text") == "\U0001f600"

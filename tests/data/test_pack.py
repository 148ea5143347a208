import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoflow.data import pack as module
from nemoflow.data.pack import ROW_GROUP, SCHEMA, Sequences, pack, write_packed
from nemoflow.errors import NemoflowError
from nemoflow.store import file_digest

EOS = 2  # what bridge_reader.py's tokenizer takes for the end of text


def lognormal(count, size, seed=0):
    """Lengths like those of chats: a mixture of short and long ones, the over-long clipped."""
    random = np.random.default_rng(seed)
    long = random.random(count) < 0.15
    return np.clip(np.where(long, random.lognormal(8, 1, count), random.lognormal(6.2, 0.9, count)), 2, size).astype(
        int
    )


def some_sequences(lengths, seed=0):
    """Random sequences without EOS; the last place, whose label the reader cuts off, is never learned."""
    random = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ids = random.integers(3, 1000, starts[-1], dtype=np.int32)
    mask = random.integers(0, 2, starts[-1], dtype=np.int8)
    mask[starts[1:] - 1] = 0
    return Sequences(ids, mask, starts)


def one(sequences, i):
    """Ids and mask of a sequence, hashable."""
    span = slice(sequences.starts[i], sequences.starts[i + 1])
    return tuple(sequences.ids[span].tolist()), tuple(sequences.mask[span].tolist())


def stored(path):
    """The packs of a file, each a list of (ids, mask)."""
    packs = []
    for row in pq.read_table(path).to_pylist():
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        packs.append([(tuple(row["input_ids"][a:b]), tuple(row["loss_mask"][a:b])) for a, b in pairwise(bounds)])
    return packs


# -- packing -----------------------------------------------------------------------------------------------------------

packings = st.integers(1, 300).flatmap(
    lambda size: st.tuples(st.lists(st.integers(1, size), max_size=300), st.just(size), st.integers(1, 400))
)


@given(packings)
@settings(max_examples=300)
def test_every_length_is_in_one_bin_and_no_bin_overflows(packing):
    lengths, size, window = packing
    order, bins = pack(np.array(lengths, dtype=np.int64), size, window)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert bins[0] == 0
    assert bins[-1] == len(lengths)
    assert (np.diff(bins) > 0).all()
    for a, b in pairwise(bins):
        members = order[a:b]
        assert sum(lengths[i] for i in members) <= size
        assert len({i // window for i in members.tolist()}) == 1


@given(packings)
@settings(max_examples=100)
def test_bins_are_few(packing):
    """Best fit decreasing needs at most 11/9 of the fewest possible bins and one (Johnson 1973), hence of the sum, or
    of the lengths of which no two go together; and no two of a window's bins could be one."""
    lengths, size, _ = packing
    order, bins = pack(np.array(lengths, dtype=np.int64), size, len(lengths) or 1)
    fills = sorted(sum(lengths[i] for i in order[a:b]) for a, b in pairwise(bins))
    if len(fills) > 1:
        assert fills[0] + fills[1] > size
    large = sum(2 * length > size for length in lengths)
    if all(3 * length > size for length in lengths):  # two in a bin at most: then it is optimal
        small = sorted(length for length in lengths if 2 * length <= size)
        rooms = sorted(size - length for length in lengths if 2 * length > size)
        beside = 0
        for room in rooms:
            beside += beside < len(small) and small[beside] <= room
        assert len(fills) == large + -(-(len(small) - beside) // 2)
    assert len(fills) >= max(large, -(-sum(lengths) // size))


def test_a_packing_by_hand():
    order, bins = pack(np.array([5, 7, 5, 2, 4, 2, 5, 1]), 10, 100)
    # 7 opens; 5 and 5 fill the second; 5 the third, where 4 fits best; of 7's three, 2 and 1; 2 opens the last.
    assert [order[a:b].tolist() for a, b in pairwise(bins)] == [[1, 3, 7], [0, 2], [6, 4], [5]]


@given(packings)
@settings(max_examples=300, deadline=None)  # the first compiles
def test_the_compiled_form_does_what_the_plain_one_does(packing):
    lengths, size, _ = packing
    lengths = np.array(lengths, dtype=np.int64)
    for plain, compiled in zip(module._plain(lengths, size), module._compiled()(lengths, size), strict=True):
        assert plain.dtype == compiled.dtype == np.int64
        assert plain.tolist() == compiled.tolist()


@pytest.mark.parametrize("size", [31, 32, 33, 1023, 1024, 1025, 4096, 8192, 32768, 131072])
def test_the_compiled_form_does_what_the_plain_one_does_at_size(size):
    for lengths in (lognormal(5000, size), np.random.default_rng(1).integers(1, size + 1, 5000)):
        for plain, compiled in zip(module._plain(lengths, size), module._compiled()(lengths, size), strict=True):
            assert np.array_equal(plain, compiled)


def test_large_jobs_are_compiled_small_ones_are_not(monkeypatch):
    lengths = lognormal(3000, 4096)
    expected = pack(lengths, 4096, 1000)
    plain = module._plain
    monkeypatch.setattr(module, "_plain", lambda *_: pytest.fail("plain"))
    monkeypatch.setattr(module, "_COMPILE_FROM", 3000)
    for a, b in zip(expected, pack(lengths, 4096, 1000), strict=True):
        assert np.array_equal(a, b)
    monkeypatch.setattr(module, "_plain", plain)
    monkeypatch.setattr(module, "_compiled", lambda: pytest.fail("compiled"))
    pack(lengths[:-1], 4096, 1000)


def test_compiling_needs_no_place_for_a_cache(tmp_path):
    """As with a package that cannot be written, and no home."""
    program = (
        "import sys; sys.dont_write_bytecode = True\n"
        "import numpy as np; from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from nemoflow.data import pack\n"
        "print(pack._compiled()(np.array([3, 2, 1]), 5)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[0, 1, 2]\n", done.stderr


def test_numba_is_not_imported_for_a_small_job():
    program = (
        "import sys, numpy as np; from nemoflow.data.pack import pack; pack(np.full(9, 3), 8)\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("size", [4096, 8192, 32768])
def test_packs_of_chats_are_full(size):
    lengths = lognormal(300_000, size)
    _, bins = pack(lengths, size)
    assert lengths.sum() / ((len(bins) - 1) * size) >= 0.999


@pytest.mark.parametrize(("lengths", "window"), [([3, 11], 5), ([0, 3], 5), ([-1], 5), ([3], 0)])
def test_lengths_that_fit_nowhere_are_an_error(lengths, window):
    with pytest.raises(ValueError, match=r"bins hold 1 to 10|a window of 0"):
        pack(np.array(lengths), 10, window)


# -- writing -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 65), min_size=1, max_size=60),
    st.sampled_from([1, 2, 8, 16, 64]),
    st.integers(1, 40),
    st.integers(0, 3),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_use_is_stored_once_and_padded(tmp_path_factory, lengths, multiple, window, seed, data):
    path = tmp_path_factory.mktemp("packed") / "x.parquet"
    sequences = some_sequences(lengths)
    uses = np.array(data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=80)))
    told = write_packed(path, sequences, uses, 64, window, seed, multiple, EOS)
    packs = stored(path)
    found = Counter()
    padding = 0
    for members in packs:
        assert sum(len(ids) - 1 for ids, _ in members) <= 64  # what the reader feeds
        for ids, mask in members:
            assert (len(ids) - 1) % multiple == 0
            assert len(ids) == len(mask)
            text = next(n for n in range(len(ids), 0, -1) if ids[n - 1] != EOS)
            assert len(ids) - text < multiple
            assert not any(mask[text:])
            padding += len(ids) - text
            found[ids[:text], mask[:text]] += 1
    assert found == Counter(one(sequences, i) for i in uses)
    tokens = sum(lengths[i] for i in uses)
    assert told == {
        "packs": len(packs),
        "tokens": tokens,
        "loss_tokens": sum(sum(one(sequences, i)[1]) for i in uses),
        "padding": padding,
        "fill": round((tokens - len(uses)) / (len(packs) * 64), 6),
        "file": {"name": "x.parquet", "size": path.stat().st_size, "blake3": file_digest(path, "blake3")},
    }
    assert [p.name for p in path.parent.iterdir()] == ["x.parquet"]


def test_bytes_depend_on_the_seed_alone(tmp_path):
    sequences = some_sequences(lognormal(200, 512))
    uses = np.repeat(np.arange(200), 2)
    first, again, other = (
        write_packed(tmp_path / name, sequences, uses, 512, 64, seed)["file"]["blake3"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_packs_are_shuffled(tmp_path):
    """Packing leaves the longest first."""
    sequences = some_sequences(np.concatenate([np.full(100, 250), np.full(500, 20)]))
    write_packed(tmp_path / "x", sequences, np.arange(600), 256)
    long = [len(members[0][0]) == 250 for members in stored(tmp_path / "x")]
    assert 100 == sum(long) > sum(long[:100]) > 50


def test_uses_are_shuffled_before_they_are_packed(tmp_path):
    """Else what lies side by side in a source would be packed together."""
    sequences = some_sequences(np.full(400, 17))
    write_packed(tmp_path / "x", sequences, np.arange(400), 64, 8)
    number = {one(sequences, i): i for i in range(400)}
    spreads = [max(n) - min(n) for members in stored(tmp_path / "x") if (n := [number[m] for m in members])]
    assert np.median(spreads) > 100


def test_rows_are_in_groups_of_the_schema(tmp_path):
    write_packed(tmp_path / "x", some_sequences(np.full(2 * ROW_GROUP + 7, 16)), np.arange(2 * ROW_GROUP + 7), 16)
    file = pq.ParquetFile(tmp_path / "x")
    assert file.schema_arrow.equals(SCHEMA)
    assert {f.name: str(f.type.value_type) for f in SCHEMA} == {
        "input_ids": "int32",
        "seq_start_id": "int32",
        "loss_mask": "int8",
    }
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [ROW_GROUP, ROW_GROUP, 7]
    assert groups[0].column(0).compression == "ZSTD"


def test_sequences_on_the_disk_are_not_read_at_once(tmp_path):
    """Memory is that of a row group, whatever the tokens: here 4,000 packs of 4,096, 82 MB."""
    sequences = some_sequences(np.full(4000, 4097))
    mapped = []
    for name, array in sequences._asdict().items():
        array.tofile(tmp_path / name)
        mapped.append(np.memmap(tmp_path / name, dtype=array.dtype, mode="r"))
    tracemalloc.start()
    write_packed(tmp_path / "x", Sequences(*mapped), np.arange(4000), 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * ROW_GROUP * 4097 * 5


def test_without_uses_no_file_is_written(tmp_path):
    told = write_packed(tmp_path / "x", some_sequences([5]), np.arange(0), 16)
    assert told == {"packs": 0, "tokens": 0, "loss_tokens": 0, "padding": 0, "fill": 0, "file": None}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lengths", "multiple", "said"),
    [
        ([5], 12, "pack_size: 64 is not a multiple of 12.*take 60"),
        ([5], 128, "pack_size: 64 is not a multiple of 128.*take 128"),
        ([5, 66], 1, "sequence 1 has 66 tokens; a pack of 64 takes 2 to 65"),
        ([5, 1], 1, "sequence 1 has 1 tokens"),
    ],
)
def test_what_cannot_be_packed_is_told(tmp_path, lengths, multiple, said):
    with pytest.raises(NemoflowError, match=said):
        write_packed(tmp_path / "x", some_sequences(lengths), np.arange(len(lengths)), 64, pad_multiple=multiple)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    sequences = some_sequences(np.full(ROW_GROUP + 1, 16))
    write_packed(tmp_path / "x", sequences, np.arange(4), 16)
    before = (tmp_path / "x").read_bytes()
    made = []

    def once(*arguments):
        if made:
            raise OSError("no space left")
        made.append(table(*arguments))
        return made[0]

    table = module._table
    monkeypatch.setattr(module, "_table", once)
    with pytest.raises(OSError, match="no space left"):
        write_packed(tmp_path / "x", sequences, np.arange(ROW_GROUP + 1), 16)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == before


# -- as Megatron-Bridge reads it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 8])
def test_megatron_bridge_feeds_what_was_packed(tmp_path, multiple):
    sequences = some_sequences([*range(2, 30), 65, 64, 63, 33])
    path = tmp_path / "training.idx.parquet"
    told = write_packed(path, sequences, np.arange(32), 64, pad_multiple=multiple, pad=EOS)
    program = Path(__file__).with_name("bridge_reader.py")
    output = tmp_path / "read.json"
    command = [sys.executable, program, path, "64", output, str(multiple)]
    subprocess.run(command, check=True, capture_output=True)
    packs = json.loads(output.read_text())
    assert len(packs) == told["packs"]
    found = Counter()
    for read in packs:
        assert len(read["tokens"]) == 64
        bounds = read["cu_seqlens_q_padded" if multiple > 1 else "cu_seqlens_q"]
        assert bounds[-1] == 64
        assert all(bound % multiple == 0 for bound in bounds)
        logical = np.diff(read["cu_seqlens_q"])
        for k, (a, b) in enumerate(pairwise(bounds)):
            tokens, labels, mask = (read[name][a:b] for name in ("tokens", "labels", "loss_mask"))
            count = next((n for n in range(b - a, 0, -1) if tokens[n - 1] != EOS), 0)
            if multiple > 1:
                assert logical[k] == count  # padding is left out of attention
            if count:
                assert read["position_ids"][a:b] == list(range(b - a))
                # The last label may be the sequence's last token with padding cut off behind it.
                found[*tokens[:count], labels[count - 1], *mask[:count]] += 1
            assert not any(mask[count:])
    expected = Counter()
    for i in range(32):
        ids, mask = one(sequences, i)
        # Where padding follows, the last token is fed too, with the padding as its label; it is not learned.
        ends = (len(ids) - 1) % multiple != 0
        expected[(*ids, EOS, *mask) if ends else (*ids, *mask[:-1])] += 1
    assert found == expected
    assert sum(sum(read["loss_mask"]) for read in packs) == told["loss_tokens"]

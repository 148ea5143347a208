import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemoflow.data import chats, tokenizer
from nemoflow.data.rows import Broken, read, shards_of
from nemoflow.errors import NemoflowError

PAYLOAD = {"pack_size": 64, "valid": "0", "seed": 0, "too_long": "drop", "max_broken": "0"}


def chat(*contents, roles=("user", "assistant")):
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


CONVERSATIONS = [
    chat("What is 3 + 5?", "8"),
    chat("Hi", "Hello, what can I do?", "Say it in German: naïve \U0001f600", "  naiv \U0001f600 \n", "ok", ""),
    {"messages": [{"role": "system", "content": "Be brief."}, *chat("a\nb", "\n\nc\n")["messages"]]},
    chat("x" * 30, "12345", "次", "はい、そうです。"),
]


def make(made, sources, out, repeats=None, **payload):
    parts = [{"repeat": repeat} for repeat in repeats or [1] * len(sources)]
    inputs = {"sources": sources, "tokenizer": made["tokenizer"]}
    return chats.make(PAYLOAD | {"parts": parts} | payload, inputs, out, print)


def chats_in(file):
    """Every chat in a packed file: (ids, loss mask)."""
    found = []
    for row in pq.read_table(file).to_pylist():
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        found += [(row["input_ids"][a:b], row["loss_mask"][a:b]) for a, b in pairwise(bounds)]
    return found


def by_transformers(auto, row):
    """Ids of a chat and, for each, whether the next one is the assistant's."""
    made = auto.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    return made["input_ids"], [*made["assistant_masks"][1:], 0]


@pytest.fixture(scope="module")
def auto(made):
    return AutoTokenizer.from_pretrained(made["tokenizer"])


@pytest.fixture
def tokenizer_with(made, tmp_path):
    """A function that gives the tokenizer another chat template; returns artifacts as `made` does."""

    def change(template):
        copy = tmp_path / "tokenizer"
        shutil.copytree(made["tokenizer"], copy)
        (copy / "chat_template.jinja").write_text(template)
        return {"tokenizer": copy}

    return change


# -- tokens and loss mask ----------------------------------------------------------------------------------------------


def test_tokens_and_mask_are_those_of_transformers(made, auto, write_source, out):
    make(made, [write_source(CONVERSATIONS)], out, pack_size=300)
    assert sorted(chats_in(out / "training.idx.parquet")) == sorted(by_transformers(auto, row) for row in CONVERSATIONS)


def test_generated_chats_are_those_of_transformers(made, auto):
    rows = [
        row
        for name, repeat in (("stdlib_chats", 1), ("arithmetic_chats", 2))
        for shard in shards_of(made[name])
        for _, _, row in read(shard, Broken())
        for _ in range(repeat)
    ]
    expected = {json.dumps(row): by_transformers(auto, row) for row in rows}
    train, valid = (chats_in(made["chats"] / name) for name in ("training.idx.parquet", "validation.idx.parquet"))
    held_out = [found for found in expected.values() if found in valid]
    assert sorted(train) == sorted(
        expected[json.dumps(row)] for row in rows if expected[json.dumps(row)] not in held_out
    )
    measures = json.loads((made["chats"] / "sealed.json").read_text())["measures"]
    for name, found in (("train", train), ("validation", valid)):
        assert measures[name]["chats"] == len(found) > 100
        assert measures[name]["tokens"] == sum(len(ids) for ids, _ in found)
        assert measures[name]["loss_tokens"] == sum(sum(mask) for _, mask in found)
    assert not any(measures["left_out"].values())


def as_megatron_bridge_reads(file, pack_size, output):
    """What Megatron-Bridge's own dataset makes of each pack: tokens, labels, loss_mask, cu_seqlens_q."""
    program = Path(__file__).with_name("bridge_reader.py")
    subprocess.run([sys.executable, program, file, str(pack_size), output], check=True, capture_output=True)
    return json.loads(output.read_text())


def test_the_loss_is_on_the_answers_and_their_ends_as_megatron_bridge_reads_them(
    made, auto, write_source, out, tmp_path
):
    """The labels that Megatron-Bridge pairs with a 1 are the answers, each with its end of turn, and nothing else."""
    # Without answers that begin with a blank: its token may hold the end of the prompt too, and is learned.
    conversations = [CONVERSATIONS[0], CONVERSATIONS[3], chat("Hi", "Hello.", "And now?", "Bye \n\n", "x", "")]
    make(made, [write_source(conversations)], out, pack_size=256)
    packs = as_megatron_bridge_reads(out / "training.idx.parquet", 256, tmp_path / "read.json")
    learned = []
    for pack in packs:
        for begin, end in pairwise(sorted(set(pack["cu_seqlens_q"]))):
            labels, mask = pack["labels"][begin:end], pack["loss_mask"][begin:end]
            ids = [label for label, use in zip(labels, mask, strict=True) if use]
            if ids:
                learned.append(auto.decode(ids))
                assert pack["tokens"][begin] == auto.convert_tokens_to_ids("<|im_start|>")
    expected = [
        "".join(m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant")
        for row in conversations
    ]
    assert sorted(learned) == sorted(expected)


def test_megatron_bridge_reads_every_token_to_be_learned(made, tmp_path):
    packs = as_megatron_bridge_reads(made["chats"] / "training.idx.parquet", 256, tmp_path / "read.json")
    measures = json.loads((made["chats"] / "sealed.json").read_text())["measures"]
    assert len(packs) == measures["train"]["packs"]
    assert sum(sum(pack["loss_mask"]) for pack in packs) == measures["train"]["loss_tokens"]


def test_rows_fit_the_schema(made):
    for name in chats.FILES.values():
        for row in pq.read_table(made["chats"] / name).to_pylist():
            assert len(row["input_ids"]) == len(row["loss_mask"]) <= 256
            assert row["seq_start_id"][0] == 0
            assert set(row["loss_mask"]) <= {0, 1}
    schema = pq.read_schema(made["chats"] / "training.idx.parquet")
    assert {field.name: str(field.type.value_type) for field in schema} == {
        "input_ids": "int32",
        "seq_start_id": "int32",
        "loss_mask": "int8",
    }


def test_a_template_for_transformers_renders_alike(tokenizer_with, write_source, out):
    template = (
        "{%- if tools %}{{ tools | tojson }}{% endif %}\n"
        "{% for m in messages %}\n"
        "{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ bos_token }}{{ m.role | upper }}:\n"
        "    {% if m.role == 'assistant' %}\n"
        "    {% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration +%}\n"
        "    {% else %}\n"
        "{{ m.content }}\n"
        "    {% endif %}\n"
        "{% endfor %}"
    )
    made = tokenizer_with(template)
    auto = AutoTokenizer.from_pretrained(made["tokenizer"])
    tools = [{"type": "function", "function": {"name": "f", "description": "<ü & 'x'>", "parameters": {}}}]
    rows = [*CONVERSATIONS, CONVERSATIONS[0] | {"tools": tools}]
    make(made, [write_source(rows)], out, pack_size=300)
    expected = []
    for row in rows:
        found = auto.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        expected.append((found["input_ids"], [*found["assistant_masks"][1:], 0]))
    assert sorted(chats_in(out / "training.idx.parquet")) == sorted(expected)


# -- packing -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120))
def test_packs_are_never_overfull_and_lose_nothing(lengths, size):
    packs = chats.pack(lengths, size)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= size for members in packs)
    # No two packs fit into one: best fit opens a pack only when nothing has room.
    sums = sorted(sum(lengths[i] for i in members) for members in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > size


def test_best_fit_takes_the_fullest_pack_with_room():
    assert chats.pack([6, 5, 4, 3, 1], 10) == [[0, 2], [1, 3, 4]]
    assert chats.pack([7, 6, 3, 4, 5, 5], 10) == [[0, 2], [1, 3], [4, 5]]
    assert chats.pack([10, 10], 10) == [[0], [1]]
    assert chats.pack([], 10) == []


def test_packs_of_the_generated_chats_are_full(made):
    measures = json.loads((made["chats"] / "sealed.json").read_text())["measures"]
    tokens = [len(row["input_ids"]) for row in pq.read_table(made["chats"] / "training.idx.parquet").to_pylist()]
    assert measures["train"]["packs"] == len(tokens)
    assert measures["train"]["fill"] == pytest.approx(sum(tokens) / (256 * len(tokens)), abs=1e-6)
    assert measures["train"]["fill"] > 0.95


def test_the_seed_changes_the_order_of_packs_only(made, write_source, out, tmp_path):
    source = write_source([chat(f"What is {i}?", str(i)) for i in range(50)])
    other = tmp_path / "other"
    other.mkdir()
    assert make(made, [source], out) == make(made, [source], other, seed=1)
    one, two = (chats_in(path / "training.idx.parquet") for path in (out, other))
    assert one != two
    assert sorted(one) == sorted(two)


def test_more_packs_than_a_row_group_holds(made, write_source, out):
    measures = make(made, [write_source([chat(f"q{i}", "a") for i in range(1100)])], out, pack_size=20)
    file = pq.ParquetFile(out / "training.idx.parquet")
    assert file.metadata.num_rows == measures["train"]["packs"] > 500
    assert file.metadata.row_group(0).num_rows == 500
    assert len(chats_in(out / "training.idx.parquet")) == 1100


# -- what goes in, what stays out --------------------------------------------------------------------------------------


def test_repeats_are_for_training_and_no_chat_is_on_both_sides(made, write_source, out):
    first = write_source([chat(f"What is {i}?", str(i)) for i in range(200)], "first")
    second = write_source([chat(f"Say {i}.", str(i)) for i in range(200)], "second")
    measures = make(made, [first, second], out, repeats=[1, 3], valid="1/5")
    train = chats_in(out / "training.idx.parquet")
    valid = chats_in(out / "validation.idx.parquet")
    assert measures["train"]["chats"] == len(train)
    assert measures["validation"]["chats"] == len(valid)
    assert 40 < len(valid) < 120
    assert {train.count(found) for found in train} == {1, 3}
    assert {valid.count(found) for found in valid} == {1}
    assert not [found for found in valid if found in train]
    distinct = [found for i, found in enumerate(train) if found not in train[:i]]
    assert len(distinct) + len(valid) == 400


def test_long_chats_are_dropped_and_counted(made, write_source, out):
    rows = [chat("a", "b"), chat("a", "1" * 100)]
    measures = make(made, [write_source(rows)], out)
    assert measures["left_out"] == {"control_strings": 0, "nothing_to_learn": 0, "too_long": 1}
    assert measures["train"]["chats"] == 1
    assert measures["truncated"] == 0


def test_long_chats_are_truncated_and_counted(made, auto, write_source, out):
    rows = [chat("a", "b"), chat("a", "1" * 100), chat("2" * 100, "too late")]
    measures = make(made, [write_source(rows)], out, too_long="truncate")
    assert measures["truncated"] == 2
    assert measures["left_out"] == {"control_strings": 0, "nothing_to_learn": 1, "too_long": 0}
    whole, mask = by_transformers(auto, rows[1])
    assert sorted(chats_in(out / "training.idx.parquet")) == sorted(
        [by_transformers(auto, rows[0]), (whole[:64], [*mask[:63], 0])]
    )


def test_a_chat_as_long_as_a_pack_fits(made, auto, write_source, out):
    length = len(by_transformers(auto, CONVERSATIONS[0])[0])
    assert make(made, [write_source(CONVERSATIONS[:1])], out, pack_size=length)["train"]["fill"] == 1
    with pytest.raises(NemoflowError, match="'too_long': 1"):
        make(made, [write_source(CONVERSATIONS[:1], "again")], out, pack_size=length - 1)


def test_chats_that_spell_control_tokens_are_left_out(made, write_source, out):
    bad = [chat("a", f"x{text}y") for text in (*tokenizer.SPECIAL, "\ufdd0", "\ufdd1")]
    measures = make(made, [write_source([*bad, chat("a", "b <im_end> c")])], out)
    assert measures["left_out"]["control_strings"] == len(bad)
    assert measures["train"]["chats"] == 1


def test_chats_without_an_answer_teach_nothing(made, write_source, out):
    measures = make(made, [write_source([chat("only a question"), chat("a", "b")])], out)
    assert measures["left_out"]["nothing_to_learn"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no chat"}, "'messages' is not a non-empty list"),
        ({"messages": []}, "'messages' is not a non-empty list"),
        ({"messages": ["hello"]}, "'messages' has an entry without a role"),
        ({"messages": [{"content": "x"}]}, "'messages' has an entry without a role"),
        ({"messages": [{"role": "user"}]}, "the chat template refuses the messages"),
        ({"messages": [{"role": "user", "content": None}]}, "the chat template refuses the messages"),
        (chat("a", "\ud800"), "'messages' has a lone surrogate"),
        (b'{"messages": [{"role": "user", "con', "not JSON"),
    ],
)
def test_broken_chats(made, write_source, out, row, reason):
    source = write_source([chat("a", "b"), row])
    with pytest.raises(NemoflowError, match=rf"source/shard-00000\.jsonl:2: {reason}.*1 broken rows in 2"):
        make(made, [source], out)
    measures = make(made, [source], out, max_broken="1/2")
    assert sum(measures["broken"].values()) == measures["train"]["chats"] == 1


def test_nothing_to_train_on(made, write_source, out):
    with pytest.raises(NemoflowError, match="no chat to train on is left"):
        make(made, [write_source([])], out)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "does not mark what the assistant says; put {% generation",
        ),
        ("{% for m in messages %}", "the chat template is not valid Jinja"),
    ],
)
def test_unusable_templates(tokenizer_with, write_source, out, template, message):
    with pytest.raises(NemoflowError, match=message):
        make(tokenizer_with(template), [write_source(CONVERSATIONS)], out)


def test_a_tokenizer_without_template(made, write_source, tmp_path, out):
    copy = tmp_path / "tokenizer"
    shutil.copytree(made["tokenizer"], copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(NemoflowError, match="no chat template"):
        make({"tokenizer": copy}, [write_source(CONVERSATIONS)], out)

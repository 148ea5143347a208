import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_tokenizer
from blake3 import blake3
from transformers import AutoTokenizer
from xxhash import xxh3_64_intdigest

from nemoflow.data import chats, packed, spool
from nemoflow.data.rows import Broken, read
from nemoflow.data.sources import open_source
from nemoflow.data.tokenizer import TEMPLATES
from nemoflow.errors import NemoflowError

PAYLOAD = {"pack_size": 64, "valid": "0", "seed": 0, "too_long": "drop", "pad_multiple": 1, "max_broken": "0"}
TRAIN, VALID = "training.idx.parquet", "validation.idx.parquet"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def chat(*contents, roles=("user", "assistant"), **more):
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **more}


def thinking(*turns, **more):
    """A chat of (question, thought, answer)."""
    messages = []
    for question, thought, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return {"messages": messages, **more}


CONVERSATIONS = [
    chat("What is 3 + 5?", "8"),
    chat("Hi", "Hello, what can I do?", "Say it in German: naïve \U0001f600", "  naiv \U0001f600 \n", "ok", "x"),
    {"messages": [{"role": "system", "content": "Be brief."}, *chat("a\nb", "\n\nc\n")["messages"]]},
    chat("x" * 30, "12345", "次", "はい、そうです。"),
]


def make(made, sources, out, repeats=None, threads=1, **payload):
    parts = [{"source": "x", "repeat": repeat} for repeat in repeats or ["1"] * len(sources)]
    inputs = {"sources": sources, "tokenizer": made["tokenizer"]}
    result = chats.make(PAYLOAD | {"parts": parts} | payload, inputs, out, print, threads=threads)
    assert [entry["name"] for entry in result.contents] == sorted(path.name for path in out.iterdir())
    for entry in result.contents:
        content = (out / entry["name"]).read_bytes()
        assert (len(content), blake3(content).hexdigest()) == (entry["size"], entry["blake3"])
    return result.measures


def chats_in(file):
    """Every sequence in a packed file: (ids, loss mask)."""
    found = []
    for row in pq.read_table(file).to_pylist():
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        found += [(row["input_ids"][a:b], row["loss_mask"][a:b]) for a, b in pairwise(bounds)]
    return found


def by_transformers(auto, row):
    """Ids of a chat and, for each, whether the next one is the assistant's."""
    made = auto.apply_chat_template(
        row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    return made["input_ids"], [*made["assistant_masks"][1:], 0]


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def auto(made):
    return AutoTokenizer.from_pretrained(made["tokenizer"])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A tokenizer with the control tokens of chats, and thoughts that are control tokens too."""
    added = [{"content": text} for text in ("<|im_start|>", "<|im_end|>", "<think>", "</think>")]
    directory = small_tokenizer.write(tmp_path_factory.mktemp("tokenizer") / "small", added)
    (directory / "chat_template.jinja").write_text((TEMPLATES / "chatml.jinja").read_text())
    return directory


@pytest.fixture
def fast(monkeypatch) -> None:
    """Have the fast engine do what is small, too."""
    monkeypatch.setattr(chats, "_SMALL", 0)


# -- tokens and loss mask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_tokens_and_mask_are_those_of_transformers(made, auto, write_source, out, monkeypatch, engine):
    monkeypatch.setattr(chats, "_SMALL", 0 if engine == "fast" else 1 << 20)
    make(made, [write_source(CONVERSATIONS)], out, pack_size=300)
    assert sorted(chats_in(out / TRAIN)) == sorted(by_transformers(auto, row) for row in CONVERSATIONS)


def test_generated_chats_are_those_of_transformers(made, auto):
    rows = [
        row
        for name, repeat in (("stdlib_chats", 1), ("arithmetic_chats", 2))
        for _, _, row in read(open_source(made[name]), open_source(made[name]).units(), Broken())
        for _ in range(repeat)
    ]
    expected = {json.dumps(row): by_transformers(auto, row) for row in rows}
    train, valid = (chats_in(made["chats"] / name) for name in (TRAIN, VALID))
    held_out = [found for found in expected.values() if found in valid]
    assert sorted(train) == sorted(
        expected[json.dumps(row)] for row in rows if expected[json.dumps(row)] not in held_out
    )
    measures = json.loads((made["chats"] / "sealed.json").read_text())["measures"]
    for name, found in (("train", train), ("validation", valid)):
        assert measures[name]["sequences"] == len(found) > 10
        assert measures[name]["tokens"] == sum(len(ids) for ids, _ in found)
        assert measures[name]["loss_tokens"] == sum(sum(mask) for _, mask in found)
    assert not measures["dropped"]
    assert measures["too_long"] == measures["nothing_to_learn"] == 0


@pytest.mark.usefixtures("fast")
def test_a_conversation_worked_out_by_hand(small, write_source, out):
    """Two turns with thoughts, by the ids of a tokenizer of which each letter here is one token."""
    auto = AutoTokenizer.from_pretrained(small)
    row = thinking(("q", "t", "a"), ("r", "u", "b"))
    make({"tokenizer": small}, [write_source([row])], out)
    begin, end, think, unthink, newline = (
        auto.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "Ċ")
    )

    def ids(text):
        return auto(text, add_special_tokens=False)["input_ids"]

    asked = [begin, *ids("user\nq"), end, newline, begin, *ids("assistant\n")]
    answered = [think, newline, *ids("t"), newline, unthink, newline, *ids("a"), end]
    first = [*asked, *answered, newline]
    asked_again = [*asked, *ids("a"), end, newline, begin, *ids("user\nr"), end, newline, begin, *ids("assistant\n")]
    answered_again = [think, newline, *ids("u"), newline, unthink, newline, *ids("b"), end]
    second = [*asked_again, *answered_again, newline]
    assert sorted(chats_in(out / TRAIN)) == sorted(
        (sequence, [0] * (len(question) - 1) + [1] * len(answer) + [0, 0])
        for sequence, question, answer in ((first, asked, answered), (second, asked_again, answered_again))
    )


def as_megatron_bridge_reads(file, pack_size, output, pad_multiple=1):
    """What Megatron-Bridge's own dataset makes of each pack: tokens, labels, loss_mask, cu_seqlens_q."""
    program = Path(__file__).with_name("bridge_reader.py")
    subprocess.run(
        [sys.executable, program, file, str(pack_size), output, str(pad_multiple)], check=True, capture_output=True
    )
    return json.loads(output.read_text())


def test_the_loss_is_on_the_answers_and_their_ends_as_megatron_bridge_reads_them(
    made, auto, write_source, out, tmp_path
):
    """The labels that Megatron-Bridge pairs with a 1 are the answers, each with its end of turn, and nothing else."""
    # Without answers that begin with a blank: its token may hold the end of the prompt too, and is learned.
    call = {"type": "function", "function": {"name": "add", "arguments": '{"x": [3, 5]}'}}
    tooled = thinking(("What is 3 + 5?", "Better use the tool.", ""), tools=TOOLS)
    tooled["messages"][1]["tool_calls"] = [call]
    tooled["messages"] += [{"role": "tool", "content": "8"}, {"role": "assistant", "content": "It is 8."}]
    conversations = [CONVERSATIONS[0], CONVERSATIONS[3], chat("Hi", "Hello.", "And now?", "Bye \n\n", "y", "z"), tooled]
    make(made, [write_source(conversations)], out, pack_size=512, pad_multiple=8)
    packs = as_megatron_bridge_reads(out / TRAIN, 512, tmp_path / "read.json", 8)
    learned = []
    for pack in packs:
        for begin, end in pairwise(sorted(set(pack["cu_seqlens_q_padded"]))):
            assert begin % 8 == end % 8 == 0
            labels, mask = pack["labels"][begin:end], pack["loss_mask"][begin:end]
            ids = [label for label, use in zip(labels, mask, strict=True) if use]
            if ids:
                learned.append(auto.decode(ids))
                assert pack["tokens"][begin] == auto.convert_tokens_to_ids("<|im_start|>")
    called = '<tool_call>\n{"name": "add", "arguments": {"x": [3, 5]}}\n</tool_call>'
    assert sorted(learned) == sorted(
        [
            "8<|im_end|>",
            "12345<|im_end|>はい、そうです。<|im_end|>",
            "Hello.<|im_end|>Bye \n\n<|im_end|>z<|im_end|>",
            f"<think>\nBetter use the tool.\n</think>\n{called}<|im_end|>It is 8.<|im_end|>",
        ]
    )


def test_megatron_bridge_reads_every_token_to_be_learned(made, tmp_path):
    packs = as_megatron_bridge_reads(made["chats"] / TRAIN, 256, tmp_path / "read.json")
    measures = json.loads((made["chats"] / "sealed.json").read_text())["measures"]
    assert len(packs) == measures["train"]["packs"]
    assert sum(sum(pack["loss_mask"]) for pack in packs) == measures["train"]["loss_tokens"]


def test_rows_fit_the_schema(made):
    for name in chats.FILES.values():
        for row in pq.read_table(made["chats"] / name).to_pylist():
            assert len(row["input_ids"]) == len(row["loss_mask"])
            assert len(row["input_ids"]) - len(row["seq_start_id"]) <= 256
            assert row["seq_start_id"][0] == 0
            assert set(row["loss_mask"]) <= {0, 1}
        # What the oldest pyarrow knows that Megatron-Bridge names, 14.
        group = pq.read_metadata(made["chats"] / name).row_group(0)
        assert {e for i in range(3) for e in group.column(i).encodings} <= {"PLAIN", "RLE", "RLE_DICTIONARY"}
    schema = pq.read_schema(made["chats"] / TRAIN)
    assert {field.name: str(field.type.value_type) for field in schema} == {
        "input_ids": "int32",
        "seq_start_id": "int32",
        "loss_mask": "int8",
    }


def test_the_payloads_template_is_used(made, auto, write_source, out):
    template = (TEMPLATES / "chatml.jinja").read_text().replace("message['role'] + '", "message['role'] | upper + '")
    make(made, [write_source(CONVERSATIONS)], out, pack_size=300, template=template)
    own = AutoTokenizer.from_pretrained(made["tokenizer"])
    own.chat_template = template
    assert sorted(chats_in(out / TRAIN)) == sorted(by_transformers(own, row) for row in CONVERSATIONS)
    assert by_transformers(own, CONVERSATIONS[0]) != by_transformers(auto, CONVERSATIONS[0])


@pytest.mark.usefixtures("fast")
def test_a_tokenizer_whose_tokens_are_not_the_texts_bytes(made, write_source, out, tmp_path):
    """With a normalizer the lengths of tokens say nothing; the reference tells where they come from."""
    content = json.loads((made["tokenizer"] / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for path in made["tokenizer"].iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "tokenizer.json").write_text(json.dumps(content))
    rows = [chat("e\u0301 A\u030a", "o\u0308 is \u1100\u1161 end", "?", "u\u0308ber"), *CONVERSATIONS]
    measures = make({"tokenizer": directory}, [write_source(rows)], out, pack_size=300)
    auto = AutoTokenizer.from_pretrained(directory)
    assert sorted(chats_in(out / TRAIN)) == sorted(by_transformers(auto, row) for row in rows)
    assert measures["by_reference"] == len(rows)


@pytest.mark.usefixtures("fast")
def test_an_added_token_that_takes_blanks_with_it(small, write_source, out, tmp_path):
    content = json.loads((small / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"] == "<think>":
            token["lstrip"] = token["rstrip"] = True
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for path in small.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "tokenizer.json").write_text(json.dumps(content))
    rows = [chat("a", "x  <think>  y"), chat("b", "c")]
    measures = make({"tokenizer": directory}, [write_source(rows)], out)
    auto = AutoTokenizer.from_pretrained(directory)
    assert sorted(chats_in(out / TRAIN)) == sorted(by_transformers(auto, row) for row in rows)
    assert measures["by_reference"] == 1


# -- training sequences, splits and repeats ----------------------------------------------------------------------------


def test_thoughts_give_one_sequence_for_each_turn_all_in_one_split(made, auto, write_source, out):
    rows = [thinking((f"q{i}", "t", "a"), ("r", f"u{i}", "b"), ("s", "v", "c")) for i in range(60)]
    measures = make(made, [write_source(rows)], out, pack_size=200, valid="1/2")
    train, valid = ({auto.decode(ids) for ids, _ in chats_in(out / name)} for name in (TRAIN, VALID))
    assert len(train) + len(valid) == 180
    for found in (train, valid):
        firsts = {text.split("<|im_end|>")[0] for text in found}
        assert 10 < len(firsts) < 50
        assert len(found) == 3 * len(firsts)
    assert measures["train"]["chats"] * 3 == measures["train"]["sequences"] == len(train)
    # Only the thought of the last turn is written, and only its answer learned.
    [last] = [ids for ids, _ in chats_in(out / TRAIN) if auto.decode(ids).count("assistant") == 3][:1]
    assert auto.decode(last).count("<think>") == 1


def test_a_chat_is_held_out_by_its_content_alone(made, write_source, out, tmp_path):
    rows = [chat(f"What is {i}?", str(i)) for i in range(200)]
    one = make(made, [write_source(rows)], out, valid="1/4")
    (other := tmp_path / "other").mkdir()
    shuffled = [{"id": i, **row} for i, row in enumerate(rows)]
    random.Random(0).shuffle(shuffled)
    two = make(made, [write_source(shuffled, "again")], other, valid="1/4", seed=7)
    assert sorted(chats_in(out / VALID)) == sorted(chats_in(other / VALID))
    assert one["validation"]["chats"] == two["validation"]["chats"]
    assert 25 < one["validation"]["chats"] < 80
    content = [
        [[{"content": f"What is {i}?", "role": "user"}, {"content": str(i), "role": "assistant"}], None]
        for i in range(200)
    ]
    hashes = [xxh3_64_intdigest(json.dumps(c, separators=(",", ":")).encode()) for c in content]
    assert one["validation"]["chats"] == sum(h < 2**62 for h in hashes)


def test_parquet_and_lines_give_the_same_chats(made, auto, write_source, tmp_path, out):
    tooled = thinking(("What is 3 + 5?", "Hm.", "8"), tools=TOOLS)
    tooled["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    rows = [tooled, *CONVERSATIONS]
    source = tmp_path / "parquet"
    (source / "files").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), source / "files/00000.parquet")
    (source / "sealed.json").write_text(json.dumps({"payload": {"files": [{}], "format": "parquet"}}))
    make(made, [source], out, pack_size=400, valid="1/3")
    (other := tmp_path / "other").mkdir()
    make(made, [write_source(rows)], other, pack_size=400, valid="1/3")
    for name in chats.FILES.values():
        assert sorted(chats_in(out / name)) == sorted(chats_in(other / name))
    packed_ids = [auto.decode(ids) for name in chats.FILES.values() for ids, _ in chats_in(out / name)]
    assert any('{"name": "add", "parameters": {"type": "object"}}' in text for text in packed_ids)


@pytest.mark.parametrize("repeat", ["3", "5/2", "1/2", "2.25"])
def test_repeats_are_exact_and_for_training_only(made, write_source, out, repeat):
    rows = [chat(f"Say {i}.", str(i)) for i in range(400)]
    once = [chat(f"What is {i}?", str(i)) for i in range(50)]
    measures = make(made, [write_source(once, "once"), write_source(rows)], out, repeats=["1", repeat], valid="1/5")
    train, valid = chats_in(out / TRAIN), chats_in(out / VALID)
    assert not [found for found in valid if found in train]
    assert len({str(found) for found in valid}) == len(valid) == measures["validation"]["sequences"]
    uses = [train.count(found) for found in {str(f): f for f in train}.values()]
    whole, part = divmod(Fraction(repeat), 1)
    assert set(uses) == ({1, whole, whole + 1} if part else {1, whole}) - {0}
    first, second = measures["sources"]
    chosen = second["train"]["chats"] + second["unchosen"]
    assert chosen + second["validation"]["chats"] == 400
    # How many chats get the one more is a matter of their hashes: within five standard deviations.
    deviation = abs(second["train"]["sequences"] - chosen * Fraction(repeat))
    assert deviation <= 5 * (chosen * float(part * (1 - part))) ** 0.5
    assert (second["unchosen"] > 0) == (Fraction(repeat) < 1)
    assert first["train"]["sequences"] == first["train"]["chats"]
    assert measures["train"]["sequences"] == len(train)


def test_used_in_chooses_and_counts(made, write_source, out):
    rows = [chat("a", "b", used_in=["nano"]), chat("a", "c", used_in="super, nano"), chat("a", "d"), {"used_in": ["x"]}]
    measures = make(made, [write_source(rows)], out, used_in="nano")
    assert (measures["rows"], measures["filtered"], measures["train"]["chats"]) == (4, 2, 2)


def test_another_field(made, write_source, out):
    source = write_source([{"conversation": chat("a", "b")["messages"]}])
    parts = [{"source": "x", "field": "conversation"}]
    assert make(made, [source], out, parts=parts)["train"]["chats"] == 1


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_long_chats_are_dropped_and_counted(made, write_source, out):
    rows = [chat("a", "b"), chat("a", "1" * 100)]
    measures = make(made, [write_source(rows)], out)
    assert measures["too_long"] == 1
    assert measures["train"]["sequences"] == measures["train"]["chats"] - 1 == 1


def test_long_chats_are_truncated_and_counted(made, auto, write_source, out):
    rows = [chat("a", "b"), chat("a", "1" * 100), chat("2" * 100, "too late")]
    measures = make(made, [write_source(rows)], out, too_long="truncate")
    assert (measures["too_long"], measures["nothing_to_learn"]) == (2, 1)
    whole, mask = by_transformers(auto, rows[1])
    assert sorted(chats_in(out / TRAIN)) == sorted([by_transformers(auto, rows[0]), (whole[:65], [*mask[:64], 0])])


@pytest.mark.parametrize("pad_multiple", [1, 16])
def test_long_chats_are_split_and_no_token_is_learned_twice_or_never(made, auto, write_source, out, pad_multiple):
    rows = [chat("a", "1234567890" * 25, "b", "98765" * 20), chat("a", "b"), chat("2" * 100, "too late")]
    measures = make(made, [write_source(rows)], out, too_long="split", pad_multiple=pad_multiple)
    found = chats_in(out / TRAIN)
    assert all(len(ids) <= 65 for ids, _ in found)
    learned = sorted(ids[k + 1] for ids, mask in found for k in range(len(ids)) if mask[k])
    expected = [by_transformers(auto, row) for row in rows]
    assert learned == sorted(ids[k + 1] for ids, mask in expected for k in range(len(ids)) if mask[k])
    assert all(mask[-1] == 0 for _, mask in found)
    assert measures["too_long"] == 2
    assert measures["nothing_to_learn"] == 1  # the first of the two pieces of the last chat
    ids, _ = expected[0]
    assert measures["train"]["sequences"] == -(-(len(ids) - 1) // 64) + 2
    if pad_multiple == 1:
        assert all(any(piece == ids[k : k + 65] for piece, _ in found) for k in range(0, len(ids) - 1, 64))


def test_a_chat_as_long_as_a_pack_fits(made, auto, write_source, out, tmp_path):
    length = len(by_transformers(auto, CONVERSATIONS[0])[0])
    measures = make(made, [write_source(CONVERSATIONS[:1])], out, pack_size=length - 1)
    assert measures["train"]["fill"] == 1
    (other := tmp_path / "other").mkdir()
    with pytest.raises(NemoflowError, match=r"no chat to train on is left .*'too_long': 1"):
        make(made, [write_source(CONVERSATIONS[:1], "again")], other, pack_size=length - 2)


def test_pack_size_must_be_a_multiple_of_the_padding(made, write_source, out):
    with pytest.raises(NemoflowError, match=r"pack_size: 64 is not a multiple of pad_multiple, 24, .*; 72 is"):
        make(made, [write_source(CONVERSATIONS)], out, pad_multiple=24)


# -- what stays out ----------------------------------------------------------------------------------------------------


def test_unusable_chats_are_counted_by_reason_with_the_place_of_the_first(made, write_source, out):
    rows = [
        chat("a", "b"),
        b"{no json",
        chat("a", "x</s>y"),
        {"messages": []},
        chat("a", "x<|im_end|>y"),
        chat("only a question"),
        chat("a", "", "b", "c"),
        chat("a", "<think>d</think> <unk> <im_end>"),
        b"[1]",
    ]
    measures = make(made, [write_source(rows)], out, max_broken="1")
    assert measures["dropped"] == {
        "an empty message": 1,
        "no answer": 1,
        "no messages": 1,
        "not JSON": 1,
        "not a JSON object": 1,
        "spells a control token": 2,
    }
    assert measures["rows"] == 9 == 2 + sum(measures["dropped"].values())
    assert measures["train"]["chats"] == 2
    assert measures["sources"][0]["first_dropped"] == {
        "an empty message": [0, 7],
        "no answer": [0, 6],
        "no messages": [0, 4],
        "not JSON": [0, 2],
        "not a JSON object": [0, 9],
        "spells a control token": [0, 3],
    }


def test_too_many_unusable_chats_name_the_worst_file(made, write_source, out, monkeypatch):
    monkeypatch.setattr(chats, "_PIECE", 1)
    source = write_source([chat("a", "b")] * 9 + [{"messages": []}])
    (source / "files/00001.jsonl").write_text(
        "\n".join(json.dumps(r) for r in [chat("a", "b"), chat("a", "</s>"), chat("a", ""), chat("b", "")])
    )
    payload = json.loads((source / "sealed.json").read_text())
    payload["payload"]["shards"] = 2
    (source / "sealed.json").write_text(json.dumps(payload))
    with pytest.raises(
        NemoflowError,
        match=r"source/files/00001\.jsonl:3: an empty message .*of 14 chats 4 are unusable; max_broken allows 1/4; "
        r"here is most of it: 2 an empty message, 1 spells a control token",
    ):
        make(made, [source], out, max_broken="1/4")
    assert make(made, [source], out, max_broken="2/7")["train"]["chats"] == 10


def test_unusable_chats_are_a_share_of_those_wanted_of_one_source(made, write_source, out):
    good = write_source([chat(str(i), "b") for i in range(100)], "good")
    bad = write_source([chat("a", "", used_in="x"), *[chat("a", "b", used_in="y")] * 100], "bad")
    with pytest.raises(NemoflowError, match=r"bad/files/00000.jsonl:1: an empty message"):
        make(made, [good, bad], out, max_broken="1/2", used_in="x")


def test_nothing_to_train_on(made, write_source, out):
    with pytest.raises(NemoflowError, match=r"no chat to train on is left .*'rows': 0"):
        make(made, [write_source([])], out)


def test_a_tokenizer_without_a_template(made, write_source, out, tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((made["tokenizer"] / name).read_bytes())
    source = write_source(CONVERSATIONS)
    with pytest.raises(NemoflowError, match="no chat template"):
        make({"tokenizer": directory}, [source], out)
    template = (TEMPLATES / "chatml.jinja").read_text()
    assert make({"tokenizer": directory}, [source], out, pack_size=300, template=template)["train"]["chats"] == 4


def test_a_template_that_hides_the_answers_is_named(made, write_source, out):
    with pytest.raises(NemoflowError, match=r"^template: the chat template does not show where"):
        make(made, [write_source(CONVERSATIONS)], out, template="{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.usefixtures("fast")
def test_an_engine_that_differs_is_found_out(small, write_source, out, monkeypatch):
    real = chats.Masker.mask

    def wrong(self, texts, spans, sample, place):
        encode = self._encoder.encode

        def other(given):
            found = encode(given)
            found.ids[3] += 1
            return found

        monkeypatch.setattr(self._encoder, "encode", other)
        return real(self, texts, spans, sample, place)

    monkeypatch.setattr(chats.Masker, "mask", wrong)
    with pytest.raises(
        NemoflowError, match=r"files/00000\.jsonl:1: gigatoken gives this chat other ids than tokenizers"
    ):
        make({"tokenizer": small}, [write_source(CONVERSATIONS)], out, pack_size=600)


# -- packs and spools --------------------------------------------------------------------------------------------------


@pytest.fixture
def many(write_source):
    """Chats enough for several pieces, runs and windows."""
    draw = random.Random(0)
    rows = [
        chat(f"Say {i} {'word ' * draw.randrange(30)}", "yes " * draw.randrange(1, 30))
        if i % 3
        else thinking((f"q{i}", "t " * draw.randrange(1, 9), "a"), ("r", "u", "b " * draw.randrange(1, 9)))
        for i in range(300)
    ]
    source = write_source([])
    (source / "files/00000.jsonl").unlink()
    for number in range(6):
        own = rows[number::6]
        (source / f"files/{number:05d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    payload = {"kind": "source", "generator": "test", "shards": 6}
    (source / "sealed.json").write_text(json.dumps({"payload": payload, "measures": {}}))
    return source


@pytest.fixture
def fine(monkeypatch):
    """Small pieces, runs, windows and row groups."""
    monkeypatch.setattr(chats, "_PIECE", 6000)
    monkeypatch.setattr(spool, "_RUN", 500)
    monkeypatch.setattr(packed, "WINDOW", 1500)
    monkeypatch.setattr(packed, "_ROW_GROUP", 640)


@pytest.mark.usefixtures("fine")
def test_every_sequence_is_packed_as_often_as_it_is_used(small, many, out, tmp_path, monkeypatch):
    measures = make({"tokenizer": small}, [many], out, repeats=["5/2"], pack_size=128, valid="1/10")
    assert pq.read_metadata(out / TRAIN).num_row_groups > 20
    monkeypatch.undo()
    (whole := tmp_path / "whole").mkdir()
    other = make({"tokenizer": small}, [many], whole, repeats=["5/2"], pack_size=128, valid="1/10")
    for name in chats.FILES.values():
        assert sorted(chats_in(out / name)) == sorted(chats_in(whole / name))
        assert chats_in(out / name) != chats_in(whole / name)
    for split in ("train", "validation"):
        for key in ("chats", "sequences", "tokens", "loss_tokens", "padding"):
            assert measures[split][key] == other[split][key]
    assert measures["sources"] == other["sources"]
    assert sum(measures["lengths"]) == 400


@pytest.mark.usefixtures("fine")
def test_measures_are_what_is_in_the_files(small, many, out):
    measures = make({"tokenizer": small}, [many], out, pack_size=160, pad_multiple=8, valid="1/10")
    packing = json.loads((out / "packing.json").read_text())
    for split, name, told in zip(("train", "validation"), chats.FILES.values(), packing, strict=True):
        rows = pq.read_table(out / name).to_pylist()
        sequences = [np.diff([*row["seq_start_id"], len(row["input_ids"])]) for row in rows]
        filled = [int(sum(n - 1)) for n in sequences]
        found = measures[split]
        padding = sum(len(row["input_ids"]) for row in rows) - found["tokens"]
        assert all(((n - 1) % 8 == 0).all() for n in sequences)
        assert max(filled) <= 160
        assert found["packs"] == len(rows)
        assert found["sequences"] == sum(map(len, sequences))
        assert found["padding"] == padding > 0
        assert found["loss_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
        assert found["fill"] == round((sum(filled) - padding) / (160 * len(rows)), 6)
        assert told == {
            "dataset_max_seqlen": max(int(max(n)) - 1 for n in sequences),
            "max_samples_per_bin": max(map(len, sequences)),
            "packing_factor": round(found["sequences"] / len(rows), 2),
            "packing_efficiency": round(100 * found["fill"], 2),
            "pack_size": 160,
            "min_packed_seqlen": min(filled),
        }


def test_the_seed_changes_the_order_only(small, many, out, tmp_path):
    one = make({"tokenizer": small}, [many], out, pack_size=128)
    (other := tmp_path / "other").mkdir()
    two = make({"tokenizer": small}, [many], other, pack_size=128, seed=1)
    assert sorted(chats_in(out / TRAIN)) == sorted(chats_in(other / TRAIN))
    assert chats_in(out / TRAIN) != chats_in(other / TRAIN)
    assert one["train"]["tokens"] == two["train"]["tokens"]


def test_sequences_are_shuffled(small, write_source, out):
    rows = [chat(str(i), "a") for i in range(500)]
    make({"tokenizer": small}, [write_source(rows)], out, pack_size=32)
    auto = AutoTokenizer.from_pretrained(small)
    order = [int(auto.decode(ids).split("\n")[1].removesuffix("<|im_end|>")) for ids, _ in chats_in(out / TRAIN)]
    assert sorted(order) == list(range(500))
    assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.2


def test_a_window_of_sequences(small, many, out, tmp_path):
    (other := tmp_path / "other").mkdir()
    whole = make({"tokenizer": small}, [many], out, pack_size=128)
    by_ten = make({"tokenizer": small}, [many], other, pack_size=128, window=10)
    assert sorted(chats_in(out / TRAIN)) == sorted(chats_in(other / TRAIN))
    assert by_ten["train"]["fill"] < whole["train"]["fill"]


@pytest.mark.usefixtures("fine")
def test_neither_processes_nor_engine_change_a_byte(small, many, tmp_path, monkeypatch):
    found = []
    for number, (threads, size) in enumerate(((1, 0), (3, 0), (1, 1 << 30))):
        monkeypatch.setattr(chats, "_SMALL", size)
        (out := tmp_path / str(number)).mkdir()
        measures = make({"tokenizer": small}, [many], out, threads=threads, repeats=["5/2"], pack_size=128, valid="1/5")
        found.append((tree(out), measures))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 4


@pytest.mark.usefixtures("fine")
def test_row_groups_of_parquet(small, many, tmp_path, out):
    rows = [json.loads(line) for n in range(6) for line in (many / f"files/{n:05d}.jsonl").read_text().splitlines()]
    source = tmp_path / "parquet"
    (source / "files").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), source / "files/00000.parquet", row_group_size=40, compression="none")
    (source / "sealed.json").write_text(json.dumps({"payload": {"files": [{}], "format": "parquet"}}))
    assert len(chats._pieces([open_source(source)])) > 4
    make({"tokenizer": small}, [source], out, pack_size=128)
    (other := tmp_path / "other").mkdir()
    make({"tokenizer": small}, [many], other, pack_size=128)
    assert sorted(chats_in(out / TRAIN)) == sorted(chats_in(other / TRAIN))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named(small, tmp_path, out, damage):
    source = tmp_path / "source"
    (source / "files").mkdir(parents=True)
    content = gzip.compress(
        b"".join(json.dumps(chat(str(i), hashlib.sha256(b"%d" % i).hexdigest())).encode() + b"\n" for i in range(999))
    )
    (source / "files/00000.jsonl.gz").write_bytes(content[: len(content) // 2])
    (source / "sealed.json").write_text(json.dumps({"payload": {"files": [{}], "format": "jsonl.gz"}}))
    if damage == "gone":
        (source / "files/00000.jsonl.gz").unlink()
    with pytest.raises((NemoflowError, FileNotFoundError), match=r"00000\.jsonl\.gz"):
        make({"tokenizer": small}, [source], out)


# -- interruptions -----------------------------------------------------------------------------------------------------

KILLED = """
import json, os, random, signal, sys
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from nemoflow.data import chats, packed, spool
at, victim, source, tokenizer, out, threads, payload = json.loads(sys.argv[2])
parent, events = os.getpid(), 0
def event():
    global events
    events += 1
    if events == at:
        os.kill(parent if victim == "parent" else os.getpid(), signal.SIGKILL)
        import time; time.sleep(1)
def counted(function):
    def wrapper(*arguments, **options):
        event()
        done = function(*arguments, **options)
        event()
        return done
    return wrapper
for name in ("__init__", "write", "finish"):
    setattr(spool.HashedFile, name, counted(getattr(spool.HashedFile, name)))
spool.SpoolWriter._flush = counted(spool.SpoolWriter._flush)
chats._remove_all_but = counted(chats._remove_all_but)
chats.shutil.rmtree = counted(chats.shutil.rmtree)
Path.unlink = counted(Path.unlink)
chats._PIECE, spool._RUN, packed.WINDOW, packed._ROW_GROUP, chats._BATCH, chats._SMALL = 6000, 500, 1500, 640, 3000, 0
chats.make(payload, {"sources": [Path(source)], "tokenizer": Path(tokenizer)}, Path(out), print, threads=threads)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("fine", "fast")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(small, many, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(chats, "_BATCH", 3000)
    (whole := tmp_path / "whole").mkdir()
    payload = PAYLOAD | {"parts": [{"source": "x", "repeat": "5/2"}], "pack_size": 128, "valid": "1/5"}
    make({"tokenizer": small}, [many], whole, **payload)
    expected = tree(whole)
    draw = random.Random(threads)
    kills = {"parent": 0, "self": 0}
    receipts: dict[str, bytes] = {}
    for trial in range(3):
        (out := tmp_path / str(trial)).mkdir()
        for attempt in range(40):
            at, victim = draw.randrange(1, 200 * (1 + attempt)), draw.choice(sorted(kills))
            arguments = [at, victim, str(many), str(small), str(out), threads, payload]
            done = subprocess.run(
                [sys.executable, "-c", KILLED, json.dumps(sys.path), json.dumps(arguments)],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL or "has died" in done.stderr, done.stderr
            kills[victim] += 1
            for path in out.glob("spool/*.json"):  # what has a receipt is as it was, and as it will be
                assert receipts.setdefault(path.name, path.read_bytes()) == path.read_bytes()
        assert tree(out) == expected
    assert min(kills.values()) >= 2
    assert len(receipts) > 4


@pytest.mark.usefixtures("fine")
def test_finished_pieces_are_kept_and_the_broken_one_is_redone(small, many, tmp_path, monkeypatch):
    (whole := tmp_path / "whole").mkdir()
    make({"tokenizer": small}, [many], whole)
    (out := tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(chats, "write_packs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make({"tokenizer": small}, [many], out)
    receipts = sorted((out / "spool").glob("*.json"))
    (out / "spool/00001.tokens").write_bytes(b"cut")
    receipts[3].unlink()
    (out / "spool/00002.tokens.123.tmp").write_bytes(b"left over")
    made = []
    real = chats._Work.make
    monkeypatch.setattr(chats._Work, "make", lambda self, n, count: (made.append(n), real(self, n, count)))
    make({"tokenizer": small}, [many], out)
    assert made == [1, 3]
    assert tree(out) == tree(whole)


@pytest.mark.usefixtures("fine")
def test_a_finished_job_reads_nothing_again(small, many, out, monkeypatch):
    measures = make({"tokenizer": small}, [many], out)
    before = tree(out)
    monkeypatch.setattr(chats, "load", None)
    (out / "spool").mkdir()  # an attempt that died when it tidied up
    assert make({"tokenizer": small}, [many], out) == measures
    assert tree(out) == before


# -- cost --------------------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported(small, many, tmp_path):
    """Of pandas, which pyarrow likes to bring, and numba, half a second each; of torch and transformers seconds."""
    payload = PAYLOAD | {"parts": [{"source": "x"}]}
    program = KILLED + "print(*sorted(sys.modules))"
    (out := tmp_path / "out").mkdir()
    arguments = [-1, "self", str(many), str(small), str(out), 1, payload]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(sys.path), json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert "nemoflow.data.masks" in imported
    assert not {"pandas", "numba", "torch", "transformers", "datasets", "megatron"} & imported


def test_memory_does_not_grow_with_the_input(small, write_source, tmp_path):
    """40 MB of chats in windows of 400,000 tokens take about as much memory as 4 MB of them."""
    program = KILLED.replace("6000, 500, 1500, 640, 3000, 0", "2 << 20, 1 << 17, 400_000, 1 << 17, 1 << 18, 0")
    program += "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    rows = [
        chat(f"{i}", " ".join(draw.choices(words, k=300)), "more", " ".join(draw.choices(words, k=300)))
        for i in range(1000)
    ]
    peaks = []
    for copies in (1, 10):
        source = write_source([], f"source{copies}")
        lines = [json.dumps(row | {"id": n}).replace('"more"', f'"more {n}"') for n in range(copies) for row in rows]
        (source / "files/00000.jsonl").write_text("\n".join(lines))
        (out := tmp_path / f"out{copies}").mkdir()
        payload = PAYLOAD | {"parts": [{"source": "x"}], "pack_size": 4096}
        arguments = [-1, "self", str(source), str(small), str(out), 1, payload]
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(sys.path), json.dumps(arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks

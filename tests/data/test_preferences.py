import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemoflow.data import preferences
from nemoflow.errors import NemoflowError

USER = {"role": "user", "content": "What is 1 + 1?"}
GOOD, BAD = {"role": "assistant", "content": "Two."}, {"role": "assistant", "content": "It is three."}
SYSTEM = {"role": "system", "content": "Be right."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
FIELDS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}


def pair(**row):
    return preferences.pair(row, FIELDS)


def source(directory, *files, format="jsonl"):
    (directory / "files").mkdir(parents=True)
    for i, rows in enumerate(files):
        path = directory / f"files/{i:05d}.{format}"
        if format == "parquet":
            pq.write_table(
                pa.table({k: [r.get(k) for r in rows] for k in dict.fromkeys(k for r in rows for k in r)}), path
            )
        else:
            data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
            path.write_bytes(pa.compress(data, "zstd", asbytes=True) if format == "jsonl.zst" else data)
    payload = {
        "hub": {"repo": "org/pairs", "commit": "c0ffee" * 7},
        "files": [{"path": f"data/{i}.{format}"} for i in range(len(files))],
        "format": format,
    }
    (directory / "sealed.json").write_text(json.dumps({"payload": payload}))
    return directory


def make(sources, out, **payload):
    return preferences.make(
        {"valid": "1/10", "fields": {}, "max_broken": "0"} | payload, {"sources": sources}, out, print
    )


def read(out):
    return [[json.loads(x) for x in (out / n).read_text().splitlines()] for n in ("train.jsonl", "validation.jsonl")]


# -- layouts -----------------------------------------------------------------------------------------------------------

TALK = "\n\nHuman: Hello\n\nAssistant: Good day\n\nHuman: What is 1 + 1?\n\nAssistant:"
WANTED = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}, [USER]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"prompt": [SYSTEM, *EARLIER, USER], "chosen": GOOD["content"], "rejected": [BAD]}, [SYSTEM, *EARLIER, USER]),
        ({"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, [*EARLIER, USER]),
        ({"prompt": None, "system": "Be right.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "system": "Another.", "chosen": "Two.", "rejected": [BAD]}, [SYSTEM, USER]),
        (
            {"chosen": f"{TALK} Two.", "rejected": f"{TALK} It is three."},
            [*EARLIER, USER],
        ),
        (
            {"prompt": "\n\nHuman: What is 1 + 1?\n\nAssistant:", "chosen": "Two.", "rejected": "It is three."},
            [USER],
        ),
    ],
)
def test_layouts(row, prompt):
    assert pair(**row) == WANTED | {"prompt": prompt}


def test_other_names_of_columns():
    row = {"question": "What is 1 + 1?", "chosen_response": GOOD, "rejected_response": BAD, "chosen": "x"}
    names = {"prompt": "question", "chosen": "chosen_response", "rejected": "rejected_response"}
    assert preferences.pair(row, names) == WANTED


def test_tools():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "7"}
    tools = [{"type": "function", "function": {"name": "f", "description": "größer", "parameters": {}}}]
    found = pair(chosen=[USER, call, result, GOOD], rejected=[USER, call, result, BAD], tools=tools)
    call = call | {"content": ""}
    assert found == WANTED | {"prompt": [USER, call, result], "tools": json.dumps(tools, ensure_ascii=False)}
    found = pair(prompt=[USER], chosen=[USER, call, result, GOOD], rejected=[USER, BAD])
    assert found == WANTED | {"chosen": [call, result, GOOD]}
    assert pair(prompt="x", chosen="y", rejected=call, tools="[]")["rejected"] == [call]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "y"}, "no 'rejected'"),
        ({"chosen": "y", "rejected": "z"}, "chosen and rejected do not answer one prompt"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({"prompt": [USER], "chosen": "Two.", "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({"prompt": " ", "chosen": "y", "rejected": "z"}, "the prompt is empty"),
        ({"prompt": "x", "chosen": "\n", "rejected": "z"}, "chosen is empty"),
        ({"prompt": "x", "chosen": "y", "rejected": []}, "'rejected' is empty"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [USER, BAD]}, "chosen is empty"),
        ({"prompt": "x", "chosen": 3, "rejected": "z"}, "'chosen' is neither text nor messages"),
        ({"prompt": "x", "chosen": ["y"], "rejected": "z"}, "'chosen' has a message without a role"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not answer one prompt"),
        ({"chosen": [USER, GOOD], "rejected": [EARLIER[0], BAD]}, "do not answer one prompt"),
        ({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, SYSTEM, BAD]}, "do not answer one prompt"),
        ({"chosen": [*EARLIER, USER, GOOD], "rejected": EARLIER}, "do not answer one prompt"),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "chosen does not end in an answer"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "tools": 3}, "tools is neither a list nor its JSON"),
    ],
)
def test_what_is_no_pair(row, reason):
    with pytest.raises(ValueError, match=reason):
        pair(**row)


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_and_measures(tmp_path, out):
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"{i}", "rejected": "no idea" * copy}
        for i in range(100)
        for copy in (1, 2)
    ]
    measures = make([source(tmp_path / "a", rows[::2], rows[1::2], format="jsonl.zst")], out)
    train, valid = read(out)
    assert measures == {
        "rows": {"train": 180, "validation": 20},
        "prompts": 100,
        "characters": {
            "prompt": {"all": 2 * sum(len(f"What is {i}?") for i in range(100)), "longest": 11},
            "chosen": {"all": 380, "longest": 2},
            "rejected": {"all": 2100, "longest": 14},
        },
        "chosen_longer": 0,
        "broken": {},
    }
    assert len(train) == 180
    prompts = [{json.dumps(row["prompt"]) for row in side} for side in (train, valid)]
    assert not prompts[0] & prompts[1]
    for row in train + valid:
        # NeMo-RL reads these two: lower rank is preferred, and what a row of its BinaryPreferenceDataset would become.
        assert row["context"] == row["prompt"]
        assert row["completions"] == [
            {"rank": 0, "completion": row["chosen"]},
            {"rank": 1, "completion": row["rejected"]},
        ]


def test_the_same_pairs_from_parquet(tmp_path, out):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]
    called = GOOD | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {"prompt": [USER], "chosen": [called], "rejected": [BAD], "tools": tools},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "score": 0.5},
    ]
    when = [row | {"when": datetime.datetime(2020, 1, 1)} for row in rows]
    make([source(tmp_path / "a", when, format="parquet")], out, valid="0")
    from_parquet = (out / "train.jsonl").read_bytes()
    make([source(tmp_path / "b", rows)], out, valid="0")
    assert (out / "train.jsonl").read_bytes() == from_parquet
    assert "tool_calls" not in read(out)[0][1]["chosen"][0]


def test_too_many_that_are_no_pairs_is_an_error_naming_the_first(tmp_path, out):
    rows = [{"prompt": "x", "chosen": "y", "rejected": "z"}] * 8
    rows += [{"prompt": "x", "chosen": "y", "rejected": "y"}, b"{"]
    pairs = source(tmp_path / "a", rows)
    with pytest.raises(NemoflowError, match=r"org/pairs@c0ffeec0ffee/data/0\.jsonl:9: chosen and rejected are"):
        make([pairs], out, max_broken="1/10")
    measures = make([pairs], out, max_broken="1/5", valid="0")
    assert measures["broken"] == {"chosen and rejected are the same": 1, "not JSON": 1}
    assert measures["rows"] == {"train": 8, "validation": 0}


def test_nothing_to_train_or_validate_with(tmp_path, out):
    alone = source(tmp_path / "alone", [{"prompt": "x", "chosen": "y", "rejected": r} for r in "ab"])
    with pytest.raises(NemoflowError, match="one prompt only"):
        make([alone], out)
    assert make([alone], out, valid="0")["rows"] == {"train": 2, "validation": 0}
    with pytest.raises(NemoflowError, match="there are no usable pairs"):
        make([source(tmp_path / "a", [])], out)


# -- readers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path, out):
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"{i}", "rejected": [{"role": "assistant", "content": "no"}]} | more
        for i, more in enumerate([{}, {"tools": tools}, {"system": "Be right."}, {}] * 3)
    ]
    make([source(tmp_path / "a", rows)], out, valid="1/4")
    return out


def test_trl_trains_on_the_files(written, made, tmp_path):
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    tokenizer = PreTrainedTokenizerFast.from_pretrained(made["tokenizer"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1, **sizes)
    files = {"train": str(written / "train.jsonl"), "test": str(written / "validation.jsonl")}
    data = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    settings = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    for trainer, settings_of, model in (
        (DPOTrainer, DPOConfig, LlamaForCausalLM(config)),
        (RewardTrainer, RewardConfig, LlamaForSequenceClassification(config)),
    ):
        model.save_pretrained(tmp_path / trainer.__name__)
        trained = trainer(
            model=str(tmp_path / trainer.__name__),
            args=settings_of(per_device_train_batch_size=3, **settings),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
        )
        assert len(trained.train_dataset) == 9
        ids = trained.train_dataset[0]
        first = json.loads((written / "train.jsonl").read_text().splitlines()[0])
        answer = tokenizer.decode(ids["chosen_ids"])
        assert first["chosen"][0]["content"] in answer
        assert (first["prompt"][-1]["content"] in answer) == (trainer is RewardTrainer)
        assert trained.train().training_loss > 0


def test_nemo_rl_reads_the_files(written, tmp_path):
    """As its PreferenceDataset and preference_preprocessor do: rows through `datasets`, context + completion."""
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(written / "train.jsonl"), cache_dir=str(tmp_path / "cache"))["train"]
    for row in data:
        better, worse = sorted(row["completions"], key=lambda c: c["rank"])
        assert [better["rank"], worse["rank"]] == [0, 1]
        for completion in (better, worse):
            for message in row["context"] + completion["completion"]:
                assert message.keys() == {"role", "content"}
                assert isinstance(message["content"], str)

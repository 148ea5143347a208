"""The model card of an export, and the records beside it."""

import re

import httpx
import pytest
from archives import Archive, pretraining
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from nemoflow import job, summary
from nemoflow.export import card
from nemoflow.lineage import load

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
MEASURES = {"parameters": 1_000_000, "bytes": 2_000_000, "dtype": "bfloat16"}
H200 = {"device": "NVIDIA H200", "gpus": 16, "seconds": 3600.0}


@pytest.fixture
def lineage(tmp_path) -> list[dict]:
    """Of a model fine-tuned from a published one, on chats of the hub, of this machine, and generated."""
    archive = Archive(tmp_path)
    tokenizer = archive.seal("tokenizer", hub={"repo": "org/tokenizer", "commit": "0" * 40}, files=[])
    model = archive.seal(
        "source",
        measures={"files": 3, "license": "apache-2.0"},
        model={"repo": "org/base", "commit": "b" * 40},
        files=[],
    )
    start = archive.seal(
        "import", measures={"parameters": 10**6}, engine="megatron_bridge", model=model, tokenizer=tokenizer
    )
    chats = {"repo": "org/chats", "commit": "c" * 40, "config": "default", "split": "train"}
    sources = [
        archive.seal(
            "source", measures={"files": 2, "license": "cc-by-4.0"}, hub=chats, format="jsonl", files=[{}, {}]
        ),
        archive.seal("source", measures={"files": 1}, format="jsonl", files=[{"sha256": "d" * 64, "size": 9}]),
        archive.seal("source", measures={"documents": 60}, generator="arithmetic_chats", shards=2, python="3.12.1"),
        archive.seal("source", measures={"documents": 70}, generator="stdlib_chats", shards=2, python="3.12.1"),
    ]
    packed = archive.seal(
        "chats",
        measures={"train": {"chats": 900, "tokens": 5000}},
        parts=[{"source": source, "repeat": "1"} for source in sources],
        tokenizer=tokenizer,
        pack_size=128,
    )
    trained = archive.seal(
        "sft",
        at=100,
        measures={"iterations": 100, "loss": 1.5, "tokens": 5 * 10**6},
        engine="megatron_bridge",
        function="recipes.qwen3_sft_config",
        overrides={"optimizer.lr": 0.001, "train.global_batch_size": 64},
        init={"from": start, "carry": "weights"},
        data=packed,
        tokenizer=tokenizer,
        horizon=100,
    )
    return load(archive.directory(trained, 100)).records()


def written(lineage: list[dict], attempts: list[dict] | None = None) -> ModelCard:
    trained = lineage[-1]["identity"]
    return ModelCard(card.text(CONFIG, MEASURES, lineage, True, {trained: attempts} if attempts else {}))


def test_front_matter_links_base_model_and_datasets(lineage):
    data = written(lineage).data
    assert data.base_model == "org/base" or data.base_model == ["org/base"]
    assert data.datasets == ["org/chats"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["llama", "sft", "nemoflow"]
    for name in ["org/base", *data.datasets]:
        validate_repo_id(name)


def test_the_hub_takes_its_metadata(lineage):
    try:
        written(lineage).validate()
    except httpx.TransportError:
        pytest.skip("the hub, which validates, cannot be reached")


def test_each_source_has_its_origin_and_license(lineage):
    lines = written(lineage).text.splitlines()
    rows = {r.split(" | ")[0].strip("| "): r.split(" | ")[1:3] for r in lines if "| `" in r and r.count(" | ") == 4}
    assert rows == {
        "base": ["model `org/base` at bbbbbbbbbbbb", "apache-2.0"],
        "chats": ["`org/chats` (default train) at cccccccccccc, 2 files", "cc-by-4.0"],
        "jsonl-1-files": ["1 files, pinned by digest", "not known"],
        "arithmetic-chats": ["generated: `arithmetic_chats`", "none, it is generated"],
        "stdlib-chats": ["generated: `stdlib_chats`", "PSF-2.0"],
    }


def test_training_says_what_it_took_and_with_which_settings(lineage):
    attempts = [
        H200 | {"from": 0, "reached": 60},
        {"device": "NVIDIA H200", "gpus": 16},
        H200 | {"from": 60, "reached": 140},
    ]
    text = written(lineage, attempts).text
    assert "| sft qwen3 to 100 | 100 | 5,000,000 | 1.5 |  |  |  | 16 x NVIDIA H200 | 24.00 |" in text.splitlines()
    assert "| sft qwen3 to 100 | 0.001 |  |  | 64 |  |  |" in text.splitlines()
    assert "  optimizer.lr: 0.001\n" in text


def test_a_training_without_gpus_or_records_claims_no_hours(lineage):
    on_cpu = written(lineage, [{"device": "CPU", "gpus": 2, "seconds": 60, "from": 0, "reached": 100}]).text
    assert "| sft qwen3 to 100 | 100 | 5,000,000 | 1.5 |  |  |  | CPU |  |" in on_cpu.splitlines()
    assert "| sft qwen3 to 100 | 100 | 5,000,000 | 1.5 |  |  |  |  |  |" in written(lineage).text.splitlines()


def test_hours_of_attempts_beyond_a_state_are_shared():
    attempts = [H200 | {"from": 0, "reached": 100}, H200 | {"from": 100, "reached": 200}]
    assert summary.gpu_hours(attempts) == 32
    assert summary.gpu_hours(attempts, at=150) == 24
    assert summary.gpu_hours(attempts, at=100) == 16
    assert summary.gpu_hours([H200 | {"from": 10, "reached": 10}], at=100) == 16, "what saved nothing cost all the same"
    assert summary.gpu_hours([{"device": "CPU", "gpus": 2, "seconds": 9.0}]) is None


def test_the_device_is_the_driver_s_word(tmp_path):
    assert job.device(tmp_path) == "CPU"
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\n")
    assert job.device(tmp_path) == "NVIDIA H200"


def test_thousands_of_shards_are_one_box_of_the_chart(tmp_path):
    _, export = pretraining(tmp_path, sources=3, shards=1000)
    lineage = load(export).records()[:-1]
    text = card.text(CONFIG, MEASURES, lineage, False, {})
    assert len(text) < 10_000
    chart = text.partition("```mermaid\n")[2].partition("```")[0]
    assert sorted(re.findall('shards .*"', chart)) == [
        f'shards web-00{i}-tokenizer: 1,000 artifacts"' for i in range(3)
    ]
    assert "\n| merge | web-001-tokenizer | " in text

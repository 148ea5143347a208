"""docs/add-a-model.md, followed to the letter, and the dense twin that ships: from raw text to transformers.

Slow by nature: two small models are trained.
"""

import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_demo import BASE, PARTS, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PAGE = (BASE / "docs/add-a-model.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path) -> Path:
    for part in PARTS:
        copy = shutil.copytree if (BASE / part).is_dir() else shutil.copy
        copy(BASE / part, tmp_path / part)
    return tmp_path


def test_the_page_can_be_followed(checkout):
    blocks = re.findall(r"```(yaml|sh|python)\n(.*?)```", PAGE, re.S)
    assert [kind for kind, _ in blocks] == ["sh", "yaml", "sh", "python", "yaml", "sh"]
    said = ""
    for kind, text in blocks:
        match kind:
            case "yaml":
                (checkout / text.split()[1]).write_text(text, encoding="utf-8")
            case "python":
                said += run(checkout, sys.executable, "-c", text)
            case "sh":
                for line in text.strip().splitlines():
                    said += run(checkout, *shlex.split(line))
    assert "llama32_1b_pretrain_config" in said
    assert "config/recipes/llama-tiny.yaml: fine" in said
    assert "LlamaForCausalLM" in said
    assert "config/recipes/llama-1b.yaml: fine" in said
    assert "8 h100" in said


def test_the_dense_twin_learns_and_is_exported(checkout):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = [f"{kind}/qwen3-8b-tiny" for kind in ("hf_export", "pretrain", "sft", "data")]
    run(checkout, "snakemake", *names)
    measured = {}
    for kind in ("pretrain", "sft"):
        measured[kind] = json.loads((checkout / f"{kind}/qwen3-8b-tiny/sealed.json").read_text())["measures"]
        assert measured[kind]["valid_loss"] < 0.95 * measured[kind]["valid_loss_first"]
    model, notes = AutoModelForCausalLM.from_pretrained(checkout / "hf_export/qwen3-8b-tiny", output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(notes.values())
    tokenizer = AutoTokenizer.from_pretrained(checkout / "hf_export/qwen3-8b-tiny")
    packs = checkout / "data/qwen3-8b-tiny/sft/validation.idx.parquet"
    assert loss(model, packs, rows=8) == pytest.approx(measured["sft"]["valid_loss"], abs=1e-4)
    assert len(tokenizer) == model.config.vocab_size
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def loss(model, packs: Path, rows: int) -> float:
    """Mean loss of a model over the answers in the first packed rows, each sequence by itself."""
    import pyarrow.parquet
    import torch

    total = count = 0
    for row in pyarrow.parquet.read_table(packs).slice(0, rows).to_pylist():
        borders = [*row["seq_start_id"], len(row["input_ids"])]
        for start, end in itertools.pairwise(borders):
            ids, mask = (torch.tensor(row[key][start:end]) for key in ("input_ids", "loss_mask"))
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total, count = total + float((losses * mask[:-1]).sum()), count + int(mask[:-1].sum())
    return total / count

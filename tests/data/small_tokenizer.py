"""A byte-level BPE that gigatoken can load, trained in a second on Python's documentation, and variants of it."""

import functools
import json
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]")


@functools.cache
def trained() -> str:
    """tokenizer.json: GPT-2's pattern, 2,000 ids, of which SPECIAL are the first, with </s> = 2."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([topics[key] for key in sorted(topics)], trainer)
    return engine.to_str()


def write(directory: Path, added: list[dict] | None = None, **changes) -> Path:
    """Write the tokenizer's files, with `changes` to every added token and more of them; returns the directory."""
    content = json.loads(trained())
    content["added_tokens"] = [token | changes for token in content["added_tokens"]]
    for number, token in enumerate(added or [], 2000):
        usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"].append({"id": number} | usual | token)
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    return directory

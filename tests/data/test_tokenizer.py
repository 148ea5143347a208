import hashlib
import json
import shutil

import pytest
from hub_server import Hub
from transformers import AutoTokenizer

from nemoflow.data import tokenizer
from nemoflow.data.rows import Broken, read
from nemoflow.data.sources import open_source
from nemoflow.errors import NemoflowError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 5?"},
    {"role": "assistant", "content": "8"},
    {"role": "user", "content": "And 12?"},
    {"role": "assistant", "content": "Zwölf, 12."},
]


@pytest.fixture(scope="module")
def auto(made):
    return AutoTokenizer.from_pretrained(made["tokenizer"])


def corpus(made):
    for name in ("stdlib_topics", "stdlib_docstrings"):
        source = open_source(made[name])
        for _, _, row in read(source, source.units(), Broken()):
            yield row["text"]


def test_auto_tokenizer_agrees_with_the_engine_and_loses_nothing(made, auto):
    engine = tokenizer.load(made["tokenizer"]).engine
    texts = [*list(corpus(made))[::20], "\x00\r\n\t ", "Ünï\U0001f600", "1234567890", "a" * 3000]
    for text in texts:
        ids = auto(text)["input_ids"]
        assert ids == engine.encode(text, add_special_tokens=False).ids
        assert auto.decode(ids) == text


def test_sizes_and_control_tokens(made, auto):
    measures = json.loads((made["tokenizer"] / "sealed.json").read_text())["measures"]
    assert len(auto) == measures["vocab_size"] == 1024
    assert auto.convert_tokens_to_ids(list(tokenizer.SPECIAL)) == [0, 1, 2, 3, 4, 5]
    assert auto.eos_token_id == measures["eod"] == 2
    assert auto.pad_token_id == measures["pad"] == 3
    assert measures["control_strings"] == sorted(tokenizer.SPECIAL)
    documents = sum(1 for _ in corpus(made))
    size = sum(len(text.encode()) for text in corpus(made))
    assert measures["trained_on"] == {"documents": documents, "bytes": size, "broken": {}}


def test_digits_stand_alone(auto):
    tokens = auto.tokenize("x = 12 + 345, v1.20")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("12345120")


def test_chat_template_marks_the_answers_and_their_ends(auto):
    rendered = auto.apply_chat_template(CHAT, tokenize=False)
    assert rendered == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    found = auto.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert auto.decode(learned) == "8<|im_end|>Zwölf, 12.<|im_end|>"


def test_generation_prompt_is_a_prefix_of_what_is_trained_on(auto):
    prompt = auto.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    whole = auto.apply_chat_template(CHAT[:3])["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_more_tokens_than_the_text_gives_is_an_error(write_source, out):
    source = write_source([{"text": "too little text"}])
    with pytest.raises(
        NemoflowError, match=r"vocab_size: 2048 asked for, but 1 documents \(15 bytes\) give only 2\d\d"
    ):
        tokenizer.make({"vocab_size": 2048, "chat_template": "chatml"}, {"sources": [source]}, out, print)


def test_training_texts_of_every_layout():
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}
    prompt = {"responses_create_params": {"input": [{"role": "user", "content": "b"}]}}
    rows = [{"text": "c"}, chat, prompt, {"text": 7}, {"messages": "x"}, {"text": "\ud800"}, {}]
    assert [tokenizer.texts_of(row) for row in rows] == [["c"], ["a"], ["b"], [], [], [], []]
    assert [tokenizer.texts_of(row, "body") for row in [*rows[:3], {"body": "d"}]] == [[], ["a"], ["b"], ["d"]]


def test_each_source_is_read_by_its_own_field(write_source, out, tmp_path):
    texts = [f"word{i % 50} other{i % 7}" for i in range(400)]
    mixed = [
        write_source([{"text": text, "body": "!"} for text in texts[:200]], "one"),
        write_source([{"text": "?", "body": text} for text in texts[200:]], "two"),
    ]
    payload = {"vocab_size": 266, "chat_template": "chatml"}
    seen = tokenizer.make(payload | {"fields": ["text", "body"]}, {"sources": mixed}, out, print)["trained_on"]
    assert (seen["documents"], seen["bytes"]) == (400, sum(map(len, texts)))
    (plain := tmp_path / "plain").mkdir()
    whole = write_source([{"text": text} for text in texts], "whole")
    tokenizer.make(payload, {"sources": [whole]}, plain, print)
    assert (plain / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_unknown_template(out):
    with pytest.raises(NemoflowError, match="chat_template: 'alpaca' is unknown; known: chatml"):
        tokenizer.make({"vocab_size": 300, "chat_template": "alpaca"}, {"sources": []}, out, print)


def locked(files):
    return {"files": [{"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files]}


def test_given_files_are_verified_and_copied(made, out, tmp_path):
    files = [made["tokenizer"] / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    measures = tokenizer.make(locked(files), {"files": files}, out, print)
    assert (measures["vocab_size"], measures["eod"]) == (1024, 2)
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in files)
    payload = locked(files)
    changed = [shutil.copy(file, tmp_path) and tmp_path / file.name for file in files]
    changed[1].write_bytes(changed[1].read_bytes().replace(b"false", b"true "))
    with pytest.raises(NemoflowError, match=r"tokenizer_config\.json: its content has changed"):
        tokenizer.make(payload, {"files": changed}, out, print)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: cannot be read \(No such file"),
        ("tokenizer.json", '{"model": {}}', r"tokenizer\.json: is no tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "{}", r"eos_token: names no token that ends documents"),
    ],
)
def test_unusable_tokenizers(made, tmp_path, name, content, message):
    copy = tmp_path / "tokenizer"
    shutil.copytree(made["tokenizer"], copy)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(NemoflowError, match=message):
        _ = tokenizer.load(copy).eod


def test_a_tokenizer_of_the_hub_is_downloaded(made, tmp_path):
    files = {name: (made["tokenizer"] / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    with Hub() as hub:
        hub.models["org/model"].commit(files)
        digests = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        entries = [{"path": path, "size": len(data), "sha256": digests[path]} for path, data in files.items()]
        payload = {"hub": {"repo": "org/model", "commit": hub.models["org/model"].head}, "files": entries}
        (tmp_path / "payload.json").write_text(json.dumps(payload))
        code = """
        from nemoflow.data import tokenizer
        Path("out").mkdir()
        show(tokenizer.make(json.loads(Path("payload.json").read_text()), {}, Path("out"), lambda line: None))
        """
        [measures] = hub.run(code, tmp_path)
    assert measures["vocab_size"] == 1024
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == files

"""Evaluations: tasks and splits checked with the recipe, then asked of a small model, without a network."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from graph import BASE, DEMO
from hf_models import random_model, small_tokenizer

from nemoflow import evaluation
from nemoflow.errors import NemoflowError
from nemoflow.evaluation import tasks
from nemoflow.job import contents
from nemoflow.session import Session
from nemoflow.stages import Recipe
from nemoflow.store import Store, dump, seal

RECIPES = [Path("config/recipes")]

SUMS = (BASE / "config/tasks/sums.yaml").read_text(encoding="utf-8")

EVAL = {
    "sums": {"task": "sums", "data": {"test": "problems"}, "chat": True},
    "swag": {"task": "hellaswag", "data": {"validation": "problems"}, "limit": 5},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory holds a recipe of two evaluations, and the task `sums`; nothing of it needs a lock."""
    monkeypatch.chdir(tmp_path)
    Path("config/recipes").mkdir(parents=True)
    Path("config/tasks").mkdir()
    Path("config/tasks/sums.yaml").write_text(SUMS)
    write(EVAL)


def write(eval_: dict) -> None:
    recipe = yaml.safe_load(DEMO)
    recipe["sources"] = {name: spec for name, spec in recipe["sources"].items() if "generator" in spec}
    recipe["sources"]["words"] = {"generator": "stdlib_topics", "shards": 1}
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["name"] in ("phase1", "sft")]
    recipe["stages"][1]["init"]["from"] = "phase1"
    Path("config/recipes/demo.yaml").write_text(yaml.safe_dump(recipe | {"eval": eval_}))


def resolved() -> Recipe:
    return Recipe("demo", RECIPES, Store("artifacts"))


def identities(recipe: Recipe) -> dict[str, str]:
    return {name: target.stage.identity for name, target in recipe.view("eval").items()}


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_a_name_is_a_directory_of_links_to_each_task_of_the_last_export():
    recipe = resolved()
    view = recipe.view("eval")
    assert list(view) == ["sums", "swag"]
    export = recipe.view("hf_export")[""].stage
    assert all(target.stage.payload["of"] == export.identity for target in view.values())
    assert view["sums"].directory.name.startswith("sums-toy-sft-12-")
    assert [(s.identity, at) for s, at in view["sums"].stage.reads()] == [
        (export.identity, None),
        (recipe.raw["problems"].identity, None),
    ]
    earlier = recipe.view("eval", "phase1", 10)["swag"].stage.payload["of"]
    assert earlier == recipe.view("hf_export", "phase1", 10)[""].stage.identity
    assert {"eval/demo", "eval/demo@sft", "eval/demo@phase1"} < set(recipe.names())


@pytest.mark.usefixtures("place")
def test_an_imported_model_is_evaluated_too():
    recipe = yaml.safe_load(Path("config/recipes/demo.yaml").read_text())
    recipe["stages"].append({"name": "base", "kind": "import", "model": "hf://someone/model"})
    Path("config/recipes/demo.yaml").write_text(yaml.safe_dump(recipe))
    found = Recipe("demo", RECIPES, Store("artifacts"), unlocked=True)
    target = found.view("eval", "base")["sums"]
    assert found.store.load(target.stage.payload["of"]).payload["of"] == {
        "trajectory": found.models["base"].stage.identity
    }


@pytest.mark.usefixtures("place")
def test_what_is_asked_is_identity_and_where_it_runs_is_not():
    before = identities(resolved())
    elsewhere = {"backend": "vllm", "batch_size": 64, "arguments": {"tensor_parallel_size": 8}}
    write({name: spec | elsewhere for name, spec in EVAL.items()})
    recipe = resolved()
    assert identities(recipe) == before
    assert recipe.launch[before["sums"]] == elsewhere
    session = Session("artifacts", RECIPES)
    session.request(["eval/demo"])
    session.prepare()
    launch = json.loads((recipe.view("eval")["sums"].directory / "launch.json").read_text())
    assert launch == {"title": "eval sums of demo@sft", "cluster": {"launcher": "here"}, **elsewhere}
    for change in ({"chat": False}, {"limit": 7}, {"fewshot": 0}, {"data": {"test": "sums"}}):
        write(EVAL | {"sums": EVAL["sums"] | change})
        assert identities(resolved())["sums"] != before["sums"], change
    write(EVAL)
    Path("config/tasks/sums.yaml").write_text(SUMS.replace("max_gen_toks: 4", "max_gen_toks: 5"))
    after = identities(resolved())
    assert after["sums"] != before["sums"]
    assert after["swag"] == before["swag"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "helaswag"}, r"demo.yaml: eval.swag.task: lm-eval has no 'helaswag', .* did you mean 'hellaswag'\?"),
        ({"task": "summs"}, "did you mean"),
        ({"task": "mmlu_stem"}, "eval.swag.task: 'mmlu_stem' is a group of tasks, .* such as mmlu_abstract_algebra,"),
        ({"task": "humaneval"}, "eval.swag.task: humaneval runs code that the model writes"),
        ({"task": "squad_completion"}, "eval.swag.task: squad_completion is a Python program"),
        ({"data": {"test": "problems"}}, "eval.swag.data.validation: is missing: hellaswag takes its questions from"),
        ({"data": {"validation": "problems", "trian": "sums"}}, "eval.swag.data.trian: hellaswag has no such split"),
        ({"fewshot": 3}, "eval.swag.data.train: is missing: hellaswag takes its examples from there"),
        ({"data": {"validation": "nothing"}}, "eval.swag.data.validation: no source 'nothing'"),
        ({"arguments": {"dtype": "float16"}}, "eval.swag.arguments.dtype: nothing that says where backend hf computes"),
        ({"shots": 3}, "eval.swag.shots: unknown key"),
        ({"backend": "vlm"}, "eval.swag.backend"),
    ],
)
@pytest.mark.usefixtures("place")
def test_bad_input_is_one_line_when_the_recipe_is_read(change, message):
    write({"swag": EVAL["swag"] | change})
    with pytest.raises(NemoflowError, match=message) as caught:
        resolved()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: sums\ninclude: other.yaml\n", "include: a file in config/tasks stands alone"),
        ("task: sums\nprocess_docs: !function utils.f\n", "process_docs: !function utils.f: a file in config/tasks"),
        ("task: sums\nmetric_list: [{metric: !function utils.f}]\n", "metric_list: !function utils.f: a file in"),
        ("test_split: test\n", "task: is missing"),
        ("- a\n", "a mapping is wanted"),
        ("task: [\n", "not YAML"),
        ("task: sums\n", "sums has neither test_split nor validation_split"),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_bad_task_file_is_one_line(text, message):
    Path("config/tasks/sums.yaml").write_text(text)
    with pytest.raises(NemoflowError, match=re.escape(message)) as caught:
        resolved()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("place")
def test_a_recipe_without_tasks_says_so():
    write({})
    with pytest.raises(NemoflowError, match=r"eval/demo: .*demo.yaml has no section `eval`"):
        resolved().view("eval")
    assert not [name for name in resolved().names() if name.startswith("eval/")]


@pytest.mark.usefixtures("place")
def test_reading_a_recipe_imports_neither_the_harness_nor_torch():
    program = (
        "import sys; from pathlib import Path; from nemoflow.stages import Recipe; from nemoflow.store import Store; "
        "Recipe('demo', [Path('config/recipes')], Store('artifacts')).view('eval'); "
        "print(*sorted({'lm_eval', 'torch', 'datasets', 'transformers'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": f"{BASE}{os.pathsep}{BASE / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_the_harness_is_the_pinned_one():
    pins = (BASE / "envs/requirements.in").read_text()
    assert f"\nlm-eval=={evaluation.HARNESS}\n" in pins


@pytest.mark.parametrize(
    ("task", "fewshot", "expected"),
    [
        ("hellaswag", None, {"validation": "questions"}),
        ("winogrande", 5, {"validation": "questions", "train": "examples"}),
        ("arc_challenge", 25, {"test": "questions", "train": "examples"}),
        ("openbookqa", 0, {"test": "questions"}),
        ("gsm8k", None, {"test": "questions", "train": "examples"}),  # 5 shots of its own
        ("mmlu_anatomy", 5, {"test": "questions", "dev": "examples"}),  # named in a file that others include
    ],
)
def test_splits_that_the_harness_s_own_tasks_need(task, fewshot, expected):
    settings = tasks.read(tasks.find(task))
    assert tasks.splits(settings, tasks.shots(settings, fewshot)) == expected


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An export of a NemotronH model of random weights, with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    small_tokenizer(directory)
    random_model("M*E").save_pretrained(directory)
    return directory


def source(directory: Path, rows: list[dict], format_: str) -> Path:
    """A source artifact of one file."""
    (directory / "files").mkdir(parents=True)
    file = directory / f"files/00000.{format_}"
    if format_ == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "sealed.json").write_text(json.dumps({"payload": {"format": format_, "files": [{}]}}))
    return directory


SWAG = [
    {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"A cook takes {i} eggs.",
        "ctx_b": "then she",
        "endings": ["breaks them into a bowl.", "sings.", "sells the kitchen to a bird.", "she [title] rests"],
        "label": str(i % 4),
    }
    for i in range(7)
]

ARC = [
    {
        "id": f"q{i}",
        "question": f"How many is {i} and one?",
        "choices": {"text": [str(i), str(i + 1), str(i + 2)], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    for i in range(6)
]


def answer(model: Path, question: str) -> str:
    """What the model says to a question, greedily, in four tokens: by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    said = AutoModelForCausalLM.from_pretrained(model).generate(**ids, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def logprob(model: Path, asked: str, said: str) -> float:
    """Log-probability of `said` after `asked`, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    before, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (asked, asked + said))
    assert whole[: len(before)] == before
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([whole])).logits[0].float()
    chosen = logits.log_softmax(-1)[torch.arange(len(before) - 1, len(whole) - 1), whole[len(before) :]]
    return float(chosen.sum())


WORDS = """\
task: words
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: " one"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""

PROBLEMS = [{"question": f"What is {a} + 1?", "expected_answer": str(a + 1)} for a in range(5)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model) -> dict[str, dict]:
    """Evaluations by name: {"said": measures or error, "out": directory}; one process imports the harness once."""
    place = tmp_path_factory.mktemp("runs")
    problems = [*PROBLEMS, {"question": "What is 7 + 1?", "expected_answer": answer(model, "What is 7 + 1?").strip()}]
    jsonl = source(place / "problems", problems, "jsonl")
    swag = source(place / "swag", SWAG, "parquet")
    arc = source(place / "arc", ARC, "parquet")
    examples = source(place / "examples", [row | {"question": f"Example {row['question']}"} for row in ARC], "jsonl")
    half = source(place / "half", [*PROBLEMS, {"question": "What is 9 + 9?"}], "jsonl")
    other = source(place / "other", [{"text": "no question"}], "jsonl")
    mixed = source(place / "mixed", [{"question": 1}, {"question": [2]}], "jsonl")
    empty = source(place / "empty", [], "jsonl")

    def job(name: str, task: str, data: dict[str, Path], where: Path = model, **settings) -> dict:
        text = settings.pop("text", SUMS if task == "sums" else None)
        payload = {"fewshot": None, "limit": None, "chat": False, "harness": evaluation.HARNESS}
        launch = {"batch_size": settings.pop("batch_size", 4), "backend": settings.pop("backend", "hf")}
        return {
            "payload": payload
            | {"task": {"name": task, **({"text": text} if text else {})}, "data": dict.fromkeys(data, "x")}
            | settings,
            "model": str(where),
            "sources": [str(data[split]) for split in sorted(data)],
            "out": str(place / f"out-{name}"),
            "launch": launch,
        }

    gone = place / "there is no model"  # what is wrong with the data is said before it is looked for
    jobs = {
        "sums": job("sums", "sums", {"test": jsonl}, chat=True),
        "single": job("single", "sums", {"test": jsonl}, chat=True, batch_size=1),
        "swag": job("swag", "hellaswag", {"validation": swag}, limit=5),
        "words": job("words", "words", {"test": jsonl}, text=WORDS),
        "arc": job("arc", "arc_challenge", {"test": arc, "train": examples}, fewshot=2, limit=3),
        "again": job("again", "arc_challenge", {"test": arc, "train": examples}, fewshot=2, limit=3),
        "setting": job("setting", "words", {"test": jsonl}, gone, text=WORDS + "metrics_list: []\n"),
        "column": job("column", "sums", {"test": other}, gone),
        "row": job("row", "sums", {"test": half}, gone),
        "function": job("function", "hellaswag", {"validation": jsonl}, gone),
        "mixed": job("mixed", "sums", {"test": mixed}, gone),
        "empty": job("empty", "sums", {"test": empty}, gone),
        "version": job("version", "sums", {"test": jsonl}, gone, harness="0.0.1"),
        "vllm": job("vllm", "sums", {"test": jsonl}, gone, backend="vllm"),
        "template": job("template", "sums", {"test": jsonl}, gone, chat=True),
        "model": job("model", "sums", {"test": jsonl}, gone),
    }
    (place / "jobs.json").write_text(json.dumps(list(jobs.values())))
    program = [sys.executable, BASE / "tests/eval_jobs.py", place / "jobs.json"]
    environment = os.environ | {"PYTHONPATH": str(BASE), "HF_HOME": str(place / "hf")}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: {"said": json.loads((Path(job["out"]) / "said.json").read_text()), "out": Path(job["out"])}
        for name, job in jobs.items()
    }


def samples(run: dict) -> list[dict]:
    return [json.loads(line) for line in (run["out"] / "samples.jsonl").read_text().splitlines()]


def test_a_task_of_ones_own_asks_in_the_chat_template_and_compares_answers(runs):
    measures, asked = runs["sums"]["said"]["measures"], samples(runs["sums"])
    assert len(asked) == measures["samples"] == 6
    assert asked[5]["exact_match"] == 1.0  # the answer that transformers alone generates
    assert asked[5]["arguments"][0][0] == "<|im_start|>user\nWhat is 7 + 1?<|im_end|>\n<|im_start|>assistant\n"
    right = [sample["filtered_resps"][0] == sample["target"] for sample in asked]
    assert measures["metric"] == "exact_match"
    assert measures["metrics"]["exact_match"]["value"] == pytest.approx(sum(right) / 6)
    assert measures["metrics"]["exact_match"]["stderr"] > 0


def test_answers_do_not_depend_on_the_batch(runs):
    assert [s["resps"] for s in samples(runs["single"])] == [s["resps"] for s in samples(runs["sums"])]


def test_a_task_of_the_harness_s_reads_local_files(runs, model):
    """hellaswag names a dataset on the hub; here its own functions are run on the rows of a Parquet file."""
    measures, asked = runs["swag"]["said"]["measures"], samples(runs["swag"])
    assert [sample["doc"]["ind"] for sample in asked] == [0, 1, 2, 3, 4]
    assert asked[1]["arguments"][3] == ["Cooking: A cook takes 1 eggs. Then she", " she. rests"]  # its own clean-up
    for sample in asked[:2]:
        for (context, ending), ((found, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            assert found == pytest.approx(logprob(model, context, ending), abs=1e-3)
    best = [max(range(4), key=lambda i, s=sample: s["resps"][i][0][0]) for sample in asked]
    assert measures["metrics"]["acc"]["value"] == pytest.approx(
        sum(i == int(s["target"]) for i, s in zip(best, asked, strict=True)) / 5
    )
    assert list(measures["metrics"]) == ["acc", "acc_norm"]
    results = json.loads((runs["swag"]["out"] / "results.json").read_text())
    assert results["n-samples"] == {"original": 7, "effective": 5}
    assert results["results"]["acc,none"] == measures["metrics"]["acc"]["value"]


def test_results_say_nothing_of_this_process(runs):
    text = (runs["swag"]["out"] / "results.json").read_text()
    functions = json.loads(text)["settings"]["fewshot_config"]["process_docs"]
    assert functions == "lm_eval.tasks.hellaswag.utils.process_docs"
    assert " at 0x" not in text
    assert str(runs["swag"]["out"].parent) not in text


def test_errors_of_metrics_that_are_no_means_are_estimated(runs):
    found = runs["words"]["said"]["measures"]["metrics"]["perplexity"]
    logs = [sample["resps"][0][0][0] for sample in samples(runs["words"])]
    assert found["value"] == pytest.approx(math.exp(-sum(logs) / 6))
    # By the delta method: the error of a mean's exponential
    spread = statistics.stdev(logs) / math.sqrt(6)
    assert found["stderr"] == pytest.approx(found["value"] * spread, rel=0.3)


def test_examples_come_from_their_own_split(runs):
    asked = samples(runs["arc"])
    prompt = asked[0]["arguments"][0][0]
    assert prompt.count("Question: Example How many") == 2
    assert prompt.endswith("Question: How many is 0 and one?\nAnswer:")


def test_two_runs_are_equal_to_the_byte(runs):
    for file in ("results.json", "samples.jsonl"):
        assert (runs["arc"]["out"] / file).read_bytes() == (runs["again"]["out"] / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("column", r"task sums does not suit its data \(test\): 'question' is undefined; the columns are text"),
        (
            "row",
            r"task sums does not suit its data \(test, row 6\): expected_answer is null; the columns are question, ex",
        ),
        ("function", r"task hellaswag does not suit its data \(validation\): no column 'ctx_a'; the columns are"),
        ("setting", r"task words: metrics_list: no setting of lm-eval's; did you mean metric_list\?"),
        ("mixed", r"mixed/files/00000.jsonl: a column has values of several types"),
        ("empty", r"data.test: .*empty/files/00000.jsonl: has no rows"),
        ("version", r"is defined by lm-eval 0.0.1, here is 0"),
        ("vllm", r"backend: vllm is not installed here"),
        ("template", r"chat: .* has no chat template; write chat: false"),
        ("model", r"there is no model: backend hf cannot load it"),
    ],
)
def test_bad_data_and_models_end_with_one_line(runs, name, message):
    error = runs[name]["said"]["error"]
    assert re.search(message, error)
    assert "\n" not in error
    assert not (runs[name]["out"] / "results.json").exists()


@pytest.mark.usefixtures("place")
def test_the_job_seals_what_the_summary_shows(model):
    """scripts/eval.py on an artifact directory as the graph leaves it."""
    write({"sums": EVAL["sums"] | {"limit": 3}})
    session = Session("artifacts", RECIPES)
    session.request(["eval/demo"])
    target = session.names["eval/demo"]["sums"]
    (export, _), (problems, _) = target.stage.reads()
    export.directory.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(model), str(export.directory)], check=True)
    record = {"contents": contents(export.directory), "measures": {"parameters": 1}}
    (export.directory / "sealed.json").write_text(dump(record))  # what it comes from is not there
    rows = [json.dumps({"question": f"{i}?", "expected_answer": "no"}) + "\n" for i in range(4)]
    (problems.directory / "files").mkdir(parents=True)
    for number in range(2):
        (problems.directory / f"files/0000{number}.jsonl").write_text("".join(rows[number::2]))
    seal(problems, None, {"documents": 4}, contents(problems.directory))
    session.prepare()
    stage = session.store.stage_file(target.stage.identity)
    program = [sys.executable, BASE / "scripts/eval.py", "--stage", stage]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "eval sums of demo@sft: asks the questions of sums" in done.stderr
    assert {p.name for p in target.directory.glob("*.json*")} >= {"results.json", "samples.jsonl", "artifact.json"}
    assert [s["doc"]["question"] for s in samples({"out": target.directory})] == ["0?", "2?", "1?"]
    assert re.search(r"eval sums of demo@sft +exact_match 0.000 ± 0.000 of 3", session.summary())

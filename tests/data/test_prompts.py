import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemoflow.data import placeholders, prompts, verifiers
from nemoflow.errors import NemoflowError

AGENT = "math_with_judge_simple_agent"


def row(asked="What is 1 + 1?", /, **changes):
    made = {
        "responses_create_params": {"input": [{"role": "user", "content": asked}], "temperature": 1},
        "agent_ref": {"type": "responses_api_agents", "name": AGENT},
        "question": asked,
        "expected_answer": "2",
        "anything": {"else": [1, 2.50, None]},
    }
    return {key: value for key, value in (made | changes).items() if value is not ...}


def agent(name):
    return {"type": "responses_api_agents", "name": name}


def parquet(path, rows, **options):
    columns = dict.fromkeys(key for row in rows for key in row)
    pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), path, **options)


@pytest.fixture
def source(tmp_path):
    """A function that writes files of rows (objects, or bytes as they are) as a source from the hub; its directory."""

    def write(name, *files, format="jsonl", **options):
        directory = tmp_path / name
        (directory / "files").mkdir(parents=True)
        for i, rows in enumerate(files):
            path = directory / f"files/{i:05d}.{format}"
            if format == "parquet":
                parquet(path, rows, **options)
                continue
            data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
            match format:
                case "jsonl.gz":
                    data = gzip.compress(data)
                case "jsonl.zst":
                    data = pa.compress(data, "zstd", asbytes=True)
            path.write_bytes(data)
        payload = {
            "hub": {"repo": f"org/{name}", "config": "default", "split": "train", "commit": "c0ffee" * 7},
            "files": [{"path": f"data/{i}.{format}"} for i in range(len(files))],
            "format": format,
        }
        (directory / "sealed.json").write_text(json.dumps({"payload": payload}))
        return directory

    return write


def make(sources, out, placeholder_sources=(), **payload):
    payload = {"valid": "1/10", "max_broken": "0", "placeholders": {}, "allow_unresolved": [], "agents": {}} | payload
    inputs = {"sources": sources, "placeholder_sources": list(placeholder_sources)}
    return prompts.make(payload, inputs, out, print)


def written(out):
    return [(out / name).read_bytes().splitlines() for name in ("train.jsonl", "validation.jsonl")]


# -- rows are kept whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_lines_pass_through_byte_for_byte(source, out, format):
    lines = [json.dumps(row(f"What is {i} ×\u2028?"), separators=(", ", " :  ")).encode() for i in range(300)]
    lines[7] = b"  " + lines[7] + b" "
    files = [lines[:100], [b"", *lines[100:]]]
    measures = make([source("a", *files, format=format)], out)
    train, valid = written(out)
    assert sorted(train + valid) == sorted(lines)
    assert train == [line for line in lines if line in set(train)]
    assert measures == {
        "rows": {"train": 270, "validation": 30},
        "agents": {AGENT: {"train": 270, "validation": 30}},
        "resolved": {},
        "unresolved": {},
        "broken": {},
    }


def test_parquet_rows_become_json_without_what_arrow_filled_in(source, out):
    tool = {"type": "function", "name": "f", "parameters": {"a": 1}}
    rows = [
        row("Wie viel?", responses_create_params={"input": [{"role": "user", "content": "x"}], "tools": [tool]}),
        row("q", options=[{"A": "one"}, {"B": "two"}], places=[None, 1], pass_rate=float("nan"), count=2**62),
    ]
    make([source("a", rows, rows[:1], format="parquet", row_group_size=1)], out, valid="0")
    train, _ = written(out)
    # Arrow gives every struct all fields of its column: the second row's params would have tools: null, the first
    # option a "B": null. The nulls in lists are the row's own.
    expected = [dict(rows[0]), rows[1] | {"pass_rate": None}, rows[0]]
    assert [json.loads(line) for line in train] == expected


def test_parquet_values_that_json_has_not_are_refused(source, out):
    directory = source("a", [], format="parquet")
    table = pa.table({"meta": pa.array([{"when": 0}], pa.struct([("when", pa.timestamp("us"))]))})
    pq.write_table(table, directory / "files/00000.parquet")
    payload = json.loads((directory / "sealed.json").read_text())
    payload["payload"]["files"] = [{"path": "data/0.parquet"}]
    (directory / "sealed.json").write_text(json.dumps(payload))
    with pytest.raises(NemoflowError, match=r"org/a@c0ffeec0ffee/data/0\.parquet: column 'meta' .* timestamp\[us\]"):
        make([directory], out)


def test_a_corrupt_file_is_named(source, out):
    directory = source("a", [row()], format="jsonl.zst")
    file = directory / "files/00000.jsonl.zst"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(NemoflowError, match=r"hf://datasets/org/a@c0ffeec0ffee/data/0\.jsonl\.zst:1: cannot be read"):
        make([directory], out)


# -- what a row must have ----------------------------------------------------------------------------------------------

VALID = {
    "math_with_judge_simple_agent": {"question": "q", "expected_answer": "1"},
    "code_gen_simple_agent": {"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": ["2"]}}},
    "mcqa_simple_agent": {"options": [{"A": "one"}, {"B": None}], "expected_answer": "A"},
    "instruction_following_simple_agent": {
        "id": 3,
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["x"]}],
        "prompt": "p",
    },
    "workplace_assistant_simple_agent": {
        "id": 0,
        "ground_truth": [{"name": "f", "arguments": "{}"}],
        "category": "c",
        "environment_name": "workbench",
    },
    "structured_outputs_simple_agent": {"schema_str": "{}", "schema_type": "json"},
}
"""Agent -> the fields its verifier reads, as NeMo-Gym's examples have them."""


def fields(name, **changes):
    without = {"expected_answer": ..., "question": ...}
    return row(**without | {"agent_ref": agent(name)} | VALID[name] | changes)


@pytest.mark.parametrize("name", VALID)
def test_rows_of_known_environments(name):
    verifiers.check_row(fields(name))
    for key in VALID[name].keys() - {"schema_type"}:
        with pytest.raises(ValueError, match=f"; the verifier of {name} reads it"):
            verifiers.check_row(fields(name, **{key: ...}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("math_with_judge_simple_agent", {"expected_answer": 2}, "expected_answer is missing, or no text"),
        ("math_with_judge_simple_agent", {"expected_answer": ""}, "expected_answer is missing, or no text"),
        ("code_gen_simple_agent", {"verifier_metadata": {"unit_tests": {"inputs": [], "outputs": []}}}, "or none"),
        ("code_gen_simple_agent", {"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": []}}}, "as many"),
        ("mcqa_simple_agent", {"options": ["A"]}, "options is not a list of"),
        ("instruction_following_simple_agent", {"kwargs": []}, "not as many entries as kwargs"),
        ("instruction_following_simple_agent", {"id": "3"}, "id is missing, or no whole number"),
        ("workplace_assistant_simple_agent", {"ground_truth": None}, "ground_truth is not a list of calls"),
    ],
)
def test_what_a_verifier_cannot_read(name, changes, message):
    with pytest.raises(ValueError, match=message):
        verifiers.check_row(fields(name, **changes))


def test_where_else_fields_may_stand():
    choice, following = VALID["mcqa_simple_agent"], VALID["instruction_following_simple_agent"]
    verifiers.check_row(row(agent_ref=agent("mcqa_simple_agent"), metadata=choice, expected_answer=...))
    verifiers.check_row(row(agent_ref=agent("instruction_following_x_agent"), id=1, verifier_metadata=following))


def test_unknown_environments_need_no_fields():
    verifiers.check_row(row(agent_ref=agent("calendar_simple_agent"), expected_answer=..., question=...))


def test_tool_items_need_no_role():
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    system = {"role": "system", "content": ""}
    verifiers.check_row(row(responses_create_params={"input": [system, {"role": "user", "content": "x"}, call]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses_create_params": ...}, "responses_create_params.input is not a non-empty list"),
        ({"responses_create_params": {"input": []}}, "responses_create_params.input is not a non-empty list"),
        ({"responses_create_params": {"input": "hello"}}, "responses_create_params.input is not a non-empty list"),
        ({"responses_create_params": {"input": ["hello"]}}, r"input\[0\] has no role or no content"),
        ({"responses_create_params": {"input": [{"content": "x"}]}}, r"input\[0\] has no role or no content"),
        ({"responses_create_params": {"input": [{"role": "user"}]}}, r"input\[0\] has no role or no content"),
        ({"responses_create_params": {"input": [{"role": "user", "content": ""}]}}, r"input is empty"),
        ({"agent_ref": ...}, "agent_ref.name is missing"),
        ({"agent_ref": {"name": ""}}, "agent_ref.name is missing"),
        ({"expected_answer": ...}, f"expected_answer is missing, or no text; the verifier of {AGENT} reads it"),
    ],
)
def test_an_unusable_row_is_named_by_file_and_line(source, out, changes, message):
    directory = source("a", [row()], [row(), row(**changes)])
    with pytest.raises(NemoflowError, match=rf"hf://datasets/org/a@c0ffeec0ffee/data/1\.jsonl:2: .*{message}"):
        make([directory], out)


def test_broken_rows_within_the_allowance_are_left_out(source, out):
    lone = b'{"a": "\\ud800"}'
    measures = make([source("a", [row(), b"{", b"[]", lone, row(agent_ref=...)])], out, max_broken="4/5", valid="0")
    assert measures["rows"]["train"] == 1
    assert measures["broken"] == {"agent_ref.name is missing": 1, "not JSON": 2, "not a JSON object": 1}
    with pytest.raises(NemoflowError, match=r"data/0\.jsonl:2: not JSON \(the first of 4 broken rows in 5"):
        make([source("b", [row(), b"{", b"[]", lone, row(agent_ref=...)])], out, max_broken="3/5", valid="0")


def test_no_rows_at_all(source, out):
    with pytest.raises(NemoflowError, match="there are no usable prompts"):
        make([source("a", [])], out)


# -- the split ---------------------------------------------------------------------------------------------------------


def test_every_environment_is_on_both_sides_and_no_prompt_is(source, out):
    sizes = dict(zip(VALID, (2, 3, 10, 11, 100, 1000), strict=True))
    rows = [
        fields(name, responses_create_params={"input": [{"role": "user", "content": f"{name} {i}"}]}, copy=copy)
        for name, size in sizes.items()
        for i in range(size)
        for copy in range(2)
    ]
    measures = make([source("a", rows[::2]), source("b", rows[1::2])], out)
    validated = {name: measures["agents"][name]["validation"] for name in sizes}
    assert list(validated.values()) == [2, 2, 2, 4, 20, 200]  # a tenth of the prompts, rounded up, each twice
    train, valid = (
        {json.loads(line)["responses_create_params"]["input"][0]["content"] for line in lines} for lines in written(out)
    )
    assert not train & valid
    assert len(train) + len(valid) == sum(sizes.values())


def test_the_split_does_not_depend_on_the_order_of_rows(source, out):
    rows = [row(f"q{i}") for i in range(200)]
    make([source("a", rows)], out)
    first = sorted(written(out)[1])
    make([source("b", rows[::-1])], out)
    assert sorted(written(out)[1]) == first
    assert len(first) == 20


def test_an_environment_with_one_prompt_cannot_be_on_both_sides(source, out):
    rows = [row("a"), row("b"), *[row("c", agent_ref=agent("lonely_agent"))] * 3]
    with pytest.raises(NemoflowError, match="environment lonely_agent has one prompt only"):
        make([source("a", rows)], out)
    assert make([source("b", rows)], out, valid="0")["agents"]["lonely_agent"] == {"train": 3, "validation": 0}


def test_prompts_shared_by_environments_are_on_one_side():
    numbers = np.arange(100, dtype=np.uint64)
    assert prompts.split({"a": numbers, "b": numbers[5:15]}, "1/10") == {*range(10)}
    with pytest.raises(NemoflowError, match="environment b: all its prompts stand in other environments too"):
        prompts.split({"a": numbers, "b": numbers[2:4]}, "1/10")


def test_an_environment_keeps_a_prompt_to_train_on():
    assert prompts.split({"a": np.array([5, 3, 3], np.uint64)}, "1") == {3}


# -- placeholders ------------------------------------------------------------------------------------------------------

DAPO, SKYWORK = "nano_v3_sft_profiled_dapo17k", "nano_v3_sft_profiled_skywork_no_omni"
PLACEHOLDERS = {DAPO: {"source": "x", "template": "dapo"}, SKYWORK: {"source": "y", "template": "skywork"}}
BEFORE, AFTER = placeholders.DAPO_WRAPPING


def placeholder(dataset, number, template, **changes):
    held = {"row": number, "question_template": template}
    return row(
        dataset=dataset,
        _hf_placeholder=held,
        question=...,
        expected_answer=...,
        **{"responses_create_params": ...} | changes,
    )


def math_rows(count, wrapped):
    """Rows as DAPO-Math-17k (questions wrapped, answers plain) or Skywork-OR1 (answers a JSON list) have them."""
    return [
        {
            "data_source": "x",
            "prompt": [{"role": "user", "content": f"{BEFORE}\n\nWhat is {i}?\n\n{AFTER}" if wrapped else f"Is {i}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i) if wrapped else json.dumps([f"\\frac{{{i}}}"])},
            "extra_info": {"index": i},
        }
        for i in range(count)
    ]


@pytest.fixture
def math(source):
    """The placeholders' sources, DAPO's in Parquet with several files and row groups, Skywork's in another format."""
    dapo, skywork = math_rows(4000, True), math_rows(30, False)
    return [
        source("dapo", dapo[:1500], dapo[1500:], format="parquet", row_group_size=1100),
        source("skywork", skywork[:10], skywork[10:], format="jsonl.zst"),
    ]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_placeholders_are_completed(source, out, math, format):
    suffix = {"prefix": "", "suffix": "Put it in \\boxed{}."}
    prefix = {"prefix": "Solve this.", "suffix": ""}
    around = {"template": "Think.\n\n{question}\n\nIn {braces}."}
    numbers = [0, 1099, 1100, 1499, 1500, 2599, 2600, 3999]
    rows = [placeholder(DAPO, n, prefix if n % 2 else suffix, id=n) for n in numbers]
    rows += [placeholder(SKYWORK, n, around) for n in (9, 10, 29)]
    rows += [row("an ordinary one")]
    measures = make([source("a", rows, format=format)], out, math, placeholders=PLACEHOLDERS, valid="0")
    assert measures["resolved"] == {DAPO: 8, SKYWORK: 3}
    done = [json.loads(line) for line in written(out)[0]]
    kept = {key: value for key, value in rows[0].items() if key != "_hf_placeholder"}
    assert done[0] == kept | {
        "question": "\n\nWhat is 0?\n\nPut it in \\boxed{}.",
        "expected_answer": "0",
        "responses_create_params": {
            "input": [{"role": "user", "content": "\n\nWhat is 0?\n\nPut it in \\boxed{}."}],
        },
    }
    assert done[1]["question"] == "Solve this.\n\nWhat is 1099?"
    assert [r["expected_answer"] for r in done[:8]] == [str(n) for n in numbers]
    assert [r["question"] for r in done[8:]] == ["Is 9?", "Is 10?", "Is 29?", "an ordinary one"]
    assert done[9]["responses_create_params"]["input"][0]["content"] == "Think.\n\nIs 10?\n\nIn {braces}."
    assert done[9]["expected_answer"] == "\\frac{10}"
    assert done[11] == rows[11]


def test_the_rest_of_the_parameters_stays(source, out, math):
    template = {"template": "{question}"}
    rows = [placeholder(SKYWORK, 1, template, responses_create_params={"input": [], "temperature": 0.5})]
    make([source("a", rows)], out, math, placeholders=PLACEHOLDERS, valid="0")
    assert json.loads(written(out)[0][0])["responses_create_params"] == {
        "input": [{"role": "user", "content": "Is 1?"}],
        "temperature": 0.5,
    }


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (placeholder("other", 1, {}), "dataset 'other' is not among the placeholders of this data"),
        (placeholder(["x"], 1, {}), "is not among the placeholders"),
        (placeholder(DAPO, 4000, {"prefix": "x"}), f"_hf_placeholder.row is 4000, but {DAPO} has 4000 rows, from 0"),
        (placeholder(DAPO, -1, {"prefix": "x"}), "_hf_placeholder.row is not a row's number"),
        (placeholder(DAPO, "1", {"prefix": "x"}), "_hf_placeholder.row is not a row's number"),
        (placeholder(DAPO, 1, {"template": "x {question}"}), f'is not {{"prefix".*template dapo, row 1 of {DAPO}'),
        (placeholder(SKYWORK, 1, {"prefix": "x"}), 'question_template is not {"template": ".*template skywork'),
        (placeholder(SKYWORK, 1, {"template": "no question"}), "question_template is not"),
    ],
)
def test_what_cannot_be_completed_is_an_error_unless_allowed_by_name(source, out, math, held, message):
    rows = [row(), held]
    with pytest.raises(NemoflowError, match=rf"org/a@c0ffeec0ffee/data/0\.jsonl:2: a placeholder .*{message}"):
        make([source("a", rows)], out, math, placeholders=PLACEHOLDERS, valid="0", max_broken="1")
    key = str(held["dataset"])
    measures = make(
        [source("b", rows)], out, math, placeholders=PLACEHOLDERS, valid="0", allow_unresolved=[key, "unused"]
    )
    assert measures["unresolved"] == {key: 1}
    assert measures["rows"]["train"] == 1


def test_placeholders_without_sources_are_an_error(source, out):
    with pytest.raises(NemoflowError, match=r"data/0\.jsonl:1: .* not among the placeholders of this data \(none\)"):
        make([source("a", [placeholder(DAPO, 1, {"prefix": "x"})])], out)


def test_a_question_without_its_wrapping_is_not_guessed(source, out):
    plain = source("dapo", math_rows(3, False), format="parquet")
    rows = [placeholder(DAPO, 1, {"prefix": "x"})]
    wanted = {DAPO: PLACEHOLDERS[DAPO]}
    with pytest.raises(NemoflowError, match="has not DAPO's wrapping"):
        make([source("a", rows)], out, [plain], placeholders=wanted)


def test_an_empty_ground_truth_is_a_broken_row(source, out):
    empty = math_rows(2, False)
    empty[1]["reward_model"]["ground_truth"] = '[""]'
    directory = source("skywork", empty, format="parquet")
    rows = [placeholder(SKYWORK, n, {"template": "{question}"}) for n in range(2)]
    wanted = {SKYWORK: PLACEHOLDERS[SKYWORK]}
    with pytest.raises(NemoflowError, match=r"data/0\.jsonl:2: expected_answer is missing"):
        make([source("a", rows)], out, [directory], placeholders=wanted, valid="0")
    measures = make([source("b", rows)], out, [directory], placeholders=wanted, valid="0", max_broken="1/2")
    assert measures["rows"]["train"] == 1
    assert list(measures["broken"].values()) == [1]


def test_a_source_without_the_columns_is_an_error(source, out):
    other = source("dapo", [{"text": "x"}], format="parquet")
    wanted = {DAPO: PLACEHOLDERS[DAPO]}
    with pytest.raises(
        NemoflowError, match=r"org/dapo@c0ffeec0ffee/data/0\.parquet: no column 'prompt'; there are text"
    ):
        make([source("a", [placeholder(DAPO, 0, {"prefix": "x"})])], out, [other], placeholders=wanted)


def test_a_broken_line_in_a_source_found_by_number_is_an_error(source, out):
    other = source("skywork", [*math_rows(1, False), b"{", *math_rows(1, False)])
    wanted = {SKYWORK: PLACEHOLDERS[SKYWORK]}
    rows = [placeholder(SKYWORK, 1, {"template": "{question}"})]
    with pytest.raises(NemoflowError, match=r"org/skywork.*:2: not JSON: the rows of this source are found by their"):
        make([source("a", rows)], out, [other], placeholders=wanted)


@pytest.mark.parametrize(
    ("truth", "answer"),
    [("34", "34"), (' ["a", "b"] ', "a"), ("[7]", "7"), ("[]", ""), ("[0, x]", "[0, x]"), ("[0, 1)", "[0, 1)")],
)
def test_answers(source, truth, answer):
    rows = math_rows(1, False)
    rows[0]["reward_model"]["ground_truth"] = truth
    held = placeholders.Placeholders({"k": {0}}, {"k": "skywork"}, {"k": prompts.open_source(source("s", rows))})
    done = held.resolve(
        {"dataset": "k", "_hf_placeholder": {"row": 0, "question_template": {"template": "{question}"}}}
    )
    assert done["expected_answer"] == answer


def test_generated_rows(made):
    measures = json.loads((made["prompts"] / "sealed.json").read_text())["measures"]
    assert sum(measures["rows"].values()) == 100
    assert measures["rows"]["validation"] > 0


def test_no_heavy_library_is_loaded():
    heavy = "('torch', 'transformers', 'pandas', 'datasets')"
    code = f"import sys, nemoflow.data.prompts; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# -- the environments of a stage ---------------------------------------------------------------------------------------

FIELDS = {"question": "text", "metadata.number|id": "integer"}


def test_rows_have_what_their_environment_reads(source, out):
    made = make([source("a", [row(f"{i}?", id=i + 1) for i in range(4)])], out, valid="0", agents={AGENT: FIELDS})
    assert made["rows"] == {"train": 4, "validation": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"agent_ref": agent("mcqa_other_agent"), "options": [{"A": "x"}]},
            "'mcqa_other_agent' is of no environment of",
        ),
        ({}, f"metadata.number or id is missing; the verifier of {AGENT} reads it"),
        ({"id": "7"}, "metadata.number or id is no integer"),
        ({"id": True}, "metadata.number or id is no integer"),
        ({"id": 1, "question": ["?"]}, "question is missing"),
    ],
)
def test_a_row_that_its_environment_cannot_read_is_named_by_file_and_line(source, out, changes, message):
    directory = source("a", [row("1?", metadata={"number": 3}), row("2?", **changes)])
    with pytest.raises(NemoflowError) as caught:
        make([directory], out, valid="0", agents={AGENT: FIELDS})
    assert message in str(caught.value)
    assert str(caught.value).startswith("hf://datasets/org/a@c0ffeec0ffee/data/0.jsonl:2: ")

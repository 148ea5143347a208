"""The judge: processes of verifiers, poisoned ones among them; and what the built-in verifiers say."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemoflow.environments.judge import Judge
from nemoflow.environments.verifiers import mcqa, number, structured_outputs
from nemoflow.errors import NemoflowError

POISONED = {"verifier": "poisoned:verify", "timeout": "1s"}
SKIPS = POISONED | {"on_error": "skip", "max_skipped": "1"}


def row(agent: str = "a", **fields) -> dict:
    return {
        "agent_ref": {"name": agent},
        "responses_create_params": {"input": [{"role": "user", "content": "What is it?"}]},
    } | fields


def test_rewards_are_those_of_each_row_s_environment():
    with Judge({"a": POISONED, "b": {"verifier": "number"}}) as judge:
        rows = [row("a", factor=2), row("b", expected_answer="8"), row("a"), row("b", expected_answer="8")]
        assert judge.rewards(["0.5", "8", "print", "9"], rows) == [1, 1, 1, 0]
        assert judge.rewards([], []) == []
        assert not judge.skipped


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("raise", "it raised KeyError: \"'expected_answer'\", when it judged the answer 'raise' to 'What is it?'"),
        ("hang", "it took more than 1s, when it judged the answer 'hang'"),
        ("die", r"its process died (exit code 7)"),
        ("nan", "it gave nan, no finite number"),
        ("none", "it gave None, no finite number"),
        ("inf", "it gave inf, no finite number"),
    ],
)
def test_a_poisoned_environment_is_named_or_skipped(answer, message):
    with Judge({"a": POISONED}) as judge, pytest.raises(NemoflowError) as caught:
        judge.rewards(["1", answer], [row(), row()])
    assert str(caught.value).startswith("environment of a: ")
    assert message in str(caught.value)
    with Judge({"a": SKIPS}) as judge:
        assert judge.rewards(["1", answer, "0.5"], [row(), row(), row()]) == [1, None, 0.5]
        assert judge.skipped == {"a": 1}
        assert judge.rewards(["1"], [row()]) == [1], "it goes on"


def test_too_many_skipped_answers_stop_the_run():
    with Judge({"a": SKIPS | {"max_skipped": "1/4"}}) as judge:
        assert judge.rewards(["raise", "1", "1", "1"], [row()] * 4) == [None, 1, 1, 1]
        with pytest.raises(NemoflowError, match=r"could not judge 2 of the 4 answers of a step.*max_skipped.*KeyError"):
            judge.rewards(["raise", "raise", "1", "1"], [row()] * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": "poisoned:verfy"}, "environment of a: verifier: 'poisoned:verfy'"),
        ({"verifier": "nowhere:verify"}, "environment of a: verifier: 'nowhere:verify': No module named 'nowhere'"),
        ({"verifier": "poisoned:verify", "settings": {"x": 1}}, "settings.x: is unknown to this verifier"),
    ],
)
def test_verifiers_are_looked_for_at_the_start(settings, message):
    with pytest.raises(NemoflowError) as caught:
        Judge({"a": settings})
    assert message in str(caught.value)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_hanging_verifier_does_not_outlive_the_trainer(end):
    program = (
        "import sys; from nemoflow.environments.judge import Judge\n"
        "if __name__ == '__main__':\n"
        "    row = {'agent_ref': {'name': 'a'}, 'responses_create_params': {'input': [{'content': ''}]}}\n"
        "    judge = Judge({'a': {'verifier': 'poisoned:verify', 'timeout': '1h'}})\n"
        "    judge.rewards(['1'], [row]); print('ready', flush=True); judge.rewards(['hang'], [row])\n"
    )
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    child = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    workers = psutil.Process(child.pid).children(recursive=True)
    assert workers
    child.send_signal(end)
    child.wait(20)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    child.stdout.close()


def test_environments_judge_side_by_side():
    with Judge({"a": SKIPS, "b": SKIPS}) as judge:
        judge.rewards(["1", "1"], [row("a"), row("b")])
        begun = time.monotonic()
        assert judge.rewards(["hang", "hang", "1", "1"], [row("a"), row("b")] * 2) == [None, None, 1, 1]
        assert time.monotonic() - begun < 1 + 8  # and two seconds more, one after the other, beside the restarts


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("8", "8", 1),
        (" 8\n", "8", 1),
        ("8.0", "8", 1),
        ("+8", "8", 1),
        ("08", "8", 1),
        ("1,024", "1024", 1),
        ("-3", "-3", 1),
        ("8", 8, 1),
        ("x + 1", "x + 1", 1),
        ("9", "8", 0),
        ("88", "8", 0),
        ("8 apples", "8", 0),
        ("1,02", "102", 0),
        ("", "8", 0),
        ("nan", "8", 0),
        ("infinity", "8", 0),
        ("8" * 5000, "8", 0),
    ],
)
def test_numbers(answer, expected, value):
    assert number.verify(answer, {"expected_answer": expected}) == value


OPTIONS = {"options": [{"A": "red wine"}, {"B": "7"}, {"C": "blue"}], "expected_answer": "B"}


@pytest.mark.parametrize(
    ("answer", "changes", "value"),
    [
        ("so \\boxed{B}", {}, 1),
        ("\\boxed{ (B) }", {}, 1),
        ("\\boxed{b}", {}, 0),
        ("\\boxed{A} \\boxed{B}", {}, 0),
        ("B", {}, 0),
        ("Answer: b", {}, 0),
        ("Answer: b", {"grading_mode": "lenient_answer_colon"}, 1),
        ("\\boxed{7}", {"grading_mode": "lenient_boxed"}, 1),
        ("B", {"template_metadata": {"output_regex": r"^\s*([AB])\s*$"}}, 1),
        ("B or A", {"template_metadata": {"output_regex": r"^\s*([AB])\s*$"}}, 0),
        ("", {}, 0),
    ],
)
def test_choices(answer, changes, value):
    assert mcqa.verify(answer, OPTIONS | changes) == value


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"a": 1}', 1),
        (' {"a": 1}\n', 1),
        ('{"a": "1"}', 0),
        ('{"a": 1, "b": 2}', 0),
        ("{}", 0),
        ("", 0),
        ('{"a": 1', 0),
    ],
)
def test_structured_outputs(answer, value):
    assert structured_outputs.verify(answer, {"schema_str": SCHEMA, "schema_type": "json"}) == value


def test_mathematics():
    from nemoflow.environments.verifiers import math as mathematics

    asked = [("so $\\frac{1}{2}$", "0.5"), ("\\boxed{x+1}", "1+x"), ("8", "9"), ("", "8"), ("nan", "8")]
    assert [mathematics.verify(answer, {"expected_answer": expected}) for answer, expected in asked] == [1, 1, 0, 0, 0]
    assert math.isfinite(mathematics.verify("(" * 500, {"expected_answer": "8"}))

"""What Snakemake takes by itself, at the size of the real thing; benchmarks/plan.py says of what."""

import pytest

from benchmarks.plan import measured


@pytest.mark.slow
def test_the_plan_of_all_of_nano3():
    found = measured("hf_export/nano3")
    assert found["files"] > 50_000
    assert found["jobs"] > 200
    assert found["plan"]["wall"] < 10
    assert found["nothing_to_do"]["wall"] < 10

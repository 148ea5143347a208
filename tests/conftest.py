from pathlib import Path

import pytest
from graph import Work


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Work:
    """A work directory with a finished rl/demo, for copying only."""
    work = Work.new(tmp_path_factory.mktemp("finished") / "work")
    work.run("rl/demo")
    return work


@pytest.fixture
def demo(finished: Work, tmp_path: Path) -> Work:
    """A copy of the finished demo, to be changed."""
    return finished.copy(tmp_path / "work")


@pytest.fixture
def fresh(tmp_path: Path) -> Work:
    """The demo's raw texts and recipe, nothing made yet."""
    return Work.new(tmp_path / "work")

"""Pages as a person sees them: a headless Chromium, offline, that tells what went wrong in it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """Its path. Without one a test is skipped, but not in CI, which installs it (Makefile)."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None and "CI" not in os.environ:
        pytest.skip("no Chromium here: apt-get install chromium")
    assert found, f"none of {', '.join(PROGRAMS)} is installed"
    return found


@contextlib.contextmanager
def opened(file: Path, warnings: bool = True) -> Iterator[Page]:
    """The file in a browser without a network.

    Fails when it wrote an error to the console, or with `warnings` one of those, or asked for anything.
    """
    wrong: list[str] = []
    counted = ("error", "warning") if warnings else ("error",)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            context = browser.new_context(offline=True, viewport={"width": 1400, "height": 900})
            page = context.new_page()
            page.on("console", lambda said: wrong.append(said.text) if said.type in counted else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda asked: wrong.append(asked.url) if not local(asked.url, file) else None)
            page.goto(file.absolute().as_uri())
            yield page
            assert wrong == []
        finally:
            browser.close()


def local(url: str, file: Path) -> bool:
    """Whether a request stays in the page."""
    return url.startswith(("data:", "blob:", "about:")) or url.split("#")[0] == file.absolute().as_uri()

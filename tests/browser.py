"""A headless Chromium for tests that open pages, and what a page did while it was open."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")


def find_chromium() -> str:
    """The path of Chromium; where apt can, it is installed, else the test is skipped."""
    with Path(tempfile.gettempdir(), "snip-tests-chromium.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in another process want it, too
        return next(filter(None, map(shutil.which, NAMES)), None) or install_chromium()


def install_chromium() -> str:
    """Install Debian's; return its path."""
    if shutil.which("apt-get") is None:
        pytest.skip("no Chromium, and no apt-get to install it with")
    if os.geteuid() != 0:
        pytest.skip("no Chromium; install it: sudo apt-get install chromium")
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *words],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
        if done.returncode:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(done.stderr[-500:])
    return str(shutil.which("chromium"))


def wait_until(page, expression):
    """Wait until an expression is true in a page, also in one whose policy forbids ``eval``.

    Playwright's own ``wait_for_function`` runs ``eval`` inside the page when it must ask again.
    """
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true in the page: {expression}")


class Browser:
    """Opens pages, each in a profile of its own."""

    def __init__(self, chromium) -> None:
        self.chromium = chromium

    @contextmanager
    def open(self, url, *, width=1280, scheme="light", script=True):
        """Yield a page that was loaded; fail if it complained or asked for anything but itself.

        ``page.asked`` are the urls requested besides ``url``, ``page.said`` what the console shows.
        """
        context = self.chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=script,
        )
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: note(request, url, page.asked))
        page.goto(url, wait_until="load")
        assert page.asked == []
        try:
            yield page
            assert page.said == []
        finally:
            context.close()


def note(request, url, asked) -> None:
    """Note a request for anything but the page, its empty icon and pictures that it holds."""
    if request.url not in (url, "data:,") and not request.url.startswith("data:image/jpeg;base64,"):
        asked.append(request.url)


@contextmanager
def launched():
    """Yield a `Browser`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = find_chromium()
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = started.chromium.launch(executable_path=path, args=flags)
        try:
            yield Browser(chromium)
        finally:
            chromium.close()

"""The app in real browsers: one server per module, a fresh Chromium per test."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.page import Page, wait_for

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
HOW = (
    "chromium or chromedriver is missing; on Debian: apt-get install chromium chromium-driver, "
    "and `make test` does it by itself when run as root"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if not (BROWSER and DRIVER):
                item.add_marker(pytest.mark.skip(reason=HOW))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("localhost", port)) == 0


def serve(script: str, log: Path, **environment: str) -> Iterator[str]:
    """Runs the app; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(
            lambda: is_healthy(port) or process.poll() is not None, 60, "the server does not start"
        )
        assert process.poll() is None, log.read_text()
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def fake_app(tmp_path_factory) -> Iterator[str]:
    """The address of the app over the fake engine, 25 tokens a second."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    yield from serve("tests/e2e/fake_app.py", log, XLORA_FAKE=json.dumps({"delay": 0.02}))


@pytest.fixture
def open_page(tmp_path) -> Iterator[Callable[..., Page]]:
    """Returns a function that opens an address in a browser of its own."""
    pages: list[Page] = []

    def open_(address: str, *, dark: bool = False, width: int = 1300) -> Page:
        profile = tmp_path / f"profile{len(pages)}"
        downloads = tmp_path / f"downloads{len(pages)}"
        downloads.mkdir()
        page = Page(str(BROWSER), str(DRIVER), profile, downloads, dark=dark, width=width)
        pages.append(page)
        page.open(address)
        return page

    yield open_
    for page in pages:
        page.close()

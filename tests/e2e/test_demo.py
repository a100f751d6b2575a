"""The demo as it ships, in Chromium: the real model, a typed prompt, a growing heatmap."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import serve


@pytest.fixture(scope="module")
def demo_app(tmp_path_factory) -> Iterator[str]:
    """The address of the app as `make demo` serves it."""
    yield from serve("app/main.py", tmp_path_factory.mktemp("server") / "log.txt")


def test_the_demo_writes_and_routes(demo_app, open_page):
    page = open_page(demo_app)
    assert "SmolLM2-135M-Instruct" in page.text()
    page.generate("Write a scene in the style of Shakespeare.")
    page.wait(lambda: page.n_columns() > 0, "no heatmap", 60)
    first = page.n_tokens(), page.n_columns()
    page.wait(lambda: page.n_tokens() > first[0] + 3, "the text does not grow", 60)
    page.wait(lambda: page.n_columns() > first[1] + 1, "the heatmap does not grow", 60)
    page.press("Stop")
    page.wait(lambda: page.button("Scalings (CSV)"), "the run does not end", 30)
    chips = page.component("return [...root.querySelectorAll('.chip')].map((c) => c.innerText)")
    shares = {c.split("\n")[0]: int(c.split("\n")[1].split()[0]) for c in chips[1:]}
    names = ("math", "chemistry", "quantum", "protein", "biology", "python", "law", "verse")
    assert set(shares) == set(names)
    # A trained router knows a scene when it reads one.
    assert max(shares, key=shares.get) == "verse"
    assert page.console_errors() == []

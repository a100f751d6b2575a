"""The app in AppTest over the fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from streamlit.testing.v1 import AppTest

from app import engine_client
from tests.app.fake_engine import Fake, fake_client

MAIN = "app/main.py"


@pytest.fixture
def open_app(monkeypatch, request) -> Iterator[Callable[..., AppTest]]:
    """Returns a function that opens the app on a fake engine; fields of ``Fake`` as arguments."""

    def open_(**fields: object) -> AppTest:
        fake = Fake(**{"delay": 0.0, "n_blocks": 2, **fields})
        monkeypatch.setattr(engine_client, "open_engine", lambda: fake_client(fake))
        engine_client.shared_client.clear()
        return AppTest.from_file(str(request.config.rootpath / MAIN), default_timeout=30).run()

    yield open_
    engine_client.shared_client.clear()

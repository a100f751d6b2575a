"""The app over the fake engine: ``streamlit run tests/e2e/fake_app.py``.

``XLORA_FAKE`` is a JSON object of ``tests.app.fake_engine.Fake``'s fields.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from app import engine_client  # noqa: E402 - the path comes first
from tests.app.fake_engine import Fake, fake_client  # noqa: E402

FAKE = Fake(**json.loads(os.environ.get("XLORA_FAKE", "{}")))
engine_client.open_engine = lambda: fake_client(FAKE)
runpy.run_path(str(ROOT / "app" / "main.py"))

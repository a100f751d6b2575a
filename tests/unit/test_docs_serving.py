"""What docs/serving.md tells people to type works."""

from __future__ import annotations

import re
from pathlib import Path

from app import engine_client, sharing
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core import EngineLimits

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names = {"model": tiny_chat_xlora(tmp_path), "tokenizer": tiny_tokenizer()}
    exec(compile(block, "serving.md", "exec"), names)
    track = names["run"].tracks[0]
    assert track.finish_reason in ("stop", "length")
    assert track.n_tokens > track.n_prompt


def test_every_setting_of_the_page_is_one_and_every_one_is_on_the_page() -> None:
    named = set(re.findall(r"XLORA_APP_([A-Z_]+)", PAGE))
    numbers = dict.fromkeys((f"XLORA_APP_{name}" for name in named), "7")
    engine = sharing.settings_from(numbers)
    assert engine.pop("limits") == EngineLimits(
        max_prompt_tokens=7, max_new_tokens=7, max_seconds=7, max_arms=7
    )
    assert engine == {"max_active": 7, "max_queue": 7, "memory_bytes": 7 * 2**20}
    source = Path(engine_client.__file__).read_text() + Path(sharing.__file__).read_text()
    in_code = set(re.findall(r"\"((?:MAX|MEMORY)_[A-Z_]+)\"", source))
    assert in_code <= named

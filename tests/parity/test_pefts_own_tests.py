"""PEFT's own X-LoRA tests, under their own names, against this project.

The class inherits every test of PEFT 0.21.2's ``tests/test_xlora.py``. What is overridden here runs
PEFT's test, too, and says what is different and why; docs/interop.md lists the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import peft_shim
from xlora_core.errors import AdapterError, CheckpointError

INTEROP_PAGE = Path(__file__).resolve().parents[2] / "docs" / "interop.md"

# What PEFT 0.21.2 tests; another number means that another file is in its place.
N_TESTS = 21


def test_pefts_own_tests_are_there() -> None:
    module = peft_shim.load_pefts_tests()  # tells how to get them where they are missing
    names = {name for name in dir(module.TestXlora) if name.startswith("test_")}
    assert len(names) == N_TESTS
    assert names == {name for name in dir(TestXlora) if name.startswith("test_")}


def test_what_is_different_is_listed_in_the_docs() -> None:
    different = {name for name in vars(TestXlora) if name.startswith("test_")}
    page = INTEROP_PAGE.read_text(encoding="utf-8")
    assert {name for name in dir(TestXlora) if f"`{name}`" in page} == different


class Missing:
    """In the place of PEFT's tests where nobody fetched them: each test says how to get them."""

    @pytest.fixture
    def tokenizer(self) -> None:
        peft_shim.load_pefts_tests()

    base_model = model = tokenizer


PeftsTests: Any = Missing
if peft_shim.MODULE_FILE.is_file():
    PeftsTests = peft_shim.load_pefts_tests().TestXlora


# The file's own class-scoped fixtures and embedding adapters make these warnings.
@pytest.mark.filterwarnings(
    "ignore:Class-scoped fixtures",
    "ignore:.*save_embedding_layers",
    "ignore:.*tie_word_embeddings",
)
class TestXlora(PeftsTests):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def hub(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        peft_shim.Hub.folder = tmp_path_factory.mktemp("hub")
        yield
        peft_shim.Hub.folder = peft_shim.PeftModel.newest = None

    @pytest.fixture(autouse=True)
    def repeatable(self) -> None:
        # PEFT's tests leave the classifier's initialisation to chance.
        torch.manual_seed(0)

    def test_save_load_functional(
        self, tokenizer: Any, base_model: Any, model: Any, tmp_path: Path
    ) -> None:
        """PEFT loads into a base model that still carries another model's experts.

        Here that is an error, and ``unload()`` gives the base model back first.
        """
        model.save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="carries experts already"):
            peft_shim.XLoraModel.from_pretrained(base_model, tmp_path)
        super().test_save_load_functional(tokenizer, base_model, model, tmp_path)

    def test_save_load_functional_pt(
        self, tokenizer: Any, base_model: Any, model: Any, tmp_path: Path
    ) -> None:
        """PEFT saves a pickle. Ours never writes or reads one, and says so."""
        with pytest.raises(CheckpointError, match="asks for a pickle"):
            super().test_save_load_functional_pt(tokenizer, base_model, model, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_per_token_normalization_with_softmax_topk(
        self, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PEFT's test passes too if the method it watches is never called; this one does not."""
        seen: list[torch.Tensor] = []
        original = peft_shim.XLoraLayer.get_maybe_topk_scalings

        def watched(self: Any, scalings: torch.Tensor) -> torch.Tensor:
            seen.append(original(self, scalings))
            return seen[-1]

        monkeypatch.setattr(peft_shim.XLoraLayer, "get_maybe_topk_scalings", watched)
        super().test_per_token_normalization_with_softmax_topk(tokenizer, model, monkeypatch)
        assert seen
        assert all(((scalings > 0).sum(dim=-1) == 2).all() for scalings in seen)

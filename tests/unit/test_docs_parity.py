"""docs/parity.md has a row for every capability, and every row a test."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from peft.tuners.xlora.config import XLoraConfig as PeftXLoraConfig
from peft.tuners.xlora.model import XLoraModel as PeftXLoraModel

from tests.named_tests import named_tests

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
TEXT = PAGE.read_text(encoding="utf-8")

# PEFT's fields and methods are asked of PEFT; these lists are what other systems' surfaces are.
ORIGINAL_PACKAGE = (
    "get_topk_lora",
    "get_nb_trainable_parameters",
    "print_trainable_parameters",
    "set_use_trainable_adapters",
)
LAYER_ADAPTER = (
    "XLoraLayerAdapter",
    "experts",
    "gating_network",
    "n_experts",
    "parameter_count",
    "forward",
    "get_last_gating_weights",
    "get_parameters",
    "set_parameters",
    "update_parameters",
    "merge_to_original_layer",
    "reset_state",
    "alpha",
    "base_layer",
    "is_base_layer_frozen",
    "lora_layer",
    "rank",
    "torch.compile",
    "torch.export",
)


def rows() -> list[list[str]]:
    """Returns the cells of every row but the headers."""
    lines = [line for line in TEXT.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "capability"]


def test_every_row_names_a_test() -> None:
    assert len(rows()) > 90
    assert [row[0] for row in rows() if len(row) != 3 or not named_tests(row[2])] == []


def test_no_capability_has_two_rows() -> None:
    capabilities = [row[0] for row in rows()]
    assert sorted(set(capabilities)) == sorted(capabilities)


@pytest.mark.parametrize(
    "names",
    [
        [f.name for f in dataclasses.fields(PeftXLoraConfig) if f.name in vars(PeftXLoraConfig)],
        [n for n in vars(PeftXLoraModel) if re.match("(get|set|enable|disable|clear)_.*scal", n)],
        ORIGINAL_PACKAGE,
        LAYER_ADAPTER,
    ],
    ids=["PEFT's config", "PEFT's model", "the original package", "a layer's adapter"],
)
def test_every_name_of_the_others_has_a_row(names: list[str]) -> None:
    assert len(names) > 3
    here = " ".join(f"{row[0]} {row[1]}" for row in rows())
    assert [name for name in names if not re.search(rf"`{re.escape(name)}\b", here)] == []

"""Any sequence of edits: every pair of module and adapter that stays keeps its rows, and its logit.

The model is compared with a ledger that is kept apart: which adapter is where, and the router's
row of every pair as it was when the pair came to be.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from tests.edited_models import ROUTERS, routed_model, run, scalings_of, write_extra
from tests.tiny_models import tiny_base
from xlora_core.adapters import LoraAdapter, read_adapter
from xlora_core.config import XLoraConfig
from xlora_core.editing import Moves, moved_rows, newcomer_for
from xlora_core.layers import XLoraLayer
from xlora_core.model import XLoraModel

TARGETS = (("q_proj",), ("lm_head",), ("q_proj", "lm_head"), ("up_proj", "v_proj"))
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@functools.cache
def fresh(router: str) -> XLoraModel:
    """Returns a model that is only copied."""
    return routed_model(Path(tempfile.mkdtemp()), router)


@functools.cache
def addition(number: int) -> tuple[str, LoraAdapter]:
    folder = write_extra(Path(tempfile.mkdtemp()), TARGETS[number])
    return folder, read_adapter("x", folder)


def rows_of(model: XLoraModel) -> dict[tuple[str, str], Tensor]:
    """Returns (module, adapter) -> its weight and bias in the router; "*" serves all modules."""
    K = len(model.adapter_names)
    if model.is_routed_per_layer:
        blocks = dict(zip(model.lora_layer_names, model.gates, strict=True))
    else:
        head = model.classifier.layers[-1]
        paths = model.lora_layer_names if model.config_xlora.layerwise_scalings else ["*"]
        weight, bias = head.weight.detach().split(K), head.bias.detach().split(K)
        blocks = {
            p: nn.ParameterDict({"weight": w, "bias": b})
            for p, w, b in zip(paths, weight, bias, strict=True)
        }
    return {
        (path, name): torch.cat([block.weight[k].detach(), block.bias[k, None].detach()]).clone()
        for path, block in blocks.items()
        for k, name in enumerate(model.adapter_names)
    }


@dataclass
class Ledger:
    """What the model should be, by name."""

    adapters: dict[str, LoraAdapter]  # in order
    rows: dict[tuple[str, str], Tensor]
    modules: dict[str, nn.Module] = field(default_factory=dict)  # of the base model, bare

    def check(self, model: XLoraModel) -> None:
        names = list(self.adapters)
        assert model.adapter_names == names
        assert list(model.config_xlora.adapters) == names
        paths = [p for p in self.modules if any(p in a.modules for a in self.adapters.values())]
        assert model.lora_layer_names == paths
        found = dict(model.base_model.named_modules())
        for path, module in self.modules.items():
            adapted = found[path]
            assert (path in paths) == isinstance(adapted, XLoraLayer)
            assert (adapted.base_layer if path in paths else adapted) is module
        for index, (path, layer) in enumerate(zip(paths, model.lora_layers, strict=True)):
            assert (layer.layer_index, layer.n_adapters) == (index, len(names))
            experts = layer.experts()
            present = [k for k, a in enumerate(self.adapters.values()) if path in a.modules]
            assert list(experts) == present == torch.where(model.present[index])[0].tolist()
            for k in present:
                weights = self.adapters[names[k]].modules[path]
                assert torch.equal(experts[k].lora_A, weights.lora_A.double())
                assert torch.equal(experts[k].lora_B, weights.lora_B.double())
                assert math.isclose(experts[k].lora_scaling, weights.lora_scaling)
        rows = rows_of(model)
        for pair, row in self.rows.items():
            if pair in rows:
                assert torch.equal(rows[pair], row), pair
        self.rows = rows


def ledger_of(model: XLoraModel) -> Ledger:
    folders = model.config_xlora.adapters
    modules = {
        path: module.base_layer if isinstance(module, XLoraLayer) else module
        for path, module in model.base_model.named_modules()
        if not path.endswith(".base_layer")
    }
    leaves = {p: m for p, m in modules.items() if not list(m.children())}
    adapters = {name: read_adapter(name, folder) for name, folder in folders.items()}
    return Ledger(adapters, rows_of(model), leaves)


def edit(model: XLoraModel, ledger: Ledger, data: st.DataObject, number: int) -> None:
    """Does one edit to both."""
    names = list(ledger.adapters)
    kind = data.draw(st.sampled_from(["add", "reorder", "rename"] + ["remove"] * (len(names) > 1)))
    if kind == "add":
        folder, adapter = addition(data.draw(st.integers(0, len(TARGETS) - 1)))
        new, position = f"new {number}", data.draw(st.integers(0, len(names)))
        share = data.draw(st.sampled_from([0.01, 0.3, 0.9]))
        model.add_adapter(new, folder, position=position, share=share)
        names.insert(position, new)
        ledger.adapters = {n: ledger.adapters.get(n, adapter) for n in names}
    elif kind == "remove":
        name = data.draw(st.sampled_from(names))
        model.remove_adapter(name)
        del ledger.adapters[name]
        ledger.rows = {pair: row for pair, row in ledger.rows.items() if pair[1] != name}
    elif kind == "rename":
        old, new = data.draw(st.sampled_from(names)), f"renamed {number}"
        model.rename_adapter(old, new)
        ledger.adapters = {new if n == old else n: a for n, a in ledger.adapters.items()}
        ledger.rows = {(p, new if n == old else n): row for (p, n), row in ledger.rows.items()}
    else:
        order = data.draw(st.permutations(names))
        model.reorder_adapters(order)
        ledger.adapters = {name: ledger.adapters[name] for name in order}


@given(data=st.data(), router=st.sampled_from(ROUTERS))
@SETTINGS
def test_any_sequence_of_edits(data: st.DataObject, router: str) -> None:
    model = copy.deepcopy(fresh(router))
    ledger = ledger_of(model)
    for number in range(data.draw(st.integers(1, 6), label="edits")):
        edit(model, ledger, data, number)
        ledger.check(model)
    scalings = scalings_of(model)
    ones = torch.ones_like(scalings[..., 0])
    torch.testing.assert_close(scalings.sum(-1), ones, atol=1e-12, rtol=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = XLoraModel.from_pretrained(tiny_base(dtype=torch.float64), folder)
    assert torch.equal(run(again), run(model))
    ledger.check(model)


@given(data=st.data(), router=st.sampled_from(ROUTERS))
@SETTINGS
def test_additions_taken_back_leave_the_same_model(data: st.DataObject, router: str) -> None:
    model, before = copy.deepcopy(fresh(router)), fresh(router)
    added = [f"new {n}" for n in range(data.draw(st.integers(1, 3)))]
    for name in added:
        folder, _ = addition(data.draw(st.integers(0, len(TARGETS) - 1)))
        position = data.draw(st.integers(0, len(model.adapter_names)))
        model.add_adapter(name, folder, position=position)
    for name in data.draw(st.permutations(added)):
        model.remove_adapter(name)
    now, then = model.state_dict(), before.state_dict()
    assert now.keys() == then.keys()
    assert all(torch.equal(now[key], then[key]) for key in then)
    assert torch.equal(run(model), run(before))


@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=6),
    share=st.floats(1e-6, 1 - 1e-6),
    temperature=st.floats(0.05, 20),
)
def test_a_new_row_takes_at_most_its_share_whatever_the_others_say(
    logits: list[float], share: float, temperature: float
) -> None:
    config = XLoraConfig(softmax_temperature=temperature)
    bias = torch.tensor(logits, dtype=torch.float64)
    weight = torch.zeros(len(logits), 1, dtype=torch.float64)
    adapters = [*range(len(logits)), None]
    moves = Moves(modules=[0], adapters=adapters, n_adapters=len(logits))
    _, with_new = moved_rows(weight, bias, moves, newcomer_for(config, share, len(logits)))
    mass = (with_new / temperature).softmax(-1)[-1].item()
    assert mass <= share * (1 + 1e-9)
    if max(logits) == min(logits):
        assert math.isclose(mass, share, rel_tol=1e-9)

"""What editing refuses, and that a refusal leaves the model exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.edited_models import IDS, routed_model, run, write_extra
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import families, tiny_base, write_lora
from xlora_core import Engine
from xlora_core.adapters import LoraAdapter, read_adapter
from xlora_core.checkpoint import write_adapter
from xlora_core.config import SamplingParams
from xlora_core.errors import AdapterError, ConfigError, ModelError, XLoraError
from xlora_core.model import XLoraModel

Edit = Callable[[XLoraModel, Path], Any]


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return routed_model(tmp_path)


def snapshot(model: XLoraModel) -> dict[str, Any]:
    """Returns all that an edit may change; objects, not copies."""
    return {
        "tensors": dict(model.named_parameters()) | dict(model.named_buffers()),
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "modules": dict(model.base_model.named_modules()),
        "config": model.config_xlora,
        "names": (list(model.adapter_names), list(model.lora_layer_names)),
        "log": list(model.scalings_log.entries),
        "edition": model._edition,
    }


def assert_untouched(model: XLoraModel, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for key in ("tensors", "modules"):
        assert after[key].keys() == before[key].keys()
        assert all(after[key][name] is before[key][name] for name in after[key])
    assert all(torch.equal(after["values"][k], v) for k, v in before["values"].items())
    for key in ("config", "names", "log", "edition"):
        assert after[key] == before[key]


def refusal(edit: Edit, model: XLoraModel, tmp_path: Path) -> XLoraError:
    """Returns the error of an edit that must change nothing."""
    model.enable_scalings_logging()
    run(model)
    before = snapshot(model)
    with pytest.raises(XLoraError) as caught:
        edit(model, tmp_path)
    assert_untouched(model, before)
    return caught.value


# ---------------------------------------------------------------- add


def wide_lora(folder: Path) -> Path:
    """Writes an adapter of a wider model whose last module alone does not fit."""
    folder = Path(write_extra(folder, ("q_proj", "down_proj")))
    adapter = read_adapter("wide", folder)
    path = "model.layers.1.mlp.down_proj"
    lora_A = torch.zeros(2, 64)
    modules = dict(adapter.modules) | {path: replace(adapter.modules[path], lora_A=lora_A)}
    write_adapter(folder.parent / "wide", replace(adapter, modules=modules))
    return folder.parent / "wide"


def of_another_family(folder: Path) -> Path:
    return write_lora(folder / "gpt2", tiny_base("gpt2"), families()["gpt2"].targets)


def not_finite(folder: Path) -> LoraAdapter:
    adapter = read_adapter("x", write_extra(folder))
    path, weights = next(iter(adapter.modules.items()))
    lora_B = torch.full_like(weights.lora_B, torch.nan)
    return replace(adapter, modules=dict(adapter.modules) | {path: replace(weights, lora_B=lora_B)})


ADDITIONS: dict[str, tuple[Edit, type[XLoraError], str]] = {
    "missing folder": (
        lambda m, p: m.add_adapter("x", p / "nowhere"),
        AdapterError,
        r"adapter 'x': folder .*nowhere does not exist",
    ),
    "another size": (
        lambda m, p: m.add_adapter("x", wide_lora(p)),
        AdapterError,
        r"adapter 'x', module model\.layers\.1\.mlp\.down_proj: expected lora_A \[2, 48\]",
    ),
    "another base model": (
        lambda m, p: m.add_adapter("x", of_another_family(p)),
        AdapterError,
        "LlamaForCausalLM has no such module",
    ),
    "a name that is taken": (
        lambda m, p: m.add_adapter("1", write_extra(p)),
        AdapterError,
        "there is an adapter '1' already",
    ),
    "no name": (
        lambda m, p: m.add_adapter(" ", write_extra(p)),
        ConfigError,
        "a name must be a non-empty string, got ' '",
    ),
    "a position past the end": (
        lambda m, p: m.add_adapter("x", write_extra(p), position=4),
        ConfigError,
        r"position must be None or a whole number from 0 to 3 .*, got 4",
    ),
    "a position from the end": (
        lambda m, p: m.add_adapter("x", write_extra(p), position=-1),
        ConfigError,
        "got -1",
    ),
    "a share of nothing": (
        lambda m, p: m.add_adapter("x", write_extra(p), share=0.0),
        ConfigError,
        "share must be a number between 0 and 1, got 0.0",
    ),
    "a share of all": (
        lambda m, p: m.add_adapter("x", write_extra(p), share=1),
        ConfigError,
        "share must be a number between 0 and 1, got 1",
    ),
    "weights that are not finite": (
        lambda m, p: m.add_adapter("x", not_finite(p)),
        AdapterError,
        "adapter 'x', module model.layers.0.mlp.up_proj: its weights hold NaN or infinite values",
    ),
    "an adapter of no module": (
        lambda m, p: m.add_adapter("x", replace(read_adapter("x", write_extra(p)), modules={})),
        AdapterError,
        "adapter 'x' changes no module",
    ),
    "PEFT's config in place of a folder": (
        lambda m, p: m.add_adapter("x", {"r": 8}),
        AdapterError,
        "an adapter must be a LoRA folder or a LoraAdapter, got dict",
    ),
}


@pytest.mark.parametrize("case", ADDITIONS)
def test_an_addition_that_fails_changes_nothing(
    case: str, model: XLoraModel, tmp_path: Path
) -> None:
    edit, kind, message = ADDITIONS[case]
    error = refusal(edit, model, tmp_path)
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error


# ---------------------------------------------------------------- remove, rename, reorder


OTHERS: dict[str, tuple[Edit, str]] = {
    "remove: no such adapter": (lambda m, _: m.remove_adapter("x"), "there is no adapter 'x'"),
    "rename: no such adapter": (lambda m, _: m.rename_adapter("x", "y"), "there is no adapter 'x'"),
    "rename: taken": (lambda m, _: m.rename_adapter("0", "2"), "there is an adapter '2' already"),
    "rename: empty": (lambda m, _: m.rename_adapter("0", ""), "a name must be a non-empty string"),
    "reorder: not all": (
        lambda m, _: m.reorder_adapters(["2", "0"]),
        "all adapters must be named, once each: '1' is missing",
    ),
    "reorder: twice": (
        lambda m, _: m.reorder_adapters(["2", "0", "1", "0"]),
        "all adapters must be named, once each: '0' comes 2 times",
    ),
    "reorder: unknown": (
        lambda m, _: m.reorder_adapters(["2", "0", "one"]),
        "all adapters must be named, once each: there is no adapter 'one', '1' is missing",
    ),
    "set_adapter: a choice": (
        lambda m, _: m.set_adapter("1"),
        "a choice of them cannot be set: all adapters must be named, once each: '0' is missing, ",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_refusals_change_nothing(case: str, model: XLoraModel, tmp_path: Path) -> None:
    edit, message = OTHERS[case]
    assert message in refusal(edit, model, tmp_path).message


def test_the_last_adapter_stays(model: XLoraModel, tmp_path: Path) -> None:
    model.remove_adapter("0")
    model.remove_adapter("1")
    error = refusal(lambda m, _: m.remove_adapter("2"), model, tmp_path)
    assert error.message == "'2' is the only adapter, an X-LoRA model needs at least one"


def test_top_k_cannot_be_larger_than_what_is_left(model: XLoraModel, tmp_path: Path) -> None:
    model.set_topk_lora(3)
    error = refusal(lambda m, _: m.remove_adapter("1"), model, tmp_path)
    assert error.message == "top_k_lora is 3, but only 2 adapters would be left"
    assert error.hint == "lower it first: model.set_topk_lora(2), or None for all"
    model.set_topk_lora(2)
    model.remove_adapter("1")
    assert model.get_topk_lora() == 2


def test_an_override_must_keep_a_module_to_act_in(model: XLoraModel, tmp_path: Path) -> None:
    model.add_adapter("extra", write_extra(tmp_path, ("lm_head",)))
    model.mute_adapter("0", "lm_head")
    error = refusal(lambda m, _: m.remove_adapter("extra"), model, tmp_path)
    assert "override of '0': no adapted module matches 'lm_head'" in error.message
    assert "model.clear_adapter_overrides(name)" in error.hint
    model.clear_adapter_overrides("0")
    model.remove_adapter("extra")


@pytest.mark.parametrize("name", ["merge_and_unload", "unload"])
def test_a_model_that_gave_its_base_away(name: str, model: XLoraModel, tmp_path: Path) -> None:
    getattr(model, name)()
    folder = write_extra(tmp_path)
    for edit in (
        lambda: model.add_adapter("x", folder),
        lambda: model.remove_adapter("0"),
        lambda: model.rename_adapter("0", "x"),
        lambda: model.reorder_adapters(["2", "1", "0"]),
    ):
        with pytest.raises(ModelError):
            edit()


# ---------------------------------------------------------------- caches of before


@pytest.mark.parametrize("router", ["layerwise", "per_layer"])
@pytest.mark.parametrize("made_by_forward", [True, False])
def test_a_cache_of_before_an_edit_is_refused(
    tmp_path: Path, router: str, made_by_forward: bool
) -> None:
    model = routed_model(tmp_path, router)
    cache = model(
        input_ids=IDS,
        past_key_values=None if made_by_forward else model.new_cache(),
        use_cache=True,
    ).past_key_values
    model.reorder_adapters(["2", "1", "0"])
    with pytest.raises(ModelError, match="adapters were edited since this cache was filled"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    with pytest.raises(ModelError, match="adapters were edited since this cache was filled"):
        model.generate(torch.cat([IDS, IDS[:, :1]], 1), past_key_values=cache, max_new_tokens=1)
    cache.reset()
    assert model(input_ids=IDS, past_key_values=cache).past_key_values is cache


def test_caches_outlive_a_rename_and_empty_ones_any_edit(model: XLoraModel) -> None:
    empty = model.new_cache()
    whole = run(model)
    cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
    model.rename_adapter("0", "x")
    last = model(input_ids=IDS[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=1e-10, rtol=0)
    model.remove_adapter("x")
    model(input_ids=IDS, past_key_values=empty)
    assert empty.get_seq_length() == IDS.shape[1]


# ---------------------------------------------------------------- an engine's model


def test_an_engines_model_is_edited_once_it_is_closed(tmp_path: Path) -> None:
    model, tokenizer = tiny_chat_xlora(tmp_path), tiny_tokenizer()
    sampling = SamplingParams(max_new_tokens=3)
    with Engine(model, tokenizer) as engine, Engine(model, tokenizer) as other:
        engine.run("the quick fox", sampling=sampling)
        other.close()
        for edit in (
            lambda: model.remove_adapter("math"),
            lambda: model.rename_adapter("math", "x"),
            lambda: model.reorder_adapters(["verse", "code", "math"]),
            lambda: model.add_adapter("x", tmp_path / "nowhere"),
            model.merge_and_unload,
            model.unload,
        ):
            with pytest.raises(ModelError, match="an Engine runs this model") as caught:
                edit()
            assert "engine.close()" in caught.value.hint
        copied = copy.deepcopy(model)
        copied.remove_adapter("math")  # nobody runs the copy
        assert model.adapter_names == ["math", "code", "verse"]
    model.remove_adapter("math")
    with Engine(model, tokenizer) as engine:
        run = engine.run("the quick fox", sampling=sampling)
    assert run.header.adapter_names == ("code", "verse")

"""One test per bug and limit of PEFT 0.21.2's X-LoRA that no other test shows us to be free of.

Named after the numbers of docs/semantics.md, where the rest of the list names its tests. Where PEFT
can be made to show the bug here, it does.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from tests.parity.peft_reference import peft_reference
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts
from xlora_core.config import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.errors import AdapterError, ModelError
from xlora_core.model import XLoraModel

PRODUCTS = ("mm", "addmm", "bmm")


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


@pytest.fixture
def reference(model: XLoraModel) -> Any:
    """PEFT's model with the same weights."""
    return peft_reference(model, "llama", torch.float64)


class Operations(TorchDispatchMode):
    """Counts what is computed in a ``with`` block, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        """Number of matrix products."""
        return sum(self.counts[name] for name in PRODUCTS)


@torch.no_grad()
def products(model: Any, **inputs: Any) -> int:
    with Operations() as operations:
        model(**({"input_ids": tiny_prompt()} | inputs))
    return operations.products


# ------------------------------------------------------------------ A: performance, architecture


def test_a2_the_number_of_products_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    ours, theirs = [], []
    for n_adapters in (2, 5):
        model = tiny_xlora(tmp_path / str(n_adapters), n_adapters=n_adapters)
        ours.append(products(model))
        theirs.append(products(peft_reference(model, "llama", torch.float32)))
    n_layers = len(model.lora_layer_names)
    assert ours[0] == ours[1]
    # Theirs: two for every expert and module, in each of the two passes.
    assert theirs[1] - theirs[0] == (5 - 2) * 2 * 2 * n_layers


class Calls:
    """Counts the calls of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.shapes.append(tuple(output.shape))


@torch.no_grad()
def test_a3_the_scaling_pass_runs_no_expert_no_head_and_no_loss(
    model: XLoraModel, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[object] = []

    def loss(self: object, *args: object, **kwargs: object) -> Tensor:
        losses.append(self)
        return torch.zeros(())

    monkeypatch.setattr(LlamaForCausalLM, "loss_function", loss)
    prompt = tiny_prompt()
    for name, llm, passes in (
        ("ours", model, 1),
        ("PEFT's", reference, 2),
    ):
        losses.clear()
        head = Calls(llm.get_output_embeddings())
        llm(input_ids=prompt, labels=prompt)
        assert len(head.shapes) == passes, name
        assert len(losses) == passes, name
    n_layers, n_adapters = len(model.lora_layer_names), len(model.adapter_names)
    with Operations() as in_the_scaling_pass:
        model.scaling_pass(input_ids=prompt)
    with Operations() as in_the_base_model:
        tiny_base(dtype=torch.float64).model(input_ids=prompt)
    assert in_the_scaling_pass.products == in_the_base_model.products + 1  # the classifier
    assert products(reference) >= 2 * (2 * n_layers * n_adapters)


def test_a4_top_k_is_two_products_a_module_whatever_k_is(tmp_path: Path) -> None:
    """A mask here as in PEFT; but what it masks costs two products, not two for each expert."""
    model = tiny_xlora(tmp_path, n_adapters=5)
    dense = products(model)
    with torch.no_grad():
        base = 2 * products(tiny_base()) - 1  # the scaling pass needs no head
    assert dense == base + 1 + 2 * len(model.lora_layer_names)  # 1: the classifier
    model.set_topk_lora(1)
    assert products(model) == dense


def test_a6_the_constant_of_the_scaling_pass_is_made_where_the_model_is(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, scaling_pass_value=0.25).to("meta")
    constant = model.scaling_pass_scalings()
    assert constant is not None
    assert constant.device.type == "meta"


def test_a7_the_log_keeps_no_graph_and_one_row_per_token(model: XLoraModel, reference: Any) -> None:
    model.train()
    reference.train()
    for llm in (model, reference):
        llm.enable_scalings_logging()
        llm(input_ids=tiny_prompt())
    assert reference.get_scalings_log()[0].requires_grad
    (logged,) = model.get_scalings_log()
    assert not logged.requires_grad
    model.eval()
    reference.eval()
    sizes = {}
    for name, llm in (("ours", model), ("PEFT's", reference)):
        llm.clear_scalings_log()
        llm.generate(input_ids=tiny_prompt(), max_new_tokens=20, do_sample=False, eos_token_id=None)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in llm.get_scalings_log()
        }
        sizes[name] = sum(storages.values())
    row = 2 * len(model.lora_layer_names) * len(model.adapter_names) * 8  # batch of 2, float64
    assert sizes["ours"] == (9 + 19) * row
    assert sizes["PEFT's"] == sum(range(9, 9 + 20)) * row


def test_a8_no_forward_is_overwritten_and_no_hook_comes_and_goes(
    model: XLoraModel, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any("forward" in vars(module) for module in reference.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    registered: list[str] = []
    register = nn.Module.register_forward_pre_hook

    def note(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        registered.append(type(self).__name__)
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", note)
    reference(input_ids=tiny_prompt())
    assert len(registered) >= 2 * len(model.lora_layer_names)
    registered.clear()
    model(input_ids=tiny_prompt())
    assert registered == []


def test_a9_shared_scalings_are_not_copied_for_every_module(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, layerwise_scalings=False)
    n_layers, n_adapters = len(model.lora_layer_names), len(model.adapter_names)
    assert n_layers > 1
    router_logits = model.scaling_pass(input_ids=tiny_prompt()).router_logits
    assert router_logits.shape == (2, 9, 1, n_adapters)
    assert model.route(router_logits).shape == (2, 9, 1, n_adapters)
    model.enable_scalings_logging()
    model(input_ids=tiny_prompt())
    (entry,) = model.scalings_log.entries
    assert entry.rows.shape == (2, 9, n_layers, n_adapters)
    assert entry.rows.untyped_storage().nbytes() == 2 * 9 * n_adapters * 4


# ------------------------------------------------------------------ B: correctness


def test_b1_adapters_may_have_any_name(tmp_path: Path) -> None:
    folders = dict(zip(("math", "chemie 2", "0"), write_experts(tmp_path).values(), strict=True))
    base = tiny_base()
    base.config.use_cache = False
    with pytest.raises(KeyError):
        peft.get_peft_model(
            base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=dict(folders))
        )(input_ids=tiny_prompt())
    model = XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=folders))
    assert model.adapter_names == ["math", "chemie 2", "0"]
    numbered = XLoraModel.from_base(
        tiny_base(), XLoraConfig(adapters={str(i): f for i, f in enumerate(folders.values())})
    )
    numbered.classifier.load_state_dict(model.classifier.state_dict())
    prompt = tiny_prompt()
    assert torch.equal(model(input_ids=prompt).logits, numbered(input_ids=prompt).logits)


@torch.no_grad()
def test_b3_the_base_model_called_by_itself_is_the_base_model(
    model: XLoraModel, reference: Any
) -> None:
    prompt = tiny_prompt()
    base = tiny_base(dtype=torch.float64)(input_ids=prompt).logits
    theirs = reference.get_base_model()(input_ids=prompt).logits
    assert (theirs - base).abs().max() > 1  # every adapter at weight 1
    assert torch.equal(model.base_model(input_ids=prompt).logits, base)


@torch.no_grad()
def test_b5_the_routers_rows_belong_to_names_not_positions(
    model: XLoraModel, reference: Any
) -> None:
    prompt = tiny_prompt()
    before = model(input_ids=prompt).logits
    reference.base_model.set_adapter(["2", "1", "0"])
    assert (reference(input_ids=prompt).logits - before).abs().max() > 1
    model.reorder_adapters(["2", "1", "0"])
    assert model.adapter_names == ["2", "1", "0"]
    torch.testing.assert_close(model(input_ids=prompt).logits, before, atol=1e-10, rtol=0)
    model.reorder_adapters(["0", "1", "2"])
    # One alone: PEFT drives it by the first one's scalings. Here that is refused.
    with pytest.raises(AdapterError, match="a choice of them cannot be set"):
        model.set_adapter("2")
    reference.base_model.set_adapter(["0", "1", "2"])
    reference.delete_adapter("1")
    with pytest.raises(KeyError):
        reference(input_ids=prompt)
    muted = RoutingKnobs(overrides=(AdapterOverride.mute("1"),))
    assert (model(input_ids=prompt, knobs=muted).logits - before).abs().max() > 0.01
    logits = model.scaling_pass(input_ids=prompt).router_logits
    model.delete_adapter("1")
    assert model.adapter_names == ["0", "2"]
    left = model.scaling_pass(input_ids=prompt).router_logits
    torch.testing.assert_close(left, logits[..., [0, 2]], atol=1e-10, rtol=0)


def test_b6_a_cache_of_another_kind_is_refused(model: XLoraModel) -> None:
    from transformers import DynamicCache

    with pytest.raises(ModelError, match="DualCache"):
        model(input_ids=tiny_prompt(), past_key_values=DynamicCache())


def test_b8_the_classifier_is_in_the_base_models_mode_and_stays_trainable(tmp_path: Path) -> None:
    adapters = write_experts(tmp_path)
    config = XLoraConfig(adapters=adapters, xlora_depth=2, xlora_size=16)
    model = XLoraModel.from_base(tiny_base().eval(), config)
    assert not any(module.training for module in model.modules())
    model.train()
    model.generate(input_ids=tiny_prompt(), max_new_tokens=2, use_cache=False)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    assert not any(parameter.requires_grad for parameter in model.base_model.parameters())


@torch.no_grad()
def test_b9_the_latest_scalings_are_never_those_of_an_earlier_call(
    model: XLoraModel, reference: Any
) -> None:
    prompt = tiny_prompt()
    for llm in (model, reference):
        llm(input_ids=prompt)
        assert llm.get_latest_scalings() is not None
        with llm.disable_adapter():
            llm(input_ids=prompt[:, :4])
    assert reference.get_latest_scalings().shape[1] == 9  # of the call before
    assert model.get_latest_scalings() is None
    model(input_ids=prompt)
    for llm in (model, reference):
        llm.clear_scalings_log()
    assert reference.get_latest_scalings() is not None
    assert model.get_latest_scalings() is None


# ------------------------------------------------------------------ C: what PEFT does not take


def test_c9_a_model_that_is_not_a_language_model_is_refused(tmp_path: Path) -> None:
    class Denoiser(nn.Module):
        """As the models of diffusers are: no Hugging Face config, no tokens."""

    with pytest.raises(ModelError, match="Denoiser"):
        XLoraModel.from_base(Denoiser(), XLoraConfig(adapters=write_experts(tmp_path)))  # type: ignore[arg-type]


def test_c10_two_xlora_models_over_one_base_are_refused(model: XLoraModel, tmp_path: Path) -> None:
    adapters = write_experts(tmp_path / "more")
    with pytest.raises(AdapterError, match="carries experts already"):
        XLoraModel.from_base(model.base_model, XLoraConfig(adapters=adapters))


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers", "ignore:.*tie_word_embeddings")
def test_c7_adapters_of_a_head_as_peft_saves_them(tmp_path: Path) -> None:
    """PEFT writes the head's own weight into the adapter; it must be the model's."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], init_lora_weights=False
    )
    lora = peft.get_peft_model(tiny_base(), config).eval()
    lora.save_pretrained(tmp_path / "head")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(
        tmp_path / "head" / "adapter_model.safetensors"
    )
    xlora = XLoraConfig(adapters={"head": str(tmp_path / "head")})
    model = XLoraModel.from_base(tiny_base(), xlora)
    prompt = tiny_prompt()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=prompt).logits, lora(input_ids=prompt).logits, atol=1e-4, rtol=0
        )
    # Rounding to the dtype that a base model is loaded in is no difference, another seed is.
    XLoraModel.from_base(tiny_base(dtype=torch.bfloat16), xlora)
    with pytest.raises(AdapterError, match="module lm_head: the adapter's file brings the weight"):
        XLoraModel.from_base(tiny_base(seed=1), xlora)


@torch.no_grad()
def test_c10_rows_of_a_batch_may_each_have_another_adapter(model: XLoraModel) -> None:
    prompt = tiny_prompt(batch=3)
    scalings = torch.eye(3, dtype=torch.float64).view(3, 1, 1, 3)
    mixed = model.main_pass(scalings=scalings, input_ids=prompt).logits
    for k in range(3):
        alone = model.main_pass(scalings=scalings[k, 0, 0], input_ids=prompt[k : k + 1]).logits
        torch.testing.assert_close(mixed[k : k + 1], alone, atol=1e-10, rtol=0)


# ------------------------------------------------------------------ E: the rest


@torch.no_grad()
def test_e7_ids_may_be_given_by_position(model: XLoraModel) -> None:
    prompt = tiny_prompt()
    base = tiny_base(dtype=torch.float64)
    base.config.use_cache = False
    fields = {"hidden_size": 32, "adapters": dict(model.config_xlora.adapters)}
    theirs = peft.get_peft_model(base, peft.XLoraConfig(**fields))  # without a task_type
    with pytest.raises(TypeError, match="multiple values"):
        theirs(prompt)
    assert torch.equal(model(prompt).logits, model(input_ids=prompt).logits)


def test_e9_an_expert_folder_that_peft_saved_inside_a_checkpoint_is_refused(
    tmp_path: Path, model: XLoraModel, reference: Any
) -> None:
    """PEFT never comes back from loading one: it looks for ``model.`` in the keys for ever."""
    reference.save_pretrained(tmp_path / "saved")
    adapters = {"0": str(tmp_path / "saved" / "0")}
    with pytest.raises(AdapterError, match="tensor base_model.lora_model.model"):
        XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=adapters))

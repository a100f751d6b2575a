"""Edits over other bases: encoder-decoders, quantised and offloaded ones; and what is saved."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from accelerate import disk_offload

from tests.edited_models import IDS, routed_model, run, same_tensors, write_extra
from tests.gradients import backward
from tests.seq2seq_models import FAMILIES, seq2seq_xlora, tiny_seq2seq, tokens
from tests.tiny_models import tiny_base, tiny_xlora, write_lora
from xlora_core.adapters import read_adapter
from xlora_core.errors import CheckpointError, ModelError
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 0}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_encoder_decoders(family: str, tmp_path: Path) -> None:
    model = seq2seq_xlora(tmp_path, family)
    inputs = {"input_ids": tokens(2, 7), "decoder_input_ids": tokens(2, 5, seed=1)}

    @torch.no_grad()
    def logits() -> torch.Tensor:
        output: torch.Tensor = model(**inputs, use_cache=False).logits
        return output

    before, state = logits(), copy.deepcopy(model)
    source = model.encode(input_ids=inputs["input_ids"])
    extra = write_lora(tmp_path / "x", tiny_seq2seq(family), ("lm_head",), seed=9)
    model.add_adapter("x", extra, position=0, share=0.4)
    assert model.get_latest_scalings() is None
    assert model.get_latest_encoder_scalings() is None
    assert not torch.allclose(logits(), before)
    with pytest.raises(ModelError, match="edited since encoder_outputs were made"):
        model(encoder_outputs=source, decoder_input_ids=inputs["decoder_input_ids"])
    model.remove_adapter("x")
    assert same_tensors(model, state)
    assert torch.equal(logits(), before)
    model.reorder_adapters(["e2", "e0", "e1"])
    torch.testing.assert_close(logits(), before, **NEAR)
    options = {"max_new_tokens": 6, "do_sample": False, "input_ids": inputs["input_ids"]}
    for beams in (1, 2):
        found = model.generate(**options, num_beams=beams)
        assert torch.equal(found, state.generate(**options, num_beams=beams))


def test_a_quantised_base_layer_stays_the_object_that_it_is(tmp_path: Path) -> None:
    base = tiny_base()
    packed = bnb.nn.Linear8bitLt(32, 97, bias=False, has_fp16_weights=False)
    packed.load_state_dict(base.lm_head.state_dict())
    model = tiny_xlora(tmp_path)
    model.base_model.lm_head = packed.to("cpu").eval().requires_grad_(False)
    before = run(model)
    model.add_adapter("extra", write_extra(tmp_path, ("lm_head",)))
    assert model.base_model.lm_head.base_layer is packed
    assert model.base_model.lm_head.lora_A.dtype == torch.float32
    assert not torch.equal(run(model), before)
    model.remove_adapter("extra")
    assert model.base_model.lm_head is packed
    assert torch.equal(run(model), before)


def test_experts_are_at_hand_while_their_base_layers_rest_on_disk(tmp_path: Path) -> None:
    plain, base = tiny_xlora(tmp_path), tiny_base()
    disk_offload(base, str(tmp_path / "disk"), execution_device=torch.device("cpu"))
    model = XLoraModel.from_base(base, plain.config_xlora).eval()
    model.classifier.load_state_dict(plain.classifier.state_dict())
    folder = write_extra(tmp_path, ("q_proj", "up_proj"))
    for edited in (plain, model):
        edited.add_adapter("extra", folder, share=0.3)
        edited.remove_adapter("0")
    assert torch.equal(run(model), run(plain))


def test_gradient_checkpointing_goes_on(tmp_path: Path) -> None:
    plain = routed_model(tmp_path).train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable()
    backward(model, IDS)
    folder = write_extra(tmp_path, ("q_proj", "lm_head"))
    for edited in (plain, model):
        edited.add_adapter("extra", folder)
        edited.remove_adapter("0")
    loss, gradients = backward(model, IDS)
    expected_loss, expected = backward(plain, IDS)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **NEAR)


def test_a_checkpoint_may_point_to_added_and_renamed_experts(tmp_path: Path) -> None:
    model = routed_model(tmp_path)
    model.add_adapter("extra", write_extra(tmp_path), position=1)
    model.rename_adapter("0", "zero")
    model.save_pretrained(tmp_path / "saved", bundle=False)
    again = XLoraModel.from_pretrained(tiny_base(dtype=torch.float64), tmp_path / "saved")
    assert again.adapter_names == ["zero", "extra", "1", "2"]
    assert torch.equal(run(again), run(model))


def test_an_expert_that_came_from_no_folder_cannot_be_pointed_to(tmp_path: Path) -> None:
    model = routed_model(tmp_path)
    model.add_adapter("extra", read_adapter("extra", write_extra(tmp_path)))
    with pytest.raises(CheckpointError, match="'extra' was read from no folder"):
        model.save_pretrained(tmp_path / "saved", bundle=False)
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(tiny_base(dtype=torch.float64), tmp_path / "saved")
    assert torch.equal(run(again), run(model))

"""PEFT's own X-LoRA test module over this project: other names, no other behaviour.

``make test`` fetches the module. Here it is loaded as it stands, and the names that it imported
are bound to ours: ``get_peft_model(base, XLoraConfig(...))`` to ``XLoraModel.from_base``,
``PeftModel.from_pretrained`` to ``XLoraModel.from_pretrained``, ``base_model.model`` to the base
model, ``internal_xlora_classifier.config`` to the model's config, and so on. The models, tokenizer
and LoRA that the tests name by their hub ids are tiny random ones of the same architectures.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, OPTConfig, OPTForCausalLM

from tests.tiny_chat import tiny_tokenizer
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.layers import XLoraLayer as OwnLayer
from xlora_core.model import XLoraModel

MODULE_FILE = Path(__file__).resolve().parents[2] / ".venv" / "peft-tests" / "test_xlora.py"


def load_pefts_tests() -> ModuleType:
    """Returns PEFT's test module with its imports bound to the names below.

    Raises:
        FileNotFoundError: If nobody fetched it; says how.
    """
    if not MODULE_FILE.is_file():
        raise FileNotFoundError(
            f"{MODULE_FILE} is missing: PEFT's own tests of X-LoRA, which are not part of this "
            "project. `make test` fetches them"
        )
    package = ModuleType("pefts_tests")
    package.__path__ = [str(MODULE_FILE.parent)]
    testing_utils = ModuleType("pefts_tests.testing_utils")
    testing_utils.hub_online_once = lambda model_id: nullcontext()  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("pefts_tests.test_xlora", MODULE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {package.__name__: package, testing_utils.__name__: testing_utils}
    spec.loader.exec_module(module)
    names = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "AutoTokenizer": AutoTokenizer,
        "huggingface_hub": SimpleNamespace(hf_hub_download=hub_file),
        "XLoraConfig": xlora_config,
        "get_peft_model": get_peft_model,
        "PeftModel": PeftModel,
        "XLoraLayer": XLoraLayer,
    }
    for name, ours in names.items():
        assert hasattr(module, name), f"{MODULE_FILE} does not import {name} any more"
        setattr(module, name, ours)
    return module


# ------------------------------------------------------------------ what the tests take from a hub


class AutoModelForCausalLM:
    """Tiny random models for the hub ids; the same weights at every call."""

    @staticmethod
    def from_pretrained(model_id: str) -> Any:
        """Returns the model, without touching the random numbers of the test."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _gemma3() if "Gemma3" in model_id else _opt()
        return model.eval()


def _opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=None,  # the tests count the tokens of a generation
    )
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model


def _gemma3() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    return Gemma3ForCausalLM(config)


class AutoTokenizer:
    """One tiny tokenizer for all hub ids."""

    @staticmethod
    def from_pretrained(model_id: str, device_map: str) -> Any:
        """Returns the tokenizer."""
        return tiny_tokenizer()


class Hub:
    """Where LoRAs named by a hub id are: ``folder/<name>``, made by PEFT at first use."""

    folder: Path | None = None

    @classmethod
    def path(cls, name: str) -> Path:
        """Returns the folder of a LoRA given by folder or by hub id."""
        if Path(name).is_dir():
            return Path(name)
        assert cls.folder is not None, "the tests set Hub.folder"
        folder = cls.folder / name
        if not folder.is_dir():
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                target_modules=["q_proj", "v_proj"],
                init_lora_weights=False,
            )
            base = AutoModelForCausalLM.from_pretrained("opt")
            peft.get_peft_model(base, config).save_pretrained(folder)
        return folder


def hub_file(repo_id: str, filename: str) -> str:
    """Returns the path of a file of a LoRA; as ``huggingface_hub.hf_hub_download``."""
    return str(Hub.path(repo_id) / filename)


# ------------------------------------------------------------------ PEFT's entry points


def xlora_config(task_type: str, peft_type: str = "XLORA", **fields: Any) -> XLoraConfig:
    """Returns our config; PEFT's two extra fields choose its classes, ours is one."""
    assert (task_type, peft_type) == ("CAUSAL_LM", "XLORA")
    adapters = {name: str(Hub.path(path)) for name, path in fields.pop("adapters").items()}
    return XLoraConfig(adapters=adapters, **fields)


def get_peft_model(base: Any, config: Any) -> Any:
    """Returns our model for an X-LoRA config; plain LoRA stays PEFT's."""
    if isinstance(config, XLoraConfig):
        return PeftModel(XLoraModel.from_base(base, config))
    return peft.get_peft_model(base, config)


class PeftModel:
    """An ``XLoraModel`` under PEFT's names; what is not here is the model's own."""

    newest: XLoraModel | None = None

    def __init__(self, model: XLoraModel) -> None:
        self.model = PeftModel.newest = model
        self.base_model = Tuner(model)
        self.internal_xlora_classifier = Classifier(model)
        # PEFT's layers choose their top-k themselves, through a method that a test replaces.
        model.route = XLoraLayer(model).route  # type: ignore[method-assign]

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: str | os.PathLike[str], **options: Any
    ) -> PeftModel:
        """Returns the model of a checkpoint.

        PEFT writes a second model into the modules of the first. Here the first one gives its
        base model back before.
        """
        if cls.newest is not None and cls.newest.base_model is model:
            model = cls.newest.unload()
        return cls(XLoraModel.from_pretrained(model, Path(model_id), **options))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes a checkpoint."""
        self.model.save_pretrained(Path(save_directory), **options)

    @property
    def internal_xlora_scalings(self) -> Tensor | None:
        """The last scalings."""
        return self.model.get_latest_scalings()

    def to(self, device: str) -> PeftModel:
        """Moves the model."""
        self.model.to(device)
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every parameter; an expert's stacked matrix under the name of one of PEFT's."""
        for name, parameter in self.model.named_parameters():
            owner, _, last = name.rpartition(".")
            if last in ("lora_A", "lora_B"):
                yield f"{owner}.{last}.default.weight", parameter
            elif name.startswith("classifier."):
                yield f"base_model.internal_xlora_{name}", parameter
            else:
                yield name, parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Tuner:
    """PEFT's ``base_model``, the tuner: X-LoRA model around LoRA model around base model."""

    def __init__(self, model: XLoraModel) -> None:
        self.model = ModuleView(model.base_model)
        self.lora_model = SimpleNamespace(model=self.model)
        self._xlora_model = model

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self._xlora_model.training


class ModuleView:
    """A module whose adapted submodules show their experts as PEFT's do: ``lora_A["0"].weight``."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if isinstance(self._module, OwnLayer) and name in ("lora_A", "lora_B"):
            experts = self._module.experts().items()
            return {str(k): SimpleNamespace(weight=getattr(w, name)) for k, w in experts}
        value = getattr(self._module, name)
        return ModuleView(value) if isinstance(value, nn.Module) else value

    def __getitem__(self, index: int) -> ModuleView:
        assert isinstance(self._module, nn.ModuleList)
        return ModuleView(self._module[index])


class Classifier:
    """PEFT's classifier as the tests see it: its live config."""

    def __init__(self, model: XLoraModel) -> None:
        self.config = LiveConfig(model)

    @property
    def override_scaling_pass_value(self) -> float:
        """PEFT keeps a second copy of the config's value."""
        return float(self.config.scaling_pass_value)


class LiveConfig:
    """The model's config; writing a field is the setter of that field."""

    def __init__(self, model: XLoraModel) -> None:
        object.__setattr__(self, "_model", model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.config_xlora, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "top_k_lora":
            self._model.set_topk_lora(value)
        else:
            self._model.set_softmax(**{name: value})


class XLoraLayer:
    """Routing as a method that turns scalings into what is applied."""

    def __init__(self, model: XLoraModel) -> None:
        self._model = model
        self._knobs: RoutingKnobs | None = None

    def get_maybe_topk_scalings(self, scalings: Tensor) -> Tensor:
        """Returns the effective scalings."""
        return XLoraModel.route(self._model, scalings, self._knobs)

    def route(self, router_logits: Tensor, knobs: RoutingKnobs | None = None) -> Tensor:
        """As ``XLoraModel.route``."""
        self._knobs = knobs
        return self.get_maybe_topk_scalings(router_logits)

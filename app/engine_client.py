"""The one engine of this server process, and what the pages may know of its model."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import sharing
from xlora_core import Arm, EngineLimits, RoutingKnobs, SamplingParams, XLoraConfig
from xlora_core.errors import ConfigError
from xlora_core.startup import without_collector

if TYPE_CHECKING:
    from xlora_core import Engine, XLoraModel
    from xlora_core.engine import RequestHandle

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the pages say of the model.

    Attributes:
        model_id: The base model's name.
        adapter_names: In the model's order.
        n_modules: Number L of adapted modules.
        device: Such as ``"cpu"``, ``"cuda:0"`` or ``"cuda:0, cpu"``.
        dtype: Such as ``"float32"``.
        context_length: Most tokens of prompt and response together.
        config: The X-LoRA settings.
        knobs: The model's default knobs.
        limits: What a request may ask for.
    """

    model_id: str
    adapter_names: tuple[str, ...]
    n_modules: int
    device: str
    dtype: str
    context_length: int
    config: XLoraConfig
    knobs: RoutingKnobs
    limits: EngineLimits = field(default_factory=EngineLimits)


@dataclass(frozen=True)
class EngineClient:
    """The pages' only way to the model. Safe to share between sessions."""

    engine: Engine
    card: ModelCard

    def submit(
        self,
        prompt: Prompt,
        arms: Sequence[Arm],
        sampling: SamplingParams,
        *,
        client: str | None = None,
    ) -> RequestHandle:
        """Queues a request.

        Args:
            prompt: A text, or messages.
            arms: Ways of running it.
            sampling: How tokens are picked.
            client: Whose request it is: visitors take turns.

        Raises:
            XLoraError: If the prompt, the knobs, the limits or the queue do not allow it.
        """
        return self.engine.submit(prompt, arms, sampling, client=client)


def settings_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments of ``load_model`` that the environment asks for.

    ``XLORA_APP_MODEL`` (default ``demo``), ``XLORA_APP_CHECKPOINT``, ``XLORA_APP_ADAPTERS``
    (``name=folder,name=folder``), ``XLORA_APP_DEVICE`` and ``XLORA_APP_DTYPE`` (either may be
    ``auto``).

    Raises:
        ConfigError: If ``XLORA_APP_ADAPTERS`` is not of that form.
    """
    names = {"checkpoint": "CHECKPOINT", "device": "DEVICE", "dtype": "DTYPE"}
    settings: dict[str, Any] = {"base": environ.get("XLORA_APP_MODEL") or "demo"}
    for argument, name in names.items():
        if environ.get(f"XLORA_APP_{name}"):
            settings[argument] = environ[f"XLORA_APP_{name}"]
    adapters = {}
    for part in filter(None, environ.get("XLORA_APP_ADAPTERS", "").split(",")):
        name, equals, folder = part.partition("=")
        if not equals or not name.strip() or not folder.strip():
            raise ConfigError(
                f"XLORA_APP_ADAPTERS: {part!r} is not of the form name=folder",
                hint="for example XLORA_APP_ADAPTERS=math=experts/math,code=experts/code",
            )
        if name.strip() in adapters:
            raise ConfigError(
                f"XLORA_APP_ADAPTERS: two adapters are named {name.strip()!r}",
                hint="give each adapter its own name",
            )
        adapters[name.strip()] = folder.strip()
    if adapters:
        settings["adapters"] = adapters
    return settings


def threads_from(environ: Mapping[str, str]) -> int | None:
    """Returns how many threads ``XLORA_APP_THREADS`` allows on the CPU; None if it says nothing.

    Raises:
        ConfigError: If it is no whole number.
    """
    given = environ.get("XLORA_APP_THREADS", "").strip()
    if given and not given.isdecimal():
        raise ConfigError(
            f"XLORA_APP_THREADS must be a whole number, got {given!r}",
            hint="leave it out for one thread per core",
        )
    return int(given) if given else None


def open_engine() -> EngineClient:
    """Loads the model that the environment names, and starts its engine.

    Raises:
        XLoraError: If the environment holds what cannot be, or the model cannot be loaded.
    """
    with without_collector():
        return _open_engine()


def _open_engine() -> EngineClient:
    settings, n_threads = settings_from(os.environ), threads_from(os.environ)
    shared = sharing.settings_from(os.environ)
    from xlora_core import Engine, load_model
    from xlora_core.threads import set_threads

    set_threads(n_threads)
    base = settings.pop("base")
    model, tokenizer = load_model(base, **settings)
    name = model_name(base, getattr(model.config, "_name_or_path", ""))
    parameter = next(model.parameters())
    card = ModelCard(
        model_id=name,
        adapter_names=tuple(model.adapter_names),
        n_modules=len(model.lora_layer_names),
        device=device_names(model),
        dtype=str(parameter.dtype).removeprefix("torch."),
        context_length=model.context_length,
        config=model.config_xlora,
        knobs=model.default_knobs,
        limits=shared["limits"],
    )
    return EngineClient(Engine(model, tokenizer, model_id=name, **shared), card)


def device_names(model: XLoraModel) -> str:
    """Returns where a model is: ``cuda:0``, or ``cuda:0, cuda:1, cpu`` if it is spread."""
    spread = getattr(model, "hf_device_map", None) or {"": model.device}
    names = (f"cuda:{place}" if isinstance(place, int) else str(place) for place in spread.values())
    return ", ".join(dict.fromkeys(names))


def model_name(base: str, path: str) -> str:
    """Returns the base model's name for people: the last part of where it came from."""
    return "SmolLM2-135M-Instruct" if base == "demo" else (path or base).rstrip("/").split("/")[-1]


@st.cache_resource(show_spinner=False)
def shared_client() -> EngineClient:
    """Returns the process's client; the first caller waits for the model.

    Raises:
        XLoraError: If the model cannot be loaded. Nothing is kept then: the next call tries again.
    """
    client = open_engine()
    # Torch and the model are a million objects that never die, and little garbage. Frozen, they no
    # longer cost every collection hundreds of milliseconds.
    gc.freeze()
    return client

"""Training one LoRA expert with PEFT (the optional extra ``train``).

The base weights stand still in bfloat16; the live LoRA weights are bfloat16 copies of float32
masters, which shortens a step on CPUs with bfloat16 units and loses nothing in the updates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from xlora_core.errors import ConfigError
from xlora_core.training.data import Example, batches
from xlora_core.training.loop import CHECKPOINT, LoopSettings, Report, TrainingLog, optimise, silent
from xlora_core.training.losses import backbone_losses, mean_backbone_loss


@dataclass(frozen=True, kw_only=True)
class ExpertSettings(LoopSettings):
    """How one expert is trained.

    Attributes:
        domain: Its name.
        rank: LoRA rank r of every adapted module.
        alpha: LoRA alpha; the adapter is scaled by alpha / r.
        join_share: Share of rows that ask two questions of the domain in one prompt.
    """

    domain: str
    rank: int = 8
    alpha: int = 16
    join_share: float = 0.1


def import_peft() -> Any:
    """Returns the ``peft`` module.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "training LoRA experts needs the package peft, which is not installed",
            hint="pip install 'xlora-explorer[train]'",
        ) from error
    return peft


def train_expert(
    base: Any,
    pad_id: int,
    train: Sequence[Example],
    heldout: Sequence[Example],
    out: str | Path,
    settings: ExpertSettings,
    *,
    base_name: str,
    command: str = "",
    report: Report = silent,
) -> TrainingLog:
    """Trains one LoRA expert on a base model and writes it in PEFT's format.

    Goes on from ``out/checkpoint.safetensors`` when a run with the same settings was cut off there.

    Args:
        base: The base causal language model. Its weights do not change, but it is cast to
            ``settings.dtype``.
        pad_id: Token id to pad with.
        train: Training examples.
        heldout: Held-out examples of the same domain, for the curve.
        out: Folder for ``adapter_config.json``, ``adapter_model.safetensors`` (float16) and
            ``training.json``.
        settings: How to train.
        base_name: The base model's public name, written to ``adapter_config.json``.
        command: The command line, written to ``training.json``.
        report: Gets a line at each step.

    Returns:
        The losses on the way.

    Raises:
        ConfigError: If peft is missing.
    """
    peft = import_peft()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = peft.get_peft_model(
        base.to(getattr(torch, settings.dtype)),
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules="all-linear",
        ),
        autocast_adapter_dtype=False,
    )
    causal_lm = model.get_base_model()
    log = TrainingLog(settings=asdict(settings), command=command)
    masters = optimise(
        {name: p for name, p in model.named_parameters() if p.requires_grad},
        lambda batch: backbone_losses(causal_lm, batch).mean(),
        lambda: mean_backbone_loss(causal_lm, heldout, pad_id),
        batches(train, settings.rows, pad_id, seed=settings.seed),
        settings,
        log,
        out,
        report=report,
    )
    _write_adapter(out, masters, settings, base_name)
    log.write(out / "training.json")
    (out / CHECKPOINT).unlink(missing_ok=True)
    model.unload()
    return log


def _write_adapter(
    out: Path, masters: Mapping[str, Tensor], settings: ExpertSettings, base_name: str
) -> None:
    """Writes PEFT's two files: float16 weights, and a config without paths of this machine."""
    weights = {
        name.replace(".default.", "."): master.to(torch.float16).contiguous()
        for name, master in masters.items()
    }
    save_file(weights, str(out / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": _module_names(weights),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _module_names(tensor_names: Iterable[str]) -> list[str]:
    """The adapted modules' last names, such as ``q_proj``, from PEFT's tensor names."""
    return sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensor_names})

"""Training one LoRA expert with PEFT (the optional extra ``train``)."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from xlora_core.config.training import ExpertTrainConfig
from xlora_core.errors import ConfigError
from xlora_core.training.checkpoints import trainable
from xlora_core.training.data import Example
from xlora_core.training.identity import run_identity
from xlora_core.training.log import TrainingLog
from xlora_core.training.losses import answer_positions, backbone_losses
from xlora_core.training.progress import Progress
from xlora_core.training.router import work_folder
from xlora_core.training.trainer import AnswerPass, AnswerTrainer


class ExpertTrainer(AnswerTrainer):
    """Trains the LoRA weights of a PEFT model."""

    model: Any  # a peft.PeftModel: the package is optional

    def answer_pass(self, inputs: Mapping[str, Tensor]) -> AnswerPass:
        """Runs the model; its head on the answer tokens only."""
        labels = inputs["labels"]
        losses = backbone_losses(
            self.model.get_base_model(), inputs["input_ids"], inputs["attention_mask"], labels
        )
        rows, writers = answer_positions(labels).unbind(dim=1)
        return AnswerPass(losses=losses, domains=inputs["domains"][rows, writers + 1])


def import_peft() -> Any:
    """Returns the ``peft`` module.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import peft
        import peft.helpers  # not imported by the package itself
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
    settings: ExpertTrainConfig,
    *,
    base_name: str,
    command: str = "",
    progress: Progress | None = None,
) -> TrainingLog:
    """Trains one LoRA expert on a base model and writes it in PEFT's format.

    Goes on from ``<out>.training`` when a run with the same settings and rows was cut off there.

    Args:
        base: The base causal language model. Its weights do not change.
        pad_id: Token id to pad with.
        train: Training examples.
        heldout: Held-out examples of the same domain, for the curve; may be empty.
        out: Folder for ``adapter_config.json``, ``adapter_model.safetensors`` (float16) and
            ``training.json``.
        settings: How to train.
        base_name: The base model's public name, written to ``adapter_config.json``.
        command: The command line, written to ``training.json``.
        progress: Shows how it gets on; None says nothing.

    Returns:
        The losses on the way.

    Raises:
        ConfigError: If peft is missing, or a setting does not fit.
        CheckpointError: If the checkpoint to go on from is damaged.
        ModelError: If training diverged.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written.
    """
    peft = import_peft()
    out = Path(out)
    run = run_identity(base, train, heldout, settings)
    torch.manual_seed(settings.seed)
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="all-linear",
        ),
    )  # the LoRA weights are float32, whatever the base's dtype
    try:
        with _uncast_input(peft, model, settings):
            trainer = ExpertTrainer(
                model,
                pad_id,
                train,
                heldout,
                work_folder(out),
                settings,
                run=run,
                progress=progress,
            )
            log = trainer.fit(command=command)
        out.mkdir(parents=True, exist_ok=True)
        _write_adapter(
            out,
            trainable(model),
            settings,
            base_name,
            fan_in_fan_out=bool(model.peft_config["default"].fan_in_fan_out),
        )
    finally:
        model.unload()
    log.write(out)
    shutil.rmtree(work_folder(out), ignore_errors=True)
    return log


@contextlib.contextmanager
def _uncast_input(peft: Any, model: Any, settings: ExpertTrainConfig) -> Iterator[None]:
    """Spares a cast of each module's input to float32, which autocast would only cast back."""
    with peft.helpers.disable_input_dtype_casting(model, active=settings.autocast):
        yield


def _write_adapter(
    out: Path,
    weights: Mapping[str, Tensor],
    settings: ExpertTrainConfig,
    base_name: str,
    *,
    fan_in_fan_out: bool,
) -> None:
    """Writes PEFT's two files: float16 weights, and a config without paths of this machine."""
    tensors = {
        name.replace(".default.", "."): weight.detach().to("cpu", torch.float16).contiguous()
        for name, weight in weights.items()
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _module_names(tensors),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
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

"""PEFT's X-LoRA checkpoint folder.

::

    adapter_config.json          peft_type XLORA, {"adapters": {"0": path, ...}}
    adapter_model.safetensors    base_model.internal_xlora_classifier.layers.<i>.weight and .bias
    0/, 1/, ...                  what PEFT saves once per expert, and never reads

PEFT 0.20 and later lose classifier layers from the second file; see ``peft_rescue``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xlora_core.adapters import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter
from xlora_core.checkpoint.config_values import foreign_config_of, foreign_values
from xlora_core.checkpoint.contents import Checkpoint, Layout, base_model_name
from xlora_core.checkpoint.experts import (
    read_experts,
    renames_all,
    with_experts_from,
    write_adapter,
)
from xlora_core.checkpoint.files import (
    read_json_object,
    read_router_tensors,
    require_file,
    write_folder,
    write_json,
)
from xlora_core.checkpoint.fitting import check_in_module_order
from xlora_core.checkpoint.linear_chain import chain_of, check_chain, check_depth, linear_indices
from xlora_core.checkpoint.names_file import known_modules, read_names, write_names
from xlora_core.checkpoint.ordering import Ordering
from xlora_core.checkpoint.peft_rescue import (
    CLASSIFIER_PREFIX,
    folder_of_expert,
    recover_lost_layers,
    recover_trained_experts,
)
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError

PEFT_TYPE = "XLORA"
# What every PEFT config has, and says nothing about X-LoRA.
_PEFT_KEYS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
_LAYER_KEY = re.compile(re.escape(CLASSIFIER_PREFIX) + r"(layers\.(\d{1,9})\.(?:weight|bias))")


def read_peft_config(path: str | Path) -> XLoraConfig:
    """Returns the X-LoRA config of PEFT's ``adapter_config.json``.

    Adapter names that are whole numbers are put in their numerical order: PEFT saves them in
    that of their spelling ("0", "1", "10", "2"). Paths stay as they are.

    Raises:
        CheckpointError: If the file is damaged; listing every unknown key, every contradiction
            and every value out of range.
    """
    path = Path(path)
    values = read_json_object(path)
    faults = []
    if values.get("peft_type") != PEFT_TYPE:
        faults.append(f"peft_type must be {PEFT_TYPE!r}, got {values.get('peft_type')!r}")
    adapters = values.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        faults.append(f"adapters must map names to folders, got {adapters!r}")
        adapters = {}
    if all(name.isdecimal() and name.isascii() and len(name) < 10 for name in adapters):
        adapters = dict(sorted(adapters.items(), key=lambda item: int(item[0])))
    ours = {k: v for k, v in values.items() if k not in _PEFT_KEYS and k != "adapters"}
    return foreign_config_of(path, ours, adapters, faults=faults)


def read_peft(
    folder: Path, overrides: Mapping[str, str | Path], ordering: Ordering | None
) -> Checkpoint:
    """Returns the contents of a checkpoint that PEFT's ``save_pretrained`` wrote.

    Args:
        folder: The folder.
        overrides: Adapter name -> folder to read the expert from, instead of the stored path.
        ordering: The modules that the classifier's outputs belong to, if not in model order.

    Raises:
        CheckpointError: If it is damaged, or PEFT saved it incompletely.
        AdapterError: If an expert cannot be read.
    """
    config = read_peft_config(folder / CONFIG_FILE)
    path = require_file(folder, WEIGHTS_FILE)
    names, notes = read_names(folder, path)
    tensors, recovered = _classifier(folder, path, config)
    trained: dict[str, LoraAdapter] = {}
    saved = {name: folder_of_expert(folder, i) for i, name in enumerate(config.adapters)}
    # What we write there holds the experts as trained, at the paths of its config.
    if config.use_trainable_adapters and names is None and not renames_all(config, overrides):
        trained = recover_trained_experts(folder, config, but_for=overrides)
    if ordering is not None:
        config = ordering.applied_to(config)
    if names is not None:
        config = names.applied_to(config)
    recovered_from = {name: saved[name] for name in trained}
    config = with_experts_from(folder, config, {**recovered_from, **overrides})
    layer_names, base = known_modules(names, ordering)
    return Checkpoint(
        config=config,
        classifier=tensors,
        adapters=read_experts(config, trained),
        layer_names=layer_names,
        base=base,
        layout=Layout.PEFT,
        notes=[*notes, *recovered, *(f"expert {name!r} was recovered" for name in trained)],
    )


def write_peft(folder: str | Path, checkpoint: Checkpoint, *, relative_paths: bool = False) -> None:
    """Writes a checkpoint that ``PeftModel.from_pretrained`` loads, with a whole classifier.

    PEFT wants its experts numbered; their names, and what else PEFT does not store, go into
    ``xlora_names.json`` beside its files, which our reader understands. The experts lie in
    ``experts/<number>``: PEFT's own save puts something unreadable into ``<number>``.

    Args:
        folder: A new or empty folder.
        checkpoint: Any checkpoint; after ``check_fits`` if an ordering file came with it.
        relative_paths: Write the experts' paths relative to the folder, so that it may be moved.
            PEFT takes them as relative to the directory it runs in, so it has to run in the
            folder then; our reader finds them either way.

    Raises:
        CheckpointError: If the folder is not empty or cannot be written, or PEFT has no such
            router.
    """
    check_in_module_order(checkpoint)
    target = Path(folder).resolve()
    values = foreign_values(checkpoint.config, package="PEFT")

    def write(staging: Path) -> None:
        paths = {}
        for index, adapter in enumerate(checkpoint.adapters):
            place = Path("experts") / str(index)
            write_adapter(staging / place, adapter)
            paths[str(index)] = (place if relative_paths else target / place).as_posix()
        classifier = {
            f"{CLASSIFIER_PREFIX}{name}": tensor.detach().to("cpu").contiguous()
            for name, tensor in checkpoint.classifier.items()
        }
        save_file(classifier, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        # PEFT loads the adapters in the order of this file, so it must stay numerical.
        write_json(staging / CONFIG_FILE, _peft_config(checkpoint, values, paths))
        write_names(staging, staging / WEIGHTS_FILE, checkpoint)

    write_folder(target, write)


def peft_notes(adapters: Sequence[LoraAdapter]) -> list[str]:
    """Returns what PEFT makes of experts otherwise than we do, one sentence each."""
    biased = [a.name for a in adapters if any(w.bias is not None for w in a.modules.values())]
    whole = [a.name for a in adapters if a.saved_modules]
    notes = []
    if biased:
        notes.append(
            f"PEFT adds the bias on lora_B of {', '.join(map(repr, biased))} to every token, here "
            "it is gated like the rest, so the numbers differ"
        )
    if whole:
        named = ", ".join(map(repr, whole))
        notes.append(f"PEFT's X-LoRA does not load experts with modules_to_save ({named})")
    return notes


def _peft_config(
    checkpoint: Checkpoint, values: Mapping[str, Any], paths: Mapping[str, str]
) -> dict[str, Any]:
    tasks = {adapter.config.get("task_type") for adapter in checkpoint.adapters}
    task = tasks.pop() if len(tasks) == 1 else None
    return {
        "adapters": dict(paths),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name(checkpoint.adapters),
        "inference_mode": True,
        "peft_type": PEFT_TYPE,
        "revision": None,
        "task_type": task or "CAUSAL_LM",
        **values,
    }


def _classifier(
    folder: Path, path: Path, config: XLoraConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the classifier by our names, and notes on what was recovered."""
    tensors: dict[str, Tensor] = {}
    indices = set()
    for key, tensor in read_router_tensors(path).items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{path}: tensor {key} is not part of an X-LoRA classifier; expected "
                f"{CLASSIFIER_PREFIX}layers.<i>.weight and .bias",
                hint="give the folder of an X-LoRA checkpoint that PEFT saved",
            )
        tensors[match[1]] = tensor
        indices.add(int(match[2]))
    _check_dropout(path, config, indices)
    check_depth(path, config, most=len(indices) + len(config.adapters))
    tensors, notes = recover_lost_layers(folder, tensors, config)
    names = [f"layers.{index}" for index in linear_indices(config)]
    check_chain(path, names, chain_of(tensors, config), config)
    return tensors, notes


def _check_dropout(path: Path, config: XLoraConfig, indices: set[int]) -> None:
    """Raises if the layers are numbered as for another ``xlora_dropout_p``."""
    has_dropout = config.xlora_dropout_p > 0
    if any(index % (3 if has_dropout else 2) for index in indices):
        raise CheckpointError(
            f"{path}: classifier layers {', '.join(map(str, sorted(indices)))} do not fit "
            f"xlora_dropout_p {config.xlora_dropout_p:g} in {CONFIG_FILE}: dropout modules count, "
            "so the layers are 0, 3, 6, ... with dropout, and 0, 2, 4, ... with xlora_dropout_p 0",
            hint=f"correct xlora_dropout_p in {CONFIG_FILE}, or use the file that belongs to it",
        )

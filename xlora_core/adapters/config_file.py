"""``adapter_config.json``: what it says, and what in it cannot be mixed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlora_core.adapters.files import refuse_pickle
from xlora_core.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_config(name: str, folder: Path) -> dict[str, Any]:
    """Returns the settings of an adapter's folder.

    Raises:
        AdapterError: If there are none, or they are not those of a LoRA that can be mixed.
    """
    if not folder.exists():
        raise AdapterError(
            f"adapter {name!r}: folder {folder} does not exist",
            hint=f"give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    if not folder.is_dir():
        refuse_pickle(folder, what=f"adapter {name!r}")
        raise AdapterError(
            f"adapter {name!r}: {folder} is a file, a folder was expected",
            hint=f"give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"adapter {name!r}: {folder} is not a LoRA adapter, it has no {CONFIG_FILE}",
            hint="PEFT's save_pretrained writes such a folder",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"adapter {name!r}: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(
            f"adapter {name!r}: {path} is not a LoRA, its peft_type is {found!r}, expected 'LORA'",
            hint="an X-LoRA mixes plain LoRA adapters only",
        )
    _refuse_unsupported(name, path, config)
    dropout = config.get("lora_dropout") or 0
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise AdapterError(
            f"adapter {name!r}: {path}: lora_dropout must be in [0, 1), got {dropout!r}"
        )
    return config


def _refuse_unsupported(name: str, path: Path, config: Mapping[str, Any]) -> None:
    """Raises for LoRA variants whose numbers would be silently wrong if read as plain LoRA."""
    variants = {
        "use_dora": "DoRA",
        "trainable_token_indices": "trained token embeddings",
        "target_parameters": "adapted parameters (target_parameters)",
        "layer_replication": "replicated layers",
        "alora_invocation_tokens": "activated LoRA",
        "use_qalora": "QA-LoRA",
        "arrow_config": "an Arrow router",
    }
    found = [what for key, what in variants.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias={config['bias']!r})")
    if found:
        raise AdapterError(
            f"adapter {name!r}: {path} uses {', '.join(found)}; only plain LoRA can be mixed",
            hint="train the adapter without it, or merge that part into the base model first",
        )


def modules_to_save(name: str, folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Returns the names of the modules that the adapter trained as a whole.

    Raises:
        AdapterError: If they are no list of names.
    """
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise AdapterError(
            f"adapter {name!r}: {folder / CONFIG_FILE}: modules_to_save must be a list of module "
            f"names, got {names!r}"
        )
    return names


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number that fits a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def by_pattern(config: Mapping[str, Any], key: str, default: Any, where: str, module: str) -> Any:
    """Returns the value of the first pattern that matches a module's path or its end.

    Source: PEFT 0.21.2, ``get_pattern_key``.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{where}: {key} must map patterns to numbers, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(f"{where}: {key}: {pattern!r} is not a pattern: {error}") from error
        if matches:
            return value
    return default

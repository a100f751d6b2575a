"""Reading a checkpoint folder of any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xlora_core.adapters import CONFIG_FILE, WEIGHTS_FILE
from xlora_core.checkpoint.contents import Checkpoint, Layout
from xlora_core.checkpoint.files import read_json_object, refuse_pickled_checkpoint
from xlora_core.checkpoint.ordering import read_ordering
from xlora_core.checkpoint.original_layout import ORIGINAL_CONFIG_FILE, read_original
from xlora_core.checkpoint.own_layout import HEADER_FILE, read_own
from xlora_core.checkpoint.peft_layout import PEFT_TYPE, read_peft
from xlora_core.errors import CheckpointError


def layout_of(folder: str | Path) -> Layout:
    """Returns the layout of a checkpoint folder, told by the names of its files.

    Raises:
        CheckpointError: If the folder is missing, or holds no X-LoRA checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            refuse_pickled_checkpoint(folder)
        raise CheckpointError(
            f"checkpoint folder {folder} does not exist",
            hint=f"give a folder that XLoraModel.save_pretrained wrote (it holds {HEADER_FILE}), "
            "or one of PEFT's or the original xlora package's X-LoRA checkpoints",
        )
    if (folder / HEADER_FILE).is_file():
        return Layout.OURS
    of_peft = (folder / CONFIG_FILE).is_file()
    of_original = (folder / ORIGINAL_CONFIG_FILE).is_file()
    if of_peft and of_original:
        raise CheckpointError(
            f"{folder} holds two checkpoints: {CONFIG_FILE} of PEFT's layout and "
            f"{ORIGINAL_CONFIG_FILE} of the original xlora package's",
            hint="give each a folder of its own",
        )
    if of_original:
        return Layout.ORIGINAL
    if of_peft:
        kind = read_json_object(folder / CONFIG_FILE).get("peft_type")
        if kind == PEFT_TYPE:
            return Layout.PEFT
        raise CheckpointError(
            f"{folder} is no X-LoRA checkpoint: the peft_type in its {CONFIG_FILE} is {kind!r}, "
            f"expected {PEFT_TYPE!r}",
            hint="a single LoRA is an expert: give it under adapters instead"
            if (folder / WEIGHTS_FILE).is_file()
            else "give the folder of an X-LoRA checkpoint",
        )
    refuse_pickled_checkpoint(folder)
    raise CheckpointError(
        f"{folder} is not an X-LoRA checkpoint: it has no {HEADER_FILE} (ours), no {CONFIG_FILE} "
        f"(PEFT's) and no {ORIGINAL_CONFIG_FILE} (the original xlora package's)",
        hint="give the folder that holds one of these files",
    )


def read_checkpoint(
    folder: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    ordering: str | Path | None = None,
) -> Checkpoint:
    """Returns the contents of a checkpoint folder: ours, PEFT's or the original package's.

    Args:
        folder: The folder.
        adapters: Adapter name -> other folder to read it from; names as in the checkpoint. Where
            all of these are mere numbers, as many other names rename the adapters, in order.
        ordering: mistral.rs's ordering file, for PEFT's and the original layout: the modules (and
            adapters) that the classifier's outputs belong to, where they are not in the base
            model's order.

    Raises:
        CheckpointError: For a missing, foreign, newer, incomplete or doctored checkpoint.
        AdapterError: If an expert cannot be read.
    """
    folder = Path(folder)
    overrides = dict(adapters or {})
    layout = layout_of(folder)
    order = None if ordering is None else read_ordering(ordering)
    if layout is Layout.PEFT:
        return read_peft(folder, overrides, order)
    if layout is Layout.ORIGINAL:
        return read_original(folder, overrides, order)
    if order is not None:
        raise CheckpointError(
            f"{folder} names its modules itself, the ordering file {order.path} is not needed",
            hint="leave it out",
        )
    return read_own(folder, overrides)

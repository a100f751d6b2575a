"""The demo with four of its experts: the targets speak of that many."""

from __future__ import annotations

from pathlib import Path

from xlora_core import load_model

KEPT = ("math", "chemistry", "python", "verse")


def save_with_four_experts(folder: Path) -> Path:
    """Writes the demo's checkpoint without the other experts; the router keeps its rows for these.

    Args:
        folder: A folder that does not exist yet.

    Returns:
        The folder.
    """
    model, _ = load_model("demo")
    for name in list(model.adapter_names):
        if name not in KEPT:
            model.remove_adapter(name)
    model.save_pretrained(folder)
    return folder

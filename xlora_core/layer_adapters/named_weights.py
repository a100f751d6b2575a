"""Loading weights by name: everything is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from xlora_core.adapters import load_safetensors, refuse_pickle
from xlora_core.errors import AdapterError

# Old name -> the adapter's name for it, or None to leave that tensor out.
Rename = Callable[[str], str | None]
_MOST_FAULTS_SHOWN = 20


def read_named_weights(
    source: Mapping[str, Tensor] | str | Path, *, what: str
) -> dict[str, Tensor]:
    """Returns name -> tensor of a mapping or a ``.safetensors`` file.

    Raises:
        AdapterError: If the file is missing, a pickle, or damaged.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    refuse_pickle(path, what=what)
    if not path.is_file():
        raise AdapterError(
            f"{what}: {path} is not a file", hint="give a .safetensors file or a mapping"
        )
    return load_safetensors(path, what=what)


def load_named_weights(
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    optional: frozenset[str],
    rename: Rename | None,
    what: str,
) -> None:
    """Copies weights into tensors of the same names, all of them or none.

    Args:
        targets: Name -> tensor; changed in place.
        weights: Name -> new values.
        optional: Names that may be missing from ``weights``.
        rename: Applied to the names in ``weights`` first.
        what: Who asks, for the message.

    Raises:
        AdapterError: Listing every name that is missing, unknown or doubled, and every value
            of another shape, not in floating point, or not finite.
    """
    faults: list[str] = []
    renamed: dict[str, Tensor] = {}
    for old, tensor in weights.items():
        new = rename(old) if rename is not None else old
        if new is None:
            continue
        called = repr(old) if new == old else f"{old!r} (renamed to {new!r})"
        if new not in targets:
            faults.append(f"{called} is not a weight of this adapter")
        elif new in renamed:
            faults.append(f"{called} comes twice")
        else:
            renamed[new] = tensor
            fault = _fault(tensor, targets[new])
            if fault:
                faults.append(f"{called} {fault}")
    faults += [
        f"{name!r} is missing" for name in targets if name not in renamed and name not in optional
    ]
    if faults:
        shown = faults[:_MOST_FAULTS_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more")
        raise AdapterError(
            f"{what}: the weights do not fit, nothing was loaded: " + "; ".join(shown),
            hint=f"its weights are {', '.join(targets)}",
        )
    with torch.no_grad():
        for name, tensor in renamed.items():
            targets[name].copy_(tensor)


def _fault(found: object, target: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"is a {type(found).__name__}, expected a tensor"
    if found.shape != target.shape:
        return f"has shape {list(found.shape)}, expected {list(target.shape)}"
    if target.is_floating_point() and not found.is_floating_point():
        return f"is {found.dtype}, expected floating point"
    if not target.is_floating_point() and found.dtype != target.dtype:
        return f"is {found.dtype}, expected {target.dtype}"
    if found.is_floating_point() and not torch.isfinite(found).all():
        return "holds NaN or infinite values"
    return None

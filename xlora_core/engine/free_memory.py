"""How much memory is free: on the machine, in the container, on the GPU."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil
import torch
from torch import nn

_ROOT = Path("/")


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that may still be allocated where a model computes.

    On a GPU what the driver has left and what PyTorch holds without using it; elsewhere what the
    machine has available, or what the container's limit leaves if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    return min(int(psutil.virtual_memory().available), *container_free_bytes())


def has_room_for_copy(model: nn.Module) -> bool:
    """Whether a model's parameters fit twice into the machine's free memory."""
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return 2 * n_bytes <= free_bytes(torch.device("cpu"))


def container_free_bytes(root: Path = _ROOT) -> list[int]:
    """Returns what each memory limit over this process leaves; control groups of both versions.

    Files that the kernel only keeps in memory as long as there is room for them do not count as
    used.

    Args:
        root: The root of the file system.
    """
    left = []
    for folder, limit_file, used_file, reclaimable in _groups(root):
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None:
            left.append(max(limit - used + _statistic(folder / "memory.stat", reclaimable), 0))
    return left


def _groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """Returns the folders of this process's groups and all around them, with their file names."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    mounted = root / "sys/fs/cgroup"
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            top = mounted
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = mounted / "memory"
        else:
            continue
        # A container often sees its own group as the top, under a path from outside.
        own = PurePosixPath(path.lstrip("/"))
        found += [(top / parent, *names) for parent in (own, *own.parents)]
    return found


def _number(file: Path) -> int | None:
    """Returns the number in a file; None if there is no such file, or it says ``max``."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    """Returns a line ``name number`` of a file; 0 if there is none."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0

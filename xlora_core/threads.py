"""How many threads PyTorch may compute with, and whose they are."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from xlora_core.errors import ConfigError

# Where either is set, PyTorch has followed it already.
_USER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_Result = TypeVar("_Result")


def apart(work: Callable[[], _Result], *, name: str = "xlora-apart") -> _Result:
    """Does work in a thread of its own, and waits for it.

    The first large operation of a thread starts OpenMP threads that help this one thread, and they
    stay as long as it does. GNU's OpenMP counts those of all threads: as soon as there are more
    than cores, none of them spins while it waits any longer, and every operation waits for the
    system to wake its helpers. On two cores the matrix products of a decode step took 23 ms beside
    nobody, and 40 ms beside the idle helper that loading the model had left behind. Work that is
    done apart leaves none behind.

    Ctrl-C while it waits ends the work, too. Where the system has no thread left, the work is done
    in this one.

    Args:
        work: What is done. The current CUDA device is this thread's; PyTorch's modes that belong
            to a thread (``no_grad``) are not on.
        name: The thread's.

    Returns:
        What it returns. What it raises is raised here.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # none

    def do() -> None:
        try:
            with torch.cuda.device(device):
                results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=do, name=name)
    try:
        thread.start()
    except RuntimeError:
        return work()
    try:
        # Not join: what interrupts that makes Python 3.11 take the thread for ended, and the
        # process would end while PyTorch computes in it, which aborts.
        ended.wait()
    except BaseException:
        _interrupt(thread)
        while thread.is_alive() and not ended.wait(0.1):
            pass  # it may be interrupted just before it says that it has ended
        raise
    thread.join()
    if errors:
        raise errors.pop()  # kept nowhere: it holds the frames it was raised in
    return results.pop()


def _interrupt(thread: threading.Thread) -> None:
    """Raises KeyboardInterrupt in a thread: Ctrl-C itself reaches the main thread alone."""
    identity, error = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, error)


def set_threads(n_threads: int | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Sets how many threads an operation on the CPU uses; for programs, not for libraries.

    Args:
        n_threads: The number; None leaves what ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` says,
            and is ``usable_cores()`` at the most where they say nothing.
        environ: The environment.

    Returns:
        The number that holds.

    Raises:
        ConfigError: If it is below 1, or more than the process has processors.
    """
    if n_threads is not None:
        n_processors = len(processors())
        if not 1 <= n_threads <= n_processors:
            raise ConfigError(
                f"threads must be a number from 1 to {n_processors}, the processors that this "
                f"process may use, got {n_threads}",
                hint=f"leave it out: it is {usable_cores()} then, one thread for each free core",
            )
        torch.set_num_threads(n_threads)
    elif not any(environ.get(name) for name in _USER_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return torch.get_num_threads()


def usable_cores(root: Path = Path("/")) -> int:
    """Returns how many cores' worth of computing this process can have, at least 1.

    That is its processors without second threads of a core, which add nothing to matrix
    products, and no more than its container's quota: threads beyond that are stopped together.

    Args:
        root: Where the system's ``sys`` and ``proc`` are.
    """
    cores = {_core(root, processor) for processor in processors()}
    return max(1, min([len(cores), *_quotas(root)]))


def processors() -> set[int]:
    """Returns the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core(root: Path, processor: int) -> tuple[str, ...]:
    """Returns what the processors of one core have in common."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        return tuple(
            (topology / name).read_text().strip() for name in ("physical_package_id", "core_id")
        )
    except OSError:
        return (str(processor),)


def _quotas(root: Path) -> Iterator[int]:
    """Yields the cores that each control group of this process is allowed."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = mount / path.strip("/")
        # The limit may stand on any group above; inside a container the path may not exist.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            try:
                quota, period = " ".join((folder / name).read_text() for name in names).split()
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                yield max(1, int(quota) // int(period))

"""How many threads compute: no more than the process has cores, and none for nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from xlora_core import threads
from xlora_core.errors import ConfigError


@pytest.fixture(autouse=True)
def threads_are_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: set(range(8)))


def write(root: Path, path: str, content: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n")


def two_processors_a_core(root: Path) -> None:
    for processor in range(8):
        topology = f"sys/devices/system/cpu/cpu{processor}/topology"
        write(root, f"{topology}/physical_package_id", str(processor // 4))
        write(root, f"{topology}/core_id", str(processor % 2))


@pytest.mark.usefixtures("eight")
def test_processors_of_one_core_count_once(tmp_path: Path) -> None:
    assert threads.usable_cores(tmp_path) == 8  # a system that says nothing
    two_processors_a_core(tmp_path)
    assert threads.usable_cores(tmp_path) == 4


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1)]
)
def test_a_containers_quota_holds(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", quota)
    assert threads.usable_cores(tmp_path) == cores


@pytest.mark.usefixtures("eight")
def test_the_least_of_nested_quotas_holds(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/user.slice/app")
    write(tmp_path, "sys/fs/cgroup/user.slice/app/cpu.max", "500000 100000")
    write(tmp_path, "sys/fs/cgroup/user.slice/cpu.max", "200000 100000")
    assert threads.usable_cores(tmp_path) == 2


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("250000", 2)])
def test_the_first_version_of_control_groups_is_read(
    tmp_path: Path, quota: str, cores: int
) -> None:
    # Inside a container the path is the host's, and does not exist.
    write(tmp_path, "proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota)
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert threads.usable_cores(tmp_path) == cores


def test_this_machine_has_a_core() -> None:
    assert 1 <= threads.usable_cores() <= len(threads.processors())


@pytest.mark.usefixtures("eight")
def test_a_given_number_is_set_and_one_out_of_range_refused() -> None:
    assert threads.set_threads(2) == torch.get_num_threads() == 2
    for wrong in (0, 9):
        with pytest.raises(ConfigError, match=f"a number from 1 to 8, .*, got {wrong}"):
            threads.set_threads(wrong)
    assert torch.get_num_threads() == 2


def test_no_more_threads_than_cores_unless_the_user_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    torch.set_num_threads(3)
    assert threads.set_threads(environ={"OMP_NUM_THREADS": "3"}) == 3
    assert threads.set_threads(environ={"OMP_NUM_THREADS": ""}) == 2
    torch.set_num_threads(1)
    assert threads.set_threads(environ={}) == 1


# -------------------------------------------------------------------- work apart


def test_what_is_done_apart_comes_back() -> None:
    with torch.no_grad():  # holds for this thread alone
        name, grad = threads.apart(
            lambda: (threading.current_thread().name, torch.is_grad_enabled()), name="elsewhere"
        )
    assert (name, grad) == ("elsewhere", True)
    assert threads.apart(lambda: None) is None


def test_what_fails_apart_fails_here() -> None:
    fault = ConfigError("no such thing")

    def fail() -> None:
        raise fault

    with pytest.raises(ConfigError) as caught:
        threads.apart(fail, name="elsewhere")
    assert caught.value is fault
    assert "elsewhere" not in {thread.name for thread in threading.enumerate()}


def test_the_current_cuda_device_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert threads.apart(entered.copy) == [3]


def test_without_a_thread_left_the_work_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert threads.apart(threading.current_thread) is threading.current_thread()


# Tells that work has begun that never ends, and how it ended.
_ENDLESS = """
import signal, torch
from xlora_core.threads import apart

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

def multiply():
    large = torch.ones(256, 256)
    try:
        print("begun", flush=True)
        while True:
            large @ large
    finally:
        print("ended", flush=True)

try:
    apart(multiply)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_interrupt_ends_the_work_before_the_process_goes_on() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert out.split() == ["ended", "interrupted"]
    assert process.returncode == 0  # PyTorch does not abort


# Prints how many of the process's threads are nobody's: before anything, while a thread that has
# multiplied is there, and when several such threads have ended. PyTorch itself starts one, once.
_HELPERS = """
import os, threading, time, torch
from xlora_core.threads import apart

def helpers():
    threads = {int(name) for name in os.listdir("/proc/self/task")}
    return len(threads - {thread.native_id for thread in threading.enumerate()})

def multiply():
    torch.set_num_threads(2)
    large = torch.ones(512, 512)
    for _ in range(20):
        large @ large
    return helpers()

before = helpers()
during = [apart(multiply) for _ in range(6)]
deadline = time.monotonic() + 60  # they end soon after the thread that they helped
while helpers() > before + 1 and time.monotonic() < deadline:
    os.sched_yield()
print(before, max(during), helpers())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists the threads")
def test_work_that_is_done_apart_leaves_no_helpers_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HELPERS], check=True, capture_output=True, text=True
    )
    before, during, after = map(int, done.stdout.split())
    assert before + 1 < during
    assert after <= before + 1

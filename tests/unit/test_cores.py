"""How many threads compute: no more than the process has cores, or its container allows."""

from __future__ import annotations

from collections.abc import Iterator
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

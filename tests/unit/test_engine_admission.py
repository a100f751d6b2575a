"""Admission by memory: what rows will take, who fits beside whom, who never will."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xlora_core.engine import admission as admission_module
from xlora_core.engine.admission import Admission, MemoryBudget, Need
from xlora_core.engine.free_memory import container_free_bytes, free_bytes
from xlora_core.errors import ConfigError
from xlora_core.rows import BlockShape, RowCache

MIB = 2**20


def need(n_rows: int, n_tokens: int, record_bytes: int = 0) -> Need:
    return Need(n_rows=n_rows, n_tokens=n_tokens, record_bytes=record_bytes)


def test_rows_are_as_long_as_the_longest_and_are_used_again() -> None:
    books = Admission(MemoryBudget(10_000), bytes_per_token=10)
    books.admit("long", need(2, 100))
    assert books.used_bytes == 2 * 100 * 10
    books.admit("short", need(1, 5))
    assert books.used_bytes == 3 * 100 * 10
    books.release("long")
    books.admit("other", need(2, 80, record_bytes=7))
    assert books.used_bytes == 3 * 100 * 10 + 7
    books.release("short")
    books.release("other")
    books.release("never there")
    assert books.used_bytes == 0


def test_a_block_that_grows_needs_room_for_the_old_one_too() -> None:
    books = Admission(MemoryBudget(4_999), bytes_per_token=10)
    books.admit("first", need(2, 100))  # 2000
    assert not books.fits(need(1, 100))  # 3000 new beside 2000 old
    books = Admission(MemoryBudget(5_000), bytes_per_token=10)
    books.admit("first", need(2, 100))
    assert books.fits(need(1, 100))
    assert not books.fits(need(1, 101))
    assert not books.fits(need(1, 100, record_bytes=1))


def test_what_needs_no_growth_fits_at_any_size_of_the_block() -> None:
    books = Admission(MemoryBudget(2_000), bytes_per_token=10)
    books.admit("first", need(1, 100))
    books.admit("second", need(1, 100))
    books.release("first")
    assert books.fits(need(1, 100))
    assert not books.fits(need(2, 100))


def test_positions_come_in_blocks() -> None:
    books = Admission(MemoryBudget(10_000), bytes_per_token=1, token_block=256)
    books.admit("one", need(2, 257))
    assert books.used_bytes == 2 * 512


def test_caches_of_their_own_add_up() -> None:
    books = Admission(MemoryBudget(3_000), bytes_per_token=10, one_block=False)
    books.admit("first", need(2, 100, record_bytes=50))
    assert books.used_bytes == 2_050
    assert books.fits(need(1, 95))
    assert not books.fits(need(1, 96))
    books.release("first")
    assert books.fits(need(3, 100))


def test_what_never_fits_is_refused_with_its_size() -> None:
    books = Admission(MemoryBudget(100 * MIB), bytes_per_token=23_040)
    books.check(need(2, 2_048))
    with pytest.raises(ConfigError) as caught:
        books.check(need(6, 2_048, record_bytes=MIB))
    assert caught.value.message == (
        "the request may need 271 MiB of memory (6 rows of 2,048 tokens), more than the 100 MiB "
        "that all requests of this engine may take together"
    )
    for word in ("max_new_tokens", "prompt", "arms", "memory_bytes"):
        assert word in caught.value.hint


def test_small_sizes_are_not_rounded_to_nothing() -> None:
    with pytest.raises(ConfigError, match=r"need 0\.19 MiB .* more than the 0\.00095 MiB"):
        Admission(MemoryBudget(1_000), bytes_per_token=100).check(need(2, 1_000))


def test_whoever_runs_does_not_change_what_can_ever_fit() -> None:
    books = Admission(MemoryBudget(1_000), bytes_per_token=1)
    books.admit("all", need(1, 1_000))
    books.check(need(1, 1_000))
    assert not books.fits(need(1, 1_000))
    books.release("all")
    assert books.fits(need(1, 1_000))


NEEDS = st.builds(
    need, n_rows=st.integers(1, 6), n_tokens=st.integers(1, 40), record_bytes=st.integers(0, 500)
)


@given(
    steps=st.lists(st.tuples(NEEDS, st.integers(0, 9)), max_size=25),
    total=st.integers(0, 20_000),
    row_block=st.sampled_from([1, 4]),
    token_block=st.sampled_from([1, 16]),
    keeps_block=st.booleans(),
)
def test_a_real_cache_never_takes_more_than_the_budget(
    steps, total, row_block, token_block, keeps_block
) -> None:
    """The books follow a cache that grows as the engine's does; its peak stays in the budget."""
    cache = RowCache([BlockShape(n_heads=1, key_size=2, value_size=3)], dtype=torch.float32)
    books = Admission(
        MemoryBudget(total),
        cache.bytes_per_token,
        row_block=row_block,
        token_block=token_block,
        keeps_block=keeps_block,
    )
    running: dict[int, Need] = {}
    for number, (wanted, leaver) in enumerate(steps):
        if books.fits(wanted):
            books.check(wanted)
            before = cache.n_rows * cache.n_tokens
            n_used = sum(other.n_rows for other in running.values())
            n_rows = -(-(n_used + wanted.n_rows) // row_block) * row_block
            cache.grow(n_rows, -(-wanted.n_tokens // token_block) * token_block)
            books.admit(number, wanted)
            running[number] = wanted
            places = cache.n_rows * cache.n_tokens
            peak = places + (before if places > before else 0)
            records = sum(other.record_bytes for other in running.values())
            assert peak * cache.bytes_per_token + records <= total
            held = sum(t.nbytes for t in (*cache.keys, *cache.values)) + records
            assert books.used_bytes == held
        elif not running:
            cache = RowCache([BlockShape(n_heads=1, key_size=2, value_size=3)], dtype=torch.float32)
            books.forget_block()
            if books.fits(wanted):  # only what was kept for nobody stood in the way
                assert keeps_block
                books.check(wanted)
            else:
                with pytest.raises(ConfigError):
                    books.check(wanted)
        if leaver in running:
            del running[leaver]
            books.release(leaver)
        if not running and not keeps_block:
            cache = RowCache([BlockShape(n_heads=1, key_size=2, value_size=3)], dtype=torch.float32)
            assert books.used_bytes == 0


# -------------------------------------------------------------------- what is free


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_limits_nothing_is_found(tmp_path) -> None:
    assert container_free_bytes(tmp_path) == []
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/memory.current": "5\n",
        },
    )
    assert container_free_bytes(tmp_path) == []


def test_every_limit_above_a_process_counts(tmp_path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/box/job\n",
            "sys/fs/cgroup/box/job/memory.max": "1000\n",
            "sys/fs/cgroup/box/job/memory.current": "400\n",
            "sys/fs/cgroup/box/job/memory.stat": "anon 300\ninactive_file 50\nactive_file 9\n",
            "sys/fs/cgroup/box/memory.max": "900\n",
            "sys/fs/cgroup/box/memory.current": "950\n",
        },
    )
    assert sorted(container_free_bytes(tmp_path)) == [0, 650]


def test_a_container_that_sees_its_group_as_the_top(tmp_path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/0123\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "400\n",
        },
    )
    assert container_free_bytes(tmp_path) == [600]


def test_groups_of_the_first_version(tmp_path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/job\n7:memory:/job\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "600\n",
            "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
        },
    )
    assert container_free_bytes(tmp_path) == [1500]


def test_the_budget_is_a_share_of_what_is_free(monkeypatch) -> None:
    monkeypatch.setattr(admission_module, "free_bytes", lambda device: 1_000)
    assert MemoryBudget.of_free_memory(torch.device("cpu")).total_bytes == 500
    assert MemoryBudget.of_free_memory(torch.device("cuda")).total_bytes == 800


def test_what_is_free_here_is_less_than_what_there_is() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total

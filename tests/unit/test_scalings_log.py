"""The log: entries link to the rows before them, and give what PEFT's whole tensors give."""

from __future__ import annotations

import torch

from xlora_core.scalings_log import LogEntry, ScalingsLog


def rows(tokens: int, *, batch: int = 2, start: int = 0) -> torch.Tensor:
    """``[B, T, 1, 1]`` whose value is ``100 * row + token``."""
    return (100.0 * torch.arange(batch).view(-1, 1) + torch.arange(start, start + tokens)).reshape(
        batch, tokens, 1, 1
    )


def generation(*sizes: int) -> list[LogEntry]:
    """The entries of forward calls that read ``sizes`` tokens each into one cache."""
    entries: list[LogEntry] = []
    start = 0
    for size in sizes:
        entries.append(LogEntry(rows(size, start=start), entries[-1] if entries else None))
        start += size
    return entries


def test_an_entry_gives_all_tokens_so_far() -> None:
    entries = generation(4, 1, 1)
    assert [entry.tensor().shape[1] for entry in entries] == [4, 5, 6]
    assert torch.equal(entries[2].tensor(), rows(6))


def test_selecting_moves_whole_rows() -> None:
    entry = generation(3, 1)[-1].select(torch.tensor([1, 1, 0]))
    assert entry.before is None
    assert torch.equal(entry.tensor(), rows(4)[[1, 1, 0]])


def test_nothing_is_kept_until_enabled_but_the_latest_is_known() -> None:
    log = ScalingsLog()
    assert log.latest() is None
    first, second = generation(3, 1)
    log.add(first)
    assert log.tensors() == []
    assert torch.equal(log.latest(), rows(3))
    log.enabled = True
    log.add(second)
    assert [t.shape[1] for t in log.tensors()] == [4]
    assert torch.equal(log.latest(), rows(4))


def test_interleaved_generations_keep_their_own_rows() -> None:
    log = ScalingsLog()
    log.enabled = True
    a, b = generation(3, 1, 1), generation(2, 2)
    for entry in (a[0], b[0], a[1], b[1], a[2]):
        log.add(entry)
    assert [t.shape[1] for t in log.tensors()] == [3, 2, 4, 4, 5]
    for entry, tensor in zip((a[0], b[0], a[1], b[1], a[2]), log.tensors(), strict=True):
        assert torch.equal(tensor, entry.tensor())


def test_beams_that_change_places_keep_what_was_logged_before() -> None:
    log = ScalingsLog()
    log.enabled = True
    (first,) = generation(2)
    log.add(first)
    moved = first.select(torch.tensor([1, 0]))
    second = LogEntry(rows(1, start=2), moved)
    log.add(second)
    before, after = log.tensors()
    assert torch.equal(before, rows(2))
    assert torch.equal(after[:, :2], rows(2).flip(0))
    assert torch.equal(after[:, 2:], rows(1, start=2))


def test_the_tensors_of_one_generation_share_their_memory() -> None:
    log = ScalingsLog()
    log.enabled = True
    for entry in generation(5, *[1] * 20):
        log.add(entry)
    storages = {tensor.untyped_storage().data_ptr() for tensor in log.tensors()}
    assert len(storages) == 1


def test_buckets_by_sequence_length() -> None:
    log = ScalingsLog()
    log.enabled = True
    for entry in (*generation(3, 1), *generation(3), *generation(4)):
        log.add(entry)
    buckets = log.bucketed()
    assert {length: positions for length, (positions, _) in buckets.items()} == {
        3: [0, 2],
        4: [1, 3],
    }
    assert all(t.shape[1] == length for length, (_, ts) in buckets.items() for t in ts)

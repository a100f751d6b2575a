"""The queue: turns between clients, bounds, positions, and who may overtake whom."""

from __future__ import annotations

import pytest

from xlora_core.engine.queue import FairQueue
from xlora_core.errors import QueueFullError


def filled(*items: str, max_size: int = 20) -> FairQueue[str]:
    """Returns a queue of requests such as ``"a1"`` of client a; ``"-1"`` has none."""
    queue: FairQueue[str] = FairQueue(max_size, max_per_client=max_size)
    for item in items:
        queue.push(item, client=None if item[0] == "-" else item[0])
    return queue


def taken(queue: FairQueue[str]) -> list[str]:
    order = []
    while (item := queue.take()) is not None:
        order.append(item)
    return order


def test_clients_take_turns() -> None:
    queue = filled("a1", "a2", "a3", "b1", "b2", "c1")
    assert list(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert taken(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(queue) == 0


def test_without_clients_it_is_first_come_first_served() -> None:
    assert taken(filled("-1", "-2", "-3")) == ["-1", "-2", "-3"]
    assert taken(filled("a1", "a2", "-1", "-2")) == ["a1", "-1", "-2", "a2"]


def test_a_client_of_the_name_of_a_request_is_another_one() -> None:
    queue: FairQueue[str] = FairQueue(4)
    queue.push("x")
    queue.push("y", client="x")
    queue.push("z", client="x")
    assert taken(queue) == ["x", "y", "z"]


def test_a_newcomer_waits_for_one_round_only() -> None:
    queue = filled("a1", "a2", "a3", "b1")
    assert queue.take() == "a1"
    queue.push("c1", client="c")
    assert taken(queue) == ["b1", "a2", "c1", "a3"]


def test_positions_are_the_order_of_service() -> None:
    queue = filled("a1", "a2", "b1")
    assert [queue.position(item) for item in ("a1", "b1", "a2", "c1")] == [1, 2, 3, 0]
    queue.take()
    assert [queue.position(item) for item in ("a1", "b1", "a2")] == [0, 1, 2]


def test_a_removed_request_is_gone_and_the_others_keep_their_order() -> None:
    queue = filled("a1", "a2", "b1", "c1")
    assert queue.remove("a1")
    assert not queue.remove("a1")
    assert "a1" not in queue
    assert "a2" in queue
    assert queue.remove("b1")
    assert list(queue) == ["a2", "c1"]
    assert queue.clear() == ["a2", "c1"]
    assert (len(queue), queue.take()) == (0, None)


def test_a_full_queue_refuses_and_says_how_full_it_is() -> None:
    queue = filled("-1", "-2", max_size=2)
    with pytest.raises(QueueFullError, match="full: 2 requests are waiting already") as caught:
        queue.push("-3")
    assert "max_queue" in caught.value.hint
    assert list(queue) == ["-1", "-2"]
    queue.take()
    queue.push("-3")
    assert list(queue) == ["-2", "-3"]


def test_one_client_leaves_places_to_others() -> None:
    queue: FairQueue[str] = FairQueue(5)
    for n in range(3):
        queue.push(f"a{n}", client="a")
    with pytest.raises(QueueFullError, match="3 requests of client 'a' are waiting already"):
        queue.push("a3", client="a")
    queue.push("b0", client="b")
    queue.push("-0")
    assert len(queue) == 5


def test_what_does_not_fit_is_overtaken_only_so_often() -> None:
    queue: FairQueue[str] = FairQueue(20, max_overtaken=2)
    for item in ("big", "s1", "s2", "s3"):
        queue.push(item)

    def small(item: str) -> bool:
        return item != "big"

    assert [queue.take(small) for _ in range(4)] == ["s1", "s2", None, None]
    assert list(queue) == ["big", "s3"]
    assert taken(queue) == ["big", "s3"]


def test_nobody_is_counted_as_overtaken_when_nobody_went() -> None:
    queue: FairQueue[str] = FairQueue(20, max_overtaken=1)
    queue.push("big")
    for _ in range(5):
        assert queue.take(lambda item: False) is None
    queue.push("s1")
    assert queue.take(lambda item: item != "big") == "s1"


def test_a_request_may_be_removed_while_it_is_looked_at() -> None:
    """As by the collector: the one that is asked about, the one before, the one behind."""
    for removed, expected in (("a1", "b1"), ("b1", "a1"), ("a2", "a1")):
        queue = filled("a1", "a2", "b1")

        def fits(item: str, removed: str = removed, queue: FairQueue[str] = queue) -> bool:
            queue.remove(removed)
            return item not in ("a1", "a2") or removed != "a1"

        assert queue.take(fits) == expected
        assert sorted(queue) == sorted({"a1", "a2", "b1"} - {removed, expected})


def test_within_a_client_nobody_overtakes() -> None:
    queue = filled("a1", "a2", "b1", "b2")
    assert queue.take(lambda item: item != "a1") == "b1"
    assert queue.take(lambda item: item not in ("a1", "b2")) is None
    assert list(queue) == ["a1", "b2", "a2"]

"""Laws of the queue, over random submissions, services, removals and requests that do not fit."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xlora_core.engine.queue import FairQueue
from xlora_core.errors import QueueFullError

MAX_SIZE = 7
MAX_OVERTAKEN = 3
CLIENTS = st.sampled_from([None, "a", "b", "c"])


class Queueing(RuleBasedStateMachine):
    """A queue beside what happened to every request."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(MAX_SIZE, max_overtaken=MAX_OVERTAKEN)
        self.n_submitted = 0
        self.waiting: dict[int, str | None] = {}  # in order of arrival
        self.gone: set[int] = set()
        # Turns of other clients since a client's last turn, while it waits.
        self.turns_since: dict[object, dict[object, int]] = {}
        self.overtaken: dict[object, int] = {}

    def owner(self, item: int) -> object:
        return self.waiting[item] or item

    @rule(client=CLIENTS)
    def submit(self, client: str | None) -> None:
        item = self.n_submitted
        n_own = sum(c == client for c in self.waiting.values()) if client else 0
        full = len(self.waiting) >= MAX_SIZE or n_own >= self.queue.max_per_client
        try:
            self.queue.push(item, client)
        except QueueFullError:
            assert full
            return
        assert not full
        self.n_submitted += 1
        self.waiting[item] = client
        self.turns_since.setdefault(self.owner(item), {})

    @rule()
    def serve(self) -> None:
        expected = next(iter(self.queue), None)
        item = self.queue.take()
        assert item == expected
        if item is not None:
            self.note_turn(item)

    @rule(too_big=st.sets(st.integers(0, 30)))
    def serve_what_fits(self, too_big: set[int]) -> None:
        before = list(self.queue)
        item = self.queue.take(lambda item: item not in too_big)
        if item is None:
            # Nobody fits, or somebody has been overtaken often enough.
            heads = self.heads(before)
            fitting = next((n for n, i in enumerate(heads) if i not in too_big), None)
            passed = [self.overtaken.get(self.owner(i), 0) for i in heads[:fitting]]
            assert fitting is None or MAX_OVERTAKEN in passed
            return
        assert item not in too_big
        for other in self.heads(before[: before.index(item)]):
            if other == item:
                break
            client = self.owner(other)
            self.overtaken[client] = self.overtaken.get(client, 0) + 1
            assert self.overtaken[client] <= MAX_OVERTAKEN
        self.note_turn(item)

    def heads(self, order: list[int]) -> list[int]:
        """Returns the first request of each client, in the order of service."""
        heads: dict[object, int] = {}
        for item in order:
            heads.setdefault(self.owner(item), item)
        return list(heads.values())

    def note_turn(self, item: int) -> None:
        client = self.owner(item)
        own = [i for i in self.waiting if self.owner(i) == client]
        assert item == own[0], "within a client, first come, first served"
        for other, turns in self.turns_since.items():
            if other != client:
                turns[client] = turns.get(client, 0) + 1
        self.forget(item)
        self.overtaken.pop(client, None)
        self.turns_since[client] = {}
        if len(own) == 1:
            del self.turns_since[client]

    def forget(self, item: int) -> None:
        assert item not in self.gone, "nothing is served twice"
        del self.waiting[item]
        self.gone.add(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.waiting)))
        rest = [other for other in self.queue if other != item]
        client = self.owner(item)
        n_own = sum(self.owner(i) == client for i in self.waiting)
        assert self.queue.remove(item)
        assert not self.queue.remove(item)
        if n_own == 1:
            assert list(self.queue) == rest
            del self.turns_since[client]
            self.overtaken.pop(client, None)
        self.forget(item)

    @invariant()
    def nothing_is_lost_and_positions_are_the_order(self) -> None:
        order = list(self.queue)
        assert sorted(order) == sorted(self.waiting)
        assert len(self.queue) == len(order)
        assert [self.queue.position(item) for item in order] == list(range(1, len(order) + 1))
        assert all(self.queue.position(item) == 0 for item in self.gone)

    @invariant()
    def turns_are_fair(self) -> None:
        """At most one turn of each other between two of one, and what overtaking allows."""
        for turns in self.turns_since.values():
            assert sum(max(n - 1, 0) for n in turns.values()) <= MAX_OVERTAKEN


class FittingQueueing(Queueing):
    """Everything fits: nobody is overtaken at all."""

    @precondition(lambda self: False)
    @rule()
    def serve_what_fits(self) -> None:  # type: ignore[override]  # takes the rule away
        raise AssertionError

    @invariant()
    def turns_are_fair(self) -> None:
        for turns in self.turns_since.values():
            assert max(turns.values(), default=0) <= 1


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFittingQueueing = FittingQueueing.TestCase
TestFittingQueueing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

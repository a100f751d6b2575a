"""The queue of waiting requests: bounded, and fair between clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from itertools import zip_longest
from typing import Generic, TypeVar

from xlora_core.errors import QueueFullError

_Item = TypeVar("_Item", bound=Hashable)

# Times that somebody whose request does not fit now lets smaller ones go first.
MAX_OVERTAKEN = 4


class FairQueue(Generic[_Item]):
    """Clients take turns, a request each; within a client, first come, first served.

    A client joins at the end of the round when its first request comes, and goes there after each
    of its turns. So between two turns of one client every other client that waits has exactly
    one, however many requests a client has put in. A request without a client is a client of its
    own: with such requests alone this is first come, first served.

    A client whose request does not fit yet (see ``take``) may be overtaken by clients after it,
    but only ``max_overtaken`` times: then everybody waits for it. Within a client nobody overtakes.

    There are no locks inside: whoever owns the queue holds one of its own around every call.
    Walking through the queue leaves it free to be changed.

    Args:
        max_size: Most requests that wait, >= 1.
        max_per_client: Most that wait of one named client, so that nobody else is shut out by it;
            half of ``max_size``, rounded up, if None.
        max_overtaken: Times that a client may be overtaken between two turns of it.
    """

    def __init__(
        self,
        max_size: int,
        *,
        max_per_client: int | None = None,
        max_overtaken: int = MAX_OVERTAKEN,
    ) -> None:
        self.max_size = max_size
        self.max_per_client = -(-max_size // 2) if max_per_client is None else max_per_client
        self._max_overtaken = max_overtaken
        # Client -> its requests. The order of the clients is that of their next turns.
        self._clients: dict[Hashable, deque[_Item]] = {}
        # Client -> how often others that came after it have gone first since its last turn.
        self._n_overtaken: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[_Item]:
        """Yields the requests in the order in which they will be served."""
        for turns in zip_longest(*map(tuple, list(self._clients.values()))):
            yield from (item for item in turns if item is not None)

    def __contains__(self, item: object) -> bool:
        return any(item in waiting for waiting in list(self._clients.values()))

    def push(self, item: _Item, client: str | None = None) -> None:
        """Adds a request.

        Args:
            item: The request; not None, and not one that waits already.
            client: Whose it is; None: nobody else's.

        Raises:
            QueueFullError: If the queue, or the client's part of it, is full.
        """
        if len(self) >= self.max_size:
            raise QueueFullError(
                f"the queue is full: {self.max_size} requests are waiting already",
                hint="try again when one of them has finished, or start the engine with a larger "
                "max_queue",
            )
        # A name never equals the key of a request that came without one.
        key: Hashable = ("request", item) if client is None else ("client", client)
        waiting = self._clients.setdefault(key, deque())
        if client is not None and len(waiting) >= self.max_per_client:
            raise QueueFullError(
                f"{len(waiting)} requests of client {client!r} are waiting already; the other "
                "places of the queue are for others",
                hint="try again when one of them has finished, or start the engine with a larger "
                "max_queue",
            )
        waiting.append(item)

    def take(self, fits: Callable[[_Item], bool] | None = None) -> _Item | None:
        """Takes the next request out of the queue; None if nobody may go.

        Args:
            fits: Whether there is room for a request now; None: for all.
        """
        passed: list[Hashable] = []
        for key, waiting in list(self._clients.items()):
            first = waiting[0] if waiting else None
            if first is None:
                continue
            fitting = fits is None or fits(first)
            if first not in waiting:
                continue
            if fitting:
                for other in passed:
                    if other in self._clients:
                        self._n_overtaken[other] = self._n_overtaken.get(other, 0) + 1
                self._end_turn(key, first)
                return first
            if self._n_overtaken.get(key, 0) >= self._max_overtaken:
                return None
            passed.append(key)
        return None

    def _end_turn(self, key: Hashable, first: _Item) -> None:
        """Takes a client's first request out and puts the client at the end of the round."""
        waiting = self._clients.pop(key)
        self._n_overtaken.pop(key, None)
        waiting.remove(first)
        if waiting:
            self._clients[key] = waiting

    def remove(self, item: _Item) -> bool:
        """Takes a request out, wherever it stands; returns whether it was there."""
        for key, waiting in list(self._clients.items()):
            if item in waiting:
                waiting.remove(item)
                if not waiting:
                    self._clients.pop(key, None)
                    self._n_overtaken.pop(key, None)
                return True
        return False

    def position(self, item: _Item) -> int:
        """Returns how manieth a request will be served, 1 is the next; 0 if it does not wait."""
        return next((n for n, waiting in enumerate(self, start=1) if waiting is item), 0)

    def clear(self) -> list[_Item]:
        """Empties the queue; returns what was in it, in the order of service."""
        left = list(self)
        self._clients.clear()
        self._n_overtaken.clear()
        return left

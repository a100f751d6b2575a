"""What runs the model for active requests; the scheduler says when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from xlora_core.engine.active import ActiveRequest
from xlora_core.engine.admission import Admission, MemoryBudget, Need
from xlora_core.engine.requests import Request
from xlora_core.engine.tracks import N_ALTERNATIVES
from xlora_core.errors import EngineError
from xlora_core.recording import bytes_per_token


class Runner(ABC):
    """Reads prompts and writes tokens. Used by one thread at a time, see ``Engine``."""

    @abstractmethod
    def books(self, budget: MemoryBudget) -> Admission:
        """Returns what keeps account of the memory that this runner's caches take."""

    @abstractmethod
    def need(self, request: Request, n_tokens: int) -> Need:
        """Returns the memory that a request asks for.

        Args:
            request: Any request.
            n_tokens: Most tokens of each of its arms, prompt and answer.
        """

    @abstractmethod
    def admit(self, active: ActiveRequest) -> None:
        """Makes room for a request, before anything of it is read."""

    @abstractmethod
    def prefill(self, active: ActiveRequest, n: int | None) -> None:
        """Reads about n more tokens of a request's prompt; after the last, writes a first token.

        Args:
            active: A request whose prompt has more tokens.
            n: How many tokens one run over the weights had better read; None for all of them.

        Raises:
            Exception: Whatever went wrong; concerns this request alone.
        """

    @abstractmethod
    def decode(self, actives: Sequence[ActiveRequest]) -> list[tuple[ActiveRequest, Exception]]:
        """Goes one step on: at most a token more for every arm that writes.

        Arms that have ended are closed once the routing of their last token is known.

        Args:
            actives: Requests whose prompts have been read.

        Returns:
            The requests that failed, with the reason; the others went on.
        """

    @abstractmethod
    def release(self, active: ActiveRequest) -> None:
        """Frees what a request held."""

    @abstractmethod
    def free_cache(self) -> None:
        """Frees what was kept for later requests; called while there is no request."""

    def close(self) -> None:
        """Frees all that is held beside the model; nothing runs afterwards."""
        self.free_cache()


def record_bytes(request: Request, n_tokens: int) -> int:
    """Returns the bytes that the record of a request of so many tokens takes."""
    header = request.header
    return n_tokens * sum(
        bytes_per_token(
            header.n_routed_layers if arm.kind == "routed" else None,
            header.n_adapters,
            N_ALTERNATIVES,
        )
        for arm in request.arms
    )


def check_router_logits(router_logits: Tensor) -> Tensor:
    """Returns router logits unless they hold NaN or infinity.

    Raises:
        EngineError: If they do.
    """
    if not router_logits.isfinite().all():
        raise EngineError(
            "the router's logits are not finite (NaN or infinity)",
            hint="the router is damaged or its training diverged; take an earlier checkpoint",
        )
    return router_logits

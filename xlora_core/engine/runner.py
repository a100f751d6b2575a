"""What runs the model for active requests; the scheduler says when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from xlora_core.engine.active import ActiveRequest
from xlora_core.errors import EngineError


class Runner(ABC):
    """Reads prompts and writes tokens. Used by the engine's thread alone."""

    @abstractmethod
    def admit(self, active: ActiveRequest) -> None:
        """Makes room for a request, before anything of it is read."""

    @abstractmethod
    def prefill(self, active: ActiveRequest, n: int) -> None:
        """Reads about n more tokens of a request's prompt; after the last, writes a first token.

        Args:
            active: A request whose prompt has more tokens.
            n: How many tokens one run over the weights had better read.

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

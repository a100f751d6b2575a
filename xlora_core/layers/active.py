"""How the scalings of a forward call reach the adapted modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from xlora_core.errors import ModelError

if TYPE_CHECKING:
    from xlora_core.layers.experts import XLoraLayer


class ModuleScalings(Protocol):
    """The scalings of one forward call, module by module."""

    def of(self, layer: XLoraLayer, x: Tensor) -> Tensor | None:
        """Returns a module's effective scalings for its input.

        Args:
            layer: The module that asks.
            x: Its input.

        Returns:
            ``[*leading, K]`` where ``leading`` is ``layer.token_shape(x)`` or broadcasts to it;
            None runs the base layer alone.
        """
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors in it that carry a gradient back to the router."""
        ...

    def with_tensors(self, tensors: Sequence[Tensor]) -> ModuleScalings:
        """Returns a copy over other tensors of the same shapes, as ``tensors`` gave them."""
        ...


class TokenScalings:
    """Scalings that are known before the pass, token by token.

    Args:
        scalings: ``[B, T, L or 1, K]``; ``[1, 1, L or 1, K]`` serves all tokens.
        attention_mask: ``[B, T]``, 0 for padding. Matters for modules that see one vector per
            text (a pooler, a classification head): they take the mean over the text's tokens.
    """

    def __init__(self, scalings: Tensor, attention_mask: Tensor | None = None) -> None:
        self._scalings = scalings
        self._mask = attention_mask
        # Once per pass: every module slicing for itself would make the backward pass as wide
        # as the whole tensor once per module.
        self._of_layer = scalings.unbind(dim=-2)

    def of(self, layer: XLoraLayer, x: Tensor) -> Tensor:
        """Returns ``[*leading, K]``, or ``[K]`` or ``[1, 1, K]`` if all tokens share it.

        Raises:
            ModelError: If ``x`` holds other tokens than the scalings.
        """
        of_layer = self._of_layer
        scalings = of_layer[layer.layer_index if len(of_layer) > 1 else 0]  # [B, T, K]
        leading, tokens = layer.token_shape(x), scalings.shape[:-1]
        # One row of positions may serve a whole batch; its mixture differs from text to text.
        if leading in (tokens, (1, *tokens[1:])):
            return scalings
        if tokens.numel() == 1:
            return scalings.flatten()
        if leading == (tokens.numel(),):  # some blocks flatten batch and tokens
            return scalings.flatten(0, 1)
        if leading == tokens[:1]:
            return self._mean_over_tokens(scalings)
        raise ModelError(
            f"adapted module number {layer.layer_index} got input of shape {list(x.shape)}, "
            f"expected {list(tokens)} tokens as in input_ids",
            hint="modules that see other tokens than the scaling pass cannot be routed; leave "
            "them out of the adapters' target_modules",
        )

    def _mean_over_tokens(self, scalings: Tensor) -> Tensor:
        """``[B, T, K]`` -> ``[B, K]``, padding left out."""
        if self._mask is None or self._mask.shape != scalings.shape[:-1]:
            return scalings.mean(dim=1)
        kept = self._mask.to(scalings).unsqueeze(-1)
        return (scalings * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the scalings."""
        return (self._scalings,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> TokenScalings:
        """Returns the same over another tensor."""
        return TokenScalings(tensors[0], self._mask)


class ActiveScalings(threading.local):
    """The scalings of the forward call that runs in this thread.

    The model owns one; its modules read it. Thread-local, so that several threads may call the
    model at once.

    Attributes:
        value: The scalings; None runs every module as its base layer.
        disabled: Whether the adapters are switched off in this thread
            (``XLoraModel.disable_adapter``).
    """

    def __init__(self) -> None:  # runs once in every thread
        self.value: ModuleScalings | None = None
        self.disabled = False

    @contextmanager
    def hold(self, value: ModuleScalings | Tensor | None) -> Iterator[None]:
        """Sets the scalings for the length of a ``with`` block.

        Args:
            value: A tensor is taken as ``TokenScalings``.
        """
        if isinstance(value, Tensor):
            value = TokenScalings(value)
        previous, self.value = self.value, value
        try:
            yield
        finally:
            self.value = previous

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Marks the adapters as switched off for the length of a ``with`` block."""
        previous, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = previous

    def of(self, layer: XLoraLayer, x: Tensor) -> Tensor | None:
        """Returns the scalings of a module for its input, None for the base layer alone."""
        return None if self.value is None else self.value.of(layer, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveScalings:
        copy: ActiveScalings = memo.setdefault(id(self), ActiveScalings())
        return copy

    def __reduce__(self) -> tuple[type[ActiveScalings], tuple[()]]:
        return ActiveScalings, ()

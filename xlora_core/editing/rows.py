"""The rows of a router's last layer when modules or adapters come, go or change places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlora_core.config import XLoraConfig
from xlora_core.config.checks import is_finite
from xlora_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Where each routed module and each adapter comes from.

    Attributes:
        modules: For each routed module from now on its number before; None for a new one.
        adapters: For each adapter from now on its number before; None for a new one.
        n_adapters: K before.
    """

    modules: Sequence[int | None]
    adapters: Sequence[int | None]
    n_adapters: int


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """How the row of a new adapter begins.

    Attributes:
        follows: Whether it is the mean of the rows of the adapters that stay in the module;
            else it is zero.
        bias: What is added to its bias.
    """

    follows: bool
    bias: float


def newcomer_for(config: XLoraConfig, share: float, n_others: int) -> Newcomer:
    """Returns a row with which a new adapter takes at most ``share`` of every token's mass.

    Its logit is the mean of the other adapters' logits plus
    ``softmax_temperature * log(n_others * share / (1 - share))``. The mean of the logits is at
    most the logarithm of the mean of their exponentials, so the softmax gives the new adapter at
    most ``share``, in every module and at every token; exactly ``share`` where the router has no
    preference. The others keep their proportions. A constant logit would have no such bound: the
    new adapter would take over wherever all other logits are low.

    Without a softmax the logits are the scalings, and the new adapter's is ``share`` everywhere.

    Args:
        config: Says which softmax there is.
        share: In (0, 1).
        n_others: Number of adapters that stay.

    Raises:
        ConfigError: If ``share`` is outside (0, 1).
    """
    if not is_finite(share) or not 0 < share < 1:
        raise ConfigError(
            f"share must be a number between 0 and 1, got {share!r}",
            hint="it is the most that the new adapter takes of a token's scalings at first; an "
            "adapter that must not act yet can be muted: model.mute_adapter(name)",
        )
    if not (config.enable_softmax or config.enable_softmax_topk):
        return Newcomer(follows=False, bias=share)
    # A softmax over the kept adapters knows no temperature.
    temperature = config.softmax_temperature if config.enable_softmax else 1.0
    return Newcomer(follows=True, bias=temperature * math.log(n_others * share / (1 - share)))


def moved_rows(
    weight: Tensor, bias: Tensor, moves: Moves, newcomer: Newcomer
) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias with every row at its new place.

    Rows of pairs that stay are copied as they are. In a new module all adapters that stay begin
    at zero.

    Args:
        weight: ``[M * K, in]``, row = module * K + adapter.
        bias: ``[M * K]``.
        moves: Where modules and adapters come from; at least one adapter stays.
        newcomer: How a new adapter begins.

    Returns:
        ``[M' * K', in]`` and ``[M' * K']``, dtype and device as before, without gradient.

    Example:
        >>> weight, bias = torch.tensor([[1.0], [2.0]]), torch.tensor([10.0, 20.0])
        >>> moves = Moves(modules=[0], adapters=[1, None, 0], n_adapters=2)
        >>> moved_rows(weight, bias, moves, Newcomer(follows=True, bias=-3.0))
        (tensor([[2.0000],
                [1.5000],
                [1.0000]]), tensor([20., 12., 10.]))
    """
    table = torch.cat([weight.detach(), bias.detach().unsqueeze(1)], dim=1)  # [M * K, in + 1]
    table = table.unflatten(0, (-1, moves.n_adapters))  # [M, K, in + 1]
    staying = [k for k in moves.adapters if k is not None]
    table = table[:, staying]
    n_modules = table.shape[0]
    table = torch.cat([table, torch.zeros_like(table[:1])])  # one more: a module that is new
    table = table[[n_modules if module is None else module for module in moves.modules]]
    new = table.mean(dim=1, keepdim=True) if newcomer.follows else torch.zeros_like(table[:, :1])
    new[..., -1] += newcomer.bias
    columns = iter(range(len(staying)))
    order = [len(staying) if k is None else next(columns) for k in moves.adapters]
    table = torch.cat([table, new], dim=1)[:, order].flatten(0, 1)
    return table[:, :-1].contiguous(), table[:, -1].contiguous()

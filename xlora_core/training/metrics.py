"""Where a router looks: entropy, mass of each adapter, and how often the right one leads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class RoutingSums:
    """Sums over tokens; batches are added one after the other.

    Attributes:
        tokens: Number of tokens.
        known: Number of those whose domain has an adapter.
        entropy: Sum of each token's mean entropy of a module's scalings, in units of log K.
        mass: ``[K]`` float64, sum of each token's scalings, averaged over modules.
        right_mass: Sum of the mass on the right adapter, over the known tokens.
        right_top: Number of known tokens whose right adapter is stronger than every other.
    """

    tokens: int = 0
    known: int = 0
    entropy: float = 0.0
    mass: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    right_mass: float = 0.0
    right_top: int = 0

    def add(self, scalings: Tensor, targets: Tensor) -> None:
        """Adds the tokens of a batch.

        Args:
            scalings: ``[N, L, K]``.
            targets: Index of each token's right adapter, int64 ``[N]``; below 0, or K and more,
                where there is none.
        """
        n_adapters = scalings.shape[-1]
        scalings = scalings.double()
        mass = scalings.mean(dim=1)  # [N, K]
        shares = scalings / scalings.sum(dim=-1, keepdim=True).clamp_min(1e-9)
        entropy = -torch.special.xlogy(shares, shares).sum(dim=-1).mean(dim=-1)
        known = (targets >= 0) & (targets < n_adapters)
        right = targets[known, None]
        right_mass = mass[known].gather(1, right)
        others = mass[known].scatter(1, right, -math.inf).amax(dim=1, keepdim=True)
        if not len(self.mass):
            self.mass = torch.zeros(n_adapters, dtype=torch.float64)
        self.tokens += len(targets)
        self.known += int(known.sum())
        self.entropy += float(entropy.sum()) / (math.log(n_adapters) if n_adapters > 1 else 1.0)
        self.mass += mass.sum(dim=0).cpu()
        self.right_mass += float(right_mass.sum())
        self.right_top += int((right_mass > others).sum())

    def means(self, adapter_names: Sequence[str]) -> dict[str, float]:
        """Returns means over the tokens: ``entropy`` (1 is uniform), ``mass:<adapter>``.

        ``right_mass`` and ``right_top`` are means over the known tokens, and absent if there are
        none.
        """
        tokens = max(1, self.tokens)
        means = {"entropy": self.entropy / tokens}
        means |= {
            f"mass:{name}": value / tokens
            for name, value in zip(adapter_names, self.mass.tolist(), strict=False)
        }
        if self.known:
            means["right_mass"] = self.right_mass / self.known
            means["right_top"] = self.right_top / self.known
        return means

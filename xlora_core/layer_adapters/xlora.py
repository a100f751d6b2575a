"""Several LoRA experts on one layer, mixed by a gate that reads the layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlora_core import routing
from xlora_core.adapters import LoraWeights
from xlora_core.config import RoutingKnobs
from xlora_core.errors import AdapterError, ConfigError
from xlora_core.gate import Gate
from xlora_core.layer_adapters.adapter import LayerAdapter, adapter_placement
from xlora_core.layer_adapters.diagnostics import LayerAdapterDiagnostics
from xlora_core.layer_adapters.low_rank import LowRankPair

_NO_KNOBS = RoutingKnobs()


class XLoraLayerAdapter(LayerAdapter):
    """A layer with K low-rank experts and a gate: ``y = base(x) + sum_k s_k(x) expert_k(x)``.

    ``s(x) = softmax(gate(x) / temperature)``, one set per sample or token; top-k and global
    weight come after it, as everywhere in this package. The gate computes in float32 whatever
    the layer's dtype, and starts at zero: the average of the experts.

    This is not X-LoRA's classifier, which reads the last hidden state of a scaling pass and
    sets the scalings of all modules at once; here every layer decides by its own input.

    Args:
        base_layer: As for ``LoraLayerAdapter``.
        n_experts: K, >= 1.
        rank: r of every expert, >= 1.
        alpha: None is alpha = r.
        freeze_base_layer: Whether the base layer's parameters stop learning.
        in_features: Needed where the base layer does not say it itself.
        out_features: The same.
        knobs: Temperature, top-k and global weight of calls that bring none.

    Attributes:
        base_layer: As given; kept, not copied.
        experts: K ``LowRankPair``.
        gating_network: Linear, ``[..., in]`` -> router logits ``[..., K]``.
        knobs: As given.

    Raises:
        AdapterError: If a number is out of range, or a size unknown.
        ConfigError: If ``knobs.top_k`` is larger than K, or the knobs have overrides.

    Example:
        >>> adapter = XLoraLayerAdapter(nn.Linear(16, 8), n_experts=3, rank=4)
        >>> adapter(torch.randn(5, 16)).shape, adapter.get_last_gating_weights().shape
        (torch.Size([5, 8]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        base_layer: nn.Module,
        n_experts: int,
        rank: int,
        alpha: float | None = None,
        freeze_base_layer: bool = True,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        knobs: RoutingKnobs = _NO_KNOBS,
    ) -> None:
        if isinstance(n_experts, bool) or not isinstance(n_experts, int) or n_experts < 1:
            raise AdapterError(f"n_experts must be a whole number >= 1, got {n_experts!r}")
        super().__init__(
            base_layer,
            freeze_base_layer=freeze_base_layer,
            in_features=in_features,
            out_features=out_features,
        )
        placement = adapter_placement(base_layer)
        self.experts = nn.ModuleList(
            LowRankPair(self.in_features, self.out_features, rank, alpha, **placement)
            for _ in range(n_experts)
        )
        self.gating_network = Gate(self.in_features, n_experts, **placement)
        self.knobs = _without_overrides(knobs.check(n_experts))
        self._last_gating_weights: Tensor | None = None

    @classmethod
    def from_adapters(
        cls,
        base_layer: nn.Module,
        experts: Sequence[LoraWeights],
        *,
        freeze_base_layer: bool = True,
        freeze_experts: bool = True,
        knobs: RoutingKnobs = _NO_KNOBS,
    ) -> Self:
        """Returns finished experts under a fresh gate. Their ranks and alphas may differ.

        Args:
            base_layer: The layer they were trained on.
            experts: As ``read_adapter(...).modules[path]`` has them; copied.
            freeze_base_layer: Whether the base layer's parameters stop learning.
            freeze_experts: Whether only the gate learns.
            knobs: As for the class.

        Raises:
            AdapterError: If there is no expert, or one does not fit the base layer.
        """
        if not experts:
            raise AdapterError("from_adapters needs at least one expert, got none")
        adapter = cls(
            base_layer,
            len(experts),
            rank=1,
            freeze_base_layer=freeze_base_layer,
            in_features=experts[0].lora_A.shape[1],
            out_features=experts[0].lora_B.shape[0],
            knobs=knobs,
        )
        for k, weights in enumerate(experts):
            pair = LowRankPair.from_weights(weights, **adapter_placement(base_layer))
            found = (pair.lora_A.shape[1], pair.lora_B.shape[0])
            if found != (adapter.in_features, adapter.out_features):
                raise AdapterError(
                    f"expert {k} was trained on a layer of {found[0]} inputs and {found[1]} "
                    f"outputs, this one has {adapter.in_features} and {adapter.out_features}"
                )
            adapter.experts[k] = pair.requires_grad_(not freeze_experts)
        return adapter

    def pairs(self) -> Sequence[LowRankPair]:
        """Returns the experts in order."""
        return list(self.experts)  # type: ignore[arg-type]  # nothing else is put in there

    def _own_modules(self) -> Sequence[nn.Module]:
        return [*self.experts, self.gating_network]

    # ---------------------------------------------------------------- what it is

    @property
    def n_experts(self) -> int:
        """K."""
        return len(self.experts)

    @property
    def ranks(self) -> list[int]:
        """The experts' ranks."""
        return [pair.rank for pair in self.pairs()]

    @property
    def rank(self) -> int:
        """The experts' common rank.

        Raises:
            AdapterError: If they differ.
        """
        return int(self._common("rank", self.ranks))

    @property
    def alpha(self) -> float:
        """The experts' common alpha; each is multiplied by alpha / r.

        Raises:
            AdapterError: If they differ.
        """
        return self._common("alpha", [pair.alpha for pair in self.pairs()])

    def _common(self, name: str, values: Sequence[float]) -> float:
        if len(set(values)) > 1:
            raise AdapterError(
                f"the experts have no common {name}, theirs are {', '.join(map(str, values))}",
                hint=f"ask one of them: adapter.experts[0].{name}",
            )
        return values[0]

    @property
    def lora_layer(self) -> LowRankPair:
        """The experts' average as one new pair of rank sum r: what merging bakes in."""
        return self._mixed_pair(self._merge_weights(None))

    # ---------------------------------------------------------------- running

    def gating_weights(self, x: Tensor, knobs: RoutingKnobs | None = None) -> Tensor:
        """Returns ``softmax(gate(x) / temperature)``, ``[..., K]``, without running the layer."""
        knobs = knobs or self.knobs
        return routing.scalings_from_logits(
            self.gating_network(x), enable_softmax=True, temperature=knobs.temperature
        )

    def forward(self, x: Tensor, *, knobs: RoutingKnobs | None = None) -> Tensor:
        """Returns ``[..., out]`` for ``x`` ``[..., in]``, in the base layer's dtype.

        Args:
            x: Any number of leading dimensions.
            knobs: Of this call alone; None takes the adapter's.

        Raises:
            ConfigError: If ``knobs.top_k`` is larger than K, or the knobs have overrides.
        """
        knobs = self.knobs if knobs is None else _without_overrides(knobs)
        y: Tensor = self.base_layer(x)
        gating = self.gating_weights(x, knobs)
        if not torch.compiler.is_exporting():  # an exported graph keeps no state
            self._last_gating_weights = gating.detach()
        scalings = routing.effective_scalings(
            gating, top_k=knobs.top_k, global_weight=knobs.global_weight
        )
        return y + self._mixture(x, scalings).to(y.dtype)

    def _mixture(self, x: Tensor, scalings: Tensor) -> Tensor:
        """Returns ``sum_k s_k expert_k(x)`` in two matrix products, whatever the ranks.

        Args:
            x: ``[..., in]``.
            scalings: ``[..., K]``.
        """
        pairs = self.pairs()
        stacked_A = torch.cat([pair.lora_A for pair in pairs])  # [sum r, in]
        stacked_B = torch.cat([pair.lora_B for pair in pairs], dim=1)  # [out, sum r]
        columns = [scalings[..., k : k + 1] * pair.lora_scaling for k, pair in enumerate(pairs)]
        of_rank = torch.cat(
            [
                column.expand(*column.shape[:-1], pair.rank)
                for column, pair in zip(columns, pairs, strict=True)
            ],
            dim=-1,
        ).to(stacked_A.dtype)  # [..., sum r]
        y = F.linear(F.linear(x.to(stacked_A.dtype), stacked_A) * of_rank, stacked_B)
        for column, pair in zip(columns, pairs, strict=True):
            if pair.bias is not None:
                y = y + column.to(y.dtype) * pair.bias
        return y

    def get_last_gating_weights(self) -> Tensor | None:
        """Returns the gating weights of the last forward call, ``[..., K]``; None before it.

        One set per sample or token, before top-k and global weight, so each sums to 1; float32
        or wider, without gradient. The last call is the last of any thread: with several, ask
        ``gating_weights(x)`` for those of an input. An exported graph keeps none.
        """
        return self._last_gating_weights

    def reset_state(self) -> None:
        """Forgets what earlier calls left: gradients and gating weights. The weights stay."""
        super().reset_state()
        self._last_gating_weights = None

    # ---------------------------------------------------------------- merging, looking

    def merge_to_original_layer(self, weights: Sequence[float] | Tensor | None = None) -> nn.Module:
        """Returns a new plain layer with a constant mixture baked in; it cannot route.

        Args:
            weights: One per expert; None is their average, 1/K each.

        Raises:
            AdapterError: If the base layer is not ``nn.Linear`` or ``Conv1D``, or there is not
                one finite weight per expert.
        """
        pair = self._mixed_pair(self._merge_weights(weights))
        return self._merged(pair.delta_weight(), pair.bias)

    def _merge_weights(self, weights: Sequence[float] | Tensor | None) -> list[float]:
        if weights is None:
            return [1 / self.n_experts] * self.n_experts
        found = torch.as_tensor(weights, dtype=torch.float64)
        if found.shape != (self.n_experts,) or not torch.isfinite(found).all():
            raise AdapterError(
                f"merge weights must be one finite number for each of {self.n_experts} experts, "
                f"got {weights!r}"
            )
        return found.tolist()

    def _mixed_pair(self, weights: Sequence[float]) -> LowRankPair:
        """Returns ``sum_k w_k expert_k`` as one pair of rank sum r, in float32 or wider."""
        pairs = self.pairs()
        dtype = torch.promote_types(pairs[0].lora_A.dtype, torch.float32)
        scaled = [w * pair.lora_scaling for w, pair in zip(weights, pairs, strict=True)]
        biases = [
            pair.bias.detach().to(dtype) * scaling
            for pair, scaling in zip(pairs, scaled, strict=True)
            if pair.bias is not None
        ]
        return LowRankPair.from_weights(
            LoraWeights(
                lora_A=torch.cat([pair.lora_A.detach().to(dtype) for pair in pairs]),
                lora_B=torch.cat(
                    [
                        pair.lora_B.detach().to(dtype) * scaling
                        for pair, scaling in zip(pairs, scaled, strict=True)
                    ],
                    dim=1,
                ),
                lora_scaling=1.0,
                bias=torch.stack(biases).sum(0) if biases else None,
            ),
            dtype=dtype,
            device=pairs[0].lora_A.device,
        ).requires_grad_(False)

    def diagnostics(self) -> LayerAdapterDiagnostics:
        """Returns sizes, norms, and the gate's state and last use at a glance."""
        found = replace(
            super().diagnostics(),
            gate_norm=float(self.gating_network.weight.detach().double().norm()),
        )
        last = self.get_last_gating_weights()
        if last is None or last.numel() == 0:
            return found
        samples = last.reshape(-1, self.n_experts).double()
        return replace(
            found,
            mean_gating_weights=tuple(samples.mean(0).tolist()),
            mean_entropy=float(torch.special.entr(samples).sum(-1).mean()),
        )


def _without_overrides(knobs: RoutingKnobs) -> RoutingKnobs:
    if knobs.overrides:
        raise ConfigError(
            "overrides name the adapters of a model, a layer adapter's experts have no names",
            hint="use the other knobs, or change an expert's lora_scaling",
        )
    return knobs

"""What both layer adapters share: the base layer, and their weights as one vector or by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xlora_core.errors import AdapterError, ModelError
from xlora_core.layer_adapters.diagnostics import ExpertDiagnostics, LayerAdapterDiagnostics
from xlora_core.layer_adapters.low_rank import LowRankPair
from xlora_core.layer_adapters.named_weights import Rename, load_named_weights, read_named_weights
from xlora_core.layers import linear_features, merged_layer


class LayerAdapter(nn.Module, ABC):
    """A base layer with low-rank pairs beside it.

    Args:
        base_layer: Any module from ``[..., in]`` to ``[..., out]``.
        freeze_base_layer: Whether its parameters stop learning; else they are made to learn.
        in_features: Needed where the base layer does not say it itself.
        out_features: The same.

    Raises:
        AdapterError: If the sizes are not known or contradict the layer, or a base layer that
            cannot learn (quantised) is to learn.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        freeze_base_layer: bool,
        in_features: int | None,
        out_features: int | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _features(base_layer, in_features, out_features)
        self.base_layer = base_layer
        for name, parameter in base_layer.named_parameters():
            if not freeze_base_layer and not parameter.is_floating_point():
                raise AdapterError(
                    f"the base layer's {name} is {parameter.dtype} and cannot learn",
                    hint="leave freeze_base_layer at True for a quantised layer",
                )
            parameter.requires_grad_(not freeze_base_layer)

    @abstractmethod
    def pairs(self) -> Sequence[LowRankPair]:
        """Returns the low-rank pairs in order."""

    @abstractmethod
    def _own_modules(self) -> Sequence[nn.Module]:
        """Returns all that is not the base layer, in the order of ``get_parameters``."""

    @abstractmethod
    def merge_to_original_layer(self) -> nn.Module:
        """Returns a new plain layer with the adaptation baked in."""

    # ---------------------------------------------------------------- what it is

    @property
    def is_base_layer_frozen(self) -> bool:
        """Whether no parameter of the base layer learns."""
        return not any(p.requires_grad for p in self.base_layer.parameters())

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; some architectures look at it."""
        return self.base_layer.weight  # type: ignore[return-value]  # linear-like layers have one

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]  # linear-like layers have one

    @property
    def parameter_count(self) -> int:
        """Number of values in ``get_parameters()``."""
        return sum(p.numel() for p in self._vector_parameters())

    def _vector_parameters(self) -> list[nn.Parameter]:
        """Returns the base layer's learning parameters, then all others."""
        of_base = [p for p in self.base_layer.parameters() if p.requires_grad]
        return of_base + [p for module in self._own_modules() for p in module.parameters()]

    # ---------------------------------------------------------------- one vector

    def get_parameters(self) -> Tensor:
        """Returns a copy of all values as one vector ``[parameter_count]``.

        The base layer's come first, and only those that learn. Values of several dtypes come in
        the widest of them, so that none is rounded.
        """
        parameters = [p.detach() for p in self._vector_parameters()]
        dtype = parameters[0].dtype
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        device = parameters[-1].device
        return torch.cat([p.reshape(-1).to(device, dtype, copy=True) for p in parameters])

    def set_parameters(self, parameters: Tensor) -> None:
        """Sets all values from a vector in the order of ``get_parameters()``.

        Args:
            parameters: ``[parameter_count]``, floating point.

        Raises:
            AdapterError: If it has another length, another kind, or a value that is not finite;
                then nothing was changed.
        """
        wanted = (self.parameter_count,)
        if parameters.shape != wanted or not parameters.is_floating_point():
            raise AdapterError(
                f"parameters must be one floating-point vector of {wanted[0]} values, got "
                f"{parameters.dtype} of shape {list(parameters.shape)}",
                hint="take it from get_parameters() of an adapter of the same sizes",
            )
        if not torch.isfinite(parameters).all():
            raise AdapterError("parameters must be finite, got NaN or infinity")
        targets = self._vector_parameters()
        with torch.no_grad():
            for target, values in zip(
                targets, parameters.split([p.numel() for p in targets]), strict=True
            ):
                target.copy_(values.view_as(target))

    def update_parameters(self, learning_rate: float) -> None:
        """Takes one step of plain gradient descent, then forgets the gradients.

        Parameters without a gradient stay as they are. For anything better hand
        ``parameters()`` to an optimiser.

        Raises:
            ModelError: If there is no gradient at all, or the learning rate is not finite.
        """
        if not math.isfinite(learning_rate):
            raise ModelError(f"learning_rate must be a finite number, got {learning_rate!r}")
        learning = [p for p in self._vector_parameters() if p.grad is not None]
        if not learning:
            raise ModelError(
                "no parameter of this adapter has a gradient",
                hint="call backward() on a loss of its output first",
            )
        with torch.no_grad():
            for parameter in learning:
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=-learning_rate)
                parameter.grad = None

    def reset_state(self) -> None:
        """Forgets what earlier calls left: gradients here; the weights stay."""
        for parameter in self.parameters():
            parameter.grad = None

    # ---------------------------------------------------------------- weights by name

    def load_weights_by_name(
        self,
        weights: Mapping[str, Tensor] | str | Path,
        *,
        rename: Rename | None = None,
        allow_missing: bool = False,
    ) -> None:
        """Loads weights under the names of ``state_dict()``.

        The base layer's may be left out; they are loaded if they are there.

        Args:
            weights: Name -> tensor, or the path of a ``.safetensors`` file.
            rename: Turns a name there into one here; None leaves that tensor out.
            allow_missing: Whether the adapter's own weights may be left out, too.

        Raises:
            AdapterError: Listing every fault; then nothing was changed.
        """
        what = type(self).__name__
        targets = self.state_dict()
        of_base = frozenset(name for name in targets if name.startswith("base_layer."))
        load_named_weights(
            targets,
            read_named_weights(weights, what=what),
            optional=frozenset(targets) if allow_missing else of_base,
            rename=rename,
            what=what,
        )

    # ---------------------------------------------------------------- merging, looking

    def _merged(self, delta: Tensor, bias: Tensor | None) -> nn.Module:
        """Returns the base layer with ``delta`` ``[out, in]`` in it, as a new layer.

        Raises:
            AdapterError: If it is not linear-like.
        """
        if not isinstance(self.base_layer, nn.Linear | Conv1D):
            raise AdapterError(
                f"a base layer of class {type(self.base_layer).__name__} cannot take up the "
                "adaptation, only Linear and Conv1D can",
                hint="keep the adapter, or adapt the linear layers inside that module",
            )
        return merged_layer(self.base_layer, delta, bias)

    def diagnostics(self) -> LayerAdapterDiagnostics:
        """Returns sizes, norms and state at a glance."""
        weight = getattr(self.base_layer, "weight", None)
        base_norm = math.nan
        if isinstance(weight, Tensor) and weight.is_floating_point():
            base_norm = float(weight.detach().double().norm())
        return LayerAdapterDiagnostics(
            base_class=type(self.base_layer).__name__,
            in_features=self.in_features,
            out_features=self.out_features,
            is_base_layer_frozen=self.is_base_layer_frozen,
            parameter_count=self.parameter_count,
            n_base_parameters=sum(p.numel() for p in self.base_layer.parameters()),
            n_trainable=sum(p.numel() for p in self.parameters() if p.requires_grad),
            dtype=str(self.pairs()[0].lora_A.dtype).removeprefix("torch."),
            base_norm=base_norm,
            experts=tuple(_expert_diagnostics(pair, base_norm) for pair in self.pairs()),
            has_nonfinite_values=not bool(torch.isfinite(self.get_parameters()).all()),
        )


def _expert_diagnostics(pair: LowRankPair, base_norm: float) -> ExpertDiagnostics:
    delta_norm = pair.delta_norm()
    return ExpertDiagnostics(
        rank=pair.rank,
        alpha=pair.alpha,
        norm_A=float(pair.lora_A.detach().double().norm()),
        norm_B=float(pair.lora_B.detach().double().norm()),
        delta_norm=delta_norm,
        relative_delta_norm=delta_norm / base_norm if base_norm > 0 else math.nan,
        n_parameters=sum(p.numel() for p in pair.parameters()),
        trainable=any(p.requires_grad for p in pair.parameters()),
    )


def adapter_placement(base_layer: nn.Module) -> dict[str, Any]:
    """Returns the dtype and device that adapters of a base layer start in.

    The base layer's own if it is in floating point; float32 beside a quantised one.
    """
    for parameter in base_layer.parameters():
        if parameter.is_floating_point():
            return {"dtype": parameter.dtype, "device": parameter.device}
    tensors = [*base_layer.parameters(), *base_layer.buffers()]
    return {"dtype": torch.float32, "device": tensors[0].device if tensors else None}


def _features(
    base_layer: nn.Module, in_features: int | None, out_features: int | None
) -> tuple[int, int]:
    """Returns a base layer's ``(in, out)``: its own, or those given."""
    kind = type(base_layer).__name__
    try:
        own_out, own_in = linear_features(base_layer)
    except AdapterError:
        if in_features is None or out_features is None:
            raise AdapterError(
                f"a base layer of class {kind} does not say its sizes",
                hint="pass in_features= and out_features=",
            ) from None
        return in_features, out_features
    for name, given, own in (
        ("in_features", in_features, own_in),
        ("out_features", out_features, own_out),
    ):
        if given not in (None, own):
            raise AdapterError(
                f"{name} is {given}, but the base layer ({kind}) has {own}",
                hint=f"leave {name} out",
            )
    return own_in, own_out

"""What a layer adapter can say about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExpertDiagnostics:
    """One low-rank pair of a layer adapter.

    Attributes:
        rank: r.
        alpha: ``lora_scaling * r``.
        norm_A: Frobenius norm of ``lora_A``.
        norm_B: Frobenius norm of ``lora_B``; 0 for a fresh pair.
        delta_norm: Frobenius norm of what it adds to the weight, ``lora_scaling * B A``.
        relative_delta_norm: ``delta_norm`` / ``base_norm``; NaN without a readable base weight.
        n_parameters: Number of its values.
        trainable: Whether it learns.
    """

    rank: int
    alpha: float
    norm_A: float  # after lora_A
    norm_B: float  # after lora_B
    delta_norm: float
    relative_delta_norm: float
    n_parameters: int
    trainable: bool


@dataclass(frozen=True, kw_only=True)
class LayerAdapterDiagnostics:
    """A layer adapter at a glance; plain numbers, ``dataclasses.asdict`` makes JSON of it.

    Attributes:
        base_class: Class of the base layer.
        in_features: Size of the input.
        out_features: Size of the output.
        is_base_layer_frozen: Whether the base layer is left as it is.
        parameter_count: Values in ``get_parameters()``.
        n_base_parameters: Values of the base layer, frozen or not.
        n_trainable: Values that require a gradient.
        dtype: dtype of the experts.
        base_norm: Frobenius norm of the base weight; NaN where it has none in floating point.
        experts: One entry per low-rank pair.
        gate_norm: Frobenius norm of the gate's weight; None without a gate. 0 routes uniformly,
            but for its bias.
        mean_gating_weights: K values, the mean of the last forward call over its samples; None
            without a gate or a call.
        mean_entropy: Mean entropy of the same in nats, from 0 (one expert alone) to log K.
        has_nonfinite_values: Whether any value of ``get_parameters()`` is NaN or infinite.
    """

    base_class: str
    in_features: int
    out_features: int
    is_base_layer_frozen: bool
    parameter_count: int
    n_base_parameters: int
    n_trainable: int
    dtype: str
    base_norm: float
    experts: tuple[ExpertDiagnostics, ...]
    gate_norm: float | None = None
    mean_gating_weights: tuple[float, ...] | None = None
    mean_entropy: float | None = None
    has_nonfinite_values: bool = False

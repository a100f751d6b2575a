"""A causal language model's logits of hidden states, by the model's own code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def logits_of(base_model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the logits ``[n, V]`` of hidden states ``[n, H]``.

    The model's own forward runs, over a backbone that has its result already: whatever an
    architecture does around its head (a cap, a scale, a projection, a dtype) is done.

    Args:
        base_model: A causal language model, not changed.
        hidden: Last hidden states as its backbone gives them.
    """
    run = _ModelWithResult(base_model, _Result(hidden.unsqueeze(0)))
    # Any: forward is called on a stand-in for the model.
    forward: Any = type(base_model).forward
    logits: Tensor = forward(run, return_dict=True).logits
    return logits[0]


class _Result:
    """What a backbone returns: hidden states, and nothing of all else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Backbone:
    """Stands for a backbone that has run; so do the models inside it (OPT's decoder)."""

    def __init__(self, backbone: nn.Module, result: _Result) -> None:
        self._backbone = backbone
        self._result = result

    def __call__(self, *args: Any, **kwargs: Any) -> _Result:
        return self._result

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backbone, name)
        return self if isinstance(value, PreTrainedModel) else value


class _ModelWithResult:
    """Stands for a language model, all its own but for the backbone."""

    def __init__(self, base_model: PreTrainedModel, result: _Result) -> None:
        self._base_model = base_model
        self._backbone = _Backbone(base_model.base_model, result)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._base_model, name)
        return self._backbone if value is self._base_model.base_model else value

"""What is known of a source text once both passes have read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput


@dataclass
class XLoraEncoderOutput(BaseModelOutput):
    """The encoder's output of both passes, and the source's scalings.

    ``last_hidden_state`` ``[B, S, H]`` is the main pass's, as are ``hidden_states`` and
    ``attentions`` where they were asked for. All tensors have the batch first, so that
    ``generate`` can repeat their rows for beams.

    Attributes:
        scaling_hidden_state: ``[B, S, H]``, of the scaling pass; None if the adapters were
            switched off, as for all fields below.
        router_logits: ``[B, S, L or 1, K]``, what the classifier made of it.
        scalings: ``[B, S, L or 1, K]``, the effective scalings that the encoder ran with. The
            keys and values of cross-attention run with the same ones.
        edition: How often the model's adapters had been edited by then.
    """

    scaling_hidden_state: Tensor | None = None
    router_logits: Tensor | None = None
    scalings: Tensor | None = None
    edition: int | None = None

    def main(self) -> BaseModelOutput:
        """Returns the main pass's output alone, as the encoder gave it."""
        return BaseModelOutput(
            last_hidden_state=self.last_hidden_state,
            hidden_states=self.hidden_states,
            attentions=self.attentions,
        )

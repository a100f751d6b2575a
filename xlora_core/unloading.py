"""Taking the experts off a base model again, with or without leaving a mixture behind."""

from __future__ import annotations

from transformers.modeling_utils import PreTrainedModel

from xlora_core import merge
from xlora_core.editing import EditGuard
from xlora_core.layers import XLoraLayer
from xlora_core.passes import XLoraPasses


class XLoraUnloading(XLoraPasses):
    """The two ends of an ``XLoraModel``: merged into its base model, or taken off it."""

    edit_guard: EditGuard

    def merge_and_unload(self, weights: merge.MergeWeights = None) -> PreTrainedModel:
        """Returns the base model as a plain Hugging Face model with the experts baked in.

        The merge is a constant mixture: it cannot route. The base model is changed in place,
        so this object is spent afterwards and refuses to run.

        Args:
            weights: None is the uniform merge (1/K each); a mapping adapter name -> weight; or
                numbers of shape ``[K]``, or ``[L, K]`` for weights per module; or a frozen
                mixture, whose names must be the model's.

        Raises:
            ConfigError: For an unknown name, a wrong shape, or a weight that is not finite.
            ModelError: While an ``Engine`` runs the model, or if it was merged before.
        """
        self._check_not_merged()
        self.edit_guard.check()
        matrix = merge.weight_matrix(weights, self.adapter_names, self.lora_layer_names)
        embedding = self.base_model.get_input_embeddings()
        merge.merge_layers(self.base_model, self._layers, matrix)
        if self._head_is_adapted or isinstance(embedding, XLoraLayer):
            # Else loading what was saved would tie the head to the embedding again.
            self.base_model.config.get_text_config().tie_word_embeddings = False
        self._merged = True
        merged: PreTrainedModel = self.base_model
        return merged

    def unload(self) -> PreTrainedModel:
        """Returns the base model as it was, without experts; this object is spent afterwards.

        Raises:
            ModelError: While an ``Engine`` runs the model, or if it was merged before.
        """
        self._check_not_merged()
        self.edit_guard.check()
        for path, layer in self._layers.items():
            self.base_model.set_submodule(path, layer.base_layer)
        self._merged = True
        plain: PreTrainedModel = self.base_model
        return plain

"""What model this is."""

from __future__ import annotations

import streamlit as st

from app.engine_client import ModelCard


def draw(card: ModelCard) -> None:
    """Draws the model's facts."""
    experts = len(card.adapter_names)
    mixing = "one mixture per module" if card.config.layerwise_scalings else "one mixture for all"
    if card.config.router == "per_layer":
        mixing = "each with a gate of its own"
    facts = [
        f"**{card.model_id}**",
        f"{card.n_modules} adapted modules, {mixing}",
        f"{experts} {'adapter' if experts == 1 else 'adapters'}",
        f"{card.device}, {card.dtype}",
        f"context {card.context_length:,} tokens",
    ]
    st.markdown(" · ".join(facts))

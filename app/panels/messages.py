"""States that are not a picture: nothing yet, failed, re-routed."""

from __future__ import annotations

import logging

import streamlit as st

from app import actions, session
from app.engine_client import EngineClient
from xlora_core import Run
from xlora_core.errors import XLoraError

EMPTY = (
    "**No run yet.** Take an example or type a prompt, then press *Generate*. The answer appears "
    "word by word, and under it how strongly each adapter acts in every module of the model."
)
REROUTED = "Re-routed from the recording; text not regenerated."
PARTLY = (
    " This model's adapters also act in the scaling pass, so with another top-k or weight the "
    "router itself would have answered differently."
)
PER_LAYER = (
    " This model's layers route themselves by what reaches them, so beyond the first module this "
    "is an approximation."
)

_LOG = logging.getLogger("xlora.app")


def load_failure(failure: Exception) -> None:
    """Says why there is no model, and offers to try again."""
    if isinstance(failure, XLoraError):
        text, hint = failure.message, failure.hint
    else:
        _LOG.error("the model could not be loaded", exc_info=failure)
        text, hint = f"{type(failure).__name__}: {failure}", "the server's log has the details"
    _draw(f"The model could not be loaded: {text}", hint)
    st.button("Try again", icon=":material/refresh:")


def failure() -> None:
    """Draws the last failure with its hint."""
    message = session.error()
    if message is None:
        return
    _draw(message.text, message.hint)


def _draw(text: str, hint: str) -> None:
    more = f"\n\nHint: {plain(hint)}" if hint else ""
    st.error(plain(text) + more, icon=":material/error:")


def plain(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    escaped = "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>$:~" else c for c in text)
    return escaped.replace("\n", "  \n")


def _reservation(run: Run) -> str:
    """Returns why other knobs on a recording may not tell what the model would have done."""
    if run.header.router == "per_layer":
        return PER_LAYER
    return PARTLY if run.header.scaling_pass_value else ""


def rerouted(client: EngineClient, run: Run) -> None:
    """Says that the picture shows other knobs than the text was written under."""
    same_model = tuple(run.header.adapter_names) == client.card.adapter_names
    text = REROUTED + _reservation(run)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.warning(text, icon=":material/alt_route:")
        st.button(
            "Regenerate with these settings",
            icon=":material/replay:",
            on_click=actions.regenerate,
            args=(client,),
            disabled=not same_model,
            help=None if same_model else "The loaded model has other adapters than this run.",
        )
        st.button(
            "Back to recorded",
            icon=":material/undo:",
            on_click=actions.back_to_recorded,
        )

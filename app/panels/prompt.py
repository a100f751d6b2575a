"""The prompt: presets, free text, Generate and Stop."""

from __future__ import annotations

import streamlit as st

from app import actions, presets, session
from app.engine_client import EngineClient


def draw(client: EngineClient) -> None:
    """Draws the prompt box and its buttons."""
    choices = presets.load()
    st.pills(
        "Examples",
        [preset.title for preset in choices],
        key=session.PRESET,
        on_change=actions.choose_preset,
        label_visibility="collapsed",
    )
    show = session.current()
    live = bool(show and show.live)
    with st.form("prompt", border=False):
        st.text_area(
            "Prompt",
            key=session.PROMPT,
            height=92,
            label_visibility="collapsed",
            placeholder="Ask something, or take an example above.",
        )
        with st.container(horizontal=True, vertical_alignment="center"):
            if live:
                st.form_submit_button("Stop", icon=":material/stop:", on_click=actions.stop)
            else:
                st.form_submit_button(
                    "Generate",
                    type="primary",
                    icon=":material/play_arrow:",
                    on_click=actions.generate,
                    args=(client,),
                )
            hint = _look_at()
            if hint:
                st.caption(f"Look at: {hint}")


def _look_at() -> str:
    preset = presets.by_title(session.get(session.PRESET))
    return preset.look_at if preset and preset.prompt == session.get(session.PROMPT) else ""

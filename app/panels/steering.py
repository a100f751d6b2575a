"""The sidebar's control of single adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

from app import frames, session, steering
from app.panels.messages import plain
from app.steering import BY_MODULE, CHOICES, PIN, SCALE
from xlora_core import AdapterOverride

HELP = (
    "Auto: as the router says. Mute: off. Scale: times a factor. Pin: held at a value, even where "
    "top-k would drop it. In all modules; the other adapters keep their scalings, and the global "
    "weight acts on all."
)
CHOICE_WIDTH = 116
# Of a router without softmax: its scalings have no bounds of their own.
UNBOUNDED = (-2.0, 2.0)


def draw(
    names: Sequence[str],
    fallback: Sequence[AdapterOverride],
    *,
    softmax: bool,
    turned: Callable[[], None],
) -> None:
    """Draws a choice per adapter, and says what is in force even while it is closed.

    Args:
        names: The adapters.
        fallback: The overrides that widgets start from.
        softmax: Whether scalings are shares of 1.
        turned: What a change does.
    """
    with st.expander("Steer adapters", icon=":material/instant_mix:"):
        st.caption("Overrides the router.", help=HELP)
        for name in names:
            _adapter(name, steering.of_adapter(fallback, name), softmax=softmax, turned=turned)
        steered = steering.from_widgets(names, fallback)
        st.button(
            "All to auto",
            icon=":material/undo:",
            on_click=_release,
            args=(names, turned),
            disabled=not steered,
        )
    if steered:
        st.caption(f"Steered: {plain(' · '.join(map(frames.override_text, steered)))}")


def keep(names: Sequence[str]) -> None:
    """Keeps the choices of adapters that this run of the script does not draw."""
    for name in names:
        session.keep(session.steer_choice(name))
        for choice in (SCALE, PIN):
            session.keep(session.steer_value(choice, name))


def _adapter(
    name: str,
    fallback: Sequence[AdapterOverride],
    *,
    softmax: bool,
    turned: Callable[[], None],
) -> None:
    own = tuple(fallback)
    start, _ = steering.choice_of(own)
    of_modules = session.overrides_by_module()[name] = steering.by_module(name, own)
    key = session.steer_choice(name)
    choices = [*CHOICES, *([BY_MODULE] if of_modules else [])]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f":small[{plain(name)}]", width="stretch")
        choice = st.selectbox(
            plain(name),
            choices,
            choices.index(start),
            key=key,
            on_change=turned,
            label_visibility="collapsed",
            width=CHOICE_WIDTH,
        )
    for kind in (SCALE, PIN):
        if kind == choice:
            _value(kind, name, steering.first_value(kind, own), softmax=softmax, turned=turned)
        else:
            session.keep(session.steer_value(kind, name))
    if choice == BY_MODULE:
        st.caption(plain(" · ".join(map(frames.override_text, of_modules))))


def _value(
    kind: str, name: str, first: float, *, softmax: bool, turned: Callable[[], None]
) -> None:
    low, high = (0.0, 3.0) if kind == SCALE else (0.0, 1.0) if softmax else UNBOUNDED
    key = session.steer_value(kind, name)
    st.slider(
        plain(f"{name}: {'factor' if kind == SCALE else 'scaling'}"),
        *session.reach(key, low, high, first),
        first,
        step=0.05,
        format="× %.2f" if kind == SCALE else "%.2f",
        key=key,
        on_change=turned,
        label_visibility="collapsed",
    )


def _release(names: Sequence[str], turned: Callable[[], None]) -> None:
    steering.release(names)
    turned()

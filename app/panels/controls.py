"""The sidebar: knobs of the routing, what to compare with, sampling, the session's runs."""

from __future__ import annotations

from functools import partial

import streamlit as st

from app import actions, frames, session
from app.engine_client import EngineClient
from app.panels import steering
from xlora_core import RoutingKnobs, Run, XLoraConfig

MOST_NEW_TOKENS = 4096


def draw(client: EngineClient) -> None:
    """Draws the sidebar."""
    with st.sidebar:
        _knobs(client)
        _compare(client)
        _sampling(client)
        _runs()


def shown_run(show: session.Show | None) -> Run | None:
    """Returns the finished run on the screen."""
    return show.run if show and not show.live else None


def _knobs(client: EngineClient) -> None:
    card = client.card
    show = session.current()
    run = shown_run(show)
    recorded = run.header if run else None
    names = tuple(recorded.adapter_names) if recorded else card.adapter_names
    n_adapters = len(names)
    softmax = recorded.enable_softmax if recorded else card.config.enable_softmax
    if n_adapters != len(card.adapter_names):
        # A run of another model is on the screen: the loaded model's own slider is not drawn.
        session.keep(session.knob_top_k(len(card.adapter_names)))
    steering.keep([name for name in card.adapter_names if name not in names])
    fallback = _fallback(card.knobs, card.config, n_adapters, len(card.adapter_names))
    st.subheader("Routing", anchor=False)
    st.caption(_when(show))
    turned = partial(actions.turn_knobs, names, fallback)
    if n_adapters > 1:
        st.slider(
            f"Top-k: adapters kept of {n_adapters}",
            1,
            n_adapters,
            min(fallback.top_k or n_adapters, n_adapters),
            key=session.knob_top_k(n_adapters),
            help="Per token and module only the k largest scalings are used. "
            f"{n_adapters} keeps all.",
            on_change=turned,
        )
    st.slider(
        "Softmax temperature",
        *session.reach(session.KNOB_TEMPERATURE, 0.1, 5.0, fallback.temperature),
        fallback.temperature,
        step=0.1,
        format="%.1f",
        key=session.KNOB_TEMPERATURE,
        disabled=not softmax,
        help="Divides the router's logits: low sharpens the mixture, high levels it."
        if softmax
        else "Without effect: this model's router has no softmax.",
        on_change=turned,
    )
    st.slider(
        "Global weight",
        *session.reach(session.KNOB_WEIGHT, 0.0, 2.0, fallback.global_weight),
        fallback.global_weight,
        step=0.05,
        format="%.2f",
        key=session.KNOB_WEIGHT,
        help="Factor on every scaling. 0 is the base model, 1 is as trained.",
        on_change=turned,
    )
    steering.draw(names, fallback.overrides, softmax=softmax, turned=turned)


def _fallback(knobs: RoutingKnobs, config: XLoraConfig, n_shown: int, n_model: int) -> RoutingKnobs:
    """Returns the knobs that sliders start from; a run of another model has its own top-k range."""
    if n_shown == n_model or config.enable_softmax_topk:
        return knobs
    return RoutingKnobs(temperature=knobs.temperature, global_weight=knobs.global_weight)


def _when(show: session.Show | None) -> str:
    if show is None:
        return "For the next run."
    if show.live:
        return "Live: a change applies from the next token."
    return "A change re-routes the run on the screen at once, from its recording."


def _compare(client: EngineClient) -> None:
    st.subheader("Compare with", anchor=False)
    st.pills(
        "Compare with",
        list(actions.arm_options(client.card.adapter_names)),
        selection_mode="multi",
        default=[actions.MERGED],
        key=session.ARMS,
        label_visibility="collapsed",
        help="Each runs the same prompt beside the routed model, on the same engine.",
    )


def _sampling(client: EngineClient) -> None:
    most = client.card.limits.max_new_tokens or MOST_NEW_TOKENS
    with st.expander("Sampling", icon=":material/tune:"):
        st.number_input(
            "Most new tokens", 1, most, min(96, most), step=16, key=session.MAX_NEW_TOKENS
        )
        temperature = st.slider(
            "Sampling temperature",
            0.0,
            2.0,
            0.0,
            step=0.1,
            format="%.1f",
            key=session.TEMPERATURE,
            help="0 always takes the most likely token. Not the router's softmax temperature.",
        )
        st.number_input("Seed", 0, 2**31 - 1, 0, key=session.SEED, disabled=temperature == 0)
        st.toggle(
            "Send as chat message",
            value=True,
            key=session.AS_CHAT,
            help="Wraps the prompt in the model's chat template. Off: the text goes in as it is.",
        )


def _runs() -> None:
    show = session.current()
    with st.expander("Runs", icon=":material/history:"):
        entries = session.shows()
        if entries and show:
            titles = [f"{len(entries) - i}. {entry.title}" for i, entry in enumerate(entries)]
            session.put(session.SHOWN, titles[entries.index(show)])
            st.selectbox(
                "Shown",
                titles,
                key=session.SHOWN,
                on_change=actions.choose_shown,
                args=(titles,),
                disabled=show.live,
            )
        key = session.next_file_key()
        st.file_uploader(
            "Open a run file",
            type=["safetensors"],
            key=key,
            on_change=actions.open_run,
            args=(key,),
            disabled=bool(show and show.live),
            help="A run that was saved here or by the command line. It opens without the model.",
        )


def shown_knobs(run: Run) -> RoutingKnobs | None:
    """Returns the knobs to draw the run under; None for those recorded."""
    if not session.rerouted() or frames.routed_arm(run) is None:
        return None
    return actions.knobs_from_widgets(run.header.adapter_names, RoutingKnobs())

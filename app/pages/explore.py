"""Explore: one prompt, its answer token by token, and the routing that wrote it."""

from __future__ import annotations

import time

import streamlit as st

from app import actions, engine_client, loading, session
from app.components.heatmap import heatmap
from app.components.heatmap.payload import message
from app.panels import controls, downloads, header, messages, prompt, status
from xlora_core import RoutingKnobs, Run

POLL_SECONDS = 0.2
SEND_SECONDS = 0.03


def render() -> None:
    """Draws the page."""
    try:
        with loading.shown():
            client = engine_client.shared_client()
    except Exception as failure:  # whatever is wrong with a model, the page says it
        messages.load_failure(failure)
        return
    header.draw(client.card)
    controls.draw(client)
    prompt.draw(client)
    # A place of its own, so that a message coming or going never moves the run's view: an element
    # that changes its place in the page is mounted anew.
    with st.container():
        messages.failure()
        show = session.current()
        run = controls.shown_run(show)
        knobs = controls.shown_knobs(run) if run else None
        if run and knobs:
            messages.rerouted(client, run)
    if show is None:
        st.info(messages.EMPTY, icon=":material/grid_on:")
        return
    st.fragment(_run_view, run_every=POLL_SECONDS if show.live else None)(show, knobs)
    if run:
        downloads.draw(run, knobs)
    # Streamlit drops what a fragment has drawn but not sent yet when the fragment's next poll
    # begins, and the browser then takes the view away and mounts it anew. A poll that waits for
    # the end of this run of the script would begin before the 10 ms cycle of sending is through.
    time.sleep(SEND_SECONDS)


def _run_view(show: session.Show, knobs: RoutingKnobs | None) -> None:
    """Draws the run; polls while it lives, and hands over to the whole page when it has ended."""
    handle = show.handle
    version = handle.version if handle else -1
    run = actions.started_run(handle) if handle else show.run
    st.markdown(status.line(show, run), help=status.explanation(run))
    if run is not None:
        heatmap(_frame(run, show, version, knobs), key=session.HEATMAP)
    if show.live and actions.settle(show):
        st.rerun()


def _frame(run: Run, show: session.Show, version: int, knobs: RoutingKnobs | None) -> bytes:
    """Returns the component's data; made again only when something in it has changed."""
    signature = (run.header.run_id, version, knobs)
    frame = session.cached_frame(signature)
    if frame is None:
        expected = None
        if show.live and show.request:
            expected = run.tracks[0].n_prompt + show.request.sampling.max_new_tokens
        frame = message(
            run,
            version=version,
            live=show.live,
            expected_tokens=expected,
            knobs=knobs,
            planes=show.planes if knobs is None else None,
        )
        session.keep_frame(signature, frame)
    return frame

"""Downloads of a finished run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from app import session
from xlora_core import RoutingKnobs, Run

if TYPE_CHECKING:
    from xlora_core.recording.export import ExportBy

BUCKETS: dict[ExportBy, str] = {
    "position": "by token position",
    "segment": "prompt / response",
    "seq_len": "by sequence length",
    "token": "every token",
}


def draw(run: Run, knobs: RoutingKnobs | None) -> None:
    """Offers the scalings as CSV, and the run file.

    Args:
        run: A finished run.
        knobs: Those that the run is re-routed with on the screen; the CSV then has them, too.
    """
    name = f"xlora-{run.header.run_id[:8]}"
    st.subheader("Download", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        by = st.selectbox(
            "Rows of the CSV",
            list(BUCKETS),
            format_func=BUCKETS.__getitem__,
            key=session.BUCKET_BY,
            width=200,
        )
        width = 16
        if by == "position":
            width = st.number_input(
                "Tokens per row", 1, 4096, width, key=session.BUCKET_WIDTH, width=150
            )
        st.download_button(
            "Scalings (CSV)" if knobs is None else "Re-routed scalings (CSV)",
            # Made at the click, from a run that no longer changes.
            data=partial(run.to_csv_text, by=by, width=width, knobs=knobs),
            file_name=f"{name}-{by}{'' if knobs is None else '-rerouted'}.csv",
            mime="text/csv",
            icon=":material/table_view:",
            on_click="ignore",
            help="One row per bucket of tokens, module and adapter: mean, spread and range of the "
            "scalings, mean of the effective scalings, share of tokens where the adapter leads.",
        )
        st.download_button(
            "Run file",
            data=run.to_bytes,
            file_name=f"{name}.safetensors",
            mime="application/octet-stream",
            icon=":material/save:",
            on_click="ignore",
            help="Everything that was recorded. Opens here and in the command line, "
            "without the model.",
        )

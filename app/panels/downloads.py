"""Downloads of a finished run."""

from __future__ import annotations

from functools import partial

import streamlit as st

from app import actions, session
from xlora_core import Run

BUCKETS = {
    "position": "by token position",
    "segment": "prompt / response",
    "seq_len": "by sequence length",
}


def draw(run: Run) -> None:
    """Offers the bucketed scalings and the run file."""
    session.defaults({session.BUCKET_BY: "position", session.BUCKET_WIDTH: 16})
    session.keep([session.BUCKET_WIDTH])
    name = f"xlora-{run.header.run_id[:8]}"
    st.subheader("Download", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "CSV buckets",
            list(BUCKETS),
            format_func=BUCKETS.__getitem__,
            key=session.BUCKET_BY,
            width=190,
        )
        by = session.get(session.BUCKET_BY)
        width = session.get(session.BUCKET_WIDTH)
        if by == "position":
            st.number_input("Tokens per bucket", 1, 4096, key=session.BUCKET_WIDTH, width=150)
        st.download_button(
            "Scalings (CSV)",
            # Made at the click, from a run that no longer changes.
            data=partial(run.to_csv_text, by=by, width=int(width)),
            file_name=f"{name}-{by}.csv",
            mime="text/csv",
            icon=":material/table_view:",
            on_click="ignore",
            help="One row per bucket, module and adapter: mean, spread and range of the scalings.",
        )
        st.download_button(
            "Run file",
            data=partial(actions.run_bytes, run),
            file_name=f"{name}.safetensors",
            mime="application/octet-stream",
            icon=":material/save:",
            on_click="ignore",
            help="Everything that was recorded. Opens here and in the command line, "
            "without the model.",
        )

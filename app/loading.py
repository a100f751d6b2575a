"""What the page shows while there is no model yet. Imports neither torch nor the core."""

from __future__ import annotations

from contextlib import AbstractContextManager

import streamlit as st

TEXT = (
    "Loading the model. The first start ever converts its weights, which takes about a minute; "
    "later starts take seconds."
)


def shown() -> AbstractContextManager[None]:
    """Returns a context in which the page says that it loads, and for how long."""
    return st.spinner(TEXT, show_time=True)

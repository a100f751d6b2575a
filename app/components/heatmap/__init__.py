"""The live view of a run: texts, summary lanes and the heatmap, as one component in the browser.

Hover, cursor, colour scale and the choice of adapter all stay in the browser: none of them runs
Python. ``payload.message`` makes the data; the scripts of this folder draw it.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

_HERE = Path(__file__).parent
# Joined in this order they are one JavaScript module.
SCRIPTS = (
    "payload.js",
    "colors.js",
    "rows.js",
    "texts.js",
    "tooltip.js",
    "lanes.js",
    "plot.js",
    "toolbar.js",
    "view.js",
)


def _read(name: str) -> str:
    # Streamlit takes a string without a newline for a file's path.
    return (_HERE / name).read_text(encoding="utf-8") + "\n"


def script() -> str:
    """Returns the component's JavaScript module."""
    return "\n".join(_read(name) for name in SCRIPTS)


_mount = st.components.v2.component(
    "xlora_heatmap",
    html=_read("heatmap.html"),
    css=_read("heatmap.css"),
    js=script(),
)


def heatmap(message: bytes, *, key: str) -> None:
    """Draws a run.

    Args:
        message: What ``payload.message`` returns.
        key: The same for as long as the view should stay: the component is then mounted once and
            updated in place.
    """
    _mount(data=message, key=key)

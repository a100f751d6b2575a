"""The app's entry: ``streamlit run app/main.py``. Declares the pages."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import loading

# A file, because a symbol's name would make every browser fetch it from the internet.
ICON = Path(__file__).with_name("icon.svg")


def main() -> None:
    """Draws the page that the user is on."""
    st.set_page_config(page_title="X-LoRA Explorer", page_icon=str(ICON), layout="wide")
    st.title("X-LoRA Explorer", anchor=False)
    with loading.shown():
        # The first import brings torch, which takes seconds: the page must not be blank meanwhile.
        from app.pages import explore
    st.navigation([st.Page(explore.render, title="Explore", default=True)]).run()


main()

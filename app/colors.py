"""Every colour of the app that carries a meaning: defined here once, per theme.

Adapters get the same hue in both themes; the lightness differs so that each stands off its page.
Within a theme any two of the nine are at least 20 apart in CIELAB, for normal sight and under
full protanopia, deuteranopia and tritanopia (``tests/app/test_colors.py`` measures it).
"""

from __future__ import annotations

from typing import Any, Literal

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, Theme] = ("light", "dark")

PAGE: dict[Theme, str] = {"light": "#ffffff", "dark": "#0e1117"}

_ADAPTERS: dict[Theme, tuple[str, ...]] = {
    "light": (
        "#bc5619",  # orange
        "#5b9bf8",  # sky
        "#198552",  # green
        "#d174b9",  # pink
        "#7e3a18",  # brown
        "#224b8f",  # blue
        "#b8a800",  # yellow
        "#4d4d4d",  # grey
        "#854df0",  # violet
    ),
    "dark": (
        "#f58518",
        "#aacffb",
        "#35bc80",
        "#ea2b97",
        "#9c6325",
        "#4668c8",
        "#eac468",
        "#d9cfd2",
        "#8a41f7",
    ),
}
N_ADAPTER_COLORS = len(_ADAPTERS["light"])

# Cividis (Nunez, Anderton, Renslow 2018), made for colour-blind readers. On a dark page it runs as
# published, dark to bright. On a light page it runs the other way and starts at the paper, so that
# an adapter that hardly acts recedes in both themes.
_SEQUENTIAL: dict[Theme, tuple[str, ...]] = {
    "light": (
        "#fffbe3",
        "#f1df86",
        "#d6c36b",
        "#b9a96c",
        "#9c9170",
        "#827d73",
        "#696b72",
        "#4d5670",
        "#2f3f6c",
        "#0c2a5e",
        "#00204c",
    ),
    "dark": (
        "#00224e",
        "#123570",
        "#3b496c",
        "#575d6d",
        "#707173",
        "#8a8678",
        "#a59c74",
        "#c3b369",
        "#e1cc55",
        "#fee838",
    ),
}

# Low, middle, high of a diverging scale; the middle recedes into the page.
_DIVERGING: dict[Theme, tuple[str, ...]] = {
    "light": ("#123f7d", "#5c93cf", "#f1f2f4", "#e08a3c", "#8a3d00"),
    "dark": ("#9cc9ff", "#3f78bd", "#20252f", "#c06c1f", "#ffb978"),
}

AMBER: dict[Theme, str] = {"light": "#9a5b00", "dark": "#ffb340"}


def adapter_colors(n_adapters: int, theme: Theme) -> list[str]:
    """Returns one colour per adapter, in the model's adapter order.

    After nine adapters the colours repeat: the name always stands next to the colour.
    """
    colors = _ADAPTERS[theme]
    return [colors[i % len(colors)] for i in range(n_adapters)]


def sequential_stops(theme: Theme) -> list[str]:
    """Returns the stops for values from 0 up: the larger, the further from the page."""
    return list(_SEQUENTIAL[theme])


def diverging_stops(theme: Theme) -> list[str]:
    """Returns the stops for values on both sides of a neutral middle."""
    return list(_DIVERGING[theme])


def palette(n_adapters: int) -> dict[str, Any]:
    """Returns everything the heatmap component paints with, for both themes."""
    return {
        theme: {
            "adapters": adapter_colors(n_adapters, theme),
            "sequential": sequential_stops(theme),
            "diverging": diverging_stops(theme),
            "amber": AMBER[theme],
        }
        for theme in THEMES
    }

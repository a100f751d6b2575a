"""The palette's promises, measured: told apart with any sight, seen on its page."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from app import colors

# Full colour-vision deficiency on linear RGB (Machado, Oliveira, Fernandes 2009).
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def linear(color: str) -> np.ndarray:
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted([float(weights @ linear(one)), float(weights @ linear(other))])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", colors.THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_adapter_colors_are_told_apart(theme, sight):
    seen = [
        lab(SIGHT[sight] @ linear(c)) for c in colors.adapter_colors(colors.N_ADAPTER_COLORS, theme)
    ]
    distance = min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))
    assert distance >= 20


@pytest.mark.parametrize("theme", colors.THEMES)
def test_adapter_colors_stand_off_the_page(theme):
    for color in colors.adapter_colors(colors.N_ADAPTER_COLORS, theme):
        assert contrast(color, colors.PAGE[theme]) >= 2.4


@pytest.mark.parametrize("theme", colors.THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_more_is_always_further_from_the_page(theme, sight):
    lightness = [lab(SIGHT[sight] @ linear(c))[0] for c in colors.sequential_stops(theme)]
    steps = np.diff(lightness) if theme == "dark" else -np.diff(lightness)
    assert (steps > 3).all()


@pytest.mark.parametrize("theme", colors.THEMES)
def test_amber_is_readable_text(theme):
    assert contrast(colors.AMBER[theme], colors.PAGE[theme]) >= 4.5


def test_colors_repeat_after_the_last():
    many = colors.adapter_colors(colors.N_ADAPTER_COLORS + 2, "light")
    assert many[-2:] == many[:2]

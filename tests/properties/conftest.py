"""Fixtures of the tests of laws, which hold for every architecture and need no gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.tiny_models import families


@pytest.fixture(scope="module", params=sorted(families()))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield

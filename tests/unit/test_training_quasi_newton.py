"""Minimising in few evaluations: on functions whose minimum is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlora_core.training.quasi_newton import Minimum, minimise


def bowl(hessian: Tensor, lowest: Tensor) -> tuple[list[Tensor], object]:
    """Returns a parabola, and the list of points at which it gets evaluated."""
    seen: list[Tensor] = []

    def objective(point: Tensor) -> tuple[float, Tensor]:
        seen.append(point)
        away = point - lowest
        return float(away @ hessian @ away) / 2 + 1.0, hessian @ away

    return seen, objective


def run(objective: object, start: Tensor, **options: object) -> Minimum:
    limits = {"tolerance": 1e-10, "max_evaluations": 200} | options
    return minimise(objective, start, **limits)  # type: ignore[arg-type]  # options are minimise's


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_the_minimum_of_a_parabola_is_found(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, n, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.T + 0.1 * torch.eye(n, dtype=torch.float64)
    lowest = torch.randn(n, generator=generator, dtype=torch.float64)
    seen, objective = bowl(hessian, lowest)
    found = run(objective, torch.zeros(n))
    assert found.converged
    assert found.losses[-1] == pytest.approx(1.0, abs=1e-7)
    assert torch.allclose(found.point, lowest, atol=1e-3)
    assert len(found.losses) == len(seen)
    assert all(after <= before for before, after in pairwise(found.losses))
    assert bool((torch.linalg.eigvalsh(found.inverse_hessian) > 0).all())


def test_a_curved_valley_is_followed_to_its_end() -> None:
    def rosenbrock(point: Tensor) -> tuple[float, Tensor]:
        x, y = point.tolist()
        slope = [-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)]
        return (1 - x) ** 2 + 100 * (y - x * x) ** 2, torch.tensor(slope, dtype=torch.float64)

    found = run(rosenbrock, torch.tensor([-1.2, 1.0]))
    assert found.converged
    assert found.point.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_a_learnt_curvature_saves_steps_on_a_similar_function() -> None:
    hessian = torch.diag(torch.tensor([100.0, 10.0, 1.0, 0.1], dtype=torch.float64))
    lowest = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    first = run(bowl(hessian, lowest)[1], torch.zeros(4))
    similar = bowl(1.1 * hessian, lowest + 0.1)[1]
    warm = run(similar, first.point, inverse_hessian=first.inverse_hessian)
    cold = run(similar, first.point)
    assert warm.losses[-1] == pytest.approx(1.0, abs=1e-7)
    assert len(warm.losses) < len(cold.losses) / 2


def test_it_steps_back_from_where_there_is_no_loss() -> None:
    def logarithm(point: Tensor) -> tuple[float, Tensor]:
        (x,) = point.tolist()
        return (x - math.log(x) if x > 0 else math.nan), 1 - 1 / point

    found = run(logarithm, torch.tensor([0.05]))
    assert found.converged
    assert found.point.item() == pytest.approx(1.0, abs=1e-3)
    assert found.losses == sorted(found.losses, reverse=True)


def test_it_keeps_to_its_evaluations_and_says_that_it_had_to() -> None:
    hessian = torch.diag(torch.tensor([1000.0, 1.0], dtype=torch.float64))
    for most in (1, 2, 5):
        seen, objective = bowl(hessian, torch.ones(2, dtype=torch.float64))
        found = run(objective, torch.zeros(2), max_evaluations=most)
        assert len(seen) == len(found.losses) == most
        assert not found.converged
        lowest = min(list(seen), key=lambda point: objective(point)[0])  # type: ignore[operator]
        assert torch.equal(found.point, lowest)


def test_at_the_minimum_it_stays() -> None:
    seen, objective = bowl(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    found = run(objective, torch.zeros(3))
    assert found.converged
    assert found.point.tolist() == [0.0, 0.0, 0.0]
    assert len(seen) <= 2


def test_noise_of_the_size_of_the_tolerance_ends_it() -> None:
    calls = [0]

    def noisy(point: Tensor) -> tuple[float, Tensor]:
        calls[0] += 1
        return float(point @ point) / 2 + 1e-3 * math.sin(1e4 * calls[0]), point

    found = run(noisy, torch.ones(4), tolerance=2e-3)
    assert found.converged
    assert calls[0] < 15
    assert found.losses[-1] < 5e-3

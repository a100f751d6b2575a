"""Minimising a smooth function of a few numbers in few, costly evaluations: BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Loss and gradient ``[n]`` at a point ``[n]``, both points and gradients float64.
Objective = Callable[[Tensor], tuple[float, Tensor]]

_FIRST_STEP = 0.25  # length of the first step, while nothing is known of the curvature
_ENOUGH = 1e-4  # share of the promised gain that a step has to bring (Armijo)
_SHORTER = (0.1, 0.5)  # a step that brings less is made shorter by a factor in this range


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        point: The best point, float64 ``[n]``.
        losses: The lowest loss so far after every evaluation, >= 1 of them; never rises.
        inverse_hessian: What was learnt of the curvature, float64 ``[n, n]``, positive definite.
        converged: It ended because no more was to be gained, not because of ``max_evaluations``.
    """

    point: Tensor
    losses: list[float]
    inverse_hessian: Tensor
    converged: bool


def minimise(
    objective: Objective,
    start: Tensor,
    *,
    tolerance: float,
    max_evaluations: int,
    inverse_hessian: Tensor | None = None,
) -> Minimum:
    """Minimises a function by BFGS with a backtracking line search.

    Ends once the last step gained less than ``tolerance`` and the next one promises less (half
    the squared Newton decrement), or a step had to be made so short that it does. For few
    numbers: it keeps a matrix ``[n, n]``.

    Args:
        objective: The function; a loss that is not finite counts as too far.
        start: Where to start, ``[n]``.
        tolerance: In units of the loss, > 0.
        max_evaluations: Most evaluations of the objective, >= 1.
        inverse_hessian: The curvature as an earlier call on a similar function left it; None
            begins with a short step downhill.

    Source: Nocedal and Wright, Numerical Optimization, 2nd edition: algorithm 6.1, its first
    curvature (6.20), and backtracking by interpolation (3.57).
    """
    point = start.double()
    loss, gradient = objective(point)
    losses = [loss]
    unknown = inverse_hessian is None
    if inverse_hessian is None:
        norm = float(gradient.norm())
        inverse_hessian = torch.eye(len(point), dtype=torch.float64) * _FIRST_STEP
        inverse_hessian /= norm if norm > 0 else 1.0
    gain = math.inf
    while True:
        direction = -inverse_hessian @ gradient
        slope = float(gradient @ direction)
        length, accepted = 1.0, False
        while not accepted:
            promised = -length * slope / 2
            # A shortened step has shown that the curvature promised too much.
            if promised < tolerance and (gain < tolerance or length < 1):
                return _minimum(point, losses, inverse_hessian, converged=True)
            if len(losses) >= max_evaluations:
                return _minimum(point, losses, inverse_hessian, converged=False)
            step = length * direction
            new_loss, new_gradient = objective(point + step)
            accepted = new_loss <= loss + _ENOUGH * length * slope
            losses.append(new_loss if accepted else loss)
            if not accepted:
                length *= _shorter(length * slope, new_loss - loss)
        change = new_gradient - gradient
        if unknown and float(step @ change) > 0:
            scale = (step @ change) / (change @ change)
            inverse_hessian = torch.eye(len(point), dtype=torch.float64) * scale
            unknown = False
        inverse_hessian = _updated(inverse_hessian, step, change)
        gain = loss - new_loss
        point, loss, gradient = point + step, new_loss, new_gradient


def _minimum(
    point: Tensor, losses: list[float], inverse_hessian: Tensor, *, converged: bool
) -> Minimum:
    return Minimum(point=point, losses=losses, inverse_hessian=inverse_hessian, converged=converged)


def _shorter(promised: float, brought: float) -> float:
    """Returns the factor to the minimum of the parabola through what a step showed.

    Args:
        promised: Slope along the step, < 0.
        brought: Change of the loss over the step; may be infinite or NaN.
    """
    least, most = _SHORTER
    if not math.isfinite(brought):
        return least
    return min(most, max(least, -promised / (2 * (brought - promised))))


def _updated(inverse_hessian: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Returns the BFGS update ``[n, n]``; unchanged where the function curves downwards."""
    curvature = step @ change
    if curvature <= 0:
        return inverse_hessian
    left = torch.eye(len(step), dtype=torch.float64) - torch.outer(step, change) / curvature
    return left @ inverse_hessian @ left.T + torch.outer(step, step) / curvature

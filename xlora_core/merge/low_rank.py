"""Sums of low-rank matrices, kept as factors: nothing here ever has the size of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """The best rank-r approximation of ``left @ right``.

    Attributes:
        left: ``[out, r]`` float64.
        right: ``[r, in]`` float64.
        singular_values: ``[min(R, out, in)]`` float64, of the whole product, falling. Those from
            the r-th on are what was cut: their squares sum to the squared Frobenius error.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor


def squared_norm(left: Tensor, right: Tensor) -> float:
    """Returns the squared Frobenius norm of ``left @ right``.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.
    """
    left, right = left.double(), right.double()
    # trace((L R)^T L R) = sum of (L^T L) * (R R^T)
    return float(((left.T @ left) * (right @ right.T)).sum())


def truncate(left: Tensor, right: Tensor, rank: int) -> Truncated:
    """Returns the rank-r matrix that is nearest to ``left @ right`` in the Frobenius norm.

    With ``left = Q_l R_l`` and ``right^T = Q_r R_r``, the singular values of the product are
    those of the small core ``R_l R_r^T``, and its singular vectors are the core's, rotated.

    Args:
        left: ``[out, R]``.
        right: ``[R, in]``.
        rank: r, >= 1; the result has no more than ``min(R, out, in)``.

    Source: Eckart and Young, 1936.
    """
    Q_l, R_l = torch.linalg.qr(left.double())  # [out, c], [c, R]
    Q_r, R_r = torch.linalg.qr(right.double().T)  # [in, d], [d, R]
    U, S, Vh = torch.linalg.svd(R_l @ R_r.T, full_matrices=False)  # [c, m], [m], [m, d]
    # Half of each singular value on either side keeps both factors at one magnitude.
    root = S[:rank].sqrt()
    return Truncated(
        left=(Q_l @ U[:, :rank]) * root,
        right=root[:, None] * (Vh[:rank] @ Q_r.T),
        singular_values=S,
    )

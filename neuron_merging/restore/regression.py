"""Ridge regression that chooses its λ on rows that are held out, pruned weights being one of the choices (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from neuron_merging.errors import NeuronMergingError
from neuron_merging.linalg import cholesky, gram, penalty

GRID = (1e-4, 0.1, 1.0, 10.0)  # times λ: what is tried
LEAST = 1e-9  # λ that is tried, at least

Rows = tuple[Tensor, Tensor]  # what a layer sees [n, F], and is to give there [n, M]
Fit = tuple[Tensor, Tensor]  # weights [M, F] and bias [M], float64


def best_fit(
    rows: Rows, held: Rows, start: Fit, ridge: float, intercept: bool
) -> tuple[Fit | None, tuple[float, float]]:
    """The fit that errs least on the rows `held`, made again from all rows; the relative errors of `start` and of it on `held`.

    None where `start` errs least. Tried are λ = `ridge` times `GRID`, and the weights of `start` with another bias.
    intercept: whether the layer can have another bias.
    """
    before = relative_error(held, start)
    lambdas = [max(ridge * factor, LEAST) for factor in GRID] + ([inf] if intercept else [])
    fitted = fits(rows, start, lambdas, intercept)
    errors = {lam: relative_error(held, fit) for lam, fit in fitted.items()}
    best = min(errors, key=errors.__getitem__, default=None)
    if best is None or not errors[best] < before:
        return None, (before, before)
    everything = torch.cat([rows[0], held[0]]), torch.cat([rows[1], held[1]])
    again = fits(everything, start, [best], intercept)
    return again.get(best, fitted[best]), (before, errors[best])


def fits(rows: Rows, start: Fit, lambdas: Sequence[float], intercept: bool) -> dict[float, Fit]:
    """By λ the weights and bias that are fitted, λ = ∞ being the weights of `start` with another bias.

    A λ that is too small for rounding is left out.
    """
    (U, T), (W0, b0) = rows, start
    u, t = (U.mean(0).double(), T.mean(0).double()) if intercept else (W0.new_zeros(W0.shape[1]), b0)
    U = U - u.to(U)
    R = T - t.to(T) - U @ W0.T.to(U)
    n, features = U.shape
    dual = n < features  # (A + λD)⁻¹ Uᵀ = D⁻¹ Uᵀ (U D⁻¹ Uᵀ / n + λ)⁻¹, with n unknowns instead of F
    if dual:
        U, R = U.double(), R.double()
        D = penalty(U.pow(2).mean(0), 1.0)
        kernel = (U / D) @ U.T / n
    else:
        kernel, crossed = gram(U) / n, (U.T @ R).double() / n
    fitted: dict[float, Fit] = {}
    for lam in lambdas:
        W = W0
        if lam < inf:
            shift = torch.full_like(kernel.diagonal(), lam) if dual else penalty(kernel.diagonal(), lam)
            try:
                factor = cholesky(kernel + shift.diag())
            except NeuronMergingError:
                continue
            if dual:
                W = W0 + (U.T @ torch.cholesky_solve(R, factor) / (n * D[:, None])).T
            else:
                W = W0 + torch.cholesky_solve(crossed, factor).T
        fitted[lam] = W, t - W @ u
    return fitted


def relative_error(rows: Rows, fit: Fit) -> float:
    """The error of what a layer with these weights gives, as a share of what it is to give."""
    (U, T), (W, b) = rows, fit
    size = T.double().norm().clamp(min=1e-300)
    return float((U @ W.T.to(U) + b.to(U) - T).double().norm() / size)

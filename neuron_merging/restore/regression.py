"""Ridge regression of a layer, or of each group of one, that chooses its λ on rows which are held out (ours).

Rows are what a layer sees, U [G, n, F], and what it is to give, T [G, n, M], for each of its G groups. Those that are held out
come last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from neuron_merging.linalg import ROWS, cholesky, gram, penalty

ROUNDING = 1e-6  # of a neuron's largest output: residuals below it are rounding, and are not fitted

Loss = Callable[[Tensor, Tensor], float]  # of predictions and targets [G, n, M]
Aware = Callable[[Tensor, Tensor], Tensor]  # from predictions and targets to the next targets


@dataclass(frozen=True)
class Fit:
    """Weights [G, M, F] and bias [G, M]. before, after: the held-out loss of the weights that it started from, and of these.

    ridge: the λ that was chosen; ∞: the weights are those from before. solver: of all rows, with that λ.
    """

    W: Tensor
    b: Tensor
    before: float
    after: float
    ridge: float
    solver: Solver | None


class Normal:
    """The normal equations of centred rows U [G, n, F]; where n < F, the kernel matrix of the rows instead."""

    def __init__(self, U: Tensor, covariance: Tensor | None = None) -> None:
        self.U, self.n = U, U.shape[1]
        self.dual = self.n < U.shape[2]
        if self.dual:  # (A + λD)⁻¹ Uᵀ = D⁻¹ Uᵀ (U D⁻¹ Uᵀ / n + λ)⁻¹, with n unknowns instead of F
            rows = U.double()
            self.D = penalty(rows.pow(2).mean(1), 1.0)  # [G, F]
            self.A = (rows / self.D[:, None]) @ rows.transpose(1, 2) / self.n
        else:
            self.A = products(U) / self.n if covariance is None else covariance

    def factor(self, ridge: float) -> Tensor:
        """The Cholesky factor for this λ. Raises NeuronMergingError where λ is too small for rounding."""
        A = self.A.clone()
        diagonal = A.diagonal(dim1=1, dim2=2)
        if self.dual:
            diagonal += ridge
        else:
            diagonal += penalty(diagonal, ridge)
        return cholesky(A)

    def solve(self, R: Tensor, factor: Tensor) -> Tensor:
        """The coefficients [G, M, F] for centred targets R [G, n, M]."""
        if self.dual:
            coefficients = torch.cholesky_solve(R.double(), factor) / self.n
            return ((self.U.double().transpose(1, 2) @ coefficients) / self.D[..., None]).transpose(1, 2)
        return torch.cholesky_solve((self.U.transpose(1, 2) @ R).double() / self.n, factor).transpose(1, 2)


@dataclass(frozen=True)
class Solver:
    """A factored regression on rows with this mean [G, F]. dual: it needs its own rows, and is no good for others."""

    mean: Tensor
    factor: Tensor
    dual: bool

    def __call__(self, R: Tensor, U: Tensor) -> Tensor:
        """The coefficients [G, M, F] for centred targets R [G, n, M] and the centred rows U [G, n, F] that they belong to."""
        return torch.cholesky_solve((U.transpose(1, 2) @ R).double() / U.shape[1], self.factor).transpose(1, 2)


def products(U: Tensor) -> Tensor:
    """Uᵀ U [G, F, F] of U [G, n, F], in float64."""
    if len(U) == 1:
        return gram(U[0])[None]
    return sum((part.transpose(1, 2) @ part).double() for part in U.split(ROWS, 1))


def fit(
    U: Tensor,
    T: Tensor,
    start: tuple[Tensor, Tensor],
    held: int,
    ridges: Sequence[float],
    loss: Loss,
    aware: Aware | None = None,
    repeats: int = 0,
) -> Fit:
    """The fit that errs least on the last `held` rows, made again from all rows.

    U: is overwritten. start: weights [G, M, F] and bias [G, M] that the fit starts from, and that stay where they err least.
    ridges: the λ to try; ∞ for the weights of `start` with another bias. With held = 0 the first λ is taken.
    aware: gives targets for `repeats` further fits.
    """
    W0, b0 = start
    mean = U.mean(1)
    U -= mean[:, None]
    base = U @ W0.transpose(1, 2)  # what the first weights give, but for a constant
    n = U.shape[1] - held
    train, ridge, before, after = Normal(U[:, :n]), ridges[0], 0.0, 0.0
    seen = train
    if held:
        known = None if train.dual else (train.A * n + products(U[:, n:])) / U.shape[1]
        seen = Normal(U, known)
        unseen, aim = U[:, n:], T[:, n:]
        before = loss(base[:, n:] + (b0 + (W0 @ mean[..., None]).squeeze(-1)).to(U)[:, None], aim)
        losses = {}
        R = T[:, :n] - base[:, :n]
        constant = R.mean(1, keepdim=True)
        for lam in ridges:
            prediction = base[:, n:] + constant
            if lam < inf:
                D = train.solve(R - constant, train.factor(lam)).to(U)
                shift = U[:, :n].mean(1, keepdim=True)
                prediction = prediction + (unseen - shift) @ D.transpose(1, 2)
            losses[lam] = loss(prediction, aim)
        ridge = min(losses, key=losses.__getitem__)
        after = losses[ridge]
        if not after < before:
            return Fit(W0, b0, before, before, inf, None)
    if ridge == inf:
        constant = (T - base).mean(1).to(W0)
        return Fit(W0, constant - (W0 @ mean.to(W0)[..., None]).squeeze(-1), before, after, inf, None)
    factor = seen.factor(ridge)

    def solved(target: Tensor) -> tuple[Tensor, Tensor]:
        middle = target.mean(1, keepdim=True)
        R = target - middle - base
        rounding = R.abs().amax(1, keepdim=True) <= ROUNDING * target.abs().amax(1, keepdim=True)
        return W0 + seen.solve(R.masked_fill(rounding, 0), factor).to(W0), middle

    W, middle = solved(T)
    for _ in range(repeats if aware else 0):
        W, middle = solved(aware(U @ W.transpose(1, 2).to(U) + middle, T))
    b = middle[:, 0].to(W) - (W @ mean.to(W)[..., None]).squeeze(-1)
    return Fit(W, b, before, after, ridge, Solver(mean, factor, seen.dual))

"""Ridge regression as restoration does it (ours): many targets, features that count for what they vary."""

import torch
from torch import Tensor

from products import across
from walk import centre, cholesky, covariance, penalty


class Ridge:
    """Ridge regression on the rows of U [n, F], in float64 but for the products over n; any number of targets.

    Takes the mean [F] off U itself: of neurons that hardly vary, the products would lose what they have to tell.
    """

    def __init__(self, U: Tensor, ridge: float) -> None:
        n, features = U.shape
        self.mean, self.U = centre(U), U
        self.dual = n < features
        if self.dual:  # (A + Λ)⁻¹ Uᵀ = Λ⁻¹ Uᵀ (U Λ⁻¹ Uᵀ / n + I)⁻¹, with n unknowns instead of F
            self.U = U.double()
            self.penalty = penalty(self.U.pow(2).mean(0), ridge)
            scaled = self.U / (n * self.penalty).sqrt()
            kernel = scaled @ scaled.T + torch.eye(n, dtype=torch.float64, device=U.device)
        else:
            kernel = covariance(U)
            kernel.diagonal().add_(penalty(kernel.diagonal(), ridge))
        self.factor = cholesky(kernel)

    def forget(self) -> "Ridge":
        """Let go of the rows, which are many; calls have to bring their own."""
        self.U = None
        return self

    def __call__(self, R: Tensor, U: Tensor | None = None) -> Tensor:
        """The coefficients [M, F] for the centred targets R [n, M]: to be added to the weights that left them over.

        U: other rows to which the targets belong, less the mean; the dual form cannot do with others.
        """
        if self.dual:
            return (self.U.T @ torch.cholesky_solve(R.double(), self.factor) / (len(R) * self.penalty[:, None])).T
        return torch.cholesky_solve(across(R, self.U if U is None else U).T.double() / len(R), self.factor).T

"""The consumer of a unit when fewer neurons are kept (ours): the error of its output, and its weights in that case."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from neuron_merging.decompose import Decomposition, ranked
from neuron_merging.graph.tracing import CONVS
from neuron_merging.linalg import centre, cholesky, covariance, penalty

STEPS = 16  # an error curve without a closed form is computed at this many widths


# ---------------------------------------------------------------- error curves and sensitivities


@dataclass(frozen=True)
class Thinned:
    """A unit thinned to k neurons: its consumer, in the whole network, then has the weights W [M, F] and the constant c [M]."""

    k: int
    W: Tensor
    c: Tensor


class Consumer:
    """A consumer with the weights W [M, F] that sees U [n, F]: computes how well it can do with fewer neurons.

    slope [M]: the factor by which the BatchNorm behind scales each output. columns [N, taps]: for each neuron, its columns of U
    and W. A = Cov(u, u) in float64; if there are fewer samples than features, U is kept instead of A.
    """

    def __init__(self, U: Tensor, W: Tensor, slope: Tensor, columns: Tensor, ridge: float) -> None:
        n, features = U.shape
        self.W, self.slope, self.columns = W, slope, columns
        self.mean = centre(U).double()
        self.few = n < features
        if self.few:
            self.U = U.double() / n**0.5  # A = UᵀU
            energy = self.U.pow(2).sum(0)
        else:
            self.A = covariance(U)
            energy = self.A.diagonal()
        self.penalty = penalty(energy, ridge)

    def regressed(self, order: Tensor, measured: Sequence[int]) -> tuple[np.ndarray, list[Thinned]]:
        """E(k) for all k if the consumer is fitted to the kept neurons by ridge regression; and its forms at `measured`.

        Let A + Λ = L Lᵀ with the features in this order, S the kept ones and D the dropped ones. As L is triangular, the kept
        ones take over W_D L_DS L_SS⁻¹, and W_D L_DD is left over. So one factor serves every k.
        """
        if self.few:
            return self._regressed_few(order, measured)
        N, taps = self.columns.shape
        by_place = self.columns[order].flatten()
        R = self.A[by_place][:, by_place]
        R.diagonal().add_(self.penalty[by_place])
        L = cholesky(R)
        W = self.W[:, by_place]
        left = self.slope[:, None] * W
        error = (left @ L).pow(2).sum(0) - left.pow(2).sum(0) * self.penalty[by_place]
        error = error.view(N, taps).sum(1).flip(0).cumsum(0).flip(0)
        thinned = []
        for k in measured:
            kept = k * taps
            B = W[:, kept:] @ L[kept:, :kept]
            B = torch.linalg.solve_triangular(L[:kept, :kept], B, upper=False, left=False)
            thinned.append(self._thinned(k, by_place[:kept], W[:, :kept] + B))
        return np.append(error.cpu().numpy(), 0.0).clip(min=0), thinned

    def _regressed_few(self, order: Tensor, measured: Sequence[int]) -> tuple[np.ndarray, list[Thinned]]:
        """The same, computed with n × n kernel matrices at some k, and interpolated linearly between them."""
        N, taps = self.columns.shape
        by_place, n = self.columns[order].flatten(), len(self.U)
        error, thinned = {}, []
        for k in computed_widths(N, measured):
            S, D = by_place[: k * taps], by_place[k * taps :]
            scaled = self.U[:, S] / self.penalty[S]
            kernel = scaled @ self.U[:, S].T + torch.eye(n, dtype=torch.float64, device=self.U.device)
            missing = self.U[:, D] @ self.W[:, D].T  # [n, M]
            left = torch.linalg.solve(kernel, missing)
            error[k] = float((missing * left * self.slope.pow(2)).sum())
            if k in measured:
                thinned.append(self._thinned(k, S, self.W[:, S] + (scaled.T @ left).T))
        return _between(error, N), thinned

    def _thinned(self, k: int, S: Tensor, W: Tensor) -> Thinned:
        """The consumer with the weights W at the columns S and zeros elsewhere; its mean output stays the same."""
        whole = torch.zeros_like(self.W)
        whole[:, S] = W
        return Thinned(k, whole.float(), ((self.W - whole) @ self.mean).float())

    def decomposed(
        self, parts: dict[int, Decomposition | None], measured: Sequence[int]
    ) -> tuple[np.ndarray, list[Thinned]]:
        """E(k) if a compensation of one layer has given `parts`, by k; and the consumer's forms at `measured`.

        A part is None if no neuron is kept.
        """
        N, by_neuron = len(self.columns), self.W[:, self.columns]
        error, thinned = {}, []
        for k, part in parts.items():
            W, c = absorbed(by_neuron, self.columns, part)
            change = W - self.W
            error[k] = float((self.slope.pow(2) * (self._energy(change) + (change @ self.mean + c).pow(2))).sum())
            if k in measured:
                thinned.append(Thinned(k, W.float(), c.float()))
        return _between(error, N), thinned

    def _energy(self, change: Tensor) -> Tensor:
        """The variance of (ΔW) u, [M]."""
        if self.few:
            return (self.U @ change.T).pow(2).sum(0)
        return ((change @ self.A) * change).sum(1)

    def greedy(self) -> Tensor:
        """The neurons in a greedy order: next is the one that explains most of what is left of the consumer's output.

        Computed by a pivoted Cholesky factorisation with one block for each neuron.
        If there are fewer samples than features, they are ordered by what each explains alone.
        """
        (N, taps), left = self.columns.shape, self.slope[:, None] * self.W
        if self.few:
            G = ((left @ self.U.T) @ self.U)[:, self.columns]  # [M, N, taps]
            by_neuron = self.U[:, self.columns]
            blocks = torch.einsum("bni,bnj->nij", by_neuron, by_neuron)
        else:
            G = (left @ self.A)[:, self.columns]
            blocks = self.A[self.columns[:, :, None], self.columns[:, None, :]]  # [N, taps, taps]
        blocks = blocks + torch.diag_embed(self.penalty[self.columns])
        if self.few:
            return ranked(_explained(G, blocks))
        G, order = G.clone(), []
        L = self.W.new_zeros(N * taps, N, taps)  # filled row by row; each row has all columns
        free = torch.ones(N, dtype=torch.bool, device=self.W.device)
        for step in range(N):
            j = int(_explained(G, blocks).where(free, -1).argmax())
            earlier = slice(0, step * taps)
            R = self.A[self.columns[j]][:, self.columns].clone()  # [taps, N, taps]
            R[:, j].diagonal().add_(self.penalty[self.columns[j]])
            R -= torch.einsum("ri,rnk->ink", L[earlier, j], L[earlier])
            factor = cholesky(R[:, j])
            row = torch.linalg.solve_triangular(factor, R.reshape(taps, -1), upper=False).view(taps, N, taps)
            along = torch.linalg.solve_triangular(factor, G[:, j].T, upper=False)  # [taps, M]
            L[step * taps : (step + 1) * taps] = row
            G -= torch.einsum("im,ink->mnk", along, row)
            blocks = blocks - torch.einsum("ink,inl->nkl", row, row)
            order.append(j)
            free[j] = False
        return torch.tensor(order, device=self.W.device)


def computed_widths(N: int, measured: Sequence[int]) -> list[int]:
    """The widths at which an error curve without a closed form is computed, ascending."""
    return sorted({round(N * step / STEPS) for step in range(STEPS)} | set(measured))


def _between(error: dict[int, float], N: int) -> np.ndarray:
    """E at k = 0…N, interpolated linearly between the computed widths; 0 at N: [N + 1]."""
    return np.interp(np.arange(N + 1), [*error, N], [*error.values(), 0.0])


def columns_by_neuron(layer: nn.Module, N: int) -> Tensor:
    """For each of the N neurons in front of `layer`, its columns in the layer's patches and in its `matrix`: [N, taps]."""
    columns = torch.arange(layer.weight[0].numel(), device=layer.weight.device)
    return columns.view(-1, N).T if isinstance(layer, CONVS) else columns.view(N, -1)


def absorbed(by_neuron: Tensor, columns: Tensor, part: Decomposition | None) -> tuple[Tensor, Tensor]:
    """The consumer's weights [M, F] and constant [M] after it has absorbed a decomposition (None: no neuron is kept).

    by_neuron: its original weights, [M, N, taps]. columns [N, taps]: the places of those weights among the F.
    """
    M = len(by_neuron)
    W, c = by_neuron.new_zeros(M, columns.numel()), by_neuron.new_zeros(M)
    if part is not None:
        W[:, columns[part.keep].flatten()] = torch.einsum("mnk,pn->mpk", by_neuron, part.Z).reshape(M, -1)
        if part.shift is not None:
            c = by_neuron.sum(2) @ part.shift
    return W, c


def _explained(G: Tensor, blocks: Tensor) -> Tensor:
    """How much each neuron n explains: tr(G_n R_nn⁻¹ G_nᵀ), [N], for G [M, N, taps] and R_nn = `blocks` [N, taps, taps]."""
    taps = blocks.shape[-1]
    jitter = 1e-9 * blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(taps, dtype=blocks.dtype, device=blocks.device)
    factor, _ = torch.linalg.cholesky_ex(blocks + jitter[:, None, None] * eye)
    along = torch.linalg.solve_triangular(factor, G.permute(1, 2, 0), upper=False)  # [N, taps, M]
    return along.pow(2).sum((1, 2)).nan_to_num(0)

"""A layer that reads a space of which fewer indices are kept (ours): the error of its output, and its weights in that case."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuron_merging.decompose import Decomposition
from neuron_merging.linalg import centre, cholesky, covariance, penalty

STEPS = 16  # an error curve without a closed form is computed at this many widths


@dataclass(frozen=True)
class Thinned:
    """A layer that k indices of a space are left for: its weights W [M, P·taps] at the columns `kept`, and a constant c [M].

    own: all its columns that belong to the space; those that are not kept are 0. Other columns stay as they are.
    """

    k: int
    own: Tensor
    kept: Tensor
    W: Tensor
    c: Tensor

    def put(self, weights: Tensor) -> Tensor:
        """The weights [M, F] with these in their place."""
        made = weights.index_fill(1, self.own.to(weights.device), 0)
        made[:, self.kept] = self.W.to(made)
        return made


class Consumer:
    """A layer with the weights W [M, F] that sees U [n, F]: computes how well it can do with fewer indices of a space.

    slope [M]: the factor by which the BatchNorm behind scales each output. columns [N, taps]: for each index of the space, its
    columns of U and W; of other columns, nothing is kept here. A = Cov(u, u) in float64; if there are fewer samples than
    features, U is kept instead of A.
    """

    def __init__(self, U: Tensor, W: Tensor, slope: Tensor, columns: Tensor, ridge: float) -> None:
        self.own = columns.flatten()
        if len(self.own) < U.shape[1]:
            U, W = U[:, self.own], W[:, self.own]
            columns = torch.arange(len(self.own), device=U.device).view(columns.shape)
        else:
            self.own = torch.arange(U.shape[1], device=U.device)
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

    def curve(
        self, order: Tensor, measured: Sequence[int], parts: dict[int, Decomposition | None] | None
    ) -> tuple[np.ndarray, list[Thinned]]:
        """E(k) for all k and the layer's forms at `measured`; parts: as `decomposed` takes them, None for a regression."""
        return self.regressed(order, measured) if parts is None else self.decomposed(parts, measured)

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
        return between(error, N), thinned

    def _thinned(self, k: int, S: Tensor, W: Tensor) -> Thinned:
        """The layer with the weights W at the columns S; its mean output stays the same."""
        c = self.W @ self.mean - W @ self.mean[S]
        return Thinned(k, self.own, self.own[S], W.float(), c.float())

    def decomposed(
        self, parts: dict[int, Decomposition | None], measured: Sequence[int]
    ) -> tuple[np.ndarray, list[Thinned]]:
        """E(k) if a compensation of one layer has given `parts`, by k; and the layer's forms at `measured`.

        A part is None if nothing is kept.
        """
        N, by_index = len(self.columns), self.W[:, self.columns]
        error, thinned = {}, []
        for k, part in parts.items():
            S, W, c = absorbed(by_index, self.columns, part)
            change = -self.W
            change[:, S] += W
            error[k] = float((self.slope.pow(2) * (self._energy(change) + (change @ self.mean + c).pow(2))).sum())
            if k in measured:
                thinned.append(Thinned(k, self.own, self.own[S], W.float(), c.float()))
        return between(error, N), thinned

    def _energy(self, change: Tensor) -> Tensor:
        """The variance of (ΔW) u, [M]."""
        if self.few:
            return (self.U @ change.T).pow(2).sum(0)
        return ((change @ self.A) * change).sum(1)


class Pivots:
    """A pivoted Cholesky factorisation with one block for each index: what each would explain of the layer's output next.

    If there are fewer samples than features, it is what each explains alone.
    """

    def __init__(self, consumer: Consumer) -> None:
        self.consumer, self.columns, self.step = consumer, consumer.columns, 0
        N, taps = self.columns.shape
        left = consumer.slope[:, None] * consumer.W
        if consumer.few:
            self.G = ((left @ consumer.U.T) @ consumer.U)[:, self.columns]  # [M, N, taps]
            by_index = consumer.U[:, self.columns]
            self.blocks = torch.einsum("bni,bnj->nij", by_index, by_index)
        else:
            self.G = (left @ consumer.A)[:, self.columns]
            self.blocks = consumer.A[self.columns[:, :, None], self.columns[:, None, :]]  # [N, taps, taps]
            self.L = self.G.new_zeros(N * taps, N, taps)  # filled row by row; each row has all columns
        self.blocks = self.blocks + torch.diag_embed(consumer.penalty[self.columns])
        self.alone = _explained(self.G, self.blocks) if consumer.few else None

    def explained(self) -> Tensor:
        """By how much each index would lower the error, [N]."""
        return _explained(self.G, self.blocks) if self.alone is None else self.alone

    def take(self, j: int) -> None:
        """Index j is kept: what is left to explain is less."""
        if self.alone is not None:
            return
        taps = self.columns.shape[1]
        earlier = slice(0, self.step * taps)
        R = self.consumer.A[self.columns[j]][:, self.columns].clone()  # [taps, N, taps]
        R[:, j].diagonal().add_(self.consumer.penalty[self.columns[j]])
        R -= torch.einsum("ri,rnk->ink", self.L[earlier, j], self.L[earlier])
        factor = cholesky(R[:, j])
        row = torch.linalg.solve_triangular(factor, R.reshape(taps, -1), upper=False).view(R.shape)
        along = torch.linalg.solve_triangular(factor, self.G[:, j].T, upper=False)  # [taps, M]
        self.L[self.step * taps : (self.step + 1) * taps] = row
        self.G -= torch.einsum("im,ink->mnk", along, row)
        self.blocks = self.blocks - torch.einsum("ink,inl->nkl", row, row)
        self.step += 1


def greedy(consumers: Sequence[Consumer], more: Tensor) -> Tensor:
    """The indices in a greedy order: next is the one that explains most of what is left of the outputs of all consumers.

    more [N]: what each explains elsewhere, whatever else is kept.
    """
    pivots = [Pivots(consumer) for consumer in consumers]
    order: list[int] = []
    free = torch.ones_like(more, dtype=torch.bool)
    for _ in range(len(more)):
        gains = sum((p.explained() for p in pivots), more)
        order.append(int(gains.where(free, -1).argmax()))
        free[order[-1]] = False
        for p in pivots:
            p.take(order[-1])
    return torch.tensor(order, device=more.device)


def computed_widths(N: int, measured: Sequence[int]) -> list[int]:
    """The widths at which an error curve without a closed form is computed, ascending."""
    return sorted({round(N * step / STEPS) for step in range(STEPS)} | set(measured))


def between(error: dict[int, float], N: int) -> np.ndarray:
    """E at k = 0…N, interpolated linearly between the computed widths; 0 at N: [N + 1]."""
    return np.interp(np.arange(N + 1), [*error, N], [*error.values(), 0.0])


def absorbed(by_index: Tensor, columns: Tensor, part: Decomposition | None) -> tuple[Tensor, Tensor, Tensor]:
    """A layer that has absorbed a decomposition (None: nothing is kept): kept columns, weights [M, P·taps], constant [M].

    by_index: its original weights, [M, N, taps]. columns [N, taps]: where those are.
    """
    M, c = len(by_index), by_index.new_zeros(len(by_index))
    if part is None:
        return columns[:0].flatten(), by_index.new_zeros(M, 0), c
    W = torch.einsum("mnk,pn->mpk", by_index, part.Z).reshape(M, -1)
    if part.shift is not None:
        c = by_index.sum(2) @ part.shift
    return columns[part.keep].flatten(), W, c


def _explained(G: Tensor, blocks: Tensor) -> Tensor:
    """How much each neuron n explains: tr(G_n R_nn⁻¹ G_nᵀ), [N], for G [M, N, taps] and R_nn = `blocks` [N, taps, taps]."""
    taps = blocks.shape[-1]
    jitter = 1e-9 * blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(taps, dtype=blocks.dtype, device=blocks.device)
    factor, _ = torch.linalg.cholesky_ex(blocks + jitter[:, None, None] * eye)
    along = torch.linalg.solve_triangular(factor, G.permute(1, 2, 0), upper=False)  # [N, taps, M]
    return along.pow(2).sum((1, 2)).nan_to_num(0)

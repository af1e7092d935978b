"""Neuron Merging (Kim, Kim, Park, Jeon, NeurIPS 2020): drop neurons, and let the most similar kept ones stand in for them.

    W [N, D] ≈ Zᵀ Y with Y = W[keep] [P, D];  if every column of the scaling matrix Z [P, N] has at most one entry and
    that is positive, ReLU(Zᵀ v) = Zᵀ ReLU(v), so Z moves into the next layer: W_next ← W_next ×₂ Z.

The letters are the paper's: N neurons of D weights, P kept ones, Z, threshold t, λ. Matrices over pairs are [P, Q]: row m
is a kept neuron, column n one of the Q = N − P dropped ones. Everything is computed in float64.

To add a criterion or a compensation, write its function and name it in `CRITERIA` or `COMPENSATIONS`.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchNorm:
    """γ, β and the running statistics μ, v behind a layer, each [N]; z = γ (u − μ) / √(v + ε) + β."""

    gamma: Tensor
    beta: Tensor
    mu: Tensor
    var: Tensor
    eps: float

    @property
    def gain(self) -> Tensor:
        """γ / √(v + ε), [N]."""
        return self.gamma / (self.var + self.eps).sqrt()

    def of(self, index: Tensor, column: bool = False) -> tuple[Tensor, ...]:
        """γ, β, μ, v and σ = √(v + ε) of the neurons `index` [K]: each [K], or [K, 1] as a column."""
        values = (self.gamma, self.beta, self.mu, self.var, (self.var + self.eps).sqrt())
        return tuple(x[index][:, None] if column else x[index] for x in values)


@dataclass(frozen=True)
class Neurons:
    """A layer as the method sees it.

    W: [N, D] float64, a neuron or flattened filter a row; without BatchNorm the bias is appended as the last column.
    bn: the BatchNorm behind the layer (a bias of the layer is part of its μ), or None. relu: a ReLU follows.
    biased: whether the last column of W is a bias.
    """

    W: Tensor
    bn: BatchNorm | None
    relu: bool
    biased: bool = False

    @cached_property
    def constants(self) -> Tensor:
        """What neurons give that are the same for every input, by a filter of zeros or γ = 0: [N], NaN for the others."""
        filters = self.W[:, :-1] if self.biased else self.W
        constant = filters[:, 0] == 0
        constant[constant.clone()] = (filters[constant] == 0).all(1)  # of these few, all weights are looked at
        z = self.W[:, -1] if self.biased else torch.zeros_like(self.W[:, 0])
        if self.bn is not None:
            constant |= self.bn.gamma == 0
            z = self.bn.beta - self.bn.gain * self.bn.mu  # with γ = 0 just β
        return torch.where(constant, z.relu() if self.relu else z, torch.nan)


@dataclass(frozen=True)
class Decomposition:
    """What becomes of a layer's neurons: activations a [N] ≈ Zᵀ a[keep] + shift."""

    keep: Tensor  # [P] int64, ascending
    Z: Tensor  # [P, N] float64
    shift: Tensor | None = None  # [N] float64: a constant per neuron that the next layer absorbs


# ---------------------------------------------------------------- selection: keep the P neurons with the largest score [N]


def l1_norm(W: Tensor) -> Tensor:
    """‖w_n‖₁"""
    return W.norm(p=1, dim=1)


def l2_norm(W: Tensor) -> Tensor:
    """‖w_n‖₂"""
    return W.norm(dim=1)


def l2_gm(W: Tensor) -> Tensor:
    """Σ_m ‖w_n − w_m‖₂: small near the geometric median, whose neurons the others can replace (He et al. 2019)."""
    return torch.cdist(W, W).sum(1)


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"l1-norm": l1_norm, "l2-norm": l2_norm, "l2-GM": l2_gm}


def select(W: Tensor, P: int, criterion: str) -> Tensor:
    """Indices [P], ascending, of the neurons of W [N, D] with the largest score; of equal ones the first stay."""
    return ranked(CRITERIA[criterion](W))[:P].sort().values


def ranked(scores: Tensor) -> Tensor:
    """Indices [N] by falling score [N]; equal ones in their order."""
    return scores.argsort(descending=True, stable=True)


def dropped(W: Tensor, keep: Tensor) -> Tensor:
    """Indices [Q], ascending, of the neurons that are not kept."""
    left_over = torch.ones(len(W), dtype=torch.bool, device=W.device)
    left_over[keep] = False
    return left_over.nonzero().squeeze(1)


# ---------------------------------------------------------------- compensation: the scaling matrix Z


def prune(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """No neuron stands in for a dropped one: the columns of Z are one-hot or zero. t and λ are not used."""
    N = len(neurons.W)
    return Decomposition(keep, torch.eye(N, dtype=torch.float64, device=neurons.W.device)[keep])


def merge(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """Merging as it was published (Algorithm 1 and what its implementation computes); reproduces the published tables.

    Without BatchNorm the partner of n is the kept m of largest cosine, its scale s = ‖w_n‖ / ‖w_m‖. With BatchNorm
        S = s (γ_m / γ_n) (v_n / v_m),  B = |(γ_m / v_m) (s (μ_n − v_n β_n / γ_n) − μ_m) + β_m| / S,
    and the partner has the least λ (1 − cos) + (1 − λ) minmax(B). Two things differ from what follows from the formula
    of BatchNorm (see `merge_derived`) and are kept, since the published numbers were made with them: the variance v
    stands where the standard deviation is meant, and n and m have changed places against s.
    """
    drop = dropped(neurons.W, keep)
    s, cos = compared(neurons.W, keep, drop)
    usable = s > 0  # a filter of zeros can neither be scaled up nor be replaced
    if neurons.bn is None:
        return Decomposition(keep, scaling_matrix(keep, drop, s, 1 - cos, cos, usable, t))
    gamma, beta, mu, v, _ = neurons.bn.of(drop)  # [Q]
    gamma_m, beta_m, mu_m, v_m, _ = neurons.bn.of(keep, column=True)  # [P, 1]
    S = s * (gamma_m / v_m) * (v / gamma)
    B = ((gamma_m / v_m) * (s * (mu - v * beta / gamma) - mu_m) + beta_m).abs() / S
    usable = usable & torch.isfinite(S) & torch.isfinite(B)  # γ or v of 0: m is no partner, n has none
    distance = lam * (1 - cos) + (1 - lam) * _minmax(B, usable)
    return Decomposition(keep, scaling_matrix(keep, drop, S, distance, cos, usable, t))


def merge_derived(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """Merging with the form that follows from u_n = s u_m in front of the BatchNorm: z_n = S z_m + B with σ = √(v + ε) and
        S = s (γ_n / γ_m) (σ_m / σ_n),  B = (γ_n / σ_n) (s (μ_m − σ_m β_m / γ_m) − μ_n) + β_n.
    The partner has the least λ (1 − cos) + (1 − λ) minmax(|B| / S) among those with S > 0, which pass a ReLU. Lossless
    for filters that are positive multiples of each other (B = 0). A neuron with γ = 0 is the constant β: it becomes shift.
    """
    if neurons.bn is None:
        return merge(neurons, keep, t=t, lam=lam)
    drop = dropped(neurons.W, keep)
    s, cos = compared(neurons.W, keep, drop)
    gamma, beta, mu, _, sigma = neurons.bn.of(drop)  # [Q]
    gamma_m, beta_m, mu_m, _, sigma_m = neurons.bn.of(keep, column=True)  # [P, 1]
    S = s * (gamma / gamma_m) * (sigma_m / sigma)
    B = (gamma / sigma) * (s * (mu_m - sigma_m * beta_m / gamma_m) - mu) + beta
    usable = (S > 0) & torch.isfinite(S) & torch.isfinite(B)
    distance = lam * (1 - cos) + (1 - lam) * _minmax(B.abs() / S, usable)
    Z = scaling_matrix(keep, drop, S, distance, cos, usable, t)
    shift = torch.zeros_like(neurons.bn.beta)
    shift[drop] = torch.where(gamma == 0, beta.relu() if neurons.relu else beta, 0)
    return Decomposition(keep, Z, shift if shift.any() else None)


COMPENSATIONS: dict[str, Callable[..., Decomposition]] = {
    "prune": prune,
    "merge": merge,
    "merge-derived": merge_derived,
}


def compared(W: Tensor, keep: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    """s = ‖w_n‖ / ‖w_m‖ and cos(w_m, w_n) of kept m and dropped n, [P, Q] each; 0 where either is a filter of zeros."""
    kept, others = W[keep], W[drop]
    norm_m, norm_n = kept.norm(dim=1)[:, None], others.norm(dim=1)
    s, both = norm_n / norm_m.where(norm_m > 0, torch.inf), norm_m * norm_n
    return s, kept @ others.T / both.where(both > 0, 1)


def cosines(W: Tensor, keep: Tensor, drop: Tensor) -> Tensor:
    """cos(w_m, w_n) of kept m and dropped n, [P, Q]; 0 where either is a filter of zeros."""
    return compared(W, keep, drop)[1]


def _minmax(B: Tensor, usable: Tensor) -> Tensor:
    """B [P, Q] scaled to 0…1 over the usable partners m of every n; 0 where they are all equal."""
    low = B.where(usable, torch.inf).amin(0)
    spread = B.where(usable, -torch.inf).amax(0) - low
    return ((B - low) / spread.where(spread > 0, 1)).where(usable & (spread > 0), 0)


def scaling_matrix(
    keep: Tensor, drop: Tensor, scale: Tensor, distance: Tensor, cos: Tensor, usable: Tensor, t: float
) -> Tensor:
    """Z [P, N]: one-hot for kept neurons; for the others the scale of the nearest usable one, if its cosine is at least t.

    scale, distance, cos, usable: [P, Q]. t = 0 accepts every cosine.
    """
    P, Q = cos.shape
    Z = torch.zeros(P, P + Q, dtype=cos.dtype, device=cos.device)
    Z[torch.arange(P, device=cos.device), keep] = 1
    partner, n = distance.where(usable, torch.inf).argmin(0), torch.arange(Q, device=cos.device)  # [Q]
    accepted = usable[partner, n] & ((cos[partner, n] >= t) | (t == 0))
    Z[partner, drop] = scale[partner, n].where(accepted, 0)
    return Z


def only_twins(Z: Tensor) -> Tensor:
    """Z [P, N] without its merges at a scale other than 1: what passes any activation."""
    return Z.where((Z - 1).abs() < 1e-3, 0)


def effective(neurons: Neurons) -> Tensor:
    """What the neurons compute, their BatchNorm included: weights and constant, [N, D + 1] (or W, without BatchNorm)."""
    if neurons.bn is None:
        return neurons.W
    bn = neurons.bn
    return torch.cat([neurons.W * bn.gain[:, None], (bn.beta - bn.gain * bn.mu)[:, None]], 1)


# ---------------------------------------------------------------- absorbing Z into the next layer


def absorb(W_next: Tensor, Z: Tensor) -> Tensor:
    """W_next ×₂ Z: [M, N, k] and [P, N] → [M, P, k], in the dtype of W_next.

    k: the places of a kernel or, behind a flatten, the consecutive inputs that belong to a neuron. Computed as [N, M, k]:
    one pass over memory brings it there, and neurons are added up and left out by whole rows.
    """
    W = W_next.transpose(0, 1).to(Z.dtype, copy=True, memory_format=torch.contiguous_format)  # [N, M, k]
    partner, n = Z.nonzero(as_tuple=True)
    if n.bincount(minlength=1).max() > 1:  # not the paper's: several neurons stand in for one
        W = torch.einsum("nmk,pn->pmk", W, Z)
    else:
        W *= Z.sum(0)[:, None, None]
        row = n.new_zeros(len(W)).index_copy_(0, n, partner)
        W = torch.zeros_like(W[: len(Z)]).index_add_(0, row, W)
    return W.transpose(0, 1).to(W_next.dtype, copy=True, memory_format=torch.contiguous_format)


if __name__ == "decompose":  # imported from the top level of a clone: the package's module, so that there is only one
    sys.modules[__name__] = importlib.import_module("neuron_merging.decompose")

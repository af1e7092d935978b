"""Neuron Merging (Kim, Kim, Park, Jeon, NeurIPS 2020): drop neurons, and let the most similar kept ones stand in for them.

    W [N, D] ≈ Zᵀ Y with Y = W[keep] [P, D].  If every column of the scaling matrix Z [P, N] has at most one entry and
    that entry is positive, ReLU(Zᵀ v) = Zᵀ ReLU(v).  So Z can move into the next layer: W_next ← W_next ×₂ Z.

The letters are the paper's: N neurons of D weights, P kept ones, Z, threshold t, λ. Matrices over pairs are [P, Q]: each row m
is a kept neuron, each column n is one of the Q = N − P dropped ones. Everything is computed in float64.

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

    W: [N, D] float64; each row is a neuron or a flattened filter. Without BatchNorm, the bias is the last column.
    bn: the BatchNorm behind the layer, or None; a bias of the layer is included in its μ. relu: whether a ReLU follows.
    biased: whether the last column of W is a bias. activation: what follows elementwise, where that is not a ReLU.
    """

    W: Tensor
    bn: BatchNorm | None
    relu: bool
    biased: bool = False
    activation: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def constants(self) -> Tensor:
        """The output of every neuron that is the same for all inputs (a filter of zeros, or γ = 0): [N], NaN for the others."""
        filters = self.W[:, :-1] if self.biased else self.W
        constant = filters[:, 0] == 0
        constant[constant.clone()] = (filters[constant] == 0).all(1)  # of these few, all weights are looked at
        z = self.W[:, -1] if self.biased else torch.zeros_like(self.W[:, 0])
        if self.bn is not None:
            constant |= self.bn.gamma == 0
            z = self.bn.beta - self.bn.gain * self.bn.mu  # with γ = 0 just β
        if self.activation is not None:
            z = self.activation(z)
        elif self.relu:
            z = z.relu()
        return torch.where(constant, z, torch.nan)


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
    """Indices [P], ascending, of the neurons of W [N, D] with the largest scores; among equal ones the first are kept."""
    return ranked(CRITERIA[criterion](W))[:P].sort().values


def ranked(scores: Tensor) -> Tensor:
    """Indices [N] in the order of falling scores [N]; equal ones keep their order."""
    return scores.argsort(descending=True, stable=True)


def dropped(W: Tensor, keep: Tensor) -> Tensor:
    """Indices [Q], ascending, of the neurons that are not kept."""
    is_dropped = torch.ones(len(W), dtype=torch.bool, device=W.device)
    is_dropped[keep] = False
    return is_dropped.nonzero().squeeze(1)


# ---------------------------------------------------------------- compensation: the scaling matrix Z


def prune(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """No neuron stands in for a dropped one: the columns of Z are one-hot or zero. t and λ are not used."""
    N = len(neurons.W)
    return Decomposition(keep, torch.eye(N, dtype=torch.float64, device=neurons.W.device)[keep])


def merge(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """Merging as it was published: Algorithm 1, as the published code computes it. Reproduces the published tables.

    Without BatchNorm the partner of n is the kept m with the largest cosine, and its scale is s = ‖w_n‖ / ‖w_m‖. With BatchNorm
        S = s (γ_m / γ_n) (v_n / v_m),  B = |(γ_m / v_m) (s (μ_n − v_n β_n / γ_n) − μ_m) + β_m| / S,
    and the partner is the m with the least λ (1 − cos) + (1 − λ) minmax(B). This differs in two ways from what follows from
    the formula of BatchNorm (`merge_derived`): v, the variance, is in the place of the standard deviation, and n and m have
    changed places, but not in s. Both are kept, since the published numbers were made with them.
    """
    drop = dropped(neurons.W, keep)
    s, cos = compared(neurons.W, keep, drop)
    usable = s > 0  # a filter of zeros cannot stand in for another, and no other for it
    if neurons.bn is None:
        return Decomposition(keep, scaling_matrix(keep, drop, s, 1 - cos, cos, usable, t))
    gamma, beta, mu, v, _ = neurons.bn.of(drop)  # [Q]
    gamma_m, beta_m, mu_m, v_m, _ = neurons.bn.of(keep, column=True)  # [P, 1]
    S = s * (gamma_m / v_m) * (v / gamma)
    B = ((gamma_m / v_m) * (s * (mu - v * beta / gamma) - mu_m) + beta_m).abs() / S
    usable = usable & torch.isfinite(S) & torch.isfinite(B)  # with γ = 0 or v = 0, m is no partner and n has none
    distance = lam * (1 - cos) + (1 - lam) * _minmax(B, usable)
    return Decomposition(keep, scaling_matrix(keep, drop, S, distance, cos, usable, t))


def merge_derived(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """Merging by the formulas: if u_n = s u_m in front of the BatchNorm, then z_n = S z_m + B, with σ = √(v + ε) and
        S = s (γ_n / γ_m) (σ_m / σ_n),  B = (γ_n / σ_n) (s (μ_m − σ_m β_m / γ_m) − μ_n) + β_n.
    The partner has the least λ (1 − cos) + (1 − λ) minmax(|B| / S) among those with S > 0, which pass a ReLU. If filters are
    positive multiples of each other and B = 0, nothing is lost. A neuron with γ = 0 is the constant β, which becomes `shift`.
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
    """B [P, Q], scaled to 0…1 over the usable partners m of each n; 0 if those are all equal."""
    low = B.where(usable, torch.inf).amin(0)
    spread = B.where(usable, -torch.inf).amax(0) - low
    return ((B - low) / spread.where(spread > 0, 1)).where(usable & (spread > 0), 0)


def scaling_matrix(
    keep: Tensor, drop: Tensor, scale: Tensor, distance: Tensor, cos: Tensor, usable: Tensor, t: float
) -> Tensor:
    """Z [P, N]. The column of a kept neuron is one-hot; that of a dropped one has the scale of its nearest usable partner.

    It is zero if the partner's cosine is below t; t = 0 accepts every cosine. scale, distance, cos, usable: [P, Q].
    """
    P, Q = cos.shape
    Z = torch.zeros(P, P + Q, dtype=cos.dtype, device=cos.device)
    Z[torch.arange(P, device=cos.device), keep] = 1
    partner, n = distance.where(usable, torch.inf).argmin(0), torch.arange(Q, device=cos.device)  # [Q]
    accepted = usable[partner, n] & ((cos[partner, n] >= t) | (t == 0))
    Z[partner, drop] = scale[partner, n].where(accepted, 0)
    return Z


def only_twins(Z: Tensor) -> Tensor:
    """Z [P, N] with only the merges of scale 1 (to a thousandth), which pass any activation."""
    return Z.where((Z - 1).abs() < 1e-3, 0)


def effective(neurons: Neurons) -> Tensor:
    """The neurons with their BatchNorm folded in: weights and a constant, [N, D + 1]; without BatchNorm just W."""
    if neurons.bn is None:
        return neurons.W
    bn = neurons.bn
    return torch.cat([neurons.W * bn.gain[:, None], (bn.beta - bn.gain * bn.mu)[:, None]], 1)


# ---------------------------------------------------------------- absorbing Z into the next layer


def absorb(W_next: Tensor, Z: Tensor) -> Tensor:
    """W_next ×₂ Z: [M, N, k] and [P, N] → [M, P, k], in the dtype of W_next.

    k: the positions of a kernel or, behind a flatten, the consecutive inputs that belong to one neuron. Computed as [N, M, k],
    because neurons are then whole rows, which are quick to add up and to leave out.
    """
    W = W_next.transpose(0, 1).to(Z.dtype, copy=True, memory_format=torch.contiguous_format)  # [N, M, k]
    partner, n = Z.nonzero(as_tuple=True)
    if n.bincount(minlength=1).max() > 1:  # a column has several entries, which the paper's Z never has
        W = torch.einsum("nmk,pn->pmk", W, Z)
    else:
        W *= Z.sum(0)[:, None, None]
        row = n.new_zeros(len(W)).index_copy_(0, n, partner)
        W = torch.zeros_like(W[: len(Z)]).index_add_(0, row, W)
    return W.transpose(0, 1).to(W_next.dtype, copy=True, memory_format=torch.contiguous_format)


if __name__ == "decompose":  # imported from the top level of a clone: becomes the package's module, else there are two
    sys.modules[__name__] = importlib.import_module("neuron_merging.decompose")

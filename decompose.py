"""Neuron Merging (Kim, Kim, Park, Jeon, NeurIPS 2020): drop neurons, and let the most similar kept ones stand in for them.

    W [N, D] ≈ Zᵀ Y with Y = W[keep] [P, D];  if every column of the scaling matrix Z [P, N] has at most one entry and
    that is positive, ReLU(Zᵀ v) = Zᵀ ReLU(v), so Z moves into the next layer: W_next ← W_next ×₂ Z.

The letters are the paper's: N neurons of D weights, P kept ones, Z, threshold t, λ. Matrices over pairs are [P, Q]: row m
is a kept neuron, column n one of the Q = N − P others, which it may stand in for. Results are those of float64, cast back.

To add a criterion or a compensation, write its function and name it in `CRITERIA` or `COMPENSATIONS`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blocks import drop as drop_block
from errors import NeuronMergingError
from pairs import Pairs
from trace import CONVS, Unit

ROUNDING = torch.finfo(torch.float32).eps  # of γ, as a share of the largest in its layer


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
    stored: W in the dtype of the network, where it is at hand.
    """

    W: Tensor
    bn: BatchNorm | None
    relu: bool
    stored: Tensor | None = None


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
    """Indices [N], those of the largest scores [N] first, of equal ones in their order."""
    return scores.argsort(descending=True, stable=True)


# ---------------------------------------------------------------- compensation: the scaling matrix Z


def prune(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """Nobody stands in for a dropped neuron: the columns of Z are one-hot or zero. t and λ have no part in it."""
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
    drop = others(neurons.W, keep)
    pairs = Pairs(neurons.W, keep, drop, neurons.stored)
    s = pairs.s
    usable = s > 0  # a filter of zeros can neither be scaled up nor be replaced
    if neurons.bn is None:
        return Decomposition(keep, nearest(pairs, s, usable, t=t))
    gamma, beta, mu, v, _ = neurons.bn.of(drop)  # [Q]
    gamma_m, beta_m, mu_m, v_m, _ = neurons.bn.of(keep, column=True)  # [P, 1]
    S = s * (gamma_m / v_m) * (v / gamma)
    B = ((gamma_m / v_m) * (s * (mu - v * beta / gamma) - mu_m) + beta_m).abs() / S
    usable = usable & torch.isfinite(S) & torch.isfinite(B)  # γ or v of 0: nobody's partner, nobody stands in
    return Decomposition(keep, nearest(pairs, S, usable, B, t=t, lam=lam))


def merge_derived(neurons: Neurons, keep: Tensor, *, t: float, lam: float) -> Decomposition:
    """Merging with the form that follows from u_n = s u_m in front of the BatchNorm: z_n = S z_m + B with σ = √(v + ε) and
        S = s (γ_n / γ_m) (σ_m / σ_n),  B = (γ_n / σ_n) (s (μ_m − σ_m β_m / γ_m) − μ_n) + β_n.
    The partner has the least λ (1 − cos) + (1 − λ) minmax(|B| / S) among those with S > 0, which ReLU lets pass. Lossless
    for filters that are positive multiples of each other (B = 0). A neuron with γ = 0 is the constant β: it becomes shift.
    """
    if neurons.bn is None:
        return merge(neurons, keep, t=t, lam=lam)
    drop = others(neurons.W, keep)
    pairs = Pairs(neurons.W, keep, drop, neurons.stored)
    s = pairs.s
    gamma, beta, mu, _, sigma = neurons.bn.of(drop)  # [Q]
    gamma_m, beta_m, mu_m, _, sigma_m = neurons.bn.of(keep, column=True)  # [P, 1]
    S = s * (gamma / gamma_m) * (sigma_m / sigma)
    B = (gamma / sigma) * (s * (mu_m - sigma_m * beta_m / gamma_m) - mu) + beta
    usable = (S > 0) & torch.isfinite(S) & torch.isfinite(B)
    Z = nearest(pairs, S, usable, B.abs() / S, t=t, lam=lam)
    shift = torch.zeros_like(neurons.bn.beta)
    shift[drop] = torch.where(gamma == 0, beta.relu() if neurons.relu else beta, 0)
    return Decomposition(keep, Z, shift if shift.any() else None)


def others(W: Tensor, keep: Tensor) -> Tensor:
    """Indices [Q], ascending, of the neurons that are not kept."""
    dropped = torch.ones(len(W), dtype=torch.bool, device=W.device)
    dropped[keep] = False
    return dropped.nonzero().squeeze(1)


def effective(neurons: Neurons) -> Tensor:
    """What the neurons compute, their BatchNorm included: weights and constant, [N, D + 1] (or W, without BatchNorm)."""
    if neurons.bn is None:
        return neurons.W
    bn = neurons.bn
    return torch.cat([neurons.W * bn.gain[:, None], (bn.beta - bn.gain * bn.mu)[:, None]], 1)


def only_twins(Z: Tensor) -> Tensor:
    """Z [P, N] without its merges at a scale other than 1: what passes any activation."""
    return Z.where((Z - 1).abs() < 1e-3, 0)


def _minmax(B: Tensor, usable: Tensor) -> Tensor:
    """B [P, Q] scaled to 0…1 over the usable partners m of every n; 0 where they are all equal."""
    low = B.where(usable, torch.inf).amin(0)
    spread = B.where(usable, -torch.inf).amax(0) - low
    return ((B - low) / spread.where(spread > 0, 1)).where(usable & (spread > 0), 0)


def nearest(
    pairs: Pairs, scale: Tensor, usable: Tensor, B: Tensor | None = None, *, t: float, lam: float = 1.0
) -> Tensor:
    """Z with the scale [P, Q] of the usable partner that has the least λ (1 − cos) + (1 − λ) minmax(B), B [P, Q]."""
    apart = 0 if B is None else (1 - lam) * _minmax(B, usable)

    def distance(cos: Tensor) -> Tensor:
        return lam * (1 - cos) + apart

    cos = pairs.cos_to_choose(distance, usable, t)
    return scaling_matrix(pairs.keep, pairs.drop, scale, distance(cos), cos, usable, t)


def scaling_matrix(
    keep: Tensor, drop: Tensor, scale: Tensor, distance: Tensor, cos: Tensor, usable: Tensor, t: float
) -> Tensor:
    """Z [P, N]: one-hot for kept neurons; for the others the scale of the nearest usable one, if its cosine is at least t."""
    P, Q = cos.shape
    Z = torch.zeros(P, P + Q, dtype=cos.dtype, device=cos.device)
    Z[torch.arange(P, device=cos.device), keep] = 1
    partner, n = distance.where(usable, torch.inf).argmin(0), torch.arange(Q, device=cos.device)  # [Q]
    accepted = usable[partner, n] & ((cos[partner, n] >= t) | (t == 0))
    Z[partner, drop] = scale[partner, n].where(accepted, 0)
    return Z


COMPENSATIONS: dict[str, Callable[..., Decomposition]] = {
    "prune": prune,
    "merge": merge,
    "merge-derived": merge_derived,
}


# ---------------------------------------------------------------- a whole network


def decompose(
    model: nn.Module,
    units: Sequence[Unit],
    widths: Sequence[int],
    criterion: str,
    compensation: str,
    *,
    t: float = 0.0,
    lam: float = 1.0,
) -> list[Decomposition]:
    """Select `widths[i]` neurons of every unit, and see what the others can be made of: `choose` and `compensate` in one.

    Reads `model`'s original weights, changes nothing. t: least cosine similarity for a merge, 0 for none at all (negative
    ones merge too); lam: the paper's λ. Raises NeuronMergingError for an unknown criterion or compensation, NaN weights,
    widths that are not between 1 (or 0, in a residual branch) and N, and a merge through an activation that does not let a
    positive scale pass.
    """
    _check(units, widths, compensation, criterion)

    def one(unit: Unit, P: int) -> Decomposition:
        seen = read(model, unit)
        return _part(seen, _pick(unit, seen, P, criterion), compensation, t, lam)

    return [one(unit, P) for unit, P in zip(units, widths)]


def choose(model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str) -> list[Tensor]:
    """Indices [P], ascending, of the `widths[i]` neurons of every unit that the criterion keeps; raises as `decompose`."""
    _check(units, widths, criterion=criterion)
    return [_pick(unit, read(model, unit), P, criterion) for unit, P in zip(units, widths)]


def compensate(
    model: nn.Module,
    units: Sequence[Unit],
    keep: Sequence[Tensor],
    compensation: str,
    *,
    t: float = 0.0,
    lam: float = 1.0,
) -> list[Decomposition]:
    """Decompose every unit for the neurons `keep` ([P] each); t, lam and what it raises: as of `decompose`."""
    _check(units, keep, compensation)
    return [_part(read(model, unit), kept, compensation, t, lam) for unit, kept in zip(units, keep)]


def _check(units: Sequence[Unit], each: Sequence, compensation: str = "prune", criterion: str | None = None) -> None:
    if criterion is not None and criterion not in CRITERIA:
        raise NeuronMergingError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}")
    if len(each) != len(units):
        raise NeuronMergingError(f"{len(each)} widths for {len(units)} units")
    check_compensation(units, compensation)


def check_compensation(units: Sequence[Unit], compensation: str) -> None:
    """Raises NeuronMergingError for an unknown compensation, or one that an activation behind some unit does not let pass."""
    if compensation not in COMPENSATIONS:
        raise NeuronMergingError(f"unknown compensation {compensation!r}: choose one of {', '.join(COMPENSATIONS)}")
    bent = next((unit for unit in units if unit.activation), None)
    if bent is not None and compensation != "prune":
        raise NeuronMergingError(
            f"{bent.layer} goes through {bent.activation}: {compensation} needs an activation that a positive scale"
            " passes, as it does ReLU; use prune or restore"
        )


def check_width(layer: str, P: int, N: int, least: int = 1) -> None:
    """Raises NeuronMergingError where P of N neurons of a layer cannot be kept."""
    if not least <= P <= N:
        raise NeuronMergingError(f"{P} of {N} neurons cannot be kept in {layer}: give {least} to {N}")


def _pick(unit: Unit, seen: Neurons, P: int, criterion: str) -> Tensor:
    check_width(unit.layer, P, len(seen.W), least=0 if unit.branch else 1)
    return select(seen.W, P, criterion)


def _part(seen: Neurons, keep: Tensor, compensation: str, t: float, lam: float) -> Decomposition:
    kind = compensation if len(keep) else "prune"  # or nobody is left to merge with
    return COMPENSATIONS[kind](seen, keep, t=t, lam=lam)


def read(model: nn.Module, unit: Unit) -> Neurons:
    """The neurons of a unit in float64. Raises NeuronMergingError where a weight is NaN or infinite."""
    return neurons(model, unit.layer, unit.bn, unit.relu)


def neurons(
    model: nn.Module, name: str, bn: str | None = None, relu: bool = False, part: slice = slice(None)
) -> Neurons:
    """The neurons of the layer `name` with this part of the BatchNorm `bn` behind it, in float64; raises as `read` does."""
    layer = model.get_submodule(name)
    stored = layer.weight.detach().flatten(1)
    check_finite(name, stored, *([] if layer.bias is None else [layer.bias.detach()]))
    W = stored.double()
    bias = W.new_zeros(len(W)) if layer.bias is None else layer.bias.detach().double()
    if bn is None:
        whole = Neurons(W, None, relu, stored)
        return whole if layer.bias is None else replace(whole, W=torch.cat([W, bias[:, None]], 1), stored=None)
    norm = batchnorm(model.get_submodule(bn), part)
    check_finite(bn, norm.gamma, norm.beta, norm.mu, norm.var)
    return Neurons(W, replace(norm, mu=norm.mu - bias), relu, stored)


def check_finite(name: str, *values: Tensor) -> None:
    """Raises NeuronMergingError where a value of the layer `name` is NaN or infinite."""
    if not sum(x.sum() for x in values).isfinite() and not all(x.isfinite().all() for x in values):  # sums are quick
        raise NeuronMergingError(f"{name} has weights that are NaN or infinite")


def batchnorm(bn: nn.Module, part: slice = slice(None)) -> BatchNorm:
    """A BatchNorm's numbers for part of its channels, in float64.

    A γ within float32's rounding of the largest is 0: what weight decay has left of a dead neuron is nothing to divide by.
    """
    mu, var = bn.running_mean[part].double(), bn.running_var[part].double()
    gamma = torch.ones_like(mu) if bn.weight is None else bn.weight.detach()[part].double()
    gamma = gamma.where(gamma.abs() > ROUNDING * gamma.abs().amax(), 0)
    beta = torch.zeros_like(mu) if bn.bias is None else bn.bias.detach()[part].double()
    return BatchNorm(gamma, beta, mu, var, bn.eps)


def rebuild(model: nn.Module, units: Sequence[Unit], parts: Sequence[Decomposition]) -> nn.Module:
    """A new, smaller network: every unit keeps its neurons, the next layer absorbs Z and shift. `model` is left as it is.

    Raises NeuronMergingError where there is not one decomposition for every unit.
    """
    if len(parts) != len(units):
        raise NeuronMergingError(f"{len(parts)} decompositions for {len(units)} units")
    left = [(unit, part) for unit, part in zip(units, parts) if len(part.keep)]
    replaced = [model.get_submodule(name).weight for unit, _ in left for name in (unit.layer, unit.next)]
    shared = {id(w): nn.Parameter(w.detach(), w.requires_grad) for w in replaced}  # else copied, only to be replaced
    small = copy.deepcopy(model, shared)
    for unit, part in left:
        for name in filter(None, (unit.layer, unit.bn)):
            cut(small.get_submodule(name), part.keep)
    for unit, part in left:
        _absorb(small, unit, part)
    for unit, part in zip(units, parts):
        if not len(part.keep):
            drop_block(small, unit)
    return small


def _absorb(model: nn.Module, unit: Unit, part: Decomposition) -> None:
    """W_next ← W_next ×₂ Z. The shift goes to what adds a constant."""
    layer, N = model.get_submodule(unit.next), part.Z.shape[1]
    constant = None
    if part.shift is not None:
        W = layer.weight.detach().double().reshape(len(layer.weight), N, -1)
        constant = W.sum(2) @ part.shift  # [M]; an approximation at borders that are padded with zeros
    absorb(layer, part.Z)
    if constant is None:
        return
    if unit.next_bn is not None:
        bn = model.get_submodule(unit.next_bn)
        bn.running_mean -= constant.to(bn.running_mean)
    else:
        bias = constant if layer.bias is None else layer.bias.detach().double() + constant
        _set(layer, "bias", bias)


def absorb(layer: nn.Module, Z: Tensor, channels: int | None = None, offset: int = 0) -> None:
    """W ← W ×₂ Z for the N inputs from `offset` on, Z [P, N]. channels: all that the layer reads, where those are not all.

    An input is a channel of a convolution, or of a linear layer one number, or, behind a flatten, k consecutive ones.
    """
    N = Z.shape[1]
    M, rest = layer.weight.shape[0], layer.weight.shape[2:]
    W = _swapped(layer.weight.detach().reshape(M, channels or N, -1), torch.float64)  # [C, M, k]: k places, or inputs
    others_before, mine, others_behind = W[:offset], W[offset : offset + N], W[offset + N :]
    W = torch.cat([others_before, _times(mine, Z), others_behind]) if len(W) > N else _times(W, Z)
    _set(layer, "weight", _swapped(W, layer.weight.dtype).reshape(M, -1, *rest))
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1]


def _swapped(W: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of [M, N, k] as [N, M, k], in one pass over memory: inputs are added up and left out by whole rows."""
    return W.transpose(0, 1).to(dtype, copy=True, memory_format=torch.contiguous_format)


def _times(W: Tensor, Z: Tensor) -> Tensor:
    """W ×₂ Z: [N, M, k] and [P, N] → [P, M, k]; overwrites W."""
    m, n = Z.nonzero(as_tuple=True)
    if n.bincount(minlength=1).max() > 1:
        return torch.einsum("nmk,pn->pmk", W, Z)
    W *= Z.sum(0)[:, None, None]  # at most one entry a column, as in the paper: zeros need not be multiplied
    partner = n.new_zeros(len(W)).index_copy_(0, n, m)
    return torch.zeros_like(W[: len(Z)]).index_add_(0, partner, W)


def cut(module: nn.Module, keep: Tensor) -> None:
    """Cut a convolution (also a depthwise one), linear layer or BatchNorm down to the kept neurons [P]."""
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            _set(module, name, getattr(module, name).detach()[keep])
    if isinstance(module, nn.Linear):
        module.out_features = len(keep)
    elif isinstance(module, CONVS):
        module.out_channels = len(keep)
        if module.groups > 1:
            module.in_channels = module.groups = len(keep)
    else:
        module.num_features = len(keep)
        module.running_mean, module.running_var = module.running_mean[keep], module.running_var[keep]


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in the place of a parameter, in the dtype of the module's weight."""
    before = getattr(module, name) if getattr(module, name) is not None else module.weight
    parameter = nn.Parameter(value.to(module.weight.dtype).contiguous(), requires_grad=before.requires_grad)
    setattr(module, name, parameter)

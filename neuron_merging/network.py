"""The paper's method on a whole network: choose neurons, compensate for the others, rebuild it smaller."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from neuron_merging import blocks
from neuron_merging.decompose import (
    COMPENSATIONS,
    CRITERIA,
    BatchNorm,
    Decomposition,
    Neurons,
    absorb,
    dropped,
    prune,
    ranked,
)
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.tracing import CONVS, Unit

ROUNDING = torch.finfo(torch.float32).eps  # a γ below this share of the largest in its layer counts as 0


def choose(model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str) -> list[Tensor]:
    """For every unit the indices [P], ascending, of the P = `widths[i]` neurons that the criterion keeps.

    Raises NeuronMergingError for an unknown criterion, weights that are NaN or infinite, and widths outside of 1 to N (0 to N
    in a residual branch).
    """
    _check_criterion(criterion)
    _check_number(units, widths)
    return [_chosen(unit, read(model, unit), P, criterion) for unit, P in zip(units, widths)]


def _chosen(unit: Unit, neurons: Neurons, P: int, criterion: str) -> Tensor:
    check_width(unit.layer, P, len(neurons.W), least=0 if unit.branch else 1)
    return order(neurons, criterion)[:P].sort().values


def compensate(
    model: nn.Module,
    units: Sequence[Unit],
    keep: Sequence[Tensor],
    compensation: str,
    *,
    t: float = 0.0,
    lam: float = 1.0,
) -> list[Decomposition]:
    """For every unit, how its kept neurons stand in for the dropped ones. Only reads the original weights.

    keep: the indices [P] of the kept neurons of each unit. t: the least cosine similarity for a merge; 0 sets no limit, so that
    negative ones merge too. lam: the paper's λ. Raises NeuronMergingError for an unknown compensation, weights that are NaN or
    infinite, and a merge through an activation that a positive scale does not pass.
    """
    _check_number(units, keep)
    check_compensation(units, compensation)
    return [_compensated(unit, read(model, unit), kept, compensation, t, lam) for unit, kept in zip(units, keep)]


def _compensated(unit: Unit, neurons: Neurons, kept: Tensor, compensation: str, t: float, lam: float) -> Decomposition:
    if not len(kept):  # nobody is left to merge with
        return prune(neurons, kept, t=t, lam=lam)
    part = COMPENSATIONS[compensation](neurons, kept, t=t, lam=lam)
    return with_constants(part, neurons)


def order(neurons: Neurons, criterion: str) -> Tensor:
    """Indices [N] of the neurons in the order in which the criterion keeps them; constant neurons come last."""
    scores = CRITERIA[criterion](neurons.W)
    return ranked(scores.where(neurons.constants.isnan(), -1))


def with_constants(part: Decomposition, neurons: Neurons) -> Decomposition:
    """The same decomposition, but dropped neurons that are constant become a shift, which the next layer absorbs.

    This is exact except at borders that the next layer pads with zeros: there it read 0, not the constant.
    """
    dead = dropped(neurons.W, part.keep)
    constants = neurons.constants[dead]
    dead, constants = dead[~constants.isnan()], constants[~constants.isnan()]
    if not constants.any():
        return part
    Z = part.Z.clone()
    Z[:, dead] = 0
    shift = torch.zeros_like(Z[0]) if part.shift is None else part.shift.clone()
    shift[dead] = constants
    return Decomposition(part.keep, Z, shift)


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
    """`choose` and `compensate` in one, which reads every layer once; arguments and errors are theirs."""
    _check_criterion(criterion)
    _check_number(units, widths)
    check_compensation(units, compensation)

    def one(unit: Unit, P: int) -> Decomposition:
        neurons = read(model, unit)
        return _compensated(unit, neurons, _chosen(unit, neurons, P, criterion), compensation, t, lam)

    return [one(unit, P) for unit, P in zip(units, widths)]


def _check_criterion(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise NeuronMergingError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}")


def _check_number(units: Sequence[Unit], values: Sequence) -> None:
    if len(values) != len(units):
        raise NeuronMergingError(f"{len(values)} widths for {len(units)} units")


def check_compensation(units: Sequence[Unit], compensation: str) -> None:
    """Raises NeuronMergingError for an unknown compensation, or a merge that does not pass the activation behind a unit."""
    if compensation not in COMPENSATIONS:
        raise NeuronMergingError(f"unknown compensation {compensation!r}: choose one of {', '.join(COMPENSATIONS)}")
    blocked = next((unit for unit in units if unit.activation), None)
    if blocked is not None and compensation != "prune":
        raise NeuronMergingError(
            f"{blocked.layer} goes through {blocked.activation}: {compensation} needs an activation that a positive scale"
            " passes, as it does ReLU; use prune or restore"
        )


def check_width(layer: str, P: int, N: int, least: int = 1) -> None:
    """Raises NeuronMergingError if P is not between `least` and N, the number of neurons in the layer."""
    if not least <= P <= N:
        raise NeuronMergingError(f"{P} of {N} neurons cannot be kept in {layer}: give {least} to {N}")


def read(model: nn.Module, unit: Unit) -> Neurons:
    """The neurons of a unit in float64. Raises NeuronMergingError if a weight is NaN or infinite."""
    layer = neurons(model, unit.layer, unit.bn, unit.relu)
    return replace(layer, activation=unit.activate) if unit.activation else layer


def neurons(
    model: nn.Module, name: str, bn: str | None = None, relu: bool = False, part: slice = slice(None)
) -> Neurons:
    """The neurons of the layer `name`, in float64. bn: the BatchNorm behind it; part: the channels of it. Raises as `read`."""
    layer = model.get_submodule(name)
    check_finite(name, layer.weight.detach(), *([] if layer.bias is None else [layer.bias.detach()]))
    W = layer.weight.detach().flatten(1).double()
    bias = W.new_zeros(len(W)) if layer.bias is None else layer.bias.detach().double()
    if bn is None:
        if layer.bias is None:
            return Neurons(W, None, relu)
        return Neurons(torch.cat([W, bias[:, None]], 1), None, relu, biased=True)
    norm = batchnorm(model.get_submodule(bn), part)
    check_finite(bn, norm.gamma, norm.beta, norm.mu, norm.var)
    return Neurons(W, replace(norm, mu=norm.mu - bias), relu)


def check_finite(name: str, *values: Tensor) -> None:
    """Raises NeuronMergingError where a value of the layer `name` is NaN or infinite."""
    if not sum(x.sum() for x in values).isfinite() and not all(x.isfinite().all() for x in values):  # sums are quick
        raise NeuronMergingError(f"{name} has weights that are NaN or infinite")


def batchnorm(bn: nn.Module, part: slice = slice(None)) -> BatchNorm:
    """A BatchNorm's numbers for part of its channels, in float64.

    A γ below float32's rounding of the largest counts as 0: weight decay leaves such values in dead neurons, and dividing by
    them makes no sense.
    """
    mu, var = bn.running_mean[part].double(), bn.running_var[part].double()
    gamma = torch.ones_like(mu) if bn.weight is None else bn.weight.detach()[part].double()
    gamma = gamma.where(gamma.abs() > ROUNDING * gamma.abs().amax(), 0)
    beta = torch.zeros_like(mu) if bn.bias is None else bn.bias.detach()[part].double()
    return BatchNorm(gamma, beta, mu, var, bn.eps)


def rebuild(model: nn.Module, units: Sequence[Unit], parts: Sequence[Decomposition]) -> nn.Module:
    """A new, smaller network: every unit keeps its neurons, and the next layer absorbs Z and shift. `model` is unchanged.

    Raises NeuronMergingError if there is not one decomposition for every unit.
    """
    if len(parts) != len(units):
        raise NeuronMergingError(f"{len(parts)} decompositions for {len(units)} units")
    thinned = [(unit, part) for unit, part in zip(units, parts) if len(part.keep)]
    replaced = [model.get_submodule(name).weight for unit, _ in thinned for name in (unit.layer, unit.next)]
    shared = {id(w): nn.Parameter(w.detach(), w.requires_grad) for w in replaced}  # not copied, but replaced
    small = copy.deepcopy(model, shared)
    for unit, part in thinned:
        for name in filter(None, (unit.layer, unit.bn)):
            cut(small.get_submodule(name), part.keep)
    for unit, part in thinned:
        _absorb(small, unit, part)
    for unit, part in zip(units, parts):
        if not len(part.keep):
            blocks.drop(small, unit)
    return small


def _absorb(model: nn.Module, unit: Unit, part: Decomposition) -> None:
    """W_next ← W_next ×₂ Z. The shift goes into the BatchNorm behind the next layer, or else into that layer's bias."""
    layer, N = model.get_submodule(unit.next), part.Z.shape[1]
    constant = None
    if part.shift is not None:
        W = layer.weight.detach().double().reshape(len(layer.weight), N, -1)
        constant = W.sum(2) @ part.shift  # [M]; only approximate at borders that are padded with zeros
    absorb_into(layer, part.Z)
    if constant is None:
        return
    if unit.next_bn is not None:
        bn = model.get_submodule(unit.next_bn)
        bn.running_mean -= constant.to(bn.running_mean)
    else:
        bias = constant if layer.bias is None else layer.bias.detach().double() + constant
        _set(layer, "bias", bias)


def absorb_into(layer: nn.Module, Z: Tensor, channels: int | None = None, offset: int = 0) -> None:
    """Let a layer absorb Z [P, N] for its N inputs from `offset` on. channels: how many inputs it has, if more than N.

    An input is a channel of a convolution, one number of a linear layer, or k consecutive ones behind a flatten.
    """
    N = Z.shape[1]
    M, rest = layer.weight.shape[0], layer.weight.shape[2:]
    W = layer.weight.detach().reshape(M, channels or N, -1)  # [M, C, k]
    mine = absorb(W[:, offset : offset + N], Z)
    W = torch.cat([W[:, :offset], mine, W[:, offset + N :]], 1) if W.shape[1] > N else mine
    _set(layer, "weight", W.reshape(M, -1, *rest))
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1]


def cut(module: nn.Module, keep: Tensor) -> None:
    """Cut a convolution (also a depthwise one), linear layer or BatchNorm to the kept neurons [P]. Changes `module`."""
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
    """Replace a parameter by `value`, in the dtype of the module's weight."""
    before = getattr(module, name) if getattr(module, name) is not None else module.weight
    parameter = nn.Parameter(value.to(module.weight.dtype).contiguous(), requires_grad=before.requires_grad)
    setattr(module, name, parameter)

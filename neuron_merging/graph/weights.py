"""Smaller parameters: cut along their axes; readers absorb what dropped indices gave (W ×_axis Z, and constants)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from neuron_merging.decompose import absorb
from neuron_merging.graph.axes import Axis, Leaf, mask
from neuron_merging.graph.spaces import Survey
from neuron_merging.graph.units import Place, norm_behind, plain_layer

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Absorbed:
    """What a reader takes over from dropped indices, where their values are about Zᵀ (those of the kept ones) + shift.

    channels: where each index is on the reader's axis, [N, k]. keep: [P]. Z: [P, N]. shift: a constant for each place, [N, k].
    """

    reader: Place
    channels: Tensor
    keep: Tensor
    Z: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """Smaller parameters and buffers by their first name, and the biases [M] that layers get which have none, by call."""

    tensors: dict[str, Tensor]
    biases: dict[fx.Node, Tensor]


def cut_tensors(survey: Survey, masks: Mapping[Leaf, Tensor], absorbed: Sequence[Absorbed] = ()) -> Cut:
    """The parameters and buffers that get smaller or absorb something. masks: by leaf which of its indices are left."""
    parts: dict[str, list[Absorbed]] = {}
    for part in absorbed:
        parts.setdefault(part.reader.name, []).append(part)
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, axes in survey.analysis.parameters.items():
        original, own = survey.network.tensor(name).detach(), parts.get(name, [])
        tensor = original
        for d, axis in enumerate(axes):
            stays = left(axis, masks)
            if not stays.all() and not (own and d == own[0].reader.axis):
                tensor = tensor.index_select(d, stays.nonzero().flatten().to(tensor.device))
        if own:
            constants[name] = sum(_constant(tensor, part) for part in own if part.shift is not None)
            tensor = _absorbing(tensor, own, left(axes[own[0].reader.axis], masks))
        if tensor is not original:
            tensors[name] = _laid_out(tensor, original)
    biases = {}
    for name, constant in constants.items():
        if isinstance(constant, Tensor):
            _add(survey, tensors, biases, name, constant)
    return Cut(tensors, biases)


def of_rows(survey: Survey, weight: str, values: Tensor, masks: Mapping[Leaf, Tensor]) -> Tensor:
    """Values [M] for the rows of a weight, without those of rows that are cut."""
    stays = left(survey.analysis.parameters[weight][0], masks)
    return values[stays.to(values.device)]


def left(axis: Axis, masks: Mapping[Leaf, Tensor]) -> Tensor:
    """Which indices of an axis are left: bool [size]."""
    return mask(axis, lambda leaf: masks.get(leaf, torch.ones(leaf.size, dtype=torch.bool, device="cpu")))


def _absorbing(tensor: Tensor, parts: Sequence[Absorbed], stays: Tensor) -> Tensor:
    """A weight whose axis absorbs `parts` and is cut to the indices that stay."""
    axis = parts[0].reader.axis
    W = tensor.movedim(axis, 1)  # [M, C, …]
    M, C, *rest = W.shape
    for part in parts:
        N, k = part.channels.shape
        channels = part.channels.flatten().to(W.device)
        whole = N * k == C and torch.equal(channels, torch.arange(C, device=W.device))
        mine = absorb((W if whole else W[:, channels]).reshape(M, N, -1), part.Z)  # [M, P, k · …]
        mine = mine.reshape(M, -1, *rest)
        if whole:
            return mine.movedim(1, axis)
        W = W.clone() if part is parts[0] else W
        W[:, part.channels[part.keep.cpu()].flatten().to(W.device)] = mine
    return W.index_select(1, stays.nonzero().flatten().to(W.device)).movedim(1, axis)


def _constant(tensor: Tensor, part: Absorbed) -> Tensor:
    """What a reader gives for constants at its inputs, [M]; only approximate at borders that are padded with zeros."""
    W = tensor.movedim(part.reader.axis, 1).double()
    W = W.reshape(*W.shape[:2], -1).sum(2)
    return W[:, part.channels.flatten().to(W.device)] @ part.shift.flatten()


def home(survey: Survey, weight: str) -> tuple[fx.Node, str | None] | None:
    """The call of a layer that can absorb a constant, and where that goes: a running mean, a bias, or None, a new bias.

    None of both where it cannot.
    """
    node = plain_layer(survey.analysis, weight, grouped=True)
    if node is None:
        return None
    norm = norm_behind(node)
    bias = node.args[2] if len(node.args) > 2 else None
    place = bias if norm is None else norm.args[3]
    if isinstance(place, fx.Node):
        own = place.op == "get_attr" and len(place.users) == 1
        return (node, survey.network.names[place.target][0]) if own else None
    path, _, attribute = weight.rpartition(".")
    plain = attribute == "weight" and isinstance(survey.network.model.get_submodule(path), PLAIN)
    return (node, None) if plain else None


def _add(
    survey: Survey, tensors: dict[str, Tensor], biases: dict[fx.Node, Tensor], weight: str, constant: Tensor
) -> None:
    """Let the layer with this weight, or the BatchNorm behind it, give a constant more."""
    found = home(survey, weight)
    if found is None:
        return
    node, name = found
    if name is None:
        biases[node] = constant.to(tensors[weight].dtype)
        return
    tensor = tensors.get(name, survey.network.tensor(name).detach())
    if norm_behind(node) is not None:
        tensors[name] = tensor - constant.to(tensor)
    else:
        tensors[name] = (tensor.double() + constant).to(tensor.dtype)


def _laid_out(tensor: Tensor, original: Tensor) -> Tensor:
    """A tensor in the memory format channels_last, where the original has it; else in the usual one."""
    last = original.ndim == 4 and not original.is_contiguous()
    last = last and original.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

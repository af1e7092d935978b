"""Which kept channel of those that several layers share is most like each dropped one, what readers absorb (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_merging.decompose import cosines, dropped, effective, scaling_matrix
from neuron_merging.graph.export import Network
from neuron_merging.graph.neurons import batchnorm, neurons, numbers
from neuron_merging.graph.spaces import Space
from neuron_merging.graph.units import Place, kind, norm_behind
from neuron_merging.graph.ways import Step


def scaling_matrices(network: Network, space: Space, keep: Tensor, *, t: float) -> list[Tensor]:
    """For each way to a reader the matrix Z [P, N] that it absorbs: the most similar kept channel stands in for a dropped one.

    Similarity: the cosine of the stacked writer weights, each with the BatchNorm behind it, times the lowest similarity along
    any way to a reader (`_change`). Channels that are positive multiples of each other in all of these are merged without loss.
    The Z of a reader includes the scales on the way to it. Channels less similar than t are pruned.
    """
    written = [_written(network, space, writer, steps) for writer, steps in space.ways.chains.items()]
    drop = dropped(written[0][0], keep)
    to_sum = [_change(network, rest, W.norm(dim=1), keep, drop) for W, rest in written]
    W = torch.cat([W * change.gain[:, None] for (W, _), change in zip(written, to_sum)], 1)  # [N, ΣD]
    to_readers = []
    for way in space.ways.to_readers:
        start = W if way.writer is None else neurons(network, way.writer, space.leaf).W
        to_readers.append(_change(network, way.steps, start.norm(dim=1), keep, drop))
    alike = torch.stack([change.alike for change in (*to_sum, *to_readers)]).amin(0)
    cos = _both(cosines(W, keep, drop), alike)
    passes = torch.stack([change.scale > 0 for change in to_sum]).all(0)
    matrices = []
    for change in to_readers:
        usable = passes & (change.scale > 0) & torch.isfinite(change.scale)
        matrices.append(scaling_matrix(keep, drop, change.scale, 1 - cos, cos, usable, t))
    return matrices


def _written(network: Network, space: Space, writer: Place, chain: Sequence[Step]) -> tuple[Tensor, Sequence[Step]]:
    """The weights [N, D] of a writer, with the BatchNorm directly after it folded in, and the rest of its chain."""
    norm = norm_behind(network.users(writer.name)[0])
    if chain and chain[0].node is norm:
        return effective(neurons(network, writer, space.leaf, norm, chain[0].channels)), chain[1:]
    return neurons(network, writer, space.leaf).W, chain


@dataclass(frozen=True)
class _Change:
    """What the steps of a way do to channels.

    gain [N]: the factor of each channel. scale [P, Q]: the factor that turns a kept channel m into the dropped n, 0 where it is
    not positive along the whole way. alike [P, Q]: how similarly the steps treat n and m; 1 if it is the same up to a factor.
    """

    gain: Tensor
    scale: Tensor
    alike: Tensor


def _change(network: Network, steps: Sequence[Step], strength: Tensor, keep: Tensor, drop: Tensor) -> _Change:
    """What these steps do to channels. strength: the norms [N] of the channels in front of them.

    Similarity behind a step: the cosine of the pairs (strength, constant), because the constant of a positive multiple is
    multiplied too. A depthwise convolution scales by the norms of its filters, and multiplies the similarity by their cosine.
    """

    def scaled() -> Tensor:
        return strength[drop] / strength[keep][:, None]

    gain, scale = torch.ones_like(strength), scaled()
    alike, passes = torch.ones_like(scale), scale > 0
    for step in steps:
        if kind(step.node) == "batch_norm":
            bn = batchnorm(network, step.node, step.channels)
            factor, constant = bn.gain, bn.beta - bn.gain * bn.mu
        else:
            channels = step.channels.to(strength.device)
            filters = numbers(network, step.node.args[1])[channels].flatten(1)
            bias = step.node.args[2] if len(step.node.args) > 2 else None
            constant = torch.zeros_like(strength) if bias is None else numbers(network, bias)[channels]
            factor = filters.norm(dim=1)
            alike = _both(alike, cosines(filters, keep, drop))
        gain, strength = gain * factor, strength * factor
        alike = _both(alike, cosines(torch.stack([strength, constant], 1), keep, drop))
        scale = scaled()
        passes = passes & (scale > 0)
    return _Change(gain, scale.where(passes, 0), alike)


def _both(cos: Tensor, alike: Tensor) -> Tensor:
    """The product of two similarities; negative if either is, also if both are."""
    return torch.where((cos < 0) & (alike < 0), -cos * alike, cos * alike)

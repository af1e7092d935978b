"""Channels that several layers share (ours): which are kept, what stands in for the others, and how layers are cut to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_merging.decompose import CRITERIA, cosines, dropped, effective, only_twins, ranked, scaling_matrix
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.streams import Place, Stream
from neuron_merging.graph.tracing import NORMS
from neuron_merging.network import absorb_into, batchnorm, check_width, cut, neurons

# ---------------------------------------------------------------- selection, compensation, cutting


def choose_channels(model: nn.Module, stream: Stream, P: int, criterion: str) -> Tensor:
    """Indices [P], ascending, of the channels whose scores, summed over all writers, are the largest.

    Raises NeuronMergingError for a width that is not between 1 and N.
    """
    check_width(stream.layer, P, stream.width)
    scores = sum(CRITERIA[criterion](neurons(model, writer).W) for writer in stream.writers)
    return ranked(scores)[:P].sort().values


def scaling_matrices(model: nn.Module, stream: Stream, keep: Tensor, *, t: float, strict: bool = True) -> list[Tensor]:
    """By reader the matrix Z [P, N] that it absorbs, when every dropped channel has its most similar kept one stand in for it.

    Similarity: the cosine of the stacked writer weights, each with the BatchNorm behind it, times the lowest similarity along
    any path to a reader (`_way`). Channels that are positive multiples of each other in all of these are merged without loss.
    What scales channels on the path to a reader scales its Z. Channels less similar than t are pruned.
    Where a positive scale does not pass: raises NeuronMergingError, or (not strict) merges only (nearly) exact twins.
    """
    if stream.obstacle and strict:
        raise NeuronMergingError(
            f"{stream.layer}: {stream.obstacle}, which a merge does not pass; use prune or restore"
        )
    written = [_written(model, stream, *pair) for pair in zip(stream.writers, stream.chains)]
    drop = dropped(written[0][0], keep)
    to_sum = [_way(model, rest, W.norm(dim=1), keep, drop) for W, rest in written]
    W = torch.cat([W * way.gain[:, None] for (W, _), way in zip(written, to_sum)], 1)  # [N, ΣD]
    to_readers = []
    for reader in stream.readers:
        start = W if reader.writer is None else neurons(model, reader.writer).W
        to_readers.append(_way(model, reader.path, start.norm(dim=1), keep, drop))
    alike = torch.stack([way.alike for way in (*to_sum, *to_readers)]).amin(0)
    cos = _both(cosines(W, keep, drop), alike)
    passes = torch.stack([way.scale > 0 for way in to_sum]).all(0)
    matrices = []
    for way in to_readers:
        usable = passes & (way.scale > 0) & torch.isfinite(way.scale)
        Z = scaling_matrix(keep, drop, way.scale, 1 - cos, cos, usable, t)
        matrices.append(only_twins(Z) if stream.obstacle else Z)
    return matrices


def _written(
    model: nn.Module, stream: Stream, writer: str, chain: tuple[Place, ...]
) -> tuple[Tensor, tuple[Place, ...]]:
    """The weights [N, D] with which a layer writes, the BatchNorm right behind it included, and the rest of the chain."""
    if chain and chain[0].module == stream.norms[writer]:
        part = slice(chain[0].offset, chain[0].offset + stream.width)
        return effective(neurons(model, writer, chain[0].module, part=part)), chain[1:]
    return neurons(model, writer).W, chain


@dataclass(frozen=True)
class _Way:
    """What followers do to channels.

    gain [N]: the factor of each channel. scale [P, Q]: the factor that turns a kept channel m into the dropped n, 0 where it is
    not positive along the whole path. alike [P, Q]: 1 where every follower treats n as it treats m, up to a factor.
    """

    gain: Tensor
    scale: Tensor
    alike: Tensor


def _way(model: nn.Module, places: Sequence[Place], strength: Tensor, keep: Tensor, drop: Tensor) -> _Way:
    """What the followers at `places` do to channels that have this strength [N] in front of them.

    Similarity behind a follower: the cosine of the pairs (strength, constant), since a positive multiple has its constant
    multiplied too. A depthwise convolution scales by the norm of its filters; their cosine is a factor of the similarity.
    """

    def scaled() -> Tensor:
        return strength[drop] / strength[keep][:, None]

    gain, scale = torch.ones_like(strength), scaled()
    alike, passes = torch.ones_like(scale), scale > 0
    for place in places:
        module, part = model.get_submodule(place.module), slice(place.offset, place.offset + len(strength))
        if isinstance(module, NORMS):
            bn = batchnorm(module, part)
            factor, constant = bn.gain, bn.beta - bn.gain * bn.mu
        else:
            filters, bias = (
                neurons(model, place.module).W[part].split([module.weight[0].numel(), module.bias is not None], 1)
            )
            factor, constant = filters.norm(dim=1), bias.sum(1)
            alike = _both(alike, cosines(filters, keep, drop))
        gain, strength = gain * factor, strength * factor
        alike = _both(alike, cosines(torch.stack([strength, constant], 1), keep, drop))
        scale = scaled()
        passes = passes & (scale > 0)
    return _Way(gain, scale.where(passes, 0), alike)


def _both(cos: Tensor, alike: Tensor) -> Tensor:
    """The product of two similarities; two negative ones stay negative."""
    return torch.where((cos < 0) & (alike < 0), -cos * alike, cos * alike)


def cut_streams(
    model: nn.Module,
    small: nn.Module,
    kept: Sequence[tuple[Stream, Tensor]],
    t: float | None = None,
    strict: bool = True,
) -> None:
    """Cut the streams of `small`, a copy of `model` whose units may have been cut, to the channels ([P]) that each keeps.

    t: the least cosine at which a dropped channel is merged into a kept one; None: prune. strict: of `scaling_matrices`.
    """
    columns: dict[str, list[tuple[int, int, Tensor]]] = {}
    for stream, keep in kept:
        if t is None:
            matrices = [torch.eye(stream.width, dtype=torch.float64, device=keep.device)[keep]] * len(stream.readers)
        else:
            matrices = scaling_matrices(model, stream, keep, t=t, strict=strict)
        for reader, Z in zip(stream.readers, matrices):
            columns.setdefault(reader.module, []).append((reader.offset, reader.channels, Z))
    for name, blocks in columns.items():
        channels = blocks[0][1]
        for offset, _, Z in sorted(blocks, key=lambda block: -block[0]):  # the last first: the others stay in place
            absorb_into(small.get_submodule(name), Z, channels, offset)
            channels += len(Z) - Z.shape[1]
    for name, keep in kept_channels(model, kept).items():
        cut(small.get_submodule(name), keep)


def kept_channels(model: nn.Module, kept: Sequence[tuple[Stream, Tensor]]) -> dict[str, Tensor]:
    """By writer and follower the indices of its channels that stay."""
    stays: dict[str, Tensor] = {}
    for stream, keep in kept:
        for place in (*map(Place, stream.writers), *stream.followers):
            module = model.get_submodule(place.module)
            mask = stays.setdefault(place.module, torch.ones(_channels(module), dtype=torch.bool, device=keep.device))
            mask[place.offset : place.offset + stream.width] = False
            mask[place.offset + keep] = True
    return {name: mask.nonzero().squeeze(1) for name, mask in stays.items()}


def _channels(module: nn.Module) -> int:
    return module.num_features if isinstance(module, NORMS) else len(module.weight)

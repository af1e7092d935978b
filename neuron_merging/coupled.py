"""Channels that several layers share (ours): which are kept, what stands in for the others, and how layers are cut."""

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
    """For each reader the matrix Z [P, N] that it absorbs: the most similar kept channel stands in for each dropped one.

    Similarity: the cosine of the stacked writer weights, each with the BatchNorm behind it, times the lowest similarity along
    any path to a reader (`_way`). Channels that are positive multiples of each other in all of these are merged without loss.
    The Z of a reader includes the scales on the path to it. Channels less similar than t are pruned.
    If a positive scale cannot pass an operation, raises NeuronMergingError, or, not `strict`, merges (nearly) exact twins only.
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
    """The weights [N, D] of a writer, with the BatchNorm directly after it folded in, and the rest of its chain."""
    if chain and chain[0].module == stream.norms[writer]:
        part = slice(chain[0].offset, chain[0].offset + stream.width)
        return effective(neurons(model, writer, chain[0].module, part=part)), chain[1:]
    return neurons(model, writer).W, chain


@dataclass(frozen=True)
class _Way:
    """What the followers on one path do to channels.

    gain [N]: the factor of each channel. scale [P, Q]: the factor that turns a kept channel m into the dropped n, 0 where it is
    not positive along the whole path. alike [P, Q]: how similarly the followers treat n and m; 1 if it is the same up to a
    factor.
    """

    gain: Tensor
    scale: Tensor
    alike: Tensor


def _way(model: nn.Module, places: Sequence[Place], strength: Tensor, keep: Tensor, drop: Tensor) -> _Way:
    """What the followers at `places` do to channels. strength: the norms [N] of the channels in front of the followers.

    Similarity behind a follower: the cosine of the pairs (strength, constant), because the constant of a positive multiple is
    multiplied too. A depthwise convolution scales by the norms of its filters, and multiplies the similarity by their cosine.
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
    """The product of two similarities; negative if either is, also if both are."""
    return torch.where((cos < 0) & (alike < 0), -cos * alike, cos * alike)


def cut_streams(
    model: nn.Module,
    small: nn.Module,
    kept: Sequence[tuple[Stream, Tensor]],
    t: float | None = None,
    strict: bool = True,
) -> None:
    """Cut each stream of `small` to the channels [P] that it keeps. `small`: a copy of `model` whose units may be cut already.

    t: the least cosine for merging a dropped channel into a kept one; None: prune. strict: as in `scaling_matrices`.
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
        for offset, _, Z in sorted(blocks, key=lambda block: -block[0]):  # from the last: earlier offsets stay valid
            absorb_into(small.get_submodule(name), Z, channels, offset)
            channels += len(Z) - Z.shape[1]
    for name, keep in kept_channels(model, kept).items():
        cut(small.get_submodule(name), keep)


def kept_channels(model: nn.Module, kept: Sequence[tuple[Stream, Tensor]]) -> dict[str, Tensor]:
    """For each writer and follower, by name, the indices of the channels that it keeps."""
    masks: dict[str, Tensor] = {}
    for stream, keep in kept:
        for place in (*map(Place, stream.writers), *stream.followers):
            module = model.get_submodule(place.module)
            mask = masks.setdefault(place.module, torch.ones(_channels(module), dtype=torch.bool, device=keep.device))
            mask[place.offset : place.offset + stream.width] = False
            mask[place.offset + keep] = True
    return {name: mask.nonzero().squeeze(1) for name, mask in masks.items()}


def _channels(module: nn.Module) -> int:
    return module.num_features if isinstance(module, NORMS) else len(module.weight)

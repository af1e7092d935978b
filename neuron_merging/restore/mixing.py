"""Another basis for spaces that are linear all the way (ours): the stream of a MobileNetV2, a bottleneck without an activation.

Let s [N] be the values along a space that nothing but sums, pools and paddings stand between its writers and its readers for.
Then any invertible M gives the same network: writers that give z = M s, readers that read M⁻¹ z. It is chosen such that the
first k of z say most of what the readers need. With R the readers' weights, scaled by the BatchNorms behind them, G = Rᵀ R and
Σ = Cov(s), the error of the readers when only k numbers are left is least for

    z = Vᵀ K s,   G = Kᵀ K,   K Σ Kᵀ = V Λ Vᵀ,   of which the k with the largest Λ stay.

A BatchNorm between a writer and the sum goes into the writer's weights, and a new one takes its place, with the mean M μ and
the variance that z has there. SliceGPT (Ashkboos et al., ICLR 2024) does this for transformers with RMSNorm, from data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from neuron_merging.compensation import Contents
from neuron_merging.graph.axes import Leaf, leaves, positions, resolve
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.units import DROPOUT, VIEWS
from neuron_merging.graph.walk import Batch, Walk, is_batch_norm
from neuron_merging.restore.readers import Reader, find_reader

LINEAR = {*VIEWS, *DROPOUT, "add", "sub", "neg", "mean", "sum", "pad", "constant_pad_nd", "getitem",
          *(f"{kind}_pool{d}d" for kind in ("avg", "adaptive_avg") for d in (1, 2, 3))}  # fmt: skip
ROWS = 2**14  # positions that a covariance is measured at
LITTLE = 1e-4  # of the mean importance: what every direction counts at least
FLAT = 1e-3  # of the largest deviation of z: smaller ones are not scaled up to 1


@dataclass(frozen=True)
class Linear:
    """A linear space: the layers that write it, and those that read it."""

    space: Space
    writers: tuple[Reader, ...]
    readers: tuple[Reader, ...]


def linear_spaces(survey: Survey, spaces: Sequence[Space]) -> list[Linear]:
    """Those of the spaces which are linear all the way."""
    layers = {reader.node: reader for n in survey.network.graph.graph.nodes if (reader := find_reader(survey, n))}
    by_weight = {reader.weight: reader for reader in layers.values()}
    touching: dict[Leaf, list[fx.Node]] = {space.leaf: [] for space in spaces}
    for node, value in survey.analysis.values.items():
        if node.op == "call_function" and isinstance(value, list):
            for leaf in {leaf for axis in value for leaf in leaves(axis)} & touching.keys():
                touching[leaf].append(node)
    found = []
    for space in spaces:
        writers = [by_weight.get(place.name) for place in space.writers if place.axis == 0]
        readers = [by_weight.get(place.name) for place in space.readers]
        if len(writers) != len(space.writers) or None in (*writers, *readers) or not readers or not writers:
            continue
        plain = [r for r in (*writers, *readers) if r.groups == 1 and not r.flipped]
        if len(plain) < len(writers) + len(readers) or any(place.layout is not space.leaf for place in space.writers):
            continue
        own = {node for writer in writers for node in (writer.node, writer.norm)}
        between = [node for node in touching[space.leaf] if node not in own]
        norms = [writer for writer in writers if writer.norm is None and _normalised(writer.node)]
        if not norms and all(operation(node).removesuffix("_") in LINEAR for node in between):
            found.append(Linear(space, tuple(writers), tuple(readers)))
    return found


def _normalised(node: fx.Node) -> bool:
    return any(is_batch_norm(user) for user in node.users)


@torch.no_grad()
def mixed(
    survey: Survey, keep: Mapping[Space, Tensor], batches: Sequence[Batch]
) -> tuple[Survey, dict[Space, Tensor], dict[str, Tensor]]:
    """The same network in the basis M of its linear spaces, what of each space stays then, and the tensors that changed.

    keep: what was to be kept; of linear spaces only how many indices counts.
    """
    smaller = [space for space, kept in keep.items() if len(kept) < space.size]
    linear = [part for part in linear_spaces(survey, smaller) if not _merges(survey, part.space, keep[part.space])]
    if not linear:
        return survey, dict(keep), {}
    walk = Walk(survey.network.graph, batches)
    covariances = _covariances(survey, walk, linear)
    model = copy.deepcopy(survey.network.model)
    tensors: dict[str, Tensor] = {}

    def tensor(node: fx.Node) -> Tensor:
        name = survey.network.names[node.target][0]
        return tensors.get(name, survey.network.tensor(name).detach()).double()

    def put(node: fx.Node, value: Tensor) -> None:
        tensors[survey.network.names[node.target][0]] = value

    for part in linear:
        M, inverse = _basis(survey, walk, part, covariances, tensor)
        if M is None:
            continue
        for writer in part.writers:
            _mix_writer(writer, M, covariances[writer.node], tensor, put)
        for reader, place in zip(part.readers, part.space.readers):
            where = place.positions(part.space.leaf)
            weight = tensor(reader.weight_node).movedim(1, 0).clone()
            weight[where] = torch.einsum("jn,n...->j...", inverse.T, weight[where])
            put(reader.weight_node, weight.movedim(0, 1))
        keep = {**keep, part.space: torch.arange(len(keep[part.space]), device=M.device)}
    for name, value in tensors.items():
        for alias in survey.network.names[name]:
            path, _, attribute = alias.rpartition(".")
            old = getattr(model.get_submodule(path), attribute)
            old.data = value.to(old.dtype).contiguous()
    network = replace(survey.network, model=model)
    return replace(survey, network=network), dict(keep), tensors


def _merges(survey: Survey, space: Space, kept: Tensor) -> bool:
    """Whether all dropped indices are (nearly) multiples of kept ones, which merging gives back without loss."""
    parts = Contents(survey, space).start(kept)
    return bool(parts) and all(bool((part.Z != 0).any(0).all()) for part in parts)


def _covariances(survey: Survey, walk: Walk, linear: Sequence[Linear]) -> dict[fx.Node, Tensor]:
    """By layer the covariance [N, N] of what a writer, with its BatchNorm, gives, or of what a reader reads of its space."""
    wanted: dict[fx.Node, list[tuple[fx.Node, Leaf]]] = {}
    for part in linear:
        for writer in part.writers:
            wanted.setdefault(writer.norm or writer.node, []).append((writer.node, part.space.leaf))
        for reader in part.readers:
            wanted.setdefault(reader.source, []).append((reader.node, part.space.leaf))
    covariances: dict[fx.Node, Tensor] = {}
    for node in walk.run(walk.nodes):
        for layer, leaf in wanted.get(node, ()):
            axes = [resolve(axis) for axis in survey.analysis.values[node]]
            d = next(d for d, axis in enumerate(axes) if leaf in set(leaves(axis)))
            where = positions(axes[d], leaf)
            rows = [value.movedim(d, -1)[..., where].movedim(-2, -1).flatten(0, -2) for value in walk.values[node]]
            rows = torch.cat([part[:: max(1, len(part) * len(rows) // ROWS)] for part in rows]).double()
            rows -= rows.mean(0)
            covariances[layer] = rows.T @ rows / len(rows)
    return covariances


def _basis(
    survey: Survey, walk: Walk, part: Linear, covariances: Mapping[fx.Node, Tensor], tensor: Callable[[fx.Node], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """M [N, N] and its inverse, for one space."""
    G, total = 0, 0
    for reader, place in zip(part.readers, part.space.readers):
        weight = tensor(reader.weight_node)
        if reader.norm is not None:
            weight = weight * walk.slope(reader.norm).double().view(-1, *[1] * (weight.ndim - 1))
        rows = weight.movedim(1, 0)[place.positions(part.space.leaf)].flatten(1)
        importance, seen = rows @ rows.T, covariances[reader.node]
        size = (importance * seen).sum()
        if size > 0:
            G, total = G + importance / size, total + seen / seen.diagonal().sum()
    if not isinstance(G, Tensor):
        return None, None
    G = G + LITTLE * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    K = torch.linalg.cholesky(G).T
    values, V = torch.linalg.eigh(K @ total @ K.T)
    values, V = values.flip(0).clamp(min=0), V.flip(1)
    deviation = values.sqrt().clamp(min=FLAT * float(values[0].sqrt()) + 1e-30)[:, None]
    return V.T @ K / deviation, torch.linalg.solve_triangular(K, V, upper=True) * deviation.T


def _mix_writer(writer: Reader, M: Tensor, covariance: Tensor, tensor: Callable, put: Callable) -> None:
    """Let a layer, with its BatchNorm, give M s."""
    weight = tensor(writer.weight_node)
    bias = None if writer.bias_node is None else tensor(writer.bias_node)
    if writer.norm is None:
        put(writer.weight_node, torch.einsum("jn,n...->j...", M, weight))
        if bias is not None:
            put(writer.bias_node, M @ bias)
        return
    _, gamma, beta, mean, var, *_, eps, _ = writer.norm.args
    mu, v = tensor(mean), tensor(var)
    gain = (v + eps).rsqrt() * (1 if gamma is None else tensor(gamma))
    put(writer.weight_node, torch.einsum("jn,n...->j...", M * gain, weight))
    if bias is not None:
        put(writer.bias_node, M @ (gain * bias))
    variance = torch.einsum("jn,nm,jm->j", M, covariance, M).clamp(min=1e-6)
    put(mean, M @ (gain * mu))
    put(var, variance)
    put(gamma, (variance + eps).sqrt())
    put(beta, M @ tensor(beta))

"""The fit of one layer of the student to what the teacher gives there (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor, fx

from neuron_merging.config import RIDGE
from neuron_merging.graph.export import shape
from neuron_merging.graph.rules import operation
from neuron_merging.linalg import ENTRIES, POSITIONS
from neuron_merging.restore.pair import Pair
from neuron_merging.restore.readers import VIEWS, Reader
from neuron_merging.restore.regression import Fit, Solver, fit


@dataclass(frozen=True)
class Options:
    """The steps of restoration: one setting for all networks and ratios. The switches are for ablations (docs/restore.md)."""

    ridge: float = RIDGE  # λ
    grid: tuple[float, ...] = (
        0.1,
        1.0,
        3.0,
        10.0,
        30.0,
        100.0,
        inf,
    )  # times λ: what is tried; ∞: only another constant
    held: float = 1 / 3  # share of the inputs that are held out to choose λ, or not to fit; 0: the first λ of the grid
    mixing: bool = True  # linear spaces get another basis first
    probe_statistics: bool = True  # BatchNorms use the statistics of the inputs; else the running ones
    repair: bool = True  # a layer whose output is added to a residual stream also corrects the stream's error
    refit: bool = True  # fit the pruned layers too, not only their consumers
    aware_steps: int = 2  # further fits of a layer, which ignore errors that the activation behind it removes
    adaptations: int = 2  # steps in which a pruned layer is moved to reduce the error of its consumer
    positions: int = POSITIONS  # random output positions that a fit uses, for every feature


class Fitting:
    """Fits layers of a pair. fits: by weight, what came of it. solvers: by layer, the regression on what it sees."""

    def __init__(self, pair: Pair, options: Options) -> None:
        self.pair, self.options = pair, options
        self.held = round(len(pair.teacher.batches) * options.held)
        sums = {n: summand(reader) for n, reader in pair.readers.items() if options.repair}
        self.summands = {n: found and found[0] for n, found in sums.items()}
        self.repeated = {
            n: found[1] for n, found in sums.items() if found
        }  # dimensions along which it is added at every place
        self.fits: dict[str, Fit] = {}
        self.solvers: dict[fx.Node, Solver] = {}

    def is_due(self, reader: Reader) -> bool:
        """Whether a layer has lost inputs, or neurons, and sees something else than the teacher's."""
        if reader.node not in self.pair.copies:  # of a branch that is left out
            return False
        small, whole = self.pair.weight(reader), self.pair.teacher.tensor(reader.weight_node)
        consumer = small.shape[reader.inputs] != whole.shape[reader.inputs]
        pruned = small.shape[1 - reader.inputs] != whole.shape[1 - reader.inputs]
        return reader.source not in self.pair.same and (consumer or (pruned and self.options.refit))

    def target(self, reader: Reader) -> list[Tensor] | None:
        """What the student's layer is to give, for each batch; None where that is not known."""
        pair = self.pair
        y = [pair.cut(part, reader.node) for part in pair.teacher.values[reader.node]]
        known = reader.node in pair.copies
        if known and (
            y[0].ndim < 2 or y[0].shape[reader.channel(y[0])] != pair.weight(reader).shape[1 - reader.inputs]
        ):
            return None
        error = self._stream_error(reader)
        return y if error is None else [a + b.reshape(a.shape) for a, b in zip(y, error)]

    def regress(self, reader: Reader, target: list[Tensor], aware: bool = True) -> bool:
        """Fit a layer to the target. Returns whether its weights are other ones now. aware: use targets that know the clip."""
        pair, options = self.pair, self.options
        weight, groups = pair.weight(reader), pair.groups(reader)
        W0 = reader.matrix(weight, groups)
        chosen = self.places(reader, target, W0)
        x = pair.student.values[pair.copies[reader.source]]
        U = torch.cat([reader.seen(part, places, groups) for part, places in zip(x, chosen)], 1)
        T = torch.cat([reader.given(part, places, groups) for part, places in zip(target, chosen)], 1)
        if not (U.sum().isfinite() and T.sum().isfinite()):
            return False
        held = sum(len(places) for places in chosen[len(chosen) - self.held :]) if self.held else 0
        factors = options.grid if held else (1.0,)
        result = fit(
            U, T, (W0, pair.bias(reader).view(W0.shape[:2])), held, [factor * options.ridge for factor in factors],
            partial(self._loss, reader), partial(self._aware, reader) if aware and reader.clip else None,
            options.aware_steps,
        )  # fmt: skip
        self.fits[reader.weight] = result
        if result.solver is not None and reader.groups == 1:
            self.solvers[reader.node] = result.solver
        if held and result.after >= result.before:
            return False
        pair.put(reader, reader.as_weight(result.W.to(weight), weight), result.b.flatten())
        return True

    def give_constant(self, reader: Reader) -> None:
        """Let a branch that is left out give the mean of its target. reader: the layer that ends it."""
        pair = self.pair
        target = self.target(reader)
        if reader.norm is not None:
            target = [pair.teacher.normalise(reader.norm, part) for part in target]
        rows = [part.movedim(reader.channel(part), -1).flatten(0, -2) for part in target]
        pair.put_constant(reader, torch.cat(rows).mean(0))

    def places(self, reader: Reader, target: list[Tensor], W0: Tensor) -> list[Tensor]:
        """For each batch the output positions that a fit uses: all, or a fixed random choice if there are very many."""
        counts = [part.numel() // part.shape[reader.channel(part)] for part in target]
        features, width = W0.shape[2], len(W0) * W0.shape[2]
        most = max(min(self.options.positions * features, ENTRIES // width), sum(len(part) for part in target))
        chosen = torch.arange(sum(counts), device="cpu")
        if len(chosen) > most:
            random = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(chosen), generator=random, device="cpu")[:most].sort().values
        inside, start = [], 0
        for count, part in zip(counts, target):
            inside.append((chosen[(chosen >= start) & (chosen < start + count)] - start).to(part.device))
            start += count
        return inside

    def _loss(self, reader: Reader, prediction: Tensor, target: Tensor) -> float:
        """The error behind the BatchNorm and the activation that directly follow a layer, relative to the target."""
        if reader.norm is not None:
            prediction, target = (self.pair.normalised(reader, rows) for rows in (prediction, target))
        size = (target - target.mean(1, keepdim=True)).double().pow(2).sum().clamp(min=1e-300)
        if reader.clip is not None:
            prediction, target = (rows.clamp(*reader.clip) for rows in (prediction, target))
        return float((prediction - target).double().pow(2).sum() / size)

    def _aware(self, reader: Reader, y: Tensor, T: Tensor) -> Tensor:
        """Of all targets that the activation maps to the same values as T [G, n, M], the one nearest to the prediction y."""
        if reader.norm is None:
            return nearest(y, T, *reader.clip)
        slope = self.pair.slope(reader).view(len(y), 1, -1)
        z, z_t = (self.pair.normalised(reader, rows) for rows in (y, T))
        aim = y + (nearest(z, z_t, *reader.clip) - z) / slope
        return torch.where(slope.abs() > 1e-3, aim, T)

    def _stream_error(self, reader: Reader) -> list[Tensor] | None:
        """Teacher − student where the output of a layer is added to something else, in front of the layer's BatchNorm."""
        other, pair = self.summands.get(reader.node), self.pair
        if other is None or other in pair.same or other not in pair.teacher.values:
            return None
        part = pair.student.values.get(pair.copies[other])
        if part is None:
            return None
        errors = [pair.cut(a, other) - b for a, b in zip(pair.teacher.values[other], part)]
        dims = self.repeated[reader.node]
        errors = [error.mean(dims, keepdim=True) if dims else error for error in errors]
        if reader.norm is None:
            return errors
        slope = pair.slope(reader) if reader.norm in pair.copies else pair.teacher.slope(reader.norm)
        inverse = torch.where(slope.abs() < 1e-2, 0, 1 / slope)
        return [error * inverse.view(-1, *[1] * (error.ndim - 2)) for error in errors]


def summand(reader: Reader) -> tuple[fx.Node, list[int]] | None:
    """What the output of a layer, with its BatchNorm, is added to, and the dimensions along which every place gets the same.

    None if it is added to nothing.
    """
    node = reader.node if reader.norm is None else reader.norm
    user = next(iter(node.users), None)
    while len(node.users) == 1 and operation(user) in VIEWS and user.args[0] is node:
        node, user = user, next(iter(user.users), None)
    if len(node.users) != 1 or operation(user) not in ("add", "add_") or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or other.op == "get_attr":
        return None
    own, others = shape(node.meta["val"]), shape(other.meta["val"])
    repeated = [d for d, (n, m) in enumerate(zip(own, others)) if n != m]
    if len(own) != len(others) or any(own[d] != 1 for d in repeated):
        return None
    return other, repeated


def nearest(z: Tensor, z_t: Tensor, low: float, high: float) -> Tensor:
    """z_t where it is within the bounds; beyond one of them, what is nearest to z there."""
    z_t = torch.where(z_t > low, z_t, z.clamp(max=low))
    return z_t if high == inf else torch.where(z_t < high, z_t, z.clamp(min=high))

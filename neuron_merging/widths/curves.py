"""What thinning one unit does to the network, without data (ours).

On inputs made up from the network itself (synthetic.py), for every unit alone and every number k of kept neurons:

    E(k)  error of the consumer's output after compensation, measured behind the consumer's BatchNorm
    ρ(k)  sensitivity: mean squared change of the network's output, on held-out samples, divided by E(k)
    D(k) = ρ(k) E(k), the damage

D assumes that layers are independent; `joint_damage` compares choices of widths with all units thinned at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from neuron_merging.decompose import Decomposition, Neurons
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.interpreter import Walk, steps, walk_through
from neuron_merging.graph.tracing import Unit
from neuron_merging.linalg import channel, matrix, rows
from neuron_merging.network import order as kept_order
from neuron_merging.network import read
from neuron_merging.widths.consumer import Consumer, Thinned, absorbed, columns_by_neuron, computed_widths
from neuron_merging.widths.output import Output, in_walk_precision, sensitivities

MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of kept neurons at which sensitivity is measured


HELD_OUT = 1 / 3  # share of the probe that only the sensitivities are measured on


Decompose = Callable[[Neurons, Tensor], Decomposition]


@dataclass(frozen=True)
class Curve:
    """What thinning one unit does. order: its neurons [N], those kept longest first. error, damage: E, D at k = 0…N."""

    order: Tensor
    error: np.ndarray
    damage: np.ndarray


def curves(
    model: nn.Module,
    units: Sequence[Unit],
    probe: Tensor,
    criterion: str,
    decompose: Decompose | None,
    ridge: float,
    *,
    sensitivity: bool = True,
) -> list[Curve]:
    """A curve for every unit.

    probe: [B, …]; a third of it is held out for the sensitivities. criterion: gives the order in which neurons are kept; "auto"
    is the greedy order of the regression. decompose: the compensation of one layer, or None for restoration's regression with
    this `ridge`. sensitivity=False: a cheap mode; D is E divided by the variance of the stream that the consumer adds to.
    """
    held_out = round(len(probe) * HELD_OUT) if sensitivity else 0
    if len(probe) - held_out < 2 or (sensitivity and not held_out):
        raise NeuronMergingError(f"the choice of widths has to look at 3 inputs at least, not at {len(probe)}")
    with in_walk_precision(model, probe) as (work, probe):
        walk = walk_through(work, probe)
        errors = _Measuring(work, walk, units, criterion, decompose, ridge)
        errors.run(probe[held_out:])
        changes = sensitivities(walk, units, errors.thinned, probe[:held_out]) if sensitivity else None
    if changes is None:
        return [replace(c, damage=_falling(c.error / max(v, 1e-12))) for c, v in zip(errors.curves, errors.variance)]
    return [_with_damage(curve, change) for curve, change in zip(errors.curves, changes)]


def _falling(damage: np.ndarray) -> np.ndarray:
    """D, changed so that it never rises with k, is never negative, and is 0 where nothing is dropped."""
    return np.minimum.accumulate(np.append(np.maximum(damage[:-1], 0), 0))


def _with_damage(curve: Curve, changes: dict[int, float]) -> Curve:
    """The curve with D = ρ E. log ρ is interpolated linearly between the measured widths and constant beyond them."""
    known = [(k, np.log(change / curve.error[k])) for k, change in changes.items() if change > 0 and curve.error[k] > 0]
    if not known:
        return replace(curve, damage=np.zeros_like(curve.error))
    ks, log_rho = zip(*sorted(known))
    return replace(curve, damage=_falling(curve.error * np.exp(np.interp(np.arange(len(curve.error)), ks, log_rho))))


class _Measuring:
    """Runs the network on the probe and measures an error curve at every consumer."""

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        units: Sequence[Unit],
        criterion: str,
        decompose: Decompose | None,
        ridge: float,
    ) -> None:
        self.model, self.walk, self.units = model, walk, units
        self.criterion, self.decompose, self.ridge = criterion, decompose, ridge
        self.curves: list[Curve | None] = [None] * len(units)
        self.thinned: list[list[Thinned]] = [[] for _ in units]
        self.variance = np.ones(len(units))

    def run(self, probe: Tensor) -> None:
        """One pass over the probe."""
        consumer = {unit.next: i for i, unit in enumerate(self.units)}
        sums: dict[Any, list[int]] = {}
        nodes = list(self.walk.graph.nodes)
        values: dict[Any, Any] = {}
        for node in tqdm(steps(nodes, values), "errors", len(nodes), leave=False, disable=None):
            values[node] = self.walk.run(node, values, probe)
            if node.op == "call_module" and node.target in consumer:
                i = consumer[node.target]
                stream = self.walk.addition(node, self.units[i].next_bn)
                if stream is not None:
                    sums.setdefault(stream[1], []).append(i)
                self._look(i, values[node.all_input_nodes[0]], values[node])
            for i in sums.get(node, ()):
                self.variance[i] = float(variances(values[node], self.walk.modules[self.units[i].next]).sum())

    def _look(self, i: int, x: Tensor, y: Tensor) -> None:
        """Compute the order, error curve and thinned consumers of unit i, whose consumer reads x and gives y."""
        unit, layer = self.units[i], self.walk.modules[self.units[i].next]
        neurons = read(self.model, unit)
        N = len(neurons.W)
        slope = torch.ones(len(layer.weight), dtype=torch.float64, device=x.device)
        if unit.next_bn is not None:
            self.walk.measure(unit.next_bn, y)
            slope = self.walk.slope(unit.next_bn).double()
        self.variance[i] = float(slope.pow(2) @ variances(y, layer))
        U, _ = rows(layer, x, y)
        consumer = Consumer(U, matrix(layer).double(), slope, columns_by_neuron(layer, N), self.ridge)
        order = consumer.greedy() if self.criterion == "auto" else kept_order(neurons, self.criterion)
        measured = sorted({round(share * N) for share in MEASURED})
        if self.decompose is None:
            error, thinned = consumer.regressed(order, measured)
        else:
            parts = {
                k: None if k == 0 else self.decompose(neurons, order[:k].sort().values)
                for k in computed_widths(N, measured)
            }
            error, thinned = consumer.decomposed(parts, measured)
        self.curves[i] = Curve(order.cpu(), error, error)
        self.thinned[i] = thinned


def variances(y: Tensor, layer: nn.Module) -> Tensor:
    """The variance [M] of every neuron of `layer` in y, which is the output of `layer` or of the addition behind it."""
    return y.movedim(channel(layer, y), -1).flatten(0, -2).double().var(0, correction=0)


def joint_damage(
    model: nn.Module,
    units: Sequence[Unit],
    curves: Sequence[Curve],
    choices: Sequence[Sequence[int]],
    probe: Tensor,
    decompose: Decompose,
) -> list[float]:
    """For each choice of kept widths, how much of the network's output is lost if all units are thinned at once: 0 … 2.

    The loss is 1 − the cosine between the outputs of both networks over all samples, centred per sample, so the size of outputs
    does not count. If much is dropped, the squared change would mislead: it can be larger for outputs that point the right way
    than for outputs that are all zero.
    curves: their order says which neurons stay. probe: [B, …]. decompose: a compensation that acts on one layer at a time.
    """
    with in_walk_precision(model, probe) as (work, probe):
        output = Output(walk_through(work, probe), probe)
        return [output.lost(_all_thinned(work, units, curves, widths, decompose)) for widths in choices]


def _all_thinned(
    model: nn.Module, units: Sequence[Unit], curves: Sequence[Curve], widths: Sequence[int], decompose: Decompose
) -> dict[str, Thinned]:
    """The form of every consumer, by name, for these widths."""
    forms = {}
    for unit, curve, k in zip(units, curves, widths):
        neurons, layer = read(model, unit), model.get_submodule(unit.next)
        kept = curve.order[:k].sort().values.to(neurons.W.device)
        part = decompose(neurons, kept) if k else None
        columns = columns_by_neuron(layer, len(curve.order))
        forms[unit.next] = Thinned(k, *absorbed(matrix(layer).double()[:, columns], columns, part))
    return forms

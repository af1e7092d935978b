"""What thinning one unit does to the network, without data (ours).

Over inputs made up from the network itself (synthetic.py), for every unit by itself and every number k of kept neurons:

    E(k)  error of the consumer's output, in units of what the BatchNorm behind it makes of it, as the compensation leaves it
    ρ(k)  sensitivity: the mean squared change of the network's output, on held-out samples, for every unit of E
    D(k) = ρ(k) E(k)

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


HELD_OUT = 1 / 3  # of the probe: for sensitivity


Decompose = Callable[[Neurons, Tensor], Decomposition]


@dataclass(frozen=True)
class Curve:
    """What thinning one unit does. order: its neurons [N], the first are kept; error, damage: E and D for k = 0…N, [N + 1]."""

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

    probe: [B, …]; of it a third is held out for the sensitivities. criterion: the order in which neurons are kept; "auto":
    the greedy one of the regression. decompose: the compensation of one layer, or None for restoration's regression with
    this ridge. sensitivity=False: the cheap mode, D = E / the variance of the stream that the consumer writes to.
    """
    held_out = round(len(probe) * HELD_OUT) if sensitivity else 0
    if len(probe) - held_out < 2 or (sensitivity and not held_out):
        raise NeuronMergingError(f"the choice of widths has to look at 3 inputs at least, not at {len(probe)}")
    with in_walk_precision(model, probe) as (work, probe):
        walk = walk_through(work, probe)
        looks = _Measuring(work, walk, units, criterion, decompose, ridge)
        looks.run(probe[held_out:])
        changes = sensitivities(walk, units, looks.thinned, probe[:held_out]) if sensitivity else None
    if changes is None:
        return [replace(c, damage=_falling(c.error / max(v, 1e-12))) for c, v in zip(looks.curves, looks.variance)]
    return [_with_damage(curve, change) for curve, change in zip(looks.curves, changes)]


def _falling(damage: np.ndarray) -> np.ndarray:
    """D made non-increasing in k, and 0 where nothing is dropped."""
    return np.minimum.accumulate(np.append(np.maximum(damage[:-1], 0), 0))


def _with_damage(curve: Curve, changes: dict[int, float]) -> Curve:
    """D = ρ E; log ρ is linear between the measured widths and constant beyond them."""
    known = [(k, np.log(change / curve.error[k])) for k, change in changes.items() if change > 0 and curve.error[k] > 0]
    if not known:
        return replace(curve, damage=np.zeros_like(curve.error))
    ks, log_rho = zip(*sorted(known))
    return replace(curve, damage=_falling(curve.error * np.exp(np.interp(np.arange(len(curve.error)), ks, log_rho))))


class _Measuring:
    """A walk over the probe that looks at what every consumer sees."""

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
        """Order, error curve and thinned consumers of unit i, whose consumer makes y of x."""
        unit, layer = self.units[i], self.walk.modules[self.units[i].next]
        neurons = read(self.model, unit)
        N = len(neurons.W)
        slope = torch.ones(len(layer.weight), dtype=torch.float64, device=x.device)
        if unit.next_bn is not None:
            self.walk.measure(unit.next_bn, y)
            slope = self.walk.slope(unit.next_bn).double()
        self.variance[i] = float(slope.pow(2) @ variances(y, layer))
        U, _ = rows(layer, x, y)
        seen = Consumer(U, matrix(layer).double(), slope, columns_by_neuron(layer, N), self.ridge)
        order = seen.greedy() if self.criterion == "auto" else kept_order(neurons, self.criterion)
        measured = sorted({round(share * N) for share in MEASURED})
        if self.decompose is None:
            error, thinned = seen.regressed(order, measured)
        else:
            parts = {
                k: None if k == 0 else self.decompose(neurons, order[:k].sort().values)
                for k in computed_widths(N, measured)
            }
            error, thinned = seen.decomposed(parts, measured)
        self.curves[i] = Curve(order.cpu(), error, error)
        self.thinned[i] = thinned


def variances(y: Tensor, layer: nn.Module) -> Tensor:
    """Of every neuron of `layer` in y, what it gives or is added to, [M]."""
    return y.movedim(channel(layer, y), -1).flatten(0, -2).double().var(0, correction=0)


def joint_damage(
    model: nn.Module,
    units: Sequence[Unit],
    curves: Sequence[Curve],
    choices: Sequence[Sequence[int]],
    probe: Tensor,
    decompose: Decompose,
) -> list[float]:
    """For each choice of kept widths how much of the network's output is lost with all units thinned at once: 0 … 2.

    That is 1 − the cosine between the outputs of both networks over all samples, centred per sample: their size does not
    count. A squared change does not do where much is dropped: an output that has died has changed by its own square, one
    that points the right way can have changed by more. curves: whose order says which neurons stay. probe: [B, …].
    decompose: a compensation that is made layer by layer.
    """
    with in_walk_precision(model, probe) as (work, probe):
        output = Output(walk_through(work, probe), probe)
        return [output.lost(_all_thinned(work, units, curves, widths, decompose)) for widths in choices]


def _all_thinned(
    model: nn.Module, units: Sequence[Unit], curves: Sequence[Curve], widths: Sequence[int], decompose: Decompose
) -> dict[str, Thinned]:
    """Every consumer, by name, as it is with these widths."""
    forms = {}
    for unit, curve, k in zip(units, curves, widths):
        neurons, layer = read(model, unit), model.get_submodule(unit.next)
        kept = curve.order[:k].sort().values.to(neurons.W.device)
        part = decompose(neurons, kept) if k else None
        columns = columns_by_neuron(layer, len(curve.order))
        forms[unit.next] = Thinned(k, *absorbed(matrix(layer).double()[:, columns], columns, part))
    return forms

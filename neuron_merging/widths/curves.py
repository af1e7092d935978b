"""What thinning one space does to the network, without data (ours).

On inputs made up from the network itself (synthetic.py), or real ones, for every space alone and every
number k of kept indices:

    E(k)  error of the outputs of all layers that read it after compensation, measured behind their BatchNorms
    ρ(k)  sensitivity: mean squared change of the network's output, on held-out samples, divided by E(k)
    D(k) = ρ(k) E(k), the damage

D assumes that spaces are independent; `joint_damage` compares choices of widths with all spaces thinned at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx
from tqdm import tqdm

from neuron_merging.compensation import Contents, constants
from neuron_merging.decompose import Decomposition
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.walk import Batch, Walk
from neuron_merging.widths.consumer import computed_widths, greedy
from neuron_merging.widths.indices import Decompose, compensation
from neuron_merging.widths.masked import Energy
from neuron_merging.widths.output import Form, Output, sensitivities
from neuron_merging.widths.readings import Layer, find_readings, look

MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of kept indices at which sensitivity is measured


@dataclass(frozen=True)
class Curve:
    """What thinning one space does. order: its indices [N], those kept longest first. error, damage: E, D at k = 0…N.

    estimated: whether something else than plain layers reads it, so that a part of E is an estimate (masked.py).
    """

    order: Tensor
    error: np.ndarray
    damage: np.ndarray
    estimated: bool = False


@dataclass(frozen=True)
class Measure:
    """How curves are measured. criterion: gives the order in which indices are kept; "auto" is the greedy order of the
    regression. decompose: the compensation of one layer, or None for restoration's regression with this `ridge`.
    """

    criterion: str
    decompose: Decompose | None
    ridge: float


def curves(
    survey: Survey,
    spaces: Sequence[Space],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    measure: Measure,
    precision: torch.dtype = torch.float32,
) -> list[Curve]:
    """A curve for every space.

    batches: what errors are measured on. held_out: others, for the sensitivities. Without any, D is E divided by the variance
    of what the reader gives, or of the stream that it adds to: a cheap mode.
    """
    walk = Walk(survey.network.graph, batches, precision)
    errors = Errors(survey, spaces, walk, measure)
    errors.run()
    if not held_out:
        return [replace(c, damage=_falling(damage)) for c, damage in zip(errors.curves, errors.shares)]
    held = Walk(survey.network.graph, held_out, precision, measures=False)
    held.statistics = walk.statistics
    changes = sensitivities(Output(survey, held), errors.forms)
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


class Errors:
    """Runs the network on batches and measures the error of every layer that reads a space."""

    def __init__(self, survey: Survey, spaces: Sequence[Space], walk: Walk, measure: Measure) -> None:
        self.survey, self.spaces, self.walk, self.measure = survey, spaces, walk, measure
        self.device = next(survey.network.model.parameters()).device
        known = constants(survey)
        self.contents = [Contents(survey, space, known) for space in spaces]
        self.readings = [find_readings(survey, space) for space in spaces]
        self.curves: list[Curve | None] = [None] * len(spaces)
        self.forms: list[dict[int, list[Form]]] = [{} for _ in spaces]
        self.shares: list[np.ndarray] = [np.zeros(space.size + 1) for space in spaces]  # errors over variances, summed

    def run(self) -> None:
        """One pass over the batches."""
        starts, ends = self._when()
        sums: dict[fx.Node, list[Layer]] = {}
        nodes = self.walk.nodes
        for node in tqdm(self.walk.run(nodes), "errors", len(nodes), leave=False, disable=None):
            readings = starts.get(node, ())
            for energy in (reading for reading in readings if isinstance(reading, Energy)):
                energy.look(self.walk, node)
            layers = [reading for reading in readings if isinstance(reading, Layer)]
            if layers:
                look(layers, self.walk, self.measure.ridge)
            for layer in (layer for layer in layers if layer.sum is not None):
                sums.setdefault(layer.sum, []).append(layer)
            for layer in sums.get(node, ()):
                layer.variance = layer.variances(self.walk.values[node])
            for i in ends.get(node, ()):
                self._finish(i)

    def _when(self) -> tuple[dict[fx.Node, list[Layer | Energy]], dict[fx.Node, list[int]]]:
        """By node the readings that look there, and the spaces of which all have looked then."""
        place = {node: at for at, node in enumerate(self.walk.nodes)}
        starts: dict[fx.Node, list[Layer | Energy]] = {}
        ends: dict[fx.Node, list[int]] = {}
        for i, readings in enumerate(self.readings):
            nodes = [(node, reading) for reading in readings for node in reading.nodes]
            for node, reading in nodes:
                starts.setdefault(node, []).append(reading)
            later = [reading.sum for reading in readings if isinstance(reading, Layer) and reading.sum is not None]
            ends.setdefault(max([*(node for node, _ in nodes), *later], key=place.__getitem__), []).append(i)
        return starts, ends

    def _finish(self, i: int) -> None:
        """Compute the order, error curve and thinned forms of space i, whose readers have all been looked at."""
        space, readings = self.spaces[i], self.readings[i]
        N = space.size
        measured = sorted({round(share * N) for share in MEASURED})
        if self.measure.criterion == "auto":
            consumers = [consumer for r in readings if isinstance(r, Layer) for consumer in r.consumers]
            alone = sum(
                (r.energies for r in readings if isinstance(r, Energy)),
                torch.zeros(N, dtype=torch.float64, device="cpu"),
            )
            order = greedy(consumers, alone.to(self.device))
        else:
            order = self.contents[i].order(self.measure.criterion).to(self.device)
        parts = self._parts(self.contents[i], order, measured)
        total = np.zeros(N + 1)
        for reading in readings:
            error = self._measured(i, reading, order, measured, parts)
            total += error
            self.shares[i] += error / max(reading.variance, 1e-12)
        estimated = any(isinstance(reading, Energy) for reading in readings)
        self.curves[i] = Curve(order.cpu(), total, total, estimated)
        self.readings[i] = ()

    def _parts(
        self, contents: Contents, order: Tensor, measured: Sequence[int]
    ) -> dict[int, Decomposition | None] | None:
        decompose = self.measure.decompose
        if decompose is None:
            return None
        stand_in = compensation(contents, decompose)
        computed = computed_widths(contents.space.size, measured)
        return {k: None if k == 0 else stand_in(order[:k].sort().values) for k in computed}

    def _measured(
        self,
        i: int,
        reading: Layer | Energy,
        order: Tensor,
        measured: Sequence[int],
        parts: dict[int, Decomposition | None] | None,
    ) -> np.ndarray:
        """The error of one reading; its forms are put with those of the others of space i."""
        if isinstance(reading, Energy):
            error, forms = reading.curve(order, measured)
        else:
            curves = [consumer.curve(order, measured, parts) for consumer in reading.consumers]
            error = sum(error for error, _ in curves)
            forms = [(reading.reader, thinned) for thinned in zip(*(forms for _, forms in curves))]
        for k, form in zip(measured, forms):
            self.forms[i].setdefault(k, []).append(form)
        return error


def joint_damage(
    survey: Survey,
    spaces: Sequence[Space],
    curves: Sequence[Curve],
    choices: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    decompose: Decompose,
    precision: torch.dtype = torch.float32,
) -> list[float]:
    """For each choice of kept widths, how much of the network's output is lost if all spaces are thinned at once: 0 … 2.

    The loss is 1 − the cosine between the outputs of both networks over all samples, centred per sample, so the size of outputs
    does not count. If much is dropped, the squared change would mislead: it can be larger for outputs that point the right way
    than for outputs that are all zero.
    curves: their order says which indices stay. decompose: a compensation that acts on one layer at a time.
    """
    output = Output(survey, Walk(survey.network.graph, batches, precision))
    device = next(survey.network.model.parameters()).device
    found = [(find_readings(survey, space), compensation(Contents(survey, space, {}), decompose)) for space in spaces]
    lost = []
    for widths in choices:
        forms: list[Form] = []
        for (readings, stand_in), curve, k in zip(found, curves, widths):
            order = curve.order.to(device)
            part = stand_in(order[:k].sort().values) if k else None
            for reading in readings:
                forms.append(
                    reading.form(order, k) if isinstance(reading, Energy) else reading.form(output.walk, k, part)
                )
        lost.append(output.lost(forms))
    return lost

"""The choice of kept widths for a budget (ours): indices are dropped where damage rises least for the cost that they save.

`WidthSearch` measures error curves and sensitivities (curves.py) once for all budgets. Then each choice takes a moment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor

from neuron_merging.errors import NeuronMergingError, reported_as
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.walk import Batch, precision
from neuron_merging.widths.batches import count, split
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.curves import Curve, Measure, curves, joint_damage
from neuron_merging.widths.indices import Decompose

BALANCES = np.linspace(0, 1, 11)  # weights of parameters against MACs that are tried if both are limited
HELD_OUT = 1 / 3  # share of the samples that only the sensitivities are measured on


class WidthSearch:
    """Measures a network's spaces once, then gives kept widths for any number of budgets.

    survey: of the network, which is unchanged. batches: the inputs to measure on. criterion: gives the order in which indices
    are kept; "auto" is the greedy order of a regression. layerwise: the compensation of one layer, or None for restoration's
    regression with `ridge`. sensitivity=False: the quick choice. biases: whether the compensation may add biases.
    Attributes: cost; curves, one for each space; seconds that measuring took.
    Raises NeuronMergingError where there are too few samples, or the network does not run on them.
    """

    @torch.no_grad()
    def __init__(
        self,
        survey: Survey,
        spaces: Sequence[Space],
        batches: Sequence[Batch],
        *,
        criterion: str,
        layerwise: Decompose | None,
        ridge: float,
        sensitivity: bool,
        biases: bool,
    ) -> None:
        start = time.perf_counter()
        self.survey, self.spaces, self.batches, self.layerwise = survey, spaces, batches, layerwise
        self.sensitivity = sensitivity
        self.cost = Cost(survey, spaces, biases)
        self.whole = self.cost.whole
        seen, held_out = split(survey.network, batches, HELD_OUT if sensitivity else 0.0)
        with reported_as(f"no widths can be chosen for {type(survey.network.model).__name__} on these inputs"):
            macs = self.whole[1] * count(survey.network, batches)
            self.precision = precision(survey.network.graph, batches, macs)
            measure = Measure(criterion, layerwise, ridge)
            self.curves = curves(survey, spaces, seen, held_out, measure, self.precision)
        self.seconds = time.perf_counter() - start

    @torch.no_grad()
    def widths(
        self,
        uniform: Sequence[int],
        budget: Mapping[str, float] | None = None,
        *,
        multiple: int = 1,
        drop_blocks: bool = False,
        compare: bool = False,
    ) -> list[int]:
        """Kept widths that cost at most as much as the `uniform` ones, or as the shares of the network in `budget`.

        compare: return the uniform ones if they keep the network's output nearer to the original. Raises NeuronMergingError if
        no widths are small enough.
        """
        limit = self.cost(uniform)
        if budget is not None:
            limit = [size * budget.get(name, inf) for name, size in zip(("params", "macs"), self.whole)]
        droppable = [drop_blocks and branch for branch in self.cost.branches]
        chosen = allocate(self.curves, self.cost, limit, multiple=multiple, droppable=droppable)
        rounded = [k if k == N else k - k % multiple for k, N in zip(uniform, self.cost.full)]
        if not compare or budget is not None or not self.sensitivity or min(rounded) == 0 or chosen == rounded:
            return chosen
        damage = joint_damage(
            self.survey, self.spaces, self.curves, [chosen, rounded], self.batches, self.layerwise, self.precision
        )
        return rounded if damage[1] < damage[0] else chosen

    def keep(self, widths: Sequence[int]) -> list[Tensor]:
        """For every space the P indices that come first in its order, ascending: [P]."""
        return [curve.order[:width].sort().values for curve, width in zip(self.curves, widths)]


def allocate(
    curves: Sequence[Curve],
    cost: Cost,
    budget: Sequence[float],
    *,
    multiple: int = 1,
    droppable: Sequence[bool] = (),
) -> list[int]:
    """The kept width of every space: the widths with the least Σ D that were found within `budget` (parameters, MACs).

    budget: inf for no limit. multiple: every width is a multiple of it, or the full width. droppable: for each space, whether
    it may lose all its indices. Raises NeuronMergingError if no widths are small enough.
    """
    droppable = droppable or [False] * len(curves)
    allowed = [_allowed(len(curve.order), multiple, drop) for curve, drop in zip(curves, droppable)]
    budget = np.asarray(budget, dtype=float)
    limited = np.isfinite(budget)
    if multiple > 1 and all(len(ks) == 1 for ks in allowed) and (cost(cost.full) > budget).any():
        raise NeuronMergingError(f"--multiple {multiple} leaves every layer whole: give a smaller one")
    balances = [(b, 1 - b) for b in BALANCES] if limited.all() else [limited]
    hulls = [_hull(ks, curve.damage[ks]) for ks, curve in zip(allowed, curves)]
    tried = [_descend(curves, cost, budget, allowed, hulls, np.array(balance) / budget) for balance in balances]
    return min(tried, key=lambda widths: sum(c.damage[w] for c, w in zip(curves, widths))).tolist()


def _allowed(N: int, multiple: int, drop: bool) -> np.ndarray:
    """The widths that a space of N indices may have, ascending."""
    return np.array([*([0] if drop else []), *range(multiple, N, multiple), N])


def _descend(
    curves: Sequence[Curve],
    cost: Cost,
    budget: np.ndarray,
    allowed: list[np.ndarray],
    hulls: list[list[int]],
    price: np.ndarray,
) -> np.ndarray:
    """The widths that a greedy search finds for one weighting (`price`) of parameters and MACs.

    From full widths it steps down the hulls, each time where D rises least for the price saved, until the budget is met. Then
    it widens spaces again, each time where D falls most for the price, as far as the budget allows.
    """
    place = np.zeros(len(curves), dtype=int)
    steps = [(np.array(hull), curve.damage[hull]) for hull, curve in zip(hulls, curves)]
    widths = cost.full.copy()
    while (cost(widths) > budget).any():
        last = np.array([at + 1 == len(hull) for at, hull in zip(place, hulls)])
        there = np.array([ks[min(at + 1, len(ks) - 1)] for at, (ks, _) in zip(place, steps)])
        rise = np.array([d[min(at + 1, len(d) - 1)] - d[at] for at, (_, d) in zip(place, steps)])
        saved = price @ -_difference(cost.along(widths), widths, there)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(last | (saved <= 0), np.inf, rise / saved)
        i = int(rate.argmin())
        if not np.isfinite(rate[i]):
            least = [ks[0] for ks in allowed]
            raise NeuronMergingError(
                "no widths are within the budget: the least have {:,.0f} parameters and {:,.0f} MACs".format(
                    *cost(least)
                )
            )
        place[i] += 1
        widths[i] = hulls[i][place[i]]
    # Spend the rest of the budget where it helps most; a step may skip widths that do not help by themselves.
    while True:
        spent, along = cost(widths), cost.along(widths)
        best, most = None, 0.0
        for i, (ks, curve) in enumerate(zip(allowed, curves)):
            above = ks[ks > widths[i]]
            more = _difference(along[:, i, None], np.full(len(above), widths[i]), above)
            extra = more.copy()
            if widths[i] == 0:  # a block that comes back brings its BatchNorm
                extra[0] -= cost.restored(i, widths)
            fits = (spent[:, None] + extra <= budget[:, None]).all(0) & (price @ more > 0)
            if fits.any():
                gain = (curve.damage[widths[i]] - curve.damage[above[fits]]) / (price @ more[:, fits])
                if gain.max() > most:
                    best, most = (i, above[fits][gain.argmax()]), gain.max()
        if best is None:
            return widths
        widths[best[0]] = best[1]


def _difference(along: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """How much more a cost is there than here, [2, n], for polynomials [2, n, D + 1] of widths [n]."""
    powers = np.arange(1, along.shape[2])
    return (along[:, :, 1:] * (there[:, None] ** powers - here[:, None] ** powers)).sum(2)


def _hull(ks: np.ndarray, damage: np.ndarray) -> list[int]:
    """The widths at the corners of the lower convex hull of the curve of D over the widths `ks`, from full width down."""
    corners: list[int] = []
    for i in range(len(ks) - 1, -1, -1):
        while len(corners) > 1 and _slope(ks, damage, corners[-2], corners[-1]) >= _slope(ks, damage, corners[-1], i):
            corners.pop()
        corners.append(i)
    return [int(ks[i]) for i in corners]


def _slope(ks: np.ndarray, damage: np.ndarray, i: int, j: int) -> float:
    """How much D rises for each neuron dropped from corner i down to corner j."""
    return (damage[j] - damage[i]) / (ks[i] - ks[j])

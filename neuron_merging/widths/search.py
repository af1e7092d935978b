"""The choice of kept widths for a budget (ours): neurons are dropped where damage rises least for the cost that they save.

`WidthSearch` measures error curves and sensitivities (curves.py) once for all budgets. Then each choice takes a moment.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from math import inf

import numpy as np
from torch import Tensor, nn

from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.tracing import Unit
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.curves import Curve, Decompose, curves, joint_damage

BALANCES = np.linspace(0, 1, 11)  # weights of parameters against MACs that are tried if both are limited


class WidthSearch:
    """Measures a network's units once, then gives kept widths for any number of budgets.

    model: is unchanged. units: without streams. shape: of one input. inputs: a function that returns the inputs [B, …] to
    measure on. criterion: gives the order in which neurons are kept. layerwise: the compensation of one layer, or None for
    restoration's regression with `ridge`. sensitivity=False: the quick choice. biases: whether the compensation may add biases.
    Attributes: curves, one for each unit; seconds that measuring took.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        shape: tuple[int, ...],
        inputs: Callable[[], Tensor],
        *,
        criterion: str,
        layerwise: Decompose | None,
        ridge: float,
        sensitivity: bool,
        biases: bool,
    ) -> None:
        start = time.perf_counter()
        self.model, self.units, self.inputs, self.layerwise = model, units, inputs, layerwise
        self.sensitivity = sensitivity
        self.cost = Cost(model, units, shape, biases)
        self.whole = count_parameters(model), count_macs(model, shape)
        self.curves = curves(model, units, inputs(), criterion, layerwise, ridge, sensitivity=sensitivity)
        self.seconds = time.perf_counter() - start

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
        droppable = [drop_blocks and unit.branch for unit in self.units]
        chosen = allocate(self.curves, self.cost, limit, multiple=multiple, droppable=droppable)
        rounded = [k if k == N else k - k % multiple for k, N in zip(uniform, self.cost.full)]
        if not compare or budget is not None or not self.sensitivity or min(rounded) == 0 or chosen == rounded:
            return chosen
        damage = joint_damage(self.model, self.units, self.curves, [chosen, rounded], self.inputs(), self.layerwise)
        return rounded if damage[1] < damage[0] else chosen

    def keep(self, widths: Sequence[int]) -> list[Tensor]:
        """For every unit the P neurons that come first in its order, ascending: [P]."""
        return [curve.order[:width].sort().values for curve, width in zip(self.curves, widths)]


def allocate(
    curves: Sequence[Curve],
    cost: Cost,
    budget: Sequence[float],
    *,
    multiple: int = 1,
    droppable: Sequence[bool] = (),
) -> list[int]:
    """The kept width of every unit: the widths with the least Σ D that were found within `budget` (parameters, MACs).

    budget: inf for no limit. multiple: every width is a multiple of it, or the full width. droppable: for each unit, whether it
    may lose all its neurons. Raises NeuronMergingError if no widths are small enough.
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
    """The widths that a unit of N neurons may have, ascending."""
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
    it widens units again, each time where D falls most for the price, as far as the budget allows.
    """
    place = [0] * len(curves)
    widths = cost.full.copy()
    while (cost(widths) > budget).any():
        value = price @ cost.marginal(widths)
        rise = np.full(len(curves), np.inf)
        for i, (hull, at, curve) in enumerate(zip(hulls, place, curves)):
            if at + 1 < len(hull) and value[i] > 0:
                here, there = hull[at], hull[at + 1]
                rise[i] = (curve.damage[there] - curve.damage[here]) / ((here - there) * value[i])
        i = int(rise.argmin())
        if not np.isfinite(rise[i]):
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
        spent, marginal = cost(widths), cost.marginal(widths)
        value = price @ marginal
        best, most = None, 0.0
        for i, (ks, curve) in enumerate(zip(allowed, curves)):
            above = ks[ks > widths[i]]
            fits = (spent[:, None] + cost.wider(i, widths[i], above, marginal) <= budget[:, None]).all(0)
            above = above[fits]
            if len(above) and value[i] > 0:
                gain = (curve.damage[widths[i]] - curve.damage[above]) / ((above - widths[i]) * value[i])
                if gain.max() > most:
                    best, most = (i, above[gain.argmax()]), gain.max()
        if best is None:
            return widths
        widths[best[0]] = best[1]


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

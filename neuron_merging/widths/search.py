"""The choice of kept widths for a budget (ours): neurons are given up where damage rises least for what they cost.

Error curves and sensitivities (curves.py) are measured once for all budgets, by `WidthSearch`; a choice takes a moment.
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

BALANCES = np.linspace(0, 1, 11)  # of parameters against MACs, where both are limited


class WidthSearch:
    """What was measured of a network's units, once; gives kept widths for any number of budgets.

    model: left as it is. units: the paper's. shape: of one input. inputs: gives those [B, …] to look at. criterion: the order
    in which neurons are kept. layerwise: the compensation of one layer, None for restoration's regression with `ridge`.
    sensitivity=False: the quick choice. biases: whether the compensation may leave a bias where there was none.
    curves: by unit. seconds: that measuring took.
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
        """Kept widths with the cost of the `uniform` ones at most, or of the shares of the network that `budget` says.

        compare: take the uniform ones where the network's output is nearer to the original's with them. Raises
        NeuronMergingError where no widths are small enough.
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
        """The neurons [P] of every unit that come first in its order, ascending."""
        return [curve.order[:width].sort().values for curve, width in zip(self.curves, widths)]


def allocate(
    curves: Sequence[Curve],
    cost: Cost,
    budget: Sequence[float],
    *,
    multiple: int = 1,
    droppable: Sequence[bool] = (),
) -> list[int]:
    """The kept width of every unit with the least Σ D whose parameters and MACs are at most `budget` (inf: no limit).

    multiple: widths are multiples of it, or full. droppable: units that may lose all their neurons.
    Raises NeuronMergingError where no widths are small enough.
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
    """From full width down the hulls, always where D rises least for the price saved, until the budget holds; then back up."""
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
    while True:  # what is left over goes back where it helps most, also over widths that do not help by themselves
        spent, each = cost(widths), cost.marginal(widths)
        value = price @ each
        best, most = None, 0.0
        for i, (ks, curve) in enumerate(zip(allowed, curves)):
            above = ks[ks > widths[i]]
            fits = (spent[:, None] + cost.wider(i, widths[i], above, each) <= budget[:, None]).all(0)
            above = above[fits]
            if len(above) and value[i] > 0:
                gain = (curve.damage[widths[i]] - curve.damage[above]) / ((above - widths[i]) * value[i])
                if gain.max() > most:
                    best, most = (i, above[gain.argmax()]), gain.max()
        if best is None:
            return widths
        widths[best[0]] = best[1]


def _hull(ks: np.ndarray, damage: np.ndarray) -> list[int]:
    """The widths at the corners of the lower convex hull of D over the widths ks, from full width down."""
    corners: list[int] = []
    for i in range(len(ks) - 1, -1, -1):
        while len(corners) > 1 and _slope(ks, damage, corners[-2], corners[-1]) >= _slope(ks, damage, corners[-1], i):
            corners.pop()
        corners.append(i)
    return [int(ks[i]) for i in corners]


def _slope(ks: np.ndarray, damage: np.ndarray, i: int, j: int) -> float:
    """How much D rises for every neuron from corner i down to corner j."""
    return (damage[j] - damage[i]) / (ks[i] - ks[j])

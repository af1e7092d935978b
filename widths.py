"""Which layers to thin, chosen without data (ours, not the paper's): kept widths for a budget of parameters and MACs.

Over a probe made up from the network itself (probe.py), for every unit by itself and every number k of kept neurons:

    E(k)  error of the consumer's output, in units of what the BatchNorm behind it makes of it, as the compensation leaves it
    ρ(k)  sensitivity: the mean squared change of the network's output, on held-out samples, for every unit of E
    D(k) = ρ(k) E(k)

Then neurons are given up where the lower convex hull of D rises least for what they cost, until the budget holds.
Errors and sensitivities are measured once for all budgets (`curves`), the rest takes a moment (`allocate`). As D adds up
as if units did not feel each other, widths can be compared with all units thinned at once (`joint_damage`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from decompose import CRITERIA, Decomposition, Neurons, ranked, read
from errors import NeuronMergingError, said
from evaluate import count_macs, count_parameters
from trace import CONVS, Unit
from walk import (
    Walk,
    as_weight,
    by_sample,
    centre,
    channel,
    cholesky,
    computing_in,
    count_positions,
    covariance,
    matrix,
    penalty,
    precision,
    rows,
    steps,
    walk_through,
)

MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of kept neurons at which sensitivity is measured
STEPS = 16  # shares at which an error without a curve in closed form is computed
HELD_OUT = 1 / 3  # of the probe: for sensitivity
BALANCES = np.linspace(0, 1, 11)  # of parameters against MACs, where both are limited

Decompose = Callable[[Neurons, Tensor], Decomposition]


@dataclass(frozen=True)
class Curve:
    """What thinning one unit does. order: its neurons [N], the first are kept; error, damage: E and D for k = 0…N, [N + 1]."""

    order: Tensor
    error: np.ndarray
    damage: np.ndarray


# ---------------------------------------------------------------- cost


class Cost:
    """Parameters and MACs of a network for every choice of widths: wᵀ Q w with w the widths and a 1, as layers have two sides.

    Where a block is left out (width 0), a constant stands for its consumer and the BatchNorm behind. biases: whether the
    compensation leaves a bias in layers without a BatchNorm behind them; then every such layer is counted with one.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], shape: tuple[int, ...], biases: bool = False) -> None:
        self.full = np.array([len(model.get_submodule(unit.layer).weight) for unit in units])
        producer, consumer = ({getattr(u, side): i for i, u in enumerate(units)} for side in ("layer", "next"))
        norm = {u.next: u.next_bn for u in units} | {u.layer: u.bn for u in units}
        self.Q, added = np.zeros((2, len(units) + 1, len(units) + 1)), 0
        for name, positions in count_positions(model, shape).items():
            layer = model.get_submodule(name)
            i, j = producer.get(name, -1), consumer.get(name, -1)
            weights = layer.weight.numel() / (1 if i < 0 else self.full[i]) / (1 if j < 0 else self.full[j])
            self.Q[:, i, j] += weights, weights * positions
            missing = biases and layer.bias is None and name in norm and norm[name] is None
            self.Q[0, i, -1] += (layer.bias is not None or missing) * (len(layer.weight) if i < 0 else 1)
            if i >= 0 and units[i].bn:
                self.Q[0, i, -1] += len(list(model.get_submodule(units[i].bn).parameters()))
            added += missing * len(layer.weight)
        self.block = np.zeros(len(units))  # what leaving the block out adds to its consumer's bias and BatchNorm
        for i, unit in enumerate(units):
            layer, bn = model.get_submodule(unit.next), unit.next_bn and model.get_submodule(unit.next_bn)
            biased = layer.bias is not None or (biases and not bn)
            self.block[i] = (1 - biased) * len(layer.weight) - (count_parameters(bn) if bn else 0)
        self.Q[:, -1, -1] += (count_parameters(model) + added, count_macs(model, shape)) - self(self.full)

    def __call__(self, widths: Sequence[int]) -> np.ndarray:
        """(parameters, MACs)."""
        w = np.append(widths, 1)
        return self.Q @ w @ w + (self.block @ (w[:-1] == 0), 0)

    def marginal(self, widths: Sequence[int]) -> np.ndarray:
        """What one neuron more costs, [2, units]."""
        return ((self.Q + self.Q.transpose(0, 2, 1)) @ np.append(widths, 1))[:, :-1]

    def wider(self, i: int, k: int, above: np.ndarray, each: np.ndarray) -> np.ndarray:
        """What it costs to make unit i, k wide, as wide as `above` [n], [2, n]; each: `marginal` of all widths.

        A block that comes back brings its BatchNorm.
        """
        more = np.outer(each[:, i], above - k)
        more[0] -= self.block[i] * (k == 0)
        return more


# ---------------------------------------------------------------- the choice


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


# ---------------------------------------------------------------- error curves and sensitivities


@dataclass(frozen=True)
class _Thinned:
    """A unit with k neurons in its place in the whole network: its consumer with these weights [M, F] and this constant [M]."""

    k: int
    W: Tensor
    c: Tensor


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
    with _looking(model, probe) as (work, probe):
        walk = walk_through(work, probe)
        looks = _Looks(work, walk, units, criterion, decompose, ridge)
        looks.run(probe[held_out:])
        changes = _sensitivity(walk, units, looks.thinned, probe[:held_out]) if sensitivity else None
    if changes is None:
        return [replace(c, damage=_falling(c.error / max(v, 1e-12))) for c, v in zip(looks.curves, looks.variance)]
    return [_with_damage(curve, change) for curve, change in zip(looks.curves, changes)]


@contextmanager
def _looking(model: nn.Module, probe: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of the network to walk through, and the probe, both in the precision of walks."""
    what = f"no widths can be chosen for {type(model).__name__} on inputs of shape {list(probe.shape)}"
    with said(what), torch.no_grad():
        probe = probe.to(precision(model, probe))
        yield computing_in(model, probe.dtype), probe


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


class _Looks:
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
        self.thinned: list[list[_Thinned]] = [[] for _ in units]
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
                self.variance[i] = float(_each_variance(values[node], self.walk.modules[self.units[i].next]).sum())

    def _look(self, i: int, x: Tensor, y: Tensor) -> None:
        """Order, error curve and thinned consumers of unit i, whose consumer makes y of x."""
        unit, layer = self.units[i], self.walk.modules[self.units[i].next]
        neurons = read(self.model, unit)
        N = len(neurons.W)
        slope = torch.ones(len(layer.weight), dtype=torch.float64, device=x.device)
        if unit.next_bn is not None:
            self.walk.measure(unit.next_bn, y)
            slope = self.walk.slope(unit.next_bn).double()
        self.variance[i] = float(slope.pow(2) @ _each_variance(y, layer))
        U, _ = rows(layer, x, y)
        seen = _Seen(U, matrix(layer).double(), slope, _columns(layer, N), self.ridge)
        order = seen.greedy() if self.criterion == "auto" else ranked(CRITERIA[self.criterion](neurons.W))
        measured = sorted({round(share * N) for share in MEASURED})
        if self.decompose is None:
            error, thinned = seen.regressed(order, measured)
        else:
            parts = {
                k: None if k == 0 else self.decompose(neurons, order[:k].sort().values) for k in _some(N, measured)
            }
            error, thinned = seen.decomposed(parts, measured)
        self.curves[i] = Curve(order.cpu(), error, error)
        self.thinned[i] = thinned


def _some(N: int, measured: Sequence[int]) -> list[int]:
    """The numbers of kept neurons at which an error without a closed form is computed, ascending."""
    return sorted({round(N * step / STEPS) for step in range(STEPS)} | set(measured))


def _between(error: dict[int, float], N: int) -> np.ndarray:
    """E at k = 0…N by straight lines between the computed ones, 0 at N: [N + 1]."""
    return np.interp(np.arange(N + 1), [*error, N], [*error.values(), 0.0])


def _each_variance(y: Tensor, layer: nn.Module) -> Tensor:
    """Of every neuron of `layer` in y, what it gives or is added to, [M]."""
    return y.movedim(channel(layer, y), -1).flatten(0, -2).double().var(0, correction=0)


class _Seen:
    """What a consumer with the weights W [M, F] sees, U [n, F], and how well it can do with less of it.

    slope [M]: what the BatchNorm behind makes of a unit of its output. columns [N, taps]: of U and W, by neuron.
    A = Cov(u, u) in float64; where there are fewer samples than features, U stands for it.
    """

    def __init__(self, U: Tensor, W: Tensor, slope: Tensor, columns: Tensor, ridge: float) -> None:
        n, features = U.shape
        self.W, self.slope, self.columns = W, slope, columns
        self.mean = centre(U).double()
        self.few = n < features
        if self.few:
            self.U = U.double() / n**0.5  # A = UᵀU
            energy = self.U.pow(2).sum(0)
        else:
            self.A = covariance(U)
            energy = self.A.diagonal()
        self.penalty = penalty(energy, ridge)

    def regressed(self, order: Tensor, measured: Sequence[int]) -> tuple[np.ndarray, list[_Thinned]]:
        """E(k) for all k when the kept neurons rebuild the consumer's output by ridge regression, and the consumers.

        With A + Λ = L Lᵀ in this order and D what is dropped: what D leaves over is W_D L_DD, as L is triangular; what S
        takes over is W_D L_DS L_SS⁻¹. So one factor serves every k.
        """
        if self.few:
            return self._regressed_few(order, measured)
        N, taps = self.columns.shape
        by_place = self.columns[order].flatten()
        R = self.A[by_place][:, by_place]
        R.diagonal().add_(self.penalty[by_place])
        L = cholesky(R)
        W = self.W[:, by_place]
        left = self.slope[:, None] * W
        each = (left @ L).pow(2).sum(0) - left.pow(2).sum(0) * self.penalty[by_place]
        each = each.view(N, taps).sum(1).flip(0).cumsum(0).flip(0)
        thinned = []
        for k in measured:
            kept = k * taps
            B = W[:, kept:] @ L[kept:, :kept]
            B = torch.linalg.solve_triangular(L[:kept, :kept], B, upper=False, left=False)
            thinned.append(self._thinned(k, by_place[:kept], W[:, :kept] + B))
        return np.append(each.cpu().numpy(), 0.0).clip(min=0), thinned

    def _regressed_few(self, order: Tensor, measured: Sequence[int]) -> tuple[np.ndarray, list[_Thinned]]:
        """The same at some k, by n × n kernel matrices, and straight lines between."""
        N, taps = self.columns.shape
        by_place, n = self.columns[order].flatten(), len(self.U)
        error, thinned = {}, []
        for k in _some(N, measured):
            S, D = by_place[: k * taps], by_place[k * taps :]
            scaled = self.U[:, S] / self.penalty[S]
            kernel = scaled @ self.U[:, S].T + torch.eye(n, dtype=torch.float64, device=self.U.device)
            missing = self.U[:, D] @ self.W[:, D].T  # [n, M]
            left = torch.linalg.solve(kernel, missing)
            error[k] = float((missing * left * self.slope.pow(2)).sum())
            if k in measured:
                thinned.append(self._thinned(k, S, self.W[:, S] + (scaled.T @ left).T))
        return _between(error, N), thinned

    def _thinned(self, k: int, S: Tensor, W: Tensor) -> _Thinned:
        """The consumer with the weights W for the columns S, in its place; its mean output stays what it was."""
        whole = torch.zeros_like(self.W)
        whole[:, S] = W
        return _Thinned(k, whole.float(), ((self.W - whole) @ self.mean).float())

    def decomposed(
        self, parts: dict[int, Decomposition | None], measured: Sequence[int]
    ) -> tuple[np.ndarray, list[_Thinned]]:
        """E(k) when a compensation of one layer has made `parts` of its neurons (None: nothing is left), and the consumers."""
        N, by_neuron = len(self.columns), self.W[:, self.columns]
        error, thinned = {}, []
        for k, part in parts.items():
            W, c = _absorbed(by_neuron, self.columns, part)
            change = W - self.W
            error[k] = float((self.slope.pow(2) * (self._energy(change) + (change @ self.mean + c).pow(2))).sum())
            if k in measured:
                thinned.append(_Thinned(k, W.float(), c.float()))
        return _between(error, N), thinned

    def _energy(self, change: Tensor) -> Tensor:
        """The variance of (ΔW) u, [M]."""
        if self.few:
            return (self.U @ change.T).pow(2).sum(0)
        return ((change @ self.A) * change).sum(1)

    def greedy(self) -> Tensor:
        """The neurons in the order in which they explain most of what the consumer makes of all: pivoted Cholesky, by neuron.

        Where there are fewer samples than features, by what each explains alone.
        """
        (N, taps), left = self.columns.shape, self.slope[:, None] * self.W
        if self.few:
            G = ((left @ self.U.T) @ self.U)[:, self.columns]  # [M, N, taps]
            by_neuron = self.U[:, self.columns]
            blocks = torch.einsum("bni,bnj->nij", by_neuron, by_neuron)
        else:
            G = (left @ self.A)[:, self.columns]
            blocks = self.A[self.columns[:, :, None], self.columns[:, None, :]]  # [N, taps, taps]
        blocks = blocks + torch.diag_embed(self.penalty[self.columns])
        if self.few:
            return ranked(_explained(G, blocks))
        G, order = G.clone(), []
        L = self.W.new_zeros(N * taps, N, taps)  # rows as they are made, over all columns
        free = torch.ones(N, dtype=torch.bool, device=self.W.device)
        for step in range(N):
            j = int(_explained(G, blocks).where(free, -1).argmax())
            done = slice(0, step * taps)
            R = self.A[self.columns[j]][:, self.columns].clone()  # [taps, N, taps]
            R[:, j].diagonal().add_(self.penalty[self.columns[j]])
            R -= torch.einsum("ri,rnk->ink", L[done, j], L[done])
            factor = cholesky(R[:, j])
            row = torch.linalg.solve_triangular(factor, R.reshape(taps, -1), upper=False).view(taps, N, taps)
            along = torch.linalg.solve_triangular(factor, G[:, j].T, upper=False)  # [taps, M]
            L[step * taps : (step + 1) * taps] = row
            G -= torch.einsum("im,ink->mnk", along, row)
            blocks = blocks - torch.einsum("ink,inl->nkl", row, row)
            order.append(j)
            free[j] = False
        return torch.tensor(order, device=self.W.device)


def _columns(layer: nn.Module, N: int) -> Tensor:
    """Which columns of what `layer` sees, and of its `matrix`, belong to each of the N neurons in front of it: [N, taps]."""
    columns = torch.arange(layer.weight[0].numel(), device=layer.weight.device)
    return columns.view(-1, N).T if isinstance(layer, CONVS) else columns.view(N, -1)


def _absorbed(by_neuron: Tensor, columns: Tensor, part: Decomposition | None) -> tuple[Tensor, Tensor]:
    """The consumer's weights [M, F] and constant [M] when the kept neurons stand in for all (None: none is kept).

    by_neuron: its weights as they were, [M, N, taps]. columns [N, taps]: where those are among the F.
    """
    M = len(by_neuron)
    W, c = by_neuron.new_zeros(M, columns.numel()), by_neuron.new_zeros(M)
    if part is not None:
        W[:, columns[part.keep].flatten()] = torch.einsum("mnk,pn->mpk", by_neuron, part.Z).reshape(M, -1)
        if part.shift is not None:
            c = by_neuron.sum(2) @ part.shift
    return W, c


def _explained(G: Tensor, blocks: Tensor) -> Tensor:
    """tr(G_n R_nn⁻¹ G_nᵀ) of every neuron n, [N]; G [M, N, taps], R_nn [N, taps, taps]."""
    taps = blocks.shape[-1]
    jitter = 1e-9 * blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(taps, dtype=blocks.dtype, device=blocks.device)
    factor, _ = torch.linalg.cholesky_ex(blocks + jitter[:, None, None] * eye)
    along = torch.linalg.solve_triangular(factor, G.permute(1, 2, 0), upper=False)  # [N, taps, M]
    return along.pow(2).sum((1, 2)).nan_to_num(0)


class _Output:
    """What the network makes of some samples, and what becomes of that with consumers in their thinned form."""

    def __init__(self, walk: Walk, probe: Tensor) -> None:
        self.walk, self.probe, self.nodes = walk, probe, list(walk.graph.nodes)
        self.original = self._output(0, {}, {})

    def change(self, forms: dict[str, _Thinned], first: int, values: dict[Any, Any]) -> float:
        """The mean squared change of the network's output, centred per sample, with these forms of consumers by name.

        first: the place of the first node that they concern; values: what the nodes before it give.
        """
        return float((self._output(first, values, forms) - self.original).pow(2).sum(1).mean())

    def lost(self, forms: dict[str, _Thinned]) -> float:
        """1 − the cosine between the network's outputs, centred per sample, and those with these forms of consumers."""
        thinned = self._output(0, {}, forms)
        return 1 - float(cosine_similarity(thinned.flatten(), self.original.flatten(), dim=0))

    def _output(self, first: int, values: dict[Any, Any], forms: dict[str, _Thinned]) -> Tensor:
        values = dict(values)
        for node in steps(self.nodes[first:], values):
            form = forms.get(node.target) if node.op == "call_module" else None
            values[node] = (
                self.walk.run(node, values, self.probe) if form is None else self._thinned(node, form, values)
            )
        return _centred(values[self.nodes[-1]])

    def _thinned(self, node: Any, form: _Thinned, values: dict[Any, Any]) -> Tensor:
        layer, (source,) = self.walk.modules[node.target], node.all_input_nodes
        weight = as_weight(form.W.to(layer.weight), layer)
        y = functional_call(layer, {"weight": weight}, (values[source],))
        return y + form.c.to(y).view(-1, *[1] * (y.ndim - 1 - channel(layer, y)))


def _sensitivity(
    walk: Walk, units: Sequence[Unit], thinned: Sequence[Sequence[_Thinned]], probe: Tensor
) -> list[dict[int, float]]:
    """By k the mean squared change of the network's output when one unit alone is thinned to k neurons."""
    consumer = {unit.next: i for i, unit in enumerate(units)}
    output = _Output(walk, probe)
    changes: list[dict[int, float]] = [{} for _ in units]
    values: dict[Any, Any] = {}
    walked = tqdm(steps(output.nodes, values), "sensitivities", len(output.nodes), leave=False, disable=None)
    for place, node in enumerate(walked):
        if node.op == "call_module" and node.target in consumer:
            i = consumer[node.target]
            changes[i] = {form.k: output.change({node.target: form}, place, values) for form in thinned[i]}
        values[node] = walk.run(node, values, probe)
    return changes


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
    with _looking(model, probe) as (work, probe):
        output = _Output(walk_through(work, probe), probe)
        return [output.lost(_all_thinned(work, units, curves, widths, decompose)) for widths in choices]


def _all_thinned(
    model: nn.Module, units: Sequence[Unit], curves: Sequence[Curve], widths: Sequence[int], decompose: Decompose
) -> dict[str, _Thinned]:
    """Every consumer, by name, as it is with these widths."""
    forms = {}
    for unit, curve, k in zip(units, curves, widths):
        neurons, layer = read(model, unit), model.get_submodule(unit.next)
        kept = curve.order[:k].sort().values.to(neurons.W.device)
        part = decompose(neurons, kept) if k else None
        columns = _columns(layer, len(curve.order))
        forms[unit.next] = _Thinned(k, *_absorbed(matrix(layer).double()[:, columns], columns, part))
    return forms


def _centred(output: Any) -> Tensor:
    """All outputs of the network, [B, …] → [B, numbers], less their mean over each sample where there are several."""
    flat = by_sample(output).double()
    return flat - flat.mean(1, keepdim=True) if flat.shape[1] > 1 else flat

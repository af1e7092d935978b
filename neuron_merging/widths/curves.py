"""What thinning one unit does to the network, without data (ours).

Over inputs made up from the network itself (synthetic.py), for every unit by itself and every number k of kept neurons:

    E(k)  error of the consumer's output, in units of what the BatchNorm behind it makes of it, as the compensation leaves it
    ρ(k)  sensitivity: the mean squared change of the network's output, on held-out samples, for every unit of E
    D(k) = ρ(k) E(k)

D assumes that layers are independent; `joint_damage` compares choices of widths with all units thinned at once.
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

from neuron_merging.decompose import CRITERIA, Decomposition, Neurons, ranked
from neuron_merging.errors import NeuronMergingError, said
from neuron_merging.graph.interpreter import Walk, by_sample, computing_in, precision, steps, walk_through
from neuron_merging.graph.tracing import CONVS, Unit
from neuron_merging.linalg import as_weight, centre, channel, cholesky, covariance, matrix, penalty, rows
from neuron_merging.network import read

MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of kept neurons at which sensitivity is measured
STEPS = 16  # shares at which an error without a curve in closed form is computed
HELD_OUT = 1 / 3  # of the probe: for sensitivity

Decompose = Callable[[Neurons, Tensor], Decomposition]


@dataclass(frozen=True)
class Curve:
    """What thinning one unit does. order: its neurons [N], the first are kept; error, damage: E and D for k = 0…N, [N + 1]."""

    order: Tensor
    error: np.ndarray
    damage: np.ndarray


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

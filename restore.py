"""Restoration (ours, not the paper's): all kept neurons together rebuild what the dropped ones gave, without data.

The original network (the teacher) and the smaller one (the student) run side by side over a probe made up from the network
itself (probe.py). In the order of the forward pass every layer that lost inputs or neurons is fitted anew to what the
teacher computes there, by ridge regression on what the *student* sees there:

    W = W₀ + (R Uᵀ / n) (A + Λ)⁻¹,   R = T − W₀ U,   A = U Uᵀ / n,   Λ = λ diag(A) + λ/10 · mean(diag(A)) I

with U [F, n] the student's centred input patches, T [M, n] the teacher's centred output and W₀ the weights after plain
pruning and the folding of exact multiples. The intercept goes into the next BatchNorm or the bias. Kept neurons, widths
and topology are those of pruning and merging. The walk is over the traced graph: no architecture is named here.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from blocks import Constant, Silence
from decompose import Decomposition, Neurons, effective, merge, merge_derived, only_twins, prune, read, rebuild
from errors import said
from settings import RIDGE
from streams import Stream, apart, cut_streams, kept_channels
from trace import CONVS, RELU, Unit
from walk import POSITIONS, Walk, as_weight, centre, channel, covariance, matrix, penalty, precision, rows, steps

ROUNDING = 1e-6  # of a neuron's largest output: what is left over below it is not fitted


@dataclass(frozen=True)
class Options:
    """What restoration does: one set for all networks and ratios. The switches are there to be ablated."""

    ridge: float = RIDGE  # λ
    patches: bool = True  # regress on the whole receptive patch; else only mix channels
    probe_statistics: bool = True  # BatchNorms normalise the probe with its own statistics; else with the running ones
    closed_loop: bool = True  # regress on what the student sees; else on the teacher's kept activations
    repair: bool = True  # a consumer that feeds a stream makes up for the error that the stream carries already
    refit: bool = True  # fit the pruned layers too, not only their consumers
    relu_steps: int = 2  # further fits of a pruned layer that leave out what the ReLU cuts off
    positions: int = POSITIONS  # output positions that a fit looks at, for every feature; others are left out at random


def restore(
    model: nn.Module,
    units: Sequence[Unit | Stream],
    keep: Sequence[Tensor],
    probe: Tensor,
    options: Options = Options(),
) -> nn.Module:
    """A new, smaller network whose units and streams keep the neurons `keep` ([P] each), fitted over `probe` [B, …].

    `model` is left as it is. Raises NeuronMergingError where the network cannot be run on the probe.
    """
    cannot = f"{type(model).__name__} cannot be restored on inputs of shape {list(probe.shape)}"
    with said(cannot):
        work = precision(model, probe)
    teacher = copy.deepcopy(model).to(work).eval().requires_grad_(False)
    (alone, kept), coupled = apart(units, keep)
    student = rebuild(teacher, alone, [_start(teacher, *pair) for pair in zip(alone, kept)])
    cut_streams(teacher, student, coupled, t=0.999, strict=False)
    with said(cannot), torch.no_grad():
        _Lockstep(teacher, student, list(zip(alone, kept)), coupled, options).run(probe.to(work))
    for before, after in zip(model.modules(), student.modules(), strict=True):
        after.training = before.training
        if hasattr(before, "inplace"):
            after.inplace = before.inplace
        for name, tensor in (*after.named_parameters(recurse=False), *after.named_buffers(recurse=False)):
            known = getattr(before, name, None)
            known = before.weight if known is None else known  # a new bias, or the constant of a block that is left out
            tensor.data = tensor.data.to(known.dtype)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(known.requires_grad)
    return student


def _start(model: nn.Module, unit: Unit, keep: Tensor) -> Decomposition:
    """Where the regression starts from: pruning, with (nearly) exact multiples of kept neurons folded into them.

    Where a scale does not pass the activation, only (nearly) exact twins are.
    """
    neurons = read(model, unit)
    if not len(keep):
        return prune(neurons, keep, t=1.0, lam=1.0)
    if unit.activation is None:
        lam = 1 - 1e-6  # the cosine decides; of filters that are equally parallel, how well the constant fits
        return replace(merge_derived(neurons, keep, t=0.999, lam=lam), shift=None)
    return Decomposition(keep, only_twins(merge(Neurons(effective(neurons), None, False), keep, t=0.999, lam=1.0).Z))


class Ridge:
    """Ridge regression on the rows of U [n, F], in float64 but for the products over n; any number of targets.

    Takes the mean [F] off U itself: of neurons that hardly vary, the products would lose what they have to tell.
    """

    def __init__(self, U: Tensor, ridge: float) -> None:
        n, features = U.shape
        self.mean, self.U = centre(U), U
        self.dual = n < features
        if self.dual:  # (A + Λ)⁻¹ Uᵀ = Λ⁻¹ Uᵀ (U Λ⁻¹ Uᵀ / n + I)⁻¹, with n unknowns instead of F
            self.U = U.double()
            self.penalty = penalty(self.U.pow(2).mean(0), ridge)
            scaled = self.U / (n * self.penalty).sqrt()
            kernel = scaled @ scaled.T + torch.eye(n, dtype=torch.float64, device=U.device)
        else:
            kernel = covariance(U)
            kernel.diagonal().add_(penalty(kernel.diagonal(), ridge))
        self.factor = torch.linalg.cholesky(kernel)

    def __call__(self, R: Tensor) -> Tensor:
        """The coefficients [M, F] for the centred targets R [n, M]: to be added to the weights that left them over."""
        if self.dual:
            return (self.U.T @ torch.cholesky_solve(R.double(), self.factor) / (len(R) * self.penalty[:, None])).T
        return torch.cholesky_solve((self.U.T @ R).double() / len(R), self.factor).T


class _Lockstep:
    """One pass of teacher and student over the traced graph, node by node, fitting the student's layers on the way."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        alone: Sequence[tuple[Unit, Tensor]],
        coupled: Sequence[tuple[Stream, Tensor]],
        options: Options,
    ) -> None:
        self.options = options
        self.keep = {name: kept for unit, kept in alone for name in (unit.layer, unit.bn) if name}
        self.keep |= kept_channels(teacher, coupled)
        self.teacher = Walk(teacher, options.probe_statistics)
        self.student = self.teacher.beside(student, self.keep)
        self.norm = {unit.next: unit.next_bn for unit, _ in alone} | {unit.layer: unit.bn for unit, _ in alone}
        self.norm |= {name: bn for stream, _ in coupled for name, bn in stream.norms.items()}
        self.producer = {unit.next: unit.layer for unit, _ in alone}
        self.consumers = {*self.producer, *(reader.module for stream, _ in coupled for reader in stream.readers)}
        self.t: dict[fx.Node, Any] = {}
        self.s: dict[fx.Node, Any] = {}
        self.fitted: list[str] = []

    def run(self, probe: Tensor) -> None:
        """Fit every layer; afterwards the student is ready for use."""
        graph = self.teacher.graph
        summands = {}  # by consumer what its output is added to
        for node in graph.nodes:
            consumes = node.op == "call_module" and node.target in self.consumers
            found = consumes and self.teacher.addition(node, self.norm[node.target])
            summands[node] = found[0] if found else None
        order = _order(graph, summands)
        for node in steps(order, self.t, self.s, sources=lambda node: _sources(node, summands)):
            if node.op == "output":
                continue
            self.t[node] = self.teacher.run(node, self.t, probe)
            if node.op == "call_module" and node.target in self.norm:
                self._fit(node, summands.get(node))
            same = all(self.s[source] is self.t[source] for source in node.all_input_nodes)
            touched = node.op == "call_module" and (node.target in self.keep or node.target in self.norm)
            unchanged = same and not touched
            self.s[node] = self.t[node] if unchanged else self.student.run(node, self.s)
        self._settle()

    # ------------------------------------------------------------ the fit of one layer

    def _fit(self, node: fx.Node, summand: fx.Node | None) -> None:
        """Fit the student's layer at `node`, whose output may be added to a summand, to the teacher's output there."""
        (source,), name = node.all_input_nodes, node.target
        x_t, x_s = self.t[source], self.s[source]
        consumer = name in self.consumers
        bn = self.norm[name]
        if bn is not None:
            self.teacher.measure(bn, self.t[node])
        if x_s is x_t or not (consumer or self.options.refit):
            return
        layer = self.student.modules[name]
        kept = self.keep.get(name)
        whole = self.teacher.modules[name]
        target = self.t[node] if kept is None else _rows(self.t[node], kept, whole)
        if summand is not None and self.options.repair:
            target = target + _shaped(self._error(summand, bn, kept, whole), target)
        if isinstance(layer, Constant):
            target = target if bn is None else self.teacher.normalise(bn, target)
            each = target.movedim(channel(whole, target), -1).flatten(0, -2)  # [n, M]
            layer.value = nn.Parameter(each.mean(0), requires_grad=False)
        if isinstance(layer, Constant | Silence):  # a block that is left out
            return
        if name in self.producer and not self.options.closed_loop:
            x_s = _channels(x_t, self.keep[self.producer[name]], layer)
        U, T = rows(layer, x_s, target, self.options.positions)
        if name in self.producer and not self.options.patches:
            W = self._mixed(name, x_t, x_s)[slice(None) if kept is None else kept]
            c = (T - U @ W.T).mean(0)
        else:
            solve, W0 = Ridge(U, self.options.ridge), matrix(layer)
            before = U @ W0.T

            def fit(aim: Tensor) -> tuple[Tensor, Tensor]:
                mean = aim.mean(0)
                R = aim - mean - before
                rounding = R.abs().amax(0) <= ROUNDING * aim.abs().amax(0)
                return W0 + solve(R.masked_fill(rounding, 0)).to(W0), mean  # [M, F], [M]

            W, mean = fit(T)
            if kept is not None and self._rectified(node, bn):
                for _ in range(self.options.relu_steps):
                    W, mean = fit(self._relu_aware(U @ W.T + mean, T, bn, kept))
            c = mean - W @ solve.mean
        layer.weight = nn.Parameter(as_weight(W, layer).contiguous(), requires_grad=False)
        layer.bias = nn.Parameter(c, requires_grad=False)
        self.fitted.append(name)

    def _relu_aware(self, y: Tensor, T: Tensor, bn: str | None, kept: Tensor) -> Tensor:
        """A target that a ReLU cannot tell from T [n, M], as near to the student's prediction y [n, M] as can be."""
        if bn is None:
            return torch.where(T > 0, T, y.clamp(max=0))
        slope = self.teacher.slope(bn)[kept]
        z, z_t = (self.student.normalise(bn, v) for v in (y, T))
        aim = y + (torch.where(z_t > 0, z_t, z.clamp(max=0)) - z) / slope
        return torch.where(slope.abs() > 1e-3, aim, T)

    def _rectified(self, node: fx.Node, bn: str | None) -> bool:
        """Whether a ReLU is the first thing behind the layer (and its BatchNorm)."""
        readers = list(node.users)
        if bn is not None and len(readers) == 1 and readers[0].target == bn:
            readers = list(readers[0].users)
        if len(readers) != 1:
            return False
        return self.teacher.kind(readers[0]) in RELU

    def _error(self, summand: fx.Node, bn: str | None, kept: Tensor | None, layer: nn.Module) -> Tensor:
        """The summand's error, teacher − student, as the output of the layer that is added to it has to make up for it."""
        whole = self.t[summand] if kept is None else _rows(self.t[summand], kept, layer)
        error = whole - self.s[summand]
        if bn is None:
            return error
        slope = self.teacher.slope(bn) if kept is None else self.teacher.slope(bn)[kept]
        inverse = torch.where(slope.abs() < 1e-2, 0, 1 / slope)
        return error * inverse.view(-1, *[1] * (error.ndim - 2))

    def _mixed(self, name: str, x_t: Tensor, x_s: Tensor) -> Tensor:
        """The consumer's weights when every input neuron is rebuilt from the kept ones at the same place: [M, F]."""
        layer, whole = self.student.modules[name], self.teacher.modules[name]
        if isinstance(layer, CONVS):
            U, T = (x.movedim(1, -1).flatten(0, -2) for x in (x_s, x_t))
        else:
            inputs = x_s.shape[-1] // len(self.keep[self.producer[name]])
            U, T = (x.unflatten(-1, (-1, inputs)).transpose(-1, -2).flatten(0, -2) for x in (x_s, x_t))
        mixing = Ridge(U.clone(), self.options.ridge)(T - T.mean(0)).to(U)  # [N, P]
        M, N = whole.weight.shape[0], len(mixing)
        W = torch.einsum("mnk,np->mpk", whole.weight.reshape(M, N, -1), mixing)
        return W.transpose(1, 2).flatten(1) if isinstance(layer, CONVS) else W.flatten(1)

    def _settle(self) -> None:
        """Put intercepts where a network without restoration has room for them: into the next BatchNorm's running mean."""
        for name in self.fitted:
            layer, bn = self.student.modules[name], self.norm[name]
            if bn is not None and self.teacher.modules[name].bias is None:
                self.student.modules[bn].running_mean -= layer.bias
                layer.bias = None


def _rows(y: Tensor, kept: Tensor, layer: nn.Module) -> Tensor:
    """The outputs of a layer that its kept neurons give."""
    return y.index_select(channel(layer, y), kept)


def _shaped(error: Tensor, target: Tensor) -> Tensor:
    """An error averaged over the dimensions along which a layer's output, `target`, is broadcast when it is added."""
    error = error.flatten(0, error.ndim - target.ndim) if error.ndim > target.ndim else error
    wide = [d for d in range(-error.ndim, 0) if error.shape[d] > target.shape[d] == 1]
    return error.mean(wide, keepdim=True) if wide else error


def _channels(x: Tensor, keep: Tensor, layer: nn.Module) -> Tensor:
    """The kept neurons of an activation x, also behind a flatten."""
    if isinstance(layer, CONVS):
        return x[:, keep]
    inputs = layer.weight.shape[1] // len(keep)
    return x.unflatten(-1, (-1, inputs))[..., keep, :].flatten(-2)


def _order(graph: fx.Graph, summands: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """The graph's nodes in an order in which a consumer comes after the summand whose error it repairs, where that can be."""
    order: dict[fx.Node, None] = {}
    stack = list(reversed(graph.nodes))
    while stack:
        node = stack[-1]
        summand = summands.get(node)
        if summand is not None and node not in order and _depends(summand, node, summands):
            summands[node] = None
        waiting = [source for source in _sources(node, summands) if source not in order]
        if waiting:
            stack += waiting
        else:
            order[stack.pop()] = None
    return list(order)


def _sources(node: fx.Node, summands: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """What has to be computed before `node`: what it reads and, of a consumer, the summand that it repairs."""
    return [*node.all_input_nodes, *filter(None, [summands.get(node)])]


def _depends(node: fx.Node, on: fx.Node, summands: dict[fx.Node, fx.Node | None]) -> bool:
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is on:
            return True
        if node not in seen:
            seen.add(node)
            stack += _sources(node, summands)
    return False

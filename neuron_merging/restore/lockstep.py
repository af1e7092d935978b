"""Restoration (ours, not the paper's): all kept neurons together rebuild what the dropped ones gave, without data.

The original network (the teacher) and the smaller one (the student) run side by side on the probe, which is inputs made up from
the network itself (synthetic.py). In the order of the forward pass, every layer that lost inputs or neurons is fitted to the
teacher's output at this place, by ridge regression on what the *student* sees there:

    W = W₀ + (R Uᵀ / n) (A + Λ)⁻¹,   R = T − W₀ U,   A = U Uᵀ / n,   Λ = λ diag(A) + λ/10 · mean(diag(A)) I

with U [F, n] the student's centred input patches, T [M, n] the teacher's centred output and W₀ the weights after plain pruning,
with exact multiples merged. The intercept goes into the next BatchNorm or the bias. After a consumer is fitted, the pruned
layer in front of it is moved so that the consumer's error shrinks (adapt.py). Which neurons are kept, the widths and the
topology are the same as with pruning and merging. The order comes from the traced graph: no architecture is named here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuron_merging.blocks import Constant, Silence
from neuron_merging.config import RIDGE
from neuron_merging.counting import precise
from neuron_merging.coupled import cut_streams, kept_channels
from neuron_merging.decompose import Decomposition, Neurons, effective, merge, merge_derived, only_twins, prune
from neuron_merging.errors import reported_as
from neuron_merging.graph.interpreter import computing_in, precision, steps, walk_through
from neuron_merging.graph.streams import Stream, apart
from neuron_merging.graph.tracing import CONVS, RELU, Unit, ancestors
from neuron_merging.linalg import POSITIONS, Ridge, as_weight, channel, matrix, outputs, places, rows
from neuron_merging.network import read, rebuild
from neuron_merging.restore.adapt import LITTLE, adapt

ROUNDING = 1e-6  # of a neuron's largest output: residuals below it are rounding, and are not fitted


@dataclass(frozen=True)
class Options:
    """The steps of restoration: one setting for all networks and ratios. The switches are for ablations (docs/restore.md)."""

    ridge: float = RIDGE  # λ
    patches: bool = True  # regress on the whole receptive field; else on the channels at one place
    probe_statistics: bool = True  # BatchNorms use the statistics of the probe; else the running ones
    closed_loop: bool = True  # regress on what the student sees; else on the teacher's kept activations
    repair: bool = True  # a layer whose output is added to a residual stream also corrects the stream's error
    refit: bool = True  # fit the pruned layers too, not only their consumers
    relu_steps: int = 2  # further fits of a pruned layer, which ignore errors that the ReLU behind it removes
    adaptations: int = 2  # steps in which a pruned layer is moved to reduce the error of its consumer
    positions: int = POSITIONS  # random output positions that a fit uses, for every feature


def restore(
    model: nn.Module,
    units: Sequence[Unit | Stream],
    keep: Sequence[Tensor],
    probe: Tensor,
    options: Options = Options(),
) -> nn.Module:
    """A new, smaller network, fitted on `probe` [B, …]. keep: the neurons [P] that each unit or stream keeps.

    `model` is unchanged. Raises NeuronMergingError if the network cannot be run on the probe.
    """
    cannot = f"{type(model).__name__} cannot be restored on inputs of shape {list(probe.shape)}"
    with reported_as(cannot):
        work = precision(model, probe)
    teacher = computing_in(model, work)
    (alone, kept), coupled = apart(units, keep)
    student = rebuild(teacher, alone, [_start(teacher, *pair) for pair in zip(alone, kept)])
    cut_streams(teacher, student, coupled, t=0.999, strict=False)
    with reported_as(cannot), torch.no_grad():
        _Lockstep(teacher, student, list(zip(alone, kept)), coupled, precise(probe, work), options).run()
    for before, after in zip(model.modules(), student.modules(), strict=True):
        after.training = before.training
        if hasattr(before, "inplace"):
            after.inplace = before.inplace
        for name, tensor in (*after.named_parameters(recurse=False), *after.named_buffers(recurse=False)):
            known = getattr(before, name, None)
            known = before.weight if known is None else known  # a new bias, or the constant that replaces a block
            tensor.data = tensor.data.to(known.dtype)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(known.requires_grad)
    return student


def _start(model: nn.Module, unit: Unit, keep: Tensor) -> Decomposition:
    """The decomposition that the regression starts from: prunes, and merges (nearly) exact multiples of kept neurons.

    If the activation is one that a positive scale does not pass, only (nearly) exact twins are merged.
    """
    neurons = read(model, unit)
    if not len(keep):
        return prune(neurons, keep, t=1.0, lam=1.0)
    if unit.activation is None:
        lam = 1 - 1e-6  # the cosine decides; among equal cosines, how well the constant fits
        return replace(merge_derived(neurons, keep, t=0.999, lam=lam), shift=None)
    return Decomposition(keep, only_twins(merge(Neurons(effective(neurons), None, False), keep, t=0.999, lam=1.0).Z))


class _Lockstep:
    """Runs teacher and student through the traced graph together, node by node, and fits the student's layers on the way."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        alone: Sequence[tuple[Unit, Tensor]],
        coupled: Sequence[tuple[Stream, Tensor]],
        probe: Tensor,
        options: Options,
    ) -> None:
        self.options, self.probe = options, probe
        self.keep = {name: kept for unit, kept in alone for name in (unit.layer, unit.bn) if name}
        self.keep |= kept_channels(teacher, coupled)
        self.teacher = walk_through(teacher, probe, options.probe_statistics)
        self.student = self.teacher.beside(student, self.keep)
        self.norm = {unit.next: unit.next_bn for unit, _ in alone} | {unit.layer: unit.bn for unit, _ in alone}
        self.norm |= {name: bn for stream, _ in coupled for name, bn in stream.norms.items()}
        self.producer = {unit.next: unit.layer for unit, _ in alone}
        self.consumers = {*self.producer, *(reader.module for stream, _ in coupled for reader in stream.readers)}
        self.pruned = {unit.layer for unit, kept in alone if len(kept) < len(teacher.get_submodule(unit.layer).weight)}
        self.solvers: dict[str, Ridge] = {}  # by pruned layer: the factored regression on what it sees, without rows
        self.between: dict[fx.Node, list[fx.Node]] = {}  # by consumer: the pruned layer in front, and the nodes between
        self.t: dict[fx.Node, Any] = {}  # the teacher's value at each node
        self.s: dict[fx.Node, Any] = {}  # the student's value at each node
        self.fitted: set[str] = set()

    def run(self) -> None:
        """Fit every layer. Afterwards the student is ready for use."""
        graph = self.teacher.graph
        summands = {}  # by consumer: the node that its output is added to
        for node in graph.nodes:
            consumes = node.op == "call_module" and node.target in self.consumers
            addition = consumes and self.teacher.addition(node, self.norm[node.target])
            summands[node] = addition[0] if addition else None
            if consumes and self.producer.get(node.target) in self.pruned:
                path = _between(self.producer[node.target], node)
                if self._learned(path[0]):  # a layer that sees the made-up inputs themselves is not moved
                    self.between[node] = path
        order = _order(graph, summands)
        for node in steps(order, self.t, self.s, sources=lambda node: self._read(node, summands)):
            if node.op == "output":
                continue
            self.t[node] = self.teacher.run(node, self.t, self.probe)
            if node.op == "call_module" and node.target in self.norm:
                self._fit(node, summands.get(node))
            same = all(self.s[source] is self.t[source] for source in node.all_input_nodes)
            touched = node.op == "call_module" and (node.target in self.keep or node.target in self.norm)
            unchanged = same and not touched
            self.s[node] = self.t[node] if unchanged else self.student.run(node, self.s)
        self._settle()

    # ------------------------------------------------------------ the fit of one layer

    def _fit(self, node: fx.Node, summand: fx.Node | None) -> None:
        """Fit the student's layer at `node` to the teacher's output there. summand: the node its output is added to, if any."""
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
        target = self.t[node] if kept is None else _of_kept(self.t[node], kept, whole)
        if summand is not None and self.options.repair and self.s[summand] is not self.t[summand]:
            target = target + _shaped(self._error(summand, bn, kept, whole), target)
        if isinstance(layer, Constant):
            target = target if bn is None else self.teacher.normalise(bn, target)
            by_position = target.movedim(channel(whole, target), -1).flatten(0, -2)  # [n, M]
            layer.value = nn.Parameter(by_position.mean(0), requires_grad=False)
        if isinstance(layer, Constant | Silence):  # a block that is left out
            return
        if name in self.producer and not self.options.closed_loop:
            x_s = _channels(x_t, self.keep[self.producer[name]], layer)
        self.fitted.add(name)
        if name in self.producer and not self.options.patches:
            U, T = rows(layer, x_s, target, self.options.positions)
            W = self._mixed(name, x_t, x_s)[slice(None) if kept is None else kept]
            _put(layer, W, (T - U @ W.T).mean(0))
            return
        rectified = kept is not None and self._rectified(node, bn)
        self._regress(name, layer, x_s, target, partial(self._relu_aware, bn=bn, kept=kept) if rectified else None)
        free = node in self.between and self.options.refit and self.options.closed_loop
        if free and self.options.adaptations:
            self._adapt(node, target)

    def _regress(self, name: str, layer: nn.Module, x: Tensor, target: Tensor, aware: Callable | None = None) -> None:
        """Fit a layer that sees x to the target.

        aware: a function from a prediction and the target [n, M] to the target of the next fit; None for a single fit.
        """
        U, T = rows(layer, x, target, self.options.positions)
        solve, W0 = Ridge(U, self.options.ridge), matrix(layer)
        before = U @ W0.T

        def fit(aim: Tensor) -> tuple[Tensor, Tensor]:
            mean = aim.mean(0)
            R = aim - mean - before
            rounding = R.abs().amax(0) <= ROUNDING * aim.abs().amax(0)
            return W0 + solve(R.masked_fill(rounding, 0)).to(W0), mean  # [M, F], [M]

        W, mean = fit(T)
        for _ in range(self.options.relu_steps if aware else 0):
            W, mean = fit(aware(U @ W.T + mean, T))
        _put(layer, W, mean - W @ solve.mean)
        if name in self.pruned:
            self.solvers[name] = solve.forget()

    def _adapt(self, node: fx.Node, target: Tensor) -> None:
        """Move the pruned layer in front of the consumer at `node`, then fit the consumer again on its new inputs.

        That fit starts from the consumer's present weights and uses the plain target, without `_relu_aware`.
        """
        first, *between = self.between[node]
        (seen,), (source,) = first.all_input_nodes, node.all_input_nodes
        modules, bn, x = self.student.modules, self.norm[node.target], self.s[seen]
        layer, consumer = modules[first.target], modules[node.target]
        solve = self.solvers.pop(first.target, None)
        if solve is None:  # it sees what the teacher sees, so it was not fitted
            solve = Ridge(rows(layer, x, layer(x), self.options.positions)[0], self.options.ridge)
        if solve.dual:  # with fewer positions than features, it would overfit the probe
            return
        slope = None if bn is None else self.teacher.slope(bn)[self.keep.get(node.target, slice(None))]
        bare = layer.bias is None
        if bare:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
        per_sample = layer(x[:1]).numel() // len(layer.weight)  # positions of a sample
        samples = -(-self.options.positions * layer.weight[0].numel() // per_sample)  # enough positions for a fit
        inside = {first, *between}
        if any(read not in inside for inner in between for read in inner.all_input_nodes):
            samples = len(x)  # a node in between reads something else, such as the size of the batch
        few, T = x[:samples], target[:samples]

        def through(u: Tensor) -> Tensor:
            values = {first: u}
            for inner in between:
                values[inner] = self.student.run(inner, self.s | values)
            return values.get(source, u)

        u = layer(few)
        chosen = places(layer, u, self.options.positions)
        U = rows(layer, few, u, self.options.positions)[0].sub_(solve.mean)

        def regress(aim: Tensor) -> dict[str, Tensor]:
            aim = outputs(layer, aim, chosen)
            mean = aim.mean(0)
            W = solve(aim - mean, U).to(aim)
            return {"weight": as_weight(W, layer), "bias": mean - W @ solve.mean}

        for step in range(self.options.adaptations):
            if not adapt(layer, consumer, through, few, T, slope, regress, 0.0 if step else LITTLE):
                break
            self.fitted.add(first.target)
            self.s[source] = through(layer(x))
            self._regress(node.target, consumer, self.s[source], target)
        if bare and first.target not in self.fitted:
            layer.bias = None

    def _learned(self, node: fx.Node) -> bool:
        """Whether any module with parameters comes before `node`."""
        modules = (self.teacher.modules[source.target] for source in ancestors(node) if source.op == "call_module")
        return any(next(module.parameters(), None) is not None for module in modules)

    def _read(self, node: fx.Node, summands: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
        """The nodes whose values `run` needs when it comes to `node`."""
        again = self.between.get(node, [])
        return [*_sources(node, summands), *(source for inner in again for source in inner.all_input_nodes)]

    def _relu_aware(self, y: Tensor, T: Tensor, bn: str | None, kept: Tensor) -> Tensor:
        """Of all targets that the ReLU maps to the same values as T [n, M], the one nearest to the prediction y [n, M]."""
        if bn is None:
            return torch.where(T > 0, T, y.clamp(max=0))
        slope = self.teacher.slope(bn)[kept]
        z, z_t = (self.student.normalise(bn, v) for v in (y, T))
        aim = y + (torch.where(z_t > 0, z_t, z.clamp(max=0)) - z) / slope
        return torch.where(slope.abs() > 1e-3, aim, T)

    def _rectified(self, node: fx.Node, bn: str | None) -> bool:
        """Whether a ReLU comes directly after the layer (and its BatchNorm)."""
        readers = list(node.users)
        if bn is not None and len(readers) == 1 and readers[0].target == bn:
            readers = list(readers[0].users)
        if len(readers) != 1:
            return False
        return self.teacher.kind(readers[0]) in RELU

    def _error(self, summand: fx.Node, bn: str | None, kept: Tensor | None, layer: nn.Module) -> Tensor:
        """Teacher − student at the summand, divided by the slope of the BatchNorm `bn` behind `layer`, which is added to it."""
        whole = self.t[summand] if kept is None else _of_kept(self.t[summand], kept, layer)
        error = whole - self.s[summand]
        if bn is None:
            return error
        slope = self.teacher.slope(bn) if kept is None else self.teacher.slope(bn)[kept]
        inverse = torch.where(slope.abs() < 1e-2, 0, 1 / slope)
        return error * inverse.view(-1, *[1] * (error.ndim - 2))

    def _mixed(self, name: str, x_t: Tensor, x_s: Tensor) -> Tensor:
        """The consumer's weights [M, F] if every dropped neuron is replaced by a mixture of the kept ones at its position."""
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
        """Move the intercepts of layers that had no bias into the running mean of the BatchNorm behind them."""
        for name in self.fitted:
            layer, bn = self.student.modules[name], self.norm[name]
            if bn is not None and self.teacher.modules[name].bias is None:
                self.student.modules[bn].running_mean -= layer.bias
                layer.bias = None


def _put(layer: nn.Module, W: Tensor, c: Tensor) -> None:
    """Give a layer the weights [M, F] and the bias [M]."""
    layer.weight = nn.Parameter(as_weight(W, layer).contiguous(), requires_grad=False)
    layer.bias = nn.Parameter(c, requires_grad=False)


def _of_kept(y: Tensor, kept: Tensor, layer: nn.Module) -> Tensor:
    """The outputs y of a layer, only of its kept neurons."""
    return y.index_select(channel(layer, y), kept)


def _shaped(error: Tensor, target: Tensor) -> Tensor:
    """The error, averaged over the dimensions along which `target`, the output of a layer, is broadcast in the addition."""
    error = error.flatten(0, error.ndim - target.ndim) if error.ndim > target.ndim else error
    broadcast = [d for d in range(-error.ndim, 0) if error.shape[d] > target.shape[d] == 1]
    return error.mean(broadcast, keepdim=True) if broadcast else error


def _channels(x: Tensor, keep: Tensor, layer: nn.Module) -> Tensor:
    """The activation x, only of the kept neurons; also if x comes from a flatten."""
    if isinstance(layer, CONVS):
        return x[:, keep]
    inputs = layer.weight.shape[1] // len(keep)
    return x.unflatten(-1, (-1, inputs))[..., keep, :].flatten(-2)


def _order(graph: fx.Graph, summands: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """The graph's nodes, ordered so that a consumer comes after the summand whose error it repairs.

    If the summand itself depends on the consumer, its entry in `summands` is set to None: then nothing is repaired.
    """
    order: dict[fx.Node, None] = {}
    stack = list(reversed(graph.nodes))
    while stack:
        node = stack[-1]
        summand = summands.get(node)
        if (
            summand is not None
            and node not in order
            and node in ancestors(summand, partial(_sources, summands=summands))
        ):
            summands[node] = None
        waiting = [source for source in _sources(node, summands) if source not in order]
        if waiting:
            stack += waiting
        else:
            order[stack.pop()] = None
    return list(order)


def _between(first: str, node: fx.Node) -> list[fx.Node]:
    """The call of the layer `first`, then, in their order, the nodes that its output passes on the way to `node`."""
    before, path = ancestors(node), {}
    for inner in node.graph.nodes:
        if inner in before and (inner.target == first or any(source in path for source in inner.all_input_nodes)):
            path[inner] = None
    return list(path)


def _sources(node: fx.Node, summands: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """The nodes to compute before `node`: those that it reads and, if it is a consumer, the summand that it repairs."""
    return [*node.all_input_nodes, *filter(None, [summands.get(node)])]

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
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from decompose import Decomposition, merge_derived, prune, read, rebuild
from errors import NeuronMergingError
from settings import RIDGE
from trace import CONVS, DROPOUT, NORMS, RELU, Unit

ENTRIES = 2**27  # numbers in a matrix of patches, at most: 512 MB
ADDITIONS = {operator.add, torch.add, "add"}


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
    positions: int = 128  # output positions that a fit looks at, for every feature; others are left out at random


def restore(
    model: nn.Module,
    units: Sequence[Unit],
    keep: Sequence[Tensor],
    probe: Tensor,
    options: Options = Options(),
) -> nn.Module:
    """A new, smaller network whose units keep the neurons `keep` ([P] each), fitted over `probe` [B, …].

    `model` is left as it is. Raises NeuronMergingError where the network cannot be run on the probe.
    """
    dtype = next(model.parameters()).dtype
    work = torch.promote_types(dtype, torch.float32)
    teacher = copy.deepcopy(model).to(work).eval().requires_grad_(False)
    student = rebuild(teacher, units, [_start(teacher, unit, kept) for unit, kept in zip(units, keep)])
    try:
        with torch.no_grad():
            _Lockstep(teacher, student, units, keep, options).run(probe.to(work))
    except RuntimeError as error:
        raise NeuronMergingError(
            f"{type(model).__name__} cannot be restored on inputs of shape {list(probe.shape)}: {str(error).splitlines()[0]}"
        ) from error
    for before, after in zip(model.modules(), student.modules(), strict=True):
        after.training = before.training
        if hasattr(before, "inplace"):
            after.inplace = before.inplace
        for name, parameter in after.named_parameters(recurse=False):
            known = getattr(before, name)
            parameter.requires_grad_(known is None or known.requires_grad)
    return student.to(dtype)


def _start(model: nn.Module, unit: Unit, keep: Tensor) -> Decomposition:
    """Where the regression starts from: pruning, with (nearly) exact multiples of kept neurons folded into them."""
    fold = prune if unit.activation else merge_derived
    return replace(fold(read(model, unit), keep, t=0.999, lam=1.0), shift=None)


class Ridge:
    """Ridge regression on the rows of U [n, F], in float64 but for the products over n; any number of targets."""

    def __init__(self, U: Tensor, ridge: float) -> None:
        n, features = U.shape
        self.U, self.mean = U, U.mean(0)  # [n, F], [F]
        self.dual = n < features
        if self.dual:  # (A + Λ)⁻¹ Uᵀ = Λ⁻¹ Uᵀ (U Λ⁻¹ Uᵀ / n + I)⁻¹ for a centred U, with n unknowns instead of F
            self.U = (U - self.mean).double()
            self.penalty = _penalty(self.U.pow(2).mean(0), ridge)
            scaled = self.U / (n * self.penalty).sqrt()
            matrix = scaled @ scaled.T + torch.eye(n, dtype=torch.float64, device=U.device)
        else:
            matrix = _gram(U).double() / n
            matrix -= torch.outer(self.mean, self.mean)
            matrix.diagonal().add_(_penalty(matrix.diagonal(), ridge))
        self.factor = torch.linalg.cholesky(matrix)

    def __call__(self, R: Tensor) -> Tensor:
        """The coefficients [M, F] for the targets R [n, M]: what is to be added to the weights that left them over."""
        R = R - R.mean(0)
        if self.dual:
            return (self.U.T @ torch.cholesky_solve(R.double(), self.factor) / (len(R) * self.penalty[:, None])).T
        return torch.cholesky_solve((self.U.T @ R).double() / len(R), self.factor).T


def _gram(U: Tensor, blocks: int = 8) -> Tensor:
    """Uᵀ U, [F, F], by blocks of rows on and above the diagonal: little more than half of the full product's work."""
    features = U.shape[1]
    A, size = U.new_empty(features, features), max(64, -(-features // blocks))
    for start in range(0, features, size):
        rows = slice(start, start + size)
        block = U[:, rows].T @ U[:, start:]
        A[rows, start:], A[start:, rows] = block, block.T
    return A


def _penalty(energy: Tensor, ridge: float) -> Tensor:
    """The diagonal of Λ for the features' variances `energy` [F]."""
    return ridge * energy + 0.1 * ridge * energy.mean() + 1e-10


class _Lockstep:
    """One pass of teacher and student over the traced graph, node by node, fitting the student's layers on the way."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, units: Sequence[Unit], keep: Sequence[Tensor], options: Options
    ) -> None:
        self.options = options
        self.graph = fx.Tracer().trace(teacher)
        self.teacher, self.student = dict(teacher.named_modules()), dict(student.named_modules())
        _out_of_place(self.graph, (self.teacher, self.student))
        self.keep = {unit.layer: kept for unit, kept in zip(units, keep)}
        self.keep |= {unit.bn: kept for unit, kept in zip(units, keep) if unit.bn}
        self.norm = {unit.next: unit.next_bn for unit in units} | {unit.layer: unit.bn for unit in units}
        self.producer = {unit.next: unit.layer for unit in units}
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self.t: dict[fx.Node, Any] = {}
        self.s: dict[fx.Node, Any] = {}
        self.fitted: list[str] = []

    def run(self, probe: Tensor) -> None:
        """Fit every layer; afterwards the student is ready for use."""
        streams = {node: self._stream(node) for node in self.graph.nodes if node.target in self.producer}
        order = _order(self.graph, streams)
        last = {source: node for node in order for source in _sources(node, streams)}
        expiring: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            expiring.setdefault(node, []).append(source)
        for node in order:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                self.t[node] = self.s[node] = self._input(node, probe)
                continue
            self.t[node] = self._run(node, self.teacher, self.t)
            if node.op == "call_module" and node.target in self.norm:
                self._fit(node, streams.get(node))
            same = all(self.s[source] is self.t[source] for source in node.all_input_nodes)
            unchanged = same and node.target not in self.keep and node.target not in self.norm
            self.s[node] = self.t[node] if unchanged else self._run(node, self.student, self.s)
            for source in expiring.get(node, ()):
                del self.t[source], self.s[source]
        self._settle()

    def _input(self, node: fx.Node, probe: Tensor) -> Any:
        """The probe for the network's first input, their defaults for others."""
        if node is next(iter(self.graph.nodes)):
            return probe
        if node.args:
            return node.args[0]
        raise NeuronMergingError(f"the network takes a second input, {node.target}: restoration can make up one only")

    def _run(self, node: fx.Node, modules: dict[str, nn.Module], values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            parent, _, name = node.target.rpartition(".")
            return getattr(modules[parent], name)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        module = modules[node.target]
        if isinstance(module, NORMS) and module.running_mean is not None:
            if node.target not in self.statistics:
                self._measure(node.target, args[0])
            return self._normalise(node.target, args[0], module)
        return module(*args, **kwargs)

    # ------------------------------------------------------------ BatchNorm on the probe

    def _measure(self, name: str, y: Tensor) -> None:
        """The statistics [N] with which teacher and student normalise the probe: those of the teacher's y [B, N, …]."""
        bn = self.teacher[name]
        if not self.options.probe_statistics:
            self.statistics[name] = bn.running_mean, bn.running_var
            return
        axes = [d for d in range(y.ndim) if d != 1]
        var, mean = torch.var_mean(y, axes, correction=0)
        dead = bn.running_var < 1e-8
        self.statistics[name] = bn.running_mean.where(dead, mean), bn.running_var.where(dead, var)

    def _normalise(self, name: str, y: Tensor, module: nn.Module) -> Tensor:
        mean, var = self.statistics[name]
        if module.num_features != len(mean):
            mean, var = mean[self.keep[name]], var[self.keep[name]]
        return F.batch_norm(y, mean, var, module.weight, module.bias, False, 0.0, module.eps)

    def _slope(self, name: str) -> Tensor:
        """γ / √(v + ε) of the teacher's BatchNorm on the probe, [N]."""
        bn = self.teacher[name]
        slope = (self.statistics[name][1] + bn.eps).rsqrt()
        return slope if bn.weight is None else slope * bn.weight

    # ------------------------------------------------------------ the fit of one layer

    def _fit(self, node: fx.Node, stream: fx.Node | None) -> None:
        """Fit the student's layer at `node` to the teacher's output there."""
        (source,), name = node.all_input_nodes, node.target
        x_t, x_s = self.t[source], self.s[source]
        consumer = name in self.producer
        bn = self.norm[name]
        if bn is not None:
            self._measure(bn, self.t[node])
        if x_s is x_t or not (consumer or self.options.refit):
            return
        layer = self.student[name]
        kept = self.keep.get(name, slice(None))
        target = self.t[node]
        if stream is not None and self.options.repair:
            target = target + self._error(stream, bn, target.ndim)
        if consumer and not self.options.closed_loop:
            x_s = _channels(x_t, self.keep[self.producer[name]], layer)
        U, T = self._rows(layer, x_s, target)
        T = T[:, kept]  # [n, M]
        if consumer and not self.options.patches:
            W = self._mixed(name, x_t, x_s)[kept]
            c = (T - U @ W.T).mean(0)
        else:
            solve, W0 = Ridge(U, self.options.ridge), _matrix(layer)
            before = U @ W0.T

            def fit(aim: Tensor) -> tuple[Tensor, Tensor]:
                W = W0 + solve(aim - before).to(W0)  # [M, F]
                return W, aim.mean(0) - W @ solve.mean

            W, c = fit(T)
            if name in self.keep and self._rectified(node, bn):
                for _ in range(self.options.relu_steps):
                    W, c = fit(self._relu_aware(U @ W.T + c, T, bn, kept))
        _set_matrix(layer, W)
        layer.bias = nn.Parameter(c, requires_grad=False)
        self.fitted.append(name)

    def _relu_aware(self, y: Tensor, T: Tensor, bn: str | None, kept: Tensor) -> Tensor:
        """A target that a ReLU cannot tell from T [n, M], as near to the student's prediction y [n, M] as can be."""
        if bn is None:
            return torch.where(T > 0, T, y.clamp(max=0))
        slope = self._slope(bn)[kept]
        z, z_t = (self._normalise(bn, v, self.student[bn]) for v in (y, T))
        aim = y + (torch.where(z_t > 0, z_t, z.clamp(max=0)) - z) / slope
        return torch.where(slope.abs() > 1e-3, aim, T)

    def _rectified(self, node: fx.Node, bn: str | None) -> bool:
        """Whether a ReLU is the first thing behind the layer (and its BatchNorm)."""
        readers = list(node.users)
        if bn is not None and len(readers) == 1 and readers[0].target == bn:
            readers = list(readers[0].users)
        if len(readers) != 1:
            return False
        (reader,) = readers
        kind = type(self.teacher[reader.target]) if reader.op == "call_module" else reader.target
        return kind in RELU

    def _error(self, stream: fx.Node, bn: str | None, ndim: int) -> Tensor:
        """The stream's error, teacher − student, as the consumer's output has to make up for it."""
        error = self.t[stream] - self.s[stream]
        if bn is None:
            return error
        slope = self._slope(bn)
        inverse = torch.where(slope.abs() < 1e-2, 0, 1 / slope)
        return error * inverse.view(-1, *[1] * (ndim - 2))

    def _rows(self, layer: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer sees and what it is to give, [n, F] and [n, M], at as many output positions as a fit looks at."""
        if not isinstance(layer, CONVS):
            return x.flatten(0, -2), target.flatten(0, -2)
        count, features = target.numel() // target.shape[1], layer.weight[0].numel()
        most = min(self.options.positions * features, ENTRIES // features)
        rows = torch.arange(count)
        if count > most:
            rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values
        rows = rows.to(x.device)
        return patches(x, layer, rows), target.movedim(1, -1).flatten(0, -2)[rows]

    def _mixed(self, name: str, x_t: Tensor, x_s: Tensor) -> Tensor:
        """The consumer's weights when every input neuron is rebuilt from the kept ones at the same place: [M, F]."""
        layer, whole = self.student[name], self.teacher[name]
        if isinstance(layer, CONVS):
            U, T = (x.movedim(1, -1).flatten(0, -2) for x in (x_s, x_t))
        else:
            inputs = x_s.shape[-1] // len(self.keep[self.producer[name]])
            U, T = (x.unflatten(-1, (-1, inputs)).transpose(-1, -2).flatten(0, -2) for x in (x_s, x_t))
        mixing = Ridge(U, self.options.ridge)(T).to(U)  # [N, P]
        M, N = whole.weight.shape[0], len(mixing)
        W = torch.einsum("mnk,np->mpk", whole.weight.reshape(M, N, -1), mixing)
        return W.transpose(1, 2).flatten(1) if isinstance(layer, CONVS) else W.flatten(1)

    def _stream(self, node: fx.Node) -> fx.Node | None:
        """The other operand of the sum that the output of the consumer at `node` goes into, if it goes into one."""
        bn = self.norm[node.target]
        while len(node.users) == 1:
            before, (node,) = node, node.users
            module = self.teacher[node.target] if node.op == "call_module" else None
            if node.target == bn or type(module) in DROPOUT:
                continue
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            if node.target in ADDITIONS and len(node.args) == len(operands) == 2 and not node.kwargs:
                return operands[0] if operands[1] is before else operands[1]
            break
        return None

    def _settle(self) -> None:
        """Put intercepts where a network without restoration has room for them: into the next BatchNorm's running mean."""
        for name in self.fitted:
            layer, bn = self.student[name], self.norm[name]
            if bn is not None and self.teacher[name].bias is None:
                self.student[bn].running_mean -= layer.bias
                layer.bias = None


def patches(x: Tensor, conv: nn.Module, rows: Tensor) -> Tensor:
    """What a convolution sees at the output positions `rows` [n] of x [B, C, …]: [n, K·C], tap by tap."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode).movedim(1, -1).contiguous()
    sides = x.shape[1:-1]
    out = [(s - d * (k - 1) - 1) // st + 1 for s, d, k, st in zip(sides, conv.dilation, conv.kernel_size, conv.stride)]
    origin, taps = torch.arange(len(x), device=x.device), torch.zeros(1, dtype=torch.int64, device=x.device)
    for side, count, size, stride, dilation in zip(sides, out, conv.kernel_size, conv.stride, conv.dilation):
        origin = (origin[:, None] * side + stride * torch.arange(count, device=x.device)).flatten()
        taps = (taps[:, None] * side + dilation * torch.arange(size, device=x.device)).flatten()
    index = origin[rows, None] + taps  # [n, K]
    return x.view(-1, x.shape[-1]).index_select(0, index.flatten()).view(len(rows), -1)


def _matrix(layer: nn.Module) -> Tensor:
    """The weights as `patches` orders its columns: [M, K·C]."""
    return layer.weight.flatten(2).transpose(1, 2).flatten(1) if isinstance(layer, CONVS) else layer.weight


def _set_matrix(layer: nn.Module, W: Tensor) -> None:
    shape = layer.weight.shape
    if isinstance(layer, CONVS):
        W = W.view(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)
    layer.weight = nn.Parameter(W.contiguous(), requires_grad=False)


def _channels(x: Tensor, keep: Tensor, layer: nn.Module) -> Tensor:
    """The kept neurons of an activation x, also behind a flatten."""
    if isinstance(layer, CONVS):
        return x[:, keep]
    inputs = layer.weight.shape[1] // len(keep)
    return x.unflatten(-1, (-1, inputs))[..., keep, :].flatten(-2)


def _order(graph: fx.Graph, streams: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """The graph's nodes in an order in which a consumer comes after the stream whose error it repairs, where that can be."""
    order: dict[fx.Node, None] = {}
    stack = list(reversed(graph.nodes))
    while stack:
        node = stack[-1]
        stream = streams.get(node)
        if stream is not None and node not in order and _depends(stream, node, streams):
            streams[node] = None
        waiting = [source for source in _sources(node, streams) if source not in order]
        if waiting:
            stack += waiting
        else:
            order[stack.pop()] = None
    return list(order)


def _sources(node: fx.Node, streams: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """What has to be computed before `node`: what it reads and, of a consumer, the stream that it repairs."""
    return [*node.all_input_nodes, *filter(None, [streams.get(node)])]


def _depends(node: fx.Node, on: fx.Node, streams: dict[fx.Node, fx.Node | None]) -> bool:
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is on:
            return True
        if node not in seen:
            seen.add(node)
            stack += _sources(node, streams)
    return False


IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}


def _out_of_place(graph: fx.Graph, networks: Sequence[dict[str, nn.Module]]) -> None:
    """Rewrite operations that overwrite their input, and let what reads that input later read their output instead."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _overwrites(node, networks):
            continue
        (source, *_) = node.all_input_nodes
        for user in list(source.users):
            if place[user] > place[node]:
                user.replace_input_with(source, node)


def _overwrites(node: fx.Node, networks: Sequence[dict[str, nn.Module]]) -> bool:
    """Whether a node overwrites its input; it no longer does afterwards."""
    if node.op == "call_module":
        inplace = getattr(networks[0][node.target], "inplace", False) is True
        for modules in networks:
            if inplace:
                modules[node.target].inplace = False
        return inplace
    if node.op == "call_method" and node.target.endswith("_") and not node.target.startswith("__"):
        node.target = node.target.removesuffix("_")
        return True
    if node.op != "call_function":
        return False
    if node.target in IN_PLACE:
        node.target = IN_PLACE[node.target]
        return True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (ValueError, TypeError):  # a builtin without a signature
        return False
    if bound.arguments.get("inplace") is True:
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs
        return True
    return False

"""Restoration (ours, not the paper's): all kept neurons together rebuild what the dropped ones gave, without data.

The original graph (the teacher) and the cut one (the student) run side by side, node by node, over inputs that are made up from
the network (synthetic.py), or real. Every layer that lost inputs or neurons is fitted to what the teacher gives there, by ridge
regression on what the *student* sees there:

    W = W₀ + (Rᵀ U / n) (A + Λ)⁻¹,   R = T − U W₀ᵀ,   A = Uᵀ U / n,   Λ = λ diag(A) + λ/10 · mean(diag(A)) I

with U [n, F] the student's centred input patches, T [n, M] the teacher's centred outputs and W₀ the weights after pruning. The
intercept goes into the next BatchNorm or the bias. Where the output is added to a stream that has an error by then, T contains
that error too, and so repairs it. After a consumer is fitted, the pruned layer in front of it is moved so that the consumer's
error shrinks (adapt.py). Which neurons are kept, the widths and the topology are the same as with pruning and merging.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor, fx, nn

from neuron_merging.config import RIDGE
from neuron_merging.errors import reported_as
from neuron_merging.graph.axes import Leaf
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.surgery import Smaller, difference, left, run
from neuron_merging.graph.walk import Batch, Walk, precision
from neuron_merging.linalg import ENTRIES, POSITIONS
from neuron_merging.restore.readers import VIEWS, Reader, find_reader, plain_module
from neuron_merging.restore.adapt import LITTLE, direction
from neuron_merging.restore.regression import Fit, Normal, Solver, fit


@dataclass(frozen=True)
class Options:
    """The steps of restoration: one setting for all networks and ratios. The switches are for ablations (docs/restore.md)."""

    ridge: float = RIDGE  # λ
    probe_statistics: bool = True  # BatchNorms use the statistics of the probe; else the running ones
    repair: bool = True  # a layer whose output is added to a residual stream also corrects the stream's error
    refit: bool = True  # fit the pruned layers too, not only their consumers
    whole: bool = False  # fit layers too that lost nothing, but see other values than before
    aware_steps: int = 2  # further fits of a layer, which ignore errors that the activation behind it removes
    adaptations: int = 2  # steps in which a pruned layer is moved to reduce the error of its consumer
    positions: int = POSITIONS  # random output positions that a fit uses, for every feature
    grid: tuple[float, ...] = (1.0,)  # times λ: what is tried
    held: float = 0.0  # share of the inputs that are held out to choose λ


@torch.no_grad()
def restore(
    survey: Survey,
    keep: Mapping[Space, Tensor],
    small: Smaller,
    batches: Sequence[Batch],
    options: Options = Options(),
    macs: int | None = None,
) -> tuple[Smaller, dict[str, Fit]]:
    """`small`, which `surgery.cut` made by `keep`, with fitted layers; and by weight what was fitted.

    The graph and the model of `small` are changed in place. macs: of all batches, to choose a precision by.
    Raises NeuronMergingError where the network does not run on the batches.
    """
    lockstep = Lockstep(survey, keep, small, batches, options, macs)
    with reported_as(f"{type(survey.network.model).__name__} cannot be restored on these inputs"):
        lockstep.run()
    lockstep.write()
    if small.own_class:
        model = copy.deepcopy(small.model).eval()
        why = difference(run(model, survey.network), run(small.graph, survey.network))
        small = replace(small, model=small.graph, why=why) if why else small
    return small, lockstep.fits


class Lockstep:
    """One pass of both graphs over all batches, which fits the student's layers on the way."""

    def __init__(
        self,
        survey: Survey,
        keep: Mapping[Space, Tensor],
        small: Smaller,
        batches: Sequence[Batch],
        options: Options,
        macs: int | None,
    ) -> None:
        self.survey, self.small, self.options = survey, small, options
        work = precision(survey.network.graph, batches, macs)
        self.teacher = Walk(survey.network.graph, batches, work, options.probe_statistics)
        self.student = Walk(small.graph, batches, work, measures=False)
        self.copies = small.copies
        self.originals = {new: old for old, new in small.copies.items()}
        self.masks: dict[Leaf, Tensor] = {}
        for space, kept in keep.items():
            self.masks[space.leaf] = torch.zeros(space.size, dtype=torch.bool)
            self.masks[space.leaf][kept.cpu()] = True
        self.held = round(len(batches) * options.held)
        self.readers = {r.node: r for n in survey.network.graph.graph.nodes if (r := find_reader(survey, n))}
        self.summands = {node: self._summand(reader) for node, reader in self.readers.items() if options.repair}
        self.smaller = [space for space, kept in keep.items() if len(kept) < space.size]
        self.paths = self._paths() if options.adaptations else {}
        self.solvers: dict[fx.Node, tuple[Solver, Tensor]] = {}  # by pruned layer; and the places of its rows
        self.fits: dict[str, Fit] = {}
        self.changed: set[fx.Node] = set()  # layers of the teacher's graph that are fitted or moved
        self.biases: dict[fx.Node, Tensor] = {}  # by layer of the teacher's graph: the student's bias
        self.same: set[fx.Node] = set()  # nodes of the student whose values are those of the teacher

    def run(self) -> None:
        """Fit every layer."""
        order = _order(self.teacher.nodes, self.summands)
        last = _last_uses(order, self.summands, self.paths, self.teacher.results)
        extra = [new for new in self.student.nodes if new not in self.originals]
        for node in order:
            self.teacher.values[node] = self.teacher.compute(node)
            if node in self.readers:
                self._visit(self.readers[node])
            self._step(node, extra)
            for source in last[node]:
                self.teacher.values.pop(source, None)
                self.student.values.pop(self.copies.get(source), None)

    # ------------------------------------------------------------ the student's values

    def _step(self, node: fx.Node, extra: Iterable[fx.Node] = ()) -> None:
        """Compute the student's value at a node of the teacher's graph."""
        new = self.copies[node]
        for source in new.all_input_nodes:
            if source not in self.originals and source not in self.student.values:
                for inner in extra:  # sizes that were scaled
                    if inner not in self.student.values and all(s in self.student.values for s in inner.all_input_nodes):
                        self.student.values[inner] = self.student.compute(inner)
        if self._unchanged(node, new):
            self.same.add(new)
            self.student.values[new] = self.teacher.values[node]
            return
        if node in self.teacher.statistics:
            self.student.statistics[new] = tuple(self._cut(x, node, 1) for x in self.teacher.statistics[node])
        y = self.student.compute(new)
        if node in self.biases:
            y = [part + self._along(self.biases[node], part, self.readers[node]) for part in y]
        self.student.values[new] = y

    def _unchanged(self, node: fx.Node, new: fx.Node) -> bool:
        """Whether the student computes exactly what the teacher does at a node."""
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            kept = self.student.tensor(new), self.teacher.tensor(node)
            return not isinstance(kept[0], Tensor) or (kept[0].shape == kept[1].shape and torch.equal(*kept))
        if node in self.biases or any(source not in self.same for source in new.all_input_nodes):
            return False
        return _plain(node.args) == _plain(new.args) and _plain(node.kwargs) == _plain(new.kwargs)

    def _along(self, bias: Tensor, y: Tensor, reader: Reader) -> Tensor:
        shape = [1] * y.ndim
        shape[reader.channel(y)] = -1
        return bias.to(y).view(shape)

    # ------------------------------------------------------------ the fit of one layer

    def _visit(self, reader: Reader) -> None:
        """Fit the student's copy of a layer, where that is due."""
        norm = reader.norm
        if norm is not None and self.teacher.measures and norm not in self.teacher.statistics:
            self.teacher.measure(norm, self.teacher.values[reader.node])
        weight, wide = (self.student.tensor(self.copies[reader.weight_node]), self.teacher.tensor(reader.weight_node))
        consumer = weight.shape[reader.inputs] != wide.shape[reader.inputs]
        pruned = weight.shape[1 - reader.inputs] != wide.shape[1 - reader.inputs]
        x_t, x_s = (self.teacher.values[reader.source], self.student.values[self.copies[reader.source]])
        if x_s is x_t or not (consumer or (pruned and self.options.refit) or self.options.whole):
            return
        target = self._target(reader)
        if target is None or not self._regress(reader, target):
            return
        if reader.node in self.paths and self.options.refit and self.options.adaptations:
            self._adapt(reader, target)

    def _target(self, reader: Reader) -> list[Tensor] | None:
        """What the student's layer is to give, for each batch; None where that is not known."""
        y = [self._cut(part, reader.node) for part in self.teacher.values[reader.node]]
        weight = self.student.tensor(self.copies[reader.weight_node])
        M = weight.shape[1 - reader.inputs]
        if y[0].ndim < 2 or y[0].shape[reader.channel(y[0])] != M:
            return None
        error = self._stream_error(reader)
        return y if error is None else [a + b.reshape(a.shape) for a, b in zip(y, error)]

    def _regress(self, reader: Reader, target: list[Tensor], start: bool = True) -> bool:
        """Fit a layer to the target. Returns whether its weights are other ones now. start: make use of `aware` targets."""
        student, options = self.student, self.options
        node, x = self.copies[reader.weight_node], student.values[self.copies[reader.source]]
        weight = student.tensor(node)
        groups = self._groups(reader)
        W0 = reader.matrix(weight, groups)
        F = W0.shape[2]
        chosen = self._places(reader, target, F, len(weight) if reader.groups > 1 else 1)
        U = torch.cat([reader.seen(part, places, groups) for part, places in zip(x, chosen)], 1)
        T = torch.cat([reader.given(part, places, groups) for part, places in zip(target, chosen)], 1)
        if not (U.isfinite().all() and T.isfinite().all()):
            return False
        held = sum(len(places) for places in chosen[len(chosen) - self.held :]) if self.held else 0
        ridges = [inf if factor == inf else options.ridge * factor for factor in options.grid]
        aware = partial(self._aware, reader) if start and reader.clip and options.aware_steps else None
        result = fit(U, T, (W0, self._bias(reader, W0)), held, ridges, partial(self._loss, reader), aware,
                     options.aware_steps)  # fmt: skip
        self.fits[reader.weight] = result
        if result.solver is not None and not reader.depthwise:
            self.solvers[reader.node] = result.solver, chosen
        if result.ridge == inf and result.after == result.before and held:
            return False
        self._set_weight(reader, reader.as_weight(result.W.to(weight), weight))
        self._set_bias(reader, result.b.flatten())
        return True

    def _set_weight(self, reader: Reader, weight: Tensor) -> None:
        node = self.copies[reader.weight_node]
        self.student.tensors[node.target] = weight.contiguous()
        self.student.values[node] = [weight] * len(self.student.batches)
        self.changed.add(reader.node)

    def _groups(self, reader: Reader) -> int:
        """In how many groups the student's layer is."""
        if reader.groups == 1:
            return 1
        args = self.copies[reader.node].args
        return args[6] if len(args) > 6 else self.copies[reader.node].kwargs.get("groups", 1)

    def _bias(self, reader: Reader, W0: Tensor) -> Tensor:
        if reader.node in self.biases:
            return self.biases[reader.node].to(W0).view(W0.shape[:2])
        if reader.bias_node is None:
            return W0.new_zeros(W0.shape[:2])
        return self.student.tensor(self.copies[reader.bias_node]).view(W0.shape[:2])

    def _set_bias(self, reader: Reader, b: Tensor) -> None:
        if reader.bias_node is None:
            self.biases[reader.node] = b
        else:
            node = self.copies[reader.bias_node]
            self.student.tensors[node.target] = b.to(self.student.tensor(node))
            self.student.values[node] = [self.student.tensor(node)] * len(self.student.batches)

    def _places(self, reader: Reader, target: list[Tensor], F: int, groups: int) -> list[Tensor]:
        """For each batch the output positions that a fit uses: all, or a fixed random choice if there are very many."""
        counts = [part.numel() // part.shape[reader.channel(part)] for part in target]
        samples = sum(len(part) for part in target)
        most = max(min(self.options.positions * F, ENTRIES // (F * groups)), samples)
        chosen = torch.arange(sum(counts), device="cpu")
        if len(chosen) > most:
            random = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(chosen), generator=random, device="cpu")[:most].sort().values
        places, start = [], 0
        for count, part in zip(counts, target):
            inside = chosen[(chosen >= start) & (chosen < start + count)] - start
            places.append(inside.to(part.device))
            start += count
        return places

    def _loss(self, reader: Reader, prediction: Tensor, target: Tensor) -> float:
        """The error behind the BatchNorm and the activation that directly follow a layer, relative to the target."""
        if reader.norm is not None:
            prediction, target = (self._normalised(reader, v) for v in (prediction, target))
        size = (target - target.mean(1, keepdim=True)).double().pow(2).sum().clamp(min=1e-300)
        if reader.clip is not None:
            prediction, target = (v.clamp(*reader.clip) for v in (prediction, target))
        return float((prediction - target).double().pow(2).sum() / size)

    def _aware(self, reader: Reader, y: Tensor, T: Tensor) -> Tensor:
        """Of all targets that the activation maps to the same values as T [G, n, M], the one nearest to the prediction y."""
        low, high = reader.clip
        if reader.norm is None:
            return _nearest(y, T, low, high)
        slope = self._slope(reader).view(len(y), 1, -1)
        z, z_t = (self._normalised(reader, v) for v in (y, T))
        aim = y + (_nearest(z, z_t, low, high) - z) / slope
        return torch.where(slope.abs() > 1e-3, aim, T)

    def _normalised(self, reader: Reader, rows: Tensor) -> Tensor:
        """What the student's BatchNorm behind a layer makes of rows [G, n, M]."""
        flat = rows.transpose(0, 1).flatten(1)
        new = self.copies[reader.norm]
        self._give_statistics(reader.norm)
        return self.student.normalise(new, flat).view(len(flat), len(rows), -1).transpose(0, 1)

    def _slope(self, reader: Reader) -> Tensor:
        """γ / √(v + ε) of the student's BatchNorm behind a layer, [M]."""
        self._give_statistics(reader.norm)
        return self.student.slope(self.copies[reader.norm])

    def _give_statistics(self, norm: fx.Node) -> None:
        if norm in self.teacher.statistics and self.copies[norm] not in self.student.statistics:
            self.student.statistics[self.copies[norm]] = tuple(
                self._cut(x, norm, 1) for x in self.teacher.statistics[norm]
            )
        for source in self.copies[norm].all_input_nodes:
            if source.op == "get_attr":
                self.student.tensor(source)

    def _cut(self, value: Tensor, node: fx.Node, dim: int | None = None) -> Tensor:
        """What the teacher gives at a node, without the indices that the student lacks. dim: value has this dimension only."""
        axes = self.survey.analysis.values.get(node) or ()
        for d, axis in enumerate(axes) if dim is None else [(0, axes[dim])]:
            stays = left(axis, self.masks)
            if not stays.all():
                stays = stays.repeat(value.shape[d] // len(stays))  # of more samples than the example has
                value = value.index_select(d, stays.nonzero().flatten().to(value.device))
        return value

    # ------------------------------------------------------------ the stream that a layer is added to

    def _summand(self, reader: Reader) -> fx.Node | None:
        """What the output of a layer, with its BatchNorm, is added to; None if nothing."""
        node = reader.node if reader.norm is None else reader.norm
        user = next(iter(node.users), None)
        while len(node.users) == 1 and operation(user) in VIEWS and user.args[0] is node:
            node, user = user, next(iter(user.users), None)
        if len(node.users) != 1 or operation(user) not in ("add", "add_") or user.kwargs or len(user.args) != 2:
            return None
        other = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(other, fx.Node) or other is node or other.op == "get_attr":
            return None
        same = list(node.meta["val"].shape) == list(other.meta["val"].shape)
        return other if same else None

    def _stream_error(self, reader: Reader) -> list[Tensor] | None:
        """Teacher − student where the output of a layer is added to something else, in front of the layer's BatchNorm."""
        other = self.summands.get(reader.node)
        if other is None or self.copies[other] in self.same:
            return None
        whole, part = self.teacher.values.get(other), self.student.values.get(self.copies[other])
        if whole is None or part is None:
            return None
        errors = [self._cut(a, other) - b for a, b in zip(whole, part)]
        if reader.norm is None:
            return errors
        slope = self._slope(reader)
        inverse = torch.where(slope.abs() < 1e-2, 0, 1 / slope)
        return [error * inverse.view(-1, *[1] * (error.ndim - 2)) for error in errors]

    # ------------------------------------------------------------ adaptation

    def _paths(self) -> dict[fx.Node, list[fx.Node]]:
        """By consumer that loses inputs of a single layer: the call of that layer, then the nodes on the way to the consumer.

        Left out are layers of which something else reads too, and those that see the inputs themselves, which are made up.
        """
        writers = {reader.weight: reader for reader in self.readers.values() if not reader.depthwise}
        consumers = {reader.weight: reader for reader in self.readers.values()}
        paths = {}
        for leaf_space in self.smaller:
            if len(leaf_space.writers) != 1 or leaf_space.writers[0].name not in writers:
                continue
            first = writers[leaf_space.writers[0].name].node
            for place in leaf_space.readers:
                consumer = consumers.get(place.name)
                if consumer is None or consumer.node in paths:
                    continue
                path = _between(first, consumer.node)
                inside = {*path, consumer.node}
                if path and all(user in inside for node in path for user in node.users) and _learned(first):
                    paths[consumer.node] = path
        return paths

    def _adapt(self, reader: Reader, target: list[Tensor]) -> None:
        """Move the pruned layer in front of a consumer, then fit the consumer again on its new inputs.

        That fit starts from the consumer's present weights and uses the plain target, without `_aware`.
        """
        first, *between = self.paths[reader.node]
        layer, student, consumer = self.readers[first], self.student, self.copies[reader.node]
        weight_node = self.copies[layer.weight_node]
        inside = {first, *between}
        free = all(s in inside or s.op == "get_attr" for node in between for s in node.all_input_nodes)
        weight = student.tensor(weight_node)
        source = student.values[self.copies[layer.source]]
        one = student.values[self.copies[first]][0]
        positions = one.numel() // len(one) // len(weight)
        samples = -(-self.options.positions * weight[0].numel() // positions)  # about enough positions for a fit
        x, T = (_first(parts, samples) if free else parts[0] for parts in (source, target))
        batch = {} if free else {node: values[0] for node, values in student.values.items()}

        def through(u: Tensor, batch: Mapping[fx.Node, object] = batch) -> Tensor:
            values = {**batch, self.copies[first]: u}
            for node in between:
                values[self.copies[node]] = student.apply(self.copies[node], values)
            return values[self.copies[reader.source]]

        def give(read: Reader, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
            return self._layer(read, x, **(parameters or {}))

        u = give(layer, x)
        places = self._places(layer, [u], weight[0].numel(), 1)[0]
        U = layer.seen(x, places, 1)
        solver = self.solvers.pop(first, (None, None))[0]
        if solver is None:  # it sees what the teacher sees, so it was not fitted
            mean = U.mean(1)
            normal = Normal(U - mean[:, None])
            solver = Solver(mean, normal.factor(self.options.ridge), normal.dual)
        if solver.dual:  # with fewer positions than features, it would overfit the inputs
            return
        U = U - solver.mean[:, None]

        def regress(aim: Tensor) -> dict[str, Tensor]:
            aim = layer.given(aim, places, 1)
            mean = aim.mean(1)
            W = solver(aim - mean[:, None], U).to(aim)
            bias = mean - (W @ solver.mean.to(W)[..., None]).squeeze(-1)
            return {"weight": layer.as_weight(W, weight), "bias": bias[0]}

        slope = None if reader.norm is None else self._slope(reader)
        for step in range(self.options.adaptations):
            move = direction(
                partial(give, layer), partial(give, reader), through, x, T, reader.channel(T), slope, regress,
                0.0 if step else LITTLE,
            )  # fmt: skip
            if move is None:
                break
            self._set_weight(layer, student.tensor(weight_node) + move["weight"])
            known = self._bias(layer, student.tensor(weight_node).new_zeros(1, len(weight)))
            self._set_bias(layer, known.flatten() + move["bias"])
            values = []
            for k in range(len(source)):
                others = {} if free else {node: v[k] for node, v in student.values.items()}
                values.append(through(give(layer, source[k]), others))
            student.values[self.copies[reader.source]] = values
            self._regress(reader, target, start=False)
        del consumer

    def _layer(self, reader: Reader, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """What the student's layer gives for x, with its own parameters or these."""
        new = self.copies[reader.node]
        own = weight is None
        values = {self.copies[reader.source]: x}
        known = self.biases.get(reader.node) if own else bias
        if not own:
            values[self.copies[reader.weight_node]] = weight
        if reader.bias_node is not None:
            if not own:
                values[self.copies[reader.bias_node]] = bias
            return self.student.apply(new, values)
        y = self.student.apply(new, values)
        return y if known is None else y + self._along(known, y, reader)

    # ------------------------------------------------------------ the result

    def write(self) -> None:
        """Put what was fitted into the student's graph and into the model of the user's own class."""
        for reader in self.readers.values():
            if reader.node in self.changed:
                for name, node in ((reader.weight, reader.weight_node), (reader.bias, reader.bias_node)):
                    if node is not None:
                        target = self.copies[node].target
                        self._store(name, target, self.student.tensors[target])
                if reader.node in self.biases:
                    self._store_bias(reader, self.biases[reader.node])
        self.small.graph.recompile()

    def _store(self, name: str, target: str, value: Tensor) -> None:
        parameter = self.small.graph
        for part in target.split("."):
            parameter = getattr(parameter, part)
        parameter.copy_(value)
        if self.small.own_class:
            path, _, attribute = name.rpartition(".")
            getattr(self.small.model.get_submodule(path), attribute).copy_(value)  # which its other names share

    def _store_bias(self, reader: Reader, b: Tensor) -> None:
        """The bias of a layer that had none: into the mean of the BatchNorm behind it, or a new parameter."""
        if reader.norm is not None:
            mean = self.copies[reader.norm].args[3]
            moved = self.student.tensor(mean) - b.to(self.student.tensor(mean))
            self._store(self.survey.network.names[mean.target][0], mean.target, moved)
            return
        if plain_module(self.survey.network.model, reader) is None:
            return
        self._add_bias(reader, b)

    def _add_bias(self, reader: Reader, b: Tensor) -> None:
        """Give a layer that had none a bias."""
        node = self.copies[reader.node]
        target = self.copies[reader.weight_node].target.rpartition(".")[0]
        owner = self.small.graph.get_submodule(target)
        like = owner.weight
        owner.bias = nn.Parameter(b.to(like), requires_grad=like.requires_grad)
        if self.small.own_class:
            plain_module(self.small.model, reader).bias = nn.Parameter(b.to(like), requires_grad=like.requires_grad)
        with self.small.graph.graph.inserting_before(node):
            new = self.small.graph.graph.get_attr(f"{target}.bias")
        node.args = (*node.args[:2], new, *node.args[3:])


def _nearest(z: Tensor, z_t: Tensor, low: float, high: float) -> Tensor:
    """z_t where it is within the bounds; beyond them the nearest to z that is beyond them too."""
    z_t = torch.where(z_t > low, z_t, z.clamp(max=low))
    return torch.where(z_t < high, z_t, torch.where(z_t > high, z.clamp(min=high), z_t)) if high < inf else z_t


def _first(parts: Sequence[Tensor], samples: int) -> Tensor:
    """The first samples of all parts together."""
    taken, missing = [], samples
    for part in parts:
        if missing > 0:
            taken.append(part[:missing])
            missing -= len(taken[-1])
    return torch.cat(taken) if len(taken) > 1 else taken[0]


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """A node, then, in their order, the nodes that its value passes on the way to `last`."""
    before = _ancestors(last)
    path: dict[fx.Node, None] = {}
    for node in first.graph.nodes:
        if node in before and (node is first or any(source in path for source in node.all_input_nodes)):
            path[node] = None
    return list(path)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The nodes that a node depends on."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _learned(node: fx.Node) -> bool:
    """Whether any parameter comes before a layer, beside its own."""
    own = {*node.all_input_nodes}
    return any(source.op == "get_attr" and source not in own for source in _ancestors(node))


def _plain(value: object) -> object:
    """Arguments without their nodes."""
    return fx.map_arg(value, lambda node: None)


def _order(nodes: Sequence[fx.Node], summands: dict[fx.Node, fx.Node | None]) -> list[fx.Node]:
    """The nodes, ordered so that a layer comes after the summand whose error it repairs.

    Where the summand itself depends on the layer, its entry in `summands` is set to None: then nothing is repaired.
    """
    known = set(nodes)
    order: dict[fx.Node, None] = {}
    stack = list(reversed(nodes))
    while stack:
        node = stack[-1]
        if node in order:
            stack.pop()
            continue
        summand = summands.get(node)
        if summand is not None and summand not in order and _depends(summand, node, summands):
            summands[node] = summand = None
        sources = [*node.all_input_nodes, *([summand] if summand is not None else [])]
        waiting = [source for source in sources if source not in order and source in known]
        if waiting:
            stack += waiting
        else:
            order[stack.pop()] = None
    return list(order)


def _depends(node: fx.Node, on: fx.Node, summands: Mapping[fx.Node, fx.Node | None]) -> bool:
    """Whether a node needs another one, by what it reads or repairs."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node is on:
            return True
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
            if summands.get(node) is not None:
                stack.append(summands[node])
    return False


def _last_uses(
    order: Sequence[fx.Node],
    summands: Mapping[fx.Node, fx.Node | None],
    paths: Mapping[fx.Node, Sequence[fx.Node]],
    results: Sequence[fx.Node],
) -> dict[fx.Node, list[fx.Node]]:
    """By node, what no later one reads, repairs or computes again."""
    seen: set[fx.Node] = set()
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        again = [source for inner in paths.get(node, ()) for source in inner.all_input_nodes]
        sources = [node, *node.all_input_nodes, *filter(None, [summands.get(node)]), *again]
        uses[node] = [source for source in dict.fromkeys(sources) if source not in seen]
        seen.update(uses[node])
    return uses

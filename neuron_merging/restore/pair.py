"""Teacher and student side by side (ours): the original graph and the cut one, node by node over the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuron_merging.graph.axes import Leaf
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.surgery import Smaller
from neuron_merging.graph.walk import Batch, Walk, attribute, precision
from neuron_merging.graph.weights import left
from neuron_merging.restore.readers import Reader, find_reader, plain_module


class Pair:
    """The walks of both graphs. Nodes are those of the teacher; `copies` has the student's.

    readers: all layers, by node. biases: by layer that has none, the bias that the student's gets. changed: layers whose
    weights are other ones now. same: nodes at which the student has the teacher's values.
    """

    def __init__(
        self,
        survey: Survey,
        keep: Mapping[Space, Tensor],
        small: Smaller,
        batches: Sequence[Batch],
        *,
        measures: bool,
        macs: int | None,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.survey, self.small, self.copies = survey, small, small.copies
        work = precision(survey.network.graph, batches, macs)
        self.teacher = Walk(survey.network.graph, batches, work, measures, tensors)
        self.student = Walk(small.graph, batches, work, measures=False)
        self.scaled = [new for new in self.student.nodes if new not in set(small.copies.values())]  # sizes
        self.masks: dict[Leaf, Tensor] = {}
        for space, kept in keep.items():
            if len(kept):
                self.masks[space.leaf] = torch.zeros(space.size, dtype=torch.bool, device="cpu")
                self.masks[space.leaf][kept.cpu()] = True
        self.silent = {space.readers[0].name: space.unit.next for space, kept in keep.items() if not len(kept)}
        self.readers = {r.node: r for n in survey.network.graph.graph.nodes if (r := find_reader(survey, n))}
        self.biases: dict[fx.Node, Tensor] = {}
        self.changed: set[fx.Node] = set()
        self.same: set[fx.Node] = set()

    # ------------------------------------------------------------ values

    def step(self, node: fx.Node) -> None:
        """Compute the student's values at a node, for which the teacher has its own."""
        new = self.copies.get(node)
        if new is None:  # of a branch that is left out
            return
        if self._unchanged(node, new):
            self.same.add(node)
            self.student.values[new] = self.teacher.values[node]
            return
        for size in self.scaled:
            if size not in self.student.values and all(s in self.student.values for s in size.all_input_nodes):
                self.student.values[size] = self.student.compute(size)
        self._give_statistics(node)
        y = self.student.compute(new)
        if node in self.biases:
            y = [part + self._along(self.biases[node], part, self.readers[node]) for part in y]
        self.student.values[new] = y

    def _unchanged(self, node: fx.Node, new: fx.Node) -> bool:
        """Whether the student computes exactly what the teacher does at a node."""
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            a, b = self.student.tensor(new), self.teacher.tensor(node)
            return not isinstance(a, Tensor) or (a.shape == b.shape and torch.equal(a, b))
        if node in self.biases or any(source not in self.same for source in node.all_input_nodes):
            return False
        return _plain((node.args, node.kwargs)) == _plain((new.args, new.kwargs))

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop the values of nodes that are no longer needed."""
        for node in nodes:
            self.teacher.values.pop(node, None)
            self.student.values.pop(self.copies.get(node), None)

    def cut(self, value: Tensor, node: fx.Node, dim: int | None = None) -> Tensor:
        """What the teacher gives at a node, without the indices that the student lacks. dim: value has this dimension only."""
        axes = self.survey.analysis.values.get(node) or ()
        for d, axis in enumerate(axes) if dim is None else [(0, axes[dim])]:
            stays = left(axis, self.masks)
            if not stays.all():
                stays = stays.repeat(value.shape[d] // len(stays))  # of more samples than the example has
                value = value.index_select(d, stays.nonzero().flatten().to(value.device))
        return value

    # ------------------------------------------------------------ the student's layers

    def groups(self, reader: Reader) -> int:
        """In how many groups the student's layer is."""
        args, kwargs = self.copies[reader.node].args, self.copies[reader.node].kwargs
        return 1 if reader.groups == 1 else args[6] if len(args) > 6 else kwargs.get("groups", 1)

    def weight(self, reader: Reader) -> Tensor:
        """The weight of the student's layer, as its parameter has it."""
        return self.student.tensor(self.copies[reader.weight_node])

    def bias(self, reader: Reader) -> Tensor:
        """The bias [M] of the student's layer; zeros where it has none."""
        if reader.node in self.biases:
            return self.biases[reader.node]
        if reader.bias_node is not None:
            return self.student.tensor(self.copies[reader.bias_node])
        weight = self.weight(reader)
        return weight.new_zeros(weight.shape[1 - reader.inputs])

    def put(self, reader: Reader, weight: Tensor, bias: Tensor) -> None:
        """Give the student's layer another weight and bias [M]."""
        self._replace(reader.weight_node, weight.contiguous())
        if reader.bias_node is None:
            self.biases[reader.node] = bias
        else:
            self._replace(reader.bias_node, bias.to(weight))
        self.changed.add(reader.node)

    def _replace(self, node: fx.Node, value: Tensor) -> None:
        new = self.copies[node]
        self.student.tensors[new.target] = value
        self.student.values[new] = [value] * len(self.student.batches)
        self.same.discard(node)

    def apply(self, reader: Reader, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """What the student's layer gives for x, with its own parameters or these."""
        values = {self.copies[reader.source]: x}
        if weight is None:
            bias = self.biases.get(reader.node)
        else:
            values[self.copies[reader.weight_node]] = weight
            if reader.bias_node is not None:
                values[self.copies[reader.bias_node]] = bias
        y = self.student.apply(self.copies[reader.node], values)
        return y if bias is None or reader.bias_node is not None else y + self._along(bias, y, reader)

    def _along(self, bias: Tensor, y: Tensor, reader: Reader) -> Tensor:
        shape = [1] * y.ndim
        shape[reader.channel(y)] = -1
        return bias.to(y).view(shape)

    def normalised(self, reader: Reader, rows: Tensor) -> Tensor:
        """What the student's BatchNorm behind a layer makes of rows [G, n, M]."""
        self._give_statistics(reader.norm)
        flat = rows.transpose(0, 1).flatten(1)
        return self.student.normalise(self.copies[reader.norm], flat).view(len(flat), len(rows), -1).transpose(0, 1)

    def slope(self, reader: Reader) -> Tensor | None:
        """γ / √(v + ε) of the student's BatchNorm behind a layer, [M]; None where there is none."""
        if reader.norm is None:
            return None
        self._give_statistics(reader.norm)
        return self.student.slope(self.copies[reader.norm])

    def _give_statistics(self, norm: fx.Node) -> None:
        """Let the student's BatchNorm normalise with the teacher's statistics."""
        new = self.copies[norm]
        if norm in self.teacher.statistics and new not in self.student.statistics:
            self.student.statistics[new] = tuple(self.cut(x, norm, 1) for x in self.teacher.statistics[norm])

    def put_constant(self, reader: Reader, value: Tensor) -> None:
        """Let a branch that is left out, which this layer ends, give a constant [M]."""
        self.student.tensors[self._constant(reader)] = value

    def _constant(self, reader: Reader) -> str:
        return f"{reader.weight_node.target.rpartition('.')[0]}.value"

    # ------------------------------------------------------------ the result

    def write(self) -> None:
        """Put what was changed into the student's graph, and into its model of the user's own class."""
        for reader in self.readers.values():
            target = self._constant(reader)
            if reader.weight in self.silent and target in self.student.tensors:
                self._store(f"{self.silent[reader.weight]}.value", target, self.student.tensors[target])
        for node in self.changed:
            reader = self.readers[node]
            for name, source in ((reader.weight, reader.weight_node), (reader.bias, reader.bias_node)):
                if source is not None:
                    target = self.copies[source].target
                    self._store(name, target, self.student.tensors[target])
            if node in self.biases:
                self._store_bias(reader, self.biases[node])
        self.small.graph.recompile()

    def _store(self, name: str, target: str, value: Tensor) -> None:
        attribute(self.small.graph, target).copy_(value.clone())  # which can be another view of it
        if self.small.own_class:
            attribute(self.small.model, name).copy_(value)  # which its other names share

    def _store_bias(self, reader: Reader, b: Tensor) -> None:
        """The bias of a layer that had none: into the mean of the BatchNorm behind it, or a new parameter."""
        if reader.norm is not None:
            mean = self.copies[reader.norm].args[3]
            moved = self.student.tensor(mean) - b.to(self.student.tensor(mean))
            self._store(self.survey.network.names[mean.target][0], mean.target, moved)
        elif plain_module(self.survey.network.model, reader) is not None:
            node, path = self.copies[reader.node], self.copies[reader.weight_node].target.rpartition(".")[0]
            owners = [self.small.graph.get_submodule(path)]
            owners += [plain_module(self.small.model, reader)] if self.small.own_class else []
            for owner in owners:
                owner.bias = nn.Parameter(b.to(owner.weight), requires_grad=owner.weight.requires_grad)
            with self.small.graph.graph.inserting_before(node):
                new = self.small.graph.graph.get_attr(f"{path}.bias")
            node.args = (*node.args[:2], new, *node.args[3:])


def _plain(value: Any) -> Any:
    """Arguments without their nodes."""
    return fx.map_arg(value, lambda node: None)

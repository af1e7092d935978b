"""What the network's output loses when spaces are thinned, one by one or all at once (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from neuron_merging.graph.spaces import Survey
from neuron_merging.graph.walk import Values, Walk, is_batch_norm, last_uses
from neuron_merging.restore.readers import Reader
from neuron_merging.running import by_sample
from neuron_merging.widths.consumer import Thinned
from neuron_merging.widths.masked import Zeroed

Form = tuple[Reader, tuple[Thinned, ...]] | Zeroed  # a layer's groups, or parameters, once a space is thinned


class Changes:
    """Parameters that are other ones while spaces are thinned, by their first name, and what is added to outputs."""

    def __init__(self, survey: Survey, walk: Walk, forms: Iterable[Form]) -> None:
        self.names = survey.network.names
        nodes = {self.names[n.target][0]: n for n in walk.nodes if n.op == "get_attr" and n.target in self.names}
        self.tensors: dict[str, Tensor] = {}
        self.shifts: dict[fx.Node, Tensor] = {}

        def tensor(name: str) -> Tensor:
            return self.tensors[name] if name in self.tensors else walk.tensor(nodes[name])

        for form in forms:
            if isinstance(form, Zeroed):
                for place in form.places:
                    self.tensors[place.name] = form.put(tensor(place.name), place)
                continue
            reader, groups = form
            weight = tensor(reader.weight)
            W = torch.stack([group.put(W) for group, W in zip(groups, reader.matrix(weight, reader.groups))])
            self.tensors[reader.weight] = reader.as_weight(W, weight)
            c = torch.cat([group.c for group in groups]).to(weight)
            c = c if reader.conv is None else c.view(-1, *[1] * (weight.ndim - 2))
            self.shifts[reader.node] = self.shifts.get(reader.node, 0) + c

    def of(self, node: fx.Node) -> Tensor | None:
        """The other parameter at a get_attr node, if there is one."""
        known = node.op == "get_attr" and node.target in self.names
        return self.tensors.get(self.names[node.target][0]) if known else None


class Output:
    """The network's output on the walk's batches, and how it changes while spaces are thinned.

    constants: the nodes that do not depend on the network's inputs, as their values have to be kept.
    """

    def __init__(self, survey: Survey, walk: Walk) -> None:
        self.survey, self.walk = survey, walk
        varying: set[fx.Node] = set()
        for node in walk.nodes:
            if node.op == "placeholder" or not varying.isdisjoint(node.all_input_nodes):
                varying.add(node)
        self.constants = [node for node in walk.nodes if node not in varying]
        self.varying = [node for node in walk.nodes if node in varying]
        for _ in walk.run(self.constants, keep=self.constants):
            pass
        self.fixed = {node: walk.values[node] for node in self.constants}
        self.original = self._run(Changes(survey, walk, ()), self.varying, {})

    def first(self, changes: Changes) -> fx.Node | None:
        """The first node that depends on the inputs and on what has changed."""
        touched = self._touched(changes)
        return next((node for node in self.varying if not touched.isdisjoint(node.all_input_nodes)), None)

    def change(self, changes: Changes, nodes: Sequence[fx.Node], values: Values) -> float:
        """The mean squared change of the network's output, centred per sample. values: of what comes before `nodes`."""
        return float((self._run(changes, nodes, values) - self.original).pow(2).sum(1).mean())

    def lost(self, forms: Iterable[Form]) -> float:
        """1 − the cosine between the network's outputs with and without these forms, centred per sample."""
        changes = Changes(self.survey, self.walk, forms)
        thinned = self._run(changes, self.varying, {})
        return 1 - float(cosine_similarity(thinned.flatten(), self.original.flatten(), dim=0))

    def _touched(self, changes: Changes) -> set[fx.Node]:
        touched: set[fx.Node] = set()
        for node in self.constants:
            if changes.of(node) is not None or not touched.isdisjoint(node.all_input_nodes):
                touched.add(node)
        return touched

    def _run(self, changes: Changes, nodes: Sequence[fx.Node], values: Values) -> Tensor:
        values = values | self.fixed
        touched = self._touched(changes)
        for node in self.constants:
            if node in touched:
                other = changes.of(node)
                values[node] = self._apply(node, values) if other is None else [other] * len(self.walk.batches)
        last = last_uses(nodes, {*self.walk.results, *self.constants})
        for node in nodes:
            values[node] = self._apply(node, values)
            if node in changes.shifts:
                values[node] = [value + changes.shifts[node] for value in values[node]]
            for source in last[node]:
                values.pop(source, None)
        results = [values[node] for node in self.walk.results]
        parts = [by_sample(part, samples(batch)) for *part, batch in zip(*results, self.walk.batches)]
        flat = torch.cat(parts).double()
        return flat - flat.mean(1, keepdim=True) if flat.shape[1] > 1 else flat

    def _apply(self, node: fx.Node, values: Values) -> list[Any]:
        if node.op == "placeholder":
            return self.walk.compute(node)
        if is_batch_norm(node) and self.walk.measures and node not in self.walk.statistics:
            self.walk.measure(node, values[node.args[0]])
        return [
            self.walk.apply(node, {source: values[source][k] for source in node.all_input_nodes})
            for k in range(len(self.walk.batches))
        ]


def sensitivities(output: Output, forms: Sequence[dict[int, list[Form]]]) -> list[dict[int, float]]:
    """For each space, by k: the mean squared change of the network's output if this space alone is thinned to k.

    forms: for each space, by k, those of all that read it.
    """
    found: list[dict[int, float]] = [{} for _ in forms]
    starts: dict[fx.Node, list[int]] = {}
    for i, by_width in enumerate(forms):
        start = output.first(Changes(output.survey, output.walk, next(iter(by_width.values()), ())))
        starts.setdefault(start, []).append(i)
    nodes, walk = output.varying, output.walk
    walked = tqdm(walk.run(nodes, keep=output.constants), "sensitivities", len(nodes), leave=False, disable=None)
    for place, node in enumerate(walked):
        for i in starts.get(node, ()):
            for k, some in forms[i].items():
                changes = Changes(output.survey, walk, some)
                found[i][k] = output.change(changes, nodes[place:], walk.values)
    return found


def samples(batch: Sequence[Any]) -> int:
    """The number of samples in a batch: the length of its first tensor."""
    return next((len(value) for value in batch if isinstance(value, Tensor) and value.ndim), 1)

"""What the network's output loses when units are thinned, one by one or all at once (ours)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from neuron_merging.errors import reported_as
from neuron_merging.graph.interpreter import Walk, by_sample, computing_in, precision, steps
from neuron_merging.graph.tracing import Unit
from neuron_merging.linalg import as_weight, channel
from neuron_merging.widths.consumer import Thinned


@contextmanager
def in_walk_precision(model: nn.Module, probe: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """A copy of the network and the probe, both in the precision in which the graph is run."""
    what = f"no widths can be chosen for {type(model).__name__} on inputs of shape {list(probe.shape)}"
    with reported_as(what), torch.no_grad():
        probe = probe.to(precision(model, probe))
        yield computing_in(model, probe.dtype), probe


class Output:
    """The network's output on some samples, and how it changes if consumers have their thinned forms."""

    def __init__(self, walk: Walk, probe: Tensor) -> None:
        self.walk, self.probe, self.nodes = walk, probe, list(walk.graph.nodes)
        self.original = self._output(0, {}, {})

    def change(self, forms: dict[str, Thinned], first: int, values: dict[Any, Any]) -> float:
        """The mean squared change of the network's output, centred per sample, if consumers have these forms (by name).

        first: the place of the first of these consumers in the graph. values: of the nodes before it.
        """
        return float((self._output(first, values, forms) - self.original).pow(2).sum(1).mean())

    def lost(self, forms: dict[str, Thinned]) -> float:
        """1 − the cosine between the network's outputs with and without these forms of consumers, centred per sample."""
        thinned = self._output(0, {}, forms)
        return 1 - float(cosine_similarity(thinned.flatten(), self.original.flatten(), dim=0))

    def _output(self, first: int, values: dict[Any, Any], forms: dict[str, Thinned]) -> Tensor:
        values = dict(values)
        for node in steps(self.nodes[first:], values):
            form = forms.get(node.target) if node.op == "call_module" else None
            values[node] = (
                self.walk.run(node, values, self.probe) if form is None else self._thinned(node, form, values)
            )
        return _centred(values[self.nodes[-1]], len(self.probe))

    def _thinned(self, node: Any, form: Thinned, values: dict[Any, Any]) -> Tensor:
        layer, (source,) = self.walk.modules[node.target], node.all_input_nodes
        weight = as_weight(form.W.to(layer.weight), layer)
        y = functional_call(layer, {"weight": weight}, (values[source],))
        return y + form.c.to(y).view(-1, *[1] * (y.ndim - 1 - channel(layer, y)))


def sensitivities(
    walk: Walk, units: Sequence[Unit], thinned: Sequence[Sequence[Thinned]], probe: Tensor
) -> list[dict[int, float]]:
    """For each unit, by k: the mean squared change of the network's output if this unit alone is thinned to k neurons."""
    consumer = {unit.next: i for i, unit in enumerate(units)}
    output = Output(walk, probe)
    changes: list[dict[int, float]] = [{} for _ in units]
    values: dict[Any, Any] = {}
    walked = tqdm(steps(output.nodes, values), "sensitivities", len(output.nodes), leave=False, disable=None)
    for place, node in enumerate(walked):
        if node.op == "call_module" and node.target in consumer:
            i = consumer[node.target]
            changes[i] = {form.k: output.change({node.target: form}, place, values) for form in thinned[i]}
        values[node] = walk.run(node, values, probe)
    return changes


def _centred(output: Any, samples: int) -> Tensor:
    """All outputs of the network by sample, [B, numbers]. If a sample has several, their mean is subtracted."""
    flat = by_sample(output, samples).double()
    return flat - flat.mean(1, keepdim=True) if flat.shape[1] > 1 else flat

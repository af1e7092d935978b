"""Inputs of a network as torch.export sees it, real or made up, as batches that its graph takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs, Network, arguments

SAMPLES = 64  # that are made up, where nobody says how many
PARTS = 6  # batches in which a graph gets its samples, if it takes any size
EVERY = 3  # of that many batches one is held out

Batch = list[Any]  # the network's inputs, one for each placeholder of its graph
Values = dict[fx.Node, list[Any]]  # by node, what it gives for each batch


def batches(
    network: Network, images: Inputs | None, random: torch.Generator, samples: int | None = None
) -> list[Batch]:
    """The images in random order, or `samples` inputs of white noise with the means and deviations of the example.

    Noise is no data: what a network was trained for, it does not show. Raises NeuronMergingError where images are not like the
    example, or too few, and where inputs are whole numbers, which cannot be made up.
    """
    example, structure = tree_flatten((network.args, network.kwargs))
    batched = _batched(network, example)
    if not any(batched):
        raise NeuronMergingError("restoration needs inputs that have a batch dimension, the first")
    size = len(example[batched.index(True)])
    if images is None:
        count = max(SAMPLES if samples is None else samples, EVERY * size)
        leaves = [_noise(value, count, random) if many else value for value, many in zip(example, batched)]
    else:
        args, kwargs = arguments(images)
        if kwargs.keys() == network.kwargs.keys():
            kwargs = {name: kwargs[name] for name in network.kwargs}
        leaves, own = tree_flatten((args, kwargs))
        if own != structure:
            raise NeuronMergingError(
                "images: give them as example_input is, a tensor, a tuple or a mapping of the same names"
            )
        leaves = [_like(*pair, many) for *pair, many in zip(leaves, example, batched)]
    counts = {len(value) for value, many in zip(leaves, batched) if many}
    if len(counts) > 1:
        raise NeuronMergingError(f"images: the inputs have different numbers of samples, {sorted(counts)}")
    (count,) = counts
    if network.dynamic:
        size = max(2, -(-count // PARTS))  # torch.export takes a batch of one for something else
    if count < EVERY * size:
        raise NeuronMergingError(f"{count} images are too few for restoration: give {EVERY * size} or more")
    order = torch.randperm(count, generator=random)
    return [
        [value[order[start : start + size].to(value.device)] if many else value for value, many in zip(leaves, batched)]
        for start in range(0, count - size + 1, size)
    ]


def _batched(network: Network, example: list[Any]) -> list[bool]:
    """Which inputs have a batch dimension: one of any size, or in a graph for one size, one as long as the first input."""
    nodes = [node for node in network.graph.graph.nodes if node.op == "placeholder"]
    tensors = [isinstance(value, Tensor) and value.ndim > 0 for value in example]
    if network.dynamic:
        seen = [node.meta.get("val") for node in nodes]
        return [known and not isinstance(value.shape[0], int) for known, value in zip(tensors, seen, strict=True)]
    size = next((len(value) for value, known in zip(example, tensors) if known), 0)
    return [known and len(value) == size for value, known in zip(example, tensors)]


def _noise(example: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Noise [count, …] like an example [B, …]; a constant that is not 0, such as a mask of ones, stays as it is."""
    if not example.is_floating_point():
        raise NeuronMergingError("restoration cannot make up inputs that are whole numbers or masks: give images")
    spread, mean = example.std(correction=0), example.mean()
    if spread == 0 and mean == 0:
        spread = torch.ones_like(spread)
    noise = torch.randn(count, *example.shape[1:], generator=random).to(example)
    return mean + spread * noise


def _like(images: Any, example: Any, many: bool) -> Any:
    """One of the inputs, of the example's type and on its device."""
    if not isinstance(example, Tensor):
        return images
    if not isinstance(images, Tensor) or images.shape[many:] != example.shape[many:] or images.ndim != example.ndim:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise NeuronMergingError(f"images: {given} is not like the example, {list(example.shape)}")
    if example.is_floating_point() != images.is_floating_point():
        raise NeuronMergingError(f"images: of type {images.dtype}, but the example is {example.dtype}")
    return images.to(example)


def compute(graph: fx.GraphModule, node: fx.Node, values: Values, inputs: list[Batch]) -> list[Any]:
    """What a node gives for each batch, given the values that it needs."""
    if node.op == "placeholder":
        place = [n for n in graph.graph.nodes if n.op == "placeholder"].index(node)
        given = [batch[place] for batch in inputs]
        return [value.clone() if isinstance(value, Tensor) else value for value in given]  # may be overwritten
    if node.op == "get_attr":
        return [attribute(graph, node.target)] * len(inputs)
    call: Callable[..., Any] = graph.get_submodule(node.target) if node.op == "call_module" else node.target
    results = []
    for k in range(len(inputs)):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source, k=k: values[source][k])
        results.append(call(*args, **kwargs))
    return results


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """By node, what no later one needs."""
    uses: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        ends = [source for source in (node, *node.all_input_nodes) if source not in seen]
        seen.update(ends)
        uses[node] = ends
    return uses


def attribute(model: nn.Module, target: str) -> Any:
    """What a get_attr node gives."""
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value

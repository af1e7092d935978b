"""Inputs that restoration runs a network on, real or made up, as batches that its graph takes (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from neuron_merging import synthetic
from neuron_merging.config import ShrinkConfig
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs, Network, arguments
from neuron_merging.graph.walk import Batch
from neuron_merging.running import dtype

SAMPLES = 64  # that are made up for several inputs, where nobody says how many
PARTS = 6  # batches in which a graph gets its samples, if it takes any size
LEAST = 3  # batches: one of them is held out


def batches(network: Network, config: ShrinkConfig, images: Inputs | None = None, share: float = 1.0) -> list[Batch]:
    """The images in random order; or `share` times as many made-up inputs as the config says.

    Raises NeuronMergingError where images are not like the example, or too few, and where inputs are whole numbers, which
    cannot be made up.
    """
    random = torch.Generator().manual_seed(config.seed)
    example, structure = tree_flatten((network.args, network.kwargs))
    many = _batched(network, example)
    if not any(many):
        raise NeuronMergingError("restoration needs inputs that have a batch dimension, the first")
    size = len(example[many.index(True)])
    if images is not None:
        leaves = _given(network, images, example, structure, many)
    elif len(example) == 1:
        leaves = [_made_up(network, example[0], config, share)]
    else:
        count = max(round(share * (config.probe_samples or SAMPLES)), LEAST * size)
        leaves = [_noise(value, count, random) if yes else value for value, yes in zip(example, many)]
    counts = {len(value) for value, yes in zip(leaves, many) if yes}
    if len(counts) > 1:
        raise NeuronMergingError(f"images: the inputs have different numbers of samples, {sorted(counts)}")
    (count,) = counts
    size = 2 if network.dynamic else size  # torch.export takes a batch of one for something else
    if count < LEAST * size:
        raise NeuronMergingError(f"{count} images are too few for restoration: give {LEAST * size} or more")
    order = torch.arange(count, device="cpu")
    if images is not None:
        order = torch.randperm(count, generator=random, device="cpu")
    whole = order[: count - count % size].split(size)
    parts = order.tensor_split(min(PARTS, len(whole))) if network.dynamic else whole
    return [[value[part.to(value.device)] if yes else value for value, yes in zip(leaves, many)] for part in parts]


def _made_up(network: Network, example: Tensor, config: ShrinkConfig, share: float) -> Tensor:
    """Inputs [B, …] of a network that has one."""
    if not example.is_floating_point():
        raise NeuronMergingError(
            f"the inputs of {type(network.model).__name__} are whole numbers, which cannot be made up: give images"
        )
    shape = tuple(example.shape[1:])
    samples = round(share * (config.probe_samples or synthetic.default_samples(network.model, shape)))
    x = synthetic.make(network.model, shape, samples, kind=config.probe, seed=config.seed)
    return x.to(dtype(network.model))


def _given(network: Network, images: Inputs, example: list[Any], structure: Any, many: list[bool]) -> list[Any]:
    """The images as a list of inputs like the example's."""
    args, kwargs = arguments(images)
    if kwargs.keys() == network.kwargs.keys():
        kwargs = {name: kwargs[name] for name in network.kwargs}
    leaves, own = tree_flatten((args, kwargs))
    if own != structure:
        raise NeuronMergingError(
            "images: give them as example_input is, a tensor, a tuple or a mapping of the same names"
        )
    return [_like(*pair, yes) for *pair, yes in zip(leaves, example, many)]


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
    noise = torch.randn(count, *example.shape[1:], generator=random, dtype=torch.float32, device="cpu").to(example)
    return mean + spread * noise


def _like(images: Any, example: Any, many: bool) -> Any:
    """One of the inputs, of the example's type and on its device."""
    if not isinstance(example, Tensor):
        return images
    if not isinstance(images, Tensor) or images.shape[many:] != example.shape[many:] or images.ndim != example.ndim:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise NeuronMergingError(f"images: {given} is not like the example, {list(example.shape)}")
    if images.is_floating_point() and not example.is_floating_point():
        raise NeuronMergingError(f"images: of type {images.dtype}, but the example is {example.dtype}")
    return images.to(example)

"""Inputs that restoration runs a network on, real or made up, as batches that its graph takes (ours)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from neuron_merging import synthetic
from neuron_merging.config import ShrinkConfig
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs, Network, arguments
from neuron_merging.graph.walk import Batch
from neuron_merging.running import dtype

FEW = 64  # inputs: with fewer real ones, others are made up; and so many are for several inputs
PARTS = 6  # batches in which a graph gets its samples, if it takes any size
LEAST = 3  # batches: one of them is held out


@dataclass(frozen=True)
class Source:
    """Inputs to run a network on, which are made or ordered when they are asked for. images: real ones, if there are some."""

    network: Network
    config: ShrinkConfig
    images: Inputs | None = None

    @property
    def real(self) -> bool:
        """Whether all inputs are real: a network's running statistics are then right for them."""
        sizes = [len(value) for value in tree_leaves(self.images) if isinstance(value, Tensor)]
        return bool(sizes) and max(sizes) >= FEW

    def parted(self) -> tuple[Source, Source]:
        """The first two thirds of the real inputs, and the others."""
        first = max(len(value) for value in tree_leaves(self.images) if isinstance(value, Tensor)) * 2 // 3
        first, others = (
            tree_map(lambda value, part=part: value[part] if isinstance(value, Tensor) else value, self.images)
            for part in (slice(None, first), slice(first, None))
        )
        return replace(self, images=first), replace(self, images=others)

    def __call__(self, share: float = 1.0) -> list[Batch]:
        """The real inputs in random order, behind made-up ones where they are few; or made-up ones only.

        share: how many times as many made-up inputs as the config says.
        Raises NeuronMergingError where images are not like the example, or too few, and where inputs are whole numbers, which
        cannot be made up.
        """
        network, config = self.network, self.config
        random = torch.Generator().manual_seed(config.seed)
        example, structure = tree_flatten((network.args, network.kwargs))
        many = _batched(network, example)
        if not any(many):
            raise NeuronMergingError("restoration needs inputs that have a batch dimension, the first")
        size = len(example[many.index(True)])
        if self.images is not None:
            leaves = _given(network, self.images, example, structure, many)
            count = _count(leaves, many)
            order = torch.randperm(count, generator=random, device="cpu")
            leaves = [value[order.to(value.device)] if yes else value for value, yes in zip(leaves, many)]
            if len(example) == 1 and example[0].is_floating_point() and network.dynamic and count < FEW:
                leaves = [torch.cat([_made_up(network, example[0], config), *leaves])]
        elif len(example) == 1:
            leaves = [_made_up(network, example[0], config, share)]
        else:
            count = max(round(share * (config.probe_samples or FEW)), LEAST * size)
            leaves = [_noise(value, count, random) if yes else value for value, yes in zip(example, many)]
        count = _count(leaves, many)
        size = 2 if network.dynamic else size  # torch.export takes a batch of one for something else
        if count < LEAST * size:
            raise NeuronMergingError(f"{count} images are too few for restoration: give {LEAST * size} or more")
        every = torch.arange(count, device="cpu")
        places = parts(every) if network.dynamic else every[: count - count % size].split(size)
        return [[value[part.to(value.device)] if yes else value for value, yes in zip(leaves, many)] for part in places]


def _count(leaves: list[Any], many: list[bool]) -> int:
    """The number of samples. Raises NeuronMergingError where the inputs have different ones."""
    counts = {len(value) for value, yes in zip(leaves, many) if yes}
    if len(counts) > 1:
        raise NeuronMergingError(f"images: the inputs have different numbers of samples, {sorted(counts)}")
    return counts.pop()


def parts(samples: Tensor) -> list[Tensor]:
    """Batches of samples [B, …], about equally large, for a graph that takes any size but one."""
    return list(samples.tensor_split(min(PARTS, len(samples) // 2)))


def _made_up(network: Network, example: Tensor, config: ShrinkConfig, share: float = 1.0) -> Tensor:
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

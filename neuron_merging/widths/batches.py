"""Inputs in batches: how many samples they have, and a part of them that is held out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Network
from neuron_merging.graph.walk import Batch

LEAST = 3  # samples, with those that are held out


def count(network: Network, batches: Sequence[Batch]) -> int:
    """The number of samples; of batches where the graph takes those of one size only."""
    return sum(_samples(network, batch) for batch in batches) if network.dynamic else len(batches)


def split(network: Network, batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """The batches without the first samples, and these, a `share` of all; whole batches where the graph takes one size only.

    Raises NeuronMergingError if there are too few samples.
    """
    samples = count(network, batches)
    held_out = round(samples * share)
    if not network.dynamic:
        if held_out == samples or (share and not held_out):
            raise NeuronMergingError(f"the choice of widths has to look at {LEAST} batches at least, not at {samples}")
        return list(batches[held_out:]), list(batches[:held_out])
    if samples - held_out < 2 or (share and not held_out):
        raise NeuronMergingError(f"the choice of widths has to look at {LEAST} inputs at least, not at {samples}")
    if not held_out:
        return list(batches), []
    batched = _batched(network)
    whole = [torch.cat(values) if many else values[0] for many, values in zip(batched, zip(*batches))]
    size = max(_samples(network, batch) for batch in batches)

    def part(start: int, end: int) -> list[Batch]:
        pieces = -(-(end - start) // size)
        bounds = [start + (end - start) * i // pieces for i in range(pieces + 1)]
        return [[value[a:b] if many else value for many, value in zip(batched, whole)] for a, b in pairwise(bounds)]

    return part(held_out, samples), part(0, held_out)


def _batched(network: Network) -> list[bool]:
    """Which inputs have a batch dimension, in a graph that takes any number of samples."""
    seen = [node.meta.get("val") for node in network.graph.graph.nodes if node.op == "placeholder"]
    return [isinstance(value, Tensor) and value.ndim > 0 and not isinstance(value.shape[0], int) for value in seen]


def _samples(network: Network, batch: Batch) -> int:
    return next((len(value) for many, value in zip(_batched(network), batch) if many), 1)

"""Counts what a network costs: parameters and multiply-accumulates."""

import torch
from torch import nn

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph import macs
from neuron_merging.graph.export import capture
from neuron_merging.running import dtype


def count_parameters(model: nn.Module) -> int:
    """The number of parameters: weights, biases, γ and β, but no running statistics."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions, matrix products, attention and recurrent layers for one input of `shape`.

    The shape is without the batch. The input is of the network's precision, or, if that fails, of whole numbers, as an
    embedding takes them. Raises NeuronMergingError if the network does not run on it or cannot be exported.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        network = capture(model, torch.zeros(1, *shape, dtype=dtype(model), device=device))
    except NeuronMergingError as error:
        try:
            network = capture(model, torch.zeros(1, *shape, dtype=torch.int64, device=device))
        except NeuronMergingError:
            raise error from None
    return macs.count_macs(network)

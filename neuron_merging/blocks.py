"""Dropping whole residual blocks (ours): a branch without neurons only adds a constant."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_merging.graph.tracing import CONVS, Unit, put_module


class _Sized(nn.Module):
    """Replaces a convolution or linear layer; its outputs have the same spatial size."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.sides = ()  # (padding, reach of the kernel, stride) by dimension; none for a linear layer
        if isinstance(layer, CONVS):
            padding = layer._reversed_padding_repeated_twice[::-1]
            reach = (d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size))
            self.sides = tuple(zip(map(sum, zip(padding[::2], padding[1::2])), reach, layer.stride))

    def filled(self, value: Tensor, x: Tensor) -> Tensor:
        """`value` [M] for every sample and output position of the layer on x: [B, M, …], or [B, …, M] of a linear layer."""
        if not self.sides:
            return value + torch.zeros_like(x[..., :1])
        out = [(x.shape[i] + pad - reach) // stride + 1 for i, (pad, reach, stride) in enumerate(self.sides, start=2)]
        return value.view(1, -1, *[1] * len(out)).expand(x.shape[0], -1, *out).clone()


class Silence(_Sized):
    """Replaces a layer that has no neurons left. It gives a single channel of zeros, so that the layers behind it can run."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, …] → [B, 1, …], or [B, …, 1]"""
        return self.filled(torch.zeros(1, dtype=x.dtype, device=x.device), x)


class Constant(_Sized):
    """Replaces the consumer of a layer that has no neurons left: gives `value` [M] at every position."""

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        super().__init__(layer)
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, …] → [B, M, …], or [B, …, M]"""
        return self.filled(self.value, x)


@torch.no_grad()
def drop(model: nn.Module, unit: Unit) -> None:
    """Replace a unit's branch by the constant that it gives when all its neurons are 0. Changes `model`."""
    consumer = model.get_submodule(unit.next)
    value = consumer.weight.new_zeros(len(consumer.weight)) if consumer.bias is None else consumer.bias.detach().clone()
    if unit.next_bn is not None:
        bn = model.get_submodule(unit.next_bn)
        value = F.batch_norm(value[None], bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)[0]
    for name in filter(None, (unit.bn, unit.next_bn)):
        put_module(model, name, nn.Identity())
    put_module(model, unit.layer, Silence(model.get_submodule(unit.layer)))
    put_module(model, unit.next, Constant(consumer, value))

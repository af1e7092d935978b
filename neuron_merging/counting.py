"""What a network costs: parameters and multiply-accumulates."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def dtype(model: nn.Module) -> torch.dtype:
    """In which a network takes its inputs: that of its first parameter of real numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def count_parameters(model: nn.Module) -> int:
    """Weights, biases, γ and β; no running statistics."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input of `shape` (without the batch).

    Counted in float32, or in the network's own precision where it insists on that.
    """

    def count(copied: nn.Module) -> int:
        copied.eval().requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(torch.zeros(1, *shape, dtype=dtype(copied), device="cpu"))
        return counter.get_total_flops() // 2

    try:
        return count(copy.deepcopy(model).cpu().float())
    except RuntimeError:
        if dtype(model) == torch.float32:
            raise
        return count(copy.deepcopy(model).cpu())

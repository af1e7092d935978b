"""What a network costs: parameters and multiply-accumulates."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def dtype(model: nn.Module) -> torch.dtype:
    """In which a network takes its inputs: that of its first parameter of real numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def count_parameters(model: nn.Module) -> int:
    """Weights, biases, γ and β; no running statistics."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input of `shape` (without the batch).

    Counted in float32, or in the network's own precision where it insists on that; for whole numbers, as an embedding takes
    them, where it takes no others.
    """

    def count(copied: nn.Module, kind: torch.dtype | None = None) -> int:
        copied.eval().requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(torch.zeros(1, *shape, dtype=kind or dtype(copied), device="cpu"))
        return counter.get_total_flops() // 2

    try:
        return count(copy.deepcopy(model).cpu().float())
    except RuntimeError:
        own = dtype(model)
        for kind in (torch.int64,) if own == torch.float32 else (own, torch.int64):
            with contextlib.suppress(Exception):
                return count(copy.deepcopy(model).cpu(), kind)
        raise


def precise(x: Tensor, precision: torch.dtype) -> Tensor:
    """Inputs of real numbers in another precision; whole ones, as an embedding takes them, as they are."""
    return x.to(precision) if x.is_floating_point() else x

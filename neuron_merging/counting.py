"""Counts what a network costs: parameters and multiply-accumulates."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a network's inputs: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def count_parameters(model: nn.Module) -> int:
    """The number of parameters: weights, biases, γ and β, but no running statistics."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input of `shape` (without the batch).

    The network is run in float32. If it fails, it is run in its own precision, then on whole numbers, as an embedding takes.
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
    """Floating-point inputs in another precision; whole numbers, as an embedding takes them, stay as they are."""
    return x.to(precision) if x.is_floating_point() else x

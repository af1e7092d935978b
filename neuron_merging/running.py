"""Runs a network as it is, without its graph: at how many positions, in what precision, with which statistics and outputs."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from neuron_merging.errors import NeuronMergingError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # the last of any dimension
EXACT = 2 * 10**8  # multiply-accumulates that float64 does in no time


def dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a network's inputs: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def takes_whole_numbers(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network runs on whole numbers of this shape only, as one with an embedding does."""
    copied = copy.deepcopy(model).cpu().eval()
    for kind in (dtype(copied), torch.int64):
        with contextlib.suppress(Exception), torch.no_grad():
            copied(torch.zeros(1, *shape, dtype=kind, device="cpu"))
            return kind == torch.int64
    return False


def quick_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """About `counting.count_macs`, without a graph: enough to choose a precision, and to see whether a network runs.

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


def precision(model: nn.Module, inputs: Tensor) -> torch.dtype:
    """In what a walk over `inputs` [B, …] computes: the network's dtype, float32 at least; float64 if there is little to do.

    In float64 the order of sums, and so the number of threads, is not felt. A network that says .float() has none.
    """
    if len(inputs) * quick_macs(model, tuple(inputs.shape[1:])) <= EXACT:
        with contextlib.suppress(RuntimeError), torch.no_grad():
            copy.deepcopy(model).double().eval()(inputs[:1].to(torch.float64, copy=True))
            return torch.float64
    return torch.promote_types(dtype(model), torch.float32)


def computing_in(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """A copy of `model` for walks, whose real numbers are float32 or float64; complex and whole ones stay what they are."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    return copied.double() if precision == torch.float64 else copied.float()


def count_positions(model: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """At how many output positions every convolution and linear layer that is called works, for one input of this shape."""
    positions: dict[str, float] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        positions[name] = positions.get(name, 0) + output.numel() / len(module.weight)

    work = copy.deepcopy(model).eval()
    for name, module in work.named_modules():
        if isinstance(module, (*CONVS, nn.Linear)):
            module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        work(torch.zeros(1, *shape, dtype=dtype(work), device=next(work.parameters()).device))
    return positions


def measure_statistics(bn: nn.Module, momentum: float | None) -> None:
    """Let a BatchNorm normalise with the statistics of what it sees; of this process, if others have a part of it."""
    bn.train()
    bn.momentum = momentum
    if isinstance(bn, nn.SyncBatchNorm):  # which would wait for the others
        bn.forward = partial(_BatchNorm.forward, bn)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors that a network gives, in whatever containers."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def by_sample(output: Any, samples: int) -> Tensor:
    """What a network gives for each of some samples: [samples, numbers]; without such a tensor all numbers as one row.

    The samples are along the first axis, or, with places beside them, a part of it, or along another axis (time first, the
    state of an RNN). Losses and constants, which have none, are left out. Raises NeuronMergingError where there are no numbers.
    """
    leaves = floats(output)
    if not leaves:
        raise NeuronMergingError("the network gives no floating-point numbers")
    rows = [row for leaf in leaves if (row := _rows(leaf, samples)) is not None]
    return torch.cat(rows, 1) if rows else torch.cat([leaf.reshape(1, -1) for leaf in leaves], 1)


def _rows(tensor: Tensor, samples: int) -> Tensor | None:
    """[samples, numbers], or None where no axis of the tensor is that of the samples."""
    if samples in tensor.shape:
        return tensor.movedim(tensor.shape.index(samples), 0).reshape(samples, -1)
    return tensor.reshape(samples, -1) if tensor.ndim and tensor.shape[0] % samples == 0 and len(tensor) else None

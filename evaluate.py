"""What a network is worth and what it costs: accuracy, parameters, multiply-accumulates."""

import contextlib
import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Images
from errors import NeuronMergingError
from trace import CONVS, Graph, NotAUnit, next_norm, put_module

CPU_BATCH = 64


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    images: Images,
    batch_size: int | None = None,
    part: tuple[int, int] = (0, 1),
    share: float = 1.0,
) -> tuple[int, int]:
    """(correct, total) of `model` on `images`; both have to lie on the same device.

    batch_size: 1000, or, for convolutions on a CPU, as many images as leave the activations in its cache.
    `part` = (rank, world size): of several processes each counts its part of the images. `share`: of their sides, at which
    the network is shown them.
    """
    model = fused(model.eval())
    if batch_size is None:
        small = images.labels.device.type == "cpu" and any(isinstance(m, CONVS) for m in model.modules())
        batch_size = CPU_BATCH if small else 1000
    rank, world = part
    pixels, labels = images.pixels[rank::world], images.labels[rank::world]
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    # Silent when not a terminal (disable=None), and gone when done.
    for start in tqdm(range(0, len(labels), batch_size), "evaluate", unit="batch", leave=False, disable=None):
        x = images.normalised(pixels[start : start + batch_size], share).to(dtype(model))
        logits = model(x.contiguous(memory_format=torch.channels_last))
        correct += (logits.argmax(1) == labels[start : start + batch_size]).sum()
    return int(correct), len(labels)


def fused(model: nn.Module) -> nn.Module:
    """A copy of `model` (in evaluation mode) that computes the same with fewer passes over its activations.

    BatchNorms behind a convolution are folded into it. A network that torch.fx cannot trace, or that has none, is returned
    as it is.
    """
    try:
        network = Graph(model)
    except NeuronMergingError:
        return model
    norms = {}
    for node in network.nodes:
        if isinstance(network.module(node), CONVS):
            with contextlib.suppress(NotAUnit):
                network.own(node)
                norms[node.target] = next_norm(network, node)
    if not any(norms.values()):
        return model
    model = copy.deepcopy(model)
    for conv, bn in norms.items():
        if bn:
            put_module(model, conv, fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(bn)))
            put_module(model, bn, nn.Identity())
    return model.to(memory_format=torch.channels_last)


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

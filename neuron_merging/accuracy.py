"""How many of some labelled inputs a network classifies rightly."""

import contextlib
import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from neuron_merging.counting import dtype
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.tracing import CONVS, Graph, NotAUnit, next_norm, put_module

CPU_BATCH = 64


def batch_size(model: nn.Module, device: torch.device) -> int:
    """How many inputs a batch has: 1000; fewer for convolutions on a CPU, so that the activations fit its cache."""
    small = device.type == "cpu" and any(isinstance(m, CONVS) for m in model.modules())
    return CPU_BATCH if small else 1000


@torch.inference_mode()
def count_correct(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], number: int | None = None
) -> tuple[int, int]:
    """(correct, total) of `model` on batches of inputs [B, …] and labels [B], on the network's device.

    number: how many batches there are, for the progress bar. The bar is only shown in a terminal.
    """
    model = fused(model.eval())
    correct, total = 0, 0
    for x, labels in tqdm(batches, "evaluate", number, unit="batch", leave=False, disable=None):
        x = x.to(dtype(model))
        logits = model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
        correct = correct + (logits.argmax(1) == labels.to(logits.device)).sum()
        total += len(labels)
    return int(correct), total


def fused(model: nn.Module) -> nn.Module:
    """A copy of `model` (in evaluation mode) that computes the same with fewer passes over its activations.

    Each BatchNorm directly after a convolution is folded into it. Returns `model` itself if it has no such BatchNorm, or if
    torch.fx cannot trace it.
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

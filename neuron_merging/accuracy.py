"""How many of some labelled inputs a network classifies rightly."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from neuron_merging.running import CONVS, dtype

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

    Each BatchNorm directly after a convolution is folded into it. Returns `model` itself if torch.fx cannot trace it, or where
    folding could change what it computes: hooks, and layers that are called more than once.
    """
    try:
        calls = Counter(node.target for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module")
    except Exception:  # tracing runs the user's forward(), which can raise anything
        return model
    modules = dict(model.named_modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    several = any(count > 1 and next(modules[name].parameters(), None) is not None for name, count in calls.items())
    if hooked or several or not any(isinstance(modules[name], nn.modules.batchnorm._BatchNorm) for name in calls):
        return model
    return fuse(model).to(memory_format=torch.channels_last)

"""What a network is worth and what it costs: accuracy, parameters, multiply-accumulates."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Images


@torch.inference_mode()
def accuracy(
    model: nn.Module, images: Images, batch_size: int = 1000, part: tuple[int, int] = (0, 1), share: float = 1.0
) -> tuple[int, int]:
    """(correct, total) of `model` on `images`; both have to lie on the same device.

    `part` = (rank, world size): of several processes each counts its part of the images. `share`: of their sides, at which
    the network is shown them.
    """
    model.eval()
    rank, world = part
    pixels, labels = images.pixels[rank::world], images.labels[rank::world]
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    # Silent when not a terminal (disable=None), and gone when done.
    for start in tqdm(range(0, len(labels), batch_size), "evaluate", unit="batch", leave=False, disable=None):
        x = images.normalised(pixels[start : start + batch_size], share)
        logits = model(x.contiguous(memory_format=torch.channels_last))
        correct += (logits.argmax(1) == labels[start : start + batch_size]).sum()
    return int(correct), len(labels)


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers: weights, biases, γ and β; no running statistics."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and linear layers for one input of `shape` (without the batch)."""
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2

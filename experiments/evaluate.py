"""Measures the accuracy of a network on one of the data sets."""

import math

from torch import nn

from data import Images
from neuron_merging.accuracy import batch_size as usual_batch_size
from neuron_merging.accuracy import count_correct


def accuracy(
    model: nn.Module,
    images: Images,
    batch_size: int | None = None,
    part: tuple[int, int] = (0, 1),
    share: float = 1.0,
) -> tuple[int, int]:
    """(correct, total) of `model` on `images`. Both have to be on the same device.

    batch_size: None for the usual one. part: (rank, world size); each of several processes counts its part of the images.
    share: the sides of the images are shrunk to it.
    """
    rank, world = part
    images = images[slice(rank, None, world)]
    batch_size = batch_size or usual_batch_size(model, images.labels.device)
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    inputs = ((batch.normalised(batch.pixels, share), batch.labels) for batch in batches)
    return count_correct(model, inputs, math.ceil(len(images) / batch_size))

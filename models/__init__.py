"""The networks of the paper, by name, and their checkpoints."""

from collections.abc import Sequence

from torch import nn

from blocks import drop
from errors import NeuronMergingError
from models.checkpoint import Checkpoint, fit, load_checkpoint, load_weights, save_checkpoint, stored
from models.lenet import LeNet_300_100
from models.resnet import ResNet
from models.vgg import STAGES, VGG
from models.wideresnet import WideResNet
from trace import units

__all__ = ["NETWORKS", "Checkpoint", "build", "fit", "load_checkpoint", "load_weights", "save_checkpoint", "stored"]

NETWORKS = {"LeNet_300_100": LeNet_300_100, "VGG": VGG, "ResNet": ResNet, "WideResNet": WideResNet}


def build(
    arch: str, depth_wide: Sequence[int] = (), num_classes: int = 10, widths: Sequence[int] | None = None
) -> nn.Module:
    """A freshly initialised network of `NETWORKS`.

    `depth_wide`: () for LeNet, (depth,) for VGG and ResNet, (depth, widening factor) for WideResNet.
    `widths`: kept width of every prunable unit in the order of the forward pass, 0 for a block that is left out; the full
    network where None.
    Raises NeuronMergingError for a depth that the family does not have.
    """
    try:
        network = NETWORKS[arch]
    except KeyError:
        raise NeuronMergingError(f"unknown network {arch!r}: choose one of {', '.join(NETWORKS)}") from None
    problem = _wrong_depth(arch, tuple(depth_wide))
    if problem:
        raise NeuronMergingError(
            f"--depth-wide {','.join(map(str, depth_wide)) or '(none)'} does not fit {arch}: {problem}"
        )
    model = network(*depth_wide, num_classes=num_classes, widths=widths and [max(1, width) for width in widths])
    if widths and 0 in widths:
        for unit, width in zip(units(model), widths):
            if width == 0:
                drop(model, unit)
    return model


def _wrong_depth(arch: str, depth_wide: tuple[int, ...]) -> str | None:
    if arch == "LeNet_300_100":
        return "it has none" if depth_wide else None
    if arch == "WideResNet":
        fits = len(depth_wide) == 2 and depth_wide[0] >= 10 and depth_wide[0] % 6 == 4 and depth_wide[1] >= 1
        return None if fits else "give depth,width with depth = 6n + 4, such as 40,4"
    if arch == "ResNet":
        fits = len(depth_wide) == 1 and depth_wide[0] >= 8 and depth_wide[0] % 6 == 2
        return None if fits else "give one depth = 6n + 2, such as 20, 32, 44, 56 or 110"
    if arch == "VGG":
        fits = len(depth_wide) == 1 and depth_wide[0] in STAGES
        return None if fits else f"give one depth of {', '.join(map(str, STAGES))}"
    return None

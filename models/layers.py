"""Parts that the convolutional networks share."""

from torch import nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3 × 3 convolution without a bias, which the BatchNorm behind it has. At stride 1 it keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def initialise(model: nn.Module) -> None:
    """Initialise convolutions by the fan-out (He et al. 2015), and the biases of linear layers with zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

"""LeNet-300-100: three fully connected layers."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet_300_100(nn.Module):
    """784 → 300 → 100 → classes with ReLU between; the input is a 28 × 28 image or 784 numbers.

    `widths`: neurons of ip1 and ip2; None for (300, 100).
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        first, second = widths or (300, 100)
        self.ip1 = nn.Linear(784, first)
        self.ip2 = nn.Linear(first, second)
        self.ip3 = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)  # [B, 784]
        x = F.relu(self.ip1(x))
        x = F.relu(self.ip2(x))
        return self.ip3(x)

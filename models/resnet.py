"""ResNet of depth 6n + 2 for 32 × 32 images (He et al. 2016), with the ReLU at the head of every block."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import conv3x3, initialise

PLANES = (16, 32, 64)


class BasicBlock(nn.Module):
    """x ← ReLU(x); conv1–bn1–ReLU–conv2–bn2 plus the shortcut from the rectified x. `width`: filters of conv1."""

    def __init__(self, inputs: int, planes: int, stride: int, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inputs != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + shortcut


class ResNet(nn.Module):
    """Three stages of (depth − 2) / 6 blocks with 16, 32 and 64 planes, global average pooling, one linear layer.

    `widths`: filters of conv1 in every block, in order (27 for ResNet-56); None for the block's planes.
    """

    def __init__(self, depth: int = 56, num_classes: int = 10, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        left = iter(widths or [planes for planes in PLANES for _ in range(blocks)])
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, planes in enumerate(PLANES, start=1):
            layer = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(BasicBlock(inputs, planes, stride, next(left)))
                inputs = planes
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(F.relu(x), 1)  # [B, 64, 1, 1]
        return self.fc(x.flatten(1))

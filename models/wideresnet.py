"""WideResNet of depth 6n + 4 for 32 × 32 images (Zagoruyko & Komodakis 2016): pre-activation blocks, k times wider."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import conv3x3, initialise

PLANES = (16, 32, 64)


class BasicBlock(nn.Module):
    """bn1–ReLU–conv1–bn2–ReLU–conv2 plus a shortcut: x, or a 1 × 1 convolution of ReLU(bn1(x)). `width`: filters of conv1."""

    def __init__(self, inputs: int, planes: int, stride: int, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, planes)
        self.convShortcut = None
        if inputs != planes:
            self.convShortcut = nn.Conv2d(inputs, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(out) + shortcut


class NetworkBlock(nn.Module):
    """One stage: `layer` is the Sequential of its blocks, the first of which changes width and stride."""

    def __init__(self, inputs: int, planes: int, stride: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                BasicBlock(planes if block else inputs, planes, 1 if block else stride, width)
                for block, width in enumerate(widths)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of (depth − 4) / 6 blocks with 16k, 32k and 64k planes, global average pooling, one linear layer.

    `widths`: filters of conv1 in every block, in order (18 for WRN-40-4); None for the block's planes.
    """

    def __init__(
        self, depth: int = 40, widen: int = 4, num_classes: int = 10, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        planes = [widen * p for p in PLANES]
        widths = list(widths or [p for p in planes for _ in range(blocks)])
        self.conv1 = conv3x3(3, 16)
        self.block1 = NetworkBlock(16, planes[0], 1, widths[:blocks])
        self.block2 = NetworkBlock(planes[0], planes[1], 2, widths[blocks : 2 * blocks])
        self.block3 = NetworkBlock(planes[1], planes[2], 2, widths[2 * blocks :])
        self.bn1 = nn.BatchNorm2d(planes[2])
        self.fc = nn.Linear(planes[2], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1)  # [B, 64k, 1, 1]
        return self.fc(x.flatten(1))

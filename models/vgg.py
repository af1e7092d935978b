"""VGG with BatchNorm for 32 × 32 images (Simonyan & Zisserman 2015, as the CIFAR literature builds it)."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.layers import conv3x3, initialise

STAGES = {  # convolutions in each of the five stages
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
PLANES = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """conv3x3–BatchNorm–ReLU stages with 2 × 2 max pooling between, global average pooling, two linear layers.

    `widths`: filters of every convolution, in order (13 for VGG-16); None for the full widths.
    """

    def __init__(self, depth: int = 16, num_classes: int = 10, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        stages = STAGES[depth]
        left = iter(widths or [planes for planes, count in zip(PLANES, stages) for _ in range(count)])
        layers: list[nn.Module] = []
        width = 3
        for stage, count in enumerate(stages):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                before, width = width, next(left)
                layers += [conv3x3(before, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.feature = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, num_classes)
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.feature(x))  # [B, C, 1, 1]
        return self.classifier(x.flatten(1))

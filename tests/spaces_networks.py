"""Small networks as people write them, for the analysis of their spaces."""

import torch
import torch.nn.functional as F
from torch import nn


class TransposedUNet(nn.Module):
    """With transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm, self.up = nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 2, 2)
        self.c, self.d = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.norm(self.b(F.max_pool2d(a, 2))))
        return self.d(F.relu(self.c(torch.cat([self.up(b), a], 1))))


class CroppedUNet(nn.Module):
    """With bilinear upsampling to x.shape[-2:] and cropping."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.c, self.d = nn.Conv2d(48, 16, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.interpolate(F.relu(self.b(F.max_pool2d(a, 2))), size=a.shape[-2:], mode="bilinear")
        b = torch.cat([b, a], 1)[:, :, 2:-2, 2:-2]
        return self.d(F.relu(self.c(b)))


class Audio(nn.Module):
    """One-dimensional, with a view that has a number in it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 16, 8, 4), nn.Conv1d(16, 32, 8, 4)
        self.norm, self.c = nn.GroupNorm(4, 32), nn.Linear(32 * 14, 10)

    def forward(self, x):
        return {"logits": self.c(self.norm(F.gelu(self.b(F.relu(self.a(x))))).view(-1, 448))}


class Recurrent(nn.Module):
    """An embedding, an LSTM and a linear head."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(50, 24), nn.LSTM(24, 32, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 5)

    def forward(self, ids):
        out, _ = self.lstm(self.table(ids))
        return self.head(out[:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoder."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(8, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


class Pair(nn.Module):
    """Two inputs, a gate, and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(8, 32), nn.Linear(6, 32), nn.Linear(8, 64)
        self.c, self.d, self.slope = nn.Linear(32, 3), nn.Linear(32, 2), nn.PReLU(32)

    def forward(self, x, y, scale=1.0):
        g, h = self.gate(x).chunk(2, 1)
        z = self.slope(self.a(x) * scale) + torch.tanh(self.b(y))
        return self.c(z * torch.sigmoid(g) + F.silu(h)), self.d(z)


class Residual(nn.Module):
    """A residual stream with BatchNorm, a depthwise convolution and squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.expand, self.depthwise = nn.Conv2d(16, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.squeeze, self.excite = nn.Linear(48, 8), nn.Linear(8, 48)
        self.project, self.head = nn.Conv2d(48, 16, 1, bias=False), nn.Linear(16 * 16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.silu(self.depthwise(F.relu6(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        x = x + self.project(y * gate[:, :, None, None])
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


class Grouped(nn.Module):
    """Grouped convolutions, a channel shuffle, and a depthwise convolution with a multiplier."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 48, 3, groups=6, padding=1)
        self.c, self.d = nn.Conv2d(48, 96, 3, groups=48), nn.Conv2d(96, 4, 1)

    def forward(self, x):
        x = self.b(F.relu(self.a(x)))
        B, C, H, W = x.shape
        x = x.view(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)
        return self.d(F.relu(self.c(x)))


class Attention(nn.Module):
    """One block of a transformer with its heads in one matrix, learned positions and a class token."""

    def __init__(self, heads=4, dim=32):
        super().__init__()
        self.heads, self.dim = heads, dim // heads
        self.embed, self.token = nn.Linear(6, dim), nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 8, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down, self.head = nn.Linear(dim, 64), nn.Linear(64, dim), nn.Linear(dim, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.positions
        B, N, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(B, N, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class Dense(nn.Module):
    """Concatenations of concatenations, one of them of the same channels twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 12, 1), nn.Conv2d(28, 10, 1)
        self.norm, self.head = nn.BatchNorm2d(28), nn.Linear(10 * 9, 3)

    def forward(self, x):
        a = self.a(x)
        twice = torch.cat([a, -a], 1)
        x = self.norm(torch.cat([twice, self.b(F.relu(twice))], 1))
        return self.head(F.adaptive_max_pool2d(F.relu(self.c(F.relu(x))), 3).flatten(1))


class Shuffled(nn.Module):
    """Pixel shuffle, padding of channels, and slices of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = F.pixel_shuffle(F.relu(self.a(x)), 2)
        y = self.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.c(torch.cat([y[:, :5], torch.tanh(y[:, 5:])], 1))


class Unknown(nn.Module):
    """An operation that no rule knows: on one of two ways only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(i, o) for i, o in ((4, 16), (16, 16), (16, 16), (16, 2)))

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.d(torch.linalg.matrix_exp(torch.diag_embed(self.b(x))).sum(-1) + torch.relu(self.c(x)))


image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "TransposedUNet": (TransposedUNet, image),
    "CroppedUNet": (CroppedUNet, image),
    "Audio": (Audio, torch.randn(2, 1, 256)),
    "Recurrent": (Recurrent, torch.randint(0, 50, (2, 7))),
    "Encoder": (Encoder, torch.randn(2, 5, 8)),
    "Pair": (Pair, (torch.randn(2, 8), torch.randn(2, 6))),
    "PairByName": (Pair, {"x": torch.randn(2, 8), "y": torch.randn(2, 6)}),
    "Residual": (Residual, image),
    "Grouped": (Grouped, image),
    "Attention": (Attention, torch.randn(2, 7, 6)),
    "Dense": (Dense, image),
    "Shuffled": (Shuffled, image),
    "Unknown": (Unknown, torch.randn(2, 4)),
}

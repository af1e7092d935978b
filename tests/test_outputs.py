"""Outputs that are more than a row for each sample, and forward passes that call more layers in training."""

import pytest
import torch
from torch import nn

from neuron_merging.running import by_sample
from neuron_merging.shrink import shrink


class Network(nn.Module):
    """Two units, and whatever `give` makes of their features."""

    def __init__(self, give):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.register_buffer("anchors", torch.randn(7, 4))
        self.give = give

    def forward(self, x):
        return self.give(self, self.c(self.b(self.a(x).relu()).relu()))


OUTPUTS = {
    "a loss beside": lambda net, y: (y, y.square().mean()),
    "anchors for all": lambda net, y: {"scores": y, "anchors": net.anchors},
    "a mean over the batch": lambda net, y: (y, y.sigmoid().mean(0)),
    "what is no tensor": lambda net, y: (y, None, 3.5, "scores"),
    "places beside samples": lambda net, y: y.permute(0, 2, 3, 1).reshape(-1, 4),
    "a number": lambda net, y: y.mean(),
    "time first": lambda net, y: y.flatten(2).permute(2, 0, 1),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    "told",
    [
        {"compensation": "prune"},
        {"compensation": "restore"},
        {"compensation": "restore", "images": torch.randn(24, 3, 8, 6)},
        {"compensation": "restore", "widths": "auto"},
        {"compensation": "prune", "widths": "quick"},
    ],
    ids=lambda told: " ".join(value if isinstance(value, str) else "images" for value in told.values()),
)
def test_a_network_may_give_anything(name, told):
    model, x = Network(OUTPUTS[name]).eval(), torch.randn(2, 3, 8, 6)
    small, report = shrink(model, 0.5, example_input=x, probe_samples=24, **told)
    shapes = [
        [leaf.shape for leaf in torch.utils._pytree.tree_leaves(net(x)) if torch.is_tensor(leaf)]
        for net in (model, small)
    ]
    assert shapes[0] == shapes[1] and report.params[1] < report.params[0]


def test_what_belongs_to_a_sample_is_put_in_its_row():
    y = torch.randn(5, 4, 2, 3)
    rows = y.flatten(1)
    assert torch.equal(by_sample(y, 5), rows)
    assert torch.equal(by_sample((y, torch.tensor(1.0), torch.randn(7, 4)), 5), rows)  # without a loss and anchors
    assert torch.equal(by_sample(y.movedim(0, 1), 5), rows)
    assert torch.equal(by_sample(y.permute(0, 2, 3, 1).reshape(-1, 4), 5), y.permute(0, 2, 3, 1).reshape(5, -1))
    assert by_sample(torch.tensor(2.0), 5).shape == (1, 1)


class WithHead(nn.Module):
    """A residual stream that an auxiliary head reads in training mode only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.inner, self.out, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        stream = self.stem(x).relu()
        stream = stream + self.branch(stream).relu()
        y = self.out(self.inner(stream).relu())
        return (y, self.head(stream)) if self.training else y


@pytest.mark.parametrize("kind", ["prune", "merge", "restore"])
def test_what_training_reads_too_is_cut_too(kind):
    model, x = WithHead().eval(), torch.randn(2, 3, 8, 8)
    small, report = shrink(model, 0.5, example_input=x, compensation=kind, coupled=True, probe_samples=24)
    assert "head" in report.left_out and small.stem.out_channels == 8
    y, head = small.train()(x)
    assert y.shape == head.shape == (2, 4, 8, 8)
    if kind == "prune":
        kept = [i for i in range(16) if any(torch.equal(model.stem.weight[i], w) for w in small.stem.weight)]
        assert torch.equal(small.head.weight, model.head.weight[:, kept])

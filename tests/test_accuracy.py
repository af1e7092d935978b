"""Evaluation: the faster network that is evaluated computes the same, whatever the size of its batches."""

import copy

import pytest
import torch
from torch import nn

from experiments.evaluate import accuracy
from models import build
from neuron_merging.accuracy import fused
from tests.helpers import images, same, with_statistics

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@pytest.mark.parametrize("arch, depth_wide", [("VGG", (11,)), ("ResNet", (20,)), ("WideResNet", (16, 2))])
def test_the_fused_network_computes_the_same_and_the_original_is_left_as_it_is(arch, depth_wide):
    model = with_statistics(build(arch, depth_wide))
    before = copy.deepcopy(model)
    x = torch.randn(4, 3, 32, 32)
    small = fused(model)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, NORMS) for m in small.modules()) < sum(isinstance(m, NORMS) for m in model.modules())
    assert same(before, model)
    assert str(before) == str(model)


class Shared(nn.Module):
    """One convolution in front of two BatchNorms, and a BatchNorm that reads what something else reads too."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other, self.c = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.other(self.b(self.conv(self.a(self.conv(x)))))
        return (y + self.c(y)).flatten(1)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y.mean((2, 3)) if y.sum() > 0 else y.amax((2, 3))


def test_what_cannot_be_fused_is_evaluated_as_it_is():
    x = torch.randn(4, 3, 32, 32)
    for model in (with_statistics(Shared()), with_statistics(Untraceable())):
        with torch.no_grad():
            assert torch.equal(fused(model)(x), model(x))
    handled = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten()))
    handled[0].register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad():
        assert torch.equal(fused(handled)(x), handled(x))


def test_the_size_of_the_batches_changes_nothing():
    model = with_statistics(build("ResNet", (20,)))
    shown = images("cifar10", 150)
    assert len({accuracy(model, shown, size) for size in (None, 7, 64, 1000)}) == 1
    assert accuracy(model, shown[:0]) == (0, 0)


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_a_network_is_shown_images_of_its_own_precision(precision):
    model, shown = with_statistics(build("ResNet", (8,))), images("cifar10", 150)
    correct, total = accuracy(copy.deepcopy(model).to(precision), shown)
    assert total == 150 and abs(correct - accuracy(model, shown)[0]) <= (0 if precision == torch.float64 else 8)

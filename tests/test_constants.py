"""Neurons that give the same for every input (softly pruned, slimmed, masked) are dropped first, and without loss."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as masks

from neuron_merging.shrink import shrink
from tests.helpers import choose, read, units

KINDS = ("prune", "merge", "merge-derived", "restore")


def network(bn: bool) -> nn.Sequential:
    """Two convolutions, the second without padding, with statistics as they are on data."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(16, momentum=None) if bn else nn.Identity() for _ in range(2)]
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=not bn), norms[0], nn.ReLU(), nn.Conv2d(16, 16, 3, bias=not bn), norms[1],
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    if bn:
        with torch.no_grad():
            model.train()(torch.randn(256, 3, 12, 9))
        for norm in norms:
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0.3, 0.2)
    return model.eval()


def filters_of_zeros(model):
    """As soft pruning leaves them; the statistics are from before."""
    for i in (0, 3):
        model[i].weight[::2] = 0


def filters_and_biases_of_zeros(model):
    filters_of_zeros(model)
    for i in (0, 3):
        model[i].bias[::2] = 0


def small_slimmed(model):
    for i in (1, 4):
        model[i].weight[::2] = 0
        model[i - 1].weight[::2] *= 0.1


def large_slimmed(model):
    """γ = β = 0 behind the largest filters, which every norm would keep."""
    for i in (1, 4):
        model[i].weight[::2] = model[i].bias[::2] = 0
        model[i - 1].weight[::2] *= 3


def masked(model):
    for i in (0, 3):
        masks.ln_structured(model[i], "weight", 0.5, 2, 0)
        masks.remove(model[i], "weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bn", "change"),
    [
        (False, filters_of_zeros),
        (False, filters_and_biases_of_zeros),
        (False, masked),
        (True, filters_of_zeros),
        (True, small_slimmed),
        (True, large_slimmed),
    ],
)
@torch.no_grad()
def test_constant_neurons_are_dropped_without_loss(bn, change, kind):
    model, x = network(bn), torch.randn(64, 3, 12, 9)
    change(model)
    small, report = shrink(model, 0.5, example_input=x[:1], compensation=kind, probe_samples=64)
    assert report.widths == [8, 8]
    assert (small(x) - model(x)).norm() <= 1e-6 * model(x).norm()


@pytest.mark.parametrize("kind", ["prune", "restore"])
@pytest.mark.parametrize(
    "activation", [nn.GELU("tanh"), nn.SiLU(inplace=True), nn.LeakyReLU(0.3), nn.Hardswish(), nn.ELU(0.5)]
)
@torch.no_grad()
def test_any_activation_of_a_constant_is_absorbed(activation, kind):
    model, x = network(True), torch.randn(64, 3, 12, 9)
    model[2] = model[5] = activation
    for i in (1, 4):
        model[i].weight[::2] = 0
        model[i - 1].weight[::2] *= 3
    wanted = model(x.clone())
    small, _ = shrink(model, 0.5, example_input=x[:1], compensation=kind, probe_samples=64)
    assert (small(x.clone()) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_masks_of_torch_are_weights_of_zero(kind, training):
    model, x = network(False), torch.randn(64, 3, 12, 9)
    for i in (0, 3):
        masks.ln_structured(model[i], "weight", 0.5, 2, 0)
    model.train(training)
    names = [*model.state_dict()]
    small, report = shrink(model, 0.5, example_input=x[:1], compensation=kind, probe_samples=64)
    assert report.widths == [8, 8] and small.training == training and [*model.state_dict()] == names
    assert not any("mask" in name for name in small.state_dict())
    assert (small(x) - model(x)).norm() <= 1e-6 * model(x).norm()


@pytest.mark.parametrize("criterion", ["l1-norm", "l2-norm", "l2-GM", "auto"])
@torch.no_grad()
def test_every_criterion_drops_them_first(criterion):
    model, x = network(True), torch.randn(64, 3, 12, 9)
    large_slimmed(model)
    small, _ = shrink(model, 0.5, example_input=x[:1], compensation="prune", criterion=criterion, probe_samples=64)
    assert (small(x) - model(x)).norm() <= 1e-6 * model(x).norm()


@torch.no_grad()
def test_what_a_constant_neuron_gives():
    """relu(β − γ μ / √(v + ε)) of a filter of zeros, relu(β) with γ = 0, relu(bias) without BatchNorm."""
    model = network(True)
    filters_of_zeros(model)
    bn = model[1]
    bn.weight[1] = 0
    constants = read(model, units(model)[0]).constants
    z = (bn.bias - bn.weight * bn.running_mean / (bn.running_var + bn.eps).sqrt()).relu().double()
    z[1] = bn.bias[1].relu()
    assert constants.isnan().tolist() == [i % 2 == 1 and i != 1 for i in range(16)]
    torch.testing.assert_close(constants[~constants.isnan()], z[~constants.isnan()], rtol=1e-6, atol=1e-7)
    assert not set(choose(model, units(model), [7, 8], "l2-norm")[0].tolist()) & {0, 1, 2, 4, 6, 8, 10, 12, 14}


@pytest.mark.parametrize("scale", [0.05, 0.2, 3.0])
@torch.no_grad()
def test_multiples_in_front_of_a_batchnorm_are_restored_exactly(scale):
    """However small: ε is felt by small variances, in the network and on made-up inputs alike."""
    model, x = network(True), torch.randn(64, 3, 12, 9)
    for conv, bn in ((model[0], model[1]), (model[3], model[4])):
        for values, factor in ((conv.weight, scale), (bn.running_mean, scale), (bn.running_var, scale**2)):
            values[8:] = factor * values[:8]
        bn.weight[8:], bn.bias[8:] = bn.weight[:8], bn.bias[:8]
        gain = bn.weight / (bn.running_var + bn.eps).sqrt()
        z = bn.bias - gain * bn.running_mean  # the constant, a multiple too
        bn.bias[8:] += gain[8:] * scale / gain[:8] * z[:8] - z[8:]
    small, _ = shrink(model, 0.5, example_input=x[:1], compensation="restore", probe_samples=64)
    assert (small(x) - model(x)).norm() <= 2e-6 * model(x).norm()

"""Whole networks, all four families: what is lossless, what is the same, what is untouched, what reloads."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from experiments import literal
from models import build
from neuron_merging.checkpoint import load_checkpoint, load_weights, save_checkpoint
from neuron_merging.decompose import COMPENSATIONS, Decomposition, select
from neuron_merging.errors import NeuronMergingError
from neuron_merging.shrink import shrink as shrink_by_name
from tests.conftest import NARROW
from tests.helpers import decompose, example, plant_multiples, rebuild, same, units, widths_of, without_batchnorm


def halves(model: nn.Module) -> list[int]:
    return [n // 2 for n in widths_of(model)]


def shrink(model, widths, criterion, form, t=0.1, lam=0.85):
    found = units(model)
    return rebuild(model, found, decompose(model, found, widths, criterion, form, t=t, lam=lam))


@pytest.mark.parametrize("criterion", ["l1-norm", "l2-norm"])
@pytest.mark.parametrize("batchnorm", [True, False], ids=["batchnorm", "no-batchnorm"])
@torch.no_grad()
def test_positive_multiples_are_lossless_in_the_derived_form(network, batchnorm, criterion):
    model = network if batchnorm else without_batchnorm(network)
    widths = plant_multiples(model)
    x = example(model)
    logits = model(x)
    assert logits.std() > 0.05
    assert torch.allclose(shrink(model, widths, criterion, "merge-derived")(x), logits, atol=1e-4)
    assert (shrink(model, widths, criterion, "prune")(x) - logits).abs().max() > 1e-2
    if any(unit.bn for unit in units(model)):  # the published form is not what follows from BatchNorm
        assert (shrink(model, widths, criterion, "merge")(x) - logits).abs().max() > 1e-2


@pytest.mark.parametrize("form", COMPENSATIONS)
@torch.no_grad()
def test_keeping_all_changes_nothing(network, form):
    x = example(network)
    assert torch.allclose(shrink(network, widths_of(network), "l1-norm", form)(x), network(x), atol=1e-6)


@pytest.mark.parametrize("form", COMPENSATIONS)
def test_the_network_is_left_untouched_and_the_small_one_is_of_its_own(network, form):
    before = copy.deepcopy(network.state_dict())
    found = units(network)
    widths = halves(network)
    small = shrink(network, widths, "l2-norm", form)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(1.0)
    assert same(before, network)
    assert widths_of(small, found) == widths


@pytest.mark.parametrize("form", COMPENSATIONS)
@torch.no_grad()
def test_the_smaller_network_reloads_from_its_checkpoint(network, form, tmp_path):
    widths = halves(network)
    for unit in units(network):
        if unit.bn:  # a constant neuron: its shift has to be absorbed, which gives WideResNet's conv2 a bias
            network.get_submodule(unit.bn).weight[-1] = 0.0
            network.get_submodule(unit.bn).bias[-1] = 0.5
            network.get_submodule(unit.layer).weight[-1] *= 1e-3
    small = shrink(network, widths, "l1-norm", form)
    save_checkpoint(tmp_path / "small.pth.tar", small, widths=widths)
    kind = type(network).__name__
    depth_wide = {arch: depth_wide for arch, depth_wide, _ in NARROW.values()}[kind]
    checkpoint = load_checkpoint(tmp_path / "small.pth.tar")
    again = load_weights(build(kind, depth_wide, widths=checkpoint.widths), checkpoint).eval()
    assert again.state_dict().keys() == small.state_dict().keys()
    if form == "merge-derived" and kind == "WideResNet":
        assert again.block1.layer[0].conv2.bias is not None
    x = example(network)
    assert torch.allclose(again(x), small(x), atol=1e-6)


class Flattened(nn.Module):
    """conv – ReLU – pool – flatten – linear with several inputs per neuron."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 5)

    def forward(self, x):
        return self.fc(torch.max_pool2d(self.conv(x).relu(), 2).flatten(1))


@pytest.mark.parametrize("form", ["prune", "merge"])
def test_absorbing_agrees_with_the_literal_loop(form):
    torch.manual_seed(0)
    for model in (Flattened(), nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))):
        (unit,) = units(model)
        (part,) = decompose(model, [unit], [3], "l1-norm", form)
        small = rebuild(model, [unit], [part])
        expected = literal.absorb(model.get_submodule(unit.next).weight.detach().double().numpy(), part.Z.numpy())
        assert np.allclose(small.get_submodule(unit.next).weight.detach().numpy(), expected, atol=1e-6)
        assert torch.isfinite(small(torch.randn(2, 3, 8, 8))).all()


def test_every_scaling_matrix_depends_on_the_original_weights_only(network):
    found = units(network)
    widths = halves(network)
    together = decompose(network, found, widths, "l2-GM", "merge", t=0.1, lam=0.85)
    for unit, width, part in zip(reversed(found), reversed(widths), reversed(together)):
        (alone,) = decompose(network, [unit], [width], "l2-GM", "merge", t=0.1, lam=0.85)
        assert torch.equal(alone.Z, part.Z)


@torch.no_grad()
def test_a_constant_neuron_moves_into_what_follows():
    """With and without a BatchNorm, and a bias, behind the consumer; 1 × 1 kernels have no borders, so it is exact."""
    for bias in (True, False):
        for norm in (True, False):
            torch.manual_seed(0)
            tail = [nn.BatchNorm2d(4)] if norm else []
            model = nn.Sequential(
                nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=bias), *tail
            )
            model.eval()
            model[1].weight[5], model[1].bias[5] = 0.0, 0.8
            model[0].weight[5] *= 0.01
            x = torch.randn(2, 3, 4, 4)
            for kind in COMPENSATIONS:
                small = shrink(model, [5], "l1-norm", kind)
                assert torch.allclose(small(x), model(x), atol=1e-5)
                assert (small[3].bias is None) == (norm and not bias)


@pytest.mark.parametrize("form", COMPENSATIONS)
@pytest.mark.parametrize("large", [True, False])
@torch.no_grad()
def test_what_decay_left_of_gamma_counts_as_zero(form, large):
    """Such a neuron is dropped first. Its published scale, divided by its γ, would be in the thousands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    model[0].weight[5] *= 10.0 if large else 0.1
    x, found = torch.randn(2, 3, 4, 4), []
    for gamma in (0.0, 1e-8, 1e-4):
        model[1].weight[5] = gamma
        (part,) = decompose(model, units(model), [3], "l2-norm", form, t=0.0)
        assert (5 in part.keep.tolist()) == (large and gamma == 1e-4)
        found.append((part.Z, shrink(model, [3], "l2-norm", form, t=0.0)(x)))
    (Z, y), (Z_left, y_left), (Z_alive, _) = found
    assert torch.equal(Z, Z_left) and torch.allclose(y, y_left, atol=1e-6)
    assert form == "prune" or not torch.equal(Z, Z_alive)
    assert Z[:, 5].count_nonzero() == 0  # nobody stands in for it


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_keep_their_dtype(dtype):
    model = Flattened().to(dtype)
    small = shrink(model, [3], "l2-norm", "merge")
    assert {p.dtype for p in small.parameters()} == {dtype}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_network(network):
    widths = halves(network)
    here = shrink(network, widths, "l2-norm", "merge").state_dict()
    there = shrink(copy.deepcopy(network).cuda(), widths, "l2-norm", "merge").state_dict()
    assert all(torch.allclose(here[name], value.cpu(), atol=1e-5) for name, value in there.items())


@pytest.mark.parametrize("form", COMPENSATIONS)
def test_a_network_in_float64_with_one_output_is_left_untouched(form):
    """Whose next layer is all in one row and needs no cast: nothing has to be copied to be read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    before = copy.deepcopy(model.state_dict())
    rebuild(model, units(model), decompose(model, units(model), [3], "l1-norm", form))
    assert same(before, model)


def test_what_cannot_be_decomposed_is_named():
    model = Flattened()
    (unit,) = units(model)
    with pytest.raises(NeuronMergingError, match="unknown criterion 'l3'"):
        decompose(model, [unit], [3], "l3", "merge")
    with pytest.raises(NeuronMergingError, match="unknown compensation 'glue'"):
        shrink_by_name(model, 0.5, example_input=(3, 8, 8), compensation="glue")
    with pytest.raises(NeuronMergingError, match="0 of 6 neurons cannot be kept in conv"):
        decompose(model, [unit], [0], "l1-norm", "merge")


def test_a_decomposition_written_by_hand_is_rebuilt_as_it_stands():
    """`rebuild` takes any Z and shift, also those that no function of `decompose` makes."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    keep, Z = torch.tensor([0, 2]), torch.tensor([[1, 0.5, 0], [0, 2.0, 1]], dtype=torch.float64)
    shift = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    small = rebuild(model, units(model), [Decomposition(keep, Z, shift)])
    x = torch.randn(5, 4)
    kept = model[0](x)[:, keep].double()
    expected = (kept @ Z + shift) @ model[1].weight.double().T + model[1].bias.double()
    assert torch.allclose(small(x).double(), expected, atol=1e-5)
    assert select(model[0].weight.double(), 2, "l2-norm").shape == (2,)

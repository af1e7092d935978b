"""Restoration: what it must not lose, what it must not touch, the activations and graphs it takes, its probe, its rivals."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge as ScikitRidge
from torch import nn

from data import calibration
from models import build
from neuron_merging import baselines
from neuron_merging import synthetic as probe
from neuron_merging.baselines import lbyl, reestimate
from neuron_merging.config import ShrinkConfig
from neuron_merging.decompose import BatchNorm, Neurons
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.restore import Options
from neuron_merging.restore import restore as restore_spaces
from neuron_merging.restore.adapt import direction
from neuron_merging.restore.batches import Source
from neuron_merging.restore.fitting import Fitting, nearest
from neuron_merging.restore.lockstep import DEFAULT
from neuron_merging.restore.mixing import mixed
from neuron_merging.restore.readers import CLIPS, find_reader
from neuron_merging.restore.regression import Normal, fit
from neuron_merging.shrink import shrink
from tests.helpers import (
    choose,
    decompose,
    example,
    plant_multiples,
    read,
    rebuild,
    restore,
    same,
    shape_of,
    smaller,
    units,
    widths_of,
    with_statistics,
    without_batchnorm,
)

OLD = Options(grid=(1.0,), held=0.0, mixing=False)  # one λ, whether it helps or not
RIVALS = ("lbyl", "fold", "prune-bn", "merge-bn")


def restored(model, shape, widths=None, criterion="l2-norm", samples=64, seed=1, options=DEFAULT):
    found = units(model)
    widths = widths or [n // 2 for n in widths_of(model, found)]
    X = probe.make(model, shape, samples, seed=seed)
    return restore(model, found, choose(model, found, widths, criterion), X, options)


def duplicate(model):
    """Make every neuron of the second half of a unit the twin of one of the first half, which is to be kept."""
    kept = []
    for unit in units(model):
        for module in (model.get_submodule(name) for name in (unit.layer, unit.bn) if name):
            for w in (*module.parameters(recurse=False), *(b for b in module.buffers() if b.ndim)):
                half = len(w) // 2
                w[half : 2 * half] = w[:half]
        N = len(model.get_submodule(unit.layer).weight)
        kept.append(torch.tensor([*range(N // 2), *range(N // 2 * 2, N)]))
    return kept


def distance(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).norm() / a(x).norm())


@torch.no_grad()
def test_keeping_everything_changes_nothing(network):
    small = restored(network, shape_of(network), widths_of(network))
    x = example(network)
    assert torch.allclose(small(x), network(x), atol=1e-4)


@pytest.mark.parametrize("batchnorm", [True, False], ids=["batchnorm", "no-batchnorm"])
@torch.no_grad()
def test_exact_duplicates_are_lossless(network, batchnorm):
    model = copy.deepcopy(network) if batchnorm else without_batchnorm(network)
    kept = duplicate(model)
    x = example(model)
    small = restore(model, units(model), kept, probe.make(model, shape_of(model), 64))
    assert model(x).std() > 0.05
    assert torch.allclose(small(x), model(x), atol=1e-3)


@torch.no_grad()
def test_exact_multiples_without_batchnorm_are_lossless(network):
    model = without_batchnorm(network)
    widths = plant_multiples(model)
    x = example(model)
    assert torch.allclose(restored(model, shape_of(model), widths)(x), model(x), atol=1e-3)


def test_nearer_to_the_original_than_pruning_and_merging(network):
    """On the inputs that the network was normalised for, with random weights: half of every unit's neurons."""
    if type(network).__name__ == "LeNet_300_100":
        pytest.skip("random linear layers without structure: nothing to restore")
    found, x = units(network), example(network, 64)
    widths = [n // 2 for n in widths_of(network, found)]
    kept = choose(network, found, widths, "l2-norm")
    small = restore(network, found, kept, x)
    for kind in ("prune", "merge"):
        rival = rebuild(network, found, decompose(network, found, widths, "l2-norm", kind, t=0.1, lam=0.85))
        assert distance(network, small, x) < 0.8 * distance(network, rival, x)


def test_topology_and_widths_are_those_of_pruning(network):
    found = units(network)
    widths = [n // 2 for n in widths_of(network, found)]
    small = restored(network, shape_of(network), widths)
    pruned = rebuild(network, found, decompose(network, found, widths, "l2-norm", "prune"))
    before, after = pruned.state_dict(), small.state_dict()
    assert {name: w.shape for name, w in before.items()} == {n: w.shape for n, w in after.items() if n in before}
    assert all(name.endswith("conv2.bias") for name in after.keys() - before.keys())  # intercepts without a BatchNorm


def test_the_original_is_left_as_it_was(network):
    network.train()
    before = copy.deepcopy(network.state_dict())
    small = restored(network, shape_of(network))
    assert same(before, network)
    assert all(module.training for module in [*network.modules(), *small.modules()])
    assert all(parameter.requires_grad for parameter in small.parameters())


@torch.no_grad()
def test_the_same_seed_gives_the_same_network(network):
    first, second, third = (restored(network, shape_of(network), seed=seed) for seed in (1, 1, 2))
    x = example(network)
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), third(x))


# ---------------------------------------------------------------- graphs


class Chain(nn.Module):
    """conv–BatchNorm–activation twice, then a linear layer behind a pooled flatten."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=2, dilation=2)
        self.na, self.nb = nn.BatchNorm2d(16), nn.BatchNorm2d(24)
        self.activation, self.fc = activation, nn.Linear(24 * 4, 10)
        with_statistics(self, torch.randn(64, 3, 16, 16), affine=False)

    def forward(self, x):
        x = self.activation(self.nb(self.b(self.activation(self.na(self.a(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.SiLU(), nn.LeakyReLU(0.1), nn.ReLU6(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)],
    ids=lambda a: type(a).__name__ + ("_" if getattr(a, "inplace", False) else ""),
)
def test_any_elementwise_activation(activation):
    model, x = Chain(activation), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = units(model)
    kept = choose(model, found, [8, 12], "l2-norm")
    small = restore(model, found, kept, x)
    pruned = rebuild(model, found, decompose(model, found, [8, 12], "l2-norm", "prune"))
    assert distance(model, small, x) < 0.9 * distance(model, pruned, x)
    assert getattr(small.activation, "inplace", False) == getattr(activation, "inplace", False)
    if not isinstance(activation, nn.ReLU | nn.LeakyReLU):
        with pytest.raises(NeuronMergingError, match=r"prune or restore: a: .* is not positively homogeneous"):
            decompose(model, found, [8, 12], "l2-norm", "merge")


class Late(nn.Module):
    """A residual block as torchvision writes it: the shortcut is computed after the branch, and the sum is in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(12, 10)
        with_statistics(self, torch.randn(64, 3, 8, 8), affine=False)

    def forward(self, x):
        x = self.relu(self.stem(x))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.fc(self.relu(out).mean((2, 3)))


@torch.no_grad()
def test_a_stream_is_known_before_the_branch_that_repairs_it():
    model, x = Late(), torch.randn(32, 3, 8, 8)
    found = units(model)
    small = restore(model, found, [torch.arange(16)], x)
    assert torch.allclose(
        small(x), model(x), atol=1e-5
    )  # nothing dropped: sums in place are computed as they are written
    kept = choose(model, found, [8], "l2-norm")
    pruned = rebuild(model, found, decompose(model, found, [8], "l2-norm", "prune"))
    assert distance(model, restore(model, found, kept, x), x) < 0.8 * distance(model, pruned, x)


def test_what_is_read_after_being_overwritten_is_what_overwrote_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = x * 1.0
            F.relu(x, inplace=True)
            return self.c(self.b(F.relu(self.a(x)))) + x.sum(1, keepdim=True)

    model, x = Net().eval(), torch.randn(16, 8)
    found = units(model)
    small = restore(model, found, [torch.arange(len(model.get_submodule(u.layer).weight)) for u in found], x)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
@torch.no_grad()
def test_networks_that_nobody_here_wrote(name):
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    x = torch.randn(8, 3, 64, 64)
    with_statistics(model, x, affine=False)
    found = units(model)
    assert found
    full = [torch.arange(n) for n in widths_of(model, found)]
    X = probe.make(model, (3, 64, 64), 8)
    assert torch.allclose(restore(model, found, full, X)(x), model(x), atol=1e-3)
    small = restore(model, found, choose(model, found, [max(1, n // 2) for n in widths_of(model, found)], "l1-norm"), X)
    assert torch.isfinite(small(x)).all() and small(x).shape == model(x).shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_come_back_as_they_were(dtype):
    model = Chain(nn.ReLU()).to(dtype)
    small = restored(model, (3, 16, 16))
    assert {w.dtype for w in small.state_dict().values() if w.is_floating_point()} == {dtype}


@torch.no_grad()
def test_of_parallel_filters_the_one_with_the_same_batchnorm_stands_in():
    """1 × 1 filters of one channel are all parallel: the twin is told by what its BatchNorm does."""
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 3, 1, bias=False),
                                          nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)))  # fmt: skip
    for tensor in (model[2].weight, *model[3].parameters(), *model[3].buffers()):
        if tensor.ndim:
            tensor[:2] = tensor[:2].abs()
            tensor[2] = tensor[0].abs()
    x = torch.randn(8, 3, 6, 6)
    for keep in ([0, 1], [1, 2]):
        small = restore(model, units(model), [torch.tensor(keep)], torch.randn(32, 3, 6, 6))
        assert torch.allclose(small(x), model(x), atol=1e-4)


class Pooled(nn.Module):
    """Between the pruned layer and its consumer stand a BatchNorm, an activation, a pool and a flatten that asks for a size."""

    def __init__(self, activation):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation
        self.fc, self.last = nn.Linear(8 * 16, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn(self.conv(x))), 8)
        return self.last(self.fc(x.view(x.size(0), -1)).relu())


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.GELU(), nn.Hardswish()])
@torch.no_grad()
def test_adaptation_lessens_what_the_consumers_lack(activation):
    """Whatever stands between: on the probe itself the outputs come nearer with every step."""
    torch.manual_seed(0)
    model = with_statistics(Pooled(activation))
    found, x = units(model), torch.randn(256, 3, 32, 32)
    with_statistics(model, x, affine=False)  # the probe is what the network was normalised for
    keep = choose(model, found, [4, 3], "l2-norm")
    off = [distance(model, restore(model, found, keep, x, Options(adaptations=n)), x) for n in (0, 1, 2, 4)]
    assert off == sorted(off, reverse=True) and off[-1] < 0.95 * off[0], off


@torch.no_grad()
def test_a_step_of_adaptation_is_the_one_of_its_formula():
    """d and η from an explicit Jacobian, for two linear layers and a tanh."""
    torch.manual_seed(0)
    layer, consumer = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    x, target, s = (torch.randn(*shape, dtype=torch.float64) for shape in ((40, 4), (40, 2), (2,)))
    u = layer(x)
    J = s[:, None] * consumer.weight * (1 - u.tanh() ** 2)[:, None]  # [n, M, P]
    R = s * (target - consumer(u.tanh()))
    R -= R.mean(0)

    def regress(aim):
        A = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(A, aim).solution.T
        return {"weight": solution[:, :4], "bias": solution[:, 4]}

    d = regress(torch.einsum("nmp,nm->np", J, R))
    Jd = torch.einsum("nmp,np->nm", J, x @ d["weight"].T + d["bias"])
    Jd -= Jd.mean(0)
    eta = (R * Jd).sum() / (Jd * Jd).sum()
    move = direction(functional(layer), consumer, torch.tanh, x, target, 1, s, regress)
    torch.testing.assert_close(move, {name: eta * value for name, value in d.items()})
    assert (
        eta > 0
        and direction(functional(layer), consumer, torch.tanh, x, consumer(layer(x).tanh()), 1, s, regress) is None
    )


def functional(layer):
    """A linear layer as a function of what it sees and, if they are others than its own, its parameters."""
    return lambda x, weight=layer.weight, bias=layer.bias: F.linear(x, weight, bias)


class Context(nn.Module):
    """A branch that looks at the whole image, or at all tokens, is added at every place."""

    def __init__(self, images):
        super().__init__()
        layer = (lambda n, m: nn.Conv2d(n, m, 1)) if images else nn.Linear
        self.images, self.first, self.down, self.up, self.last = images, *(layer(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.last(self.first(x).relu())
        places = (2, 3) if self.images else (1,)
        x = x + self.up(self.down(x.mean(places, keepdim=True)).relu())
        return self.fc(x.mean(places))


@pytest.mark.parametrize("images", [True, False])
@torch.no_grad()
def test_what_is_added_at_every_place_is_repaired_on_the_average(images):
    torch.manual_seed(0)
    model, shape = Context(images).eval(), (8, 12, 12) if images else (7, 8)
    found, x = units(model, shape), torch.randn(64, *shape)
    assert {unit.layer for unit in found} == {"first", "down"}
    keep, full = ([torch.arange(n), torch.arange(m)] for n, m in ((4, 6), (8, 8)))  # whole layers would repair nothing
    off = [
        (restore(model, found, keep, x, replace(OLD, repair=repair))(x) - model(x)).norm() for repair in (True, False)
    ]
    assert off[0] < 0.999 * off[1] and torch.allclose(restore(model, found, full, x)(x), model(x), atol=1e-4)


def test_few_images_stand_beside_inputs_that_are_made_up():
    network = find_spaces(Chain(nn.ReLU()), torch.zeros(2, 3, 16, 16)).network
    few, many = (torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) for n in (5, 64))
    config = ShrinkConfig(probe_samples=30)
    sources = [Source(network, config, images) for images in (None, few, many)]
    assert [sum(len(batch[0]) for batch in source()) for source in sources] == [30, 35, 64]
    assert [source.real for source in sources] == [False, False, True]
    last = torch.cat([batch[0] for batch in sources[1]()])[-5:]
    assert all(any(torch.equal(a, b) for b in few) for a in last)  # the last are those that are held out


def test_inputs_that_do_not_fit_are_named():
    model = Chain(nn.ReLU())
    survey = find_spaces(model, torch.zeros(2, 3, 16, 16))
    keep = {survey.spaces[0]: torch.arange(8)}
    with pytest.raises(NeuronMergingError, match="Chain cannot be restored on these inputs: "):
        restore_spaces(survey, keep, [[torch.randn(4, 5, 16, 16)]])


# ---------------------------------------------------------------- the regression


@torch.no_grad()
def test_what_rounding_leaves_over_is_not_fitted():
    """Twins behind which outputs hardly vary: the weights are those of the fold, not bent to fit the last digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    for tensor in model[0].parameters():
        tensor[4:] = tensor[:4]
    model[2].weight *= 1e-3
    model[2].bias += 100
    small = restore(model, units(model), [torch.arange(4)], torch.randn(64, 4))
    assert torch.allclose(small[2].weight, model[2].weight[:, :4] + model[2].weight[:, 4:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [2, 1e4])
@pytest.mark.parametrize("n", [200, 20], ids=["primal", "dual"])
def test_ridge_is_scikit_learns(n, mean):
    """Also of neurons that hardly vary: what they have to tell is in the last digits."""
    random = torch.Generator().manual_seed(0)
    U, R_ = torch.randn(n, 30, generator=random) + mean, torch.randn(n, 5, generator=random)
    R_ -= R_.mean(0)
    ridge = 0.1
    energy = U.var(0, correction=0).double()
    penalty = ridge * energy + 0.1 * ridge * energy.mean() + 1e-10
    scaled = (U.double() / penalty.sqrt()).numpy()  # a penalty per feature is a scaling of the features
    oracle = ScikitRidge(alpha=n, fit_intercept=True).fit(scaled, R_.double().numpy())
    U -= U.mean(0)
    normal = Normal(U[None])
    ours = normal.solve(R_[None], normal.factor(ridge))[0]
    assert np.allclose(ours.numpy(), oracle.coef_ / penalty.sqrt().numpy(), atol=1e-5 if mean == 2 else 1e-4)


LAYERS = [
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, (3, 5), stride=2, padding=(0, 2)), nn.Conv2d(4, 6, 3, dilation=2),
    nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(4, 6, 4, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv1d(4, 6, 5, padding=2, stride=3),
    nn.Conv3d(4, 6, 3, padding=1), nn.Linear(7, 6), nn.Linear(7, 6, bias=False),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@torch.no_grad()
def test_rows_are_what_a_layer_sees_and_gives(layer):
    """Times its weights as a matrix, what a layer sees is what it gives; groups are layers of their own."""
    sides = 2 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    x = (
        torch.randn(2, 4, *[9, 8, 7][:sides])
        if sides != 2 or not isinstance(layer, nn.Linear)
        else torch.randn(2, 5, 7)
    )
    survey = find_spaces(nn.Sequential(layer), x)
    (reader,) = filter(None, (find_reader(survey, node) for node in survey.network.graph.graph.nodes))
    groups, y = getattr(layer, "groups", 1), layer(x)
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
    places = torch.arange(y.numel() // len(layer.weight))
    W = reader.matrix(layer.weight, groups)
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
    computed = reader.seen(x, places, groups) @ W.transpose(1, 2) + bias.view(groups, 1, -1)
    torch.testing.assert_close(computed, reader.given(y, places, groups), atol=1e-5, rtol=1e-4)
    assert torch.equal(reader.as_weight(W, layer.weight), layer.weight)
    assert torch.equal(reader.seen(x, places[3::5], groups), reader.seen(x, places, groups)[:, 3::5])


@pytest.mark.parametrize(
    "switch",
    ["probe_statistics", "repair", "refit", "aware_steps", "adaptations"],
)
def test_every_part_can_be_left_out(switch):
    torch.manual_seed(0)
    model = with_statistics(build("ResNet", (8,)), torch.randn(64, 3, 32, 32), affine=False)
    whole, without = (restored(model, (3, 32, 32), options=o) for o in (OLD, replace(OLD, **{switch: False})))
    x = torch.randn(4, 3, 32, 32)
    assert distance(whole, without, x) > 1e-4
    assert distance(model, without, x) < 1


# ---------------------------------------------------------------- what is fitted, and what is not


def rows(n, features=6, neurons=3, noise=0.0, groups=1, seed=0):
    """What a layer sees, U [G, n, F], what it is to give, T [G, n, M], and the weights [G, M, F], but for noise."""
    random = torch.Generator().manual_seed(seed)
    U, W = (torch.randn(groups, *shape, generator=random) for shape in ((n, features), (neurons, features)))
    return U, U @ W.transpose(1, 2) + noise * torch.randn(groups, n, neurons, generator=random), W


def squares(prediction, target):
    return float((prediction - target).double().pow(2).sum())


GRID = [0.01, 0.1, 1.0, 10.0, float("inf")]


def test_held_out_rows_choose_how_bold_a_fit_is():
    """Much noise on few rows wants a large λ, none a small one; weights that cannot be bettered stay."""
    chosen = []
    for noise in (0.0, 3.0):
        U, T, W = rows(60, 20, noise=noise)
        start = W + 0.3 * torch.randn(W.shape, generator=torch.Generator().manual_seed(5)), torch.zeros(1, 3)
        found = fit(U.clone(), T, start, 20, GRID, squares)
        assert found.after <= found.before and (found.ridge == float("inf")) == (found.solver is None)
        chosen.append(found.ridge)
    assert chosen[0] == GRID[0] < chosen[1]
    U, T, W = rows(60, 20, noise=3.0)
    found = fit(
        U.clone(), T, (W, torch.zeros(1, 3)), 20, GRID, lambda prediction, target: squares(prediction, U[:, 40:] @ W.mT)
    )
    assert torch.equal(found.W, W) and torch.equal(found.b, torch.zeros(1, 3)) and found.after == found.before


def test_without_held_out_rows_the_first_ridge_is_taken():
    U, T, W = rows(400)
    found = fit(U.clone(), T, (torch.zeros_like(W), torch.zeros(1, 3)), 0, [1e-4, 1.0], squares)
    assert found.ridge == 1e-4
    torch.testing.assert_close(found.W, W, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [200, 4], ids=["primal", "dual"])
def test_every_group_is_a_regression_of_its_own(n):
    U, T, W = rows(n, groups=3, noise=0.1)
    start = torch.zeros_like(W), torch.zeros(3, 3)
    together = fit(U.clone(), T, start, 0, [0.1], squares)
    for g in range(3):
        alone = fit(U[g : g + 1].clone(), T[g : g + 1], (start[0][:1], start[1][:1]), 0, [0.1], squares)
        torch.testing.assert_close(together.W[g], alone.W[0])
        torch.testing.assert_close(together.b[g], alone.b[0])


class Separable(nn.Module):
    """An inverted residual block as in MobileNetV2 between two layers; `groups` of the middle convolution."""

    def __init__(self, groups=16, activation=nn.ReLU6):
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.expand = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 1, bias=False)
        self.middle = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False)
        self.project, self.fc = nn.Conv2d(16, 8, 1, bias=False), nn.Linear(8, 5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 16, 16, 8))
        self.activation = activation()
        with_statistics(self, torch.randn(64, 3, 12, 12))

    def forward(self, x):
        x = self.activation(self.norms[0](self.stem(x)))
        y = self.activation(self.norms[1](self.expand(x)))
        y = self.activation(self.norms[2](self.middle(y)))
        return self.fc((x + self.norms[3](self.project(y))).mean((2, 3)))


def dropped(model, ratio, shape=(2, 3, 12, 12)):
    """The survey, and which indices of every space stay when this share is dropped."""
    survey = find_spaces(model, torch.zeros(shape))
    return survey, {space: torch.arange(round(space.size * (1 - ratio))) for space in survey.spaces}


@pytest.mark.parametrize("groups", [16, 4])
@torch.no_grad()
def test_depthwise_and_grouped_convolutions_are_fitted(groups):
    model = Separable(groups)
    survey, keep = dropped(model, 0.25)
    x = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    done = restore_spaces(survey, keep, [[part] for part in x.split(16)])
    assert {"middle.weight", "project.weight", "fc.weight"} <= done.fits.keys() and done.small.own_class
    found = done.fits["middle.weight"]
    assert len(found.W) == done.small.model.middle.groups > 1 and found.after < found.before
    pruned = cut(survey, keep).model
    fresh = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    assert distance(model, done.small.model, fresh) < 0.8 * distance(model, pruned, fresh)


@torch.no_grad()
def test_whole_layers_stay_as_they_are():
    """Bit for bit, with their BatchNorms: only layers that lost something are fitted, and those in front of them moved."""
    model = with_statistics(build("ResNet", (14,)), torch.randn(64, 3, 32, 32))
    small, _ = shrink(model, {"layer2.0.conv1": 0.5}, example_input=(3, 32, 32), probe_samples=32)
    before, after = model.state_dict(), small.state_dict()
    changed = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert {name.rsplit(".", 1)[0] for name in changed} <= {
        f"layer2.0.{name}" for name in ("conv1", "bn1", "conv2", "bn2")
    }
    assert "layer2.0.conv2.weight" in changed and before.keys() == after.keys()


@torch.no_grad()
def test_a_fit_that_errs_more_leaves_everything_as_pruning_has_it(monkeypatch):
    """No weight, bias or BatchNorm changes."""
    model = Chain(nn.ReLU())
    found, x = units(model), torch.randn(48, 3, 16, 16)
    keep = choose(model, found, [8, 12], "l2-norm")
    monkeypatch.setattr(Fitting, "_loss", lambda self, reader, prediction, target: 1.0)
    pruned = rebuild(model, found, decompose(model, found, [8, 12], "l2-norm", "prune"))
    assert same(restore(model, found, keep, x), pruned)


@torch.no_grad()
def test_inputs_that_teach_nothing_do_no_harm():
    """More features than inputs: fitted all the same, a layer would learn the inputs by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)).eval()
    found, x, fresh = units(model), torch.randn(30, 40), torch.randn(500, 40)
    keep = choose(model, found, [160, 160], "l2-norm")
    pruned = distance(model, rebuild(model, found, decompose(model, found, [160, 160], "l2-norm", "prune")), fresh)
    assert distance(model, restore(model, found, keep, x), fresh) < 1.02 * pruned


class Bottleneck(nn.Module):
    """A stream that nothing but a sum and a pool stand in, of which the channels have few directions."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(6)
        self.first, self.inner, self.outer = (nn.Conv2d(n, m, 1, bias=False) for n, m in ((3, 16), (16, 16), (16, 16)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.fc = nn.Linear(16, 5)
        directions = nn.init.orthogonal_(torch.empty(16, rank))
        with torch.no_grad():  # what is written is a combination of few numbers, which the BatchNorms leave as it is
            for conv in (self.first, self.outer):
                conv.weight.copy_((directions @ directions.T @ conv.weight.flatten(1)).view_as(conv.weight))
            with_statistics(self, torch.randn(64, 3, 8, 8), affine=False)
            for norm in (self.norms[0], self.norms[2]):
                norm.weight.copy_((norm.running_var + norm.eps).sqrt())
                norm.bias.copy_(norm.running_mean)

    def forward(self, x):
        x = self.norms[0](self.first(x))
        x = x + self.norms[2](self.outer(F.relu(self.norms[1](self.inner(x)))))
        return self.fc(x.mean((2, 3)))


@torch.no_grad()
def test_another_basis_is_the_same_network():
    model = Bottleneck(4)
    survey = find_spaces(model, torch.zeros(2, 3, 8, 8))
    keep = {space: torch.arange(space.size - 1) for space in survey.spaces}
    parts = [[part] for part in torch.randn(48, 3, 8, 8).split(8)]
    before = copy.deepcopy(model.state_dict())
    other, kept, tensors = mixed(survey, keep, parts)
    x = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(other.network.model(x), model(x), atol=1e-4, rtol=1e-4)
    assert "fc.weight" in tensors and not same(other.network.model, model) and same(before, model)
    assert {space: len(left) for space, left in kept.items()} == {space: len(left) for space, left in keep.items()}


@torch.no_grad()
def test_few_directions_of_a_linear_stream_are_kept_whole():
    """Half of the channels hold all of a stream that has a quarter of the directions; chosen channels do not."""
    model = Bottleneck(4)
    survey = find_spaces(model, torch.zeros(2, 3, 8, 8))
    (stream,) = [space for space in survey.spaces if len(space.writers) == 2]
    keep, parts = {stream: torch.arange(6)}, [[part] for part in torch.randn(96, 3, 8, 8).split(16)]
    fresh = torch.randn(64, 3, 8, 8)
    mixed_, chosen = (
        distance(model, restore_spaces(survey, keep, parts, Options(mixing=mixing)).small.model, fresh)
        for mixing in (True, False)
    )
    assert mixed_ < 0.02 and mixed_ < 0.5 * chosen


def test_targets_know_where_an_activation_clips():
    """Beyond a bound every value does as well: the one nearest to what a layer gives is aimed at."""
    low, high = CLIPS["relu6"]
    z, target = torch.tensor([-3.0, 2.0, 9.0, 2.0, -1.0]), torch.tensor([-1.0, -1.0, 7.0, 7.0, 3.0])
    assert nearest(z, target, low, high).tolist() == [-3.0, 0.0, 9.0, 6.0, 3.0]
    assert nearest(z, target, 0.0, float("inf")).tolist() == [-3.0, 0.0, 7.0, 7.0, 3.0]


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Hardtanh(-0.5, 0.5)])
@torch.no_grad()
def test_clips_are_used_in_the_target(activation):
    model, x = Chain(activation), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    survey = find_spaces(model, x[:2])
    clips = [reader.clip for node in survey.network.graph.graph.nodes if (reader := find_reader(survey, node))]
    assert clips == [(activation.min_val, activation.max_val)] * 2 + [None]
    found = units(model)
    kept = choose(model, found, [8, 12], "l2-norm")
    fresh = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    aware, plain = (distance(model, restore(model, found, kept, x, replace(OLD, aware_steps=n)), fresh) for n in (2, 0))
    assert aware < plain


# ---------------------------------------------------------------- probes and calibration


def test_pink_noise_has_the_spectrum_of_photographs():
    x = probe.pink(64, (3, 32, 32), torch.Generator().manual_seed(0))
    assert x.shape == (64, 3, 32, 32)
    assert torch.allclose(x.std(dim=(0, 2, 3)), torch.full((3,), probe.PINK), atol=1e-3)
    power = torch.fft.rfft2(x).abs().mean((0, 1))
    assert power[0, 2] > 2.5 * power[0, 8] > 0
    between = np.corrcoef(x[:, 0].flatten(), x[:, 1].flatten())[0, 1]
    assert 0.8 < between < 0.97


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 20), (2, 256), (1, 12, 12, 12)])
def test_dead_leaves_have_flat_parts_and_edges_at_every_scale(shape):
    """Most neighbours are equal, the others further apart than in noise of the same colours; fewer are equal further away."""
    noise, x, again = (kind(64, shape, torch.Generator().manual_seed(0)) for kind in (probe.pink, *2 * [probe.leaves]))
    assert x.shape == (64, *shape) and x.is_contiguous() and torch.equal(x, again)
    assert torch.allclose(x.std(dim=(0, *range(2, x.ndim))), torch.full(shape[:1], probe.PINK), atol=1e-3)
    if shape[0] > 1:
        assert 0.8 < np.corrcoef(x[:, 0].flatten(), x[:, 1].flatten())[0, 1] < 0.97
    steps, of_noise = (abs(made[..., 1:] - made[..., :-1]) for made in (x, noise))
    assert (steps == 0).float().mean() > 0.5 and (of_noise == 0).float().mean() < 0.01
    assert steps[steps > 0].median() > 1.1 * of_noise.median()
    far = [(x[..., d:] == x[..., :-d]).float().mean() for d in (1, shape[-1] // 4, shape[-1] // 2)]
    assert far[0] > 1.3 * far[1] > 1.6 * far[2] > 0.05
    assert sum(len(sample[0].unique()) > 1 for sample in x) > 48


def test_the_class_step_raises_a_class(network):
    """The added direction is of the stated length and raises the class that was drawn; noise of that length does not."""
    shape = shape_of(network)
    noise, moved = (probe.make(network, shape, 32, step=step) for step in (0, 0.4))
    step = moved - noise
    rms = step.flatten(1).pow(2).mean(1).sqrt()
    assert torch.allclose(rms, 0.4 * noise.std().expand(32), rtol=1e-3)
    draw = torch.Generator().manual_seed(1)
    linear = shape[0] == 1
    assert torch.equal(probe.PROBES["white" if linear else "leaves"](32, shape, draw), noise)
    drawn = torch.randint(0, 10, (32, 1), generator=draw)
    by_chance = torch.randn(step.shape, generator=draw)
    by_chance *= 0.4 * noise.std() / by_chance.flatten(1).pow(2).mean(1).sqrt().view(-1, 1, 1, 1)
    model = copy.deepcopy(network).requires_grad_(False)
    for module in model.modules():  # as the step was made: with statistics of the noise itself
        module.train(isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    before, after, other = (model(x).gather(1, drawn).mean() for x in (noise, moved, noise + by_chance))
    assert after - before > 3 * (other - before).abs() > 0


def test_the_probe_chooses_itself(network):
    shape = shape_of(network)
    made = probe.make(network, shape)
    linear = len(shape_of(network)) == 3 and shape[0] == 1
    assert len(made) == (4096 if linear else 256)
    assert torch.equal(made, probe.make(network, shape, kind="white" if linear else "leaves"))
    with pytest.raises(NeuronMergingError, match="unknown --probe 'brown'"):
        probe.make(network, shape, kind="brown")


def test_images_for_a_network_without_batchnorm_are_of_any_contrast():
    """It says nothing of the scale of its inputs; and it takes no class step."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    made = probe.make(plain, (3, 8, 8), 256)
    contrast = (made - made.mean((2, 3), keepdim=True)).flatten(1).std(1)
    low, high = probe.CONTRASTS
    assert contrast.min() < 1.5 * low and contrast.max() > 0.7 * high and made.mean((1, 2, 3)).std() > 0.1
    assert torch.equal(made, probe.make(plain, (3, 8, 8), 256, step=0))
    normed = nn.Sequential(plain[0], nn.BatchNorm2d(4), *plain[1:])
    assert torch.equal(
        probe.make(normed, (3, 8, 8), 64, step=0), probe.leaves(64, (3, 8, 8), torch.Generator().manual_seed(1))
    )


def test_sounds_have_a_pitch_and_no_class_step():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 9), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    made = probe.make(model, (2, 512), 64)
    assert torch.equal(made, probe.make(model, (2, 512), 64, kind="tones", step=0))
    torch.testing.assert_close(made.mean(2), torch.zeros(64, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.std(2), torch.ones(64, 2), atol=1e-3, rtol=0)

    def peak(x):
        return (torch.fft.rfft(x).abs().pow(2).amax(-1) / torch.fft.rfft(x).abs().pow(2).sum(-1)).median()

    assert peak(made) > 5 * peak(torch.randn(64, 2, 512))
    short = probe.make(model, (2, 32), 8, step=0)  # too short for a pitch
    assert torch.equal(short, probe.white(8, (2, 32), torch.Generator().manual_seed(1)))


def test_raw_sounds_can_be_made_up():
    """[batch, samples], which the network gives a channel itself: no image, although there is a BatchNorm."""
    layers = nn.Conv1d(1, 8, 9, stride=4), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 256)), *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    small, report = shrink(model, 0.5, example_input=(256,), probe_samples=32)
    assert report.widths == [4, 3] and small(torch.randn(2, 256)).shape == (2, 3)


def test_one_output_takes_no_class_step():
    """It would move every sample the same way."""
    for outputs in (1, 2):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))
        assert torch.equal(probe.make(model, (8,), 16), probe.make(model, (8,), 16, step=0)) == (outputs == 1)


def test_a_network_that_is_constant_has_no_class_direction():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    assert torch.equal(probe.make(model, (4,), 8), probe.make(model, (4,), 8, step=0))


def test_a_probe_of_a_shape_that_the_network_does_not_take_is_refused():
    with pytest.raises(NeuronMergingError, match=r"ResNet does not take inputs of shape \[4, 32, 32\]"):
        probe.make(build("ResNet", (8,)), (4, 32, 32))


def test_calibration_reads_a_folder_of_images(tmp_path):
    from torchvision.transforms.functional import to_pil_image

    for i in range(3):
        to_pil_image(torch.full((3, 40, 50), 40 * i, dtype=torch.uint8)).save(tmp_path / f"{i}.png")
    images = calibration(str(tmp_path), "cifar10", tmp_path)
    assert images.pixels.shape == (3, 3, 32, 32)
    assert sorted(images.pixels[:, 0, 0, 0].tolist()) == [0, 40, 80]
    assert len(calibration(f"{tmp_path}:2", "cifar10", tmp_path)) == 2
    with pytest.raises(NeuronMergingError, match="there are only 3 images"):
        calibration(f"{tmp_path}:4", "cifar10", tmp_path)
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(NeuronMergingError, match="a file is no image"):
        calibration(str(tmp_path), "cifar10", tmp_path)
    with pytest.raises(NeuronMergingError, match="there is no folder"):
        calibration(str(tmp_path / "nothing"), "cifar10", tmp_path)


# ---------------------------------------------------------------- rivals


@pytest.mark.parametrize("kind", RIVALS)
@torch.no_grad()
def test_rivals_give_the_same_topology(network, kind):
    found, x = units(network), example(network, 64)
    keep = choose(network, found, [n // 2 for n in widths_of(network, found)], "l2-norm")
    small = smaller(kind, network, found, keep, shape_of(network), images=x)
    pruned = smaller("prune", network, found, keep)
    assert {n: w.shape for n, w in small.state_dict().items()} == {n: w.shape for n, w in pruned.state_dict().items()}
    assert torch.isfinite(small(x)).all()


@torch.no_grad()
def test_lbyl_is_exact_for_combinations_of_kept_filters_without_an_activation(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].weight[3:] = torch.randn(2, 3) @ model[0].weight[:3]
    model[0].bias[3:] = torch.linalg.lstsq(model[0].weight[:3].T, model[0].weight[3:].T)[0].T @ model[0].bias[:3]
    found = units(model)
    monkeypatch.setattr(baselines, "LBYL_RIDGE", 0.0)
    part = lbyl(read(model, found[0]), torch.arange(3))
    x = torch.randn(8, 6)
    assert torch.allclose(rebuild(model, found, [part])(x), model(x), atol=1e-4)


@torch.no_grad()
def test_lbyl_gives_no_part_to_a_filter_that_its_batchnorm_makes_nothing_of():
    W = torch.tensor([[1.0, 0.0], [0.9, 0.1], [2.0, 0.0]], dtype=torch.float64)
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    bn = BatchNorm(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), zeros, zeros, ones, 0.0)
    part = lbyl(Neurons(W, bn, relu=True), torch.arange(2))
    assert part.Z[0, 2] == 0 and part.Z[1, 2] > 1.5  # the third is twice the first, and nearly twice the second


def test_no_batch_is_of_one_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)).eval()
    assert torch.isfinite(probe.make(model, (3, 8, 8), probe.CHUNK + 1)).all()
    assert reestimate(model, torch.randn(9, 3, 8, 8), batch_size=4)[3].num_batches_tracked == 3


def fold(model, found, widths, shape=None):
    return smaller("fold", model, found, [torch.arange(P) for P in widths], shape)


@torch.no_grad()
def test_folding_equal_filters_is_lossless(network):
    model = copy.deepcopy(network)
    widths = [len(kept) for kept in duplicate(model)]
    found = units(model)
    x = example(model)
    assert torch.allclose(fold(model, found, widths)(x), model(x), atol=1e-3)


@torch.no_grad()
def test_a_fold_is_the_centroid_with_the_variance_of_its_members():
    """Two filters as their BatchNorm scales them, (2, 0) and (0.6, 0.8), in one cluster."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 1)).eval()
    gain = torch.tensor([4.0, 0.5])
    model[0].weight.copy_((torch.tensor([[2, 0], [0.6, 0.8]]) / gain[:, None]).view(2, 2, 1, 1))
    model[0].bias.copy_(torch.tensor([0.3, -0.2]))
    model[1].running_mean.copy_(torch.tensor([0.5, 1.0]))
    model[1].running_var.copy_(torch.tensor([0.25, 4.0]) - model[1].eps)
    model[1].weight.copy_(torch.tensor([2.0, 1.0]))
    model[1].bias.copy_(torch.tensor([0.1, 0.7]))
    small, x = fold(model, units(model), [1]), torch.randn(4, 2, 3, 3)
    repair = 2 / (2 + 2 * 0.6) ** 0.5
    mean = (4 * (0.5 - 0.3) + 0.5 * (1.0 + 0.2)) / 2
    one = repair * (1.3 * x[:, :1] + 0.4 * x[:, 1:] - mean) + (0.1 + 0.7) / 2
    assert torch.allclose(small[:2](x), one, atol=1e-5)
    assert torch.allclose(small(x), model[3](one.relu().expand(-1, 2, -1, -1)), atol=1e-5)
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    small = fold(plain, units(plain), [1])
    assert torch.allclose(small[0].weight, plain[0].weight.mean(0)) and small[0].bias == plain[0].bias.mean()


@torch.no_grad()
def test_reestimation_measures_the_images_it_is_given():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    x = torch.randn(256, 3, 4, 4) * 3 + 1
    again = reestimate(model.eval(), x)
    assert not any(module.training for module in again.modules())
    assert all(module.training for module in reestimate(copy.deepcopy(model).train(), x).modules())
    assert torch.allclose(again[1].running_mean, again[0](x).mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(again[1].running_var, again[0](x).var((0, 2, 3)), rtol=0.05)

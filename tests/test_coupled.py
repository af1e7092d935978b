"""Coupled channels: what is found, what is alike, what stays whole and why, what reloads; in published and odd networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build
from neuron_merging.alike import scaling_matrices
from neuron_merging.checkpoint import fit, load_checkpoint, load_weights, save_checkpoint
from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.errors import NeuronMergingError
from neuron_merging.plan import prunable
from neuron_merging.shrink import shrink, summarize
from tests.helpers import example, same, shape_of, smaller, surveyed, with_statistics


class Dense(nn.Module):
    """Concatenation, a depthwise convolution, a gate, a mean, a second input of a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm, self.c = nn.BatchNorm2d(14), nn.Conv2d(14, 12, 1)
        self.depth, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.gate, self.back = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.a(x)
        x = torch.cat([F.relu(x), self.b(F.relu(x))], 1)
        x = F.relu(self.norm2(self.depth(self.c(F.relu(self.norm(x))))))
        x = x + self.back(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.fc(x.mean([2, 3]))


def dense():
    torch.manual_seed(0)
    return with_statistics(Dense(), torch.randn(32, 3, 12, 12))


def spaces(model, shape=(3, 12, 12)):
    """By name all spaces of a network, and the network as its graph has it."""
    survey = surveyed(model, shape)
    return {space.name: space for space in survey.spaces}, survey.network


def test_the_published_networks_lose_channels_in_every_layer_but_the_last(network):
    found, left_out = prunable(surveyed(network, shape_of(network)), coupled=True)
    assert list(left_out.values()) == ["it is an output of the network"]
    shared = [space.layer for space in found if space.unit is None]
    assert shared == {"LeNet_300_100": [], "VGG": ["classifier.0"]}.get(type(network).__name__, shared)
    assert bool(shared) == (type(network).__name__ != "LeNet_300_100")


@pytest.mark.parametrize("kind", ["prune", "merge", "merge-derived", "restore"])
@torch.no_grad()
def test_coupled_networks_run_and_are_smaller(network, kind):
    before, x = copy.deepcopy(network.state_dict()), example(network)
    small, report = shrink(
        network, 0.5, example_input=shape_of(network), compensation=kind, coupled=True, probe_samples=24
    )
    assert small(x).shape == network(x).shape
    assert report.params[1] == count_parameters(small) < 0.6 * report.params[0]
    assert report.macs[1] == count_macs(small, shape_of(network)) < 0.6 * report.macs[0]
    assert same(before, network)


@torch.no_grad()
def test_concatenations_gates_and_depthwise_convolutions():
    model, x = dense(), torch.randn(4, 3, 12, 12)
    survey = surveyed(model, (3, 12, 12))
    assert survey.left_out == {"fc": "it is an output of the network"}
    found = {space.name: space for space in survey.spaces}
    assert found["c"].modules == ("c", "gate", "back", "depth")
    (reader,) = [place for place in found["b"].readers if place.name == "c.weight"]
    assert reader.positions(found["b"].leaf).flatten().tolist() == list(range(8, 14))
    assert found["a"].obstacle is None and found["c"].obstacle == "sigmoid is not positively homogeneous"
    small, report = shrink(model, 0.5, example_input=x, compensation="restore", coupled=True, probe_samples=64)
    pruned, _ = shrink(model, 0.5, example_input=x, compensation="prune", coupled=True)
    assert small.depth.groups == small.norm2.num_features == 6 and report.note is None
    assert (small(x) - model(x)).norm() < (pruned(x) - model(x)).norm()
    _, report = shrink(model, 0.5, example_input=x, compensation="merge", coupled=True)
    assert "only pruned, as a merge does not pass: c: sigmoid is not positively homogeneous" in report.note
    pruned, _ = shrink(model, 0.3, example_input=x, compensation="prune", coupled=True, ignore=["gate"])
    assert pruned(x).shape == (4, 5) and pruned.c.out_channels == 12 and pruned.b.out_channels == 4


@torch.no_grad()
def test_keeping_everything_changes_nothing():
    model, x = dense(), torch.randn(4, 3, 12, 12)
    for kind in ("prune", "restore"):
        small, _ = shrink(model, 0.0, example_input=(3, 12, 12), compensation=kind, coupled=True, probe_samples=64)
        assert torch.allclose(small(x), model(x), atol=1e-4)


class Separable(nn.Module):
    """A depthwise convolution between two others, each with a BatchNorm, as in MobileNet. more: layers that read it too."""

    def __init__(self, bias=False, more=0):
        super().__init__()
        self.a, self.depth = nn.Conv2d(3, 6, 1, bias=bias), nn.Conv2d(6, 6, 3, groups=6, bias=bias)
        self.norm, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.b, self.fc = nn.Conv2d(6, 8, 1), nn.Linear(8, 5)
        self.more = nn.ModuleList(nn.Conv2d(6, 8, 1) for _ in range(more))

    def forward(self, x):
        x = F.relu(self.norm2(self.depth(F.relu(self.norm(self.a(x))))))
        return self.fc(sum((F.relu(read(x)) for read in self.more), F.relu(self.b(x))).mean((2, 3)))


def alike(model, keep, t):
    """By reader, the matrix that it absorbs for the channels of `a`."""
    found, network = spaces(model)
    return scaling_matrices(network, found["a"], keep, t=t)


def separable(**options):
    torch.manual_seed(0)
    return with_statistics(Separable(**options))


def twin_norms(model):
    """The second channel of a Separable becomes the first one's twin in its BatchNorms."""
    for bn in (model.norm, model.norm2):
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor[1] = tensor[0]


@torch.no_grad()
def test_two_opposites_do_not_make_one_alike():
    """A channel written with the opposite weights and filtered with the opposite filter is nobody's partner behind a ReLU."""
    model = separable()
    model.a.weight[1], model.depth.weight[1] = -model.a.weight[0], -model.depth.weight[0]
    twin_norms(model)
    keep = torch.tensor([0, 2, 3, 4, 5])
    (Z,) = alike(model, keep, t=0.0001)
    assert Z[0, 1] == 0


@torch.no_grad()
def test_constants_on_the_way_to_a_reader_count():
    """Of two channels with the same weights the one with the same constants is the partner; multiples in both are lossless."""
    model, x = separable(), torch.randn(4, 3, 12, 12)
    for i, times in ((1, 1.0), (2, 2.0)):  # three times the same channel, the third doubled
        model.a.weight[i], model.depth.weight[i] = times * model.a.weight[0], model.depth.weight[0]
        for bn in (model.norm, model.norm2):
            bn.weight[i], bn.bias[i], bn.running_var[i] = bn.weight[0], times * bn.bias[0], bn.running_var[0]
            bn.running_mean[i] = times * bn.running_mean[0]
    model.norm.bias[1] += 3.0  # the second has another constant
    keep = torch.tensor([1, 2, 3, 4, 5])
    (Z,) = alike(model, keep, t=0.1)
    assert Z[0, 0] == 0 and torch.isclose(Z[1, 0], Z.new_tensor(0.5))
    small = smaller("merge", model, [spaces(model)[0]["a"]], [keep], (3, 12, 12), threshold=0.99)
    assert torch.allclose(small(x), model(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "harm",
    ["constants that cancel", "gains that cancel", "a bias that is no multiple"],
)
def test_channels_that_differ_between_two_followers_are_not_alike(harm):
    """ReLUs stand between the followers: what comes out in the end the same is not the same on the way."""
    model = separable(bias=True)
    for layer in (model.a, model.depth):
        layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
    twin_norms(model)
    keep = torch.tensor([0, 2, 3, 4, 5])
    assert alike(model, keep, t=0.99)[0][0, 1] == 1
    if harm == "constants that cancel":
        model.norm.bias[1] -= 3
        model.norm2.running_mean[1] -= 3 * model.depth.weight[1].norm()
    elif harm == "gains that cancel":
        model.norm.weight[1] *= -1
        model.norm2.weight[1] *= -1
    else:
        model.norm.weight[1] *= 2
        model.norm.bias[1] *= 2
        model.depth.bias[1] = model.depth.bias[0] = 2.0
    assert alike(model, keep, t=0.99)[0][0, 1] == 0


@torch.no_grad()
def test_one_reader_that_hardly_looks_does_not_harm_the_others():
    """A BatchNorm of γ = 1e-4 and β = 0.5 in front of one of two readers."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n1, self.n2 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.r1, self.r2, self.fc = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            x = self.a(x)
            return self.fc((self.r1(self.n1(x).relu()) + self.r2(self.n2(x).relu())).mean((2, 3)))

    torch.manual_seed(0)
    model = with_statistics(Two())
    model.n1.weight[1], model.n1.bias[:2] = 1e-4, 0.5
    for Z in alike(model, torch.tensor([0, 2, 3, 4, 5]), t=0.0001):
        assert Z.max() < 10


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 4])
def test_a_filter_counts_once_however_many_read(more):
    model = separable(more=more)
    model.a.weight[1] = model.a.weight[0]
    twin_norms(model)
    first = model.depth.weight[0] = F.normalize(model.depth.weight[0], dim=(1, 2))
    across = torch.randn_like(first)
    across -= (across * first).sum() * first
    model.depth.weight[1] = 0.8 * first + 0.6 * across / across.norm()  # a cosine of 0.8
    for t, wanted in ((0.79, 1), (0.81, 0)):
        for Z in alike(model, torch.tensor([0, 2, 3, 4, 5]), t=t):
            assert Z[0, 1].round(decimals=6) == wanted


@torch.no_grad()
def test_a_layer_that_follows_can_be_ignored():
    _, report = shrink(separable(), 0.5, compensation="prune", coupled=True, ignore=["depth"])
    assert "it is ignored" in report.left_out["depth"] and "it is ignored" in report.left_out["a"]
    assert [unit.layer for unit in report.units] == ["b"]


@torch.no_grad()
def test_what_follows_two_layers_is_not_whole_where_one_is_ignored():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.depth, self.c = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.c(self.depth(torch.cat([self.a(x), self.b(x)], 1).relu()).relu())

    small, report = shrink(Net(), 0.5, compensation="prune", coupled=True, ignore=["a"])
    assert small.depth.groups == 6 and "a" in report.left_out and "depth" not in report.left_out


class Normed(nn.Module):
    """Two sums of concatenations, each behind a BatchNorm of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 6, 3, padding=1) for _ in range(4))
        self.first, self.second, self.fc = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x):
        y = self.first(torch.cat([self.a(x), self.b(x)], 1)) + self.second(torch.cat([self.c(x), self.d(x)], 1))
        return self.fc(y.relu().mean((2, 3)))


@torch.no_grad()
def test_batchnorms_over_concatenations_are_part_of_what_is_written():
    torch.manual_seed(0)
    model = with_statistics(Normed())
    survey = surveyed(model, (3, 32, 32))
    assert [space.modules for space in survey.spaces] == [("a", "c"), ("b", "d")]
    for layer in (model.a, model.b, model.c, model.d, model.first, model.second):
        for tensor in layer.state_dict().values():
            if tensor.ndim:
                tensor[1::6] = tensor[0::6]  # twins
    x, keep = torch.randn(4, 3, 32, 32), [torch.tensor([0, 2, 3, 4, 5])] * 2
    for kind in ("merge", "restore"):
        small = smaller(kind, model, survey.spaces, keep, (3, 32, 32), threshold=0.999, probe_samples=16)
        assert torch.allclose(small(x), model(x), atol=2e-3), kind
        assert small.first.num_features == 10


@torch.no_grad()
def test_what_is_summed_in_two_ways_is_not_merged():
    """Channels that are alike behind a BatchNorm need not be alike in front of it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
            self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)

        def forward(self, x):
            h = self.a(x)
            s = h + self.b(x)
            return self.fc((self.norm(h) + self.c(s)).mean((2, 3)))

    assert spaces(Twice())[0]["a"].obstacle == "a.weight is summed in two ways"


def test_what_stays_whole_says_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
            self.grouped, self.fc = nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 2)

        def forward(self, x):
            y = x + self.a(x)  # the input cannot lose channels
            y = self.grouped(self.b(y)) + torch.roll(self.c(y), 1, 1)
            return self.fc(y.mean((2, 3)))

    survey = surveyed(Net(), (4, 8, 8))
    assert survey.left_out == {
        "a": "add ties it to something whose size is fixed", "c": "it goes through roll",
        "grouped": "it goes through roll", "fc": "it is an output of the network",
    }  # fmt: skip
    assert [(space.name, space.size) for space in survey.spaces] == [("b", 2)]  # a channel of each group
    assert "a stays whole" in summarize(Net(), coupled=True)


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors"])
@torch.no_grad()
def test_a_coupled_network_reloads_into_the_original_code(tmp_path, ending, network):
    small, report = shrink(network, 0.4, compensation="prune", coupled=True)
    path = tmp_path / f"small{ending}"
    save_checkpoint(path, small, widths=report.widths, coupled=True)
    checkpoint = load_checkpoint(path)
    assert checkpoint.about == {"widths": report.widths, "coupled": True}
    again = load_weights(fit(copy.deepcopy(network), checkpoint.state_dict), checkpoint).eval()
    assert torch.equal(again(example(network)), small(example(network)))


def test_what_does_not_go_together_is_said():
    model = build("ResNet", (8,))
    for kind in ("lbyl", "fold"):
        with pytest.raises(NeuronMergingError, match=f"{kind} has no form for coupled channels"):
            shrink(model, 0.5, compensation=kind, coupled=True)
    with pytest.raises(NeuronMergingError, match="0 of 16 neurons cannot be kept in conv1"):
        shrink(model, [0] + [8] * 5, coupled=True, compensation="prune")


def test_coupled_on_the_command_line(cli, tmp_path):
    options = ("--arch", "ResNet", "--depth-wide", "8", "--summary")
    plain, coupled = cli(*options), cli(*options, "--coupled")
    assert plain.code == coupled.code == 0
    assert "conv1 stays whole" in plain.out and "conv1 and 1 more" in coupled.out

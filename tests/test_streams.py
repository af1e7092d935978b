"""Coupled channels: what is found, what is lossless, what stays whole and why, what reloads; in published and odd networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import zoo
from experiments.zoo import plant
from models import build
from neuron_merging.checkpoint import fit, load_checkpoint, load_weights, save_checkpoint
from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.coupled import scaling_matrices
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.streams import Stream, streams
from neuron_merging.shrink import prunable, select, shrink, summarize
from tests.helpers import example, restore, same, shape_of, smaller, with_statistics


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


def test_the_published_networks_lose_channels_in_every_layer_but_the_last(network):
    found, left_out = prunable(network, coupled=True)
    assert list(left_out.values()) == ["its output is an output of the network"]
    shared = [unit.layer for unit in found if isinstance(unit, Stream)]
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


@pytest.mark.parametrize("kind", ["merge", "restore"])
@torch.no_grad()
def test_twins_are_merged_without_loss(network, kind):
    found, _ = prunable(network, coupled=True)
    keep = plant(network, found)
    x = example(network)
    small = smaller(
        kind, network, found, keep, shape_of(network), threshold=0.1, lamda=1.0, images=example(network, 32)
    )
    assert torch.allclose(small(x), network(x), atol=2e-3 * float(network(x).abs().max()))


@torch.no_grad()
def test_concatenations_gates_and_depthwise_convolutions():
    model, x = dense(), torch.randn(4, 3, 12, 12)
    found, left_out = prunable(model, coupled=True)
    assert left_out == {"fc": "its output is an output of the network"}
    by_name = {unit.layer: unit for unit in found}
    assert set(by_name["c"].writers) == {"c", "back", "gate"}
    assert by_name["b"].readers[0].offset == 8 and by_name["b"].readers[0].channels == 14
    assert by_name["c"].obstacle == "its output goes through mul"
    keep = plant(model, found)
    small = restore(model, found, keep, x.repeat(16, 1, 1, 1) + 0.3 * torch.randn(64, 3, 12, 12))
    assert small.depth.groups == small.norm2.num_features == 6
    assert torch.allclose(small(x), model(x), atol=2e-3 * float(model(x).abs().max()))
    with pytest.raises(NeuronMergingError, match="c: its output goes through mul, which a merge does not pass"):
        shrink(model, 0.5, compensation="merge", coupled=True)
    pruned, _ = shrink(model, 0.3, compensation="prune", coupled=True, ignore=["gate"])
    assert pruned(x).shape == (4, 5) and pruned.c.out_channels == 12 and pruned.b.out_channels == 4


@torch.no_grad()
def test_keeping_everything_changes_nothing():
    model, x = dense(), torch.randn(4, 3, 12, 12)
    for kind in ("prune", "restore"):
        small, _ = shrink(model, 0.0, example_input=(3, 12, 12), compensation=kind, coupled=True, probe_samples=64)
        assert torch.allclose(small(x), model(x), atol=1e-4)


@torch.no_grad()
def test_positive_multiples_in_a_stream_are_merged_without_loss():
    """Twice the channel everywhere it is written, behind its BatchNorms, is absorbed by every reader."""
    torch.manual_seed(0)
    model = with_statistics(build("ResNet", (8,)), torch.randn(32, 3, 32, 32))
    (stream,) = [s for s in streams(model)[0] if "conv1" in s.writers]
    assert stream.writers == ("conv1", "layer1.0.conv2")
    for writer, chain in zip(stream.writers, stream.chains):
        conv, bn = model.get_submodule(writer), model.get_submodule(chain[0].module)
        conv.weight[1] = conv.weight[0]
        bn.running_mean[1], bn.running_var[1] = bn.running_mean[0], bn.running_var[0]
        bn.weight[1], bn.bias[1] = 2 * bn.weight[0], 2 * bn.bias[0]
    keep = torch.tensor([i for i in range(16) if i != 1])
    small = smaller("merge", model, [stream], [keep], threshold=0.99)
    x = example(model)
    assert torch.allclose(small(x), model(x), atol=1e-4)
    assert small.conv1.out_channels == 15


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
    (stream,) = [s for s in streams(model)[0] if s.layer == "a"]
    keep = torch.tensor([0, 2, 3, 4, 5])
    (Z,) = scaling_matrices(model, stream, keep, t=0.0001)
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
    (stream,) = [s for s in streams(model)[0] if s.layer == "a"]
    keep = torch.tensor([1, 2, 3, 4, 5])
    (Z,) = scaling_matrices(model, stream, keep, t=0.1)
    assert Z[0, 0] == 0 and torch.isclose(Z[1, 0], Z.new_tensor(0.5))
    small = smaller("merge", model, [stream], [keep], threshold=0.99)
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
    (stream,) = [s for s in streams(model)[0] if s.layer == "a"]
    keep = torch.tensor([0, 2, 3, 4, 5])
    assert scaling_matrices(model, stream, keep, t=0.99)[0][0, 1] == 1
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
    assert scaling_matrices(model, stream, keep, t=0.99)[0][0, 1] == 0


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
    (stream,) = [s for s in streams(model)[0] if s.layer == "a"]
    for Z in scaling_matrices(model, stream, torch.tensor([0, 2, 3, 4, 5]), t=0.0001):
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
    (stream,) = [s for s in streams(model)[0] if s.layer == "a"]
    for t, wanted in ((0.79, 1), (0.81, 0)):
        for Z in scaling_matrices(model, stream, torch.tensor([0, 2, 3, 4, 5]), t=t):
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
    found, _ = prunable(model, coupled=True)
    assert [stream.writers for stream in found] == [("a", "c"), ("b", "d")]
    keep, x = plant(model, found), torch.randn(4, 3, 32, 32)
    for kind in ("merge", "restore"):
        small = smaller(kind, model, found, keep, (3, 32, 32), threshold=0.999, probe_samples=16)
        assert torch.allclose(small(x), model(x), atol=2e-3), kind
        assert small.first.num_features == 6


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

    (stream,) = streams(Twice())[0]
    assert stream.obstacle == "a is summed in two ways"


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

    _, left_out = prunable(Net(), coupled=True)
    assert left_out == {
        "a": "its output goes through add", "b": "grouped is a grouped convolution",
        "grouped": "grouped is a grouped convolution", "c": "its output goes through roll",
        "fc": "its output is an output of the network",
    }  # fmt: skip
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
    with pytest.raises(NeuronMergingError, match="coupled channels have no choice of widths"):
        shrink(model, 0.5, example_input=(3, 32, 32), coupled=True, widths="auto")
    found, _ = prunable(model, coupled=True)
    with pytest.raises(NeuronMergingError, match="0 of 16 neurons cannot be kept in conv1"):
        select(model, [u for u in found if isinstance(u, Stream)][:1], [0], "l1-norm")


def test_coupled_on_the_command_line(cli, tmp_path):
    options = ("--arch", "ResNet", "--depth-wide", "8", "--summary")
    plain, coupled = cli(*options), cli(*options, "--coupled")
    assert plain.code == coupled.code == 0
    assert "conv1 stays whole" in plain.out and "conv1 and 1 more" in coupled.out


def as_it_should_be(row):
    """What a row of the zoo has to say."""
    for kind in zoo.KINDS:
        found = row[kind]
        if kind == "merge" and "why_not" in found:
            assert "use prune or restore" in found["why_not"], row["network"]
            continue
        assert found["ok"] and found["error_at_0"] < 1e-4, (row["network"], kind)
        assert kind == "prune" or found["error_of_twins"] < 2e-3, (row["network"], kind)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny"])
def test_the_zoos_networks_would_show_a_mistake(name):
    """Their own first weights hide what happens before a head of zeros, or in branches that are scaled by 1e-6."""
    model, shape = zoo.made(name)
    x = torch.randn(1, *shape)
    wanted, unit = model(x), prunable(model, coupled=True)[0][-1]
    model.get_submodule(unit.layer).weight.mul_(2)
    assert (model(x) - wanted).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y_400mf", "efficientnet_b0", "squeezenet1_1"])
def test_torchvisions_networks(name):
    """One of each kind: `make zoo` tries them all."""
    row = zoo.tried(name)
    as_it_should_be(row)
    whole = set(row["left_out"].values()) - {"its output is an output of the network"}
    whole = [
        why for why in whole if why != "the forward pass never calls it in evaluation"
    ]  # of the heads for training
    assert all("is a grouped convolution" in why for why in whole) and (not whole or name == "regnet_y_400mf")


def test_the_zoo_has_only_torchvisions_networks(capsys):
    assert zoo.main(["resnet18", "resnet19"]) == 2
    assert capsys.readouterr().err == "torchvision has no classification network resnet19\n"


def test_every_row_of_the_zoo_is_as_it_should_be():
    measured = [row for row in zoo.rows.load(zoo.FOLDER / "rows.jsonl") if "prune" in row]
    assert len(measured) > 40
    for row in measured:
        as_it_should_be(row)


def test_the_table_of_the_zoo_matches_its_rows():
    assert zoo.TABLE.read_text() == zoo.table(zoo.rows.load(zoo.FOLDER / "rows.jsonl"))

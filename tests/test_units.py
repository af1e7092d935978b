"""The paper's units: those of the published networks, every operation that passes, and what is left out with its reason."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from models import build
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.units import Unit
from neuron_merging.plan import prunable
from neuron_merging.shrink import shrink
from tests.helpers import shape_of, units


@pytest.mark.parametrize(
    ("arch", "depth_wide", "count"),
    [
        ("LeNet_300_100", (), 2),
        ("VGG", (11,), 8),
        ("VGG", (13,), 10),
        ("VGG", (16,), 13),
        ("VGG", (19,), 16),
        ("ResNet", (20,), 9),
        ("ResNet", (56,), 27),
        ("ResNet", (110,), 54),
        ("WideResNet", (40, 4), 18),
        ("WideResNet", (28, 10), 12),
    ],
)
def test_the_units_of_the_published_networks(arch, depth_wide, count):
    model = build(arch, depth_wide)
    assert len(units(model, shape_of(model))) == count


def test_each_family_names_its_layers_as_the_paper_does():
    assert units(build("LeNet_300_100"), (1, 28, 28))[0] == Unit("ip1", None, True, "ip2", None)
    vgg = units(build("VGG", (16,)))[-1]
    assert vgg == Unit("feature.40", "feature.41", True, "classifier.0", None)
    resnet = units(build("ResNet", (56,)))[3]
    assert resnet == Unit("layer1.3.conv1", "layer1.3.bn1", True, "layer1.3.conv2", "layer1.3.bn2", branch=True)
    wide = units(build("WideResNet", (40, 4)))[0]
    assert wide == Unit("block1.layer.0.conv1", "block1.layer.0.bn2", True, "block1.layer.0.conv2", None, branch=True)


class Net(nn.Module):
    """Two layers with `between` on the way from the first to the second."""

    def __init__(self, between, first=None, second=None, **modules: nn.Module):
        super().__init__()
        self.first = first or nn.Conv2d(3, 8, 3)
        self.second = second or nn.Conv2d(8, 4, 3)
        self.between = between
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


IMAGE, SMALL, WIDE = (2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 10, 10)  # 6 × 6, 2 × 2 and 8 × 8 behind the first convolution


def found(between, modules, shape=IMAGE):
    """The units between the two layers, and what stays whole."""
    return prunable(find_spaces(Net(between, **modules), torch.randn(shape)), False)


FLAT = {"second": nn.Linear(32, 4)}
PASSES = {
    "nothing": (lambda m, x: x, {}),
    "relu module": (lambda m, x: m.act(x), {"act": nn.ReLU()}),
    "relu function": (lambda m, x: F.relu(x, inplace=True), {}),
    "relu method": (lambda m, x: x.relu(), {}),
    "torch.relu": (lambda m, x: torch.relu(x), {}),
    "leaky relu": (lambda m, x: F.leaky_relu(x), {}),
    "batchnorm": (lambda m, x: m.bn(x).relu(), {"bn": nn.BatchNorm2d(8)}),
    "max pool module": (lambda m, x: m.pool(x), {"pool": nn.MaxPool2d(2)}),
    "max pool function": (lambda m, x: F.max_pool2d(x, 2), {}),
    "avg pool function": (lambda m, x: F.avg_pool2d(x, 2), {}),
    "adaptive pool": (lambda m, x: F.adaptive_avg_pool2d(x, 5), {}),
    "dropout": (lambda m, x: m.drop(F.dropout(x, 0.1, m.training)), {"drop": nn.Dropout2d()}),
    "identity": (lambda m, x: m.id(x), {"id": nn.Identity()}),
    "torch.flatten": (lambda m, x: torch.flatten(x, 1), FLAT),
    "flatten keyword": (lambda m, x: x.flatten(start_dim=1), FLAT),
    "flatten module": (lambda m, x: m.flat(x), {"flat": nn.Flatten(), **FLAT}),
    "view by size": (lambda m, x: x.view(x.size(0), -1), FLAT),
    "view by shape": (lambda m, x: x.view(x.shape[0], -1), FLAT),
    "view to a fixed size": (lambda m, x: x.view(-1, 32), FLAT),
    "reshape": (lambda m, x: x.reshape(x.size()[0], -1), FLAT),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_passes(name):
    between, modules = PASSES[name]
    (space,), left_out = found(between, modules, SMALL if "second" in modules else IMAGE)
    assert (space.unit.layer, space.unit.next, space.obstacle) == ("first", "second", None)
    assert left_out == {"second": "it is an output of the network"}


BENDS = {
    "sigmoid": (lambda m, x: x.sigmoid(), {}, "sigmoid"),
    "GELU": (lambda m, x: m.act(x.relu()), {"act": nn.GELU()}, "gelu"),
    "SiLU": (lambda m, x: F.silu(x, inplace=True), {}, "silu"),
    "ReLU6": (lambda m, x: m.act(x), {"act": nn.ReLU6()}, "hardtanh"),
}


@pytest.mark.parametrize("name", BENDS)
def test_activations_that_a_scale_does_not_pass_are_named(name):
    between, modules, activation = BENDS[name]
    (space,), _ = found(between, modules)
    assert space.unit.activation == activation
    assert space.obstacle == f"{activation} is not positively homogeneous"
    assert space.unit.relu == (name == "GELU") and not space.unit.only_relu


CONV1D = {"first": nn.Conv1d(3, 8, 3), "second": nn.Conv1d(8, 4, 3)}
HOOKED = nn.ReLU()
HOOKED.register_forward_hook(lambda module, args, out: 2 * out)
LEFT_OUT = {
    "a softmax": (lambda m, x: x.softmax(1), {}, IMAGE, "softmax"),
    "a PReLU": (lambda m, x: m.act(x), {"act": nn.PReLU(8)}, IMAGE, "prelu"),
    "a residual sum": (lambda m, x: x + x.relu(), {}, IMAGE, "2 times"),
    "a constant": (lambda m, x: x + 1, {}, IMAGE, "add"),
    "a permutation": (lambda m, x: x.permute(0, 1, 3, 2), {}, IMAGE, "permute"),
    "a linear layer on the last dimension": (lambda m, x: x, {"second": nn.Linear(8, 4)}, WIDE, "output of the network"),
    "a grouped convolution": (
        lambda m, x: x, {"first": nn.Conv2d(3, 9, 3, groups=3), "second": nn.Conv2d(9, 4, 3)}, IMAGE, "plain layer",
    ),
    "a grouped consumer": (lambda m, x: x, {"second": nn.Conv2d(8, 4, 3, groups=2)}, IMAGE, "plain layer"),
    "a BatchNorm behind the ReLU": (lambda m, x: m.bn(x.relu()), {"bn": nn.BatchNorm2d(8)}, IMAGE, "batch_norm"),
    "a BatchNorm without statistics": (
        lambda m, x: m.bn(x), {"bn": nn.BatchNorm2d(8, track_running_stats=False)}, IMAGE, "no statistics",
    ),
    "a LayerNorm": (lambda m, x: m.ln(x), {"ln": nn.LayerNorm(6)}, IMAGE, "layer_norm"),
    "weights parametrized": (lambda m, x: x, {"second": weight_norm(nn.Conv2d(8, 4, 3))}, IMAGE, "_weight_norm in sec"),
    "the width as a number": (lambda m, x: x / x.size(1), {}, IMAGE, "div"),
    "the width as a shape": (lambda m, x: x.relu() / x.shape[1], {}, IMAGE, "div"),
    "the number of elements": (lambda m, x: x / x.numel(), {}, IMAGE, "div"),
    "pool with indices": (lambda m, x: m.pool(x)[0], {"pool": nn.MaxPool2d(2, return_indices=True)}, IMAGE, "with_ind"),
    "a pool over the neurons (2d)": (lambda m, x: F.avg_pool3d(x, 3, 1, 1), {}, IMAGE, "avg_pool3d"),
    "a pool over the neurons (1d)": (lambda m, x: F.max_pool2d(x, 3, 1, 1), CONV1D, (2, 3, 8), "max_pool2d"),
    "a consumer of another dimension": (lambda m, x: x, {"first": nn.Conv1d(3, 8, 3)}, (8, 3, 10), "slides over it"),
    "a divisor of its own": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=1), {}, IMAGE, "divisor"),
    "a divisor of its own, by place": (lambda m, x: F.avg_pool2d(x, 2, 2, 0, False, True, 1), {}, IMAGE, "divisor"),
    "a divisor of its own, module": (lambda m, x: m.pool(x), {"pool": nn.AvgPool2d(2, divisor_override=1)}, IMAGE, "div"),
    "a hook on the way": (lambda m, x: m.act(x), {"act": HOOKED}, IMAGE, "mul"),
    "a flatten of the wrong dimensions": (
        lambda m, x: x.flatten(end_dim=1), {"second": nn.Linear(8, 4)}, WIDE, "output of the network",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_and_why(name):
    between, modules, shape, reason = LEFT_OUT[name]
    spaces, left_out = found(between, modules, shape)
    assert spaces == [] and reason in left_out["first"]


@pytest.mark.parametrize("name", [name for name in LEFT_OUT if "divisor" in name])
@torch.no_grad()
def test_a_constant_behind_a_pool_with_a_divisor_of_its_own_is_absorbed_as_it_is_there(name):
    between, modules, shape, _ = LEFT_OUT[name]
    model, x = Net(between, **modules).eval(), torch.randn(shape)
    model.first.weight[::2], model.first.bias[::2] = 0, 3.0
    small, _ = shrink(model, 0.5, example_input=x, compensation="prune", coupled=True)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def by_width(m, x):
    return m.second(F.relu(m.first(x)).flatten(2).mean(2)) / m.first.out_channels


def in_blocks(m, x):
    return m.second(m.first(x).view(x.size(0), m.first.out_channels, -1).mean(2))


@pytest.mark.parametrize("kind", ["prune", "merge", "restore"])
@pytest.mark.parametrize("forward", [by_width, in_blocks])
@torch.no_grad()
def test_a_forward_that_reads_a_width_keeps_its_meaning(forward, kind):
    """Where it computes with a width, its number stays; where it only shapes by it, that follows."""

    class Reads(Net):
        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    model, x = Reads(None, second=nn.Linear(8, 4)).eval(), torch.randn(4, 3, 8, 8)
    model.first.weight[::2], model.first.bias[::2] = 0, 0
    small, report = shrink(model, 0.5, example_input=x, compensation=kind, coupled=True, probe_samples=32)
    assert report.widths == [4]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert ("the result is a torch.fx.GraphModule" in str(report.note)) == (forward is by_width)


class Video(nn.Module):
    """[B·T, N, 1, 1] viewed as [B, T·N]: the neurons are inside of the frames."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(5 * 8, 4)

    def forward(self, x):
        frames = F.adaptive_avg_pool2d(self.conv(x.flatten(0, 1)).relu(), 1)
        return self.fc(frames.view(x.size(0), -1))


def test_neurons_that_are_read_frame_by_frame_are_read_where_they_are():
    (space,) = find_spaces(Video(), torch.randn(2, 5, 3, 6, 6)).spaces
    assert space.unit.next == "fc" and space.size == 8
    assert space.readers[0].positions(space.leaf)[3].tolist() == [3, 11, 19, 27, 35]


def test_analysing_leaves_nothing_in_the_network():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x - torch.tensor([1.0, 2.0, 3.0, 4.0])).relu())

    torch.manual_seed(0)
    model, x = Scaled().double().eval(), torch.randn(3, 4).double()
    before = set(vars(model))
    for kind in ("prune", "restore"):
        small, _ = shrink(model, 0.0, example_input=x, compensation=kind)
        assert set(vars(model)) == set(vars(small)) == before
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_a_layer_used_twice_or_sharing_its_weights_is_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.c(self.b(self.b(self.a(x))))

    spaces, left_out = prunable(find_spaces(Twice(), torch.randn(2, 4)), False)
    assert spaces == []
    assert "written 2 times" in left_out["a"] and "written 2 times" in left_out["b"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight  # which reads the network's input
    spaces, left_out = prunable(find_spaces(tied, torch.randn(2, 4)), False)
    assert spaces == []
    assert "something whose size is fixed" in left_out["0"]


def test_layers_without_neurons_or_inputs_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 4), nn.ReLU(), nn.Linear(4, 2))
    for coupled in (False, True):
        spaces, left_out = prunable(find_spaces(empty, torch.randn(2, 3)), coupled)
        assert spaces == [] and left_out["2"] == "linear in 2 has no weights"


def test_a_network_whose_way_depends_on_numbers_is_named_and_nothing_is_printed(capfd):
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else -x

    with pytest.raises(NeuronMergingError, match="Branches cannot be exported"):
        units(Branches(4, 4), (4,))
    assert capfd.readouterr() == ("", "")

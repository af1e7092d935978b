"""Units: those of the published networks, every operation that passes, and what is left out with its reason."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from models import build
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.streams import streams
from neuron_merging.graph.tracing import Unit, survey, units
from neuron_merging.shrink import shrink


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
    assert len(units(build(arch, depth_wide))) == count


def test_each_family_names_its_layers_as_the_paper_does():
    assert units(build("LeNet_300_100"))[0] == Unit("ip1", None, True, "ip2", None)
    assert units(build("VGG", (16,)))[-1] == Unit("feature.40", "feature.41", True, "classifier.0", None)
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


FLAT = {"second": nn.Linear(32, 4)}
PASSES = {
    "nothing": (lambda m, x: x, {}),
    "relu module": (lambda m, x: m.act(x), {"act": nn.ReLU()}),
    "relu function": (lambda m, x: F.relu(x, inplace=True), {}),
    "relu method": (lambda m, x: x.relu(), {}),
    "torch.relu": (lambda m, x: torch.relu(x), {}),
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
    "reshape": (lambda m, x: x.reshape(x.size()[0], -1), FLAT),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_passes(name):
    between, modules = PASSES[name]
    assert [unit.layer for unit in units(Net(between, **modules))] == ["first"]


BENDS = {
    "sigmoid": (lambda m, x: x.sigmoid(), {}),
    "GELU": (lambda m, x: m.act(x.relu()), {"act": nn.GELU()}),
    "leaky_relu": (lambda m, x: F.leaky_relu(x), {}),
    "ReLU6": (lambda m, x: m.act(x), {"act": nn.ReLU6()}),
}


@pytest.mark.parametrize("name", BENDS)
def test_activations_that_a_scale_does_not_pass_are_named(name):
    between, modules = BENDS[name]
    (unit,) = units(Net(between, **modules))
    assert unit.activation == name
    assert unit.relu == (name == "GELU")


LEFT_OUT = {
    "a softmax": (lambda m, x: x.softmax(1), {}, "softmax"),
    "a PReLU": (lambda m, x: m.act(x), {"act": nn.PReLU(8)}, "PReLU"),
    "a residual sum": (lambda m, x: x + x.relu(), {}, "2 times"),
    "a constant": (lambda m, x: x + 1, {}, "add"),
    "a permutation": (lambda m, x: x.permute(0, 1, 3, 2), {}, "permute"),
    "a view to a fixed size": (lambda m, x: x.view(-1, 32), FLAT, "view"),
    "a flatten of the batch": (lambda m, x: x.flatten(0), FLAT, "flatten"),
    "a linear layer on the last dimension": (lambda m, x: x, {"second": nn.Linear(8, 4)}, "without a flatten"),
    "a grouped convolution": (lambda m, x: x, {"first": nn.Conv2d(3, 9, 3, groups=3)}, "grouped"),
    "a grouped consumer": (lambda m, x: x, {"second": nn.Conv2d(8, 4, 3, groups=2)}, "plain convolution"),
    "a BatchNorm behind the ReLU": (lambda m, x: m.bn(x.relu()), {"bn": nn.BatchNorm2d(8)}, "BatchNorm2d"),
    "a BatchNorm without statistics": (
        lambda m, x: m.bn(x), {"bn": nn.BatchNorm2d(8, track_running_stats=False)}, "no running statistics",
    ),
    "a LayerNorm": (lambda m, x: m.ln(x), {"ln": nn.LayerNorm(30)}, "LayerNorm"),
    "weights parametrized": (lambda m, x: x, {"second": weight_norm(nn.Conv2d(8, 4, 3))}, "parametrized"),
    "the width as a number": (lambda m, x: x / x.size(1), {}, "2 times"),
    "the width as a shape": (lambda m, x: x.relu() / x.shape[1], {}, "2 times"),
    "the number of elements": (lambda m, x: x / x.numel(), {}, "2 times"),
    "a view by the width": (lambda m, x: x.view(x.size(1), -1), FLAT, "2 times"),
    "a view by the width as a shape": (lambda m, x: x.view(x.shape[1], -1), FLAT, "2 times"),
    "pool with indices": (lambda m, x: m.pool(x)[0], {"pool": nn.MaxPool2d(2, return_indices=True)}, "MaxPool2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_and_why(name):
    between, modules, reason = LEFT_OUT[name]
    found, left_out = survey(Net(between, **modules))
    assert found == []
    assert reason in left_out["first"]


CONV1D = {"first": nn.Conv1d(3, 8, 3), "second": nn.Conv1d(8, 4, 3)}
HOOKED = nn.ReLU()
HOOKED.register_forward_hook(lambda module, args, out: 2 * out)
MIXES = {
    "a pool over the neurons (2d)": (lambda m, x: F.avg_pool3d(x, 3, 1, 1), {}),
    "a pool over the neurons (1d)": (lambda m, x: F.max_pool2d(x, 3, 1, 1), CONV1D),
    "a consumer of another dimension": (lambda m, x: x, {"first": nn.Conv1d(3, 8, 3)}),
    "a divisor of its own": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=1), {}),
    "a divisor of its own, by place": (lambda m, x: F.avg_pool2d(x, 2, 2, 0, False, True, 1), {}),
    "a divisor of its own, module": (lambda m, x: m.pool(x), {"pool": nn.AvgPool2d(2, divisor_override=1)}),
    "a hook on the way": (lambda m, x: m.act(x), {"act": HOOKED}),
    "a flatten of the wrong dimensions": (lambda m, x: x.flatten(end_dim=1), {"second": nn.Linear(8, 4)}),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_neurons_or_depends_on_their_number_is_left_out(name):
    between, modules = MIXES[name]
    assert units(Net(between, **modules)) == []


class Video(nn.Module):
    """[B·T, N, 1, 1] viewed as [B, T·N]: the neurons are not in front."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(5 * 8, 4)

    def forward(self, x):
        frames = F.adaptive_avg_pool2d(self.conv(x.flatten(0, 1)).relu(), 1)
        return self.fc(frames.view(x.size(0), -1))


def test_a_batch_size_of_another_tensor_is_not_taken_for_a_flatten():
    assert units(Video()) == [] and streams(Video())[0] == []


def test_tracing_leaves_nothing_in_the_network():
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

    found, left_out = survey(Twice())
    assert found == []
    assert "used 2 times" in left_out["a"]
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    found, left_out = survey(tied)
    assert found == []
    assert "shares its weights" in left_out["0"]


def test_layers_without_neurons_or_inputs_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in (lambda n, m: nn.Conv2d(n, m, 1), nn.Linear):
            empty = nn.Sequential(layer(3, 0), nn.ReLU(), layer(0, 4), nn.ReLU(), layer(4, 2))
            found, left_out = survey(empty)
            assert found == [] and {"0 has no weights", "2 has no weights"} <= {*left_out.values()}
            assert streams(empty)[0] == []


def test_a_network_that_cannot_be_traced_is_named():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NeuronMergingError, match="Branches cannot be traced"):
        units(Branches())

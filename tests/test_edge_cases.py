"""Networks that are unlike the paper's, and inputs that are odd: each once went wrong."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from models import build
from neuron_merging import baselines as rivals
from neuron_merging import synthetic as probe
from neuron_merging.accuracy import fused
from neuron_merging.alike import scaling_matrices
from neuron_merging.checkpoint import load_checkpoint, save_checkpoint, stored
from neuron_merging.counting import count_macs
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import capture
from neuron_merging.graph.walk import Walk
from neuron_merging.linalg import cholesky
from neuron_merging.restore import Options
from neuron_merging.restore.fitting import Fitting
from neuron_merging.shrink import shrink
from tests.helpers import (
    Written,
    choose,
    conv,
    decompose,
    read,
    rebuild,
    same,
    smaller,
    surveyed,
    units,
    with_statistics,
)

KINDS = ("prune", "merge", "restore")


class Tokens(nn.Module):
    """x + fc2(ReLU(fc1(x))) on tokens [B, T, D], as in a transformer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.fc2(F.relu(self.fc1(x)))
        return self.head(x.mean(1))


class Outputs(nn.Module):
    """Gives what `shape` makes of its three outputs."""

    def __init__(self, shape):
        super().__init__()
        self.input, self.output, self.shape = nn.Linear(8, 16), nn.Linear(16, 3), shape

    def forward(self, input):
        return self.shape(self.output(F.relu(self.input(input))))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_block_of_tokens_runs_on_any_batch(kind):
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(4, 5, 6)
    (unit,) = [unit for unit in units(model, (5, 6)) if unit.layer == "fc1"]
    small = smaller(kind, model, [unit], [torch.arange(0)], (5, 6), probe_samples=64)
    assert small(x).shape == (4, 3) and torch.isfinite(small(x)).all()
    if kind == "prune":
        assert torch.allclose(small(x), model.head((x + model.fc2.bias).mean(1)), atol=1e-6)
    assert small.get_submodule(unit.next).value.shape == (6,)


def test_quick_widths_weigh_tokens_by_feature():
    """What the consumer adds counts by the variance of every feature of the sum, over samples and tokens."""
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(64, 5, 6) * torch.arange(1, 7)
    _, report = shrink(model, 0.5, images=x, compensation="restore", widths="quick")
    assert report.params[1] < report.params[0]
    (curve,) = report.search.curves
    with torch.no_grad():
        written = (x + model.fc2(F.relu(model.fc1(x)))).flatten(0, 1)
    assert curve.damage[0] == pytest.approx(curve.error[0] / float(written.var(0, correction=0).sum()), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["uniform", "auto"])
@pytest.mark.parametrize("shape", [lambda y: (y, y[:, :1]), lambda y: {"logits": y}, lambda y: y[:, 0], lambda y: y])
def test_any_form_of_output_and_any_name_of_a_layer(shape, rule):
    """A tuple, a dict, one number a sample; a layer with the name of the forward pass's argument."""
    torch.manual_seed(0)
    model = Outputs(shape).eval()
    small, report = shrink(
        model, 0.5, example_input=(8,), compensation="restore", widths=rule, probe_samples=64, coupled=False
    )
    assert report.widths == [8]
    wanted, found = (torch.utils._pytree.tree_leaves(net(torch.randn(5, 8))) for net in (model, small))
    assert [leaf.shape for leaf in wanted] == [leaf.shape for leaf in found]


def test_double_precision_and_chosen_widths():
    torch.manual_seed(0)
    model = build("ResNet", (8,)).eval().double()
    small, report = shrink(model, 0.5, example_input=(3, 32, 32), widths="auto", probe_samples=24)
    assert small(torch.randn(2, 3, 32, 32).double()).dtype == torch.float64
    assert report.params[1] <= report.params[0]


@torch.no_grad()
def test_parametrized_layers_stay_whole():
    torch.manual_seed(0)
    conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    small, report = shrink(model, 0.5, compensation="merge", coupled=True)
    assert [unit.layer for unit in report.units] == ["2"] and "0.parametrizations.weight" in report.left_out
    assert small(torch.randn(1, 3, 9, 9)).shape == (1, 4, 3, 3)


def test_a_block_can_be_dropped_but_no_stream():
    model = build("ResNet", (8,)).eval()
    spaces = surveyed(model, (3, 32, 32)).spaces
    full = [space.size for space in spaces]
    with pytest.raises(NeuronMergingError, match="0 of 16 neurons cannot be kept in conv1: give 1 to 16"):
        shrink(model, [0, *full[1:]], compensation="prune", coupled=True)
    widths = [0 if space.layer == "layer2.0.conv1" else space.size for space in spaces]
    small, _ = shrink(model, widths, compensation="prune", coupled=True, example_input=(3, 32, 32))
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 10)


class Heads(nn.Module):
    """Has a second head and reads a feature twice, but only while it is trained."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(8, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.training:
            return self.b(x), self.aux(x)
        return self.b(x)


@pytest.mark.parametrize("training", [True, False])
def test_networks_are_read_as_they_are_evaluated(training):
    model = Heads().train(training)
    with pytest.raises(
        NeuronMergingError, match=r"a: it is written 1 times and read 2 times.* aux: the forward pass never calls it"
    ):
        shrink(model, 0.5, example_input=(8,), probe_samples=64, coupled=False)
    small, report = shrink(model, 0.5, example_input=(8,), probe_samples=64)
    assert [unit.layer for unit in report.units] == ["a"]
    assert model.training == small.training == training and model.a.training == training
    assert [y.shape for y in small.train()(torch.randn(2, 8))] == [(2, 3), (2, 3)]


def test_what_a_network_asserts_is_said():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            torch._assert(x.shape[-1] == 8, "eight numbers, please")
            return self.b(F.relu(self.a(x)))

    with pytest.raises(NeuronMergingError, match=r"does not run on an input of shape \[7\]: eight numbers, please"):
        shrink(Picky(), 0.5, example_input=(7,), compensation="prune")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"params": 0.3}}, "--budget and --drop-blocks are for"),
        ({"drop_blocks": True}, "--budget and --drop-blocks are for"),
        ({"widths": "auto", "multiple": 0}, "--multiple 0 has to be at least 1"),
        ({"probe_samples": -3}, "--probe-samples -3 has to be at least 2"),
        ({"probe_samples": 0}, "--probe-samples 0 has to be at least 2"),
        ({"ridge": -1.0}, "--ridge -1.0 has to be a number that is not negative"),
        ({"probe": "pink"}, "is for images"),
        ({"probe": "leaves"}, "is for images"),
        ({"threshold": 3.0}, "is no cosine"),
        ({"images": torch.randn(4, 8), "compensation": "merge"}, "merge needs no data"),
        ({"images": torch.randn(4, 9)}, r"images of shape \[4, 9\] are not \[B, 8\] as example_input has it"),
        ({"images": torch.randn(0, 8)}, "images: there are none"),
        ({"widths": "auto", "budget": {"parms": 0.5}}, "say the shares to keep"),
        ({"widths": "auto", "budget": 0.5}, "say the shares to keep"),
        ({"widths": "auto", "knwon": []}, "unexpected keyword argument 'knwon'"),
        ({"ratio": [None]}, "ratio None is no number"),
        ({"ratio": ["8"]}, "'8' is no number"),
        ({"ratio": {"input": None}}, "None is no number"),
        ({"widths": "auto", "multiple": 2.5}, "--multiple 2.5 has to be at least 1, and whole"),
        ({"widths": "auto", "budget": {"params": "0.5"}}, "say the shares to keep"),
        ({"ridge": "0.1"}, "--ridge '0.1' is no number"),
        ({"seed": 1.5}, "--seed 1.5 is no whole number"),
        ({"probe_samples": 1e3}, "--probe-samples 1000.0 is no whole number"),
        ({"example_input": (8.0,)}, "give a tensor of inputs"),
        ({"example_input": np.zeros((1, 8))}, "give a tensor of inputs"),
        ({"example_input": 8}, "example_input 8: give a tensor of inputs"),
    ],
)
def test_arguments_that_do_not_go_together(changes, message):
    model = Outputs(lambda y: y).eval()
    with pytest.raises(NeuronMergingError, match=message):
        shrink(model, **({"ratio": 0.5, "example_input": (8,), "compensation": "restore"} | changes))


@pytest.mark.parametrize(
    "ratio", [torch.tensor(0.5), np.float32(0.5), np.array([8]), torch.tensor([8]), [torch.tensor(8)]]
)
def test_ratios_and_widths_of_any_kind(ratio):
    _, report = shrink(Outputs(lambda y: y).eval(), ratio, compensation="prune")
    assert report.widths == [8]


def test_tied_weights_are_saved_as_safetensors(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    save_checkpoint(tmp_path / "tied.safetensors", model)
    found = load_checkpoint(tmp_path / "tied.safetensors").state_dict
    assert torch.equal(found["0.weight"], model[0].weight) and torch.equal(found["2.weight"], model[0].weight)


@pytest.mark.parametrize("arch", [("ResNet", (8,)), ("LeNet_300_100", ())])
def test_lbyl_in_parts_is_lbyl(arch, monkeypatch):
    torch.manual_seed(0)
    model = build(*arch).eval()
    unit = units(model)[-1]
    neurons = read(model, unit)
    (keep,) = choose(model, [unit], [len(neurons.W) // 2], "l2-norm")
    whole = rivals.lbyl(neurons, keep)
    monkeypatch.setattr(rivals, "ENTRIES", 1)
    assert torch.allclose(rivals.lbyl(neurons, keep).Z, whole.Z, atol=1e-10)
    everything = torch.arange(len(neurons.W))
    assert torch.equal(rivals.lbyl(neurons, everything).Z, torch.eye(len(neurons.W), dtype=torch.float64))


@pytest.mark.parametrize("where", ["bias", "running_mean", "running_var", "gamma"])
def test_numbers_that_are_no_numbers_are_found_everywhere(where):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 5, 1), nn.BatchNorm1d(5),
                          nn.ReLU(), nn.Conv1d(5, 2, 1)).eval()  # fmt: skip
    sick = {"bias": model[3].bias, "gamma": model[4].weight}.get(where)
    with torch.no_grad():
        (getattr(model[4], where) if sick is None else sick)[1] = float("nan")
    with pytest.raises(NeuronMergingError, match="has weights that are NaN or infinite"):
        shrink(model, 0.5, compensation="prune")


@torch.no_grad()
def test_restored_networks_keep_precisions_and_what_is_frozen():
    """Half-precision convolutions beside float32 BatchNorms; new biases are frozen where everything is."""
    torch.manual_seed(0)
    mixed = build("ResNet", (8,)).eval()
    for module in mixed.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.half()
    found = units(mixed)
    keep = choose(mixed, found, [8, 16, 32], "l2-norm")
    small = smaller("restore", mixed, found, keep, (3, 32, 32), probe_samples=16)
    for name, tensor in small.state_dict().items():
        assert tensor.dtype == mixed.state_dict()[name].dtype, name
    frozen = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).eval()
    frozen.requires_grad_(False)
    small, _ = shrink(frozen, 0.5, example_input=(8,), compensation="restore", probe_samples=64)
    assert small[2].bias is not None and not any(p.requires_grad for p in small.parameters())


def test_the_smaller_network_shares_nothing_with_the_original():
    """Not even through a plain attribute that holds parameters."""
    torch.manual_seed(0)
    model = build("LeNet_300_100").eval()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = units(model)
    before = copy.deepcopy(model.state_dict())
    small = rebuild(model, found, decompose(model, found, [30, 10], "l1-norm", "merge"))
    model.ip1.weight.grad = torch.ones_like(model.ip1.weight)
    small.optimizer.zero_grad()
    assert model.ip1.weight.grad is not None
    assert same(before, model)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in small.parameters()}


def test_half_precision_is_for_neurons_that_keep_their_weights():
    layer = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0, 0.1)
        layer.weight[0, 0] = 1e-9  # one weight that vanishes among others is nothing
        assert stored(layer, 0)["weight"].dtype == torch.float16
        layer.weight[1] *= 1e-3  # a small neuron
        assert stored(layer, 0)["weight"].dtype == torch.float16
        layer.weight[1] *= 1e-7  # what weight decay leaves of a dead one
        assert stored(layer, 0)["weight"].dtype == torch.float16
        layer.weight *= 1e-6  # a whole layer that vanishes is not nothing
        assert stored(layer, 0)["weight"].dtype == torch.float32
        layer.weight *= 1e6
        layer.weight[1] = 1e6  # too large
        assert stored(layer, 0)["weight"].dtype == torch.float32
        layer.weight[1] = 0
        assert stored(layer, 0)["weight"].dtype == torch.float16


class TwoNames(nn.Module):
    """A residual network whose layers are known by two names each, of which the second is the one that is called."""

    def __init__(self):
        super().__init__()
        self.input, self.output = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2, self.bn2)

    def forward(self, x):
        x = self.input(x)
        return self.output((x + self.body(x)).relu().mean((2, 3)))


@torch.no_grad()
def test_layers_with_two_names_are_replaced_under_both():
    x = torch.randn(2, 3, 8, 8)
    model = with_statistics(TwoNames(), x)
    torch.testing.assert_close(fused(model)(x), model(x), rtol=1e-4, atol=1e-5)
    for kind in KINDS:
        small, _ = shrink(model, [0], example_input=(3, 8, 8), compensation=kind, probe_samples=32, coupled=False)
        assert count_macs(small, (3, 8, 8)) < count_macs(model, (3, 8, 8)) / 4
        assert small(x).shape == (2, 4)


def walked(model, x):
    """What a walk through a network gives."""
    walk = Walk(capture(model, x).graph, [[x]], measures=False)
    for _ in walk.run(walk.nodes):
        pass
    (result,) = walk.results
    return walk.values[result][0]


class Overwritten(nn.Module):
    """What `shortcut` hands on is rectified with its input, being the same tensor; `shift` has no samples."""

    def __init__(self, activation=F.relu_, shift=(8, 1, 1)):
        super().__init__()
        self.input, self.output = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.conv1, self.conv2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.shortcut, self.shift, self.activation = nn.Identity(), nn.Parameter(torch.randn(shift)), activation

    def forward(self, x):
        x = self.input(x)
        s = self.shortcut(x)
        y = self.conv2(self.activation(self.conv1(self.activation(x)))) + self.shift
        return self.output((s + y).mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("activation", [F.relu_, F.leaky_relu_, F.elu_, F.selu_, F.celu_, F.hardtanh_])
def test_a_walk_gives_what_the_network_gives_where_it_overwrites(activation):
    torch.manual_seed(0)
    model, x = Overwritten(activation).eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(walked(model, x), model(x))


@pytest.mark.parametrize("shift", [(8, 1, 1), (1,), ()])
@pytest.mark.parametrize("activation", [F.relu_, F.leaky_relu_])
def test_restoration_goes_through_what_is_overwritten_and_added_once_for_all(activation, shift):
    torch.manual_seed(0)
    model, x = Overwritten(activation, shift).eval(), torch.randn(64, 3, 8, 8)
    lost = {}
    for kind in ("prune", "restore"):
        small, _ = shrink(model, 0.5, example_input=(3, 8, 8), compensation=kind)
        lost[kind] = float((small(x) - model(x)).detach().norm())
    assert lost["restore"] < 0.7 * lost["prune"]


def test_a_network_that_overwrites_its_input_has_a_probe():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    small, _ = shrink(model, 0.5, example_input=(8,))
    assert small[1].out_features == 8


class Remembers(nn.Module):
    """A layer that keeps what it saw last."""

    def __init__(self):
        super().__init__()
        self.fc, self.last, self.seen = nn.Linear(8, 8), None, []

    def forward(self, x):
        self.last, self.first = x, x + torch.ones(8)
        self.seen.append(x)
        return self.fc(x)


def test_tracing_leaves_a_network_as_it_was():
    model = nn.Sequential(Remembers(), nn.ReLU(), nn.Linear(8, 3)).train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    small, _ = shrink(model, 0.5, compensation="merge")
    for network in (model, small):
        assert network[0].last is None and network[0].seen == [] and not hasattr(network[0], "first")
        assert [module.training for module in network.modules()] == modes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["restore", "merge", "lbyl", "prune-bn"])
def test_the_defaults_of_the_process_are_not_those_of_the_network(kind):
    model = build("ResNet", (8,)).eval()
    told = {"example_input": (3, 32, 32), "compensation": kind, "probe_samples": 48}
    if kind == "prune-bn":
        told["images"] = torch.randn(48, 3, 32, 32)
    (usual, _), (restored, _) = shrink(model, 0.5, **told), shrink(model, 0.5, widths="auto", criterion="auto", **told)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # what is made without saying where ends in no numbers
            small, _ = shrink(model, 0.5, **told)
            chosen, _ = shrink(model, 0.5, widths="auto", criterion="auto", **told)
    finally:
        torch.set_default_dtype(torch.float32)
    for network, expected in ((small, usual), (chosen, restored)):
        for a, b in zip(network.parameters(), expected.parameters(), strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b)


class Auxiliary(nn.Module):
    """Has a second head that only training looks at."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.aux = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.body(x)


def test_statistics_that_evaluation_does_not_use_stay():
    model = Auxiliary().eval()
    model.aux.running_mean.fill_(5)
    model.aux.num_batches_tracked.fill_(7)
    small, _ = shrink(model, 0.5, compensation="prune-bn", images=torch.randn(40, 6) + 1)
    assert (
        small.aux.running_mean.eq(5).all()
        and small.aux.num_batches_tracked == 7
        and not small.body[3].running_mean.eq(0).any()
    )


@torch.no_grad()
def test_lbyl_of_filters_of_zeros():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.zero_()
    model[0].bias.zero_()
    small, _ = shrink(model, 0.5, compensation="lbyl")
    assert all(p.isfinite().all() for p in small.parameters())


def test_a_regression_that_has_no_single_solution_is_said():
    with pytest.raises(NeuronMergingError, match="larger --ridge"):
        cholesky(-torch.eye(3))


def test_images_to_look_at_are_not_overwritten():
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ).eval()
    images = torch.randn(40, 3, 4, 4)
    before = images.clone()
    for kind in ("prune-bn", "restore"):
        shrink(model, 0.5, compensation=kind, images=images)
        assert torch.equal(images, before)


@torch.no_grad()
def test_identity_of_several_values_stays():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.a, self.b = nn.Identity(), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            x, y = self.same((x, 2 * x))
            return self.b(F.relu(self.a(x + y)))

    model, x = Pair().eval(), torch.randn(64, 8)
    small, _ = shrink(model, 0.0, example_input=(8,))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- networks as people write them


def one_relu_for_all(m, x):
    h = m.conv2(m.relu(m.conv1(x)))
    y = m.relu(h)  # overwrites what is added below
    return m.conv3(y) + h


def copied(m, x):
    h = m.conv1(x)
    y = torch.zeros_like(h)
    y.copy_(h)
    return m.conv3(m.relu(m.conv2(y)))


def zeroed(m, x):
    y = m.conv3(m.relu(m.conv2(m.conv1(x))))
    z = torch.ones_like(y)
    z.zero_()
    return y + z


@torch.no_grad()
@pytest.mark.parametrize("run", [one_relu_for_all, copied, zeroed])
def test_a_walk_gives_what_the_network_gives_however_it_overwrites(run):
    torch.manual_seed(0)
    layers = {"conv1": conv(3, 8), "conv2": conv(8, 8), "conv3": conv(8, 8), "relu": nn.ReLU(inplace=True)}
    model, x = Written(run, **layers).eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(walked(model, x), model(x))
    small, _ = shrink(model, 0.5, example_input=(3, 8, 8), probe_samples=16)
    assert small.relu.inplace and model.relu.inplace


def batch_of_input(m, x):
    b = x.size(0)
    return m.fc(F.relu(m.conv2(F.relu(m.conv1(x)))).view(b, -1))


def batch_of_hidden(m, x):
    h = F.relu(m.conv1(x))
    return m.fc(F.relu(m.conv2(h)).view(h.shape[0], -1))


@torch.no_grad()
@pytest.mark.parametrize("run", [batch_of_input, batch_of_hidden])
def test_a_view_takes_its_batch_size_from_anywhere_before(run):
    torch.manual_seed(0)
    model = Written(run, conv1=conv(3, 16), conv2=conv(16, 16), fc=nn.Linear(16 * 256, 4)).eval()
    x = torch.randn(8, 3, 16, 16)
    for kind in KINDS:
        small, report = shrink(model, 0.5, example_input=(3, 16, 16), compensation=kind, probe_samples=64)
        assert [unit.layer for unit in report.units] == ["conv1", "conv2"] and report.widths == [8, 8]
        assert small(x).shape == (8, 4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_flatten_of_several_samples_reads_each_channel_several_times(kind):
    def frames(m, x):  # [B, T, 3, H, W], all frames of a film as one row
        return m.fc(F.relu(m.conv1(x.view(-1, 3, 8, 8))).view(x.size(0), -1))

    torch.manual_seed(0)
    model, x = Written(frames, conv1=conv(3, 4), fc=nn.Linear(2 * 4 * 64, 3)).eval(), torch.randn(5, 2, 3, 8, 8)
    model.conv1.weight[2:], model.conv1.bias[2:] = 0.1 * model.conv1.weight[:2], 0.1 * model.conv1.bias[:2]
    small, report = shrink(model, 0.5, example_input=(2, 3, 8, 8), compensation=kind, probe_samples=32, threshold=0.9)
    assert report.widths == [2] and type(small) is Written
    if kind == "prune":
        model.conv1.weight[2:], model.conv1.bias[2:] = 0, 0
    torch.testing.assert_close(small(x), model(x), atol=1e-4, rtol=1e-4)


def test_modules_may_share_a_list():
    def unet(m, x):
        m.skips.append(m.conv1(x))
        y = m.conv2(F.relu(m.skips[-1]))
        return m.conv3(F.relu(y)) + m.inner._skips.pop()

    shared = []
    inner = Written(None, skips=shared)
    inner._skips = shared
    model = Written(unet, conv1=conv(3, 8), conv2=conv(8, 8), conv3=conv(8, 8), skips=shared, inner=inner).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    small, _ = shrink(model, 0.5, example_input=(3, 8, 8), compensation="prune")
    assert model.skips is shared and model.inner._skips is shared and shared == []
    assert torch.equal(model(x), before) and small(x).shape == before.shape


def test_a_network_that_casts_is_restored_in_its_own_precision():
    torch.manual_seed(0)
    model = Written(lambda m, x: m.b(F.relu(m.a(x.float()))), a=nn.Linear(8, 64), b=nn.Linear(64, 4)).eval()
    small, _ = shrink(model, 0.5, example_input=(8,), widths="auto")
    assert small(torch.randn(3, 8)).shape == (3, 4)


def test_the_first_layer_is_the_one_that_is_called_first():
    def run(m, x):
        return m.head(F.relu(m.conv2(F.relu(m.norm(m.conv1(x))))).mean((2, 3)))

    model = Written(run, head=nn.Linear(8, 3), conv1=conv(3, 8), norm=nn.BatchNorm2d(8), conv2=conv(8, 8)).eval()
    assert probe.default_samples(model, (3, 8, 8)) == 256 and len(probe.make(model, (3, 8, 8), step=0)) == 256
    assert torch.equal(*(probe.make(model, (3, 8, 8), 8, kind=kind) for kind in ("auto", "leaves")))


def test_dropout_without_a_word_about_training_draws_nothing():
    torch.manual_seed(0)
    model = Written(lambda m, x: m.b(F.dropout(F.relu(m.a(x)), 0.5)), a=nn.Linear(8, 64), b=nn.Linear(64, 4)).eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(walked(model, x), model.b(F.relu(model.a(x))))
    for kind in KINDS:
        small, report = shrink(model, 0.5, example_input=(8,), compensation=kind, probe_samples=64)
        assert type(small) is Written and report.note is None


@torch.no_grad()
def test_a_batchnorm_behind_an_activation_is_no_part_of_the_weights():
    """Channels of opposite weights and opposite γ are alike only where no ReLU is between the two."""

    def run(m, x):
        h = m.norm(F.relu(m.conv1(x)))
        return m.fc((h + m.conv2(F.relu(h))).mean((2, 3)))

    torch.manual_seed(0)
    model = Written(run, conv1=conv(3, 4, bias=False), norm=nn.BatchNorm2d(4), conv2=conv(4, 4), fc=nn.Linear(4, 2))
    model.norm.weight.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    for weight, sign in ((model.conv1.weight, -1), (model.conv2.weight, 1), (model.conv2.bias, 1)):
        weight[1] = sign * weight[0]
    survey = surveyed(model.eval(), (3, 8, 8))
    (stream,) = [space for space in survey.spaces if len(space.writers) == 2]
    for Z in scaling_matrices(survey.network, stream, torch.tensor([0, 2, 3]), t=0.999):
        assert Z[:, 1].count_nonzero() == 0


def test_of_many_tokens_some_are_looked_at():
    """Alike in all batches, and at least one of every sample."""
    target = [torch.zeros(2, 500, 5), torch.zeros(2, 500, 5)]
    fitting = Written(None)
    fitting.options = Options(positions=10)
    reader = Written(None)
    reader.channel = lambda y: y.ndim - 1
    chosen = Fitting.places(fitting, reader, target, torch.zeros(1, 5, 6))
    assert sum(map(len, chosen)) == 60 and all(len(part) > 20 and part.max() < 1000 for part in chosen)
    assert all(torch.equal(a, b) for a, b in zip(chosen, Fitting.places(fitting, reader, target, torch.zeros(1, 5, 6))))
    assert sum(map(len, Fitting.places(fitting, reader, [torch.zeros(200, 1, 5)], torch.zeros(1, 5, 6)))) == 200

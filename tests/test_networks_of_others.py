"""Networks as others write them: classes of their own, hooks, what cannot be copied, other precisions and layouts."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from neuron_merging import plan
from neuron_merging import synthetic as probe
from neuron_merging.accuracy import fused
from neuron_merging.counting import count_macs
from neuron_merging.errors import NeuronMergingError
from neuron_merging.methods import METHODS
from neuron_merging.running import by_sample, dtype
from neuron_merging.shrink import shrink, summarize
from tests.helpers import Written, conv, same, surveyed, with_statistics


class Plain(nn.Conv2d):
    """Another name of the same."""

    def describe(self):
        return "a convolution"


class Standardised(nn.Conv2d):
    """Computes with other weights than it has, as weight standardisation does."""

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, centred / centred.std((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """Its forward is torch.nn's, which calls this."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.flip(-1), weight, bias)


class Named(nn.BatchNorm2d):
    pass


class Activated(nn.BatchNorm2d):
    """As timm has it: the activation belongs to it."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Dense(nn.Linear):
    pass


def network(first=nn.Conv2d, norm=nn.BatchNorm2d, last=nn.Linear):
    """Three convolutions, of which the first two can be pruned."""
    torch.manual_seed(0)
    layers = [first(3, 16, 3, padding=1), norm(16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 8), nn.ReLU()]
    return with_statistics(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last(8, 4)), inputs())


def inputs(count=64):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def survey(model, shape=(3, 8, 8)):
    """The paper's units of a network, and why other layers stay whole."""
    spaces, left_out = plan.prunable(surveyed(model, shape), coupled=False)
    return [space.unit for space in spaces], left_out


@torch.no_grad()
def distance(model, small, x):
    return float((small(x) - model(x)).norm() / model(x).norm())


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in METHODS if not k.endswith("-bn")])
def test_a_class_of_one_s_own_that_changes_nothing_is_what_it_inherits(kind):
    """To the last digit, the same as with torch.nn's classes."""
    usual, foreign = network(), network(Plain, Named, Dense)
    assert survey(usual) == survey(foreign)
    (small, report), (other, same) = (
        shrink(model, 0.5, example_input=(3, 8, 8), compensation=kind, probe_samples=32) for model in (usual, foreign)
    )
    assert report.widths == same.widths == [8, 8, 4] and report.macs == same.macs
    assert torch.equal(small(inputs()), other(inputs()))
    assert [type(other[i]) for i in (0, 1, 9)] == [Plain, Named, Dense]
    assert isinstance(fused(foreign)[1], nn.Identity)


@torch.no_grad()
@pytest.mark.parametrize("layer", [Standardised, Padded])
def test_a_layer_with_a_forward_of_its_own_stays_whole_and_says_why(layer):
    model, x = network(layer), inputs()
    found, left_out = survey(model)
    assert [unit.layer for unit in found] == ["3", "5"]
    assert left_out["0"] == f"0 ({layer.__name__}) has a forward of its own"
    torch.testing.assert_close(fused(model)(x), model(x), rtol=1e-4, atol=1e-5)  # its BatchNorm is not folded into it
    for coupled in (False, True):
        small, report = shrink(model, 0.25, images=x, coupled=coupled)
        assert small[0].weight.shape == model[0].weight.shape and report.widths == [12, 6]
        assert distance(model, small, x) < 0.5


@torch.no_grad()
def test_a_consumer_with_a_forward_of_its_own_reads_all():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.ReLU(), Standardised(8, 8, 3), nn.ReLU(), conv(8, 4)).eval()
    assert survey(model) == ([], {
        "0": "2 (Standardised) has a forward of its own", "2": "2 (Standardised) has a forward of its own",
        "4": "its output is an output of the network",
    })  # fmt: skip


@torch.no_grad()
def test_a_batchnorm_with_a_forward_of_its_own_is_no_part_of_a_layer():
    """But restoration walks through it."""
    model, x = network(norm=Activated), inputs()
    found, left_out = survey(model)
    assert [unit.layer for unit in found] == ["3", "5"] and left_out["0"] == "its output goes through Activated (1)"
    torch.testing.assert_close(fused(model)(x), model(x), rtol=1e-4, atol=1e-5)
    small, _ = shrink(model, 0.25, images=x)
    assert distance(model, small, x) < distance(model, shrink(model, 0.25, compensation="prune")[0], x)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prune", "merge", "restore", "lbyl", "fold", "prune-bn"])
def test_synchronised_batchnorm_is_batchnorm(kind):
    usual = network()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert isinstance(synchronised[1], nn.SyncBatchNorm) and survey(usual) == survey(synchronised)
    told = {"images": inputs()} if kind == "prune-bn" else {"example_input": (3, 8, 8), "probe_samples": 32}
    small, other = (shrink(model, 0.5, compensation=kind, **told)[0] for model in (usual, synchronised))
    assert torch.equal(small(inputs()), other(inputs()))
    torch.testing.assert_close(fused(other)(inputs()), other(inputs()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_synchronised_batchnorm_is_coupled_too():
    def run(m, x):
        x = m.first(x)
        return m.last(F.relu(x + m.second(F.relu(m.norm(x)))))

    def made():
        torch.manual_seed(0)
        layers = {"first": conv(3, 8), "norm": nn.BatchNorm2d(8), "second": conv(8, 8), "last": conv(8, 4)}
        return with_statistics(Written(run, **layers), inputs())

    found = [shrink(m, 0.5, example_input=(3, 8, 8), coupled=True, probe_samples=32)
             for m in (made(), nn.SyncBatchNorm.convert_sync_batchnorm(made()))]  # fmt: skip
    (small, report), (other, same) = found
    assert report.widths == same.widths and torch.equal(small(inputs()), other(inputs()))


@pytest.mark.parametrize("told", [{"example_input": (3, 8, 8)}, {"images": inputs(), "compensation": "prune-bn"}])
def test_synchronised_batchnorm_waits_for_no_other_process(told, tmp_path):
    """Where there are some: restoring on one of them only would never end."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    alone, _ = shrink(model, 0.5, probe_samples=32, **told)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:  # on CPUs SyncBatchNorm raises where it would synchronise
        small, _ = shrink(model, 0.5, probe_samples=32, **told)
    finally:
        torch.distributed.destroy_process_group()
    assert same(alone, small) and "forward" not in vars(small[1])


def test_a_layer_whose_forward_was_replaced_stays_whole():
    model = network()
    model[3].forward = lambda x: F.conv2d(x, model[3].weight.abs(), padding=1)
    assert survey(model)[1]["3"] == "3 has a forward of its own"
    assert survey(nn.Sequential(weight_norm(conv(3, 8)), nn.ReLU(), conv(8, 4)))[1]["0"] == (
        "0 has parametrized weights or hooks"
    )


# ---------------------------------------------------------------- what torch.fx does not see


def hooked_whole():
    model = network()
    model.register_forward_pre_hook(lambda module, args: (5 * args[0] + 1,))
    return model


def hooked_norm():
    model = network()
    model[1].register_forward_hook(lambda module, args, output: output.abs())
    return model


def overwritten_view():
    def run(m, x):
        x = m.first(x)
        x.flatten(1).relu_()
        return m.last(F.relu(m.middle(x)))

    torch.manual_seed(0)
    return Written(run, first=conv(3, 8), middle=conv(8, 16), last=conv(16, 4)).eval()


@pytest.mark.parametrize("made", [hooked_whole, hooked_norm, overwritten_view])
def test_what_the_graph_does_not_say_is_not_walked_through(made):
    with pytest.raises(NeuronMergingError, match=r"is not what torch\.fx sees of it"):
        shrink(made(), 0.5, example_input=(3, 8, 8), probe_samples=32)
    small, _ = shrink(made(), 0.5, example_input=(3, 8, 8), compensation="merge", widths="auto", probe_samples=32)
    assert small(inputs(2)).shape[:2] == (2, 4)  # torch.export sees it
    small, _ = shrink(made(), 0.5, compensation="prune")  # which looks at no values
    assert small(inputs(2)).shape[:2] == (2, 4)


class Result(dict):
    """A dict to everyone but torch's pytrees."""


class Cached(nn.Module):
    """Makes something of the first batch's size and keeps it."""

    def __init__(self):
        super().__init__()
        self.net, self.shift = network(), None

    def forward(self, x):
        if self.shift is None:
            self.shift = x.new_ones(x.shape[0], 1, 1, 1)
        return self.net(x + self.shift)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hook of the output", "dict", "cache"])
def test_what_a_network_adds_does_not_stop_restoration(name):
    if name == "cache":
        model = Cached().eval()
    elif name == "dict":
        model = Written(lambda m, x: Result(scores=m.net(x)), net=network()).eval()
    else:
        model = network()
        model.register_forward_hook(lambda module, args, output: output.softmax(1))
    small, report = shrink(model, 0.5, images=inputs())
    assert report.widths == [8, 8, 4] and (name != "cache" or (model.shift is None and small.shift is None))


@torch.no_grad()
def test_hooks_of_what_is_looked_into_are_walked_through():
    inner = network()
    inner.register_forward_hook(lambda module, args, output: 2 * output - 1)
    model = nn.Sequential(inner, nn.Linear(4, 4)).eval()
    small, _ = shrink(model, 0.25, images=inputs())
    assert distance(model, small, inputs()) < distance(model, shrink(model, 0.25, compensation="prune")[0], inputs())


@pytest.mark.parametrize("given", ["by chance", "nan", "another container"])
def test_what_cannot_be_compared_is_not(given):
    """An output that differs from call to call or is NaN, and one that is only looked at by a hook."""
    model = network()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))

    def run(m, x):
        y = m.net(x)
        if given == "by chance":
            return y + torch.randn_like(y)
        return y * float("nan") if given == "nan" else {"scores": (y, y.argmax(1)), "size": 3}

    small, _ = shrink(Written(run, net=model).eval(), 0.5, example_input=(3, 8, 8), probe_samples=32)
    assert small.net[0].weight.shape[0] == 8 and seen


# ---------------------------------------------------------------- what cannot be copied, or has no scores


def normed():
    model = network()
    nn.utils.weight_norm(model[3])
    return model, r"^3\.weight cannot be copied.*weight_norm"


def remembering():
    model = Written(lambda m, x: m.net(x), net=network())
    model.seen = model.net(inputs(2))
    return model, "^seen cannot be copied"


def locked():
    model = network()
    model.lock = threading.Lock()
    return model, "^Sequential cannot be copied: TypeError: "


def buffered():
    model = network()
    model[0].register_buffer("last", model[3].weight * 2)
    return model, r"^0\.last cannot be copied"


class Forgetful(nn.Module):
    """Remembers what it gave last, and says so to nobody who copies it."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        self.last = self.net(x)
        return self.last

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "last"}


def test_a_network_that_knows_how_to_be_copied_is():
    model = Forgetful()
    model(inputs(2))
    assert shrink(model, 0.5, compensation="prune")[1].widths == [8, 8, 4] and model.last is not None


@pytest.mark.parametrize("made", [normed, remembering, locked, buffered])
@pytest.mark.parametrize("kind", ["prune", "restore"])
def test_a_network_that_cannot_be_copied_is_said(made, kind):
    model, message = made()
    with pytest.raises(NeuronMergingError, match=message):
        shrink(model, 0.5, example_input=(3, 8, 8), compensation=kind)


def decided(m, x):
    return m.net(x).argmax(1)


def without_gradient(m, x):
    with torch.no_grad():
        return m.net(x)


@torch.no_grad()
@pytest.mark.parametrize("run", [decided, without_gradient])
def test_without_scores_the_probe_takes_no_class_step(run):
    model = Written(run, net=network()).eval()
    made = probe.make(model, (3, 8, 8), 8)
    assert torch.equal(made, probe.make(model, (3, 8, 8), 8, step=0))
    assert not torch.equal(made, probe.make(model.net, (3, 8, 8), 8))
    small, _ = shrink(model, 0.5, example_input=(3, 8, 8), probe_samples=32)
    pruned, _ = shrink(model, 0.5, compensation="prune")
    assert distance(model.net, small.net, inputs()) < distance(model.net, pruned.net, inputs())


def test_the_choice_of_widths_says_that_there_are_no_numbers():
    with pytest.raises(NeuronMergingError, match="the network gives no floating-point numbers"):
        shrink(Written(decided, net=network()).eval(), 0.5, example_input=(3, 8, 8), widths="auto", probe_samples=32)
    with pytest.raises(NeuronMergingError, match="no floating-point numbers"):
        by_sample({"classes": torch.tensor([1])}, 1)


# ---------------------------------------------------------------- rows of tokens, precision, layout


@pytest.mark.parametrize(
    "shape, samples", [((8,), 4096), ((5, 8), 819), ((16, 8), 256), ((400, 8), 256), ((2, 3, 8), 682)]
)
def test_a_first_linear_layer_sees_some_thousand_rows(shape, samples):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert probe.default_samples(model, shape) == samples == len(probe.make(model, shape, step=0))
    mean = Written(lambda m, x: m.net(x.reshape(x.shape[0], -1, 8).mean(1)), net=model).eval()
    assert probe.default_samples(mean, shape) == 4096  # a row a sample
    with pytest.raises(NeuronMergingError, match=r"does not take inputs of shape \[7\]"):
        probe.default_samples(model, (7,))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_that_casts_its_inputs_has_its_multiplications_counted(precision):
    usual = network()
    casting = Written(lambda m, x: m.net(x.to(precision)), net=network()).to(precision).eval()
    assert count_macs(casting, (3, 8, 8)) == count_macs(usual, (3, 8, 8)) == count_macs(usual.to(precision), (3, 8, 8))
    with pytest.raises(NeuronMergingError):
        count_macs(usual.float(), (4, 8, 8))


class Spectral(nn.Module):
    """A network with complex weights, and an integer before all others."""

    def __init__(self):
        super().__init__()
        self.bits = nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
        self.weights, self.net = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.cfloat)), network()

    def forward(self, x):
        return self.net(torch.fft.irfft2(torch.fft.rfft2(x) * self.weights, s=(8, 8)))


@torch.no_grad()
def test_complex_and_integer_weights_are_left_alone():
    model = Spectral().eval()
    assert count_macs(model, (3, 8, 8)) == count_macs(model.net, (3, 8, 8)) and dtype(model) == torch.float32
    small, report = shrink(model, 0.5, example_input=(3, 8, 8), compensation="merge")
    assert report.widths == [8, 8, 4] and torch.equal(small.weights, model.weights)
    small, _ = shrink(model, 0.5, images=inputs(), widths="auto")
    assert torch.equal(small.weights, model.weights) and small.bits.dtype == torch.int8
    pruned, _ = shrink(model, 0.5, compensation="prune")
    assert distance(model, small, inputs()) < distance(model, pruned, inputs())


@torch.no_grad()
@pytest.mark.parametrize("kind", METHODS)
def test_channels_that_lie_last_in_memory_still_do(kind):
    model = network().to(memory_format=torch.channels_last)
    told = {"images": inputs()} if kind.endswith("-bn") else {"example_input": (3, 8, 8), "probe_samples": 32}
    small, usual = (shrink(m, 0.5, compensation=kind, **told)[0] for m in (model, network()))
    assert all(small[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 3, 5))
    assert usual[3].weight.is_contiguous() and not small[3].weight.is_contiguous()
    torch.testing.assert_close(small(inputs()), usual(inputs()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_layout_of_every_weight_is_its_own():
    def run(m, x):
        return m.d(m.c(F.relu(m.b(F.relu(m.a(x))))).unsqueeze(2))

    model = Written(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=nn.Conv3d(8, 2, 1)).eval()
    model.b.to(memory_format=torch.channels_last)
    small, _ = shrink(model, 0.5, compensation="prune")
    assert [m.weight.is_contiguous() for m in (small.a, small.b, small.c, small.d)] == [True, False, True, True]


# ---------------------------------------------------------------- the summary


def test_the_summary_is_of_what_the_method_can_do():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.GELU(), conv(8, 4)).eval()
    assert summarize(model) == summarize(model, compensation="restore")
    assert summarize(model).splitlines()[0] == "0 -> 2: 8"
    with pytest.raises(NeuronMergingError, match="0 goes through GELU: merge needs an activation"):
        summarize(model, compensation="merge")
    assert "ignored" in summarize(model, compensation="merge", ignore=["0"])
    with pytest.raises(NeuronMergingError, match="unknown compensation 'mrge'"):
        summarize(model, compensation="mrge")


def test_the_summary_of_coupled_channels_is_not_for_fold():
    model = Written(lambda m, x: m.c(F.relu(m.a(x) + m.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 2)).eval()
    assert "a and 1 more -> 1 layers: 8" in summarize(model, coupled=True)
    with pytest.raises(NeuronMergingError, match="fold has no form for coupled channels"):
        summarize(model, coupled=True, compensation="fold")

"""Forward passes as others write them: their arguments, the numbers they compute with, what they write to, what they are in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuron_merging.errors import NeuronMergingError
from neuron_merging.export import _off, export
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.plan import prunable
from neuron_merging.shrink import examined, shrink, summarize
from tests.helpers import Written, conv, surveyed
from tests.test_networks_of_others import distance, inputs, network


class Optional(nn.Module):
    """Takes a second input where there is one, switches, and whatever else it is given."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.use = conv(3, 8), conv(8, 8), conv(8, 4), use

    def forward(self, x, skip=None, scale=1.0, features=False, *others, mask=None, **more):
        h = F.relu(self.a(x))
        if self.use == "skip" and skip is None:
            skip = h
        y = F.relu(self.b(h))
        y = y if skip is None else y + skip
        y = y if mask is None else y * mask
        return (self.c(y * scale), h) if features else self.c(y * scale)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prune", "merge", "restore"])
def test_arguments_have_their_defaults(kind):
    model = Optional("nothing").eval()
    small, report = shrink(model, 0.5, example_input=(3, 8, 8), compensation=kind, probe_samples=32, coupled=False)
    assert [unit.layer for unit in report.units] == ["a"] and small(inputs()).shape == (64, 4, 8, 8)
    whole, _ = shrink(model, 0.0, example_input=(3, 8, 8), compensation=kind, probe_samples=32)
    torch.testing.assert_close(whole(inputs()), model(inputs()), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_a_default_leads_to_is_seen():
    """A skip connection that is made where none is given."""
    model = Optional("skip").eval()
    found, left_out = prunable(surveyed(model, (3, 8, 8)), False)
    assert found == [] and "2 times" in left_out["a"]
    small, report = shrink(model, 0.5, example_input=(3, 8, 8), coupled=True, probe_samples=32)
    assert report.widths == [4] and small(inputs()).shape == (64, 4, 8, 8)


@torch.no_grad()
def test_the_input_may_be_one_of_many():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, *xs):
            return self.net(xs[0])

    model = Many().eval()
    small, _ = shrink(model, 0.5, images=inputs())
    assert distance(model, small, inputs()) < distance(model, shrink(model, 0.5, compensation="prune")[0], inputs())


def by_width(m, x):
    return m.b(F.relu(m.a(x))) / m.a.out_features**0.5


def by_inputs(m, x):
    return m.b(F.relu(m.a(x))) * (m.b.in_features / 8)


def by_neither(m, x):
    return m.b(F.relu(m.a(x))) * (m.a.in_features / m.b.out_features)


def by_half(m, x):
    return m.b(F.relu(m.a(x))) * (m.a.out_features // 2)


@pytest.mark.parametrize("run, follows", [(by_width, False), (by_half, False), (by_inputs, False), (by_neither, True)])
@pytest.mark.parametrize("kind", ["prune", "merge", "restore"])
@torch.no_grad()
def test_a_width_that_is_computed_with_stays_a_number(run, follows, kind):
    """A smaller layer would give another number: then the network is its graph, in which the number stands."""
    torch.manual_seed(0)
    model, x = Written(run, a=nn.Linear(8, 16), b=nn.Linear(16, 4)).eval(), torch.randn(64, 8)
    model.a.num_features, model.b.out_channels = None, (3,)  # of somebody's own, and no widths
    model.a.weight[::2], model.a.bias[::2] = 0, 0
    small, report = shrink(model, 0.5, example_input=x, compensation=kind, probe_samples=64)
    assert report.widths == [8]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(small, Written) == follows
    assert ("the forward pass of Written does not follow" in str(report.note)) != follows
    assert (model.a.out_features, model.a.in_features, model.b.in_features, model.b.out_features) == (16, 8, 16, 4)


@torch.no_grad()
def test_blocks_that_compute_with_their_widths_lose_neurons_all_the_same():
    """Blocks x + c2(ReLU(c1(x))) · (1 / c1's width)."""

    def run(m, x):
        x = F.relu(m.first(x))
        for c1, c2 in m.blocks:
            x = x + c2(F.relu(c1(x))) * (1 / c1.out_channels)
        return m.last(x)

    blocks = nn.ModuleList(nn.ModuleList([conv(8, 6), conv(6, 8)]) for _ in range(3))
    model, x = Written(run, first=conv(3, 8), blocks=blocks, last=conv(8, 4)).eval(), torch.randn(4, 3, 8, 8)
    survey = find_spaces(model, x)
    (shared,) = [space for space in survey.spaces if space.unit is None]
    assert {*shared.modules} == {"first", *(f"blocks.{i}.1" for i in range(3))}
    assert [space.layer for space in survey.spaces if space.unit] == [f"blocks.{i}.0" for i in range(3)]
    for c1, _ in blocks:
        c1.weight[:3], c1.bias[:3] = 0, 0
    small, report = shrink(model, 0.5, example_input=x, compensation="prune", coupled=False)
    assert report.widths == [3] * 3
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prune", "restore"])
def test_buffers_that_forward_writes_to_are_as_they_were(kind):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("gain", torch.ones(()))

        def forward(self, x):
            self.calls += 1
            self.gain.mul_(0.9)
            return self.net(x)

    model = Counts().eval()
    small, _ = shrink(model, 0.5, example_input=(3, 8, 8), compensation=kind, probe_samples=32)
    assert (model.calls, model.gain, small.calls, small.gain) == (0, 1, 0, 1)


@torch.no_grad()
def test_sizes_that_nobody_uses_are_no_readers():
    def run(m, x):
        h = F.relu(m.a(x))
        batch, _channels, _height, _width = h.shape
        return m.b(h.view(batch, -1))

    model = Written(run, a=conv(3, 8), b=nn.Linear(8 * 64, 4)).eval()
    small, report = shrink(model, 0.5, example_input=(3, 8, 8), compensation="merge")
    assert [unit.layer for unit in report.units] == ["a"] and small(inputs()).shape == (64, 4)


WRAPPED = {
    "its .module": lambda: nn.DataParallel(network()),
    "its ._orig_mod": lambda: torch.compile(network(), backend="eager"),
    "as it was before": lambda: torch.jit.trace(network(), inputs(2)),
}


@pytest.mark.parametrize("inside", WRAPPED)
@pytest.mark.parametrize("call", [lambda m: shrink(m, 0.5, example_input=(3, 8, 8)), summarize, examined])
def test_a_wrapped_network_is_to_be_unwrapped(inside, call):
    with pytest.raises(NeuronMergingError, match=f"give the network inside, {inside}"):
        call(WRAPPED[inside]())


def test_whole_numbers_are_not_made_up():
    image = Written(lambda m, x: m.net(x.float() / 255), net=network()).eval()
    assert shrink(image, 0.5, example_input=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), compensation="prune")[1].widths
    model = Written(lambda m, x: m.net(m.words(x)), words=nn.Embedding(9, 8), net=nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))).eval()  # fmt: skip
    words = torch.randint(0, 9, (4, 5))
    assert shrink(model, 0.5, example_input=words, compensation="prune")[1].macs is not None
    with pytest.raises(NeuronMergingError, match="are whole numbers, which cannot be made up: give images"):
        shrink(model, 0.5, example_input=words)
    assert shrink(model, 0.5, compensation="prune")[0](words).shape == (4, 5, 2)


def test_a_layer_of_one_neuron_stays_whole_unless_it_is_named():
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    report = shrink(model, 0.5, compensation="prune")[1]
    assert report.widths == [3] and report.left_out["0"] == "it has one neuron only"
    with pytest.raises(NeuronMergingError, match="0 cannot be pruned: it has one neuron only"):
        shrink(model, {"0": 0.5}, compensation="prune")


def test_a_multiple_above_all_widths_is_said():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2)).eval()
    told = {"example_input": (8,), "widths": "auto", "probe_samples": 64}
    with pytest.raises(NeuronMergingError, match="--multiple 64 leaves every layer whole"):
        shrink(model, 0.5, multiple=64, **told)
    assert shrink(model, 0.0, multiple=64, **told)[1].widths == [16, 12]


@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
def test_what_is_left_of_a_block_can_be_shrunk_again(linear):
    torch.manual_seed(0)

    def layer(inputs, outputs):
        return nn.Linear(inputs, outputs) if linear else conv(inputs, outputs)

    def run(m, x):
        h = m.first(x)
        h = h + m.second(F.relu(m.branch(h)))
        return m.last(F.relu(m.more(F.relu(h))))

    layers = {
        "first": layer(3, 8),
        "branch": layer(8, 8),
        "second": layer(8, 8),
        "more": layer(8, 12),
        "last": layer(12, 4),
    }
    model, x = Written(run, **layers).eval(), torch.randn(4, 3) if linear else inputs(4)
    found, _ = prunable(find_spaces(model, x), False)
    widths = [0 if space.layer == "branch" else space.size for space in found]
    small, _ = shrink(model, widths, example_input=x, compensation="prune", coupled=False)
    assert "more -> last: 12" in summarize(small, example_input=x)
    smaller, report = shrink(small, 0.5, example_input=x, probe_samples=32, coupled=False)
    assert report.widths == [6] and smaller(x).shape == small(x).shape


OUTPUTS = {
    "a mask": lambda y: (y, y > 0),
    "a dict with a mask": lambda y: {"scores": y, "mask": y > 0},
    "classes": lambda y: (y, y.argmax(1)),
    "a number": lambda y: (y, 1.0),
    "nothing": lambda y: (y, None),
}


def test_an_export_is_checked_in_its_imaginary_part_too():
    assert _off(torch.tensor([1 + 1j]), torch.tensor([1 + 5j])) > 0.5
    assert _off((torch.tensor([True]), None), (torch.tensor([False]), None)) > 0.5


@pytest.mark.parametrize(
    "ending, given",
    [(".pt2", given) for given in OUTPUTS] + [(".pt", "a mask"), (".pt", "a dict with a mask"), (".pt", "classes")],
)
def test_whatever_a_network_gives_beside_its_scores_can_be_exported(tmp_path, ending, given):
    model = Written(lambda m, x: OUTPUTS[given](m.net(x)), net=network()).eval()
    assert export(model, tmp_path / f"net{ending}", (3, 8, 8)) < 1e-4
    assert (tmp_path / f"net{ending}").exists()

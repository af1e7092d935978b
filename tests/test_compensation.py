"""Selection and merging on spaces: what is lossless, what is only pruned and why, constants, blocks without neurons."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune as masks

from models import build
from neuron_merging.compensation import Contents, constants
from neuron_merging.decompose import COMPENSATIONS, CRITERIA
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.neurons import bias_of
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut, largest_error
from neuron_merging.graph.units import kind
from neuron_merging.shrink import shrink
from tests.helpers import Written, conv, example, plant_multiples, with_statistics
from tests.spaces_networks import NETWORKS, Attention, Residual

RIGHT = 1e-5


def image(side=12, count=4):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def smaller(model, inputs, keep, kind="merge", criterion="l1-norm", **options):
    """The network with these indices of its spaces, by name; where a number is given, so many of the criterion's."""
    survey = find_spaces(model, inputs)
    known, chosen, absorbed = constants(survey), {}, []
    for space in survey.spaces:
        if space.name in keep:
            kept, contents = keep[space.name], Contents(survey, space, known)
            chosen[space] = contents.choose(kept, criterion) if isinstance(kept, int) else torch.as_tensor(kept)
            if kind == "start":
                absorbed += contents.start(chosen[space])
            else:
                absorbed += contents.absorbed(chosen[space], kind, **options)
    return cut(survey, chosen, absorbed)


def errors(model, small, x):
    """Of the smaller model, and of its graph."""
    with torch.no_grad():
        return [largest_error([network(x)], [model(x)]) for network in (small.model, small.graph)]


def space_of(model, inputs, name):
    survey = find_spaces(model, inputs)
    return survey, next(space for space in survey.spaces if space.name == name)


# ---------------------------------------------------------------- what is lossless


@pytest.mark.parametrize("criterion", CRITERIA)
def test_positive_multiples_are_lossless_in_the_derived_form(network, criterion):
    """Half of each layer's neurons are multiples of the other half: these come back in the readers."""
    widths = plant_multiples(network)
    x = example(network)
    survey = find_spaces(network, x)
    units = [space for space in survey.spaces if space.unit]
    assert len(units) == len(widths)
    keep = {space.name: width for space, width in zip(units, widths)}
    small = smaller(network, x, keep, "merge-derived", criterion, t=0.9, lam=0.9)
    assert small.own_class and max(errors(network, small, x)) < 1e-3
    assert max(errors(network, smaller(network, x, keep, "prune", criterion), x)) > 0.01


def multiple(layer, n, m, s, norm=None):
    """Channel n of a layer becomes s times channel m, and the BatchNorm behind it lets that pass."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[n] = s * parameter[m]
        if norm is not None:
            norm.running_mean[n], norm.running_var[n] = s * norm.running_mean[m], norm.running_var[m]
            norm.weight[n], norm.bias[n] = norm.weight[m], s * norm.bias[m]


def test_multiples_in_a_residual_stream_behind_concatenations_and_a_flatten_are_lossless():
    def run(net, x):
        x = net.norm(net.a(x)) + net.b(net.pool(x).repeat(1, 2, 1, 1)[:, :3])
        y = F.leaky_relu(torch.cat([net.c(F.relu(x)), x], 1), 0.1)
        return net.fc(F.max_pool2d(F.relu(net.mixed(y)), 3).flatten(1)) + net.last(F.relu(net.depth(y)).mean((2, 3)))

    torch.manual_seed(0)
    model = Written(
        run, a=conv(3, 8), norm=nn.BatchNorm2d(8), pool=nn.Identity(), b=conv(3, 8), c=conv(8, 4), mixed=conv(12, 6),
        depth=nn.Conv2d(12, 12, 3, groups=12, bias=False), fc=nn.Linear(6 * 16, 5), last=nn.Linear(12, 5),
    )  # fmt: skip
    model, x = with_statistics(model, image()), image()
    multiple(model.a, 1, 0, 2.0, model.norm)
    multiple(model.b, 1, 0, 2.0)
    multiple(model.mixed, 3, 2, 0.5)
    with torch.no_grad():
        model.depth.weight[5] = 3 * model.depth.weight[4]  # behind c, of which 4 channels come first
    keep = {"a": [0, *range(2, 8)], "mixed": [0, 1, 2, 4, 5]}
    small = smaller(model, x, keep, t=0.99)
    assert small.own_class and max(errors(model, small, x)) < 1e-4
    assert small.model.depth.groups == 11 and small.model.fc.in_features == 5 * 16
    assert max(errors(model, smaller(model, x, keep, "prune"), x)) > 0.01


@torch.no_grad()
def plant(model, survey, space):
    """Every channel of the second quarter becomes twice one of the first, at all writers and on all ways."""
    n, m = torch.arange(space.size // 4, space.size // 4 * 2), torch.arange(space.size // 4)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def copy_of(node, channels, factor):
        if node is not None:
            tensor = tensors[survey.network.names[node.target][0]]
            tensor[channels[n]] = factor * tensor[channels[m]]

    for writer in space.writers:
        rows, where = tensors[writer.name].movedim(writer.axis, 0), writer.positions(space.leaf)
        rows[where[n]] = 2 * rows[where[m]]
        copy_of(bias_of(survey.network, writer), where, 2)
    chains = [*space.ways.chains.values(), *(way.steps for way in space.ways.to_readers)]
    for step in {(step.node, step.time): step for chain in chains for step in chain}.values():
        parameters = step.node.args[1:5] if kind(step.node) == "batch_norm" else step.node.args[1:3]
        for node, factor in zip(parameters, (1, 2, 2, 1)):  # γ, β, μ, v, or filters and bias
            copy_of(node, step.channels, factor)


@pytest.mark.parametrize("name", [*NETWORKS, "resnet18", "squeezenet1_0", "mobilenet_v2", "googlenet"])
def test_multiples_in_all_spaces_that_a_merge_passes_are_lossless(name):
    torch.manual_seed(0)
    if name in NETWORKS:
        make, x = NETWORKS[name]
        model = make().eval()
    else:
        options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        x = torch.randn(4, 3, 64, 64)
        model = with_statistics(getattr(torchvision.models, name)(weights=None, **options), x)
    survey = find_spaces(model, x)
    for space in survey.spaces:
        if space.ways:
            plant(model, survey, space)
    keep = {s.name: [*range(s.size // 4), *range(s.size // 4 * 2, s.size)] for s in survey.spaces if s.ways}
    if keep and name in NETWORKS:
        with torch.no_grad():
            args = x if isinstance(x, tuple) else (x,)
            assert largest_error([smaller(model, x, keep, "prune").model(*args)], [model(*args)]) > 0.01
            assert largest_error([smaller(model, x, keep, t=0.99).model(*args)], [model(*args)]) < RIGHT
    elif keep:
        assert max(errors(model, smaller(model, x, keep, t=0.99), x)) < 1e-4


def test_multiples_that_a_depthwise_convolution_treats_differently_are_not_merged():
    def run(net, x):
        return net.b(F.relu(net.depth(F.relu(net.a(x)))).mean((2, 3)))

    model = Written(run, a=conv(3, 6), depth=nn.Conv2d(6, 6, 3, groups=6), b=nn.Linear(6, 2)).eval()
    multiple(model.a, 1, 0, 2.0)
    for scale, lossless in ((2.0, True), (-2.0, False)):
        with torch.no_grad():
            model.depth.weight[1], model.depth.bias[1] = scale * model.depth.weight[0], 2 * scale * model.depth.bias[0]
        small = smaller(model, image(), {"a": [0, 2, 3, 4, 5]}, t=0.99)
        assert (max(errors(model, small, image())) < RIGHT) == lossless


def test_channels_of_a_grouped_reader_are_merged_in_all_groups():
    def run(net, x):
        x = net.a(x)
        return net.b(F.relu(torch.cat([x, x], 1)))

    model = Written(run, a=conv(3, 6), b=nn.Conv2d(12, 4, 3, groups=2)).eval()
    multiple(model.a, 1, 0, 2.0)
    small = smaller(model, image(), {"a": [0, 2, 3, 4, 5]}, t=0.99)
    assert small.own_class and small.model.b.weight.shape[1] == 5 and max(errors(model, small, image())) < RIGHT


# ---------------------------------------------------------------- what is refused, and what is merged all the same


class Mixed(nn.Module):
    """One layer goes through GELU, one through LeakyReLU, one through ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.d(F.relu(self.c(F.leaky_relu(self.b(F.gelu(self.a(x)))))))


def test_a_space_is_refused_not_a_network():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(8, 6)
    for layer in (model.a, model.b, model.c):
        multiple(layer, 1, 0, 2.0)
    merged = {"example_input": x, "compensation": "merge"}
    _, report = shrink(model, {"b": 1 / 16, "c": 1 / 16}, threshold=0.99, **merged)
    assert [space.name for space in report.units] == ["a", "b", "c"] and report.note is None
    _, report = shrink(model, 0.25, **merged)
    assert report.note == "only pruned, as a merge does not pass: a: gelu is not positively homogeneous"
    assert not any(value != value for value in report.cosine)
    small = smaller(model, x, {"b": [0, *range(2, 16)], "c": [0, *range(2, 16)]}, t=0.99)
    assert max(errors(model, small, x)) < RIGHT
    pruned = smaller(model, x, {"a": [0, *range(2, 16)]}, t=0.99)
    assert torch.equal(pruned.model.b.weight, model.b.weight[:, [0, *range(2, 16)]])


@pytest.mark.parametrize("kind", ["merge", "merge-derived"])
def test_where_nothing_can_be_merged_an_error_says_so(kind):
    with pytest.raises(
        NeuronMergingError, match=rf"{kind} can merge nothing here.*a: gelu is not positively homogeneous"
    ):
        shrink(Mixed().eval(), {"a": 0.5}, example_input=torch.randn(2, 6), compensation=kind)


@pytest.mark.parametrize(
    ("name", "why"), [("qkv", "it goes through matmul|split|unbind"), ("embed", "add|cat|layer_norm"), ("up", "gelu")]
)
def test_obstacles_of_a_transformer(name, why):
    space = space_of(Attention().eval(), torch.randn(2, 7, 6), name)[1]
    assert space.ways is None and any(word in space.obstacle for word in why.split("|"))


def test_a_network_in_which_nothing_but_units_is_asked_for():
    model = Residual().eval()
    merged = {"example_input": image(16), "compensation": "merge"}
    _, report = shrink(model, 0.5, **merged)
    assert [space.name for space in report.units] == ["squeeze"] and "stem" in report.left_out
    _, report = shrink(model, 0.5, coupled=True, **merged)
    assert len(report.units) > 1 and "expand: " in report.note


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("criterion", CRITERIA)
def test_heads_are_scored_over_all_their_rows(criterion):
    model = Attention().eval()
    survey, space = space_of(model, torch.randn(2, 7, 6), "qkv")
    W = torch.cat([model.qkv.weight, model.qkv.bias[:, None]], 1).detach().double()
    by_head = W.view(3, 4, 8, 33).transpose(0, 1).reshape(4, -1)
    heads = torch.cat([by_head.view(4, 24, 33)[..., :-1].flatten(1), by_head.view(4, 24, 33)[..., -1]], 1)
    scores = CRITERIA[criterion](heads)
    kept = Contents(survey, space, {}).choose(2, criterion)
    assert kept.tolist() == sorted(scores.argsort(descending=True)[:2].tolist())


def test_twins_are_where_restoration_starts_from_heads_too():
    """Two equal heads: what reads one is added to what reads the other, though a merge refuses heads."""
    model, x = Attention().eval(), torch.randn(2, 7, 6)
    with torch.no_grad():
        for parameter in model.qkv.parameters():
            heads = parameter.view(3, 4, 8, -1)
            heads[:, 2] = heads[:, 1]
    small = smaller(model, x, {"qkv": [0, 1, 3]}, "start")
    assert max(errors(model, small, x)) < RIGHT
    assert max(errors(model, smaller(model, x, {"qkv": [0, 1, 3]}), x)) > 1e-3
    model = Mixed().eval()
    multiple(model.a, 1, 0, 1.0)
    multiple(model.c, 1, 0, 2.0)
    small = smaller(model, x[0], {"a": [0, *range(2, 16)], "c": [0, *range(2, 16)]}, "start")
    assert max(errors(model, small, x[0])) < RIGHT


def test_widths_that_make_no_sense_are_refused():
    survey, space = space_of(Mixed().eval(), torch.randn(2, 6), "a")
    for P in (0, 17):
        with pytest.raises(NeuronMergingError, match="neurons cannot be kept in a: give 1 to 16"):
            Contents(survey, space, {}).choose(P, "l1-norm")
    with pytest.raises(NeuronMergingError, match="unknown criterion"):
        Contents(survey, space, {}).choose(4, "none")
    with pytest.raises(NeuronMergingError, match="unknown compensation"):
        Contents(survey, space, {}).absorbed(torch.arange(4), "none")


# ---------------------------------------------------------------- constants


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", COMPENSATIONS)
def test_dead_neurons_go_first_and_their_constant_moves_on(kind, criterion):
    """Through GELU too; into a bias, a new one, or the BatchNorm behind."""

    def run(net, x):
        x = F.relu(net.norm(net.b(F.gelu(net.a(x)))))
        return net.d(F.relu(net.c(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Written(
        run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1, bias=False), norm=nn.BatchNorm2d(8),
        c=nn.Conv2d(8, 8, 1, bias=False), d=nn.Linear(8, 4),
    )  # fmt: skip
    model, x = with_statistics(model, image()), image()
    with torch.no_grad():
        model.a.weight[:3], model.a.bias[:3] = 0, torch.tensor([9.0, -9.0, 5.0])
        model.norm.weight[[1, 4]], model.norm.bias[[1, 4]] = 0, torch.tensor([7.0, -7.0])
        model.b.weight[[1, 4]] *= 50
    small = smaller(model, x, {"a": 5, "b": 6}, kind, criterion, t=0.99)
    assert small.own_class and max(errors(model, small, x)) < RIGHT
    assert small.model.c.bias is not None and model.c.bias is None
    assert not torch.equal(small.model.norm.running_mean, model.norm.running_mean[[0, 2, 3, 5, 6, 7]])


@pytest.mark.parametrize("kind", ["prune", "merge"])
def test_dead_channels_of_a_stream_go_first_and_their_constants_move_on(kind):
    """Each reader sees another constant: behind a BatchNorm, a depthwise convolution, an activation."""

    def run(net, x):
        x = net.a(x) + net.b(x)
        y = F.relu(net.c(F.silu(x))) + F.relu(net.d(F.relu(net.norm(net.depth(x)))))
        return net.head(y.mean((2, 3))) + net.flat(F.avg_pool2d(x, 3).flatten(1))

    torch.manual_seed(0)
    model = Written(
        run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 8, 3, bias=False), d=nn.Conv2d(8, 8, 1),
        depth=nn.Conv2d(8, 8, 3, groups=8), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 3), flat=nn.Linear(8 * 16, 3),
    )  # fmt: skip
    model, x = with_statistics(model, image()), image()
    with torch.no_grad():
        for layer, constant in ((model.a, 20.0), (model.b, 13.0)):
            layer.weight[[2, 5]], layer.bias[[2, 5]] = 0, torch.tensor([constant, -2 * constant])
    small = smaller(model, x, {"a": 6}, kind, t=0.99)
    assert small.own_class and small.model.a.out_channels == 6
    assert torch.equal(small.model.a.weight, model.a.weight[[0, 1, 3, 4, 6, 7]])
    assert max(errors(model, small, x)) < RIGHT


def test_what_only_looks_dead_is_not():
    """A residual channel that one writer leaves alone; one whose ReLU is dead on the example; a mean over channels."""

    def run(net, x):
        y = net.a(x) + net.b(x)
        return net.c(F.relu(y)) * net.d(y).mean()

    model = Written(run, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), c=nn.Conv2d(6, 3, 1), d=nn.Conv2d(6, 3, 1)).eval()
    with torch.no_grad():
        model.a.weight[1] = 0
        model.b.bias[2] = -1e3
    survey, space = space_of(model, image(), "a")
    known = constants(survey)
    assert known and not Contents(survey, space, known).dead.any()


def test_masked_weights_are_dead():
    model = Written(lambda net, x: net.b(F.relu(net.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3)).eval()
    masks.ln_structured(model.a, "weight", 0.25, n=2, dim=0)
    masks.remove(model.a, "weight")
    x = torch.randn(5, 6)
    assert max(errors(model, smaller(model, x, {"a": 6}, "prune"), x)) < RIGHT


# ---------------------------------------------------------------- blocks


@torch.no_grad()
def test_a_block_without_neurons_adds_a_constant():
    torch.manual_seed(0)
    model = with_statistics(build("ResNet", (14,)), torch.randn(32, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    zero = copy.deepcopy(model)
    for name in ("layer1.0", "layer2.1"):
        zero.get_submodule(name).conv2.weight.zero_()
    small = smaller(model, x, {"layer1.0.conv1": 0, "layer2.1.conv1": 0, "layer3.1.conv1": 40})
    expected = smaller(zero, x, {"layer3.1.conv1": 40})
    assert small.own_class and largest_error([small.model(x)], [expected.model(x)]) < RIGHT
    assert largest_error([small.graph(x)], [small.model(x)]) < RIGHT
    assert largest_error([small.graph(x[:3])], [small.model(x[:3])]) < RIGHT
    assert set(small.copies.values()) <= {*small.graph.graph.nodes}
    assert not [name for name, _ in small.graph.named_parameters() if name.startswith("layer1.0.conv1")]
    coupled = smaller(model, x, {"conv1": 12, "layer1.0.conv1": 0})
    assert coupled.own_class and coupled.model.layer1[0].conv2.value.shape == (12,)
    with pytest.raises(NeuronMergingError, match="neurons cannot be kept in conv1: give 1 to 16"):
        smaller(model, x, {"conv1": 0})


def test_the_form_of_weights_is_kept():
    def run(net, x):
        return net.c(F.relu(net.b(F.relu(net.a(x)))))

    torch.manual_seed(0)
    model = Written(run, a=conv(3, 8), b=conv(8, 8, bias=False), c=conv(8, 4)).to(memory_format=torch.channels_last)
    model.b.weight.requires_grad = False
    with torch.no_grad():
        model.a.weight[:3] = 0
    small = smaller(model.double().train(), image().double(), {"a": 5, "b": 6}).model
    assert small.training and not small.b.weight.requires_grad and not small.b.bias.requires_grad
    assert small.a.weight.dtype == small.b.bias.dtype == torch.float64
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in (small.a, small.b, small.c))

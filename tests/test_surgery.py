"""Networks with fewer channels: what they give is what the original gives with the readers' weights zeroed."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut, largest_error
from tests.spaces_networks import NETWORKS, Residual, image

RIGHT = 1e-5


def prepared(name):
    """The network with nothing at its initial value, its inputs and its spaces."""
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = make().eval()
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value += 0.3 * torch.rand_like(value)
    return model, inputs, find_spaces(model, inputs)


def outputs(model, inputs):
    with torch.no_grad():
        if isinstance(inputs, dict):
            return tree_leaves(model(**inputs))
        return tree_leaves(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def zeroed(model, keep):
    """The user's model, with zeros where its layers read what is dropped."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for space, kept in keep.items():
            gone = [i for i in range(space.size) if i not in kept]
            for place in space.readers:
                where = place.positions(space.leaf)[gone].flatten()
                model.get_parameter(place.name).index_fill_(place.axis, where, 0.0)
    return model


def some(space, ratio=0.4, seed=0):
    order = torch.randperm(space.size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: max(1, space.size - round(ratio * space.size))].tolist())


@pytest.mark.parametrize("name", NETWORKS)
def test_with_everything_kept_nothing_changes(name):
    model, inputs, survey = prepared(name)
    small = cut(survey, {space: range(space.size) for space in survey.spaces})
    assert small.own_class and type(small.model) is type(model)
    for result in (small.model, small.graph):
        assert largest_error(outputs(result, inputs), outputs(model, inputs)) < RIGHT


@pytest.mark.parametrize("name", NETWORKS)
def test_dropping_is_zeroing_what_the_readers_read(name):
    model, inputs, survey = prepared(name)
    keep = {space: some(space) for space in survey.spaces if "statistics" not in space.notes}
    assert keep
    small = cut(survey, keep)
    expected = outputs(zeroed(model, keep), inputs)
    assert largest_error(outputs(small.model, inputs), expected) < RIGHT
    assert largest_error(outputs(small.graph, inputs), expected) < RIGHT
    assert largest_error(outputs(model, inputs), expected) > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_each_space_by_itself(name):
    model, inputs, survey = prepared(name)
    for space in survey.spaces:
        small = cut(survey, {space: some(space)})
        given = outputs(small.model, inputs)
        if "statistics" not in space.notes:
            expected = outputs(zeroed(model, {space: some(space)}), inputs)
            assert largest_error(given, expected) < RIGHT
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small.model))
        assert after < before


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_at_once_runs(name):
    model, inputs, survey = prepared(name)
    small = cut(survey, {space: some(space, 0.3) for space in survey.spaces})
    shapes = [value.shape for value in outputs(model, inputs)]
    assert [value.shape for value in outputs(small.model, inputs)] == shapes


def test_a_number_in_forward_brings_the_graph_back_and_says_so():
    _, inputs, survey = prepared("Audio")
    small = cut(survey, {space: some(space) for space in survey.spaces})
    assert not small.own_class and "448" in small.why
    assert set(small.model(inputs)) == {"logits"}


def test_the_graph_takes_batches_of_other_sizes():
    model, _, survey = prepared("Attention")
    keep = {space: some(space) for space in survey.spaces if "statistics" not in space.notes}
    small, more = cut(survey, keep), torch.randn(5, 7, 6)
    assert survey.network.dynamic
    assert largest_error(outputs(small.graph, more), outputs(zeroed(model, keep), more)) < RIGHT


def test_integers_follow():
    _, _, survey = prepared("Attention")
    heads = next(space for space in survey.spaces if space.name == "qkv")
    small = cut(survey, {heads: [0, 2, 3]}).model
    assert (small.heads, small.dim, small.qkv.out_features, small.proj.in_features) == (3, 8, 72, 24)
    model, _, survey = prepared("Residual")
    hidden = next(space for space in survey.spaces if space.name == "expand")
    small = cut(survey, {hidden: range(30)}).model
    assert (small.depthwise.groups, small.depthwise.in_channels, small.depthwise.out_channels) == (30, 30, 30)
    assert (model.depthwise.groups, model.expand.out_channels) == (48, 48)


def test_modes_and_requires_grad_are_those_of_the_original():
    model = Residual().train()
    model.norm.eval()
    model.stem.weight.requires_grad = False
    survey = find_spaces(model, image)
    small = cut(survey, {space: some(space) for space in survey.spaces}).model
    assert small.training and not small.norm.training and small.expand.training
    assert not small.stem.weight.requires_grad and small.expand.weight.requires_grad


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            x = self.table(ids)
            return self.head(x + torch.relu(self.body(x)))

    model, ids = Tied(), torch.randint(0, 9, (2, 5))
    survey = find_spaces(model, ids)
    (space,) = survey.spaces
    small = cut(survey, {space: range(10)})
    assert small.own_class and small.model.head.weight is small.model.table.weight
    assert small.model.table.weight.shape == (9, 10) and small.model.table.embedding_dim == 10


def test_indices_that_a_space_lacks_are_refused():
    survey = find_spaces(Residual(), image)
    for wrong in ([], [99], [-1]):
        with pytest.raises(NeuronMergingError, match="keep at least one"):
            cut(survey, {survey.spaces[0]: wrong})


def test_two_results_share_nothing():
    _, inputs, survey = prepared("Audio")
    one, other = (cut(survey, {survey.spaces[0]: range(9)}).model for _ in range(2))
    before = outputs(other, inputs)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert torch.equal(outputs(other, inputs)[0], before[0])


def test_both_graphs_can_be_run_side_by_side():
    """What restoration does: what a reader sees in the smaller network, beside what it saw in the original."""
    _, inputs, survey = prepared("Residual")
    space = next(space for space in survey.spaces if space.name == "stem")
    small = cut(survey, {space: range(10)})
    seen = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            seen[node] = super().run_node(node)
            return seen[node]

    for graph in (survey.network.graph, small.graph):
        Recorder(graph).run(inputs)
    for place in space.readers:
        for node in survey.calls(place):
            wide, narrow = seen[node.args[0]], seen[small.copies[node.args[0]]]
            axis = 1 if wide.ndim == 4 else -1
            kept = place.positions(space.leaf)[:10].flatten()
            assert narrow.shape[axis] == len(kept)
            assert narrow.shape == wide.index_select(axis, kept).shape


def test_a_network_whose_copies_are_in_another_mode_than_they_say():
    """A feature extractor of torchvision has a graph for each mode; its copies begin with the one for training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1)).eval()
    model = create_feature_extractor(net, {"2": "low", "4": "out"}).eval()
    survey = find_spaces(model, image)
    small = cut(survey, {space: range(space.size) for space in survey.spaces})
    assert small.own_class and not small.model._forward_hooks
    assert largest_error(outputs(small.model, image), outputs(model, image)) < RIGHT
    assert int(small.model.get_submodule("1").num_batches_tracked) == 0

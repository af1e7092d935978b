"""The analysis: the algebra of axes, and the spaces of small networks."""

import random

import pytest
import torch
from torch import nn

from models import build
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.axes import (
    Leaf,
    count,
    fixed,
    freeze,
    leaves,
    mask,
    positions,
    product,
    regroup,
    resolve,
    side_by_side,
    split_product,
    split_sum,
    unify,
)
from neuron_merging.graph.spaces import find_spaces
from tests.spaces_networks import NETWORKS, Attention, Grouped, Residual, image


def survey_of(name):
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    return find_spaces(make(), inputs)


def by_name(survey):
    return {space.name: space for space in survey.spaces}


# --- axes ---------------------------------------------------------------------------------------------------------------


def test_a_reshape_divides_a_leaf_and_another_one_puts_it_together():
    qkv = Leaf(2304)
    parts = regroup([fixed(2), fixed(10), qkv], [2, 10, 3, 12, 64])
    assert [part.size for part in parts] == [2, 10, 3, 12, 64]
    assert list(leaves(qkv)) == parts[2:]
    (back,) = regroup(parts[2:], [2304])
    assert list(leaves(back)) == parts[2:]


def test_flattening_a_concatenation_repeats_each_part():
    a, b = Leaf(3), Leaf(2)
    _, flat = regroup([fixed(2), side_by_side([a, b]), fixed(4)], [2, 20])
    assert positions(flat, b).tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert positions(flat, a)[1].tolist() == [4, 5, 6, 7]


def test_a_channel_shuffle_makes_the_halves_one():
    a, b = Leaf(6), Leaf(6)
    groups, inside = regroup([side_by_side([a, b])], [2, 6])
    assert resolve(a) is resolve(b) is inside
    (shuffled,) = regroup([inside, groups], [12])
    assert positions(shuffled, inside)[2].tolist() == [4, 5]


def test_cuts_against_the_structure_are_refused():
    assert split_sum(product([Leaf(4), Leaf(6)]), 9) is None
    assert split_product(product([Leaf(4), Leaf(6)]), 3) is None
    assert regroup([product([Leaf(4), Leaf(6)])], [3, 8]) is None


def test_axes_of_unlike_structure_are_frozen_together():
    a, b = product([Leaf(4), Leaf(6)]), product([Leaf(6), Leaf(4)])
    unify(a, b, "because")
    assert {leaf.frozen for axis in (a, b) for leaf in leaves(axis)} == {"because"}


@pytest.mark.parametrize("seed", range(200))
def test_unified_axes_drop_the_same_indices(seed):
    """Two random structures of one size, made one: whatever is kept of the leaves, the masks of both are the same."""
    random.seed(seed)
    a, b = (random_axis(random.choice([12, 24, 48])) for _ in range(2))
    if a.size != b.size:
        a = side_by_side([a, Leaf(b.size)])
        b = side_by_side([b, Leaf(a.size - b.size)])
    unify(a, b)
    chosen = {}

    def keep(leaf):
        if leaf.frozen or leaf.size == 1:  # which is no space
            return torch.ones(leaf.size, dtype=torch.bool)
        return chosen.setdefault(leaf, torch.rand(leaf.size) < 0.5)

    left = mask(a, keep)
    assert torch.equal(left, mask(b, keep))
    assert count(a, {leaf: int(kept.sum()) for leaf, kept in chosen.items()}) == left.sum()
    for leaf, kept in chosen.items():
        assert not left[positions(a, leaf)[~kept].flatten()].any()


def random_axis(size):
    kind = random.random()
    if kind < 0.4 or size < 4:
        return Leaf(size)
    if kind < 0.7:
        outer = random.choice([d for d in range(2, size) if size % d == 0] or [size])
        return product([random_axis(outer), random_axis(size // outer)])
    first = random.randrange(1, size)
    return side_by_side([random_axis(first), random_axis(size - first)])


def test_a_frozen_leaf_freezes_what_it_is_made_one_with():
    a, b = Leaf(4), Leaf(4)
    freeze(a, "its reason")
    unify(a, b)
    assert [leaf.frozen for leaf in leaves(b)] == ["its reason"]


# --- spaces -------------------------------------------------------------------------------------------------------------


def test_a_chain_of_layers_is_the_papers():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 25, 5),
    )  # fmt: skip
    first, second = find_spaces(model, image).spaces
    assert (first.unit.layer, first.unit.bn, first.unit.next, first.obstacle) == ("0", "1", "4", None)
    assert (second.unit.layer, second.unit.bn, second.unit.next) == ("4", None, "7")
    assert second.readers[0].positions(second.leaf)[2].tolist() == list(range(50, 75))
    assert [place.name for place in first.followers] == [
        "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    ]  # fmt: skip


def test_an_activation_that_no_factor_passes_is_an_obstacle_to_merging():
    (space,) = find_spaces(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(3, 4)).spaces
    assert space.unit.activation == "gelu" and "gelu" in space.obstacle


def test_a_residual_stream_and_a_gate_are_spaces():
    spaces = by_name(survey_of("Residual"))
    stream, hidden, squeezed = spaces["stem"], spaces["expand"], spaces["squeeze"]
    assert [place.name for place in stream.writers] == ["stem.weight", "project.weight"]
    assert [place.name for place in stream.readers] == ["expand.weight", "head.weight"]
    assert [place.name for place in hidden.writers] == ["expand.weight", "excite.weight"]
    assert "depthwise.weight" in [place.name for place in hidden.followers]
    assert squeezed.unit.next == "excite"


def test_heads_are_dropped_whole():
    torch.manual_seed(0)
    spaces = by_name(find_spaces(Attention(heads=4, dim=32), torch.randn(2, 7, 6)))
    heads = spaces["qkv"]
    assert heads.size == 4
    assert heads.writers[0].positions(heads.leaf)[1].tolist() == [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert heads.readers[0].positions(heads.leaf)[1].tolist() == list(range(8, 16))
    assert spaces["up"].size == 64
    assert "statistics" in spaces["embed"].notes


def test_groups_are_dropped_whole():
    survey = find_spaces(Grouped(), image)
    names = {place.name for space in survey.spaces for place in space.places}
    assert {"a.weight", "b.weight", "c.weight", "d.weight"} <= names


def test_several_inputs_by_place_or_by_name():
    (one,), (other,) = survey_of("Pair").spaces, survey_of("PairByName").spaces
    assert [place.name for place in one.places] == [place.name for place in other.places]
    assert {place.name for place in one.readers} == {"c.weight", "d.weight"}


def test_an_unknown_operation_freezes_what_it_touches_and_is_named():
    survey = survey_of("Unknown")
    assert [space.name for space in survey.spaces] == ["a"]
    assert "diag_embed" in survey.left_out["b"]


def test_the_outputs_stay_whole():
    survey = find_spaces(Residual(), image)
    assert survey.left_out == {"head": "it is an output of the network"}


def test_parameters_that_the_graph_lacks_are_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].spare = nn.Linear(3, 3)
    assert find_spaces(model, torch.randn(2, 4)).unused == ("0.spare.weight", "0.spare.bias")


def test_the_network_is_left_as_it_is():
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_spaces(model, image)
    assert model.training and model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_exported_is_refused_in_a_line():
    class Numpy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum().item() > 0 and x.detach().numpy().max())

    with pytest.raises(NeuronMergingError, match="cannot be exported"):
        find_spaces(Numpy(3, 3), torch.randn(2, 3))


@pytest.mark.parametrize("arch, depth, units", [("LeNet_300_100", (), 2), ("VGG", (16,), 13), ("ResNet", (56,), 27)])
def test_the_papers_units(arch, depth, units):
    side, channels = (28, 1) if arch == "LeNet_300_100" else (32, 3)
    survey = find_spaces(build(arch, depth), torch.randn(2, channels, side, side))
    assert sum(space.unit is not None and space.obstacle is None for space in survey.spaces) == units

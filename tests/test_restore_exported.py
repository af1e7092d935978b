"""Restoration of transformers, of networks with several inputs and of what several layers share."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from neuron_merging.config import ShrinkConfig
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.restore import Options, restore
from neuron_merging.restore.batches import Source
from neuron_merging.shrink import shrink
from tests.test_exported import IDS, Attention, called


class TwoInputs(nn.Module):
    """An image and a vector, whose branches are concatenated; convolutions without biases among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding="valid", bias=False)
        self.c, self.d = nn.Linear(10, 40), nn.Linear(40, 20, bias=False)
        self.out = nn.Linear(44, 4)

    def forward(self, image, vector):
        image = self.b(self.a(image).relu()).relu().mean((2, 3))
        vector = self.d(torch.tanh(self.c(vector))).relu()
        return self.out(torch.cat([image, vector], 1))


def words(count, seed):
    random = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, 50, (count, 7), generator=random), "mask": torch.ones(count, 7)}


def pair(count, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 9, 9, generator=random), torch.randn(count, 10, generator=random)


@torch.no_grad()
def given(model, inputs):
    if isinstance(inputs, dict):
        return called(model, inputs)
    return model(*inputs)


CASES = {"transformer": (Attention, words), "two inputs": (TwoInputs, pair)}


def error(model, small, inputs):
    expected = given(model, inputs)
    return float((given(small, inputs) - expected).norm() / expected.norm())


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_restored_is_nearer_than_pruned_on_fresh_inputs(name, ratio):
    make, inputs = CASES[name]
    model, example = make().eval(), inputs(2, 0)
    before = copy.deepcopy(model.state_dict())
    pruned, _ = shrink(model, ratio, example_input=example, compensation="prune", coupled=True)
    restored, report = shrink(
        model, ratio, example_input=example, compensation="restore", coupled=True, images=inputs(96, 1)
    )
    assert type(restored) is make and report.note is None
    fresh = inputs(64, 2)
    assert error(model, restored, fresh) < 0.8 * error(model, pruned, fresh)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shapes = {name: value.shape for name, value in pruned.named_parameters()}
    added = {name for name, _ in restored.named_parameters()} - shapes.keys()
    assert added <= {"b.bias", "d.bias"} and all(restored.get_parameter(n).shape == s for n, s in shapes.items())
    again, _ = shrink(model, ratio, example_input=example, compensation="restore", coupled=True, images=inputs(96, 1))
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), again.parameters()))


@torch.no_grad()
def test_duplicates_are_restored():
    model = Attention().eval()
    model.up.weight[32:], model.up.bias[32:] = model.up.weight[:32], model.up.bias[:32]
    survey = find_spaces(model, words(2, 0))
    keep = {space: torch.arange(32) for space in survey.spaces if space.layer == "up"}
    pruned = cut(survey, keep).model
    done = restore(survey, keep, Source(survey.network, ShrinkConfig(), words(96, 1))())
    restored = done.small
    assert restored.own_class and done.fits.keys() <= {"down.weight", "out.weight"}
    fresh = words(16, 2)
    assert error(model, restored.model, fresh) < 1e-3 < error(model, pruned, fresh)
    for result in (restored.graph, restored.model):
        torch.testing.assert_close(given(result, fresh), given(model, fresh), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_nothing_dropped_changes_nothing(name):
    make, inputs = CASES[name]
    model = make().eval()
    same, report = shrink(
        model, 0.0, example_input=inputs(2, 0), compensation="restore", coupled=True, images=inputs(24, 1)
    )
    assert report.params[0] == report.params[1]
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_floating_point_inputs_can_be_made_up():
    model, example = TwoInputs().eval(), pair(2, 0)
    pruned, _ = shrink(model, 0.4, example_input=example, compensation="prune", coupled=True)
    restored, _ = shrink(model, 0.4, example_input=example, compensation="restore", coupled=True)
    other, _ = shrink(model, 0.4, example_input=example, compensation="restore", coupled=True, seed=2)
    assert error(model, restored, pair(64, 2)) < error(model, pruned, pair(64, 2))
    assert not torch.equal(restored.out.weight, other.out.weight)


def test_writers_are_fitted_where_their_inputs_are_other_ones():
    """Layers that lost outputs only too, if `refit` asks for it; those that lost nothing never."""
    model, fresh = Attention().eval(), words(32, 2)
    survey = find_spaces(model, words(2, 0))
    images = Source(survey.network, ShrinkConfig(), words(96, 1))()
    keep = {space: torch.arange(space.size * 3 // 4) for space in survey.spaces if space.layer in ("qkv", "up")}
    readers, both = (restore(survey, keep, images, Options(refit=refit)) for refit in (False, True))
    assert readers.fits.keys() == {"proj.weight", "down.weight"}
    assert both.fits.keys() == {"proj.weight", "down.weight", "up.weight"}
    assert error(model, both.small.model, fresh) < 1.1 * error(model, readers.small.model, fresh)


class OneSize(TwoInputs):
    def forward(self, image, vector):
        return super().forward(image.view(2, 3, 9, 9), vector)


def test_a_graph_for_one_size_gets_batches_of_that_size():
    model, example = OneSize().eval(), pair(2, 0)
    survey = find_spaces(model, example)
    parts = Source(survey.network, ShrinkConfig(), pair(31, 1))()
    assert not survey.network.dynamic and len(parts) == 15 and {len(value) for part in parts for value in part} == {2}
    pruned, _ = shrink(model, 0.4, example_input=example, compensation="prune", coupled=True)
    restored, _ = shrink(model, 0.4, example_input=example, compensation="restore", coupled=True, images=pair(96, 1))
    errors = [[error(model, small, pair(2, seed)) for seed in range(2, 34)] for small in (pruned, restored)]
    assert sum(errors[1]) < 0.8 * sum(errors[0])


def test_tied_weights_stay_and_the_report_says_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.inner, self.head = nn.Embedding(30, 24), nn.Linear(24, 24), nn.Linear(24, 30, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids, mask):
            x = self.table(ids) * mask[..., None]
            return {"scores": self.head(x + self.inner(x))}

    model, images = Tied().eval(), {"ids": words(96, 1)["ids"] % 30, "mask": torch.ones(96, 7)}
    example = tree_map(lambda x: x[:2], images)
    restored, report = shrink(model, 0.25, example_input=example, compensation="restore", coupled=True, images=images)
    assert restored.head.weight is restored.table.weight and restored.head.in_features == 18
    assert "not restored" in report.note and "table.weight" in report.note


def test_only_readers_change_and_widths_are_those_of_pruning():
    model, example = Attention().eval(), words(2, 0)
    pruned, _ = shrink(model, 0.5, example_input=example, compensation="prune", coupled=True, ignore=["qkv"])
    restored, report = shrink(
        model, 0.5, example_input=example, compensation="restore", coupled=True, images=words(96, 1), ignore=["qkv"]
    )
    changed = {
        name
        for (name, a), (_, b) in zip(pruned.named_parameters(), restored.named_parameters())
        if not torch.equal(a, b)
    }
    assert {"down.weight", "down.bias"} <= changed
    readers = {place.name for unit in report.units for place in unit.readers}
    assert {name for name in changed if name.endswith("weight")} <= readers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compensation": "restore"}, "give images"),
        ({"compensation": "merge", "coupled": True}, "merge can merge nothing here"),
        ({"compensation": "prune", "images": words(24, 1)}, "prune needs no data"),
        ({"compensation": "restore", "images": words(3, 1)}, "too few"),
        ({"compensation": "restore", "images": words(24, 1)["ids"]}, "as example_input is"),
        ({"compensation": "restore", "images": tree_map(lambda x: x[:, :5], words(24, 1))}, "not like the example"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(options, message):
    with pytest.raises(NeuronMergingError, match=message):
        shrink(Attention(), 0.5, example_input=words(2, 0), **options)


def test_a_tensor_where_there_could_be_more():
    model = Attention().eval()
    images = words(96, 1)["ids"]
    pruned, _ = shrink(model, 0.25, example_input=IDS, compensation="prune", coupled=True)
    restored, _ = shrink(model, 0.25, example_input=IDS, compensation="restore", coupled=True, images=images)
    fresh = {"ids": words(32, 2)["ids"]}
    assert error(model, restored, fresh) < 0.8 * error(model, pruned, fresh)


def test_what_has_no_derivatives_is_restored_all_the_same():
    """Nothing is moved in front of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 32), Detached(), nn.Linear(32, 6)).eval()
    x, fresh = torch.randn(512, 12), torch.randn(200, 12)
    pruned, _ = shrink(model, 0.5, example_input=(12,), compensation="prune", coupled=True)
    restored, _ = shrink(model, 0.5, images=x, compensation="restore", coupled=True)
    assert given(restored, (fresh,)).isfinite().all()
    assert error(model, restored, (fresh,)) < error(model, pruned, (fresh,))


class Detached(nn.Module):
    """No gradient passes."""

    def forward(self, x):
        return x.tanh().detach()

"""Networks whose forward pass asks for shapes as people write it, with several inputs: pruned and merged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuron_merging.errors import NeuronMergingError
from neuron_merging.shrink import shrink


class Attention(nn.Module):
    """A transformer block whose forward pass asks for shapes as torch.fx cannot; a mask is its second input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.table = 4, nn.Embedding(50, 32)
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, ids, mask=None):
        x = self.table(ids)
        batch, length = ids.shape
        assert length < 100
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.proj(y)
        x = x + self.down(F.gelu(self.up(x)))
        if mask is not None:
            x = x * mask[..., None]
        return {"scores": self.out(x.mean(1))}


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
INPUTS = {
    "a tensor": IDS,
    "a tuple": (IDS, torch.ones(2, 7)),
    "a mapping": {"ids": IDS, "mask": torch.ones(2, 7)},
}


def called(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)["scores"]
    return (model(*inputs) if isinstance(inputs, tuple) else model(inputs))["scores"]


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_heads_and_feed_forward_widths_are_dropped(name):
    model, inputs = Attention().eval(), INPUTS[name]
    before = copy.deepcopy(model.state_dict())
    small, report = shrink(model, 0.5, example_input=inputs, compensation="prune", coupled=True)
    widths = dict(zip((unit.layer for unit in report.units), report.widths))
    assert (
        widths["up"] == 32
        and small.up.out_features == 32
        and small.qkv.out_features == 48 == 3 * small.proj.in_features
    )
    assert type(small) is Attention and called(small, inputs).shape == (2, 5)
    assert report.params[1] < 0.6 * report.params[0] and report.macs[1] < report.macs[0]
    assert "out stays whole: it is an output of the network" in str(report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    whole, _ = shrink(model, 0.0, example_input=inputs, compensation="prune", coupled=True)
    torch.testing.assert_close(called(whole, inputs), called(model, inputs))


@torch.no_grad()
def test_the_strongest_stay_and_ratios_go_by_name():
    model = Attention().eval()
    model.up.weight[:10], model.up.bias[:10] = 0, 0
    small, report = shrink(model, {"up": 10 / 64}, example_input=INPUTS["a tuple"], compensation="prune")
    torch.testing.assert_close(called(small, INPUTS["a tuple"]), called(model, INPUTS["a tuple"]))
    assert torch.equal(small.up.weight, model.up.weight[10:]) and report.params[0] - report.params[1] == 10 * (
        32 + 1 + 32
    )
    left = shrink(model, 0.5, example_input=IDS, compensation="prune", coupled=True, ignore=["up"])[1]
    assert "up" not in [unit.layer for unit in left.units] and "it is ignored" in left.left_out["up"]


@pytest.mark.parametrize(
    ("kind", "why"),
    [("fold", "fold has no form for coupled channels"), ("merge", "merge can merge nothing here")],
)
def test_other_methods_say_that_they_cannot(kind, why):
    with pytest.raises(NeuronMergingError, match=why):
        shrink(Attention(), 0.5, example_input=INPUTS["a mapping"], compensation=kind, coupled=True)


@torch.no_grad()
def test_what_can_be_merged_is_merged_and_the_rest_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(6, 8)

        def forward(self, x, y):
            return self.c(F.relu(self.b(F.gelu(self.a(x))) + self.d(y)))

    model, inputs = Two().eval(), (torch.randn(5, 4), torch.randn(5, 6))
    for layer in (model.b, model.d):  # the same in both: one of the two channels is as good as both
        layer.weight[3], layer.bias[3] = 0.5 * layer.weight[2], 0.5 * layer.bias[2]
    small, report = shrink(
        model, {"b": 1 / 8}, example_input=inputs, compensation="merge", threshold=0.99, coupled=True
    )
    assert report.note is None and small.c.in_features == 7 and report.cosine[1] > 0.9
    if not torch.equal(small.b.weight, model.b.weight[[0, 1, 2, 4, 5, 6, 7]]):
        pytest.fail("the weaker twin stays")
    torch.testing.assert_close(small(*inputs), model(*inputs))
    report = shrink(model, 0.5, example_input=inputs, compensation="merge", threshold=0.1, coupled=True)[1]
    assert "only pruned, as a merge does not pass: a: gelu is not positively homogeneous" in str(report)


def test_what_asks_for_its_batch_is_pruned_all_the_same():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            if x.shape[0] > 100 and x.sum() > 0:
                return self.b(self.a(x))
            return self.b(self.a(x).relu()) if isinstance(x, torch.Tensor) else None

    class Untraceable(Branches):
        def forward(self, x):
            return self.b(self.a(x).relu()[: len(list(x))])

    small, report = shrink(Untraceable().eval(), 0.5, example_input=(6,), compensation="prune", coupled=True)
    assert report.widths == [4] and small(torch.randn(2, 6)).shape == (2, 3)
    small, report = shrink(Untraceable().eval(), 0.5, example_input=(6,), compensation="merge", coupled=True)
    assert report.widths == [4] and report.note is None and 0 < report.cosine[0] <= 1
    with pytest.raises(NeuronMergingError, match=r"a: it goes through slice; .*coupled channels .* can be"):
        shrink(Untraceable(), 0.5, example_input=(6,), compensation="fold")


@torch.no_grad()
def test_several_inputs_are_checked_as_one_is():
    with torch.inference_mode():
        frozen = Attention().eval()
    small, report = shrink(frozen, 0.5, example_input=INPUTS["a tuple"], compensation="prune")
    assert called(small, INPUTS["a tuple"]).shape == (2, 5) and report.params[1] < report.params[0]
    broken = Attention().eval()
    broken.up.weight[0, 0] = float("nan")
    with pytest.raises(NeuronMergingError, match=r"^up"):
        shrink(broken, 0.5, example_input=INPUTS["a tuple"], compensation="prune")

"""The choice of widths for whatever can be dropped: residual channels, heads, gates, recurrent states, concatenations."""

import numpy as np
import pytest
import torch
from torch import nn

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.graph.walk import Walk
from neuron_merging.shrink import shrink
from neuron_merging.widths import curves as W
from neuron_merging.widths.batches import split
from neuron_merging.widths.consumer import greedy
from neuron_merging.widths.output import Changes, Output, by_sample, sensitivities
from neuron_merging.widths.search import WidthSearch
from tests.helpers import of_a_layer
from tests.spaces_networks import NETWORKS, Attention, Residual
from tests.test_surgery import outputs, prepared

PRUNED = of_a_layer("prune")


def samples(inputs, count=24):
    """A batch of as many random inputs of the same form."""
    random = torch.Generator().manual_seed(1)
    inputs = (
        [inputs] if isinstance(inputs, torch.Tensor) else [*(inputs.values() if isinstance(inputs, dict) else inputs)]
    )
    return [
        torch.randn(count, *x.shape[1:], generator=random) if x.is_floating_point()
        else torch.randint(0, int(x.max()) + 1, (count, *x.shape[1:]), generator=random)
        for x in inputs
    ]  # fmt: skip


def searched(model, inputs, criterion="l2-norm", layerwise=None, sensitivity=True, count=48):
    survey = find_spaces(model, inputs)
    return WidthSearch(
        survey, survey.spaces, [samples(inputs, count)], criterion=criterion, layerwise=layerwise, ridge=0.03,
        sensitivity=sensitivity, biases=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_thinned_network_is_the_one_that_is_cut(name):
    """What pruned spaces do to the output, one by one and all together, by whatever they are read."""
    _, inputs, survey = prepared(name)
    spaces = [space for space in survey.spaces if "statistics" not in space.notes]
    batch = samples(inputs, 6)
    walk, held = (Walk(survey.network.graph, [batch], measures=False) for _ in range(2))
    errors = W.Errors(survey, spaces, walk, W.Measure("l2-norm", PRUNED, 0.03))
    errors.run()
    output = Output(survey, held)
    made = sensitivities(output, errors.forms)
    given = dict(zip(inputs, batch)) if isinstance(inputs, dict) else tuple(batch)
    whole = outputs(survey.network.graph, given)
    for space, curve, changes, forms in zip(spaces, errors.curves, made, errors.forms):
        for k in (k for k in changes if k):
            small = cut(survey, {space: curve.order[:k].sort().values}).graph
            assert changes[k] == pytest.approx(change(outputs(small, given), whole), rel=1e-3, abs=1e-9)
        assert changes[0] == pytest.approx(output.change(Changes(survey, held, forms[0]), output.varying, {}), rel=1e-6)


def change(some, others):
    """The mean squared difference of two outputs, centred per sample."""
    a, b = (by_sample(out, len(out[0])).double() for out in (some, others))
    difference = a - b
    return float((difference - difference.mean(1, keepdim=True)).pow(2).sum(1).mean())


@torch.no_grad()
def test_errors_are_summed_over_all_that_read_a_space():
    """Of a residual stream: what each of its readers errs by, fitted by ridge regression to the kept channels."""
    _, inputs, survey = prepared("Residual")
    (stream,) = (space for space in survey.spaces if space.name == "stem")
    walk = Walk(survey.network.graph, [samples(inputs)], torch.float64)
    errors = W.Errors(survey, [stream], walk, W.Measure("l2-norm", None, 0.03))
    readings = errors.readings[0]
    errors.run()
    assert sorted(reading.reader.weight for reading in readings) == ["expand.weight", "head.weight"]
    alone = [reading.consumers[0].regressed(errors.curves[0].order, [])[0] for reading in readings]
    assert errors.curves[0].error == pytest.approx(sum(alone))
    order = greedy([reading.consumers[0] for reading in readings], torch.zeros(16)).tolist()
    gains = []
    for j in range(16):  # the first by brute force
        gain = 0.0
        for consumer in (reading.consumers[0] for reading in readings):
            S = consumer.columns[j]
            A = consumer.U.T @ consumer.U if consumer.few else consumer.A
            G = consumer.slope[:, None] * consumer.W @ A[:, S]
            gain += float((G @ torch.linalg.inv(A[S][:, S] + consumer.penalty[S].diag()) * G).sum())
        gains.append(gain)
    assert order[0] == int(np.argmax(gains))


@torch.no_grad()
def test_a_channel_that_nothing_reads_goes_first():
    model = Residual().eval()
    dead = [3, 7, 8]
    model.expand.weight[:, dead] = 0
    model.head.weight.view(5, 16, 16)[:, dead] = 0
    search = searched(model, NETWORKS["Residual"][1], "auto")
    place = [space.name for space in search.spaces].index("stem")
    assert sorted(search.curves[place].order[-3:].tolist()) == dead
    assert search.curves[place].damage[13] < 1e-9 < search.curves[place].damage[12]


@torch.no_grad()
def test_a_head_whose_output_is_not_read_goes_first():
    torch.manual_seed(0)
    model = Attention(heads=8, dim=64).eval()
    model.proj.weight.view(64, 8, 8)[:, [2, 5]] = 0
    for layerwise in (None, PRUNED):
        search = searched(model, torch.randn(2, 7, 6), "auto", layerwise)
        heads = [space.name for space in search.spaces].index("qkv")
        assert sorted(search.curves[heads].order[-2:].tolist()) == [2, 5]
        assert search.curves[heads].damage[6] < 1e-9 < search.curves[heads].damage[5]
    kept = search.keep(search.widths(search.cost.full, {"params": 0.97}))
    assert not {2, 5} & set(kept[heads].tolist())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sensitivity", [True, False])
def test_chosen_widths_cost_at_most_the_budget(name, sensitivity):
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    search = searched(model, inputs, sensitivity=sensitivity, count=12)
    assert all(np.isfinite(curve.damage).all() and (np.diff(curve.damage) <= 0).all() for curve in search.curves)
    uniform = [max(1, round(0.6 * n)) for n in search.cost.full]
    assert (search.cost(search.widths(uniform)) <= search.cost(uniform)).all()
    for budget in ({"params": 0.7}, {"macs": 0.7}, {"params": 0.8, "macs": 0.7}):
        widths = search.widths(uniform, budget, multiple=2)
        shares = search.cost(widths) / search.whole
        assert shares[0] <= budget.get("params", 1) and shares[1] <= budget.get("macs", 1)
        assert all(k % 2 == 0 or k == n for k, n in zip(widths, search.cost.full))
    keep = dict(zip(search.spaces, search.keep(widths)))
    assert sum(p.numel() for p in cut(search.survey, keep).model.parameters()) == search.cost(widths)[0]


class Uneven(nn.Module):
    """A residual stream and two wide layers beside it, of which one is of copies of a few neurons."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 24), nn.Linear(24, 6)
        self.a, self.b, self.c, self.d = nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 24)
        self.a.weight[:], self.a.bias[:] = self.a.weight[:4].repeat(8, 1), self.a.bias[:4].repeat(8)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.a(x).relu())
        return self.head(x + self.d(self.c(x).relu()))


@pytest.mark.parametrize("sensitivity", [True, False])
@torch.no_grad()
def test_a_planted_case_is_better_than_uniform(sensitivity):
    torch.manual_seed(0)
    model, x = Uneven().eval(), torch.randn(200, 12)
    search = searched(model, x[:2], "auto", sensitivity=sensitivity, count=300)
    uniform = [round(0.6 * n) for n in search.cost.full]
    widths = dict(zip((space.name for space in search.spaces), search.widths(uniform)))
    assert widths["a"] <= 8 < widths["c"]

    def damage(kept):
        return sum(curve.damage[k] for curve, k in zip(search.curves, kept))

    assert damage(search.widths(uniform)) < 0.5 * damage(uniform)


# ---------------------------------------------------------------- inputs and calls


def test_samples_that_are_held_out():
    _, inputs, survey = prepared("Pair")
    x, y = samples(inputs, 10)
    seen, held = split(survey.network, [[x[:6], y[:6], 1.0], [x[6:], y[6:], 1.0]], 1 / 3)
    assert (
        [len(batch[0]) for batch in held] == [3] and torch.equal(held[0][0], x[:3]) and torch.equal(held[0][1], y[:3])
    )
    assert torch.equal(torch.cat([batch[1] for batch in seen]), y[3:]) and max(len(batch[0]) for batch in seen) <= 6
    with pytest.raises(NeuronMergingError, match="has to look at 3 inputs at least, not at 2"):
        split(survey.network, [[x[:2], y[:2], 1.0]], 1 / 3)


@torch.no_grad()
def test_what_is_estimated_only_is_said():
    torch.manual_seed(0)
    make, ids = NETWORKS["Recurrent"]
    search = searched(make().eval(), ids)
    assert [curve.estimated for curve in search.curves] == [True, True]
    make, images = NETWORKS["Residual"]
    assert not any(curve.estimated for curve in searched(make().eval(), images).curves)


@torch.no_grad()
def test_networks_that_torch_fx_cannot_trace_choose_widths():
    """By budgets, for a ratio, quickly, and with neurons chosen too."""
    torch.manual_seed(0)
    make, inputs = NETWORKS["Pair"]
    model = make().eval()
    about = {"example_input": inputs, "compensation": "prune", "probe_samples": 24, "coupled": True}
    for options in ({"ratio": 0.4, "widths": "auto"}, {"budget": {"macs": 0.5}, "widths": "quick", "criterion": "auto"},
                    {"ratio": 0.4, "criterion": "auto"}):  # fmt: skip
        small, report = shrink(model, **about | options)
        share = report.macs[1] / report.macs[0]
        assert share <= (0.5 if "budget" in options else 0.65) and report.search.curves and report.seconds_widths
        assert [out.shape for out in small(*inputs)] == [out.shape for out in model(*inputs)]

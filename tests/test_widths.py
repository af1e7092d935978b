"""The choice of widths: its costs, its error curves against brute force, its sensitivities, its budgets, dropped blocks."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.experiment import Experiment, shrink
from models import build
from neuron_merging import synthetic as probe
from neuron_merging.checkpoint import load_checkpoint, load_weights, save_checkpoint
from neuron_merging.config import ShrinkConfig
from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.decompose import CRITERIA
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.silence import Silence
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.walk import Walk, precision
from neuron_merging.methods import METHODS
from neuron_merging.restore.batches import Source
from neuron_merging.shrink import shrink as of_network
from neuron_merging.widths import curves as W
from neuron_merging.widths import search as S
from neuron_merging.widths.batches import split
from neuron_merging.widths.consumer import Consumer, greedy
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.output import Output, sensitivities
from neuron_merging.widths.search import allocate
from tests.helpers import (
    choose,
    decompose,
    of_a_layer,
    read,
    rebuild,
    restore,
    same,
    shape_of,
    smaller,
    units,
    widths_of,
    with_statistics,
)


def curve(damage):
    """A curve with this D."""
    damage = np.array(damage, dtype=float)
    return W.Curve(torch.arange(len(damage) - 1), damage, damage)


def surveyed(model, x):
    """The survey of a network, and the space of each of its units."""
    survey = find_spaces(model, x[:2])
    return survey, [space for space in survey.spaces if space.unit is not None]


def cost_of(model, shape, biases=False):
    return Cost(*surveyed(model, torch.zeros(2, *shape)), biases)


@torch.no_grad()
def curves_of(model, x, criterion="l2-norm", decompose=None, ridge=0.03, sensitivity=True):
    """Of every unit, on inputs x; a third of them is held out for sensitivities."""
    survey, spaces = surveyed(model, x)
    seen, held_out = split(survey.network, [[x]], S.HELD_OUT if sensitivity else 0.0)
    kind = precision(survey.network.graph, [[x]], len(x) * count_macs(model, tuple(x.shape[1:])))
    return W.curves(survey, spaces, seen, held_out, W.Measure(criterion, decompose, ridge), kind)


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("kind", ["prune", "restore"])
def test_costs_are_those_of_the_smaller_network(network, kind):
    found, shape, random = units(network), shape_of(network), np.random.default_rng(0)
    cost = cost_of(network, shape, biases=kind == "restore")
    for _ in range(3):
        widths = [int(random.integers(1, n + 1)) for n in widths_of(network, found)]
        small = smaller(kind, network, found, choose(network, found, widths, "l2-norm"), shape, probe_samples=16)
        assert cost(widths) == pytest.approx([count_parameters(small), count_macs(small, shape)], abs=1e-3)
        one_more = np.array(widths)
        one_more[-1] += 1
        assert cost(one_more) - cost(widths) == pytest.approx(cost.marginal(widths)[:, -1])
    assert cost_of(network, shape)(cost.full) == pytest.approx([count_parameters(network), count_macs(network, shape)])


# ---------------------------------------------------------------- error curves


def seen(n=400, neurons=6, taps=3, outputs=5, ridge=0.03):
    """What a consumer sees, made up, its columns by neuron or tap by tap."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(neurons * taps, neurons * taps, generator=random, dtype=torch.float64)
    U = torch.randn(n, neurons * taps, generator=random, dtype=torch.float64) @ mixing + 1
    weights = torch.randn(outputs, neurons * taps, generator=random, dtype=torch.float64)
    slope = torch.rand(outputs, generator=random, dtype=torch.float64) + 0.5
    columns = torch.arange(neurons * taps).view(taps, neurons).T
    return Consumer(U.clone(), weights, slope, columns, ridge), U, weights, slope, columns


def brute_force(U, weights, slope, columns, penalty, keep):
    """Ridge regression of what the dropped neurons gave on the kept ones: weights [M, F] and the error that it minimises."""
    N = len(columns)
    S = columns[keep].flatten()
    D = columns[[n for n in range(N) if n not in keep]].flatten()
    X, R = U[:, S] - U[:, S].mean(0), (U[:, D] - U[:, D].mean(0)) @ weights[:, D].T
    A = X.T @ X / len(U) + penalty[S].diag()
    B = torch.linalg.solve(A, X.T @ R / len(U))
    whole = torch.zeros_like(weights)
    whole[:, S] = weights[:, S] + B.T
    error = ((R - X @ B).pow(2).mean(0) + (penalty[S, None] * B.pow(2)).sum(0)) * slope.pow(2)
    return whole, float(error.sum())


@pytest.mark.parametrize("n", [400, 12])
def test_one_factor_gives_the_regression_for_every_width(n):
    """Also where there are fewer samples than features, by another way."""
    looked, U, weights, slope, columns = seen(n)
    assert looked.few == (n < U.shape[1])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    error, thinned = looked.regressed(order, [0, 2, 4])
    for form in thinned:
        W = form.put(weights)
        whole, lost = brute_force(U, weights, slope, columns, looked.penalty, order[: form.k].tolist())
        assert error[form.k] == pytest.approx(lost, rel=1e-6)
        assert torch.allclose(W, whole, atol=1e-4)
        assert torch.allclose(U.mean(0) @ W.T + form.c, U.mean(0) @ weights.T, atol=1e-3)
    assert (np.diff(error) <= 1e-9).all()
    assert error[-1] == 0


def test_the_error_of_a_compensation_is_that_of_the_consumers_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5))
    x, found = torch.randn(300, 10), units(model)
    for kind in ("prune", "merge", "lbyl"):
        (made,) = curves_of(model, x, decompose=of_a_layer(kind, threshold=0.1), sensitivity=False)
        for k in (1, 4, 6):
            small = smaller(kind, model, found, choose(model, found, [k], "l2-norm"), threshold=0.1)
            with torch.no_grad():
                assert made.error[k] == pytest.approx(float((small(x) - model(x)).pow(2).sum(1).mean()), rel=1e-4)
        assert made.error[8] == 0


def test_the_greedy_order_takes_what_explains_most():
    """Step by step as by brute force, and twins are not kept together while something else is missing."""
    looked, U, weights, slope, columns = seen()
    A = (U - U.mean(0)).T @ (U - U.mean(0)) / len(U)
    order, kept = greedy([looked], torch.zeros(len(looked.columns))).tolist(), []
    for _ in range(len(columns)):
        gains = {}
        for j in set(range(len(columns))) - set(kept):
            S = columns[[*kept, j]].flatten()
            G = slope[:, None] * weights @ A[:, S]
            gains[j] = float((G @ torch.linalg.inv(A[S][:, S] + looked.penalty[S].diag()) * G).sum())
        kept.append(max(gains, key=gains.get))
    assert order == kept
    U[:, columns[order[1]]] = U[:, columns[order[0]]]
    weights[:, columns[order[1]]] = weights[:, columns[order[0]]]
    twins = greedy([Consumer(U, weights, slope, columns, 1e-6)], torch.zeros(len(columns))).tolist()
    assert twins[-1] in order[:2]


def test_the_greedy_order_keeps_error_lower_than_the_norm_does():
    looked, *_ = seen(neurons=24, taps=2)
    by_norm = looked.W[:, looked.columns].pow(2).sum((0, 2)).argsort(descending=True)
    by_gain = greedy([looked], torch.zeros(len(looked.columns)))
    least, norm = (looked.regressed(order, [])[0] for order in (by_gain, by_norm))
    assert least[4:20].mean() < norm[4:20].mean()


# ---------------------------------------------------------------- sensitivities


def test_sensitivity_is_the_change_of_the_output_when_one_unit_alone_is_thinned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    x, found = torch.randn(300, 10), units(model)
    held_out = x[:100]
    survey, spaces = surveyed(model, x)
    walk, held = (Walk(survey.network.graph, [[part]], torch.float64) for part in (x[100:], held_out))
    with torch.no_grad():
        errors = W.Errors(survey, spaces, walk, W.Measure("l2-norm", of_a_layer("prune"), 0.03))
        errors.run()
        made = sensitivities(Output(survey, held), errors.forms)
    for i, k in itertools.product(range(2), (2, 4, 8, 12)):
        widths = [16, 16]
        widths[i] = k
        small = rebuild(model, found, decompose(model, found, widths, "l2-norm", "prune"))
        assert made[i][k] == pytest.approx(change_of_output(model, small, held_out), rel=1e-3)


def change_of_output(model, small, x):
    """The mean squared difference of what two networks make of x, centred per sample."""
    with torch.no_grad():
        change = small(x) - model(x)
    return float((change - change.mean(1, keepdim=True)).pow(2).sum(1).mean())


def loss_of_output(model, small, x):
    """1 − the cosine between what two networks make of all of x, centred per sample."""
    with torch.no_grad():
        y, z = ((out - out.mean(1, keepdim=True)).double() for out in (model(x), small(x)))
    return max(0.0, float(1 - (y * z).sum() / (y.norm() * z.norm())))  # less than 0 by rounding only


@pytest.mark.parametrize("kind", [name for name, method in METHODS.items() if method.local])
def test_joint_damage_is_what_the_output_loses_with_all_units_thinned(kind):
    torch.manual_seed(0)
    x = torch.randn(40, 3, 16, 16)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Conv2d(16, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(90, 7),
    )  # fmt: skip
    with torch.no_grad():
        for name in ("1", "5", "8"):
            bn = model.get_submodule(name)
            bn.weight.uniform_(0.5, 1.5)
            bn.weight[-2:], bn.bias[-2:] = 0, 2  # constants that are dropped, and absorbed by merge-derived
    with_statistics(model, x, affine=False)  # those with which the probe is normalised
    assert_joint_damage(model, x, kind, [[12, 16, 10], [6, 8, 5], [3, 16, 8]])


@pytest.mark.parametrize("kind", ["prune", "merge-derived"])
def test_joint_damage_of_a_network_that_lost_a_block(kind):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    model = with_statistics(build("ResNet", (8,)), x)
    full = widths_of(model)
    assert_joint_damage(model, x, kind, [full, [0, *full[1:]], [8, 0, 50]])


def assert_joint_damage(model, x, kind, choices):
    """As of the networks themselves; nothing where nothing is dropped, which comes first."""
    told, found = {"threshold": 0.0}, units(model, tuple(x.shape[1:]))
    curves = [curve(range(n, -1, -1)) for n in widths_of(model, found)]  # which keep the first neurons
    made = joint_damage(model, curves, choices, x, of_a_layer(kind, **told))
    assert made[0] < 1e-9 < min(made[1:])
    for widths, damage in zip(choices, made):
        small = smaller(kind, model, found, [torch.arange(k) for k in widths], tuple(x.shape[1:]), **told)
        assert damage == pytest.approx(loss_of_output(model, small, x), rel=0.01, abs=1e-9)


@torch.no_grad()
def joint_damage(model, curves, choices, x, decompose):
    survey, spaces = surveyed(model, x)
    kind = precision(survey.network.graph, [[x]], len(x) * count_macs(model, tuple(x.shape[1:])))
    return W.joint_damage(survey, spaces, curves, choices, [[x]], decompose, kind)


def test_an_output_that_died_lost_more_than_one_that_grew():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for layer, weight in zip(model[::2], ([[1.0], [1.0]], [[0.0, 0.0], [3.0, -2.0]], [[0.0, 1.0], [0.0, -1.0]])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.zero_()
    x, told, found = torch.rand(50, 1), {}, units(model)
    grown, died = [1, 2], [2, 1]  # by the first neurons: three times what it was, and nothing
    change = {}
    for widths in (grown, died):
        small = smaller("prune", model, found, [torch.arange(k) for k in widths], **told)
        change[tuple(widths)] = change_of_output(model, small, x)
    assert change[1, 2] == pytest.approx(4 * change[2, 1])
    damage = joint_damage(model, [curve([2, 1, 0])] * 2, [grown, died], x, of_a_layer("prune", **told))
    assert damage == pytest.approx([0, 1], abs=1e-6)


def test_chosen_widths_are_no_worse_together_than_the_given_ones():
    """Also where the sum of damages, each unit by itself, speaks for others."""
    config, margins = ShrinkConfig(probe_samples=300), []

    def together(model, widths):
        small = smaller("prune", model, units(model), choose(model, units(model), widths, "l2-norm"))
        network = find_spaces(model, torch.zeros(2, 6)).network
        return loss_of_output(model, small, torch.cat([x for (x,) in Source(network, config)(1.5)]))

    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
        cost = cost_of(model, (6,))
        small = [w for w in itertools.product(range(1, 6), repeat=2) if (cost(w) <= cost([3, 3])).all()]
        best = min(small, key=lambda widths, model=model: together(model, widths))
        about = {"example_input": (6,), "compensation": "prune", "widths": "auto", "probe_samples": 300}
        _, report = of_network(model, best, **about)
        assert together(model, report.widths) <= together(model, best) * 1.001
        summed = allocate(report.search.curves, cost, cost(best))
        margins.append(together(model, summed) - together(model, best))
    assert max(margins) > 1e-4  # what the sum alone would have cost


def test_what_is_compared_with_the_given_widths(monkeypatch):
    """Only what a compensation by layers makes of `auto`, for a ratio; the given widths in multiples, never without neurons."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    compared = []

    def first_is_worse(survey, spaces, curves, choices, batches, decompose, precision):
        compared.append(choices[1])
        return [2.0, 1.0]

    monkeypatch.setattr("neuron_merging.widths.search.joint_damage", first_is_worse)
    about = {"example_input": (6,), "compensation": "prune", "widths": "auto", "probe_samples": 20}
    kept = {
        "ratio": of_network(model, 0.5, **about)[1].widths,
        "multiple": of_network(model, 0.5, multiple=3, **about)[1].widths,
    }
    assert kept == {"ratio": [4, 10], "multiple": [3, 9]} and compared == [*kept.values()]
    for change in (
        {"multiple": 5}, {"widths": "quick"}, {"budget": {"params": 0.5}}, {"compensation": "restore"}, {"compensation": "fold"}
    ):  # fmt: skip
        assert of_network(model, 0.5, **about | change)[1].widths not in kept.values()
    assert len(compared) == 2


def test_curves_look_at_nothing_else(network):
    """The network is left as it is; the same probe gives the same curves; D falls to 0 with the width."""
    before = copy.deepcopy(network.state_dict())
    found, x = units(network), probe.make(network, shape_of(network), 48)
    first, second = (curves_of(network, x) for _ in range(2))
    assert same(before, network)
    for unit, a, b, N in zip(found, first, second, widths_of(network, found)):
        assert np.array_equal(a.damage, b.damage)
        assert len(a.damage) == N + 1 and a.damage[-1] == 0 and a.damage[0] > 0
        assert (np.diff(a.damage) <= 0).all()
        scores = CRITERIA["l2-norm"](read(network, unit).W)
        assert set(a.order.tolist()) == set(range(N))
        assert (scores[a.order].diff() <= 1e-6).all()


@pytest.mark.parametrize("kind", [k for k in METHODS if not k.endswith("-bn")])
def test_every_method_has_curves(kind):
    model = build("ResNet", (8,))
    x = probe.make(model, (3, 32, 32), 24)
    made = curves_of(model, x, decompose=of_a_layer(kind, seed=3))
    assert all(np.isfinite(c.damage).all() and c.damage[0] > 0 for c in made)


# ---------------------------------------------------------------- the choice


def test_the_choice_is_the_best_there_is():
    """Against all choices, on convex curves: within what one neuron costs of the optimum, and never above the budget."""
    model = nn.Sequential(*(m for i in range(3) for m in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 3)).eval()
    found = units(model)
    cost = cost_of(model, (6,))
    random = np.random.default_rng(0)
    for _ in range(5):
        falls = [np.sort(random.exponential(size=6))[::-1] for _ in found]
        curves = [curve([*np.cumsum(fall[::-1])[::-1], 0]) for fall in falls]
        for share in (0.3, 0.5, 0.8):
            budget = cost(cost.full) * share
            chosen = allocate(curves, cost, budget)
            assert (cost(chosen) <= budget).all()
            damage = sum(c.damage[w] for c, w in zip(curves, chosen))
            every = [w for w in itertools.product(range(1, 7), repeat=3) if (cost(w) <= budget).all()]
            best = min(sum(c.damage[w] for c, w in zip(curves, ws)) for ws in every)
            assert damage <= best + max(fall.max() for fall in falls)
            assert all(
                (cost(np.array(chosen) + step) > budget).any()
                for step in np.eye(3, dtype=int)
                if (np.array(chosen) + step).max() <= 6
            )


def test_either_budget_alone_and_both():
    model = build("ResNet", (8,))
    cost = cost_of(model, (3, 32, 32))
    curves = [curve(np.linspace(1, 0, n + 1) ** 2) for n in cost.full]
    full = cost(cost.full)
    both = cost(allocate(curves, cost, full * 0.5))
    params = cost(allocate(curves, cost, full * (0.5, np.inf)))
    macs = cost(allocate(curves, cost, full * (np.inf, 0.5)))
    assert (both <= full * 0.5).all() and params[0] <= full[0] * 0.5 and macs[1] <= full[1] * 0.5
    assert params[1] > full[1] * 0.5 and macs[0] > full[0] * 0.5  # what is not limited is not spared
    with pytest.raises(NeuronMergingError, match="no widths are within the budget: the least have"):
        allocate(curves, cost, full * 0.01)


def test_widths_in_multiples_and_blocks_left_out():
    model = build("ResNet", (14,))
    found = units(model)
    assert all(unit.branch for unit in found)
    cost = cost_of(model, (3, 32, 32))
    flat = [curve([1e-9 * (n - k) for k in range(n + 1)]) for n in cost.full[:1]]
    curves = [*flat, *(curve(np.linspace(1, 0, n + 1)) for n in cost.full[1:])]
    chosen = allocate(curves, cost, cost(cost.full) * 0.6, multiple=8)
    assert all(w % 8 == 0 and w > 0 for w in chosen)
    chosen = allocate(curves, cost, cost(cost.full) * 0.6, droppable=[True] * len(found))
    assert chosen[0] == 0  # it costs nothing to lose it


# ---------------------------------------------------------------- blocks that are left out


def test_a_block_that_comes_back_brings_its_batchnorm():
    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.a, self.b = nn.Conv2d(channels, 2, 3, padding=1), nn.Conv2d(2, channels, 3, padding=1)
            self.bn = nn.BatchNorm2d(channels)

        def forward(self, x):
            return x + self.bn(self.b(self.a(x).relu()))

    model = nn.Sequential(Block(2), Block(2)).eval()
    cost = cost_of(model, (2, 6, 6))
    first, second = (cost(w)[0] for w in ([0, 2], [2, 2]))  # parameters without the first block, and of all
    for limit in (first - 1, first, second - 1):
        curves = [curve([0.1, 0.05, 0]), curve([5, 4, 0])]  # the second is wanted back
        chosen = allocate(curves, cost, (limit, np.inf), droppable=[True, True])
        assert cost(chosen)[0] <= limit


@pytest.mark.parametrize("arch", ["ResNet-14", "WideResNet-10-1"])
@torch.no_grad()
def test_a_block_left_out_is_a_constant(arch, tmp_path):
    name, *depth = arch.split("-")
    depth = tuple(map(int, depth))
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    model = with_statistics(build(name, depth), x)
    found = units(model)
    widths = widths_of(model, found)
    widths[1] = 0
    keep = choose(model, found, widths, "l2-norm")
    silent = copy.deepcopy(model)
    consumer = silent.get_submodule(found[1].next)
    consumer.weight.zero_()
    for kind in METHODS:
        small = smaller(kind, model, found, keep, (3, 32, 32), probe_samples=16, images=x)
        assert small(x).shape == (4, 10)
        if kind == "prune":
            assert torch.allclose(small(x), silent(x), atol=1e-5)
        cost = cost_of(model, (3, 32, 32), biases=kind == "restore")
        assert cost(widths)[1] == count_macs(small, (3, 32, 32))
        counted = count_parameters(small)  # a constant instead of the consumer and its BatchNorm
        assert (
            cost(widths)[0] >= counted if kind == "restore" else cost(widths)[0] == counted
        )  # not every layer gets a bias
        save_checkpoint(tmp_path / "small.pth.tar", small, widths=widths)
        checkpoint = load_checkpoint(tmp_path / "small.pth.tar")
        again = load_weights(build(name, depth), checkpoint).eval()
        assert torch.equal(again(x), small(x))


@torch.no_grad()
def test_restoration_gives_a_lost_block_its_mean():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32)
    model = with_statistics(build("ResNet", (14,)), x)
    found = units(model)
    widths = widths_of(model, found)
    widths[0] = 0
    small = restore(model, found, choose(model, found, widths, "l2-norm"), x)
    bn = model.get_submodule(found[0].next_bn)
    assert torch.allclose(small.get_submodule(found[0].next).value, bn.bias, atol=1e-4)
    assert isinstance(small.get_submodule(found[0].layer), Silence)


@torch.no_grad()
def test_a_block_with_a_stride_a_pool_and_a_sum_in_place():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 5, stride=2, padding=(1, 2)), nn.Conv2d(6, 8, 3, padding=1)
            self.down = nn.Conv2d(4, 8, 5, stride=4, padding=(1, 2))

        def forward(self, x):
            out = self.b(F.max_pool2d(self.a(x).relu(), 2))
            out += self.down(x)
            return out

    model, x = Block().eval(), torch.randn(2, 4, 21, 24)
    shape = (4, 21, 24)
    (unit,) = units(model, shape)
    small = rebuild(model, [unit], decompose(model, [unit], [0], "l1-norm", "merge", shape=shape), shape)
    assert torch.allclose(small(x), model.down(x) + model.b.bias.view(1, -1, 1, 1), atol=1e-6)
    assert units(small, shape) == []
    fitted = restore(model, [unit], [torch.arange(0)], x)
    assert torch.allclose((fitted(x) - model(x)).mean((0, 2, 3)), torch.zeros(8), atol=1e-5)


def test_a_chain_cannot_lose_all_its_neurons():
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(NeuronMergingError, match="0 of 4 neurons cannot be kept"):
        choose(chain, units(chain), [0], "l1-norm")


def test_what_is_left_over_goes_back_over_flat_pieces():
    """The hull jumps over the budget, and the first neuron that comes back helps nothing by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
    cost = cost_of(model, (8,))
    damage = curve([9, 5, 5, 5, 4.9, 1, 1, 1, 1, 0.9, 0])
    for kept, best in ((10, 10), (9, 9), (8, 5), (5, 5), (4, 4), (3, 1), (1, 1)):
        assert allocate([damage], cost, cost([kept])) == [best]


# ---------------------------------------------------------------- on the command line

LENET = ("--arch", "LeNet_300_100", "--criterion", "l1-norm", "--evaluate", "--json", "-")


@pytest.mark.parametrize(("kind", "more"), [("prune", 2), ("merge", 2), ("restore", 1)])
def test_auto_is_better_than_uniform_for_no_more(cli, kind, more):
    common = (*LENET, "--model-type", kind, "--pruning-ratio", "0.7")
    uniform, auto = (cli(*common, "--widths", rule).row for rule in ("uniform", "auto"))
    assert auto["params"] <= uniform["params"] and auto["macs"] <= uniform["macs"]
    assert auto["accuracy"] > uniform["accuracy"] + more
    assert auto["widths_rule"] == "auto" and auto["seed"] == 1 and auto["seconds_widths"] <= auto["seconds_decompose"]
    again = cli(*common, "--widths", ",".join(map(str, auto["widths"]))).row
    assert again["correct"] == auto["correct"]


def test_chosen_widths_are_saved_and_printed(cli, tmp_path):
    file = tmp_path / "small.pth.tar"
    options = ("--model-type", "merge", "--widths", "auto", "--budget", "params=0.4,macs=0.5", "--multiple", "8")
    made = cli("--arch", "LeNet_300_100", "--evaluate", *options, "--save", file, "--json", tmp_path / "row.json")
    row = json.loads((tmp_path / "row.json").read_text())
    assert all(w % 8 == 0 or w == n for w, n in zip(row["widths"], (300, 100)))
    assert row["budget"] == "params=0.4,macs=0.5" and row["multiple"] == 8
    assert row["params"] <= 0.4 * row["params_original"] and row["ratio"] is None
    assert f"widths      {','.join(map(str, row['widths']))}" in made.out
    assert cli("--pretrained", file, *LENET).row["correct"] == row["correct"]


def test_the_neurons_that_explain_most(cli):
    common = (*LENET[:2], *LENET[4:], "--pruning-ratio", "0.8", "--model-type")
    greedy, norm, pruned = (
        cli(*common, kind, "--criterion", criterion).row
        for kind, criterion in (("restore", "auto"), ("restore", "l1-norm"), ("prune", "l1-norm"))
    )
    assert greedy["widths"] == norm["widths"] and greedy["criterion"] == "auto"
    assert greedy["correct"] != norm["correct"] and greedy["accuracy"] > pruned["accuracy"] + 20


def test_widths_that_cannot_be_are_refused_whatever_the_order(cli):
    for widths in ("0,5", "-5,10", "400,100"):
        for criterion in ("auto", "l1-norm"):
            done = cli(*LENET[:2], *LENET[4:], "--model-type", "merge", "--criterion", criterion, f"--widths={widths}")
            assert done.code == 2 and "of 300 neurons cannot be kept in ip1: give 1 to 300" in done.err


def test_what_cannot_work_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("neuron_merging.widths.search.curves", None)
    bent = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).eval()
    for kind in ("merge", "merge-bn"):
        with pytest.raises(
            NeuronMergingError, match=r"merge can merge nothing here.*0: gelu is not positively homogeneous"
        ):
            of_network(bent, compensation=kind, widths="auto", example_input=(6,), images=torch.randn(9, 6))
    with pytest.raises(NeuronMergingError, match="prune-bn measures BatchNorm on real images: give images"):
        of_network(bent, compensation="prune-bn", widths="auto", example_input=(6,))


def test_few_images_for_a_choice_are_put_behind_made_up_ones():
    """How many it takes at least, of whatever kind: test_widths_of_spaces.py."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    for count in (2, 3):
        assert of_network(model, widths="auto", images=torch.randn(count, 6))[1].params[1] < 60


def test_two_branches_added_to_each_other_are_measured_by_their_sum():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.up, self.side = (nn.Linear(6, 6) for _ in range(4))
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(self.up(self.a(x).relu()) + self.side(self.b(x).relu()))

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(64, 6)
    made = curves_of(model, x, sensitivity=False)
    with torch.no_grad():
        total = (model.up(model.a(x).relu()) + model.side(model.b(x).relu())).var(0, correction=0).sum()
    for one in made:
        assert one.damage[0] == pytest.approx(float(one.error[0] / total), rel=1e-4)


def test_what_was_found_serves_all_budgets(pretrained, monkeypatch):
    model = build("LeNet_300_100").eval()
    looks = []
    original = W.curves
    monkeypatch.setattr("neuron_merging.widths.search.curves", lambda *a, **k: looks.append(1) or original(*a, **k))
    searches = {}
    made = [
        shrink(
            model,
            Experiment(pretrained=pretrained, compensation="merge", ratio=r, widths="auto"),
            None,
            searches,
        )
        for r in (0.5, 0.7)
    ]
    assert len(looks) == 1 and made[0].seconds_widths == made[1].seconds_widths
    assert sum(made[0].widths) > sum(made[1].widths)

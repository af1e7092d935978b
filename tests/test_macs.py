"""Multiply-accumulates, against counts by hand and PyTorch's counter; costs of all widths, against the networks really cut."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.graph import macs
from neuron_merging.graph.export import capture
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.widths.cost import Cost
from tests.helpers import Written
from tests.spaces_networks import NETWORKS

L, D, H, FF = 10, 32, 4, 64  # length, width, heads, width of the feed-forward layer
PROJECTIONS, ATTENTION, FORWARD = 4 * L * D * D, 2 * L * L * D, 2 * L * D * FF


def layers(run, **layers):
    return Written(run, **layers).eval()


def attend(net, x):
    q, k, v = (layer(x).unflatten(-1, (H, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attend_by_products(net, x):
    q, k, v = (layer(x).unflatten(-1, (H, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def attend_by_einsum(net, x):
    q, k, v = (layer(x).unflatten(-1, (H, -1)) for layer in (net.q, net.k, net.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return net.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def projections():
    return {name: nn.Linear(D, D) for name in "qkvo"}


BY_HAND = {
    "convolution": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 9, 9), 8 * 6 * 9 * 25),
    "groups": (nn.Conv2d(6, 8, 3, groups=2), (6, 9, 9), 8 * 3 * 9 * 49),
    "depthwise": (nn.Conv1d(6, 12, 5, groups=6), (6, 9), 12 * 5 * 5),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2), (6, 5, 5), 6 * 8 * 9 * 25),
    "transposed in groups": (nn.ConvTranspose1d(6, 8, 4, groups=2), (6, 5), 6 * 4 * 4 * 5),
    "linear": (nn.Linear(6, 5), (7, 6), 7 * 6 * 5),
    "tokens": (nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)), (7,), 7 * 6 * 5),
    "attention": (layers(attend, **projections()), (L, D), PROJECTIONS + ATTENTION),
    "products": (layers(attend_by_products, **projections()), (L, D), PROJECTIONS + ATTENTION),
    "einsum": (layers(attend_by_einsum, **projections()), (L, D), PROJECTIONS + ATTENTION),
    "multihead": (
        layers(lambda net, x: net.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(D, H, batch_first=True)),
        (L, D), PROJECTIONS + ATTENTION,
    ),
    "encoder": (nn.TransformerEncoderLayer(D, H, FF, batch_first=True), (L, D), PROJECTIONS + ATTENTION + FORWARD),
    **{
        kind: (
            layers(lambda net, x: net.r(x)[0], r=getattr(nn, kind)(8, 16, batch_first=True)),
            (12, 8), 12 * gates * (8 * 16 + 16 * 16),
        )
        for kind, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    },
    "two layers both ways": (
        layers(lambda net, x: net.r(x)[0], r=nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True)),
        (12, 8), 12 * 2 * 4 * (8 * 16 + 16 * 16 + 32 * 16 + 16 * 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_counts_are_those_by_hand(name):
    model, shape, expected = BY_HAND[name]
    assert count_macs(model.eval(), shape) == expected


def test_the_fast_path_of_attention_hides_nothing():
    blocks = 12 * (4 * 197 * 768 * 768 + 2 * 197 * 197 * 768 + 2 * 197 * 768 * 3072)
    expected = 196 * 768 * 768 + blocks + 768 * 1000
    assert count_macs(torchvision.models.vit_b_16().eval(), (3, 224, 224)) == expected


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("Recurrent", "Encoder", "PairByName")])
def test_pytorch_counts_the_same(name):
    """Where it counts at all, and as many times as there are samples."""
    make, inputs = NETWORKS[name]
    network = capture(make(), inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.model(*network.args, **network.kwargs)
    assert counter.get_total_flops() // 2 == 2 * macs.count_macs(network)


def test_an_operation_with_weights_that_is_not_known_is_named():
    model = layers(lambda net, x: net.b(net.a(x), x), a=nn.Linear(4, 6), b=nn.Bilinear(6, 4, 3))
    network = capture(model, torch.zeros(2, 4))
    assert macs.count_macs(network) == 4 * 6
    assert macs.uncounted(network) == ["bilinear in b"]


# ---------------------------------------------------------------- costs of all widths


def assert_costs(model, inputs, seed=0):
    """The cost of random widths is that of the network that is cut to them."""
    survey, random = find_spaces(model, inputs), np.random.default_rng(seed)
    cost = Cost(survey, survey.spaces)
    assert cost.whole.tolist() == [count_parameters(model), macs.count_macs(survey.network)]
    assert cost(cost.full) == pytest.approx(cost.whole)
    for _ in range(2):
        widths = [int(random.integers(1, n + 1)) for n in cost.full]
        keep = {space: random.permutation(space.size)[:k] for space, k in zip(survey.spaces, widths)}
        small = cut(survey, keep).model
        expected = count_parameters(small), macs.count_macs(capture(small, inputs))
        assert cost(widths) == pytest.approx(expected, abs=1e-3)
        for i in range(len(widths)):
            more = np.array(widths)
            more[i] += 1
            assert cost(more) - cost(widths) == pytest.approx(cost.marginal(widths)[:, i])


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_network_that_is_cut(name):
    make, inputs = NETWORKS[name]
    assert_costs(make().eval(), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "swin_t"])
def test_costs_of_networks_of_torchvision(name):
    model = getattr(torchvision.models, name)(num_classes=9).eval()
    assert_costs(model, torch.zeros(1, 3, *[224 if name == "swin_t" else 64] * 2))


def test_squares_of_a_width():
    model = layers(
        lambda net, x: net.c(net.a(x) + net.b(net.a(x).relu())), a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2)
    )
    survey = find_spaces(model, torch.zeros(2, 6))
    cost = Cost(survey, survey.spaces)
    assert len(survey.spaces) == 1
    for k in (1, 5, 8):
        assert cost([k]).tolist() == [7 * k + k * k + k + 2 * k + 2, 12 * k + k * k + 2 * k]

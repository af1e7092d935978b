"""Winograd's convolutions against the usual ones: values, gradients, which convolutions, and the trainer that uses them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import settings, winograd
from experiments import training as train
from tests.helpers import images

CPU = torch.device("cpu")


def both(x, weight):
    """Output, gradient of the input and of the weights: Winograd's and the usual ones."""
    ours, usual = winograd.conv3x3(x, weight), F.conv2d(x, weight, padding=1)
    g = torch.randn_like(usual)
    return (
        (ours, *torch.autograd.grad(ours, (x, weight), g)),
        (usual, *torch.autograd.grad(usual, (x, weight), g)),
    )


@pytest.mark.parametrize("at_once", [1, 2, 100])  # images: the last part may be a smaller one
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (1, 2), (3, 3), (4, 4), (2, 7), (9, 5), (16, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution(monkeypatch, height, width, at_once, layout):
    _, rows, columns, _ = winograd._tiling((3, 5, height, width))
    monkeypatch.setattr(winograd, "TILES", at_once * rows * columns)
    torch.manual_seed(0)
    x = torch.randn(3, 5, height, width, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    for ours, usual in zip(*both(x, weight)):
        torch.testing.assert_close(ours, usual, rtol=0, atol=1e-11)


@pytest.mark.parametrize("channels, side", [(128, 16), (256, 8), (256, 2)])
def test_in_float32_it_differs_by_rounding(channels, side):
    torch.manual_seed(0)
    x = torch.randn(4, channels, side, side).relu().requires_grad_()
    weight = (torch.randn(channels, channels, 3, 3) / 3 / channels**0.5).requires_grad_()
    for ours, usual in zip(*both(x, weight)):
        assert float((ours - usual).detach().abs().max() / usual.detach().abs().max()) < 3e-5


@pytest.mark.parametrize("side", [2, 7, 8])
def test_the_output_lies_as_the_trainers_activations_do_and_can_be_changed_in_place(side):
    x, weight = torch.randn(2, 3, side, side), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = winograd.conv3x3(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.relu_().sum().backward()
    usual = torch.autograd.grad(F.conv2d(x, weight, padding=1).relu().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, usual, rtol=1e-3, atol=1e-3)


def test_what_needs_no_gradient_costs_none(monkeypatch):
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    convolved, calls = winograd._convolved, []
    monkeypatch.setattr(winograd, "_convolved", lambda *args: calls.append(args) or convolved(*args))
    winograd.conv3x3(x.detach(), weight).sum().backward()
    assert weight.grad is not None and len(calls) == 1
    y = winograd.conv3x3(x, weight.detach())
    assert len(y.grad_fn.saved_tensors) == 1  # the weights: what only their gradient needs is not kept
    y.sum().backward()
    assert x.grad is not None and len(calls) == 3


def test_a_second_derivative_is_refused():
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    (g,) = torch.autograd.grad(winograd.conv3x3(x, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


WIDE = winograd.LEAST


@pytest.mark.parametrize(
    "layer, dtype, side, taken",
    [
        (nn.Conv2d(WIDE, WIDE, 3, padding=1), torch.float32, 4, True),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1, bias=False), torch.float32, 4, True),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1), torch.float64, 4, False),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1), torch.float32, 1, True),
        (nn.Conv2d(WIDE, WIDE - 1, 3, padding=1), torch.float32, 4, False),
        (nn.Conv2d(WIDE - 1, WIDE, 3, padding=1), torch.float32, 4, False),
        (nn.Conv2d(WIDE, WIDE, 3), torch.float32, 4, False),
        (nn.Conv2d(WIDE, WIDE, 3, padding="same"), torch.float32, 4, False),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1, stride=2), torch.float32, 4, False),
        (nn.Conv2d(WIDE, WIDE, 3, padding=1, dilation=2), torch.float32, 4, False),
        (nn.Conv2d(2 * WIDE, 2 * WIDE, 3, padding=1, groups=2), torch.float32, 4, False),
        (nn.Conv2d(WIDE, WIDE, 5, padding=2), torch.float32, 4, False),
        (nn.Conv2d(WIDE, WIDE, (3, 1), padding=(1, 0)), torch.float32, 4, False),
    ],
)
def test_within_the_mode_it_stands_for_the_convolutions_it_can(monkeypatch, layer, dtype, side, taken):
    calls, conv3x3 = [], winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *args: calls.append(args) or conv3x3(*args))
    layer = layer.to(dtype)
    x = torch.randn(2, layer.in_channels, side, side, dtype=dtype, requires_grad=True)
    usual = layer(x)
    assert not calls
    with winograd.Winograd():
        y = layer(x)
    assert len(calls) == taken
    wanted = (x, *layer.parameters())
    g = torch.randn_like(y)
    found, right = torch.autograd.grad(y, wanted, g), torch.autograd.grad(usual, wanted, g)
    for ours, theirs in zip((y, *found), (usual, *right)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.detach().abs().max()) if taken else 0)


def test_what_the_usual_convolution_takes_or_refuses_stays_so():
    layer = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    inputs = [torch.randn(WIDE, 4, 4), torch.randn(0, WIDE, 4, 4)]  # no batch; nothing in it
    usual = [layer(x) for x in inputs]
    with winograd.Winograd():
        for x, y in zip(inputs, usual):
            torch.testing.assert_close(layer(x), y)
        with pytest.raises(RuntimeError, match=f"expected input.* to have {WIDE} channels"):
            layer(torch.randn(1, WIDE + 1, 4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(1, WIDE, 4, 4)).dtype == torch.bfloat16


def test_a_compiled_network_computes_the_same():
    layer, x = nn.Conv2d(WIDE, WIDE, 3, padding=1), torch.randn(2, WIDE, 4, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with warnings.catch_warnings(), winograd.Winograd():
        warnings.simplefilter("error")
        torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x), rtol=0, atol=0)
    assert len(graphs) == 1


def trained(monkeypatch, least: int, dtype: torch.dtype | None) -> tuple[nn.Module, int]:
    """A small smooth network (rounding moves a ReLU's sign) after an epoch, and how many convolutions were Winograd's."""
    calls, conv3x3 = [], winograd.conv3x3
    monkeypatch.setattr(winograd, "LEAST", least)
    monkeypatch.setattr(winograd, "conv3x3", lambda *args: calls.append(args) or conv3x3(*args))
    monkeypatch.setattr(train, "autocast_dtype", lambda device: dtype)
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
    ]
    model = nn.Sequential(*layers, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    recipe = settings.Recipe(epochs=1, lr=0.1, weight_decay=1e-4, batch_size=32, winograd=True)
    train.train(model, images("cifar10"), images("cifar10", 50, 1), recipe, device=CPU, say=lambda line: None)
    return model, len(calls)


def test_the_trainer_uses_it_where_there_is_no_bfloat16(monkeypatch):
    usual, none = trained(monkeypatch, 10**9, None)
    ours, some = trained(monkeypatch, 16, None)
    assert (none, some) == (0, 5 + 1)  # batches of training and of the test, one layer of 16 channels on both sides
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, usual.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
    assert trained(monkeypatch, 16, torch.bfloat16)[1] == 0

"""Units, prune and merge as torch.export sees them are those of the analysis on torch.fx. To be deleted with that analysis."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from experiments.settings import MERGING, PUBLISHED_WIDTHS, uniform_widths
from models import build
from neuron_merging import blocks, coupled, network
from neuron_merging.checkpoint import load_checkpoint, load_weights
from neuron_merging.compensation import Contents, constants
from neuron_merging.decompose import CRITERIA
from neuron_merging.graph import tracing
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.streams import Stream, streams
from neuron_merging.graph.surgery import cut
from neuron_merging.shrink import prunable, select
from tests.helpers import example, same, with_statistics

KINDS = ("prune", "merge", "merge-derived")
FILES = {
    "LeNet_300_100": ((), "FashionMNIST", "LeNet_300_100.original.300_100.bias"),
    "VGG": ((16,), "cifar10", "VGG.cifar10.original"),
    "ResNet": ((56,), "cifar10", "ResNet.cifar10.original.56"),
    "WideResNet": ((40, 4), "cifar10", "WideResNet.cifar10.original.40_4"),
}
OTHERS = ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0", "googlenet"]


@cache
def known(name):
    """A network, and its spaces."""
    torch.manual_seed(0)
    if name in FILES:
        model = build(name, FILES[name][0])
        load_weights(model, load_checkpoint(Path(__file__).parents[1] / "pretrained" / f"{FILES[name][2]}.pth.tar"))
        return model.eval(), find_spaces(model, example(model, 2))
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **options)
    model = with_statistics(model, torch.randn(4, 3, 64, 64))
    return model, find_spaces(model, torch.randn(2, 3, 64, 64))


def by_writers(survey):
    return {frozenset(place.name.rpartition(".")[0] for place in space.writers): space for space in survey.spaces}


def writers(unit):
    return frozenset(unit.writers if isinstance(unit, Stream) else [unit.layer])


@pytest.mark.parametrize("name", [*FILES, *OTHERS])
def test_the_papers_units_are_found(name):
    def facts(unit):
        functions = len(unit.functions)
        return unit.layer, unit.bn, unit.relu, unit.next, unit.next_bn, bool(unit.activation), unit.branch, functions

    model, survey = known(name)
    found = [space.unit for space in survey.spaces if space.unit]
    assert list(map(facts, found)) == list(map(facts, tracing.survey(model)[0]))


@pytest.mark.parametrize("name", OTHERS)
def test_streams_are_spaces_and_have_the_same_obstacles_and_readers(name):
    model, survey = known(name)
    spaces = by_writers(survey)
    found = [stream for stream in streams(model)[0] if spaces[writers(stream)].unit is None]
    assert found
    for stream in found:
        space = spaces[writers(stream)]
        assert bool(stream.obstacle) == bool(space.obstacle) and stream.width == space.size
        assert stream.obstacle or len(stream.readers) == len(space.ways.to_readers)


def smaller(model, survey, units, widths, criterion, kind, t, lam):
    spaces, dead, keep, absorbed = by_writers(survey), constants(survey), {}, []
    for unit, P in zip(units, widths):
        contents = Contents(survey, spaces[writers(unit)], dead)
        keep[contents.space] = contents.choose(P, criterion)
        absorbed += contents.absorbed(keep[contents.space], kind, t=t, lam=lam)
    return list(keep.values()), cut(survey, keep, absorbed)


def once(model, units, keep, kind, t, lam):
    """What the analysis on torch.fx makes of it; where a merge cannot pass, it prunes."""
    alone = [(unit, kept) for unit, kept in zip(units, keep) if not isinstance(unit, Stream)]
    parts = [
        network.compensate(model, [unit], [kept], "prune" if unit.activation else kind, t=t, lam=lam)[0]
        for unit, kept in alone
    ]
    small = network.rebuild(model, [unit for unit, _ in alone], parts)
    shared = [(unit, kept) for unit, kept in zip(units, keep) if isinstance(unit, Stream)]
    columns: dict[str, list] = {}
    for stream, kept in shared:
        pruned = kind == "prune" or stream.obstacle
        Z = [torch.eye(stream.width, dtype=torch.float64)[kept]] * len(stream.readers)
        Z = Z if pruned else coupled.scaling_matrices(model, stream, kept, t=t)
        for reader, matrix in zip(stream.readers, Z):
            columns.setdefault(reader.module, []).append((reader.offset, reader.channels, matrix))
    for name, parts in columns.items():
        channels = parts[0][1]
        for offset, _, Z in sorted(parts, key=lambda part: -part[0]):
            network.absorb_into(small.get_submodule(name), Z, channels, offset)
            channels += len(Z) - Z.shape[1]
    for name, kept in coupled.kept_channels(model, shared).items():
        network.cut(small.get_submodule(name), kept)
    return small


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", FILES)
def test_the_papers_networks_are_the_same_to_the_bit(name, criterion, kind):
    model, survey = known(name)
    depth_wide, dataset, _ = FILES[name]
    settings = MERGING[name, dataset].threshold, MERGING[name, dataset].lamda
    units = tracing.units(model)
    full = [len(model.get_submodule(unit.layer).weight) for unit in units]
    widths = PUBLISHED_WIDTHS.get((name, depth_wide, dataset)) or uniform_widths(name, depth_wide, full, 0.5)
    keep, small = smaller(model, survey, units, widths, criterion, kind, *settings)
    assert all(torch.equal(a, b) for a, b in zip(keep, network.choose(model, units, widths, criterion)))
    assert small.own_class and same(small.model, once(model, units, keep, kind, *settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prune", "merge"])
@pytest.mark.parametrize("name", ["ResNet", "WideResNet", *OTHERS])
def test_coupled_networks_are_the_same(name, kind):
    model, survey = known(name)
    units = prunable(model, coupled=True)[0]
    widths = [round(0.6 * len(model.get_submodule(unit.layer).weight)) for unit in units]
    keep, small = smaller(model, survey, units, widths, "l1-norm", kind, 0.1, 0.85)
    assert all(torch.equal(a, b) for a, b in zip(keep, select(model, units, widths, "l1-norm")))
    old = once(model, units, keep, kind, 0.1, 0.85).state_dict()
    assert small.own_class and small.model.state_dict().keys() == old.keys()
    for key, value in small.model.state_dict().items():
        torch.testing.assert_close(value, old[key], atol=1e-6, rtol=0)


@torch.no_grad()
def test_blocks_that_are_left_out_are_the_same():
    torch.manual_seed(0)
    model = with_statistics(build("ResNet", (14,)), torch.randn(32, 3, 32, 32))
    units = tracing.units(model)
    survey = find_spaces(model, torch.randn(2, 3, 32, 32))
    widths = [0 if unit.layer in ("layer1.0.conv1", "layer2.0.conv1") else 8 for unit in units]
    keep, small = smaller(model, survey, units, widths, "l1-norm", "merge", 0.1, 0.85)
    old = once(model, units, keep, "merge", 0.1, 0.85)
    assert same(small.model, old) and isinstance(old.layer1[0].conv1, blocks.Silence)
    assert [type(m).__name__ for m in small.model.modules()] == [type(m).__name__ for m in old.modules()]
    assert isinstance(small.model, nn.Module)

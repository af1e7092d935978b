"""What several tests need: made-up images and data folders, networks as if they had been trained, and what they hold."""

import copy
import pickle

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import DATASETS, Images
from neuron_merging.checks import likely_shape
from neuron_merging.compensation import Contents, refused, with_constants
from neuron_merging.config import ShrinkConfig
from neuron_merging.decompose import COMPENSATIONS
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.methods import METHODS
from neuron_merging.restore import Options
from neuron_merging.restore import restore as restored
from neuron_merging.restore.batches import Source
from neuron_merging.running import NORMS, dtype


def images(name="FashionMNIST", count=150, seed=0) -> Images:
    random = torch.Generator().manual_seed(seed)
    dataset = DATASETS[name]
    pixels = torch.randint(0, 256, (count, *dataset.shape), dtype=torch.uint8, generator=random)
    return Images(pixels, torch.randint(0, dataset.classes, (count,), generator=random), dataset)


def cifar(folder, source, per_file=20):
    """A made-up CIFAR in torchvision's layout."""
    folder = folder / source.base_folder
    folder.mkdir(parents=True)
    key, classes = ("fine_labels", 100) if source.meta["key"] == "fine_label_names" else ("labels", 10)
    random = np.random.default_rng(0)
    for file, _ in source.train_list + source.test_list:
        entry = {
            "data": random.integers(0, 256, (per_file, 3072), dtype=np.uint8),
            key: random.integers(0, classes, per_file).tolist(),
        }
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: [str(i) for i in range(classes)]}))
    return folder


def example(model: nn.Module, count: int = 8) -> torch.Tensor:
    """Random inputs of the right shape for one of our networks."""
    return torch.randn(count, *shape_of(model), generator=torch.Generator().manual_seed(1))


def shape_of(model: nn.Module) -> tuple[int, ...]:
    """Of one input of one of our networks."""
    return (1, 28, 28) if type(model).__name__ == "LeNet_300_100" else (3, 32, 32)


def surveyed(model: nn.Module, shape=None):
    """The survey of a network that takes inputs of this shape; None: a shape that is guessed, or images of 8 × 8."""
    shape = shape if shape is not None else likely_shape(model) or (3, 8, 8)
    return find_spaces(model, torch.zeros(2, *shape, dtype=dtype(model)))


def units(model: nn.Module, shape=None) -> list:
    """The paper's units of a network."""
    return [space.unit for space in surveyed(model, shape).spaces if space.unit is not None]


def spaces_of(survey, found) -> list:
    """The spaces of these units, by the names of their layers."""
    by_layer = {space.layer: space for space in survey.spaces}
    return [by_layer[unit.layer] for unit in found]


def read(model: nn.Module, unit, shape=None):
    """The neurons of a unit."""
    survey = surveyed(model, shape)
    return Contents(survey, *spaces_of(survey, [unit]), {}).neurons


def choose(model: nn.Module, found, widths, criterion: str, shape=None) -> list[torch.Tensor]:
    """The neurons that each of these units keeps."""
    survey = surveyed(model, shape)
    return [
        Contents(survey, space, {}).choose(P, criterion)
        for space, P in zip(spaces_of(survey, found), widths, strict=True)
    ]


def decompose(model: nn.Module, found, widths, criterion: str, form: str, *, t=0.0, lam=1.0, shape=None) -> list:
    """How the kept neurons of each of these units stand in for the others."""
    survey = surveyed(model, shape)
    spaces = spaces_of(survey, found)
    refused(spaces, form)
    parts = []
    for space, P in zip(spaces, widths, strict=True):
        contents = Contents(survey, space, {})
        keep, kind = contents.choose(P, criterion), form if P else "prune"
        part = COMPENSATIONS[kind](contents.neurons, keep, t=t, lam=lam)
        parts.append(with_constants(part, contents.neurons) if P else part)
    return parts


def rebuild(model: nn.Module, found, parts, shape=None) -> nn.Module:
    """The smaller network that these decompositions of its units make."""
    survey = surveyed(model, shape)
    pairs = list(zip(spaces_of(survey, found), parts, strict=True))
    absorbed = [taken for space, part in pairs if len(part.keep) for taken in Contents(survey, space, {}).of_unit(part)]
    return cut(survey, {space: part.keep for space, part in pairs}, absorbed).model


def restore(model: nn.Module, found, keep, probe: torch.Tensor, options: Options | None = None) -> nn.Module:
    """A restored network, fitted on the probe, in six batches where that is possible."""
    survey = find_spaces(model, probe[:2].to(dtype(model)))
    parts = [[part] for part in probe.tensor_split(min(6, len(probe) // 2))]
    return restored(
        survey, dict(zip(spaces_of(survey, found), keep, strict=True)), parts, options or Options()
    ).small.model


def widths_of(model: nn.Module, found=None) -> list[int]:
    """Of every unit, or of those that are given."""
    return [len(model.get_submodule(unit.layer).weight) for unit in (units(model) if found is None else found)]


def same(a, b) -> bool:
    """Whether two networks, or their state_dicts, hold the same numbers under the same names."""
    a, b = (held.state_dict() if isinstance(held, nn.Module) else held for held in (a, b))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def with_statistics(model: nn.Module, x: torch.Tensor | None = None, affine: bool = True) -> nn.Module:
    """`model` with BatchNorms as if it had been trained, on inputs like x, in evaluation mode. affine: also with γ and β."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                module.momentum = 1.0
                if affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
        model.train()(example(model, 64) if x is None else x)
    return model.eval()


def without_batchnorm(model: nn.Module) -> nn.Module:
    """Every unit's BatchNorm folded into its convolution."""
    model = copy.deepcopy(model).eval()
    for unit in units(model):
        if unit.bn is not None:
            parent, _, name = unit.layer.rpartition(".")
            setattr(
                model.get_submodule(parent), name, fuse_conv_bn_eval(*map(model.get_submodule, (unit.layer, unit.bn)))
            )
            parent, _, name = unit.bn.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    return model


def plant_multiples(model: nn.Module) -> list[int]:
    """Make half of every unit's neurons positive multiples of the other half (and their BatchNorm agree); the kept widths."""
    random = torch.Generator().manual_seed(2)
    widths = []
    with torch.no_grad():
        for unit in units(model):
            layer = model.get_submodule(unit.layer)
            bn = model.get_submodule(unit.bn) if unit.bn else None
            N = len(layer.weight)
            order = torch.randperm(N, generator=random)
            leaders, followers = order[: N // 2], order[N // 2 :]
            neurons = read(model, unit).W  # with the bias, where that is part of a neuron
            for m in leaders:  # all of norm 1, so that every criterion keeps them before their multiples
                for parameter in layer.parameters():
                    parameter[m] /= neurons[m].norm()
            if bn is not None:  # keep the scale of the leaders' activations
                bn.running_mean[leaders], bn.running_var[leaders] = bn.running_mean[leaders] / 10, 1.0
            for n, m in zip(followers, leaders[torch.arange(len(followers)) % len(leaders)]):
                s = 0.05 + 0.15 * float(torch.rand((), generator=random))
                layer.weight[n] = s * layer.weight[m]
                if layer.bias is not None:
                    layer.bias[n] = s * layer.bias[m]
                if bn is not None:  # any γ_n > 0 and v_n; μ_n and β_n so that z_n = S z_m
                    S = (
                        s
                        * (bn.weight[n] / bn.weight[m])
                        * ((bn.running_var[m] + bn.eps) / (bn.running_var[n] + bn.eps)).sqrt()
                    )
                    bn.running_mean[n], bn.bias[n] = s * bn.running_mean[m], S * bn.bias[m]
            widths.append(len(leaders))
    return widths


class Written(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(channels, neurons, **told) -> nn.Module:
    """3 × 3, of the same size."""
    return nn.Conv2d(channels, neurons, 3, padding=1, **told)


def smaller(kind: str, model: nn.Module, found, keep, shape=None, images=None, **options) -> nn.Module:
    """What the method `kind` makes of a network whose units keep the neurons `keep`. options: of ShrinkConfig."""
    config = ShrinkConfig(compensation=kind, **options)
    survey = surveyed(model, shape)
    kept = dict(zip(spaces_of(survey, found), keep, strict=True))
    small, _ = METHODS[kind].run(survey, kept, config, Source(survey.network, config, images))
    return small.model


def of_a_layer(kind: str, **options):
    """What the method `kind` makes of one layer by itself; None for a regression. options: of ShrinkConfig."""
    return METHODS[kind].of_a_layer(ShrinkConfig(compensation=kind, **options))

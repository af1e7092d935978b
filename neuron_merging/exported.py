"""Pruning of networks as torch.export sees them (ours): attention heads, gates, several inputs, all that torch.fx cannot trace.

Pruning and restoration (restore/exported.py); merging runs on the graph of torch.fx only (graph/tracing.py).
"""

import contextlib
import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neuron_merging.config import ShrinkConfig
from neuron_merging.decompose import CRITERIA, ranked
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs, Network
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Place, Space, Survey, find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.ratios import uniform_widths, without
from neuron_merging.restore.exported import restore
from neuron_merging.restore.readers import OPERANDS


@dataclass(frozen=True)
class Shrunk:
    """A smaller network and what became of its spaces.

    full, kept: original and kept sizes. left_out: by layer that stays whole, why. macs: original and now, None where they
    cannot be counted. note: why it is not of the user's own class, and what was not restored.
    """

    model: nn.Module
    spaces: list[Space]
    full: list[int]
    kept: list[int]
    left_out: dict[str, str]
    macs: tuple[int, int] | None
    note: str | None


def shrink(model: nn.Module, inputs: Inputs, config: ShrinkConfig, images: Inputs | None = None) -> Shrunk:
    """A smaller network, called like `model` with `inputs`: a tensor, a sequence of arguments or a mapping of keywords.

    Every space loses the indices with the least score, summed over all that write it. If the config's compensation is
    "restore", what reads them is fitted over `images`, many inputs of the same form, or over noise. `model` is left as it is.
    Raises NeuronMergingError where the network cannot be exported or has nothing to drop, for ratios that make no sense, and
    where restoration has no inputs.
    """
    survey = find_spaces(model, inputs)
    spaces, left_out = without(model, list(survey.spaces), survey.left_out, config.ignore)
    if not spaces:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has no layers"
        raise NeuronMergingError(f"{type(model).__name__} has nothing that can be pruned: {reasons}")
    full = [space.size for space in spaces]
    kept = uniform_widths(model, config.ratio, spaces, full, left_out, config.multiple)
    keep = {space: strongest(survey, space, size, config.criterion) for space, size in zip(spaces, kept)}
    small, unfitted = cut(survey, keep), []
    if config.compensation == "restore":
        small, errors = restore(
            survey, keep, small, images, ridge=config.ridge, samples=config.probe_samples, seed=config.seed
        )
        unfitted = _unfitted(survey, keep, errors)
    macs = [count_macs(network, survey.network) for network in (survey.network.model, small.model)]
    notes = []
    if small.why:
        notes.append(
            f"the result is a torch.fx.GraphModule: the forward pass of {type(model).__name__} does not follow ({small.why})"
        )
    if config.compensation == "restore" and images is None:
        notes.append("restored over white noise, which can be below pruning: give real inputs, images=")
    if unfitted:
        notes.append(f"not restored, being no plain layers of their own weights: {', '.join(unfitted)}")
    counted = None if None in macs else tuple(macs)
    return Shrunk(small.model, spaces, full, kept, left_out, counted, "; ".join(notes) or None)


def _unfitted(survey: Survey, keep: dict[Space, Tensor], fitted: Collection[str]) -> list[str]:
    """The parameters that read what was dropped, but were not looked at by restoration; embeddings that read, too."""
    smaller = [space for space, kept in keep.items() if len(kept) < space.size]
    readers = {place.name for space in smaller for place in space.readers}
    for place in (place for space in smaller for place in space.writers):
        calls = {operation(call) for call in survey.calls(place)}
        if "embedding" in calls and calls & OPERANDS.keys():
            readers.add(place.name)
    return sorted(readers - set(fitted))


def strongest(survey: Survey, space: Space, size: int, criterion: str) -> Tensor:
    """Indices [size], ascending, of a space with the largest scores, summed over its writers (or what else has it)."""
    scores = sum(CRITERIA[criterion](_rows(survey, space, place)) for place in space.writers or space.places)
    return ranked(scores)[:size].sort().values


def _rows(survey: Survey, space: Space, place: Place) -> Tensor:
    """What a parameter has for each index of a space: [size, numbers], float64."""
    tensor = survey.network.tensor(place.name).detach().double().movedim(place.axis, 0)
    return tensor[place.positions(space.leaf).to(tensor.device)].flatten(1)


def count_macs(model: nn.Module, network: Network) -> int | None:
    """Multiply-accumulates of convolutions, matrix products and attention for one call; None where they cannot be counted."""
    args, kwargs = copy.deepcopy((network.args, network.kwargs))
    with contextlib.suppress(Exception), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(*args, **kwargs)
        return counter.get_total_flops() // 2
    return None

"""Pruning of networks as torch.export sees them (ours): attention heads, gates, several inputs, all that torch.fx cannot trace.

Only pruning so far: merging and restoration run on the graph of torch.fx (graph/tracing.py).
"""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neuron_merging.config import ShrinkConfig
from neuron_merging.decompose import CRITERIA, ranked
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs, Network
from neuron_merging.graph.spaces import Place, Space, Survey, find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.ratios import uniform_widths, without


@dataclass(frozen=True)
class Pruned:
    """A smaller network and what became of its spaces.

    full, kept: original and kept sizes. left_out: by layer that stays whole, why. macs: original and now, None where they
    cannot be counted. note: why it is not of the user's own class; None where it is.
    """

    model: nn.Module
    spaces: list[Space]
    full: list[int]
    kept: list[int]
    left_out: dict[str, str]
    macs: tuple[int, int] | None
    note: str | None


def prune(model: nn.Module, inputs: Inputs, config: ShrinkConfig) -> Pruned:
    """A smaller network, called like `model` with `inputs`: a tensor, a sequence of arguments or a mapping of keywords.

    Every space loses the indices with the least score, summed over all that write it. `model` is left as it is. Raises
    NeuronMergingError where the network cannot be exported or has nothing to drop, and for ratios that make no sense.
    """
    survey = find_spaces(model, inputs)
    spaces, left_out = without(model, list(survey.spaces), survey.left_out, config.ignore)
    if not spaces:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has no layers"
        raise NeuronMergingError(f"{type(model).__name__} has nothing that can be pruned: {reasons}")
    full = [space.size for space in spaces]
    kept = uniform_widths(model, config.ratio, spaces, full, left_out, config.multiple)
    keep = {space: strongest(survey, space, size, config.criterion) for space, size in zip(spaces, kept)}
    small = cut(survey, keep)
    macs = [count_macs(network, survey.network) for network in (survey.network.model, small.model)]
    note = None
    if small.why:
        note = f"the result is a torch.fx.GraphModule: the forward pass of {type(model).__name__} does not follow ({small.why})"
    return Pruned(small.model, spaces, full, kept, left_out, None if None in macs else tuple(macs), note)


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

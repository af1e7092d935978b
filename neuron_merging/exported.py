"""Networks as torch.export sees them made smaller: attention heads, gates, several inputs, all that torch.fx cannot trace.

Pruning and merging (compensation.py) and restoration (restore/exported.py).
"""

import contextlib
import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neuron_merging.compensation import Contents, constants, refused
from neuron_merging.config import ShrinkConfig
from neuron_merging.decompose import COMPENSATIONS
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs, Network
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Space, Survey, find_spaces
from neuron_merging.graph.surgery import Smaller, cut
from neuron_merging.graph.weights import Absorbed
from neuron_merging.ratios import uniform_widths, without
from neuron_merging.restore.batches import batches
from neuron_merging.restore.exported import Options, restore
from neuron_merging.restore.readers import OPERANDS


@dataclass(frozen=True)
class Shrunk:
    """A smaller network and what became of its spaces.

    full, kept: original and kept sizes. cosine: as in `shrink.Report`. left_out: by layer that stays whole, why. macs: original
    and now, None where they cannot be counted. note: why it is not of the user's own class, what was not restored or merged.
    """

    model: nn.Module
    spaces: list[Space]
    full: list[int]
    kept: list[int]
    cosine: list[float]
    left_out: dict[str, str]
    macs: tuple[int, int] | None
    note: str | None


def shrink(model: nn.Module, inputs: Inputs, config: ShrinkConfig, images: Inputs | None = None) -> Shrunk:
    """A smaller network, called like `model` with `inputs`: a tensor, a sequence of arguments or a mapping of keywords.

    Every space loses the indices with the least score; the compensation of the config makes up for them. "restore" fits what
    reads them over `images`, many inputs of the same form, or over noise. `model` is left as it is.
    Raises NeuronMergingError where the network cannot be exported or has nothing to drop, for ratios that make no sense, where
    nothing can be merged, and where restoration has no inputs.
    """
    survey = find_spaces(model, inputs)
    spaces, left_out = without(model, *prunable(survey, config.coupled), config.ignore)
    if not spaces:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has no layers"
        raise NeuronMergingError(f"{type(model).__name__} has nothing that can be pruned: {reasons}")
    full = [space.size for space in spaces]
    kept = uniform_widths(model, config.ratio, spaces, full, left_out, config.multiple)
    merges = config.compensation if config.compensation in COMPENSATIONS else "prune"
    only_pruned = refused([space for space, P in zip(spaces, kept) if space.size > P], merges)
    keep, absorbed, cosine = _chosen(survey, spaces, kept, config, merges)
    small, unfitted = cut(survey, keep, absorbed), []
    if config.compensation == "restore":
        random = torch.Generator().manual_seed(config.seed)
        made_up = batches(survey.network, images, random, config.probe_samples)
        small, fits = restore(survey, keep, small, made_up, Options(ridge=config.ridge))
        unfitted = _unfitted(survey, keep, fits)
    macs = [count_macs(network, survey.network) for network in (survey.network.model, small.model)]
    counted = None if None in macs else tuple(macs)
    notes = _notes(type(model).__name__, small, config, images, only_pruned, unfitted)
    return Shrunk(small.model, spaces, full, kept, cosine, left_out, counted, "; ".join(notes) or None)


def prunable(survey: Survey, coupled: bool) -> tuple[list[Space], dict[str, str]]:
    """The spaces to drop from: with `coupled` all, else the paper's units; and by layer that stays whole, why."""
    if coupled:
        return list(survey.spaces), survey.left_out
    coupled_spaces = [space for space in survey.spaces if space.unit is None]
    reasons = {name: space.not_unit for space in coupled_spaces for name in space.modules}
    return [space for space in survey.spaces if space.unit is not None], survey.left_out | reasons


def _chosen(
    survey: Survey, spaces: Sequence[Space], widths: Sequence[int], config: ShrinkConfig, compensation: str
) -> tuple[dict[Space, Tensor], list[Absorbed], list[float]]:
    """What each space keeps, what readers absorb, and how like the dropped indices are to kept ones."""
    known, keep, absorbed, cosine = constants(survey), {}, [], []
    for space, P in zip(spaces, widths):
        contents = Contents(survey, space, known)
        keep[space] = contents.choose(P, config.criterion)
        absorbed += contents.absorbed(keep[space], compensation, t=config.threshold, lam=config.lamda)
        cosine.append(contents.cosine(keep[space]))
    return keep, absorbed, cosine


def _notes(
    name: str,
    small: Smaller,
    config: ShrinkConfig,
    images: Inputs | None,
    only_pruned: dict[Space, str],
    unfitted: list[str],
) -> list[str]:
    """What else there is to know."""
    notes = []
    if small.why:
        notes.append(f"the result is a torch.fx.GraphModule: the forward pass of {name} does not follow ({small.why})")
    if config.compensation == "restore" and images is None:
        notes.append("restored over white noise, which can be below pruning: give real inputs, images=")
    if unfitted:
        notes.append(f"not restored, being no plain layers of their own weights: {', '.join(unfitted)}")
    if only_pruned:
        reasons = "; ".join(f"{space.layer}: {why}" for space, why in only_pruned.items())
        notes.append(f"only pruned, as a merge does not pass: {reasons}")
    return notes


def _unfitted(survey: Survey, keep: dict[Space, Tensor], fitted: Collection[str]) -> list[str]:
    """The parameters that read what was dropped, but were not looked at by restoration; embeddings that read, too."""
    smaller = [space for space, kept in keep.items() if len(kept) < space.size]
    readers = {place.name for space in smaller for place in space.readers}
    for place in (place for space in smaller for place in space.writers):
        calls = {operation(call) for call in survey.calls(place)}
        if "embedding" in calls and calls & OPERANDS.keys():
            readers.add(place.name)
    return sorted(readers - set(fitted))


def count_macs(model: nn.Module, network: Network) -> int | None:
    """Multiply-accumulates of convolutions, matrix products and attention for one call; None where they cannot be counted."""
    args, kwargs = copy.deepcopy((network.args, network.kwargs))
    with contextlib.suppress(Exception), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(*args, **kwargs)
        return counter.get_total_flops() // 2
    return None

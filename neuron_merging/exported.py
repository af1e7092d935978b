"""Pruning of networks as torch.export sees them (ours): attention heads, gates, several inputs, all that torch.fx cannot trace.

Pruning and restoration (restore/exported.py); merging runs on the graph of torch.fx only (graph/tracing.py).
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_merging.config import CHOSEN_WIDTHS, ShrinkConfig
from neuron_merging.decompose import CRITERIA, Decomposition, Neurons, prune, ranked
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Place, Space, Survey, find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.network import with_constants
from neuron_merging.ratios import uniform_widths, without
from neuron_merging.restore.batches import batches
from neuron_merging.restore.exported import restore
from neuron_merging.restore.readers import OPERANDS
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.search import WidthSearch


@dataclass(frozen=True)
class Shrunk:
    """A smaller network and what became of its spaces.

    full, kept: original and kept sizes. left_out: by layer that stays whole, why. macs: original and now, for one sample.
    note: why it is not of the user's own class, what was not restored or counted. search: what was measured for a choice.
    """

    model: nn.Module
    spaces: list[Space]
    full: list[int]
    kept: list[int]
    left_out: dict[str, str]
    macs: tuple[int, int]
    note: str | None
    search: WidthSearch | None = None


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
    kept, search = full, None
    if config.budget is None:
        multiple = config.multiple if config.widths == "uniform" else 1
        kept = uniform_widths(model, config.ratio, spaces, full, left_out, multiple)
    if config.chooses:
        search = _search(survey, spaces, config, images)
        if config.widths in CHOSEN_WIDTHS:
            local = config.compensation == "prune"
            kept = search.widths(kept, config.budget, multiple=config.multiple, compare=local)
    if config.criterion == "auto":
        keep = dict(zip(spaces, search.keep(kept)))
    else:
        keep = {space: strongest(survey, space, size, config.criterion) for space, size in zip(spaces, kept)}
    small, unfitted = cut(survey, keep), []
    if config.compensation == "restore":
        small, errors = restore(
            survey, keep, small, images, ridge=config.ridge, samples=config.probe_samples, seed=config.seed
        )
        unfitted = _unfitted(survey, keep, errors)
    cost = Cost(survey, spaces)
    notes = []
    if small.why:
        notes.append(
            f"the result is a torch.fx.GraphModule: the forward pass of {type(model).__name__} does not follow ({small.why})"
        )
    if config.compensation == "restore" and images is None:
        notes.append("restored over white noise, which can be below pruning: give real inputs, images=")
    if unfitted:
        notes.append(f"not restored, being no plain layers of their own weights: {', '.join(unfitted)}")
    estimated = [] if search is None else [s.name for s, c in zip(spaces, search.curves) if c.estimated]
    if estimated:
        notes.append(f"what dropping does is estimated only where no plain layer reads it: {', '.join(estimated)}")
    if cost.uncounted:
        notes.append(f"its multiply-accumulates are not counted: {', '.join(cost.uncounted)}")
    macs = tuple(round(cost(widths)[1]) for widths in (full, kept))
    return Shrunk(small.model, spaces, full, kept, left_out, macs, "; ".join(notes) or None, search)


def _search(survey: Survey, spaces: list[Space], config: ShrinkConfig, images: Inputs | None) -> WidthSearch:
    """Measure what thinning each space does, on images or on inputs that are made up."""
    if config.drop_blocks:
        raise NeuronMergingError("drop_blocks: blocks cannot be left out of a network that torch.fx cannot trace")
    restores = config.compensation == "restore"

    def pruned(neurons: Neurons, keep: Tensor) -> Decomposition:
        return with_constants(prune(neurons, keep, t=config.threshold, lam=config.lamda), neurons)

    return WidthSearch(
        survey, spaces,
        batches(survey.network, images, torch.Generator().manual_seed(config.seed), config.probe_samples),
        criterion=config.criterion, layerwise=None if restores else pruned, ridge=config.ridge,
        sensitivity=config.widths == "auto", biases=restores,
    )  # fmt: skip


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

"""Networks as torch.export sees them made smaller: what is dropped, and what makes up for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from neuron_merging.compensation import Contents, constants, refused, with_constants
from neuron_merging.config import CHOSEN_WIDTHS, ShrinkConfig
from neuron_merging.decompose import COMPENSATIONS, Decomposition, Neurons
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.export import Inputs
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Space, Survey, find_spaces
from neuron_merging.graph.surgery import Smaller, cut
from neuron_merging.ratios import uniform_widths, without
from neuron_merging.restore import Options, restore
from neuron_merging.restore.batches import batches
from neuron_merging.restore.readers import OPERANDS
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.search import HELD_OUT, WidthSearch


@dataclass(frozen=True)
class Shrunk:
    """A smaller network and what became of its spaces.

    full, kept: original and kept sizes. cosine: as in `shrink.Report`. left_out: by layer that stays whole, why. macs: original
    and now, for one sample. note: why it is not of the user's own class, what was not restored, merged or counted. search: what
    was measured for a choice of widths or indices.
    """

    model: nn.Module
    spaces: list[Space]
    full: list[int]
    kept: list[int]
    cosine: list[float]
    left_out: dict[str, str]
    macs: tuple[int, int]
    note: str | None
    search: WidthSearch | None = None


def shrink(model: nn.Module, inputs: Inputs, config: ShrinkConfig, images: Inputs | None = None) -> Shrunk:
    """A smaller network, called like `model` with `inputs`: a tensor, a sequence of arguments or a mapping of keywords.

    Every space loses the indices with the least score; the compensation of the config makes up for them. "restore" fits what
    reads them over `images`, many inputs of the same form, or over made-up ones. `model` is left as it is.
    Raises NeuronMergingError where the network cannot be exported or has nothing to drop, for ratios that make no sense, where
    nothing can be merged, and where restoration has no inputs.
    """
    survey = find_spaces(model, inputs)
    spaces, left_out = without(model, *prunable(survey, config.coupled), config.ignore)
    if not spaces:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has no layers"
        more = not config.coupled and prunable(survey, True)[0]
        raise NeuronMergingError(
            f"{type(model).__name__} has no layer that can be pruned: {reasons}"
            + ("; coupled channels (coupled=True, --coupled) can be" if more else "")
        )
    full = [space.size for space in spaces]
    kept, search = full, None
    if config.budget is None:
        multiple = config.multiple if config.widths == "uniform" else 1
        kept = uniform_widths(model, config.ratio, spaces, full, left_out, multiple)
    if config.chooses:
        search = _search(survey, spaces, config, images)
        if config.widths in CHOSEN_WIDTHS:
            kept = search.widths(
                kept, config.budget, multiple=config.multiple, drop_blocks=config.drop_blocks,
                compare=config.compensation in COMPENSATIONS,
            )  # fmt: skip
    cost = Cost(survey, spaces)
    macs = tuple(round(cost(widths)[1]) for widths in (full, kept))
    known = constants(survey)
    contents = [Contents(survey, space, known) for space in spaces]
    if config.criterion == "auto":
        keep = dict(zip(spaces, search.keep(kept)))
    else:
        keep = {part.space: part.choose(P, config.criterion) for part, P in zip(contents, kept)}
    small, notes = _compensated(survey, contents, keep, config, images)
    if small.why:
        name = type(model).__name__
        notes.append(f"the result is a torch.fx.GraphModule: the forward pass of {name} does not follow ({small.why})")
    estimated = [] if search is None else [s.name for s, c in zip(spaces, search.curves) if c.estimated]
    if estimated:
        notes.append(f"what dropping does is estimated only where no plain layer reads it: {', '.join(estimated)}")
    if cost.uncounted:
        notes.append(f"its multiply-accumulates are not counted: {', '.join(cost.uncounted)}")
    cosine = [part.cosine(keep[part.space]) for part in contents]
    return Shrunk(small.model, spaces, full, list(kept), cosine, left_out, macs, "; ".join(notes) or None, search)


def prunable(survey: Survey, coupled: bool) -> tuple[list[Space], dict[str, str]]:
    """The spaces to drop from: with `coupled` all, else the paper's units; and by layer that stays whole, why."""
    if coupled:
        return list(survey.spaces), survey.left_out
    coupled_spaces = [space for space in survey.spaces if space.unit is None]
    reasons = {name: space.not_unit for space in coupled_spaces for name in space.modules}
    return [space for space in survey.spaces if space.unit is not None], survey.left_out | reasons


def _compensated(
    survey: Survey,
    contents: Sequence[Contents],
    keep: Mapping[Space, Tensor],
    config: ShrinkConfig,
    images: Inputs | None,
) -> tuple[Smaller, list[str]]:
    """The smaller network, and what there is to know of it."""
    if config.compensation == "restore":
        share = 1.0
        inputs = batches(survey.network, config, images, share)
        restored = restore(survey, keep, inputs, Options(ridge=config.ridge), macs=_macs(survey, inputs))
        unfitted = _unfitted(survey, keep, restored.fits)
        return restored.small, (
            [f"not restored, being no plain layers of their own weights: {', '.join(unfitted)}"] if unfitted else []
        )
    smaller = [part.space for part in contents if len(keep[part.space]) < part.space.size]
    only_pruned = refused(smaller, config.compensation)
    absorbed = [
        taken
        for part in contents
        for taken in part.absorbed(keep[part.space], config.compensation, t=config.threshold, lam=config.lamda)
    ]
    reasons = "; ".join(f"{space.layer}: {why}" for space, why in only_pruned.items())
    return cut(survey, keep, absorbed), [f"only pruned, as a merge does not pass: {reasons}"] if reasons else []


def _macs(survey: Survey, inputs: Sequence[list]) -> int:
    """Of the network for all these inputs."""
    samples = sum(next(len(value) for value in batch if isinstance(value, Tensor) and value.ndim) for batch in inputs)
    return Cost(survey, []).whole[1] * samples


def _search(survey: Survey, spaces: list[Space], config: ShrinkConfig, images: Inputs | None) -> WidthSearch:
    """Measure what thinning each space does, on images or on inputs that are made up.

    As a third of the inputs is held out for sensitivities, more are made up.
    """
    sensitivity = config.widths == "auto"
    restores = config.compensation == "restore"

    def compensated(neurons: Neurons, keep: Tensor) -> Decomposition:
        run = COMPENSATIONS[config.compensation]
        return with_constants(run(neurons, keep, t=config.threshold, lam=config.lamda), neurons)

    return WidthSearch(
        survey, spaces, batches(survey.network, config, images, 1 / (1 - HELD_OUT) if sensitivity else 1.0),
        criterion=config.criterion, layerwise=None if restores else compensated, ridge=config.ridge,
        sensitivity=sensitivity, biases=restores or config.compensation == "merge-derived",
    )  # fmt: skip


def _unfitted(survey: Survey, keep: Mapping[Space, Tensor], fitted: Collection[str]) -> list[str]:
    """The parameters that read what was dropped, but were not looked at by restoration; embeddings that read, too."""
    smaller = [space for space, kept in keep.items() if len(kept) < space.size]
    readers = {place.name for space in smaller for place in space.readers}
    for place in (place for space in smaller for place in space.writers):
        calls = {operation(call) for call in survey.calls(place)}
        if "embedding" in calls and calls & OPERANDS.keys():
            readers.add(place.name)
    return sorted(readers - set(fitted))

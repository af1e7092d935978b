"""What a network loses: its spaces, how many indices each keeps, and which."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from neuron_merging.compensation import Contents, constants
from neuron_merging.config import CHOSEN_WIDTHS, ShrinkConfig
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.methods import METHODS
from neuron_merging.ratios import uniform_widths, without
from neuron_merging.restore.batches import Source
from neuron_merging.widths.search import WidthSearch


@dataclass(frozen=True)
class Plan:
    """The spaces that lose indices, their original and kept sizes, and the indices [P] that each keeps.

    left_out: by layer that stays whole, why. search: what was measured for a choice; chosen: whether it was measured now.
    """

    survey: Survey
    contents: list[Contents]
    full: list[int]
    widths: list[int]
    keep: dict[Space, Tensor] = field(repr=False)
    left_out: dict[str, str]
    search: WidthSearch | None

    @property
    def spaces(self) -> list[Space]:
        """The spaces that lose indices."""
        return [part.space for part in self.contents]


def prunable(survey: Survey, coupled: bool) -> tuple[list[Space], dict[str, str]]:
    """The spaces to drop from: with `coupled` all, else the paper's units; and by layer that stays whole, why."""
    if coupled:
        return list(survey.spaces), survey.left_out
    others = [space for space in survey.spaces if space.unit is None]
    reasons = {name: space.not_unit for space in others for name in space.modules}
    return [space for space in survey.spaces if space.unit is not None], reasons | survey.left_out


def couples(config: ShrinkConfig) -> bool:
    """Whether a config drops what several layers share."""
    return METHODS[config.compensation].coupled if config.coupled is None else config.coupled


def spaces_of(survey: Survey, model: nn.Module, config: ShrinkConfig) -> tuple[list[Space], dict[str, str]]:
    """The spaces that a config lets lose indices, and why other layers stay whole. Raises NeuronMergingError for none."""
    spaces, left_out = without(*prunable(survey, couples(config)), config.ignore)
    if not spaces:
        more = not couples(config) and without(*prunable(survey, True), config.ignore)[0]
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has none"
        raise NeuronMergingError(
            f"{type(model).__name__} has no layer that can be pruned: {reasons}"
            + ("; coupled channels (coupled=True, --coupled) can be" if more else "")
        )
    return spaces, left_out


def make(
    survey: Survey,
    model: nn.Module,
    config: ShrinkConfig,
    inputs: Source,
    search: WidthSearch | None = None,
) -> Plan:
    """Decide what a network loses.

    inputs: to measure on. search: of an earlier call; its measurements are used.
    Raises NeuronMergingError where nothing can be dropped, and for ratios that make no sense.
    """
    spaces, left_out = spaces_of(survey, model, config)
    full = [space.size for space in spaces]
    widths = full
    if config.budget is None:
        multiple = config.multiple if config.widths == "uniform" else 1
        widths = uniform_widths(config.ratio, spaces, full, left_out, multiple)
    method = METHODS[config.compensation]
    method.check(spaces, widths, config.compensation)
    if config.chooses:
        if search is None:
            search = method.search(survey, spaces, config, inputs)
        elif [len(curve.order) for curve in search.curves] != full:
            raise NeuronMergingError("search: it is of another network, or of one with other layers to ignore")
        if config.widths in CHOSEN_WIDTHS:
            widths = search.widths(
                widths, config.budget, multiple=config.multiple, drop_blocks=config.drop_blocks, compare=method.local
            )
    known = constants(survey)
    contents = [Contents(survey, space, known) for space in spaces]
    if config.criterion == "auto":
        keep = dict(zip(spaces, search.keep(widths)))
    else:
        keep = {part.space: part.choose(P, config.criterion) for part, P in zip(contents, widths)}
    return Plan(survey, contents, full, list(widths), keep, left_out, search)

"""All methods that make a network smaller, by name: the paper's, ours, and those of other papers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
from torch import Tensor, fx

from neuron_merging.baselines import fold, folded, lbyl, reestimate
from neuron_merging.compensation import Contents, constants, refused, with_constants
from neuron_merging.config import ShrinkConfig
from neuron_merging.decompose import COMPENSATIONS, Decomposition, Neurons
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.surgery import Smaller, cut
from neuron_merging.graph.walk import Batch, Walk
from neuron_merging.restore import Options, restore
from neuron_merging.restore.batches import Source
from neuron_merging.restore.readers import OPERANDS
from neuron_merging.running import floats
from neuron_merging.widths.batches import count
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.search import HELD_OUT, WidthSearch

Keep = Mapping[Space, Tensor]
Run = Callable[[Survey, Keep, ShrinkConfig, Source], tuple[Smaller, list[str]]]


@dataclass(frozen=True)
class Method:
    """A method that makes a network smaller.

    run: (survey of the network, the indices [P] that each space keeps, the config, inputs) → a smaller network, and notes. Must
    not change the network. layerwise: the method's form for one layer, for the choice of widths; None if it has none.
    The other fields are true or false:
    regresses: it fits layers to their earlier outputs; the choice of widths then does so too.
    local: it acts on one layer at a time, so `layerwise` is all of it.
    needs_images: it needs real inputs. looks: it runs the network on inputs, real or made up. seeded: its result depends on the
    seed. coupled: it has a form for channels that several layers share. adds_bias: it may add a bias to a layer without one.
    """

    run: Run
    layerwise: Callable[[Neurons, Tensor, ShrinkConfig], Decomposition] | None = None
    regresses: bool = False
    local: bool = False
    needs_images: bool = False
    looks: bool = False
    seeded: bool = False
    coupled: bool = True
    adds_bias: bool = False

    def of_a_layer(self, config: ShrinkConfig) -> Callable[[Neurons, Tensor], Decomposition] | None:
        """`layerwise` with the config's settings; None if the method regresses. Raises NeuronMergingError if it has neither."""
        if self.regresses:
            return None
        if self.layerwise is None:
            raise NeuronMergingError(
                f"no widths can be chosen for {config.compensation}, which has no form for a layer by itself: give them"
            )
        return partial(self.layerwise, config=config)

    def check(self, spaces: Sequence[Space], widths: Sequence[int], name: str) -> None:
        """Raises NeuronMergingError if the method, called `name`, has no form for these spaces."""
        if not self.coupled and any(space.unit is None for space in spaces):
            raise NeuronMergingError(
                f"{name} has no form for coupled channels: use prune, merge or restore, or leave them whole"
            )
        plain = name.removesuffix("-bn")
        if plain in COMPENSATIONS:
            refused([space for space, P in zip(spaces, widths) if space.size > P], plain)

    def search(self, survey: Survey, spaces: Sequence[Space], config: ShrinkConfig, inputs: Source) -> WidthSearch:
        """Measure what thinning each space does. As a third of the inputs is held out for sensitivities, there are more."""
        sensitivity = config.widths == "auto"
        return WidthSearch(
            survey, spaces, inputs(1 / (1 - HELD_OUT) if sensitivity else 1.0), criterion=config.criterion,
            layerwise=self.of_a_layer(config), ridge=config.ridge, sensitivity=sensitivity, biases=self.adds_bias,
        )  # fmt: skip


def _compensated(
    name: str, survey: Survey, keep: Keep, config: ShrinkConfig, inputs: Source
) -> tuple[Smaller, list[str]]:
    """Apply a compensation of decompose.py; spaces that it cannot merge are only pruned."""
    only_pruned = refused([space for space, kept in keep.items() if len(kept) < space.size], name)
    known = constants(survey)
    absorbed = [
        taken
        for space, kept in keep.items()
        for taken in Contents(survey, space, known).absorbed(kept, name, t=config.threshold, lam=config.lamda)
    ]
    reasons = "; ".join(f"{space.layer}: {why}" for space, why in only_pruned.items())
    return cut(survey, keep, absorbed), [f"only pruned, as a merge does not pass: {reasons}"] if reasons else []


def _layer_compensated(name: str, neurons: Neurons, keep: Tensor, config: ShrinkConfig) -> Decomposition:
    return with_constants(COMPENSATIONS[name](neurons, keep, t=config.threshold, lam=config.lamda), neurons)


def _restored(survey: Survey, keep: Keep, config: ShrinkConfig, inputs: Source) -> tuple[Smaller, list[str]]:
    batches = inputs(1.0)
    macs = Cost(survey, []).whole[1] * count(survey.network, batches)
    options = Options(ridge=config.ridge, probe_statistics=not inputs.real)
    restored = restore(survey, keep, batches, options, macs)
    unfitted = _unfitted(survey, keep, restored.fits)
    note = f"not restored, being no plain layers of their own weights: {', '.join(unfitted)}"
    return restored.small, [note] if unfitted else []


def _unfitted(survey: Survey, keep: Keep, fitted: Collection[str]) -> list[str]:
    """The parameters that read what was dropped, but were not looked at by restoration; embeddings that read, too."""
    smaller = [space for space, kept in keep.items() if 0 < len(kept) < space.size]
    readers = {place.name for space in smaller for place in space.readers}
    for place in (place for space in smaller for place in space.writers):
        calls = {operation(call) for call in survey.calls(place)}
        if "embedding" in calls and calls & OPERANDS.keys():
            readers.add(place.name)
    return sorted(readers - set(fitted))


def _lbyl(survey: Survey, keep: Keep, config: ShrinkConfig, inputs: Source) -> tuple[Smaller, list[str]]:
    absorbed = []
    for space, kept in keep.items():
        contents = Contents(survey, space, {})
        if 0 < len(kept) < space.size:
            absorbed += contents.of_unit(lbyl(contents.neurons, kept))
    return cut(survey, keep, absorbed), []


def _folded(survey: Survey, keep: Keep, config: ShrinkConfig, inputs: Source) -> tuple[Smaller, list[str]]:
    widths = {space: len(kept) for space, kept in keep.items()}
    return fold(survey, widths, config.seed), []  # as many clusters, not the same neurons


def _reestimated(
    name: str, survey: Survey, keep: Keep, config: ShrinkConfig, inputs: Source
) -> tuple[Smaller, list[str]]:
    """Apply a compensation of decompose.py, then measure the BatchNorm statistics again on real inputs."""
    small, notes = _compensated(name, survey, keep, config, inputs)
    images = [batch[0] for batch in inputs(1.0)]
    reestimate(small.model, torch.cat(images))
    return small, notes


def _nearest(survey: Survey, keep: Keep, config: ShrinkConfig, inputs: Source) -> tuple[Smaller, list[str]]:
    """Try every method that needs no more than there is, and keep the network whose outputs are nearest to the original's.

    The outputs are compared on inputs that no method has seen: a third of the real ones, or others that are made up.
    """
    if inputs.real:
        inputs, unseen = inputs.parted()
    else:
        unseen = replace(inputs, config=replace(config, seed=config.seed + 1))
    batches = unseen()
    expected = outputs(survey.network.graph, batches)
    tried: dict[str, tuple[float, Smaller, list[str]]] = {}
    alone = all(space.unit is not None for space in keep)
    for name, method in METHODS.items():
        if name == "auto" or method.needs_images or not (method.coupled or alone):
            continue
        with contextlib.suppress(NeuronMergingError):  # a merge that passes nothing, a package that is missing
            small, notes = method.run(survey, keep, replace(config, compensation=name), inputs)
            tried[name] = distance(expected, outputs(small.graph, batches)), small, notes
    best = min(tried, key=lambda name: tried[name][0])
    errors = ", ".join(f"{name} {tried[name][0]:.2g}" for name in sorted(tried, key=lambda name: tried[name][0]))
    _, small, notes = tried[best]
    return small, [*notes, f"{best}, whose outputs are nearest to the original's; relative errors: {errors}"]


def outputs(graph: fx.GraphModule, batches: Sequence[Batch]) -> Tensor:
    """All numbers that a graph gives for each batch, one batch after the other: [numbers], float64."""
    walk = Walk(graph, batches, measures=False)
    with torch.no_grad():
        for _ in walk.run(walk.nodes):
            pass
    return torch.cat(
        [part.double().flatten() for node in walk.results for value in walk.values[node] for part in floats(value)]
    )


def distance(expected: Tensor, other: Tensor) -> float:
    """The relative error of outputs; infinite where they are no numbers."""
    error = float((other - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if error == error else inf


METHODS: dict[str, Method] = {
    name: Method(
        partial(_compensated, name), partial(_layer_compensated, name), local=True, adds_bias=name == "merge-derived"
    )
    for name in COMPENSATIONS
}
METHODS |= {
    "restore": Method(_restored, regresses=True, looks=True, seeded=True, adds_bias=True),
    "lbyl": Method(_lbyl, lambda neurons, keep, config: lbyl(neurons, keep), local=True, coupled=False),
    "fold": Method(
        _folded, lambda neurons, keep, config: folded(neurons, keep, config.seed), seeded=True, coupled=False
    ),
}
METHODS |= {
    f"{name}-bn": Method(partial(_reestimated, name), partial(_layer_compensated, name), needs_images=True, looks=True)
    for name in ("prune", "merge")
}
METHODS["auto"] = Method(_nearest, regresses=True, looks=True, seeded=True, adds_bias=True)
NEED_IMAGES = tuple(name for name, method in METHODS.items() if method.needs_images)

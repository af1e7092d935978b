"""All methods that make a network smaller, by name: the paper's, ours, and those of other papers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from neuron_merging.baselines import fold, folded, lbyl, reestimate
from neuron_merging.config import ShrinkConfig
from neuron_merging.coupled import cut_streams
from neuron_merging.decompose import COMPENSATIONS, Decomposition, Neurons, prune
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.streams import Stream, apart
from neuron_merging.graph.tracing import Unit
from neuron_merging.network import check_compensation, compensate, read, rebuild, with_constants
from neuron_merging.restore import Options, restore

Units = Sequence[Unit | Stream]
Inputs = Callable[[], Tensor]
"""A function that returns the inputs [B, …] that a method runs the network on: real ones, or made-up ones, made at the call."""


@dataclass(frozen=True)
class Method:
    """A method that makes a network smaller.

    run: (network, its units, the neurons [P] that each keeps, the config, inputs) → a smaller network. Must not change the
    network. layerwise: the method's form for one layer, for the choice of widths; None if it has none.
    The other fields are true or false:
    regresses: it fits layers to their earlier outputs; the choice of widths then does so too.
    local: it acts on one layer at a time, so `layerwise` is all of it.
    needs_images: it needs real inputs. looks: it runs the network on inputs, real or made up. seeded: its result depends on the
    seed. coupled: it has a form for channels that several layers share. adds_bias: it may add a bias to a layer without one.
    """

    run: Callable[[nn.Module, Units, Sequence[Tensor], ShrinkConfig, Inputs], nn.Module]
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


def check_units(name: str, units: Units) -> None:
    """Raises NeuronMergingError if the method `name` has no form for one of the units."""
    if not METHODS[name].coupled and any(isinstance(unit, Stream) for unit in units):
        raise NeuronMergingError(
            f"{name} has no form for coupled channels: use prune, merge or restore, or leave them whole"
        )
    plain = name.removesuffix("-bn")
    if plain in COMPENSATIONS:
        check_compensation([unit for unit in units if isinstance(unit, Unit)], plain)


def _compensated(
    name: str, model: nn.Module, units: Units, keep: Sequence[Tensor], config: ShrinkConfig, inputs: Inputs
) -> nn.Module:
    """Apply a compensation of decompose.py to the units, and its form for coupled channels to the streams."""
    (alone, kept), coupled = apart(units, keep)
    parts = compensate(model, alone, kept, name, t=config.threshold, lam=config.lamda)
    small = rebuild(model, alone, parts)
    cut_streams(model, small, coupled, None if name == "prune" else config.threshold)
    return small


def _layer_compensated(name: str, neurons: Neurons, keep: Tensor, config: ShrinkConfig) -> Decomposition:
    return with_constants(COMPENSATIONS[name](neurons, keep, t=config.threshold, lam=config.lamda), neurons)


def _restored(
    model: nn.Module, units: Units, keep: Sequence[Tensor], config: ShrinkConfig, inputs: Inputs
) -> nn.Module:
    return restore(model, units, keep, inputs(), Options(ridge=config.ridge))


def _lbyl(model: nn.Module, units: Units, keep: Sequence[Tensor], config: ShrinkConfig, inputs: Inputs) -> nn.Module:
    def part(unit: Unit, kept: Tensor) -> Decomposition:
        neurons = read(model, unit)
        return lbyl(neurons, kept) if len(kept) else prune(neurons, kept, t=config.threshold, lam=config.lamda)

    return rebuild(model, units, [part(unit, kept) for unit, kept in zip(units, keep)])


def _folded(model: nn.Module, units: Units, keep: Sequence[Tensor], config: ShrinkConfig, inputs: Inputs) -> nn.Module:
    return fold(model, units, [len(kept) for kept in keep], config.seed)  # as many clusters, not the same neurons


def _reestimated(
    name: str, model: nn.Module, units: Units, keep: Sequence[Tensor], config: ShrinkConfig, inputs: Inputs
) -> nn.Module:
    """Apply a compensation of decompose.py, then measure the BatchNorm statistics again on real inputs."""
    return reestimate(_compensated(name, model, units, keep, config, inputs), inputs())


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
NEED_IMAGES = tuple(name for name, method in METHODS.items() if method.needs_images)

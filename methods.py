"""Every way to make a network smaller, by name: the paper's, ours, and its rivals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real

from torch import Tensor, nn

import probe
from decompose import COMPENSATIONS, Decomposition, Neurons, check_compensation, compensate, prune, read, rebuild
from errors import NeuronMergingError
from evaluate import dtype
from restore import Options, restore
from rivals import fold, folded, lbyl, reestimate
from streams import Stream, apart, cut_streams
from trace import Unit


@dataclass(frozen=True)
class Settings:
    """What the methods are told; each reads what it knows.

    t, lam: merging. shape: of one input, without the batch. probe, samples, ridge, seed: restoration; samples None: as
    probe.make likes. images: real network inputs [B, …] for methods that look at data, None for those that must not.
    """

    shape: tuple[int, ...] = ()
    t: float = 0.1
    lam: float = 0.85
    probe: str = "auto"
    samples: int | None = None
    ridge: float = Options.ridge
    seed: int = 1
    images: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises NeuronMergingError for numbers that make no sense."""
        for name, value in (("threshold", self.t), ("lamda", self.lam), ("ridge", self.ridge)):
            if not (isinstance(value, Real) or hasattr(value, "item")):
                raise NeuronMergingError(f"--{name} {value!r} is no number")
        for name, value in (("probe-samples", 256 if self.samples is None else self.samples), ("seed", self.seed)):
            if not isinstance(value, Integral):
                raise NeuronMergingError(f"--{name} {value!r} is no whole number")
        if not -1 <= self.t <= 1:
            raise NeuronMergingError(f"--threshold {self.t} is no cosine: choose one in [-1, 1]")
        if not 0 <= self.lam <= 1:
            raise NeuronMergingError(f"--lamda {self.lam} is outside [0, 1]")
        probe.check(self.probe)
        if not 0 <= self.ridge < math.inf:
            raise NeuronMergingError(f"--ridge {self.ridge} has to be a number that is not negative")
        if self.samples is not None and self.samples < 2:
            raise NeuronMergingError(f"--probe-samples {self.samples} has to be at least 2")

    def inputs(self, model: nn.Module, share: float = 1.0) -> Tensor:
        """What a method looks at: the real images, or else a probe of `share` times as many samples as it asks for."""
        if self.images is not None:
            return self.images.to(next(model.parameters()).device, dtype(model))
        samples = round(share * (self.samples or probe.default_samples(model, self.shape)))
        return probe.make(model, self.shape, samples, kind=self.probe, seed=self.seed)


Method = Callable[[nn.Module, Sequence[Unit | Stream], Sequence[Tensor], Settings], nn.Module]
"""A network, its units, the neurons [P] that each keeps, settings → a smaller network. The given one is left as it is."""


def check_units(name: str, units: Sequence[Unit | Stream]) -> None:
    """Raises NeuronMergingError where the method `name` has no form for one of the units."""
    if name in ALONE and any(isinstance(unit, Stream) for unit in units):
        raise NeuronMergingError(
            f"{name} has no form for coupled channels: use prune, merge or restore, or leave them whole"
        )
    plain = name.removesuffix("-bn")
    if plain in COMPENSATIONS:
        check_compensation([unit for unit in units if isinstance(unit, Unit)], plain)


def _decomposed(
    name: str, model: nn.Module, units: Sequence[Unit | Stream], keep: Sequence[Tensor], settings: Settings
) -> nn.Module:
    """A compensation of decompose.py, and the like for streams."""
    (alone, kept), coupled = apart(units, keep)
    small = rebuild(model, alone, compensate(model, alone, kept, name, t=settings.t, lam=settings.lam))
    cut_streams(model, small, coupled, None if name == "prune" else settings.t)
    return small


def _restored(
    model: nn.Module, units: Sequence[Unit | Stream], keep: Sequence[Tensor], settings: Settings
) -> nn.Module:
    return restore(model, units, keep, settings.inputs(model), Options(ridge=settings.ridge))


def _lbyl(model: nn.Module, units: Sequence[Unit | Stream], keep: Sequence[Tensor], settings: Settings) -> nn.Module:
    check_units("lbyl", units)
    parts = []
    for unit, kept in zip(units, keep):
        neurons = read(model, unit)
        parts.append(lbyl(neurons, kept) if len(kept) else prune(neurons, kept, t=settings.t, lam=settings.lam))
    return rebuild(model, units, parts)


def _folded(model: nn.Module, units: Sequence[Unit | Stream], keep: Sequence[Tensor], settings: Settings) -> nn.Module:
    check_units("fold", units)
    widths = [len(kept) for kept in keep]  # clusters: as many, not the same
    return fold(model, units, widths, settings.seed)


def _reestimated(
    name: str, model: nn.Module, units: Sequence[Unit | Stream], keep: Sequence[Tensor], settings: Settings
) -> nn.Module:
    """A compensation of decompose.py, then BatchNorm statistics measured on real images."""
    if settings.images is None:
        raise NeuronMergingError(f"{name}-bn needs real images: give --calibrate, for example cifar10:512")
    return reestimate(_decomposed(name, model, units, keep, settings), settings.inputs(model))


METHODS: dict[str, Method] = {name: partial(_decomposed, name) for name in COMPENSATIONS}
METHODS |= {"restore": _restored, "lbyl": _lbyl, "fold": _folded}
METHODS |= {f"{name}-bn": partial(_reestimated, name) for name in ("prune", "merge")}
SEEDED = ("restore", "fold")  # whose result depends on the seed
LOOKING = ("prune-bn", "merge-bn")  # that cannot do without real images
ALONE = ("lbyl", "fold")  # that have no form for coupled channels
BY_LAYER = (*COMPENSATIONS, "lbyl")  # of which `layerwise` is all there is
BIASED = ("restore", "merge-derived")  # that may leave a bias where there was none


def layerwise(name: str, settings: Settings) -> Callable[[Neurons, Tensor], Decomposition] | None:
    """What a method makes of one layer by itself, for the choice of widths (widths.curves); None for a regression."""
    if name == "restore":
        return None
    if name == "fold":
        return partial(folded, seed=settings.seed)
    if name == "lbyl":
        return lbyl
    form = COMPENSATIONS.get(name.removesuffix("-bn"))
    if form is None:
        raise NeuronMergingError(
            f"no widths can be chosen for {name}, which has no form for a layer by itself: give them"
        )
    return partial(form, t=settings.t, lam=settings.lam)

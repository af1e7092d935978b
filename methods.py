"""Every way to make a network smaller, by name: the paper's, ours, and its rivals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

import probe
from decompose import COMPENSATIONS, choose, decompose, read, rebuild
from errors import NeuronMergingError
from restore import Options, restore
from rivals import fold, lbyl, reestimate
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


Method = Callable[[nn.Module, Sequence[Unit], Sequence[int], str, Settings], nn.Module]


def _decomposed(
    name: str, model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str, settings: Settings
) -> nn.Module:
    """A compensation of decompose.py."""
    return rebuild(model, units, decompose(model, units, widths, criterion, name, t=settings.t, lam=settings.lam))


def _restored(
    model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str, settings: Settings
) -> nn.Module:
    kept = choose(model, units, widths, criterion)
    inputs = settings.images
    if inputs is None:
        inputs = probe.make(model, settings.shape, settings.samples, kind=settings.probe, seed=settings.seed)
    return restore(model, units, kept, inputs, Options(ridge=settings.ridge))


def _lbyl(
    model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str, settings: Settings
) -> nn.Module:
    kept = choose(model, units, widths, criterion)
    return rebuild(model, units, [lbyl(read(model, unit), keep) for unit, keep in zip(units, kept)])


def _folded(
    model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str, settings: Settings
) -> nn.Module:
    return fold(model, units, widths, settings.seed)  # clusters need no criterion


def _reestimated(
    name: str, model: nn.Module, units: Sequence[Unit], widths: Sequence[int], criterion: str, settings: Settings
) -> nn.Module:
    """A compensation of decompose.py, then BatchNorm statistics measured on real images."""
    if settings.images is None:
        raise NeuronMergingError(f"{name}-bn needs real images: give --calibrate, for example cifar10:512")
    return reestimate(_decomposed(name, model, units, widths, criterion, settings), settings.images)


METHODS: dict[str, Method] = {name: partial(_decomposed, name) for name in COMPENSATIONS}
METHODS |= {"restore": _restored, "lbyl": _lbyl, "fold": _folded}
METHODS |= {f"{name}-bn": partial(_reestimated, name) for name in ("prune", "merge")}
SEEDED = ("restore", "fold")  # whose result depends on the seed
LOOKING = ("prune-bn", "merge-bn")  # that cannot do without real images

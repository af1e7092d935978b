"""From a ratio, ratios by layer name, or a list of widths to the number of neurons that each unit keeps."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real

from neuron_merging.compensation import check_width
from neuron_merging.config import Ratio
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import Space


def without(units: list[Space], left_out: dict[str, str], ignore: Sequence[str]) -> tuple[list[Space], dict[str, str]]:
    """The units that are not ignored; and by layer that stays whole, why. Raises NeuronMergingError for an unknown name."""
    if isinstance(ignore, str):
        ignore = [ignore]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in (*(n for u in units for n in u.modules), *left_out)):
            raise NeuronMergingError(f"ignore: no convolution or linear layer is called {pattern}")
    ignored = [u for u in units if any(fnmatchcase(name, pattern) for name in u.modules for pattern in ignore)]
    others = [u for u in units if u not in ignored]
    whole = {name for u in ignored for name in u.modules} - {name for u in others for name in u.modules}
    reason = "it is ignored, or shares channels with a layer that is"
    return others, left_out | {name: reason for u in ignored for name in u.modules if name in whole}


def uniform_widths(
    ratio: Ratio, units: list[Space], full: list[int], left_out: dict[str, str], multiple: int
) -> list[int]:
    """The kept width of every unit for this ratio, rounded to `multiple`. Raises NeuronMergingError if they make no sense."""
    kept = _kept(ratio, units, full, left_out)
    for unit, P in zip(units, kept):
        check_width(unit, P)
    return kept if multiple == 1 else [_rounded(w, n, multiple) for w, n in zip(kept, full)]


def _kept(ratio: Ratio, units: list[Space], full: list[int], left_out: dict[str, str]) -> list[int]:
    """The kept width of every unit before rounding. Raises NeuronMergingError that names a layer whose ratio makes no sense."""
    ratio = ratio.tolist() if hasattr(ratio, "tolist") else ratio  # tensors and arrays
    if isinstance(ratio, Mapping):
        ratios = [0.0] * len(units)
        for pattern, value in ratio.items():
            matching = [i for i, u in enumerate(units) if any(fnmatchcase(name, pattern) for name in u.modules)]
            for i in matching:
                ratios[i] = _number(value)
            if not matching:
                whole = next((layer for layer in left_out if fnmatchcase(layer, pattern)), None)
                raise NeuronMergingError(
                    f"no convolution or linear layer is called {pattern}" if whole is None
                    else f"{whole} cannot be pruned: {left_out[whole]}"
                )  # fmt: skip
    elif isinstance(ratio, Sequence) and not isinstance(ratio, str):
        ratio = [_number(width) for width in ratio]
        if len(ratio) != len(units):
            raise NeuronMergingError(f"{len(ratio)} widths for {len(units)} units: {', '.join(u.layer for u in units)}")
        if any(width % 1 != 0 for width in ratio):  # also NaN
            raise NeuronMergingError(
                f"{ratio} are no kept widths; ratios go by layer name: {{{units[0].layer!r}: 0.5, …}}"
            )
        return [int(width) for width in ratio]
    else:
        ratios = [_number(ratio)] * len(units)
    kept = []
    for unit, n, share in zip(units, full, ratios):
        if not 0 <= share < 1:
            raise NeuronMergingError(f"ratio {share} for layer {unit.layer} is outside [0, 1){meant(share)}")
        single = n == 1 and not isinstance(ratio, Mapping)  # a single neuron stays, unless its layer is named
        kept.append(1 if single else round(n * (1 - share)))
        if kept[-1] < 1:
            raise NeuronMergingError(
                f"ratio {share} leaves no neuron of {n} in {unit.layer}: choose a smaller one, or ignore the layer"
            )
    return kept


def meant(ratio: Real) -> str:
    """A guess what a ratio outside [0, 1) should be, for its message: 50 was likely meant as 50 %."""
    return f": did you mean {float(ratio) / 100:g}?" if 1 < ratio < 100 else ""


def _number(value: object) -> Real:
    """A Python number; also from a tensor or array of one. Raises NeuronMergingError for anything else."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, Real):
        raise NeuronMergingError(f"ratio {value!r} is no number")
    return value


def _rounded(width: int, full: int, multiple: int) -> int:
    return min(full, max(multiple, multiple * round(width / multiple))) if 0 < width < full else width

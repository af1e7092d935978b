"""What `shrink` did to a network, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuron_merging import memory
from neuron_merging.graph.spaces import Space
from neuron_merging.widths.search import WidthSearch


@dataclass(frozen=True)
class Report:
    """What `shrink` did to a network.

    units: what can be dropped, the paper's units and with `coupled` all spaces. widths, full: their kept and original sizes.
    cosine: for each, the cosine of a dropped index with the kept one most like it, mean over the dropped ones. NaN if none is
    dropped, or if the method keeps centroids instead.
    left_out: by layer that stays whole, why. params, macs: before and after; macs is None if no input is known.
    seconds: of everything; seconds_widths: the part of them that choosing widths or neurons took, None if nothing was chosen.
    peak_mb: the most memory in use meanwhile, in MB: of the whole process, or, on a GPU, of PyTorch on `device`.
    search: what was measured for the choice, or None. It gives widths for other budgets; pass it to another call as `search`.
    note: what else there is to know, or None.
    """

    units: list[Space]
    widths: list[int]
    full: list[int]
    cosine: list[float]
    left_out: dict[str, str]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    seconds: float
    seconds_widths: float | None
    peak_mb: float
    search: WidthSearch | None = None
    device: str = "cpu"
    note: str | None = None

    def __str__(self) -> str:
        """A table for people."""
        names = list(map(name_of, self.units))
        wide = max([len("unit"), *map(len, names)])
        lines = [f"{'unit':<{wide}}  {'kept':>6} of {'all':<6} {'cosine':>6}"]
        for name, kept, full, cosine in zip(names, self.widths, self.full, self.cosine):
            lines.append(
                f"{name:<{wide}}  {kept:>6} of {full:<6} {'' if cosine != cosine else f'{cosine:6.3f}'}".rstrip()
            )
        lines += [f"{layer} stays whole: {why}" for layer, why in self.left_out.items()]
        lines += [self.note] if self.note else []
        lines += sizes(self.params, self.macs)
        choice = "" if self.seconds_widths is None else f" ({self.seconds_widths:.2f} s of it for the choice)"
        return "\n".join([*lines, f"{self.seconds:.2f} s{choice}, {memory.held(self.peak_mb, self.device)}"])


def sizes(params: Sequence[int] | None, macs: Sequence[int] | None) -> list[str]:
    """Lines of text: parameters and MACs before and after."""
    lines = []
    for label, size in (("parameters", params), ("MACs", macs)):
        if size is None:
            lines.append(f"{label:<12}not counted: give example_input (--input-size)")
        else:
            change = f" ({100 * (size[1] / size[0] - 1):+.1f} %)" if size[0] else ""
            lines.append(f"{label:<12}{size[0]:>16,} -> {size[1]:,}{change}")
    return lines


def name_of(space: Space) -> str:
    """What a space is called in lists: the paper's layer → next, or the layers that write it and how many read it."""
    if space.unit is not None:
        return f"{space.unit.layer} -> {space.unit.next}"
    written = len({place.name.rpartition(".")[0] for place in space.writers})
    read = len({place.name.rpartition(".")[0] for place in space.readers})
    more = f" and {written - 1} more" if written > 1 else ""
    return f"{space.layer}{more} -> {read} layer{'s' * (read != 1)}"

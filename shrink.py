"""One's own network made smaller in one call: `small, report = shrink(model, 0.5, example_input=x)`.

Without data, without training: see decompose.py for the paper's methods, restore.py and widths.py for ours.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from math import inf, nan
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import memory
from decompose import (
    CRITERIA,
    check_finite,
    check_width,
    choose,
    neurons,
    others,
    read,
)
from errors import NeuronMergingError, said
from evaluate import count_macs, count_parameters
from methods import ALONE, BIASED, BY_LAYER, LOOKING, METHODS, Settings, check_units, layerwise
from pairs import Pairs
from restore import Options
from settings import CHOSEN_WIDTHS, by_name
from streams import Stream, apart, choose_channels, streams
from trace import NORMS, Unit, check_wrapper, survey
from widths import HELD_OUT, Cost, Curve, allocate, curves, joint_damage

WIDTHS = ("uniform", *CHOSEN_WIDTHS)
Ratio = float | Mapping[str, float] | Sequence[int]


@dataclass(frozen=True)
class Report:
    """What became of a network.

    units, widths, full: the prunable units with their kept and original widths. cosine: by unit the mean over the dropped
    neurons of their cosine with the most similar kept one (NaN where there is none, or the method keeps no neurons but
    centroids). left_out: other layers and the reasons. params, macs: original and now (macs None where no input is known).
    seconds_widths: of `seconds`, those of choosing widths or neurons; peak_mb: the most memory held, in MB. curves: what was
    found of the units, to be given to another call.
    """

    units: list[Unit | Stream]
    widths: list[int]
    full: list[int]
    cosine: list[float]
    left_out: dict[str, str]
    params: tuple[int, int]
    macs: tuple[int, int] | None
    seconds: float
    seconds_widths: float | None
    peak_mb: float
    curves: list[Curve] | None = None

    def __str__(self) -> str:
        """A table for people."""
        names = [_name(unit) for unit in self.units]
        wide = max([len("unit"), *map(len, names)])
        lines = [f"{'unit':<{wide}}  {'kept':>6} of {'all':<6} {'cosine':>6}"]
        for name, kept, full, cosine in zip(names, self.widths, self.full, self.cosine):
            lines.append(
                f"{name:<{wide}}  {kept:>6} of {full:<6} {'' if cosine != cosine else f'{cosine:6.3f}'}".rstrip()
            )
        lines += [f"{layer} stays whole: {why}" for layer, why in self.left_out.items()]
        for label, size in (("parameters", self.params), ("MACs", self.macs)):
            if size is not None:
                lines.append(f"{label:<12}{size[0]:>16,} -> {size[1]:,} ({100 * (size[1] / size[0] - 1):+.1f} %)")
        choice = "" if self.seconds_widths is None else f" ({self.seconds_widths:.2f} s of it for the choice)"
        return "\n".join([*lines, f"{self.seconds:.2f} s{choice}, peak memory {self.peak_mb:,.0f} MB"])


def _name(unit: Unit | Stream) -> str:
    if isinstance(unit, Unit):
        return f"{unit.layer} -> {unit.next}"
    more = f" and {len(unit.writers) - 1} more" if len(unit.writers) > 1 else ""
    return f"{unit.layer}{more} -> {len(unit.readers)} layers"


@torch.inference_mode(False)  # restoration follows gradients
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def shrink(
    model: nn.Module,
    ratio: Ratio = 0.5,
    *,
    example_input: Tensor | Sequence[int] | None = None,
    criterion: str = "l2-norm",
    compensation: str = "restore",
    widths: str = "uniform",
    budget: Mapping[str, float] | None = None,
    multiple: int = 1,
    drop_blocks: bool = False,
    coupled: bool = False,
    ignore: Sequence[str] = (),
    threshold: float = Settings.t,
    lamda: float = Settings.lam,
    probe: str = "auto",
    probe_samples: int | None = None,
    ridge: float = Options.ridge,
    seed: int = 1,
    images: Tensor | None = None,
    known: Sequence[Curve] | None = None,
) -> tuple[nn.Module, Report]:
    """A smaller network with the inputs and outputs of `model`, which is left as it is, and a report.

    Outputs are those of evaluation: what a forward pass does in training mode only is not looked at.

    ratio: share of neurons to drop in every unit; or by layer name or glob, others staying whole; or the kept widths.
    example_input: inputs [B, …] or the shape of one, without the batch; restoration and the choice of widths need it.
    criterion: of decompose.CRITERIA, or "auto" (widths.py). compensation: of methods.METHODS; those that look at real images
    take them from `images` [B, …], in random order, which restoration and the choice of widths then look at instead of a probe.
    widths: "uniform", or "auto" or "quick": chosen for no more parameters and MACs than the ratio would leave (by "auto" the
    ratio's own, where a compensation by layers is better off with them), or for `budget`, the shares to keep:
    {"params": 0.5, "macs": 0.4}. multiple: widths are multiples of it, or full. drop_blocks: the
    choice may leave residual blocks out. coupled: also drop channels that several layers share (streams.py). ignore: layer
    names or globs that stay whole. threshold, lamda: of merging. probe, probe_samples, seed: of the made-up inputs that
    restoration and the choice look at (probe.make). ridge: of their regressions. known: curves from the report of an
    earlier call with the same arguments but ratio, budget, multiple, drop_blocks.
    Raises NeuronMergingError that names the layer and says why, where something cannot be done.
    """
    check_names(criterion, compensation, widths)
    check_choice(widths != "uniform", budget, multiple, drop_blocks)
    if budget is not None:
        _check_budget(budget, budget)
    first = next(model.parameters(), None)
    if first is None:
        raise NeuronMergingError(f"{type(model).__name__} has no layer that can be pruned: it has no parameters")
    device = first.device
    if device.type == "mps":
        raise NeuronMergingError(
            "this is computed in float64, which mps does not have: move the network to the CPU first"
        )
    shape = _shape(example_input, images)
    looks = widths != "uniform" or criterion == "auto"
    if shape is None and (looks or compensation == "restore"):
        raise NeuronMergingError(f"{compensation if not looks else 'the choice of widths'} needs to know the network's input:"
                                 " give example_input")  # fmt: skip
    if images is not None and not looks and compensation not in (*LOOKING, "restore"):
        raise NeuronMergingError(f"images are for restore, {' and '.join(LOOKING)}: {compensation} needs no data")
    if images is not None and (images.ndim != len(shape) + 1 or images.shape[1] != shape[0]):
        raise NeuronMergingError(
            f"images of shape {list(images.shape)} are not [B, {str([*shape])[1:]} as example_input has it"
        )
    if images is None and compensation in LOOKING:
        raise NeuronMergingError(f"{compensation} measures BatchNorm on real images: give images")
    if coupled and looks:
        raise NeuronMergingError(
            "widths and neurons are chosen unit by unit: not for coupled channels, give a ratio or widths"
        )
    check_weights(model)
    check_copies(model)
    macs = None if shape is None else network_macs(model, shape)
    memory.reset(device)
    start = time.perf_counter()
    found, left_out = prunable(model, coupled)
    found, left_out = _without(model, found, left_out, ignore)
    if not found:
        alone = coupled or looks or compensation in ALONE
        more = not alone and _without(model, *prunable(model, True), ignore)[0]
        raise NeuronMergingError(
            f"{type(model).__name__} has no layer that can be pruned: {_reasons(left_out)}"
            + ("; coupled channels (coupled=True, --coupled) can be" if more else "")
        )
    check_units(compensation, found)
    full = [width(model, unit) for unit in found]
    if shape is not None:
        _check_vectors(model, found, shape)
    told = Settings(shape or (), threshold, lamda, probe, probe_samples, ridge, seed, images)
    kept = full
    if budget is None:
        kept = _uniform(model, ratio, found, full, left_out, multiple if widths == "uniform" else 1)
    if known is not None and looks and [len(curve.order) for curve in known] != full:
        raise NeuronMergingError("known: these curves are of another network, or of one with other layers to ignore")
    seconds_widths = None
    if looks:
        began, reused = time.perf_counter(), known is not None
        share = 1 / (1 - HELD_OUT) if widths == "auto" else 1.0
        inputs = cache(partial(told.inputs, model, share))  # made when they are needed
        by_layer = layerwise(compensation, told)
        if not reused:
            known = curves(model, found, inputs(), criterion, by_layer, ridge, sensitivity=widths == "auto")
        if widths != "uniform":
            cost = Cost(model, found, shape, biases=compensation in BIASED)
            limit = cost(kept)
            if budget is not None:
                limit = count_parameters(model) * budget.get("params", inf), macs * budget.get("macs", inf)
            given = [k if k == N else k - k % multiple for k, N in zip(kept, full)]
            kept = allocate(known, cost, limit, multiple=multiple, droppable=[drop_blocks and u.branch for u in found])
            comparable = budget is None and compensation in BY_LAYER and min(given) > 0
            if widths == "auto" and comparable and kept != given:
                damage = joint_damage(model, found, known, [kept, given], inputs(), by_layer)
                kept = given if damage[1] < damage[0] else kept
        seconds_widths = None if reused else time.perf_counter() - began
    if criterion == "auto":
        keep = [curve.order[:width].sort().values.to(device) for curve, width in zip(known, kept)]
    else:
        keep = select(model, found, kept, criterion)
    small = METHODS[compensation](model, found, keep, told)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, peak_mb = time.perf_counter() - start, memory.peak(device)
    _lay_out(model, small)
    none = compensation == "fold"
    cosine = [nan if none else _cosine(_weights(model, unit), kept) for unit, kept in zip(found, keep)]
    report = Report(
        found, list(kept), full, cosine, left_out,
        (count_parameters(model), count_parameters(small)),
        None if shape is None else (macs, network_macs(small, shape)),
        seconds, seconds_widths, peak_mb, None if known is None else list(known),
    )  # fmt: skip
    return small, report


def summary(
    model: nn.Module,
    ratio: Ratio | None = None,
    *,
    coupled: bool = False,
    ignore: Sequence[str] = (),
    multiple: int = 1,
    compensation: str = "original",
) -> str:
    """What of a network can lose neurons, with a ratio (or widths, as of `shrink`) how many, and why the rest cannot.

    compensation: by which; "original" for none. Raises NeuronMergingError for numbers and names that make no sense, and
    where the compensation has no form for a unit.
    """
    if compensation != "original":
        check_names("l2-norm", compensation, "uniform")
    check_choice(False, None, multiple, False)
    check_weights(model)
    found, left_out = _without(model, *prunable(model, coupled), ignore)
    check_units(compensation, found)
    full = [width(model, unit) for unit in found]
    counts = [str(n) for n in full]
    if ratio is not None:
        counts = [f"{kept} of {n}" for kept, n in zip(_uniform(model, ratio, found, full, left_out, multiple), full)]
    return "\n".join(
        [
            *(f"{_name(unit)}: {count}" for unit, count in zip(found, counts)),
            *(f"{layer} stays whole: {why}" for layer, why in left_out.items()),
        ]
    )


def check_sizes(model: nn.Module) -> None:
    """Raises NeuronMergingError where a layer has no size yet, since it has not seen an input."""
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has no size yet: run the network once")


def check_weights(model: nn.Module) -> None:
    """Raises NeuronMergingError where a parameter or a running statistic is NaN or infinite (or a variance below 0), or
    there is none yet, or the network is wrapped in something else.
    """
    check_wrapper(model)
    check_sizes(model)
    for name, module in model.named_modules():
        values = list(module.parameters(recurse=False))
        if isinstance(module, NORMS) and module.running_mean is not None:
            values += [module.running_mean, module.running_var]
        if any(value.is_meta for value in values):
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has no weights yet: it is on the meta device")
        if values:
            check_finite(name or type(module).__name__, *(value.detach() for value in values))
        if isinstance(module, NORMS) and module.running_var is not None and (module.running_var < 0).any():
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has variances below 0")


def check_copies(model: nn.Module) -> None:
    """Raises NeuronMergingError where a network cannot be copied, and names the tensor that stands in the way, if it is one."""
    try:
        with said(f"{type(model).__name__} cannot be copied", typed=True):
            copy.deepcopy(model)
    except NeuronMergingError as error:
        for name, module in model.named_modules():
            for attribute, value in (vars(module) | module._buffers).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    raise NeuronMergingError(
                        f"{f'{name}.'.lstrip('.')}{attribute} cannot be copied, being computed from what is learned: detach"
                        " it, or remove what torch.nn.utils.prune or weight_norm left"
                    ) from error
        raise


def _lay_out(model: nn.Module, small: nn.Module) -> None:
    """Let the weights of `small` lie in memory with their channels last where those of `model` do."""
    wide = {
        name: weight for name, weight in model.named_parameters() if weight.ndim == 4 and not weight.is_contiguous()
    }
    last = {name for name, weight in wide.items() if weight.is_contiguous(memory_format=torch.channels_last)}
    for name, weight in small.named_parameters():
        if name in last:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def network_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates for one input. Raises NeuronMergingError where the network does not run on such a one."""
    with said(f"{type(model).__name__} does not run on an input of shape {list(shape)}"):
        return count_macs(model, shape)


def prunable(model: nn.Module, coupled: bool = False) -> tuple[list[Unit | Stream], dict[str, str]]:
    """The units and, with `coupled`, the streams of a network; by other layer why it stays whole.

    Raises NeuronMergingError where torch.fx cannot trace it.
    """
    found, left_out = survey(model)
    if not coupled:
        return found, left_out
    alone = {unit.layer for unit in found}
    shared, reasons = streams(model)
    shared = [stream for stream in shared if not alone & set(stream.writers)]
    written = {writer for stream in shared for writer in stream.writers}
    written |= {place.module for stream in shared for place in stream.followers}
    left_out = {layer: reasons.get(layer, why) for layer, why in left_out.items() if layer not in written}
    return [*found, *shared], left_out


@torch.no_grad()
def _check_vectors(model: nn.Module, found: Sequence[Unit | Stream], shape: tuple[int, ...]) -> None:
    """Raises NeuronMergingError where a BatchNorm1d behind a linear layer has inputs [B, L, C]: it normalises L, not C."""

    def check(layer: str, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim > 2:
            raise NeuronMergingError(f"{name} normalises places, not what {layer} gives at each: ignore {layer}")

    hooks = []
    for unit in found:
        if isinstance(unit, Stream) and isinstance(model.get_submodule(unit.layer), nn.Linear):
            for name in {place.module for place in unit.followers}:
                hook = partial(check, unit.layer, name)
                hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        if hooks:
            count_macs(model, shape)
    finally:
        for hook in hooks:
            hook.remove()


def width(model: nn.Module, unit: Unit | Stream) -> int:
    """How many neurons or channels a unit or stream has."""
    return len(model.get_submodule(unit.layer).weight)


def select(model: nn.Module, found: Sequence[Unit | Stream], widths: Sequence[int], criterion: str) -> list[Tensor]:
    """Indices [P], ascending, that the criterion keeps of every unit and stream. Raises as decompose.choose."""
    (alone, kept), _ = apart(found, widths)
    chosen = iter(choose(model, alone, kept, criterion))
    return [
        next(chosen) if isinstance(unit, Unit) else choose_channels(model, unit, P, criterion)
        for unit, P in zip(found, widths, strict=True)
    ]


def _weights(model: nn.Module, unit: Unit | Stream) -> Tensor:
    """The weights [N, D] of a unit's neurons or of a stream's channels."""
    if isinstance(unit, Unit):
        return read(model, unit).W
    return torch.cat([neurons(model, writer).W for writer in unit.writers], 1)


def _shape(example_input: Tensor | Sequence[int] | None, images: Tensor | None) -> tuple[int, ...] | None:
    """Of one input, without the batch."""
    if isinstance(example_input, Tensor):
        if example_input.dtype in (torch.int32, torch.int64):  # the words of an embedding; images have others
            raise NeuronMergingError(
                "example_input is of whole numbers, which cannot be made up: leave it out (prune, merge), or give a shape"
            )
        return tuple(example_input.shape[1:])
    if example_input is not None:
        if not isinstance(example_input, Sequence) or not all(isinstance(side, Integral) for side in example_input):
            raise NeuronMergingError(
                f"example_input {example_input!r}: give a tensor of inputs [B, …] or the shape of one, (3, 32, 32)"
            )
        return tuple(example_input)
    return None if images is None else tuple(images.shape[1:])


def _without(
    model: nn.Module, found: list[Unit | Stream], left_out: dict[str, str], ignore: Sequence[str]
) -> tuple[list[Unit | Stream], dict[str, str]]:
    """The units that are not to be ignored, and the others with their reasons. Raises for a name that nothing has."""
    if isinstance(ignore, str):
        ignore = [ignore]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in (*(n for u in found for n in _layers(model, u)), *left_out)):
            raise NeuronMergingError(f"ignore: no convolution or linear layer is called {pattern}")
    ignored = [u for u in found if any(fnmatchcase(name, pattern) for name in _layers(model, u) for pattern in ignore)]
    left = [u for u in found if u not in ignored]
    whole = {name for u in ignored for name in _layers(model, u)} - {name for u in left for name in _layers(model, u)}
    reason = "it is ignored, or shares channels with a layer that is"
    return left, left_out | {name: reason for u in ignored for name in _layers(model, u) if name in whole}


def _layers(model: nn.Module, unit: Unit | Stream) -> tuple[str, ...]:
    """The layers that a unit or stream is made of: those that write it, and depthwise convolutions that follow."""
    if isinstance(unit, Unit):
        return (unit.layer,)
    followers = (place.module for place in unit.followers)
    return (*unit.writers, *(name for name in followers if not isinstance(model.get_submodule(name), NORMS)))


def _uniform(
    model: nn.Module, ratio: Ratio, found: list[Unit | Stream], full: list[int], left_out: dict[str, str], multiple: int
) -> list[int]:
    """Kept widths as the ratio says, multiples of `multiple` or full. Raises NeuronMergingError where they make no sense."""
    kept = _kept(model, ratio, found, full, left_out)
    for unit, P, N in zip(found, kept, full):
        check_width(unit.layer, P, N, least=0 if isinstance(unit, Unit) and unit.branch else 1)
    if 0 in kept and any(isinstance(unit, Stream) for unit in found):
        raise NeuronMergingError("a block can only be left out where channels are not coupled: give 1 or more")
    return kept if multiple == 1 else [_rounded(w, n, multiple) for w, n in zip(kept, full)]


def _kept(
    model: nn.Module, ratio: Ratio, found: list[Unit | Stream], full: list[int], left_out: dict[str, str]
) -> list[int]:
    """Kept width of every unit. Raises NeuronMergingError for ratios and widths that make no sense, with the layer's name."""
    ratio = ratio.tolist() if hasattr(ratio, "tolist") else ratio  # tensors and arrays
    if isinstance(ratio, Mapping):
        ratios = [0.0] * len(found)
        for pattern, value in ratio.items():
            matching = [i for i, u in enumerate(found) if any(fnmatchcase(name, pattern) for name in _layers(model, u))]
            for i in matching:
                ratios[i] = _number(value)
            if not matching:
                out = next((layer for layer in left_out if fnmatchcase(layer, pattern)), None)
                raise NeuronMergingError(
                    f"no convolution or linear layer is called {pattern}" if out is None
                    else f"{out} cannot be pruned: {left_out[out]}"
                )  # fmt: skip
    elif isinstance(ratio, Sequence) and not isinstance(ratio, str):
        ratio = [_number(width) for width in ratio]
        if len(ratio) != len(found):
            raise NeuronMergingError(f"{len(ratio)} widths for {len(found)} units: {', '.join(u.layer for u in found)}")
        if any(width % 1 != 0 for width in ratio):  # also NaN
            raise NeuronMergingError(
                f"{ratio} are no kept widths; ratios go by layer name: {{{found[0].layer!r}: 0.5}}"
            )
        return [int(width) for width in ratio]
    else:
        ratios = [_number(ratio)] * len(found)
    kept = []
    for unit, n, share in zip(found, full, ratios):
        if not 0 <= share < 1:
            raise NeuronMergingError(f"ratio {share} of {unit.layer} is outside [0, 1)")
        alone = n == 1 and not isinstance(ratio, Mapping)  # a single neuron stays, unless it is named
        kept.append(1 if alone else round(n * (1 - share)))
        if kept[-1] < 1:
            raise NeuronMergingError(
                f"ratio {share} leaves no neuron of {n} in {unit.layer}: choose a smaller one, or ignore the layer"
            )
    return kept


def _number(value: object) -> Real:
    """As Python has it, of a tensor or an array too. Raises NeuronMergingError for what is none."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, Real):
        raise NeuronMergingError(f"ratio {value!r} is no number")
    return value


def _rounded(width: int, full: int, multiple: int) -> int:
    return min(full, max(multiple, multiple * round(width / multiple))) if 0 < width < full else width


def parse_budget(text: str) -> dict[str, float]:
    """params=0.5,macs=0.4 → a dict. Raises NeuronMergingError for what makes no sense."""
    try:
        budget = by_name(text)
    except ValueError:
        budget = {}
    _check_budget(budget, text)
    return budget


def check_names(criterion: str, compensation: str, widths: str) -> None:
    """Raises NeuronMergingError where one is unknown."""
    if compensation not in METHODS:
        raise NeuronMergingError(f"unknown compensation {compensation!r}: choose one of {', '.join(METHODS)}")
    if criterion not in (*CRITERIA, "auto"):
        raise NeuronMergingError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}, auto")
    if widths not in WIDTHS:
        raise NeuronMergingError(f"unknown widths {widths!r}: choose one of {', '.join(WIDTHS)}")


def check_choice(chosen: bool, budget: object, multiple: int, drop_blocks: bool) -> None:
    """What of the choice of widths does not go together. Raises NeuronMergingError."""
    if not isinstance(multiple, Integral) or multiple < 1:
        raise NeuronMergingError(f"--multiple {multiple} has to be at least 1, and whole")
    if (budget is not None or drop_blocks) and not chosen:
        raise NeuronMergingError("--budget and --drop-blocks are for --widths auto (or quick)")


def _check_budget(budget: Mapping[str, float], given: object) -> None:
    if (
        not isinstance(budget, Mapping)
        or not budget
        or not set(budget) <= {"params", "macs"}
        or not all(isinstance(share, Real) and 0 < share <= 1 for share in budget.values())
    ):
        raise NeuronMergingError(f"budget {given}: say the shares to keep, such as params=0.5,macs=0.4")


def _cosine(W: Tensor, keep: Tensor) -> float:
    """The mean cosine of dropped neurons of W [N, D] with the most similar kept one; NaN where none is dropped."""
    drop = others(W, keep)
    if not len(keep) or not len(drop):
        return nan
    return float(Pairs(W, keep, drop).cos().amax(0).mean())


def _reasons(left_out: dict[str, str]) -> str:
    return "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has none"

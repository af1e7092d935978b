"""Make a network smaller in one call: `small, report = shrink(model, 0.5, example_input=x)`.

It needs no data and no training. The paper's methods are in decompose.py, ours in restore/ and widths/.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from neuron_merging import exported, memory, synthetic
from neuron_merging.checks import (
    check_copies,
    check_module,
    check_vectors,
    check_weights,
    input_shape,
    likely_shape,
    network_macs,
    out_of_inference,
    take_modes,
    without_masks,
)
from neuron_merging.config import CHOSEN_WIDTHS, Ratio, ShrinkConfig
from neuron_merging.counting import count_parameters, dtype, precise
from neuron_merging.coupled import choose_channels
from neuron_merging.decompose import COMPENSATIONS, CRITERIA, cosines, dropped
from neuron_merging.errors import NeuronMergingError, reported_as
from neuron_merging.graph.spaces import Space, find_spaces
from neuron_merging.graph.streams import Stream, apart, streams
from neuron_merging.graph.tracing import CONVS, CannotBeTraced, Tracer, Unit, survey
from neuron_merging.methods import METHODS, NEED_IMAGES, check_units
from neuron_merging.network import choose, neurons, read
from neuron_merging.ratios import uniform_widths, without
from neuron_merging.widths.search import HELD_OUT, WidthSearch

WIDTHS = ("uniform", *CHOSEN_WIDTHS)
AS_EXPORTED = (*COMPENSATIONS, "restore")  # of networks that torch.fx cannot trace, and of several inputs
SUMMARY_SAMPLES = 8  # made-up inputs for a summary: enough to show the sizes that restoration leaves


@dataclass(frozen=True)
class Report:
    """What `shrink` did to a network.

    units, widths, full: the units that can be pruned, with their kept and original widths.
    cosine: for each unit, the cosine of a dropped neuron with the kept one most like it, mean over the dropped ones. NaN if
    none is dropped, or if the method keeps centroids instead of neurons.
    left_out: by layer that stays whole, why. params, macs: before and after; macs is None if no input is known.
    seconds: of everything; seconds_widths: the part of them that choosing widths or neurons took, None if nothing was chosen.
    peak_mb: the most memory in use meanwhile, in MB: of the whole process, or, on a GPU, of PyTorch on `device`.
    search: what was measured for the choice, or None. It gives widths for other budgets; pass it to another call as `search`.
    note: what else there is to know, or None.
    """

    units: list[Unit | Stream | Space]
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
        names = [_name(unit) for unit in self.units]
        wide = max([len("unit"), *map(len, names)])
        lines = [f"{'unit':<{wide}}  {'kept':>6} of {'all':<6} {'cosine':>6}"]
        for name, kept, full, cosine in zip(names, self.widths, self.full, self.cosine):
            lines.append(
                f"{name:<{wide}}  {kept:>6} of {full:<6} {'' if cosine != cosine else f'{cosine:6.3f}'}".rstrip()
            )
        lines += [f"{layer} stays whole: {why}" for layer, why in self.left_out.items()]
        lines += [self.note] if self.note else []
        lines += _sizes(self.params, self.macs)
        choice = "" if self.seconds_widths is None else f" ({self.seconds_widths:.2f} s of it for the choice)"
        return "\n".join([*lines, f"{self.seconds:.2f} s{choice}, {memory.held(self.peak_mb, self.device)}"])


def _sizes(params: tuple[int, int] | None, macs: tuple[int, int] | None) -> list[str]:
    """Lines of text: parameters and MACs before and after."""
    lines = []
    for label, size in (("parameters", params), ("MACs", macs)):
        if size is None:
            lines.append(f"{label:<12}not counted: give example_input (--input-size)")
        else:
            change = f" ({100 * (size[1] / size[0] - 1):+.1f} %)" if size[0] else ""
            lines.append(f"{label:<12}{size[0]:>16,} -> {size[1]:,}{change}")
    return lines


def _name(unit: Unit | Stream | Space) -> str:
    if isinstance(unit, Unit):
        return f"{unit.layer} -> {unit.next}"
    if isinstance(unit, Space):
        written = len({place.name.rpartition(".")[0] for place in unit.writers})
        return unit.layer + (f" and {written - 1} more" if written > 1 else "")
    more = f" and {len(unit.writers) - 1} more" if len(unit.writers) > 1 else ""
    return f"{unit.layer}{more} -> {len(unit.readers)} layers"


@torch.inference_mode(False)  # restoration needs gradients
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def shrink(
    model: nn.Module,
    ratio: Ratio | None = None,
    *,
    example_input: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    images: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    config: ShrinkConfig | None = None,
    search: WidthSearch | None = None,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Returns a smaller network with the same inputs and outputs as `model`, and a report. `model` is unchanged.

    The outputs are those in evaluation mode; what `model` computes only in training mode is not preserved.

    ratio: the share of neurons to drop in every unit [0.5]; or a dict of shares by layer name or glob, where other layers stay
    whole; or a list of the kept widths.
    example_input: inputs [B, …], or the shape of one input without the batch. Restoration and the choice of widths need it.
    A network with several inputs takes a tuple or a mapping of tensors. Such a network, and one that torch.fx cannot trace,
    can only be pruned, merged and restored (exported.py).
    images: real inputs [B, …], in random order, for methods that run the network on inputs. Without them, inputs are made up.
    They are a tuple or a mapping where example_input is one.
    options: the fields of `ShrinkConfig`, such as compensation="merge", criterion="l1-norm", widths="auto", coupled=True.
    config: a `ShrinkConfig`, instead of `options` or in addition to them.
    search: `report.search` of an earlier call with the same network and options; ratio, budget, multiple and drop_blocks may
    differ.
    Raises NeuronMergingError that names the layer and says why, if something cannot be done.
    """
    config = _configured(config, ratio, options)
    check_names(config)
    check_module(model)
    model = without_masks(model)
    device = _device(model)
    several = _several(example_input)
    shape = None if several else input_shape(example_input, images)
    if not several:
        _check_inputs(config, shape, images)
    check_weights(model)
    check_copies(model, shape)
    model = out_of_inference(model)
    if several:
        return _pruned_as_exported(model, example_input, images, config, device)
    macs = None
    if shape is not None:
        macs = network_macs(model, shape, example_input if isinstance(example_input, Tensor) else None)
    memory.reset(device)
    start = time.perf_counter()
    try:
        units, left_out = _units(model, config)
    except CannotBeTraced as error:
        if shape is None or config.compensation not in AS_EXPORTED:
            raise NeuronMergingError(
                f"{error}; without that it can only be pruned, merged or restored, with example_input"
            ) from error
        inputs = torch.zeros(2, *shape, device=device) if images is None else images[:2].to(device)
        inputs = example_input if isinstance(example_input, Tensor) else inputs
        return _pruned_as_exported(model, inputs, images, config, device)
    full = [width(model, unit) for unit in units]
    check_vectors(model, units, shape)
    kept = full
    if config.budget is None:
        multiple = config.multiple if config.widths == "uniform" else 1
        kept = uniform_widths(model, config.ratio, units, full, left_out, multiple)
    seconds_widths = None
    if config.chooses:
        if search is None:
            search = _search(model, units, shape, config, images)
            seconds_widths = search.seconds
        elif [len(curve.order) for curve in search.curves] != full:
            raise NeuronMergingError("search: it is of another network, or of one with other layers to ignore")
        began = time.perf_counter()
        if config.widths != "uniform":
            kept = search.widths(
                kept, config.budget, multiple=config.multiple, drop_blocks=config.drop_blocks,
                compare=METHODS[config.compensation].local,
            )  # fmt: skip
        seconds_widths = seconds_widths and seconds_widths + time.perf_counter() - began
    if config.criterion == "auto":
        keep = [index.to(device) for index in search.keep(kept)]
    else:
        keep = select(model, units, kept, config.criterion)
    inputs = partial(synthetic.inputs, model, shape, config, images)
    small = METHODS[config.compensation].run(model, units, keep, config, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, peak_mb = time.perf_counter() - start, memory.peak(device)
    _lay_out(model, small)
    modes = {name: module.training for name, module in model.named_modules()}
    take_modes(small, {module: modes.get(name, model.training) for name, module in small.named_modules()})
    after = _check_runs(model, small, shape)
    centroids = config.compensation == "fold"
    cosine = [nan if centroids else _cosine(_weights(model, unit), index) for unit, index in zip(units, keep)]
    report = Report(
        units, list(kept), full, cosine, left_out,
        (count_parameters(model), count_parameters(small)),
        None if macs is None else (macs, after),
        seconds, seconds_widths, peak_mb, search, str(device),
    )  # fmt: skip
    return small, report


def _several(example_input: Any) -> bool:
    """Whether an example is of several inputs: a mapping, or a sequence of tensors."""
    values = example_input.values() if isinstance(example_input, Mapping) else example_input
    return isinstance(values, Collection) and not isinstance(values, Tensor | str) and any(
        isinstance(value, Tensor) for value in values
    )  # fmt: skip


def _pruned_as_exported(
    model: nn.Module,
    inputs: exported.Inputs,
    images: exported.Inputs | None,
    config: ShrinkConfig,
    device: torch.device,
) -> tuple[nn.Module, Report]:
    """`shrink` for networks that torch.fx cannot trace, and for several inputs.

    Raises NeuronMergingError for all methods but `AS_EXPORTED`.
    """
    if config.compensation not in AS_EXPORTED:
        raise NeuronMergingError(
            "a network that is called with several inputs, or by keywords, can only be pruned, merged or restored so far:"
            " give compensation='prune', 'merge', 'merge-derived' or 'restore'"
        )
    if images is not None and config.compensation != "restore" and not config.chooses:
        raise NeuronMergingError(f"images are for restore: {config.compensation} needs no data")
    memory.reset(device)
    start = time.perf_counter()
    pruned = exported.shrink(model, inputs, replace(config, coupled=True), images)
    return pruned.model, Report(
        pruned.spaces, pruned.kept, pruned.full, pruned.cosine, pruned.left_out,
        (count_parameters(model), count_parameters(pruned.model)), pruned.macs,
        time.perf_counter() - start, pruned.search and pruned.search.seconds, memory.peak(device), pruned.search,
        str(device), pruned.note,
    )  # fmt: skip


def _check_runs(model: nn.Module, small: nn.Module, shape: tuple[int, ...] | None) -> int | None:
    """Run the smaller network once, on an input of `shape` or of a guessed shape that `model` runs on. Returns its MACs.

    None if there is no such shape. Raises NeuronMergingError if the smaller network does not run.
    """
    tried = likely_shape(model) if shape is None else shape
    if tried is None:
        return None
    try:
        return network_macs(small, tried)
    except NeuronMergingError as error:
        other = "give example_input" if shape is None else "leave coupled out, or ignore what it was cut in"
        raise NeuronMergingError(f"what is left of {type(model).__name__} does not run: {other} ({error})") from error


def _configured(config: ShrinkConfig | None, ratio: Ratio | None, options: dict[str, Any]) -> ShrinkConfig:
    try:
        return replace(config or ShrinkConfig(), **options | ({} if ratio is None else {"ratio": ratio}))
    except TypeError as error:
        raise NeuronMergingError(f"shrink: {str(error).partition(') ')[2] or error}") from error


def summarize(
    model: nn.Module,
    ratio: Ratio | None = None,
    *,
    compensation: str = "original",
    example_input: Tensor | Sequence[int] | None = None,
    images: Tensor | None = None,
    config: ShrinkConfig | None = None,
    **options: Any,
) -> str:
    """A text that lists what can lose neurons in a network, and why the rest cannot.

    With a ratio, or if widths are chosen, it also says how many neurons, parameters and MACs would be left.
    compensation: the method that would be used; "original" for none. Other arguments and errors are those of `shrink`.
    """
    named = compensation != "original"
    config = _configured(config, ratio, options | {"compensation": compensation if named else "prune"})
    check_names(config)
    check_module(model)
    model = without_masks(model)
    check_weights(model)
    model = out_of_inference(model)
    units, left_out = without(model, *prunable(model, config.coupled), config.ignore)
    if named:
        check_units(compensation, units)
    counts, sizes = [str(width(model, unit)) for unit in units], []
    chosen = config.widths in CHOSEN_WIDTHS
    if units and (chosen or ratio is not None):
        report = _would_be(model, config, example_input, images)
        counts = [f"{kept} of {full}" for kept, full in zip(report.widths, report.full)]
        method = METHODS[config.compensation]
        unknown = example_input is None and method.looks and method.adds_bias  # only inputs show where it adds biases
        sizes = _sizes(None if unknown else report.params, report.macs)
    whole = [f"{layer} stays whole: {why}" for layer, why in left_out.items()]
    return "\n".join([*(f"{_name(unit)}: {count}" for unit, count in zip(units, counts)), *whole, *sizes])


def _would_be(
    model: nn.Module, config: ShrinkConfig, example_input: Tensor | Sequence[int] | None, images: Tensor | None
) -> Report:
    """The report that `shrink` would give, right in its widths and sizes only. If a ratio gives the widths, this is quick."""
    if config.widths not in CHOSEN_WIDTHS:
        method = METHODS[config.compensation]
        adds_bias = method.adds_bias and (example_input is not None or not method.looks)
        kind, images = config.compensation if adds_bias else "prune", None  # without biases: the sizes of prune
        config = replace(config, criterion="l1-norm", compensation=kind, probe_samples=SUMMARY_SAMPLES)
    return shrink(model, example_input=example_input, images=images, config=config)[1]


def check_names(config: ShrinkConfig) -> None:
    """Raises NeuronMergingError if a name in the config is unknown."""
    for what, name, known in (
        ("compensation", config.compensation, METHODS),
        ("criterion", config.criterion, (*CRITERIA, "auto")),
        ("widths", config.widths, WIDTHS),
        ("--probe", config.probe, synthetic.KINDS),
    ):
        if name not in known:
            raise NeuronMergingError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")


def _device(model: nn.Module) -> torch.device:
    """The device of the network. Raises NeuronMergingError if it has no parameters, or is on MPS, which has no float64."""
    first = next(model.parameters(), None)
    if first is None:
        raise NeuronMergingError(f"{type(model).__name__} has no layer that can be pruned: it has no parameters")
    if first.device.type == "mps":
        raise NeuronMergingError(
            "shrink computes in float64, which mps does not have: move the network to the CPU first"
        )
    return first.device


def _check_inputs(config: ShrinkConfig, shape: tuple[int, ...] | None, images: Tensor | None) -> None:
    """Raises NeuronMergingError if a method needs inputs that are missing, or is given inputs that it does not use."""
    method, name = METHODS[config.compensation], config.compensation
    if shape is None and (config.chooses or (method.looks and not method.needs_images)):
        what = "the choice of widths" if config.chooses else name
        raise NeuronMergingError(f"{what} needs to know the network's input: give example_input")
    if images is not None and not config.chooses and not method.looks:
        raise NeuronMergingError(f"images are for restore, {' and '.join(NEED_IMAGES)}: {name} needs no data")
    if images is not None and (images.ndim != len(shape) + 1 or images.shape[1] != shape[0]):
        raise NeuronMergingError(
            f"images of shape {list(images.shape)} are not [B, {str([*shape])[1:]} as example_input has it"
        )
    if images is None and method.needs_images:
        raise NeuronMergingError(f"{name} measures BatchNorm on real images: give images")
    if config.coupled and config.chooses:
        raise NeuronMergingError(
            "coupled channels have no choice of widths or neurons: leave coupled out, or give a ratio or widths and a criterion"
        )


def _units(model: nn.Module, config: ShrinkConfig) -> tuple[list[Unit | Stream], dict[str, str]]:
    """The units and streams that are to lose neurons, and why other layers stay whole. Raises NeuronMergingError for none."""
    units, left_out = without(model, *prunable(model, config.coupled), config.ignore)
    if not units:
        can_couple = not config.coupled and not config.chooses and METHODS[config.compensation].coupled
        more = can_couple and without(model, *prunable(model, True), config.ignore)[0]
        reasons = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:3]) or "it has none"
        raise NeuronMergingError(
            f"{type(model).__name__} has no layer that can be pruned: {reasons}"
            + ("; coupled channels (coupled=True, --coupled) can be" if more else "")
        )
    check_units(config.compensation, units)
    return units, left_out


def _search(
    model: nn.Module, units: list[Unit], shape: tuple[int, ...], config: ShrinkConfig, images: Tensor | None
) -> WidthSearch:
    """Measure what thinning each unit does. As a third of the inputs is held out for sensitivities, more are made up."""
    sensitivity = config.widths == "auto"
    share = 1 / (1 - HELD_OUT) if sensitivity else 1.0
    method = METHODS[config.compensation]
    with reported_as(f"no widths can be chosen for {type(model).__name__}"):
        probe = synthetic.inputs(model, shape, config, images, share)
        probe = probe.contiguous(memory_format=torch.channels_last) if probe.ndim == 4 else probe
        found = find_spaces(model, precise(probe[:2], dtype(model)))
        by_layer = {space.unit.layer: space for space in found.spaces if space.unit is not None}
        missing = next((unit.layer for unit in units if unit.layer not in by_layer), None)
        if missing is not None:
            raise NeuronMergingError(f"torch.export sees no unit in {missing}: ignore it")
        return WidthSearch(
            found, [by_layer[unit.layer] for unit in units], [[probe]], criterion=config.criterion,
            layerwise=method.of_a_layer(config), ridge=config.ridge, sensitivity=sensitivity, biases=method.adds_bias,
        )  # fmt: skip


def _lay_out(model: nn.Module, small: nn.Module) -> None:
    """Give the weights of `small` the memory format channels_last where those of `model` have it."""
    strided = {
        name: weight for name, weight in model.named_parameters() if weight.ndim == 4 and not weight.is_contiguous()
    }
    last = {name for name, weight in strided.items() if weight.is_contiguous(memory_format=torch.channels_last)}
    for name, weight in small.named_parameters():
        if name in last:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def prunable(model: nn.Module, coupled: bool = False) -> tuple[list[Unit | Stream], dict[str, str]]:
    """The units of a network, with `coupled` also its streams; and by layer that stays whole, why.

    Raises NeuronMergingError if torch.fx cannot trace the network.
    """
    units, left_out = survey(model)
    unseen = _unseen(model, {unit.layer for unit in units} | {unit.next for unit in units} | left_out.keys())
    if unseen:
        units, left_out = _as_in_training(model, units, left_out, survey)
    if not coupled:
        return units, left_out | unseen
    alone = {unit.layer for unit in units}
    shared, reasons = streams(model)
    if unseen:
        shared, reasons = _as_in_training(model, shared, reasons, streams)
    shared = [stream for stream in shared if not alone & set(stream.writers)]
    written = {writer for stream in shared for writer in stream.writers}
    written |= {place.module for stream in shared for place in stream.followers}
    left_out = {layer: reasons.get(layer, why) for layer, why in left_out.items() if layer not in written}
    return [*units, *shared], left_out | unseen


def _as_in_training(
    model: nn.Module, units: list[Any], left_out: dict[str, str], find: Callable[..., tuple[list[Any], dict[str, str]]]
) -> tuple[list[Any], dict[str, str]]:
    """The units or streams with their readers in training mode too, such as auxiliary heads; and why the others stay whole.

    find: `survey` or `streams`. If a network cannot be traced in training mode, nothing changes.
    """
    try:
        trained = {unit.layer: unit for unit in find(model, training=True)[0]}
    except NeuronMergingError:
        return units, left_out
    kept = [trained[unit.layer] for unit in units if _covers(trained.get(unit.layer), unit)]
    layers = {unit.layer for unit in kept}
    reason = "training reads its output in another way than evaluation"
    return kept, left_out | {unit.layer: reason for unit in units if unit.layer not in layers}


def _covers(trained: Unit | Stream | None, unit: Unit | Stream) -> bool:
    """Whether a unit or stream is the same in training as in evaluation; in training, more layers may read it."""
    if isinstance(trained, Stream) and isinstance(unit, Stream):
        same = trained.writers == unit.writers and {*trained.followers} >= {*unit.followers}
        return same and {*trained.readers} >= {*unit.readers}
    return trained == unit


def _unseen(model: nn.Module, seen: Collection[str]) -> dict[str, str]:
    """By convolution or linear layer that is not `seen` in the graph: why it is not there."""
    tracer, modules = Tracer(), dict(model.named_modules())
    lists = (nn.ModuleList, nn.ModuleDict)
    closed = [
        name for name, module in modules.items()
        if name and tracer.is_leaf_module(module, name) and not isinstance(module, (*lists, *CONVS, nn.Linear))
    ]  # fmt: skip
    reasons = {}
    for name, module in modules.items():
        if name not in seen and isinstance(module, (*CONVS, nn.Linear)):
            outside = next((outer for outer in closed if name.startswith(f"{outer}.")), None)
            if not name:
                reasons[type(module).__name__] = "it is the whole network, and its outputs stay as they are"
            elif outside is None:
                reasons[name] = "the forward pass never calls it in evaluation"
            else:
                kind = type(modules[outside]).__name__
                reasons[name] = f"it is inside {outside} ({kind}), which torch.fx does not look into"
    return reasons


def width(model: nn.Module, unit: Unit | Stream) -> int:
    """How many neurons or channels a unit or stream has."""
    return len(model.get_submodule(unit.layer).weight)


def select(model: nn.Module, units: Sequence[Unit | Stream], widths: Sequence[int], criterion: str) -> list[Tensor]:
    """For every unit and stream the indices [P], ascending, that the criterion keeps. Raises as network.choose."""
    (alone, kept), _ = apart(units, widths)
    chosen = iter(choose(model, alone, kept, criterion))
    return [
        next(chosen) if isinstance(unit, Unit) else choose_channels(model, unit, P, criterion)
        for unit, P in zip(units, widths, strict=True)
    ]


def _weights(model: nn.Module, unit: Unit | Stream) -> Tensor:
    """The weights [N, D] of a unit's neurons or of a stream's channels."""
    if isinstance(unit, Unit):
        return read(model, unit).W
    return torch.cat([neurons(model, writer).W for writer in unit.writers], 1)


def _cosine(W: Tensor, keep: Tensor) -> float:
    """The mean over dropped neurons of W [N, D] of the cosine with the most similar kept one; NaN if none is dropped."""
    drop = dropped(W, keep)
    if not len(keep) or not len(drop):
        return nan
    return float(cosines(W, keep, drop).amax(0).mean())

"""Make a network smaller in one call: `small, report = shrink(model, 0.5, example_input=x)`.

It needs no data and no training. The paper's methods are in decompose.py, ours in restore/ and widths/.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neuron_merging import memory, plan, synthetic
from neuron_merging.checks import (
    as_taken,
    check_copies,
    check_module,
    check_runs,
    check_weights,
    input_shape,
    likely_shape,
    out_of_inference,
    take_modes,
    without_masks,
    zeros,
)
from neuron_merging.config import CHOSEN_WIDTHS, Ratio, ShrinkConfig
from neuron_merging.counting import count_parameters
from neuron_merging.decompose import CRITERIA
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.spaces import Survey, find_spaces
from neuron_merging.methods import METHODS, NEED_IMAGES
from neuron_merging.report import Report, name_of, sizes
from neuron_merging.restore.batches import Source
from neuron_merging.widths.cost import Cost
from neuron_merging.widths.search import WidthSearch

WIDTHS = ("uniform", *CHOSEN_WIDTHS)


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
    example_input: inputs [B, …], or the shape of one input without the batch; a tuple or a mapping of tensors for several
    inputs. Without it the shape is guessed; restoration and the choice of widths need it.
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
    original, model, shape, example = _prepared(model, example_input, images, config)
    device = next(model.parameters()).device
    memory.reset(device)
    start = time.perf_counter()
    survey = _surveyed(model, example)
    chosen = search is None and config.chooses
    inputs = Source(survey.network, config, images)
    made = plan.make(survey, model, config, inputs, search)
    small, notes = METHODS[config.compensation].run(survey, made.keep, config, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, peak_mb = time.perf_counter() - start, memory.peak(device)
    modes = {name: module.training for name, module in original.named_modules()}
    take_modes(
        small.model, {module: modes.get(name, original.training) for name, module in small.model.named_modules()}
    )
    cost = Cost(survey, made.spaces)
    centroids = config.compensation == "fold"
    report = Report(
        made.spaces, made.widths, made.full,
        [nan if centroids else part.cosine(made.keep[part.space]) for part in made.contents], made.left_out,
        (count_parameters(model), count_parameters(small.model)),
        None if shape is None and example_input is None else tuple(round(cost(w)[1]) for w in (made.full, made.widths)),
        seconds, made.search.seconds if chosen else None, peak_mb, made.search, str(device),
        "; ".join(notes + _notes(model, small.why, made, cost)) or None,
    )  # fmt: skip
    return small.model, report


def _notes(model: nn.Module, why: str | None, made: plan.Plan, cost: Cost) -> list[str]:
    """What else there is to know of a result."""
    notes = []
    if why:
        name = type(model).__name__
        notes.append(f"the result is a torch.fx.GraphModule: the forward pass of {name} does not follow ({why})")
    curves = [] if made.search is None else made.search.curves
    estimated = [space.name for space, curve in zip(made.spaces, curves) if curve.estimated]
    if estimated:
        notes.append(f"what dropping does is estimated only where no plain layer reads it: {', '.join(estimated)}")
    if cost.uncounted:
        notes.append(f"its multiply-accumulates are not counted: {', '.join(cost.uncounted)}")
    return notes


def _prepared(
    model: nn.Module, example_input: Any, images: Any, config: ShrinkConfig
) -> tuple[nn.Module, nn.Module, tuple[int, ...] | None, Any]:
    """The network as it was given, and as it can be worked with; the shape of its single input, if known; an example.

    Raises NeuronMergingError where the network or its inputs cannot be worked with.
    """
    check_module(model)
    original, model = model, without_masks(model)
    device = _device(model)
    several = _several(example_input)
    shape = None if several else input_shape(example_input, images)
    _check_inputs(config, shape, images, several)
    check_weights(model)
    check_copies(model, shape)
    model = out_of_inference(model)
    if several:
        return original, model, None, example_input
    if shape is not None:
        check_runs(model, shape, example_input if isinstance(example_input, Tensor) else None)
    guessed = shape if shape is not None else likely_shape(model)
    if guessed is None:
        raise NeuronMergingError(f"{type(model).__name__}: give example_input, which shows what it takes")
    if isinstance(example_input, Tensor):
        example = as_taken(model, example_input)
    elif images is not None:
        example = as_taken(model, images[:2])
    else:
        example = zeros(model, guessed)
    return original, model, shape, example.to(device)


def _several(example_input: Any) -> bool:
    """Whether an example is of several inputs: a mapping, or a sequence, with tensors in it or in what it holds."""
    collected = isinstance(example_input, Collection) and not isinstance(example_input, Tensor | str)
    return collected and any(isinstance(leaf, Tensor) for leaf in tree_leaves(example_input))


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
    survey, model, shape = examined(model, example_input, images)
    if config.widths in CHOSEN_WIDTHS and shape is None and example_input is None:
        raise NeuronMergingError("the choice of widths needs to know the network's input: give example_input")
    spaces, left_out = plan.without(*plan.prunable(survey, plan.couples(config)), config.ignore)
    if named:
        METHODS[compensation].check(spaces, [1] * len(spaces), compensation)
    counts, lines = [str(space.size) for space in spaces], []
    if spaces and (config.widths in CHOSEN_WIDTHS or ratio is not None):
        if config.criterion == "auto" and config.widths not in CHOSEN_WIDTHS:
            config = replace(config, criterion="l2-norm")  # which neurons stay does not matter here
        made = plan.make(survey, model, config, Source(survey.network, config, images))
        counts = [f"{kept} of {full}" for kept, full in zip(made.widths, made.full)]
        cost = Cost(survey, spaces, METHODS[config.compensation].adds_bias)
        before, after = cost.whole, cost(made.widths)
        lines = sizes(
            [round(before[0]), round(after[0])], None if shape is None else [round(before[1]), round(after[1])]
        )
    whole = [f"{layer} stays whole: {why}" for layer, why in left_out.items()]
    return "\n".join([*(f"{name_of(space)}: {count}" for space, count in zip(spaces, counts)), *whole, *lines])


def examined(
    model: nn.Module, example_input: Any = None, images: Any = None
) -> tuple[Survey, nn.Module, tuple[int, ...] | None]:
    """The spaces of a network, the network as it can be worked with, and the shape of its input, if known.

    Without example_input the shape is guessed. Raises as `shrink`.
    """
    _, model, shape, example = _prepared(model, example_input, images, ShrinkConfig(compensation="prune"))
    return _surveyed(model, example), model, shape


def _surveyed(model: nn.Module, example: Any) -> Survey:
    """The spaces of a network; for one sample, if two are an example of one that takes a single sample only."""
    try:
        return find_spaces(model, example)
    except NeuronMergingError:
        if isinstance(example, Tensor) and len(example) == 2:
            with contextlib.suppress(NeuronMergingError):
                return find_spaces(model, example[:1])
        raise


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


def _check_inputs(config: ShrinkConfig, shape: tuple[int, ...] | None, images: Any, several: bool) -> None:
    """Raises NeuronMergingError if a method needs inputs that are missing, or is given inputs that it does not use."""
    method, name = METHODS[config.compensation], config.compensation
    if shape is None and not several and (config.chooses or (method.looks and not method.needs_images)):
        what = "the choice of widths" if config.chooses else name
        raise NeuronMergingError(f"{what} needs to know the network's input: give example_input")
    if images is not None and not config.chooses and not method.looks:
        raise NeuronMergingError(f"images are for restore, {' and '.join(NEED_IMAGES)}: {name} needs no data")
    if images is None and method.needs_images:
        raise NeuronMergingError(f"{name} measures BatchNorm on real images: give images")
    if images is not None and not several and not len(images):
        raise NeuronMergingError("images: there are none")
    if images is not None and not several and (images.ndim != len(shape) + 1 or images.shape[1] != shape[0]):
        raise NeuronMergingError(
            f"images of shape {list(images.shape)} are not [B, {str([*shape])[1:]} as example_input has it"
        )

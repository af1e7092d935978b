"""Made-up inputs, called the probe (ours): restoration and the choice of widths run the network on them instead of on data.

Images have edges and colours like photographs (dead leaves), and sounds have a pitch (tones). Other inputs are noise. Then each
input is moved one step along the gradient of a random class (the class step), so that the inputs differ in what the network
tells apart.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

from neuron_merging.errors import NeuronMergingError, reported_as
from neuron_merging.running import (
    CONVS,
    NORMS,
    by_sample,
    computing_in,
    count_positions,
    floats,
    measure_statistics,
    precision,
)

MADE = {"dtype": torch.float32, "device": "cpu"}  # of all new tensors, whatever the defaults of the process are
CHUNK = 64  # samples that are normalised together in the class step, fewer of large ones
LEAST = 8  # but so many at least
PART = 16  # samples that are Fourier-transformed or painted together
PINK, WHITE = 1.2, 0.15  # standard deviations of images and of white noise
STEP = 0.4  # length of the class step in standard deviations of the inputs
CONTRASTS = (0.25, 1.2)  # standard deviations of images whose scale is not known
SHORTEST = 64  # places of an input in time, from which on it gets tones
NUMBERS = 2**20  # places of all inputs together, at least
LEAVES = 3  # area of all leaves of an image together, as a multiple of the image's area
SMALLEST = 4  # least radius of a leaf in pixels, but at most an eighth of the side; the largest radius is the side


def make(
    model: nn.Module,
    shape: tuple[int, ...],
    samples: int | None = None,
    *,
    kind: str = "auto",
    step: float | None = None,
    seed: int = 1,
) -> Tensor:
    """A probe [samples, *shape] for `model`, in float32 on its device. On a CPU the same seed gives the same probe.

    kind: "leaves", "pink", "tones", "white" or "auto", which is `usual`. samples: None for `default_samples`.
    step: length of the class step in standard deviations of the samples, 0 for none; None: 0.4, but none for tones, and for
    images of a network without BatchNorm. Such a network says nothing of its inputs' scale: then every image has a contrast and
    a brightness of its own.
    Raises NeuronMergingError for an unknown kind, or a shape that the network does not take.
    """
    check(kind)
    unknown = kind == "auto" and not any(isinstance(m, NORMS) for m in model.modules())
    kind = usual(model, shape) if kind == "auto" else kind
    if kind in ("leaves", "pink") and len(shape) < 2:
        raise NeuronMergingError(f"--probe {kind} is for images: an input of shape {list(shape)} has none; use white")
    samples = samples or default_samples(model, shape)
    random = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    x = PROBES[kind](samples, shape, random)
    if kind == "leaves" and unknown:
        x = _of_any_scale(x, random)
    x = x.to(parameter.device)
    if step is None:
        step = 0.0 if kind == "tones" or (kind == "leaves" and unknown) else STEP
    if step == 0:
        return x
    return x + (step * x.std() * _class_direction(model, x, random)).to(x)


def usual(model: nn.Module, shape: tuple[int, ...]) -> str:
    """The kind that "auto" is: leaves or tones where the first layer is a convolution over images or time, else white."""
    sides = shape[1:]
    if not _convolves(model, shape):
        return "white"
    if len(sides) >= 2:
        return "leaves"
    return "tones" if shape[-1] >= SHORTEST else "white"


def check(kind: str) -> None:
    """Raises NeuronMergingError for an unknown kind of probe."""
    if kind not in KINDS:
        raise NeuronMergingError(f"unknown --probe {kind!r}: choose one of {', '.join(KINDS)}")


def rule(kind: str) -> str:
    """The name of a kind in a result row. "auto" is written with its rule: if the rule changes, so do the rows."""
    return AUTO if kind == "auto" else kind


def default_samples(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many samples a probe for `model` has by default: 256, fewer of large inputs, more if the first layer is linear.

    A linear first layer reads one or several rows of each sample, such as one for each token: it is to get 4096 rows in all. Of
    large inputs 32 samples or more are made that have `NUMBERS` places together.
    Raises NeuronMergingError if the network does not take inputs of this shape.
    """
    if _convolves(model, shape):
        places = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
        return max(32, min(256, NUMBERS // places))
    with reported_as(f"{type(model).__name__} does not take inputs of shape {list(shape)}"):
        first = next(iter(count_positions(model, shape).values()), 1)  # in the order of the calls
    return max(256, 4096 // max(1, round(first)))


def _convolves(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the first layer that the forward pass calls is a convolution."""
    with reported_as(f"{type(model).__name__} does not take inputs of shape {list(shape)}"):
        first = next(iter(count_positions(model, shape)), None)
    return first is not None and isinstance(model.get_submodule(first), CONVS)


def pink(samples: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Pink noise [samples, C, …], cut out of larger noise. Amplitudes are 1/f, as in photographs; the std is `PINK`.

    Channels have correlations of 0.9.
    """
    channels, *sides = shape
    large = [2 * side for side in sides]
    axes = tuple(range(2, 2 + len(sides)))
    white = torch.randn(samples, 1 + channels, *large, generator=random, **MADE)
    amplitude = _frequency(large, 1.0)
    corner = [torch.randint(0, side + 1, (1,), generator=random, device="cpu").item() for side in sides]
    window = (..., *(slice(start, start + side) for start, side in zip(corner, sides)))
    parts = (torch.fft.rfftn(part, dim=axes) * amplitude for part in white.split(PART))
    noise = torch.cat([torch.fft.irfftn(part, s=large, dim=axes)[window] for part in parts])
    return _scaled(_correlated(noise))


def leaves(samples: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Dead leaves [samples, C, …]: discs of one colour each, which cover each other, on pink noise. Channels, std as in `pink`.

    Unlike noise, they have edges. In d dimensions the density of radii is r^−(d+1), so that no scale is preferred: the dead
    leaves model (Lee, Mumford & Huang, IJCV 2001).
    """
    channels, *sides = shape
    d, most = len(sides), max(sides)
    least = min(SMALLEST, most / 8)
    unit = math.pi ** (d / 2) / math.gamma(d / 2 + 1)  # volume of a ball of radius 1
    ball = unit * d * math.log(most / least) / (least**-d - most**-d)  # mean volume of a leaf
    images = pink(samples, shape, random)
    for part in images.split(PART):
        for _ in range(math.ceil(LEAVES * math.prod(sides) / ball)):
            share = torch.rand(len(part), generator=random, **MADE)
            radii = (least**-d + share * (most**-d - least**-d)) ** (-1 / d)
            centres = torch.stack([side * torch.rand(len(part), generator=random, **MADE) for side in sides], 1)
            colours = PINK * _correlated(torch.randn(len(part), 1 + channels, generator=random, **MADE))
            for leaf in zip(part.numpy(), centres.numpy(), radii.numpy(), colours.numpy()):
                _paint(*leaf)
    return _scaled(images)


def _paint(image: np.ndarray, centre: np.ndarray, radius: np.float32, colour: np.ndarray) -> None:
    """Paint a disc of one colour [C] onto an image [C, …], in place. Only computes in the box around the disc."""
    box, squares = [slice(None)], []
    for side, c in zip(image.shape[1:], centre):
        box.append(slice(max(0, math.floor(c - radius)), min(side, math.ceil(c + radius))))
        squares.append((np.arange(box[-1].start, box[-1].stop, dtype=np.float32) + 0.5 - c) ** 2)
    inside = functools.reduce(np.add.outer, squares) < radius * radius
    image[tuple(box)][:, inside] = colour[:, None]


def white(samples: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """White noise [samples, …]: independent Gaussian values of std `WHITE`."""
    return WHITE * torch.randn(samples, *shape, generator=random, **MADE)


def tones(samples: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Sounds [samples, …, T] of mean 0 and standard deviation 1: a tone with harmonics, and white noise of any strength.

    The pitch is anywhere from 2 periods in an input to 8 places in a period, on a logarithmic scale. Harmonics fall by 3 to
    12 dB an octave. Channels have correlations of 0.9.
    """
    *channels, length = shape
    width = math.prod(channels)

    def uniform(*size: int) -> Tensor:
        return torch.rand(samples, *size, generator=random, **MADE)

    turns = 2 * (length / 16) ** uniform(1, 1) * torch.arange(length, **MADE) / length  # periods since the start
    slope = 0.5 + 1.5 * uniform(1, 1)
    sound = torch.zeros(samples, 1 + width, length, **MADE)
    for harmonic in range(1, 12):
        audible = harmonic * turns[..., 1:2] < 0.5
        loud = harmonic**-slope * uniform(1 + width, 1) * audible
        sound += loud * torch.sin(2 * math.pi * (harmonic * turns + uniform(1 + width, 1)))
    sound = sound / sound.std(2, keepdim=True)
    noise = torch.randn(samples, 1 + width, length, generator=random, **MADE)
    sound = _correlated(sound + uniform(1, 1) * noise)
    sound = (sound - sound.mean(2, keepdim=True)) / sound.std(2, keepdim=True)
    return sound.view(samples, *shape)


def _of_any_scale(images: Tensor, random: torch.Generator) -> Tensor:
    """Images [N, C, …], each with another contrast, between those of `CONTRASTS`, and another brightness."""
    low, high = CONTRASTS
    single = [1] * (images.ndim - 2)
    contrast = low * (high / low) ** torch.rand(len(images), 1, *single, generator=random, **MADE)
    brightness = 0.5 * torch.randn(len(images), 1, *single, generator=random, **MADE)
    sides = tuple(range(2, images.ndim))
    deviation = images.flatten(1).std(1).view(-1, 1, *single)
    return contrast * ((images - images.mean(sides, keepdim=True)) / deviation + brightness)


def _correlated(noise: Tensor) -> Tensor:
    """Independent noise [N, 1 + C, …] → channels [N, C, …] with correlations of 0.9 and the same variance."""
    return math.sqrt(0.9) * noise[:, :1] + math.sqrt(0.1) * noise[:, 1:]


def _scaled(images: Tensor) -> Tensor:
    """Images [N, C, …] scaled so that every channel has the standard deviation `PINK`."""
    return PINK * images / images.std(dim=(0, *range(2, images.ndim)), keepdim=True)


PROBES = {"leaves": leaves, "pink": pink, "tones": tones, "white": white}
KINDS = ("auto", *PROBES)
AUTO = "auto: leaves or white"


def _frequency(sides: list[int], power: float) -> Tensor:
    """|f|^−power at the frequencies of rfftn; 0 at f = 0."""
    grids = [torch.fft.fftfreq(side, **MADE) for side in sides[:-1]] + [torch.fft.rfftfreq(sides[-1], **MADE)]
    f = sum(g**2 for g in torch.meshgrid(*grids, indexing="ij")).sqrt()
    return torch.where(f > 0, f.clamp(min=1e-12) ** -power, 0)


def _class_direction(model: nn.Module, x: Tensor, random: torch.Generator) -> Tensor:
    """For every sample the gradient of a random class's logit, smoothed (amplitude · f^−½) and scaled to an rms of 1.

    It is 0 if the outputs have no gradient, for example if the network returns classes instead of scores.
    """
    what = f"{type(model).__name__} does not take inputs of shape {list(x.shape)}"
    with reported_as(what):
        x = x.to(precision(model, x))
    model = computing_in(model, x.dtype)
    for module in model.modules():
        if isinstance(module, NORMS):
            measure_statistics(module, momentum=0.0)
    gradients = []
    chunk = max(LEAST, min(CHUNK, NUMBERS // 16 // max(1, x[0, 0].numel())))
    for part in x.tensor_split(math.ceil(len(x) / chunk)):  # no chunk of one
        part = part.clone().requires_grad_()
        with reported_as(what), torch.enable_grad():
            output = model(part.clone())  # the network may overwrite its input
            if not any(tensor.requires_grad for tensor in floats(output)):
                return torch.zeros_like(x)
            logits = by_sample(output, len(part))
            if len(logits) < len(part) or logits.shape[1] < 2:  # a step would move every sample the same way
                return torch.zeros_like(x)
            chosen = torch.randint(0, logits.shape[1], (len(part), 1), generator=random, device="cpu").to(logits.device)
            logits.gather(1, chosen).sum().backward()  # torch.autograd.grad fails with some activation checkpoints
        gradients.append(torch.zeros_like(part) if part.grad is None else part.grad)
    g = torch.cat(gradients)
    sides = list(g.shape[2:])
    if sides and min(sides) > 1:
        axes = tuple(range(2, g.ndim))
        spectrum = torch.fft.rfftn(g, dim=axes) * _frequency(sides, 0.5).to(g.device)
        g = torch.fft.irfftn(spectrum, s=sides, dim=axes)
    rms = g.flatten(1).pow(2).mean(1).sqrt().view(-1, *[1] * (g.ndim - 1))
    return torch.where(rms > 0, g / rms, 0)

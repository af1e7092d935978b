"""FashionMNIST and CIFAR as tensors: `load(name, split)`. The data sets are in this folder, or in the one that --data names."""

from data.loader import DATASETS, Dataset, Images, calibration, load

__all__ = ["DATASETS", "Dataset", "Images", "calibration", "load"]

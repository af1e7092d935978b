"""FashionMNIST and CIFAR as tensors: `load(name, split)`; the data sets lie beside this file or where --data says."""

from data.loader import DATASETS, Dataset, Images, calibration, load
from neuron_merging.images import pictures, readable

__all__ = ["DATASETS", "Dataset", "Images", "calibration", "load", "pictures", "readable"]

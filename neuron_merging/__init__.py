"""Make a trained network smaller, without data and without retraining.

`shrink` is the call; `decompose` has the paper's method (Neuron Merging, Kim et al., NeurIPS 2020), `restore` ours.
"""

from neuron_merging.checkpoint import fit, load_checkpoint, load_weights, save_checkpoint
from neuron_merging.config import ShrinkConfig
from neuron_merging.errors import NeuronMergingError
from neuron_merging.export import export
from neuron_merging.shrink import Report, shrink, summarize

__all__ = [
    "NeuronMergingError", "Report", "ShrinkConfig", "__version__", "export", "fit", "load_checkpoint", "load_weights",
    "save_checkpoint", "shrink", "summarize",
]  # fmt: skip
__version__ = "1.0.0"

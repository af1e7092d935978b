"""Restoration (ours): all kept neurons together rebuild what the dropped ones gave, without data."""

from neuron_merging.restore.fitting import Options
from neuron_merging.restore.lockstep import Restored, restore

__all__ = ["Options", "Restored", "restore"]

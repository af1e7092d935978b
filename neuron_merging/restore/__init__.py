"""Restoration (ours): all kept neurons together rebuild what the dropped ones gave, without data."""

from neuron_merging.restore.lockstep import Options, restore

__all__ = ["Options", "restore"]

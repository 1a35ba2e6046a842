"""Measured ratios of the runtime's parts, side by side in one run."""

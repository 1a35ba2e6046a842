"""Exact draft-and-verify over any sampler."""

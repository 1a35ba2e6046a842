"""Exact draft-and-verify over any sampler."""

from typing import TYPE_CHECKING

import dllm

if not TYPE_CHECKING:
    __getattr__ = dllm.moved(__name__)

"""Test configuration: one thread, so that parallel runs do not fight for the cores."""

import torch

torch.set_num_threads(1)

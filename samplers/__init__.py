"""The samplers, one file a method; `registry` has their names."""

import dllm

dllm.of_one_tree()

"""The packages, found: `samplers/` and `eval/` lie beside `dllm/` and install inside it (docs/architecture.md)."""

from setuptools import find_packages, setup

inside = find_packages(include=["samplers", "samplers.*", "eval", "eval.*"])
setup(packages=[*find_packages(include=["dllm", "dllm.*"]), *(f"dllm.{name}" for name in inside)])

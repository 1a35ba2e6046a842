"""Drafting inside other libraries: transformers, its assisted generation, vLLM."""

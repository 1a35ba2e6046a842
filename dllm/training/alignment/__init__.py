"""Aligning a masked-diffusion drafter with the autoregressive model it drafts for; an objective is one file."""

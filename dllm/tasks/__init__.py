"""Generators of problems that training, evaluation and benches share, with their graders."""

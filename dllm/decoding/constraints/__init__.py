"""Constraints: the set of answers that a call allows, as an automaton over classes of tokens."""

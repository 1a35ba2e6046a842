"""Drafters that read the verifier's hidden states: DFlash, DFlash 2, DSpark, Domino, DFlare, JetSpec."""

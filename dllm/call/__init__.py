"""The front door: what a call takes, how it runs, what it returns."""

"""The engine and what it stands on: canvas, slots, predictions, caches, one pure step, one loop."""

"""Accuracy on real data: one float model per seed, then the same budget of training with rounding for every method."""

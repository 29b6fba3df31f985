"""Accuracy on real data: one float model per seed, from which every method trains with the same budget."""

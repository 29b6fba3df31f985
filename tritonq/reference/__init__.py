"""PyTorch implementations of every op: the specification, and what runs on CPUs."""

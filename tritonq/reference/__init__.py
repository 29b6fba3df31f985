"""PyTorch implementations of every operator: the specification, and what runs on CPUs.

Words of these files:

- A *grid* is a quantizer's scale, zero point, range of codes and switch (:class:`tritonq.grid.Grid`); FQ(y) rounds y to
  a grid and clips it to its range. *Statistics* are the running range behind a grid
  (:class:`tritonq.grid.RangeStatistics`); operators that are given some update them in place.
- A *snapshot* of a grid is a copy of its tensors as one step used them. A backward reads it, because later steps change
  the grid.
- The *dtype of the arithmetic* is float32, or float64 for float64 tensors.
- A name that ends in ``_`` overwrites its first argument.
- An *operator* is a function that has a kernel, or a traced form for ``torch.compile``: `tritonq.reference.operator`.
"""

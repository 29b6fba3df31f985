"""Triton kernels: device functions, kernels and launchers. Imports torch, triton and itself, nothing else.

Words of these files:

- A *view* is a tensor as three dimensions (outer, rows, cols) with strides: `tritonq.kernels.layout`.
- A *program* is one instance of a kernel; it reads a *tile* of ROWS × COLS elements of the view at a time.
- A *share* is the part of a tensor that one program of a reduction works on. It stores one *partial result* per
  channel; a second kernel joins the partial results.
- A *switch* is one element on the device: 0 turns rounding, or observing, off.
- A *snapshot* of a grid is a copy of its scale, zero point and switch as one call used them. Backward passes read it,
  because a later step changes the grid.
- In names, ``_ptr`` is a tensor that a kernel reads or updates, and ``_out`` one that it writes.

What many kernels take, in all files alike; other parameters have a comment:

- sizes: (outer, rows, cols) of a view, and ``…_strides`` of a tensor along these; n: elements of dense tensors.
- channels: how many there are; splits: partial results per channel.
- eps, averaging_constant: of a running range: the smallest scale, and the weight of the present batch in the average
  (None: no average, but the extremes of all batches).
- ROWS, COLS: rows and columns of a tile, powers of two.
- CHANNEL: dimension of the view with the channels (0, 1 or 2); None for one channel.
- FIRST: dimension of the view on the first axis of the launch; WIDE: whether offsets take 64 bits.
- OPERATION: name of an elementwise operation; NUMBER, OTHER_NUMBER: its numbers, such as a slope, or None.
- SAME_STRIDES: whether all tensors have equal strides, so that offsets are computed once.
- ALIGN: a power of two that divides the strides and sizes of the view; AHEAD: tiles per dimension that are loaded at
  once.
- SKEW: elements that are read at a time of rows that begin anywhere, see `View.skew`; RUN: elements of each channel,
  where rows are pieces of at most two channels, see `View.pieces`, else None.
- SPLITS, CHANNELS: partial results, and channels, that a program of a second kernel holds at a time.
- CEILING: upper bound of the ReLU; infinity for a plain ReLU, None without a ReLU.
- QUANT_MIN, QUANT_MAX: smallest and largest code (CODE_MIN, CODE_MAX, where those are placeholders unless a range is
  observed); ROUNDING: ``"half_even"`` or ``"half_away"``.
- MANTISSA_BITS, LEAST_EXPONENT, LARGEST, OVERFLOW: a format of float codes: its mantissa bits, the exponent of its
  smallest normal number, its largest finite number and the number that would follow; all None for integer codes.
- SYMMETRIC, FIXED_ZERO_POINT, RULE: how a range becomes scale and zero point, see `tritonq.kernels.qparams`: whether
  the range is made symmetric; the zero point that the type fixes, or None; ``"torch"``, ``"torch_v1"`` or
  ``"megengine"``.
- COPY_ABOVE: growth of a batch's range from which on it replaces the running one of an average, as does a fall to less
  than 1/100; None: only the first batch replaces it.
- KNOWN: whether the host knows that the range holds data. Otherwise the kernel reads it, and an empty range switches
  rounding off.
"""

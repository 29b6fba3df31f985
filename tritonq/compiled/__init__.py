"""Operators on CPUs, in C++ that is compiled where it runs: ``tritonq.use_backend("compiled")``.

Each module has the functions of the module of the same name in `tritonq.reference`, which stays the specification. What
the compiled code does not take (float16, float64, grids that round half away, batches with values that are not finite)
the reference computes. Formulas and roundings are the reference's; sums over a channel are computed in another order
and to more digits, so that results of training steps differ as those of two machines do. In eval mode and in converted
models (`eval_codes`) every code is the reference's, bit for bit.
"""

"""Operators of training steps on CPUs, in C++ that is compiled where it runs: ``tritonq.use_backend("compiled")``.

Each module has the functions of the module of the same name in `tritonq.reference`, which stays the specification. For
what the compiled code can't do (float16, float64, grids that round half away, batches with values that are not finite)
each function calls the reference. Formulas and roundings are the reference's; sums over a channel are computed in
another order and to more digits, so that results of training steps differ as those of two machines do. Evaluation and
conversion run the reference, bit for bit.
"""

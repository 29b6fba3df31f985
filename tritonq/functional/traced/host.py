"""What graphs take for constant: asked on the host, once, before the first of them is traced."""

from tritonq.functional.direct import cpu_is_direct

CPU_IS_DIRECT = cpu_is_direct()

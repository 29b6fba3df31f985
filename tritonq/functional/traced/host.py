"""Facts about this machine that compiled graphs treat as constants; read once, when this file is imported."""

from tritonq.functional.direct import cpu_is_direct

CPU_IS_DIRECT = cpu_is_direct()

"""The operators as ``torch.compile`` sees them: opaque calls, with the names and signatures of `tritonq.reference`.

Each is a ``torch.library.custom_op`` that runs what eager code would run on the same tensors (`tritonq.backend`), so
that a compiled model computes the same bits in them. Convolutions stay visible to the compiler.

Traced are quantization-aware models in training and in eval mode, with quantizers over running ranges, histograms,
learned scales (which have seen a batch) and fixed point, and converted models. In eval mode each layer is one call, its
convolution included: on a CPU that runs what eager mode runs; other devices sum in float64, since to find out which
kernel can hold the sums would take a look from the host. An interpolating histogram looks at its range there: it raises
NotImplementedError, which says what to use instead.
"""

from types import ModuleType

from tritonq.functional.traced import conv_bn, histogram, int8_conv, min_max, residual, weight
from tritonq.functional.traced.build import traced_families

FAMILIES: dict[str, ModuleType] = {
    **{
        "conv_bn": conv_bn,
        "histogram": histogram,
        "int8_conv": int8_conv,
        "min_max": min_max,
        "residual": residual,
        "weight": weight,
    },
    **traced_families(),
}

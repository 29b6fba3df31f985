"""The operators as ``torch.compile`` sees them, with the names and signatures of `tritonq.reference`.

Each is a ``torch.library.custom_op``. What training steps are made of (tails of convolutions, weights, sums and
products, functions, running ranges, fake quantization) takes its place in the compiler's graph as the reference's
tensor operations wherever no kernel runs (`visible`), so that Inductor fuses it; sums are then added up in the
compiler's order. All else runs what eager code would run on the same tensors (`tritonq.backend`), the same bits.
Convolutions stay visible to the compiler.

Traced are quantization-aware models in training and in eval mode, with quantizers over running ranges, histograms,
learned scales (which have seen a batch) and fixed point, and converted models. In eval mode each layer is one call, its
convolution included: on a CPU that runs what eager mode runs; other devices sum in float64, since to find out which
kernel can hold the sums would take a look from the host. An interpolating histogram looks at its range there: it raises
NotImplementedError, which says what to use instead.
"""

from tritonq.functional.traced.build import traced_families
from tritonq.functional.traced.int8_conv import warning_int8_conv2d

FAMILIES = traced_families({"int8_conv_int8_conv2d": warning_int8_conv2d})

"""The operators as ``torch.compile`` sees them, with the names and signatures of `tritonq.reference`.

Each is a ``torch.library.custom_op``, one call in the compiler's graph, which runs what eager code would run on the
same tensors (`tritonq.backend`): the same bits. Some operators of training steps (tails of convolutions, weights, sums
and products, functions, running ranges, fake quantization) are *visible*: where no kernel runs, the reference's tensor
operations take the call's place in the graph, so that Inductor fuses them; sums are then added in the compiler's order.
Convolutions stay visible to the compiler.

Traced are quantization-aware models in training and in eval mode, with quantizers over running ranges, histograms,
learned scales (which have seen a batch) and fixed point, and converted models. In eval mode each layer is one call, its
convolution included. On a CPU that call runs what eager mode runs; on other devices sums are in float64, since choosing
a kernel that can hold the sums would read a tensor on the host. An interpolating histogram reads its range on the host:
it raises NotImplementedError, which says what to use instead.
"""

from tritonq.functional.traced.build import traced_families
from tritonq.functional.traced.int8_conv import warning_int8_conv2d

FAMILIES = traced_families({"int8_conv_int8_conv2d": warning_int8_conv2d})

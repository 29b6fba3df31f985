"""tritonq: quantization-aware training at the speed of float training, deployed to the numbers it was trained with."""

from tritonq.backend import use_backend
from tritonq.functional import fake_quantize_per_channel_affine, fake_quantize_per_tensor_affine

__all__ = ["fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine", "use_backend"]

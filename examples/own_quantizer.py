"""An observer of your own: a range of three standard deviations, checked, trained, converted and verified.

Run: python examples/own_quantizer.py
"""

import torch

import tritonq
from tritonq.qparams import range_to_qparams


class ThreeSigmaObserver(tritonq.observers.ObserverBase):
    """Keep a moving average of the standard deviation; the range is three of them to each side."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("deviation", torch.zeros(1))  # copies, state dicts and averages of models hold buffers

    def forward(self, x):
        """Observe ``x`` and return it."""
        now = x.detach().float().std()
        self.deviation.copy_(torch.where(self.deviation > 0, 0.9 * self.deviation + 0.1 * now, now))
        return x

    def calculate_qparams(self):
        """Return scale and zero point."""
        return range_to_qparams(-3 * self.deviation, 3 * self.deviation, self.qtype, rule=self.rule, eps=self.eps)

    def has_observed(self):
        """Return whether they rest on data, as a tensor: training need not wait for a GPU."""
        return self.deviation > 0


quantizer = tritonq.FakeQuantize.with_args(observer=ThreeSigmaObserver, dtype=tritonq.QuantizedType.of(8))
print("checked:", ", ".join(tritonq.testing.check_quantizer(quantizer, compiled=False, exported=False)))
model, images = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).train(), torch.randn(8, 3, 16, 16)
qconfig = tritonq.get_qconfig("tensorrt")._replace(activation=quantizer)
model = tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=images)
model(images).sum().backward()  # your training
print(tritonq.verify(model.eval(), tritonq.convert(model), images))

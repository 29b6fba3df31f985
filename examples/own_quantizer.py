"""An observer of your own: a range of three standard deviations, checked, trained, converted and verified.

Run: python examples/own_quantizer.py
"""

import torch
from torch import nn

import tritonq
from tritonq.qparams import range_to_qparams


class ThreeSigmaObserver(tritonq.observers.ObserverBase):
    """Keep a moving average of the standard deviation; the range is three of them to each side."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # State belongs into buffers: copies, state dicts and averages of models hold it then.
        self.register_buffer("deviation", torch.zeros(()))

    def forward(self, x):
        """Observe ``x`` and return it."""
        now = x.detach().float().std()
        self.deviation.copy_(torch.where(self.deviation > 0, 0.9 * self.deviation + 0.1 * now, now))
        return x

    def calculate_qparams(self):
        """Return scale and zero point."""
        end = 3 * self.deviation.reshape(1)
        return range_to_qparams(-end, end, self.qtype, rule=self.rule, eps=self.eps)

    def has_observed(self):
        """Return whether they rest on data, as a tensor."""
        return self.deviation > 0


quantizer = tritonq.FakeQuantize.with_args(
    observer=ThreeSigmaObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
)
print("checked:", ", ".join(tritonq.testing.check_quantizer(quantizer, compiled=False, exported=False)))

qconfig = tritonq.QConfig(activation=quantizer, weight=tritonq.get_qconfig("tensorrt").weight)
images = torch.randn(8, 3, 16, 16)
float_model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))
model = tritonq.prepare_qat(float_model.train(), qconfig=qconfig, example_inputs=images).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), torch.arange(8)).backward()
    optimizer.step()
print(tritonq.verify(model.eval(), tritonq.convert(model), images))

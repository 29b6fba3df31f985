"""Coming from torch.ao's eager QAT: the same script before and after, and its checkpoint goes along.

python from_torch_ao.py
"""

import warnings

import torch
from torch import nn


class Net(nn.Module):
    """A model as torch.ao's tutorial writes it; ``kit`` is the module that its stubs come from."""

    def __init__(self, kit: object) -> None:
        super().__init__()
        self.quant, self.dequant, self.skip = kit.QuantStub(), kit.DeQuantStub(), kit.FloatFunctional()
        self.conv1, self.bn1, self.relu = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, 1, h, w) to logits (n, 2)."""
        x = self.relu(self.bn1(self.conv1(self.quant(x))))
        x = self.skip.add(self.bn2(self.conv2(x)), x)
        return self.dequant(self.fc(x.mean((2, 3))))


def train(model: nn.Module, steps: int) -> float:
    """Tell bright images from dark ones; returns the last loss."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        labels = torch.randint(2, (32,))
        images = torch.randn(32, 1, 8, 8) + labels.view(-1, 1, 1, 1)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def before() -> nn.Module:
    """Prepare a model by a script for torch.ao."""
    from torch.ao.nn import quantized as kit
    from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules_qat, get_default_qat_qconfig, prepare_qat

    kit.QuantStub, kit.DeQuantStub = QuantStub, DeQuantStub
    model = fuse_modules_qat(Net(kit).train(), [["conv1", "bn1", "relu"], ["conv2", "bn2"]])
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model)


def after() -> nn.Module:
    """Prepare a model by the script of `before`, with its imports changed."""
    from tritonq import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
    from tritonq import nn as kit

    model = fuse_modules_qat(Net(kit).train(), [["conv1", "bn1", "relu"], ["conv2", "bn2"]])
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model)


if __name__ == "__main__":
    import tritonq

    warnings.simplefilter("ignore")  # torch.ao announces its end at every step
    old, new = before(), after()
    print(f"torch.ao: loss {train(old, 20):.4f} after 20 steps")
    print("checkpoint:", tritonq.load_torch_ao_state_dict(new, old.state_dict()))
    print(f"tritonq:  loss {train(new, 20):.4f} after 20 more")
    x = torch.randn(64, 1, 8, 8)
    print(tritonq.verify(new, tritonq.convert(new), x))

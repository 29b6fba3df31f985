"""Post-training quantization: no training step, only a look at some data.

python calibrate.py        (scikit-learn's digits; a small CNN is trained in float first)
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import tritonq

# Histograms and a search for the range that loses least, in place of running extremes.
QCONFIG = tritonq.QConfig(
    activation=tritonq.FakeQuantize.with_args(
        observer=tritonq.HistogramObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    ),
    weight=tritonq.get_qconfig("tensorrt").weight,
)


def float_model(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    """Return a CNN trained in float: yours comes from elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def main(options: argparse.Namespace) -> None:
    """Float, calibrated, converted: how each does."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, test, train_labels, test_labels = images[0::2], images[1::2], labels[0::2], labels[1::2]
    model = float_model(train, train_labels, options.epochs)

    def accuracy(candidate: nn.Module) -> str:
        with torch.no_grad():
            return f"{(candidate(test).argmax(1) == test_labels).float().mean():.2%}"

    print("float      ", accuracy(model))
    # The head's logits stay in float: nothing after them needs codes.
    mapping = tritonq.QConfigMapping().set_global(QCONFIG).set_last_layer(QCONFIG._replace(activation=nn.Identity))
    prepared = tritonq.prepare_qat(model, qconfig=mapping, example_inputs=train[:2])
    tritonq.calibrate(prepared, train[: options.images].split(64))
    print("calibrated ", accuracy(prepared))
    tritonq.refine_scales(prepared, train[:64])
    print("refined    ", accuracy(prepared))
    converted = tritonq.convert(prepared)
    print("converted  ", accuracy(converted))
    print(tritonq.verify(prepared, converted, test))
    tritonq.save_converted(converted, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15, help="of float training")
    parser.add_argument("--images", type=int, default=512, help="to calibrate with")
    parser.add_argument("--output", default="digits.int8.pt")
    main(parser.parse_args())

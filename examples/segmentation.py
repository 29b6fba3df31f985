"""Train a segmentation model in float and then quantization-aware, and deploy it: torchvision's, or an smp U-Net.

    python examples/segmentation.py                          # LRASPP with MobileNetV3 from torchvision
    pip install segmentation-models-pytorch
    python examples/segmentation.py --model unet             # U-Net with ResNet-18 from segmentation_models_pytorch
    python examples/segmentation.py --quick                  # some minutes on a CPU, too short for good masks

The data are generated: filled circles and squares on noise, background, circle and square as classes. The last
convolution, whose results become scores, stays in float. Printed at the end: the mean IoU of the float model, of the
quantized one in PyTorch, and of its ONNX file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import tritonq

CLASSES = 3


def shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, size, size) and masks (count, size, size)."""
    random = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.rand(count, 3, size, size, generator=random)
    masks = torch.zeros(count, size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for image, mask in zip(images, masks, strict=True):
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            half = int(torch.randint(size // 10, size // 4, (), generator=random))
            y, x = torch.randint(half, size - half, (2,), generator=random).tolist()
            label = int(torch.randint(1, CLASSES, (), generator=random))
            far_y, far_x = (rows - y).abs(), (columns - x).abs()
            inside = far_y**2 + far_x**2 <= half**2 if label == 1 else torch.maximum(far_y, far_x) <= half
            image[:, inside] = 0.5 + 0.5 * torch.rand(3, 1, generator=random)
            mask[inside] = label
    return images, masks


class Scores(nn.Module):
    """The scores of a torchvision segmentation model alone, without the dict around them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return (images, classes, height, width)."""
        found: Tensor = self.model(images)["out"]
        return found


def make_model(name: str) -> nn.Module:
    """Return LRASPP of torchvision, or a U-Net of segmentation_models_pytorch."""
    if name == "lraspp":
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        return Scores(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES))
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)


def train(model: nn.Module, images: Tensor, masks: Tensor, epochs: int, learning_rate: float) -> None:
    """Train with cross entropy."""
    optimizer = torch.optim.AdamW(tritonq.parameter_groups(model, learning_rate, 1e-4))
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(16):
            loss = nn.functional.cross_entropy(model(images[batch]), masks[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)


def mean_iou(predict: Callable[[Tensor], Tensor], images: Tensor, masks: Tensor) -> float:
    """Return mean over the classes of intersection over union, in percent."""
    with torch.no_grad():
        found = torch.cat([predict(image[None]).argmax(1) for image in images])
    ratios = []
    for label in range(CLASSES):
        mine, its = found == label, masks == label
        ratios.append(float((mine & its).sum() / (mine | its).sum().clamp(min=1)))
    return 100 * sum(ratios) / CLASSES


def last_convolutions_in_float(model: nn.Module) -> tritonq.QConfigMapping:
    """Return a mapping that leaves the convolutions that return scores, one channel per class, in float."""
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("onnxruntime"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.out_channels == CLASSES:
            mapping = mapping.set_module_name(name, None)
    return mapping


def main() -> None:
    """Train, quantize, deploy, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("lraspp", "unet"), default="lraspp")
    parser.add_argument("--output", type=Path, default=Path("segmentation.onnx"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    count, epochs, size = (96, (12, 3), 64) if args.quick else (1024, (30, 8), 128)
    torch.manual_seed(0)
    images, masks = shapes(count, size, seed=0)
    test_images, test_masks = shapes(max(32, count // 8), size, seed=1)
    model = make_model(args.model)
    train(model, images, masks, epochs[0], 2e-3)
    results = {"float": mean_iou(model.eval(), test_images, test_masks)}
    qat = tritonq.prepare_qat(model.train(), qconfig=last_convolutions_in_float(model), example_inputs=images[:4])
    print(tritonq.summary(qat))
    train(qat, images, masks, epochs[1], 5e-4)
    converted = tritonq.convert(qat.eval())
    tritonq.export_onnx(converted, args.output, images[:1])
    print(tritonq.verify(qat, args.output, test_images[:1]))
    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    results["quantized, PyTorch"] = mean_iou(qat, test_images, test_masks)
    results["quantized, ONNX Runtime"] = mean_iou(
        lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0]), test_images, test_masks
    )
    for kind, value in results.items():
        print(f"mean IoU {kind}: {value:.2f}")


if __name__ == "__main__":
    main()

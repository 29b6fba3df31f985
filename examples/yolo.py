"""Train an Ultralytics YOLO with its own trainer and loss, in float and then quantization-aware, and deploy it.

    pip install ultralytics
    python examples/yolo.py            # about an hour on a CPU, minutes on a GPU
    python examples/yolo.py --quick    # a few minutes on a CPU, too short for a good detector

The data are generated: filled circles and squares on noise. The convolutions that make boxes and scores, and the
decoder behind them, stay in float; everything else is quantized. Printed at the end: mAP50 of the float model, of the
quantized one in PyTorch, and of its ONNX file in ONNX Runtime.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import torch
import yaml
from torch import Tensor, nn
from torchvision.ops import box_iou
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.nms import non_max_suppression

import tritonq

CLASSES = ("circle", "square")


def write_images(folder: Path, count: int, size: int, seed: int) -> None:
    """Write images and labels as Ultralytics reads them."""
    random = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = random.integers(0, 90, (size, size, 3), dtype=np.uint8)
        lines = []
        for _ in range(random.integers(1, 4)):
            half = int(random.integers(size // 10, size // 4))
            x, y = (int(value) for value in random.integers(half, size - half, 2))
            label, color = int(random.integers(2)), random.integers(120, 256, 3).tolist()
            if label:
                cv2.rectangle(image, (x - half, y - half), (x + half, y + half), color, -1)
            else:
                cv2.circle(image, (x, y), half, color, -1)
            lines.append(f"{label} {x / size} {y / size} {2 * half / size} {2 * half / size}")
        cv2.imwrite(str(folder / "images" / f"{index}.png"), image)
        (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))


class QuantizedTrainer(DetectionTrainer):
    """Ultralytics' trainer; what it trains is prepared. Its loss, its EMA and its augmentation are as ever."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """Return the model that Ultralytics makes, prepared."""
        model = super().get_model(cfg, weights, verbose)
        size = self.args.imgsz
        mapping = tritonq.get_yolo_qconfig_mapping(model, "onnxruntime")
        return tritonq.prepare_qat(model, qconfig=mapping, example_inputs=torch.rand(2, 3, size, size))

    def final_eval(self) -> None:
        """Skip what Ultralytics does last: it merges BatchNorms once more, which prepare_qat has done."""


class Predictions(nn.Module):
    """The decoded predictions alone, (images, 4 + classes, places)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return boxes and scores."""
        found: Tensor = self.model(images)[0]
        return found


def average_precision(found: list[Tensor], wanted: list[Tensor], label: int) -> float:
    """Return area under precision over recall of one class, where boxes match at an IoU of 0.5."""
    hits: list[tuple[float, bool]] = []
    count = 0
    for boxes, truth in zip(found, wanted, strict=True):
        mine, its = boxes[boxes[:, 5] == label], truth[truth[:, 0] == label, 1:]
        count += len(its)
        taken: set[int] = set()
        for box in mine[mine[:, 4].argsort(descending=True)]:
            overlaps = box_iou(box[None, :4], its)[0] if len(its) else torch.zeros(0)
            free = [index for index in range(len(its)) if index not in taken and overlaps[index] >= 0.5]
            if free:
                taken.add(max(free, key=lambda index: float(overlaps[index])))
            hits.append((float(box[4]), bool(free)))
    hits.sort(key=lambda hit: -hit[0])
    correct = np.cumsum([hit for _, hit in hits])
    precision = correct / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    recall = np.concatenate([[0], correct / max(1, count)])
    return float(np.sum(np.diff(recall) * envelope))


def map50(predict: Callable[[Tensor], Tensor], folder: Path) -> float:
    """Return mean over the classes of the average precision at an IoU of 0.5, in percent."""
    found, wanted = [], []
    for path in sorted((folder / "images").glob("*.png")):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            found += non_max_suppression(predict(x), conf_thres=0.001, iou_thres=0.7)
        truth = torch.tensor(np.loadtxt(folder / "labels" / f"{path.stem}.txt", ndmin=2), dtype=torch.float32)
        centre, size, side = truth[:, 1:3], truth[:, 3:5], x.shape[-1]
        wanted.append(torch.cat([truth[:, :1], (centre - size / 2) * side, (centre + size / 2) * side], 1))
    return 100 * float(np.mean([average_precision(found, wanted, label) for label in range(len(CLASSES))]))


def main() -> None:
    """Train, quantize, deploy, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--folder", type=Path, default=Path("yolo-example"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("FLOAT", "QUANTIZED"))
    args = parser.parse_args()
    images, epochs, size = (96, (12, 3), 96) if args.quick else (1024, (40, 10), 160)
    epochs = args.epochs or epochs
    folder = args.folder.resolve()
    write_images(folder / "train", images, size, seed=0)
    write_images(folder / "val", max(32, images // 8), size, seed=1)
    data = folder / "data.yaml"
    data.write_text(yaml.safe_dump({"path": str(folder), "train": "train", "val": "val", "names": list(CLASSES)}))
    common: dict[str, Any] = {
        **{"data": str(data), "imgsz": size, "project": str(folder), "exist_ok": True, "plots": False, "workers": 0},
        **{"mosaic": 0.0, "optimizer": "AdamW", "batch": 16, "seed": 0},
    }
    YOLO(args.model).train(epochs=epochs[0], lr0=0.002, name="float", **common)
    best = folder / "float" / "weights" / "last.pt"
    float_model = YOLO(best).model.float().eval()
    trainer = QuantizedTrainer(
        overrides={**common, "model": str(best), "epochs": epochs[1], "lr0": 0.0005, "warmup_epochs": 0, "name": "qat"}
    )
    trainer.train()
    qat = trainer.ema.ema.float().eval()  # the average is what Ultralytics keeps, and it is quantized as well
    print(tritonq.summary(qat))
    x = torch.rand(1, 3, size, size)
    deployed = Predictions(tritonq.convert(qat)).eval()
    path = folder / "model.onnx"
    tritonq.export_onnx(deployed, path, x)
    print(tritonq.verify(Predictions(qat).eval(), path, x))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    results = {
        "float": map50(Predictions(float_model), folder / "val"),
        "quantized, PyTorch": map50(Predictions(qat), folder / "val"),
        "quantized, ONNX Runtime": map50(
            lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0]), folder / "val"
        ),
    }
    for kind, value in results.items():
        print(f"mAP50 {kind}: {value:.2f}")


if __name__ == "__main__":
    main()

"""Fine-tune a timm model with QAT on your own folder of images, one sub-folder per class.

python finetune_timm.py photos --model efficientnet_lite0 --pretrained
"""

import argparse

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.data.dataset_factory import create_dataset
from torch import nn
from torch.utils.data import DataLoader

import tritonq


def batches(options: argparse.Namespace, model: nn.Module, train: bool) -> DataLoader:
    """Return the folder's images as the model wants them."""
    config = resolve_data_config({"input_size": (3, options.size, options.size)}, model=model)
    data = create_dataset("", root=options.data, transform=create_transform(**config, is_training=train))
    return DataLoader(data, options.batch_size, shuffle=train, drop_last=train, num_workers=options.workers)


def choose_qconfigs(model: nn.Module) -> tritonq.QConfigMapping:
    """Return int8 throughout, but for the logits: nothing after them needs codes."""
    qconfig = tritonq.get_qconfig("tensorrt")
    head = next(name for name, part in model.named_modules() if part is model.get_classifier())
    return tritonq.QConfigMapping().set_global(qconfig).set_module_name(head, qconfig._replace(activation=nn.Identity))


def main(options: argparse.Namespace) -> None:
    """Prepare, fine-tune, convert, verify."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=options.classes)
    train, test = batches(options, model, True), batches(options, model, False)
    example = next(iter(test))[0][:2]
    model = tritonq.prepare_qat(model, qconfig=choose_qconfigs(model), example_inputs=example).to(device)
    print(tritonq.summary(model).line)
    optimizer = torch.optim.SGD(tritonq.parameter_groups(model, options.learning_rate, 1e-5), momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(train))
    for epoch in range(options.epochs):
        model.train()
        if epoch and epoch == options.epochs - 1:  # the last epoch trains on what will be deployed
            tritonq.disable_observer(model)
            tritonq.freeze_bn_stats(model)
        for images, labels in train:
            with torch.autocast(device, torch.bfloat16, enabled=options.amp):
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)
    converted = tritonq.convert(model.cpu())
    print(tritonq.verify(model, converted, test))
    tritonq.save_converted(converted, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights (downloads them)")
    parser.add_argument("--amp", action="store_true", help="autocast in bfloat16")
    for flag, value in (("--classes", 2), ("--epochs", 5), ("--batch-size", 32), ("--size", 224), ("--workers", 4)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--output", default="model.int8.pt")
    main(parser.parse_args())

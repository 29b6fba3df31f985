"""QAT of a torchvision model on every GPU of a machine, or on CPUs; a folder holds train/<class>/* and val/<class>/*.

torchrun --nproc-per-node=8 imagenet_ddp.py /data/imagenet --model resnet50 --weights DEFAULT
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, models, transforms

import tritonq


def loader(options: argparse.Namespace, part: str) -> DataLoader:
    """Return the rank's share of ``train`` or ``val``."""
    train = part == "train"
    crop = transforms.RandomResizedCrop(options.size) if train else transforms.CenterCrop(options.size)
    steps = [transforms.Resize(options.size * 8 // 7), crop, transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    data = datasets.ImageFolder(f"{options.data}/{part}", transforms.Compose(steps))
    sampler = DistributedSampler(data, shuffle=train)
    return DataLoader(data, options.batch_size, sampler=sampler, num_workers=options.workers, drop_last=train)


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """Return fraction of the validation images that are classified correctly, over all ranks."""
    model.eval()
    hits = torch.cat([model(images.to(device)).argmax(1) == labels.to(device) for images, labels in batches])
    counts = torch.stack([hits.sum(), torch.tensor(len(hits), device=device)])
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def main(options: argparse.Namespace) -> None:
    """One rank."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train, val = loader(options, "train"), loader(options, "val")
    model = models.get_model(options.model, weights=options.weights)
    # One run on an example finds what is fused and where quantizers go: the model itself stays as it is written.
    model = tritonq.prepare_qat(model, example_inputs=next(iter(val))[0][:2])
    model = model.to(device, memory_format=torch.channels_last)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(tritonq.parameter_groups(parallel, options.lr, 1e-4), momentum=0.9)
    for epoch in range(options.epochs):
        train.sampler.set_epoch(epoch)
        model.train()
        if epoch and epoch == options.epochs - 1:  # the last epoch trains on what will be deployed
            tritonq.disable_observer(model)
            tritonq.freeze_bn_stats(model)
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        tritonq.sync_observers(model)  # ranges over what all ranks have seen
        score = accuracy(model, val, device)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: {score:.2%} of the validation images right", flush=True)
    if dist.get_rank() == 0:
        tritonq.save_converted(tritonq.convert(copy.deepcopy(model).cpu()), options.output)
    dist.barrier()  # nobody leaves before the file is written
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    for flag, default in (("--model", "resnet50"), ("--weights", None), ("--output", "int8.pt")):
        parser.add_argument(flag, default=default)
    for flag, value in (("--epochs", 3), ("--batch-size", 64), ("--size", 224), ("--workers", 8), ("--lr", 1e-3)):
        parser.add_argument(flag, type=type(value), default=value)
    main(parser.parse_args())

"""The ceiling: a method's network on a method's data, trained with labels instead.

    python benchmarks/supervised.py simclr                                  built-in set, a CPU
    python benchmarks/supervised.py simclr --dataset cifar10 --compile      ResNet-18, one GPU
    python benchmarks/supervised.py dino --dataset cifar10 --compile        the same of a ViT

METHOD's file gives data, network, input, epochs, batch and evaluation: all options that are not
listed in --help (--dataset, --arch, --epochs, --batch-size, --seed, --amp, ...) are its own, and so
is the row of RECIPES that it prints. Rate and weight decay are not, nor the augmentation:

 1. All training images have a say, as in the method. Nothing is chosen on any others: the test set
    is read once, at the end, after the last epoch.
 2. ResNets: SGD with Nesterov momentum 0.9, rate 0.1 for a batch of 128, weight decay 5e-4 of all
    parameters, the usual recipe for CIFAR. ViTs: AdamW, rate 5e-4 for a batch of 256, weight decay
    0.05 of matrices alone, as DeiT (there 512), and the stochastic depth of the method's recipe.
    Both: rates grow with the batch, 5 % of the steps are warm-up, then a half cosine to 0.
 3. Random crops of at least --scale of the area, and flips. No colour jitter, blur, mixing of
    images or smoothed labels: the least that keeps a network from learning images by heart, so
    higher ceilings are known. At 0.5 a crop moves as far as with the usual padding by 4 pixels.

supervised_top1 is of the classifier that was trained along. linear_top1 and knn_top1 are of the
backbone as the method's own are: logistic regression and neighbours on frozen features.

Writes runs/supervised-METHOD-<dataset>-s<seed>/ (--out): args.json, metrics.jsonl, results.json and
backbone.pt. A run that was cut begins again. One process.
"""

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
from lessons import finetune
from simclr import lr_at

METHODS = "simclr moco byol dino ibot dinov2".split()  # pretext.py's ResNet is that of simclr.py
WARMUP = 0.05  # share of the run


def optimiser(net, args, is_vit):
    """With the defaults of docstring 2 filled in, rates being for a batch of 256."""
    lr, decay = (5e-4, 0.05) if is_vit else (0.2, 5e-4)
    args.lr = lr if args.lr is None else args.lr
    args.weight_decay = decay if args.weight_decay is None else args.weight_decay
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1]},
              {"params": [p for p in net.parameters() if p.ndim <= 1]}]
    if not is_vit:
        sgd = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True,
                              weight_decay=args.weight_decay)
        for p in net.parameters():  # PyTorch leaves it unset if fp16 skips the very first step
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    groups[1]["weight_decay"] = 0.0
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def train(net, optimizer, data, args, run):
    """-> metrics, a row per epoch, and the seconds that it took."""
    labels, batch, device = data.train.labels, args.batch_size, run.device
    per_epoch = len(labels) // batch
    steps, peak = args.epochs * per_epoch, args.lr * batch / 256
    warmup = round(WARMUP * steps)
    crop = [common.Crop(args.image_size, (args.scale, 1.0), ratio=(3 / 4, 4 / 3))]
    model = torch.compile(net) if args.compile else net
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    rows, seconds = [], 0.0
    for epoch in range(args.epochs):
        sums = torch.zeros(2, device=device)  # of loss and hits; a loss that is not finite stays
        batches = data.epoch(epoch, 0, batch, crop, run, args.seed)
        bar = common.Bar(batches, per_epoch, 0, f"epoch {epoch + 1}/{args.epochs}")
        for step, ((x,), i) in enumerate(bar, epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, warmup, peak)
            y = labels[i].to(device, non_blocking=True)
            x = common.flip(x, p=0.5).contiguous(memory_format=torch.channels_last)
            with run.autocast():
                s = model(x)  # (N, classes)
            loss = F.cross_entropy(s.float(), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            sums += torch.stack([loss.detach(), (s.argmax(1) == y).float().mean()])
        loss, hits = (sums / per_epoch).tolist()
        seconds += bar.seconds
        if not math.isfinite(loss):
            common.fail(f"no finite loss in epoch {epoch + 1}: lower --lr or give --amp off")
        rows.append({"epoch": epoch + 1, "loss": loss, "train_top1": 100 * hits,
                     "images_per_second": per_epoch * batch / bar.seconds})
        left = common.duration(seconds / (epoch + 1) * (args.epochs - epoch - 1))
        print(f"epoch {epoch + 1}: loss {loss:.3f}, {100 * hits:.1f} % of the crops right, "
              f"{rows[-1]['images_per_second']:,.0f} images/s, {left} left")
    return rows, seconds


def main(argv=None):
    begun = time.perf_counter()
    share, positive = common.number(float, 0, 1), common.number(float, 1e-9)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = common.fail
    p.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--lr", type=positive, help="peak for a batch of 256 (ResNet 0.2, ViT 5e-4)")
    p.add_argument("--weight-decay", type=share, help="(ResNet 5e-4, ViT 0.05)")
    p.add_argument("--scale", type=share, default=0.5, help="smallest crop's share of area (0.5)")
    own, others = p.parse_known_args(argv)
    method = importlib.import_module(own.method)
    args = method.options(others)
    if args.resume or args.init or args.eval:
        common.fail("--resume, --init and --eval are for the method's own file")
    run = common.setup(args.device, args.amp)
    name = f"supervised-{own.method}-{Path(args.dataset).name}-s{args.seed}"
    folder = common.run_folder(args.out or f"runs/{name}", False)
    data = common.Data(args.dataset, args.data_dir, args.limit)
    method.complete(args, data.side, len(data))
    data.read(args.image_size, run.device, args.memory_limit, args.workers)
    labels = data.train.labels
    if labels.min() < 0 or len(labels) < args.batch_size or run.world > 1:
        common.fail(f"{args.dataset} has to have labels for all images and at least --batch-size "
                    f"{args.batch_size} of them, {len(labels)} are there, and one process")

    rates = [args.drop_path] if hasattr(args, "drop_path") else []
    backbone = finetune.Fed(method.build(args, *rates).backbone, method.MEAN, method.STD)
    net = nn.Sequential(backbone, nn.Linear(backbone.dim, int(labels.max()) + 1))
    net.to(run.device, memory_format=torch.channels_last)
    vars(args).update(vars(own) | {"warmup": WARMUP, "eval_every": 0})  # not the method's
    optimizer = optimiser(net, args, args.arch.startswith("vit"))
    common.write(folder / "args.json", json.dumps(vars(args), indent=1))
    print(f"supervised, {args.arch} of {own.method}.py on {args.dataset}, {run.name}, {run.dtype}, "
          f"to {folder}: {len(labels):,} images, lr {args.lr:g} * {args.batch_size} / 256, weight "
          f"decay {args.weight_decay:g}")
    rows, seconds = train(net, optimizer, data, args, run)

    net.eval()
    top1, _ = finetune.score(net, data.test, args, run)
    parts = [method.embed(lambda x: [net[0](x[0])], method.central(args), part, args, run)
             for part in (data.fit, data.val, data.test)]
    linear, knn = method.probes(parts, args)
    images = args.epochs * (len(labels) // args.batch_size) * args.batch_size
    results = vars(args) | {
        "method": "supervised", "device": run.name, "versions": {"torch": torch.__version__},
        "supervised_top1": top1, "linear_top1": linear, "knn_top1": knn, "train_seconds": seconds,
        "images_per_second": images / seconds, "peak_memory_mb": common.peak_memory_mb(run.device),
        "total_seconds": time.perf_counter() - begun}
    weights = {k: v.cpu().contiguous() for k, v in net[0].net.state_dict().items()}
    meta = vars(args) | {"mean": method.MEAN, "std": method.STD}
    common.write(folder / "backbone.pt", {"state_dict": weights, "meta": meta})
    common.write_rows(folder / "metrics.jsonl", rows)
    common.write(folder / "results.json", json.dumps(results, indent=1))
    print(f"test: supervised {top1:.1f}, linear {linear:.1f}, k-NN {knn:.1f} %; {seconds:.0f} s of "
          f"training, {results['images_per_second']:,.0f} images/s")
    return results


if __name__ == "__main__":
    main()

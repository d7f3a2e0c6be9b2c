"""Images per second of training, compared with lightly on the same machine.

The same backbone, batch, optimiser and files, in turns in one process.

    pip install lightly
    python benchmarks/peers.py simclr --dataset FOLDER
    python benchmarks/peers.py dino --dataset FOLDER

FOLDER holds train/<class>/* in small files, such as CIFAR-10's images as JPEG. Lightly's side is
built from its own parts as in its examples: its transforms in the workers of a DataLoader (one per
core), its head, loss and moving average. Ours is the method file as it is. Each runs two epochs per
round; the second is timed, when workers are up and memory is warm. Options that are not listed in
--help go to the method file. Ours reads the set into memory once; that is not in its images/s but
printed apart.
"""

import argparse
import contextlib
import copy
import importlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

FLAT = {"mean": [0.0] * 3, "std": [1.0] * 3}  # simclr.py leaves images in [0, 1]


class SimCLR(nn.Module):
    """As in lightly's example: backbone, head, loss."""

    def __init__(self, net, args):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform
        self.transform = SimCLRTransform(
            args.image_size, cj_strength=args.strength, min_scale=args.min_scale,
            gaussian_blur=args.blur, normalize=FLAT)
        self.backbone = net.backbone
        self.head = SimCLRProjectionHead(net.backbone.dim, net.backbone.dim, args.dim,
                                         batch_norm=False)
        self.criterion = NTXentLoss(args.temperature)
        self.optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, fused=True,
                                         weight_decay=args.weight_decay)

    def loss(self, views):
        z1, z2 = (self.head(self.backbone(x)) for x in views)
        return self.criterion(z1, z2)

    def after(self):
        pass


class DINO(nn.Module):
    """As in lightly's example: student, teacher, heads, loss."""

    def __init__(self, net, args):
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import update_momentum
        from lightly.transforms import DINOTransform
        self.transform = DINOTransform(
            args.image_size, (args.global_scale, 1.0), args.local_size,
            (args.local_scale, args.global_scale), args.local_crops,
            gaussian_blur=tuple(args.blur), solarization_prob=args.solarize)
        self.student, self.teacher = (nn.ModuleList([backbone, DINOProjectionHead(
            net.backbone.dim, args.hidden, 256, args.out_dim, batch_norm=args.head_bn)])
            for backbone in (net.backbone, copy.deepcopy(net.backbone)))
        self.teacher.requires_grad_(False).load_state_dict(self.student.state_dict())
        self.criterion = DINOLoss(args.out_dim, warmup_teacher_temp_epochs=5)
        self.update, self.m = update_momentum, args.m
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-3, fused=True)

    def outputs(self, nets, views):
        backbone, head = nets
        return [head(backbone(x)[:, 0]) for x in views]

    def loss(self, views):
        with torch.no_grad():
            teacher = self.outputs(self.teacher, views[:2])
        return self.criterion(teacher, self.outputs(self.student, views), epoch=0)

    def after(self):
        for online, average in zip(self.student, self.teacher):
            self.update(online, average, self.m)


def theirs(model, loader):
    """Images/s of the second of two epochs."""
    for _ in range(2):
        begun = time.perf_counter()
        for views, _ in loader:
            loss = model.loss(views)
            model.optimizer.zero_grad()
            loss.backward()
            model.optimizer.step()
            model.after()
    return len(loader) * loader.batch_size / (time.perf_counter() - begun)


def ours(file, argv):
    """Images/s of the second of two epochs; seconds before the first one."""
    args = common.options(file.__name__, file.__doc__, file.OPTIONS, argv)
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        args.out = f"{folder}/run"
        with common.Run(args) as run:
            file.train(args, run)
    return run.rows[1]["images_per_second"], time.perf_counter() - begun - run.seconds, args


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("method", choices=["simclr", "dino"])
    p.add_argument("--dataset", required=True, help="folder with train/<class>/*")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--limit", type=int, default=4096, help="images per epoch (4096)")
    own, options = p.parse_known_args(argv)
    file = importlib.import_module(own.method)
    argv = ["--dataset", own.dataset, "--limit", str(own.limit), "--device", "cpu", "--epochs", "2",
            "--eval-every", "0", *options]
    rates, loader = {"theirs": [], "ours": []}, None
    for _ in range(own.rounds):
        rate, before, args = ours(file, argv)
        rates["ours"].append(rate)
        if loader is None:
            model = {"simclr": SimCLR, "dino": DINO}[own.method](file.build(args), args).train()
            images = ImageFolder(f"{own.dataset}/train", model.transform)
            chosen = common.shuffle(len(images))[: own.limit].tolist()
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(images, chosen), args.batch_size, shuffle=True,
                drop_last=True, num_workers=common.cores(), persistent_workers=True)
        rates["theirs"].append(theirs(model, loader))
    middle = {k: statistics.median(v) for k, v in rates.items()}
    for name, values in rates.items():
        print(f"{name:7} {', '.join(f'{v:,.0f}' for v in values)} images/s")
    print(f"{own.method}, {args.arch}, batch {args.batch_size}, {args.image_size} pixels: "
          f"{middle['ours'] / middle['theirs']:.2f} times as fast; reading the images took ours "
          f"{before:.1f} s, once")


if __name__ == "__main__":
    main()

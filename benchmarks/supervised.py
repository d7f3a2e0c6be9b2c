"""The ceiling: a method's network on a method's data, trained with labels instead.

    python benchmarks/supervised.py simclr                                  built-in set, a CPU
    python benchmarks/supervised.py simclr --dataset cifar10 --compile      ResNet-18, one GPU
    python benchmarks/supervised.py dino --dataset cifar10 --compile        the same for a ViT

The options are those of METHOD.py (`supervised.py simclr --help` lists them), whose network, data,
epochs, batch and evaluation are used; what only its loss needs, and --eval-every, have no effect.
What differs (OWN):

  - All training images are used, as in the method. Nothing is tuned on any others: the test set is
    read once, after the last epoch.
  - ResNets: SGD with Nesterov momentum 0.9, rate 0.1 for a batch of 128, weight decay 5e-4 of all
    parameters, the usual recipe for CIFAR. ViTs: AdamW, rate 5e-4 for a batch of 256 (DeiT: 512),
    weight decay 0.05 of matrices alone, as in DeiT, and the stochastic depth of the method's
    recipe. Both: 5 % of the steps are warm-up, then half a cosine to 0.
  - Random crops of at least --scale of the area, and flips. No colour jitter, blur, mixing of
    images or label smoothing: the least that keeps a network from memorising images, so higher
    ceilings are known. At 0.5 a crop moves as far as with the usual padding by 4 pixels.

supervised_top1 is that of the trained classifier. linear_top1 and knn_top1 are those of the
backbone, as for the method: logistic regression and nearest neighbours on frozen features. Writes
runs/supervised-METHOD-<dataset>-s<seed>/ (--out).
"""

import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

METHODS = "simclr moco byol dino ibot dinov2".split()  # pretext.py's ResNet is that of simclr.py


def is_vit(args):
    return args.arch.startswith("vit")


def rate(args, n):
    return 5e-4 if is_vit(args) else 0.2


def decay(args, n):
    return 0.05 if is_vit(args) else 5e-4


OWN = {  # these rows replace or join those of the method
    "lr": (rate, rate, rate, common.POSITIVE, "peak, times N / 256; 0.2, for a ViT 5e-4"),
    "weight_decay": (decay, decay, decay, common.SHARE, "5e-4, for a ViT 0.05, of matrices"),
    "warmup": (0.05, 0.05, 0.05, common.SHARE, "share of the steps"),
    "scale": (0.5, 0.5, 0.5, common.SHARE, "least area of a crop"),
}


class Labelled:
    """The batches of data, with the labels after the views. hide: -100, which cross_entropy leaves
    out, for the images that are for validation."""

    def __init__(self, data, hide=False):
        self.data, self.labels = data, data.train.labels
        if hide and data.val[0] is data.train:
            self.labels = self.labels.index_fill(0, data.val[1], -100)

    def epoch(self, *given):
        for views, i in self.data.epoch(*given):
            yield [*views, self.labels[i]], i


class Classifier(nn.Module):
    """x (N, 3, S, S) in [0, 1] -> h (N, d), s (N, classes)."""

    def __init__(self, backbone, mean, std, classes):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.dim, classes)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        x = (x - self.mean) / self.std
        h = self.backbone(x.contiguous(memory_format=torch.channels_last))
        h = h[:, 0] if h.ndim == 3 else h  # for a ViT, the class token
        return h, self.head(h)


def build(method, args, classes):
    torch.manual_seed(args.seed)
    rates = [args.drop_path] if hasattr(args, "drop_path") else []
    return Classifier(method.build(args, *rates).backbone, method.MEAN, method.STD, classes)


def make_optimizer(net, args):
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    if is_vit(args):
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, nesterov=True, fused=True,
                           weight_decay=args.weight_decay)


def lr_at(step, steps, warmup, peak):
    """Linear warm-up to peak, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(method, args, run, hide=False):
    data = common.load_data(args, method.OPTIONS | OWN, run)
    labels = data.train.labels
    if labels.min() < 0:
        common.fail(f"{args.dataset} has to have labels for all training images")
    steps, peak = args.epochs * data.per_epoch, args.lr * args.batch_size / 256
    warmup = round(args.warmup * steps)
    crops = [common.Crop(args.image_size, (args.scale, 1.0), ratio=(3 / 4, 4 / 3))]

    net = run.place(build(method, args, int(labels.max()) + 1))
    model, optimizer = run.parallel(net), make_optimizer(net, args)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "optimizer": optimizer, "scaler": scaler}
    run.restore(state)
    undo = common.Undo(net)
    run.chance = {"loss": math.log(int(labels.max()) + 1)}

    for epoch in run.epochs(data):
        for step, (x, y) in run.batches(Labelled(data, hide), epoch, crops):
            y = y.to(run.device, non_blocking=True)
            lr = lr_at(step, steps, warmup, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with run.autocast():
                _, s = model(common.flip(x, p=0.5))  # (N, classes)
            loss = F.cross_entropy(s.float(), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ok = run.update(optimizer, scaler, loss)
            undo(unless=ok)
            top1 = 100 * (s.argmax(1) == y).float().mean()
            run.log(ok, loss=loss, train_top1=top1, lr=lr)
        run.end_epoch(state)
        run.save(state)
    return net, data


def evaluate(method, net, data, args, run):
    """On the test images: the classifier, and the two probes on frozen features."""
    net.eval()
    run.broadcast(net)
    crop = method.central(args.image_size)
    parts = [common.embed(lambda views: net(*views), part, crop, run) for part in data.splits(True)]
    _, s, y = parts[-1]
    frozen = [(h, labels) for h, _, labels in parts]
    results = {"method": "supervised",
               "supervised_top1": 100 * (s.argmax(1) == y).float().mean().item(),
               "linear_top1": method.linear_probe(*frozen),
               "knn_top1": common.knn(*frozen, k=args.knn_k, tau=args.knn_tau)}
    print("test: " + ", ".join(f"{k} {v:.1f}" for k, v in results.items() if k.endswith("_top1")))
    return results


def main(argv=None):
    p = common.Parser(add_help=False, allow_abbrev=False)
    p.add_argument("method", nargs="?", choices=METHODS)
    own, options = p.parse_known_args(argv)
    if not own.method:
        common.fail(f"which method? one of {', '.join(METHODS)}, then its options or --help")
    method = importlib.import_module(own.method)
    args = common.options(own.method, __doc__, method.OPTIONS | OWN, options)
    if args.init or args.eval or args.embed:
        common.fail("--init, --eval and --embed are for the method's own file")
    if not args.out:
        args.out = f"runs/supervised-{own.method}-{Path(args.dataset).name}-s{args.seed}"
    args.supervised = True  # for those who load backbone.pt
    with common.Run(args) as run:
        net, data = train(method, args, run)
        results = evaluate(method, net, data, args, run)
        return run.finish(net.backbone, results, method.MEAN, method.STD, method.loading(args))


if __name__ == "__main__":
    main()

"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning
He, Fan, Wu, Xie, Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722 (v1)
Chen, Fan, Girshick, He, 2020, https://arxiv.org/abs/2003.04297 (v2, the default here)
Slides: "Momentum Contrast (MoCo)", "MoCov2 vs. SimCLR".

A query has to find the key of the same image among the keys of many other images. These are kept
in a queue, so their number K is independent of the batch; and they are comparable, because the key
encoder is a slowly moving average of the query encoder and gets no gradient.

Algorithm 1 (on the slides), for a batch of N images:
 1. x_q, x_k = aug(x), aug(x)                   two random views       `crops`, `augment`
 2. q = f_q(x_q), k = f_k(x_k)                  queries and keys       `MoCo`, `shuffled`
 3. L = mean -log( exp(q.k / tau) / (exp(q.k / tau) + sum_i exp(q.queue_i / tau)) )    `info_nce`
 4. update f_q                                  SGD                    `update`, `lr_by`
 5. f_k = m f_k + (1 - m) f_q                   momentum update        `ema_update`
 6. enqueue k, dequeue the oldest keys          K stays the same       `dequeue_and_enqueue`

Symbols: x_q, x_k (N, 3, S, S) views in [0, 1]; h (N, d) representations; q, k (N, C) unit vectors;
queue (C, K) with a key in each column; l_pos (N, 1), l_neg (N, K) similarities; tau temperature;
m momentum. net is f_q, net_ema is f_k. The slides write the denominator once with k+ as a term of
its own and once as a sum over the K + 1 keys: the same, if k+ is one of them.

Shuffling batch norm (Section 3.3): q and its k must not share batch statistics, or the network
finds the image by them. Under torchrun every process has its own statistics and encodes keys of
images that were dealt out at random; within a process `--bn-splits` parts of the batch do the same.

Departures from the papers:
 1. The momentum update comes after the SGD step, as in Algorithm 1; the released code does it
    before the keys are encoded, with the queries' weights of the step before: the same sequence of
    updates, seen half a step later.
 2. K and m shrink with the set and the length of the run (RECIPES).
 3. The cosine schedule goes by steps, not by epochs.
 4. RECIPES: small images after the released CIFAR-10 demo, without blur; the built-in set has its
    own, sized for a CPU.

    python moco.py      110 s on 2 CPU cores; top-1 of h: 55.8 +- 2.0 % linear, 36.5 +- 1.4 % k-NN,
                        3 seeds (untrained 26.4 and 31.4, pixels 29.6 and 48.5); README: more
"""

import argparse
import copy
import functools
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import common

# ==================================================================================================
# Options
# ==================================================================================================


def keys(most):
    """K for a set of n images: an eighth of them, at least a batch."""
    return lambda args, n: max(args.batch_size, min(most, n // 8))


def momentum(most):
    """m for a run on n images: at best a half-life of a twentieth of its steps, at least 0.9."""
    return lambda args, n: min(most, max(0.9, 0.5 ** (20 * args.batch_size / (args.epochs * n))))


RECIPES = {  # by data, an option overrides an entry; lr is for a batch of 256 and grows with it
    # the built-in set, on a CPU
    "shapes": dict(arch="resnet10", stem="7x7", image_size=32, head="mlp", aug="v2", min_scale=0.5,
                   blur=0.0, tau=0.2, dim=128, bn_splits=2, epochs=14, batch_size=64, lr=0.12,
                   weight_decay=1e-4, schedule="cosine", queue=keys(512), m=momentum(0.99)),
    # images up to 64 pixels: the released CIFAR-10 demo with the head and schedule of v2
    "small": dict(arch="resnet18", stem="3x3", image_size=64, head="mlp", aug="v2", min_scale=0.08,
                  blur=0.0, tau=0.1, dim=128, bn_splits=8, epochs=200, batch_size=512, lr=0.03,
                  weight_decay=5e-4, schedule="cosine", queue=keys(4096), m=momentum(0.99)),
    # larger ones: the paper's ImageNet setting, 8 parts of 32 images in place of 8 GPUs
    "large": dict(arch="resnet50", stem="7x7", image_size=224, head="mlp", aug="v2", min_scale=0.2,
                  blur=0.5, tau=0.2, dim=128, bn_splits=8, epochs=200, batch_size=256, lr=0.03,
                  weight_decay=1e-4, schedule="cosine", queue=keys(65536), m=momentum(0.999)),
}
V1 = dict(head="linear", aug="v1", schedule="step", tau=0.07)
ARCHS = {"resnet10": (BasicBlock, [1, 1, 1, 1]), "resnet18": (BasicBlock, [2, 2, 2, 2]),
         "resnet34": (BasicBlock, [3, 4, 6, 3]), "resnet50": (Bottleneck, [3, 4, 6, 3])}


def options(argv=None):
    """The command line. What has no default here comes from the row of RECIPES for the data."""
    whole, share = functools.partial(common.number, int), common.number(float, 0, 1)
    positive = common.number(float, 1e-9)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = common.fail
    o = p.add_argument_group("run").add_argument
    o("--seed", type=whole(0, 2**31), default=0, help="of weights, order and random draws (0)")
    o("--device", help="cuda, mps or cpu (the first there is)")
    o("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="autocast (auto)")
    o("--compile", action="store_true", help="compile network and augmentation")
    o("--out", help="output folder (runs/moco-<dataset>-s<seed>)")
    o("--resume", action="store_true", help="go on with the interrupted run in --out")
    o = p.add_argument_group("data").add_argument
    o("--dataset", default="shapes", help="shapes, a torchvision set or a folder (shapes)")
    o("--data-dir", default="data", help="where downloaded sets are kept (data)")
    o("--limit", type=whole(1), help="use only so many training images (all)")
    o("--image-size", type=whole(8), help="side of a view in pixels")
    o("--workers", type=whole(0), default=common.cores(), help="readers of files (a core each)")
    o("--memory-limit", type=common.number(float, 0), default=8, help="GB, more is streamed (8)")
    o = p.add_argument_group("method").add_argument
    o("--arch", choices=ARCHS, help="f (paper: resnet50)")
    o("--stem", choices=["3x3", "7x7"], help="of f; 3x3 has no max-pooling, for small images")
    o("--head", choices=["linear", "mlp"], help="of f_q and f_k (v1: linear, v2: mlp)")
    o("--dim", type=whole(1), help="C, width of q and k (paper: 128)")
    o("--temperature", dest="tau", type=positive, help="tau (v1: 0.07, v2: 0.2)")
    o("--queue", type=whole(1), help="K, number of keys (paper: 65536)")
    o("--m", type=share, help="momentum of the key encoder (paper: 0.999; 0 fails)")
    o("--bn-splits", type=whole(1), help="parts of a batch with own statistics (paper: 8 GPUs)")
    o("--aug", choices=["v1", "v2"], help="v1: stronger hue, always jittered, no blur")
    o("--min-scale", type=share, help="smallest share of the image's area in a crop (paper: 0.2)")
    o("--blur", type=share, help="probability of a blur in v2 (paper: 0.5)")
    o("--v1", action="store_true", help="as in the first paper: " + ", ".join(
        f"{k} {v}" for k, v in V1.items()))
    o = p.add_argument_group("optimiser").add_argument
    o("--epochs", type=whole(1), help="passes over the training images (paper: 200 and 800)")
    o("--batch-size", type=whole(2), help="N, images in a step of all processes (paper: 256)")
    o("--lr", type=positive, help="at first, for 256 images, others in proportion (paper: 0.03)")
    o("--weight-decay", type=share, help="(paper: 1e-4)")
    o("--schedule", choices=["step", "cosine"], help="v1: a tenth after 60 and 80 %%, v2: cosine")
    o = p.add_argument_group("evaluation").add_argument
    o("--eval-every", type=whole(0), help="epochs (a quarter of the run; 0: never)")
    o("--knn-k", type=whole(1), default=20, help="neighbours (20)")
    o("--knn-tau", type=positive, default=0.07, help="temperature of their votes (0.07)")
    o("--init", metavar="FILE", help="start from a backbone.pt, last.pt or official file")
    o("--eval", metavar="FILE", help="evaluate such a file, train nothing")
    args = p.parse_args(argv)
    for k, value in V1.items() if args.v1 else ():
        if getattr(args, k) is None:
            setattr(args, k, value)
    return args


def complete(args, side, n):
    """Fill what is left open from RECIPES, for n images with this shorter side, and print it."""
    row = "shapes" if side is None else "small" if side <= 64 else "large"
    defaults = RECIPES[row] | {"image_size": min(RECIPES[row]["image_size"], side or math.inf)}
    defaults["eval_every"] = -(-(args.epochs or defaults["epochs"]) // 4)
    for k, value in defaults.items():
        if getattr(args, k) is None:
            setattr(args, k, value(args, n) if callable(value) else value)
    print(f"recipe {row}:", *(f"{k}={v:.6g}" if isinstance(v := getattr(args, k), float)
                              else f"{k}={v}" for k in defaults))


# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """The first part of aug (v1: Section 3.3, "Technical details"): random crops, two an image."""
    return [common.Crop(args.image_size, (args.min_scale, 1.0), (3 / 4, 4 / 3), count=2)]


def augment(views, args):
    """The rest of it: views (N, 3, S, S) in [0, 1] -> same, an own draw for every image."""
    seen = []
    for x in views:
        if args.aug == "v1":
            x = common.color_jitter(common.grey(x, p=0.2), 0.4, 0.4, 0.4, 0.4, p=1.0)
        else:
            x = common.grey(common.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8), p=0.2)
        if args.aug == "v2" and args.blur:  # as wide as a tenth of the image
            x = common.blur(x, sigma=(0.1, 2.0), taps=x.shape[-1] // 20 * 2 + 1, p=args.blur)
        seen.append(common.flip(x, p=0.5))
    return seen


# ==================================================================================================
# Model
# ==================================================================================================


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the input, ImageNet's


def resnet(arch, stem, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier: (N, 3, S, S) -> (N, d)."""
    net = ResNet(*ARCHS[arch], norm_layer=norm_layer)
    net.dim, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with statistics of its own in each of `splits` parts of the batch, in training."""

    def __init__(self, features, splits):
        super().__init__(features)
        self.splits = splits

    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        momentum = 1 - (1 - self.momentum) ** (1 / self.splits)  # the parts together: self.momentum
        return torch.cat([F.batch_norm(part, self.running_mean, self.running_var, self.weight,
                                       self.bias, True, momentum, self.eps)
                          for part in x.chunk(self.splits)])


class MoCo(nn.Module):
    """f_q or f_k: (N, 3, S, S) in [0, 1] -> h (N, d), q or k (N, C) before their normalisation."""

    def __init__(self, arch="resnet50", stem="7x7", head="mlp", dim=128, bn_splits=1):
        super().__init__()
        self.backbone = resnet(arch, stem, functools.partial(SplitBatchNorm2d, splits=bn_splits))
        d = self.backbone.dim
        mlp = [nn.Linear(d, d), nn.ReLU(), nn.Linear(d, dim)]
        self.head = nn.Sequential(*{"linear": mlp[2:], "mlp": mlp}[head])
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, x):
        h = self.backbone((x - self.mean) / self.std)
        return h, self.head(h)


def build(args):
    """The untrained network: the same weights for the same seed whenever it is called."""
    torch.manual_seed(args.seed)
    world = dist.get_world_size() if dist.is_initialized() else 1  # each has its share of parts
    return MoCo(args.arch, args.stem, args.head, args.dim, max(1, args.bn_splits // world))


# ==================================================================================================
# Loss
# ==================================================================================================


def info_nce(q, k, queue, tau):
    """InfoNCE (v1, equation 1; slide "Momentum Contrast (MoCo)"), its mean over the N queries:

        L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum_i exp(q . k_i / tau)) )

    q, k: (N, C) unit vectors, row n of both from image n; queue: (C, K), a key k_i in each column
    -> scalar. No gradient to k. Where all are equal it is ln(1 + K). Test: test_info_nce_equation.
    """
    l_pos = (q * k.detach()).sum(1, keepdim=True)  # (N, 1)
    l_neg = q @ queue  # (N, K)
    logits = torch.cat([l_pos, l_neg], dim=1) / tau  # (N, 1 + K)
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)  # positives are the 0-th
    return F.cross_entropy(logits, labels)


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================


@torch.no_grad()
def ema_update(net_ema, net, m):
    """theta_ema <- m theta_ema + (1 - m) theta (slide "Momentum Contrast (MoCo)").

    The parameters alone, no buffers. m: a float or a 0-dim tensor. Test: test_ema_update.
    """
    ema, new = list(net_ema.parameters()), list(net.parameters())
    weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)
    torch._foreach_lerp_(ema, new, [weight] * len(new))  # in one pass; exact for m = 0 and 1


def random_queue(args):
    """(C, K) random unit keys, the same for the same seed."""
    draw = torch.Generator().manual_seed(args.seed)
    return F.normalize(torch.randn(args.dim, args.queue, generator=draw), dim=0)


def dequeue_and_enqueue(queue, ptr, k, finite=True):
    """Replace the oldest columns of queue (C, K), from ptr on, modulo K, by the keys k (N, C).

    -> the new ptr. finite: bool or 0-dim tensor, without it nothing changes. N is at most K.
    Test: test_queue.
    """
    columns = (ptr + torch.arange(len(k), device=k.device)) % queue.shape[1]
    finite = torch.as_tensor(finite, device=k.device)
    queue[:, columns] = torch.where(finite, k.T.to(queue.dtype), queue[:, columns])
    return (ptr + len(k) * finite) % queue.shape[1]


# ==================================================================================================
# Training
# ==================================================================================================


class Gather(torch.autograd.Function):
    """(n, ...) of every process -> (world n, ...), with gradient.

    Each process computes the loss of the whole batch. Backward adds what all of them say of a row,
    DistributedDataParallel averages over processes: together the gradient of one process.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone(memory_format=torch.contiguous_format))
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def shuffled(f_k, x, order, gathered, run):
    """Keys whose batch statistics are those of other images (v1, Section 3.3, "Shuffling BN").

    x (n, 3, S, S): views of this process; order (N,): a permutation of the images of all processes
    -> k (N, C), the keys of all, in their own order again. Test: test_shuffled.
    """
    mine = order.chunk(run.world)[run.rank]  # (n,) what this process encodes
    x = gathered(x)[mine].contiguous(memory_format=torch.channels_last)
    return gathered(f_k(x)[1])[order.argsort()]


def lr_by(schedule, step, steps, peak):
    """cosine: half a cosine to 0; step: a tenth of it after 60 and 80 % each. Test: test_lr_by."""
    if schedule == "step":
        return peak * 0.1 ** ((step >= 0.6 * steps) + (step >= 0.8 * steps))
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def update(loss, net, optimizer, scaler, buffers):
    """The optimiser's step -> loss, averaged over processes, and finite (0-dim bool). Where loss or
    gradient of any process are not, weights and momentum stay and buffers, a list of (b, b before
    the forward pass), go back. loss: 0-dim, or (T,) with its parts -> (T,).

    Decided on the device: the fused optimisers do nothing where found_inf is 1.
    """
    scaler.unscale_(optimizer)
    norms = torch._foreach_norm([p.grad for p in net.parameters() if p.grad is not None])
    loss = loss.detach().reshape(-1)
    said = torch.cat([~torch.isfinite(torch.stack(norms).sum() + loss.sum()).view(1), loss])
    if dist.is_initialized():
        dist.all_reduce(said)
        said[1:] /= dist.get_world_size()
    failed = (said[0] > 0).float()
    optimizer.grad_scale, optimizer.found_inf = None, failed
    optimizer.step()
    scaler.update()
    for b, before in buffers:
        b.copy_(torch.where(failed > 0, before, b))
    return said[1:], failed == 0


def load_weights(net, path):
    """Load last.pt or a released checkpoint (f_q with its head), or the backbone from a backbone.pt
    or torchvision's weights."""
    found, method = common.read_checkpoint(path), Path(__file__).stem
    if "state" in found:
        if found["method"] != method:
            common.fail(f"{path} is a run of {found['method']}, not of {method}; give its "
                        "backbone.pt")
        return common.load_into(net, found["state"]["net"], path)
    found, query = found.get("state_dict", found), "module.encoder_q."
    official = {k.removeprefix(query): v for k, v in found.items() if k.startswith(query)}
    if official:  # fc.weight in v1, fc.0.weight and fc.2.weight in v2
        names = {k: f"backbone.{k}" for k in official if not k.startswith("fc.")}
        names |= {k: f"head.0.{k[3:]}" if k.count(".") == 1 else f"head.{k[3:]}"
                  for k in official if k.startswith("fc.")}
        return common.load_into(net, {names[k]: v for k, v in official.items()}, path)
    backbone = {k: v for k, v in found.items() if not k.startswith("fc.")}  # fc: classifier
    common.load_into(net.backbone, backbone, path)
    print("the head stays random: what is said of q means nothing before training")


def train(args, stop):
    # -- setup
    begun, method = time.perf_counter(), Path(__file__).stem
    run = common.setup(args.device, args.amp)
    name = f"runs/{method}-{Path(args.dataset).name}-s{args.seed}" + "-eval" * bool(args.eval)
    folder = common.run_folder(args.out or name, args.resume)
    print(f"{method} on {args.dataset}, {run.world} x {run.name}, {run.dtype}, to {folder}")

    # -- data
    data = common.Data(args.dataset, args.data_dir, args.limit)
    complete(args, data.side, len(data))
    common.write(folder / "args.json", json.dumps(vars(args), indent=1))
    data.read(args.image_size, run.device, args.memory_limit, args.workers)
    n, batch = len(data.train.labels), args.batch_size
    per_epoch = max(n // batch, 1)
    steps = args.epochs * per_epoch
    print(f"{n:,} training images, {len(data.val[1]):,} validation images")
    if not args.eval and (n < batch or batch % run.world):
        common.fail(f"--batch-size {batch} has to be at most the number of training images, {n}, "
                    f"and a multiple of that of processes, {run.world}")

    # -- model
    net = build(args)
    if args.init or args.eval:
        load_weights(net, args.init or args.eval)
    net = net.to(run.device, memory_format=torch.channels_last)
    net_ema = copy.deepcopy(net).requires_grad_(False)  # f_k starts as f_q
    queue, ptr = random_queue(args).to(run.device), torch.tensor(0, device=run.device)
    compiled = torch.compile if args.compile else lambda f: f
    augmented, f_q, f_k = compiled(augment), compiled(net), compiled(net_ema)
    f_q = nn.parallel.DistributedDataParallel(f_q) if run.world > 1 else f_q
    gathered = Gather.apply if run.world > 1 else nn.Identity()
    shuffle = torch.Generator(run.device)
    state = {"net": net, "net_ema": net_ema, "queue": queue, "ptr": ptr}

    # -- optimiser
    K, peak = args.queue, args.lr * batch / 256
    half_life = math.log(2) / max(-math.log(args.m or 1e-9), 1e-9) / per_epoch
    optimizer = torch.optim.SGD(net.parameters(), peak, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    for p in net.parameters():  # PyTorch leaves it unset if the first step of all is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    chance = {"loss": math.log(1 + K)}  # when nothing is learned
    print(f"{steps:,} steps from lr {peak:.3g} = {args.lr:g} * {batch} / 256; {K:,} keys are "
          f"{K / n:.2g} epochs, half-life of f_k {half_life:.2g} epochs")
    if not args.eval and K < batch:
        common.fail(f"--queue {K} has to be at least the batch size, {batch}")
    parts = args.bn_splits
    if not args.eval and (batch % parts or parts % run.world or 2 * parts > batch):
        common.fail(f"--bn-splits {parts} has to divide --batch-size {batch} into parts of at "
                    f"least 2 images, and be a multiple of the processes, {run.world}")
    if K > n and not args.eval:
        print("warning: the queue holds more keys than there are images, lower --queue")
    if half_life > args.epochs / 10 and not args.eval:
        print("warning: the half-life of f_k is over a tenth of the run, lower --m")

    # -- resume
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    tally = torch.zeros(len(chance) + 2, device=run.device)  # sums, their number; failures in a row
    state |= {"optimizer": optimizer, "scaler": scaler, "tally": tally}
    start = {"step": 0, "seconds": 0.0, "rows": []}
    progress = common.restore(folder / "last.pt", method, args, state) if args.resume else start
    step, rows, saved = progress["step"], progress["rows"], time.perf_counter()
    look, caught = 10 if run.device.type == "cuda" else 1, 0  # to look at a GPU is to wait for it
    show_views(folder, data, args, run)
    for epoch in range(step // per_epoch, 0 if args.eval else args.epochs):
        first = step % per_epoch
        batches = data.epoch(epoch, first, batch, crops(args), run, args.seed)
        bar = common.Bar(batches, per_epoch, first, f"epoch {epoch + 1}/{args.epochs}")
        for views, _ in bar:
            # -- step
            rates = {"lr": lr_by(args.schedule, step, steps, peak),
                     "random_keys": max(0.0, 1 - (step + 1) * batch / K)}  # share of the queue
            for group in optimizer.param_groups:
                group["lr"] = rates["lr"]
            buffers = [(b, b.clone()) for f in (net, net_ema) for b in f.buffers()
                       if b.is_floating_point()]
            x_q, x_k = augmented(views, args)  # (n, 3, S, S) each, n images of this process
            shuffle.manual_seed(args.seed * 2**20 + step)  # the same in every process
            order = torch.randperm(batch, generator=shuffle, device=run.device)
            with run.autocast():
                _, q = f_q(x_q.contiguous(memory_format=torch.channels_last))  # (n, C)
                k = shuffled(f_k, x_k, order, gathered, run)  # (N, C), of all processes
            q, k = F.normalize(q.float()), F.normalize(k.float())
            loss = info_nce(q, k.chunk(run.world)[run.rank], queue, args.tau)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            losses, finite = update(loss, net, optimizer, scaler, buffers)
            ema_update(net_ema, net, torch.where(finite, args.m, 1.0))
            ptr.copy_(dequeue_and_enqueue(queue, ptr, k, finite))
            step += 1
            # -- log
            good, failures = finite.view(1), torch.where(finite, -tally[-1:], 1)
            tally += torch.cat([torch.where(finite, losses, 0), good, failures])
            if step % look == 0:
                *sums, good, failures = tally.tolist()
                said = "".join(f", {k} {v:.3g}" for k, v in rates.items())
                bar.say(f"loss {sums[0] / max(good, 1):.3f} (chance {chance['loss']:.3f}){said}")
                if failures >= 50 and scaler.get_scale() <= 1:
                    common.fail(f"no finite loss and gradient in 50 steps up to step {step}: lower "
                                "--lr or turn --amp off; nothing was saved since")
                if caught := stop.agreed(run.device):
                    break
        (*sums, good, _), seconds = tally.tolist(), bar.seconds  # in this order: a GPU ends first
        progress |= {"step": step, "seconds": progress["seconds"] + seconds}
        if step % per_epoch == 0:
            tally[:-1] = 0
            means = {k: total / good if good else None for k, total in zip(chance, sums)}
            row = {"epoch": epoch + 1, **means, **rates, "skipped": per_epoch - int(good),
                   "waiting": bar.waiting / seconds,
                   "images_per_second": (per_epoch - first) * batch / seconds}
            rows.append(row)
            said = [f"{k} {math.nan if means[k] is None else means[k]:.3f} (chance {c:.3f})"
                    for k, c in chance.items()]
            left = common.duration(progress["seconds"] / step * (steps - step))
            print(f"epoch {epoch + 1}: {', '.join(said)}, {row['skipped']} steps skipped, "
                  f"{row['images_per_second']:,.0f} images/s, {row['waiting']:.0%} waiting for "
                  f"data, {left} left")
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                row |= evaluate(state, data, args, run)
        # -- save
        common.write_rows(folder / "metrics.jsonl", rows)
        if caught or step == steps or time.perf_counter() - saved > 60:
            common.save(folder / "last.pt", method, args, state, progress)
            saved = time.perf_counter()
        if caught:
            print(f"stopped after step {step:,} of {steps:,}, --resume goes on from here")
            raise SystemExit(128 + caught)
    results = {"method": method} | vars(args) | {
        "device": run.name, "versions": {"torch": torch.__version__},
        "train_seconds": progress["seconds"],
        "images_per_second": step * batch / max(progress["seconds"], 1e-9)}
    results |= report(state, data, args, run)
    results["peak_memory_mb"] = common.peak_memory_mb(run.device)
    results["total_seconds"] = time.perf_counter() - begun
    finish(folder, state[KEPT], args, rows, results, [*chance])
    return results


def finish(folder, net, args, rows, results, terms):
    """Write backbone.pt, curves, options and results, and print how to load the backbone."""
    weights = {k: v.cpu().contiguous() for k, v in net.backbone.state_dict().items()}
    meta = vars(args) | {"mean": MEAN, "std": STD}
    common.write(folder / "backbone.pt", {"state_dict": weights, "meta": meta})
    common.curves(folder / "curves.png", rows, {
        "loss": terms, "validation, %": ["linear_top1", "knn_top1", "head_linear_top1"],
        "z": ["spread", "alignment", "uniformity"], "effective rank": ["rank_h", "rank_z"]})
    common.write(folder / "results.json", json.dumps(results, indent=1))
    print(f"{results['total_seconds']:.0f} s in all, {results['train_seconds']:.0f} s of training, "
          f"{results['images_per_second']:,.0f} images/s, {results['peak_memory_mb']:,.0f} MB peak")
    print(f"\nThe backbone, for (RGB in [0, 1] - {MEAN}) / {STD}:\n\n"
          f"{loading(args, folder / 'backbone.pt')}")


def loading(args, path):
    """Python that rebuilds the backbone with torchvision alone and loads the file strictly."""
    block, layers = ARCHS[args.arch]
    stem = "net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()\n"
    return (f"import torch\nfrom torch import nn\nfrom torchvision.models import resnet\n"
            f"net = resnet.ResNet(resnet.{block.__name__}, {layers})  # {args.arch}\n"
            f"{stem * (args.stem == '3x3')}net.fc = nn.Identity()\n"
            f"net.load_state_dict(torch.load({str(path)!r}, weights_only=True)['state_dict'])\n")


# ==================================================================================================
# Evaluation
# ==================================================================================================

KEPT = "net"  # of state: the network that is evaluated and written


def central(args, size=None):
    """The view for evaluation: a central square, of 7/8 of a larger image (released code)."""
    return [common.Crop(size or args.image_size, 1.0 if args.image_size <= 64 else 0.875)]


def show_views(folder, data, args, run):
    """views.png: eight training images and, to the right, what the network gets to see of them."""
    eight = torch.arange(min(8, len(data.train.labels)))
    draws = [next(common.batches(data.train, eight, 8, c, run.device, seed=(args.seed, i)))[0]
             for i, c in enumerate([central(args)] + [crops(args)] * 3)]
    seen = [v for views in draws[1:] for v in augment(views, args)]
    common.picture(folder / "views.png", draws[0] + seen)


@torch.no_grad()
def embed(f, crops, part, args, run, seed=None):
    """f: views -> tensors (B, ...); over part = (images, index) -> [tensors (n, ...), labels].

    Each process takes every world-th image, all get everything, in the order of index.
    """
    (images, index), rows = part, []
    n, most = len(index), -(-len(index) // run.world)
    share = index[torch.arange(run.rank, most * run.world, run.world) % n]  # equally many for each
    for x, i in common.batches(images, share, 512, crops, run.device, args.workers, seed):
        with run.autocast():
            out = f([v.contiguous(memory_format=torch.channels_last) for v in x])
        rows.append([*(t.float() for t in out), images.labels[i].to(run.device)])
    columns = [torch.cat(c) for c in zip(*rows)]
    if run.world > 1:
        columns = [torch.stack(Gather.apply(c).chunk(run.world), 1) for c in columns]
    return [c.flatten(0, 1)[:n] if run.world > 1 else c for c in columns]


def knn(x, y, x_test, y_test, k, tau):
    """Top-1 in % of the k nearest by cosine, with votes exp(cosine / tau) (Wu et al. 2018)."""
    x, right = F.normalize(x), 0
    for q, target in zip(x_test.split(1024), y_test.split(1024)):
        cosine, i = (F.normalize(q) @ x.T).topk(min(k, len(x)))  # (n, k)
        votes = q.new_zeros(len(q), int(y.max()) + 1).scatter_add_(1, y[i], (cosine / tau).exp())
        right += (votes.argmax(1) == target).sum().item()
    return 100 * right / len(x_test)


@torch.enable_grad()
def linear_probe(x, y, x_test, y_test, decay):
    """Top-1 in % of multinomial logistic regression on standardised features with an L2 penalty."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    w = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, device=x.device, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ w[1:] + w[0], y) + decay / 2 * w[1:].square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return 100 * ((x_test @ w[1:] + w[0]).argmax(1) == y_test).float().mean().item()


def probes(parts, args):
    """parts: (features, labels) of fit, val and perhaps test -> linear and k-NN top-1 on the last.

    The penalty is the best on val; for test the classifiers are then made from fit and val.
    """
    score = {d: linear_probe(*parts[0], *parts[1], d) for d in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)}
    best = max(score, key=score.get)
    bank = [torch.cat(t) for t in zip(*parts[:-1])]
    linear = linear_probe(*bank, *parts[2], best) if len(parts) > 2 else score[best]
    return linear, knn(*bank, *parts[-1], args.knn_k, args.knn_tau)


@torch.no_grad()
def health(state, data, args, run):
    """z of two views of up to 1024 validation images, in eval mode: figures and a verdict.

    spread: standard deviation of the unit vectors z / |z|, times sqrt(D): 1 all over the sphere, 0
    at a point. alignment: mean squared distance of two views; uniformity: log mean exp(-2 squared
    distance) of two images (Wang & Isola 2020). rank: exponential of the entropy of the singular
    values (RankMe, Garrido et al. 2023).
    """
    def both(x):
        return [t for v in augment(x, args)[:2] for t in state[KEPT](v)[:2]]

    part = data.val[0], data.val[1][:1024]
    out = embed(both, crops(args), part, args, run, seed=(args.seed, 2**31))
    h, z1, _, z2, _ = (t.nan_to_num(0, 0, 0) for t in out)
    z1, z2 = F.normalize(z1), F.normalize(z2)
    apart = torch.pdist(z1.cpu()).square()
    rank = {k: torch.linalg.svdvals(x.cpu()) for k, x in (("h", h), ("z", z1))}
    rank = {k: torch.special.entr(p / p.sum()).sum().exp().item() for k, p in rank.items()}
    figures = {"spread": z1.std(0).mean().item() * z1.shape[1] ** 0.5,
               "alignment": (z1 - z2).square().sum(1).mean().item(),
               "uniformity": (-2 * apart).exp().mean().log().item(),
               "rank_h": rank["h"], "rank_z": rank["z"]}
    return figures | {"verdict": verdict(figures, z1.shape, args, state)}


def verdict(figures, shape, args, state):
    """The figures of q, which has this shape, in words."""
    spread, rank, D = figures["spread"], figures["rank_z"], shape[1]
    flat = rank < 0.05 * min(shape)
    word = "collapsed to a point" if spread < 0.1 else "dimensional collapse" if flat else "healthy"
    random = (state["queue"].cpu() == random_queue(args)).all(0).float().mean().item()
    filling = f"queue still filling ({random:.0%} random keys), " * (random > 0 and not args.eval)
    return f"{filling}{word}: q has spread {spread:.2f} of 1, rank {rank:.0f} of {D}"


def evaluate(state, data, args, run, test=False):
    """Health and, where there are labels, top-1 of h and z, on validation or test images."""
    net = state[KEPT].eval()
    for b in net.buffers() if run.world > 1 else ():  # batch norm of CPU processes differs
        dist.broadcast(b, 0)
    results = health(state, data, args, run)
    if data.labelled:
        parts = [data.fit, data.val] + ([data.test] if test else [])
        parts = [embed(lambda x: net(x[0])[:2], central(args), p, args, run) for p in parts]
        results["linear_top1"], results["knn_top1"] = probes([(h, y) for h, _, y in parts], args)
        results["head_linear_top1"], results["head_knn_top1"] = probes([p[1:] for p in parts], args)
    top1 = [f"{k[:-5].replace('_', ' ')} {v:.1f}" for k, v in results.items() if k.endswith("top1")]
    print(f"{'test' if test else 'validation'}: {', '.join(top1 + [results['verdict']])}")
    net.train()
    return results


def report(state, data, args, run):
    """On the test set, read once: h and z beside the untrained network and raw pixels, a table."""
    results = evaluate(state, data, args, run, test=True)
    if data.labelled:
        untrained, few = build(args).to(run.device).eval(), central(args, min(args.image_size, 32))
        for name, f, view in (("untrained", lambda x: untrained(x[0])[:1], central(args)),
                              ("pixels", lambda x: [x[0].flatten(1)], few)):
            parts = [embed(f, view, p, args, run) for p in (data.fit, data.val, data.test)]
            results[f"{name}_linear_top1"], results[f"{name}_knn_top1"] = probes(parts, args)
        print(f"\ntop-1 in % on {len(data.test[1]):,} test images    linear   k-NN")
        for label, k in (("h, before the head", ""), ("z, after the head", "head_"),
                         ("h of the untrained network", "untrained_"),
                         ("raw pixels, at most 32 x 32", "pixels_")):
            print(f"{label:36} {results[k + 'linear_top1']:8.1f} {results[k + 'knn_top1']:6.1f}")
    return results


def main(argv=None):
    with common.Stop() as stop:
        return train(options(argv), stop)


if __name__ == "__main__":
    main()

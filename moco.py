"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning
He, Fan, Wu, Xie, Girshick, CVPR 2020, https://arxiv.org/abs/1911.05722 (v1)
Chen, Fan, Girshick, He, 2020, https://arxiv.org/abs/2003.04297 (v2, the default here)
Slides: "Momentum Contrast (MoCo)", "MoCov2 vs. SimCLR".

A query has to find the key of the same image among the keys of many other images. These keys wait
in a queue, so their number K does not depend on the batch size. They stay comparable because the
key encoder is a slow moving average of the query encoder.

Algorithm 1 of v1 (also on the slides), for a batch of N images:
    x_q, x_k = aug(x), aug(x)      two random augmentations              crops, augment
    q = f_q(x_q)                   queries, of unit length               MoCo.forward
    k = f_k(x_k)                   keys, without gradient                encode_shuffled
    L = mean -log( exp(q.k / tau) / (exp(q.k / tau) + sum_i exp(q.k_i / tau)) )      info_nce
    update f_q                     SGD                                   train, lr_by
    f_k = m f_k + (1 - m) f_q      momentum update                       ema_update
    enqueue k, dequeue the oldest  the queue stays at K keys             dequeue_and_enqueue

Symbols: x_q, x_k (N, 3, S, S) in [0, 1]; h (N, d) representations; q, k (N, C) unit vectors; queue
(C, K), a key k_i in each column; l_pos (N, 1) and l_neg (N, K) similarities; tau temperature; m
momentum. net is f_q, which is kept; net_ema is f_k. The slides write the denominator in two ways,
with k+ as a separate term and as a sum over K + 1 keys: the same if k+ is one of those keys.

Shuffling batch norm (v1, Section 3.3): if a query and its key shared batch statistics, the network
could match them by those statistics. Under torchrun every process has its own statistics, and the
images whose keys it encodes are dealt out at random. Within a process, the parts into which
--bn-splits divides a batch do the same.

Where this file departs from the papers and the released code:
  - f_k is updated after the SGD step, as in Algorithm 1 (released code: before keys are encoded).
    All keys are the same; only the final f_k has one update more.
  - Small sets use fewer keys (see keys), and on larger images runs of under 14,000 steps a smaller
    m (see momentum_k). K need not be a multiple of N, as the queue wraps around (released code: it
    must be).
  - The cosine schedule changes the rate every step (released code: every epoch).
  - The blur is a Gaussian a tenth of the image wide, edges reflected (released code: Pillow's three
    box blurs, edges repeated).
  - With a GPU, images up to 64 pixels follow the released CIFAR-10 demo, but with v2's head and
    ImageNet's mean and deviation. Each of the --bn-splits is a run of images (demo: every 8th). The
    demo's k-NN is that of q, with --knn-k 200 and --knn-tau 0.1.
  - The linear probe is fitted by L-BFGS, with an L2 penalty, on standardised features of central
    crops (papers: by SGD on random crops).
  - On a GPU the networks run in half precision (with --amp off in float32).
  - The built-in set, and small images without a GPU, have recipes of their own, sized for a CPU.

    python moco.py      52 s on 2 CPU cores; mean of three seeds: 96.8 % linear, 88.6 % k-NN; the
                        untrained network has 38.2 and 31.3 %, raw pixels have 27.0 and 38.2 %
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import FLAG, FROM_1, FROM_2, PIXELS, POSITIVE, SHARE, one_of

# ==================================================================================================
# Options
# ==================================================================================================

NETS = one_of(["convnet", "convnet_wide", "resnet18", "resnet34", "resnet50"])
V1 = {"head": "linear", "aug": "v1", "schedule": "step", "temperature": 0.07}  # what --v1 sets


def keys(args, n):
    """K for n images: n / 8, but at least N and at most 65536, as in the papers, or 4096 for views
    up to 64 pixels, as in the CIFAR-10 demo."""
    most = 65536 if args.image_size > 64 else 4096
    return max(args.batch_size, min(most, n // 8))


def momentum_k(args, n):
    """m for n images: 0.99 for views up to 64 pixels, as in the CIFAR-10 demo; else the half-life
    is a twentieth of the steps, with m at least 0.99 and at most 0.999 (the papers' value)."""
    most = 0.999 if args.image_size > 64 else 0.99
    return min(most, max(0.99, 0.5 ** (20 * args.batch_size / (args.epochs * n))))


# Defaults for the built-in set (sized for a CPU), for images up to 64 pixels, and for larger ones
# (the papers' ImageNet setting). Functions are called with (args, number of images). common.py adds
# --dataset, --seed, --amp, --resume and so on.
OPTIONS = {  # fmt: skip
    # option         built-in    to 64 px    larger      allowed        meaning
    "v1":           (False,      False,      False,      FLAG,          "as in the first paper"),
    "arch":         ("convnet",  "resnet18", "resnet50", NETS,          "encoders f_q, f_k"),
    "stem":         ("7x7",      "3x3",      "7x7",      "3x3|7x7",     "3x3: no max-pool"),
    "head":         ("mlp",      "mlp",      "mlp",      "linear|mlp",  "v1: linear, v2: mlp"),
    "dim":          (128,        128,        128,        FROM_1,        "C, width of q and k"),
    "temperature":  (0.2,        0.1,        0.2,        POSITIVE,      "tau (v1: 0.07, v2: 0.2)"),
    "bn_splits":    (2,          8,          8,          FROM_1,        "parts of N (v1: 8 GPUs)"),
    "image_size":   (32,         64,         224,        PIXELS,        "S, side of a view"),
    "aug":          ("v2",       "v2",       "v2",       "v1|v2",       "v1: strong hue, no blur"),
    "min_scale":    (0.5,        0.08,       0.2,        SHARE,         "least area of a crop"),
    "blur":         (0.0,        0.0,        0.5,        SHARE,         "probability, in v2"),
    "epochs":       (24,         200,        200,        FROM_1,        "(v2: 200 and 800)"),
    "batch_size":   (64,         512,        256,        FROM_2,        "N"),
    "lr":           (0.12,       0.03,       0.03,       POSITIVE,      "initial, times N / 256"),
    "schedule":     ("cosine",   "cosine",   "cosine",   "step|cosine", "v1: step, v2: cosine"),
    "weight_decay": (1e-4,       5e-4,       1e-4,       SHARE,         "L2 penalty"),
    "queue":        (keys,       keys,       keys,       FROM_1,        "K, number of keys"),
    "m":            (momentum_k, momentum_k, momentum_k, SHARE,         "momentum (0 fails)"),
}
# Without a GPU, images up to 64 pixels use the first column, except for:
CPU = {"arch": "convnet_wide", "min_scale": 0.2, "epochs": common.passes(1.5e6),
       "queue": lambda args, n: min(1024, keys(args, n))}

# ==================================================================================================
# Augmentation
# ==================================================================================================


def crops(args):
    """Random crops, two of every image (v1, Section 3.3, "Technical details"); the default least
    area of larger images, 0.2, is the released code's."""
    return [common.Crop(args.image_size, (args.min_scale, 1.0), ratio=(3 / 4, 4 / 3), count=2)]


def augment(views, args):
    """Colour jitter, grey, flip (v1, Section 3.3) and blur (v2, Section 3), drawn separately for
    every image. Order, hue and probabilities are those of the released code.

    views: list of (N, 3, S, S) in [0, 1] -> the same.
    """
    augmented = []
    for x in views:
        if args.aug == "v1":
            x = common.grey(x, p=0.2)
            x = common.color_jitter(x, 0.4, 0.4, 0.4, 0.4, p=1.0)
        else:
            x = common.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8)
            x = common.grey(x, p=0.2)
            if args.blur:
                taps = args.image_size // 20 * 2 + 1  # odd, a tenth of the image
                x = common.blur(x, sigma=(0.1, 2.0), taps=taps, p=args.blur)
        augmented.append(common.flip(x, p=0.5))
    return augmented


# ==================================================================================================
# Model
# ==================================================================================================

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for the input


def encoder(arch, stem, norm_layer=nn.BatchNorm2d):
    """(N, 3, S, S) -> (N, d): torchvision's ResNet without its classifier, or, for a CPU,
    four convolutions."""
    if arch.startswith("convnet"):
        widths, strides = (24, 48, 96, 96), (2, 2, 2, 1)
        if arch == "convnet_wide":
            widths, strides = (48, 96, 192, 384), (2, 2, 2, 2)
        layers, inputs = [], 3
        for outputs, stride in zip(widths, strides):
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            layers += [conv, norm_layer(outputs), nn.ReLU()]
            inputs = outputs
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.dim = outputs
        return net
    net = torchvision.models.get_model(arch, norm_layer=norm_layer)
    net.dim, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


ENCODER = common.source(encoder)  # printed at the end of a run


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalises each of `splits` parts of the batch separately.

    Test: test_split_batch_norm.
    """

    def __init__(self, features, splits):
        super().__init__(features)
        self.splits = splits

    def forward(self, x):
        """Normalise each part, N / parts consecutive images, by its own mean and variance, then
        scale and shift by weight and bias. x: (N, C, H, W) -> the same. The running statistics
        become the average of what they would be after each part. Parts are extra channels, for
        one call: compiled, it is much faster on a GPU than a call for each.
        """
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        mean = self.running_mean.repeat(self.splits)  # (parts C,)
        var = self.running_var.repeat(self.splits)
        weight = self.weight.repeat(self.splits)
        bias = self.bias.repeat(self.splits)
        x = x.unflatten(0, (self.splits, -1)).permute(1, 3, 4, 0, 2)  # (n, H, W, parts, C)
        x = x.flatten(3).permute(0, 3, 1, 2)  # (n, parts C, H, W)
        x = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(self.splits, -1).mean(0))
        self.running_var.copy_(var.view(self.splits, -1).mean(0))
        x = x.permute(0, 2, 3, 1).unflatten(3, (self.splits, -1))  # (n, H, W, parts, C)
        x = x.permute(3, 0, 1, 2, 4).flatten(0, 1)  # (N, H, W, C)
        return x.permute(0, 3, 1, 2)


class MoCo(nn.Module):
    """f_q or f_k: x (N, 3, S, S) -> h (N, d), and q or k (N, C), not yet of unit length."""

    def __init__(self, arch="resnet50", stem="7x7", head="mlp", dim=128, splits=1):
        super().__init__()
        split = functools.partial(SplitBatchNorm2d, splits=splits)
        self.backbone = encoder(arch, stem, split if splits > 1 else nn.BatchNorm2d)
        d = self.backbone.dim
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, dim))
        else:
            self.head = nn.Linear(d, dim)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.backbone((x - self.mean) / self.std)
        return h, self.head(h)


def build(args, splits=1):
    """The untrained network, determined by args.seed."""
    torch.manual_seed(args.seed)
    return MoCo(args.arch, args.stem, args.head, args.dim, splits)


# ==================================================================================================
# Loss
# ==================================================================================================


def info_nce(q, k, queue, tau):
    """InfoNCE (v1, equation 1; slide "Momentum Contrast (MoCo)"), the mean over the N queries of

        L_q = -log( exp(q . k+ / tau) / (exp(q . k+ / tau) + sum_i exp(q . k_i / tau)) )

    q, k: (N, C) unit vectors, row n of both from image n; queue: (C, K), a key k_i in each column
    -> scalar. No gradient to k. Equal vectors give ln(1 + K). Test: test_info_nce_equation.
    """
    l_pos = (q * k.detach()).sum(1, keepdim=True)  # (N, 1)
    l_neg = q @ queue  # (N, K)
    logits = torch.cat([l_pos, l_neg], dim=1) / tau  # (N, 1 + K)
    labels = q.new_zeros(len(q), dtype=torch.long)  # positives are the 0-th
    return F.cross_entropy(logits, labels)


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================


@torch.no_grad()
def ema_update(net_ema, net, m):
    """theta_k <- m theta_k + (1 - m) theta_q (v1, equation 2; slide "Momentum Contrast (MoCo)"),
    for the parameters alone: batch norm in f_k keeps statistics of its own.

    m: a float or a 0-dim tensor. Test: test_ema_update.
    """
    ema, new = list(net_ema.parameters()), list(net.parameters())
    weight = torch.as_tensor(1 - m, dtype=new[0].dtype, device=new[0].device)
    torch._foreach_lerp_(ema, new, [weight] * len(new))  # ema + (1 - m) (new - ema)


def random_queue(args):
    """(C, K) random unit keys, determined by args.seed."""
    draw = torch.Generator().manual_seed(args.seed)
    return F.normalize(torch.randn(args.dim, args.queue, generator=draw), dim=0)


def dequeue_and_enqueue(queue, ptr, k):
    """Replace the oldest columns of queue (C, K), in place, from ptr on, modulo K, by the keys
    k (N, C), of any floating-point type.

    ptr: an int or a 0-dim tensor -> the new one. N is at most K. Test: test_queue.
    """
    columns = (ptr + torch.arange(len(k), device=k.device)) % queue.shape[1]
    queue[:, columns] = k.T.to(queue.dtype)
    return (ptr + len(k)) % queue.shape[1]


# ==================================================================================================
# Training
# ==================================================================================================


def permutation(args, step, device):
    """(N,) the images of a batch in random order, the same in every process."""
    draw = torch.Generator(device).manual_seed(args.seed * 2**20 + step)
    return torch.randperm(args.batch_size, generator=draw, device=device)


def encode_shuffled(f_k, x_k, order, run):
    """Keys whose batch statistics are not those of their queries (v1, Section 3.3, "Shuffling BN").

    x_k: (n, 3, S, S) views of this process; order: (N,), a permutation of the images of all
    processes -> k (N, C), all keys in their original order. Test: test_encode_shuffled.
    """
    mine = order.chunk(run.world)[run.rank]  # (n,) what this process encodes
    _, k = f_k(run.gather(x_k)[mine])
    return run.gather(k)[order.argsort()]


def lr_by(schedule, step, steps, peak):
    """cosine (v2): half a cosine to 0. step (v1): a tenth from 60 % of the steps on, a hundredth
    from 80 % on. Test: test_lr_by."""
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
    if step < 0.6 * steps:
        return peak
    return peak * 0.1 if step < 0.8 * steps else peak * 0.01


# In the released checkpoints the head is called fc: one layer in v1, fc.0 and fc.2 in v2.
RENAMES = [(r"^encoder_q\.fc\.", "head."), (r"^encoder_q\.", "backbone.")]


def query_encoder(weights, net):
    """f_q alone: the released checkpoints hold f_k and the queue as well."""
    return {k: v for k, v in weights.items() if not k.startswith(("encoder_k.", "queue"))}


def check(args, per_epoch, world):
    """Reject options that cannot work and warn of bad ones, before hours are spent on them."""
    if args.eval:
        return
    N, K, splits = args.batch_size, args.queue, args.bn_splits
    half_life = math.log(0.5) / math.log(min(max(args.m, 1e-9), 1 - 1e-9)) / per_epoch
    print(f"{K:,} keys span {K / args.images:.2g} epochs, half-life of f_k: {half_life:.2g} epochs")
    if K < N:
        common.fail(f"--queue {K} has to be at least the batch size, {N}")
    if N % splits or splits % world or 2 * splits > N:
        common.fail(f"--bn-splits {splits} has to divide --batch-size {N} into parts of at least 2 "
                    f"images, and be a multiple of the number of processes, {world}")
    if K > args.images:
        print("warning: the queue holds more keys than there are images, lower --queue")
    if half_life > args.epochs:
        print("warning: the half-life of f_k is longer than the run, raise --epochs or lower --m")


def train(args, run):
    """-> the trained f_q and the data."""
    if args.v1:
        common.complete(args, OPTIONS, V1, n=0)  # those that are not given
    data = common.load_data(args, OPTIONS, run, CPU)
    N, K, steps = args.batch_size, args.queue, args.epochs * data.per_epoch
    peak = args.lr * N / 256
    if not args.eval:
        print(f"{steps:,} steps from lr {peak:.3g} = {args.lr:g} * {N} / 256")
    check(args, data.per_epoch, run.world)
    common.show_views(run, data, crops(args), lambda views: augment(views, args))

    # -- model: net is f_q, which is evaluated and kept; net_ema is f_k
    splits = args.bn_splits // run.world  # parts per process
    net, net_ema = build(args, splits), build(args, splits)
    common.load_weights(net, args, renames=RENAMES, adapt=query_encoder, mean=MEAN)
    net_ema.load_state_dict(net.state_dict())
    for f in (net, net_ema):  # every process normalises by its own images: see encode_shuffled
        f.to(run.device, memory_format=torch.channels_last)
    net_ema.requires_grad_(False)  # no gradient to keys: f_k is only a moving average
    queue, ptr = random_queue(args).to(run.device), torch.tensor(0, device=run.device)
    f_q, f_k, aug = run.parallel(net), run.compiled(net_ema), run.compiled(augment)

    # -- optimiser
    optimizer = torch.optim.SGD(net.parameters(), peak, momentum=0.9,
                                weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    state = {"net": net, "net_ema": net_ema, "queue": queue, "ptr": ptr, "optimizer": optimizer,
             "scaler": scaler}
    run.restore(state)  # with --resume: continues at the step where the run stopped
    undo = common.Undo(net, net_ema, queue, ptr)  # restores batch norm, queue, ptr if a step fails
    run.chance = {"loss": math.log(1 + K)}  # when nothing is learned

    for epoch in run.epochs(data):
        for step, views in run.batches(data, epoch, crops(args)):
            # -- step
            lr = lr_by(args.schedule, step, steps, peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_q, x_k = aug(views, args)  # (n, 3, S, S) each, n images of this process
            order = permutation(args, step, run.device)  # (N,)
            with run.autocast():
                _, q = f_q(x_q)  # queries (n, C)
                k = encode_shuffled(f_k, x_k, order, run)  # keys (N, C), of all processes
            q, k = F.normalize(q.float()), F.normalize(k.float())
            loss = info_nce(q, k.chunk(run.world)[run.rank], queue, args.temperature)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ok = run.update(optimizer, scaler, loss)  # optimizer.step(), skipped if not finite
            ema_update(net_ema, net, torch.where(ok, args.m, 1.0))  # EMA: f_k = m f_k + (1 - m) f_q
            ptr.copy_(dequeue_and_enqueue(queue, ptr, k))  # replaces the oldest keys
            undo(unless=ok)
            random_keys = max(0.0, 1 - (step + 1) * N / K)  # their share of the queue
            run.log(ok, loss=loss, lr=lr, random_keys=random_keys)
        # -- log and save
        if run.end_epoch(state):  # every --eval-every epochs
            evaluate(net, data, args, run)
        run.save(state)  # at most once a minute; after a signal the program ends here
    return net, data


# ==================================================================================================
# Evaluation
# ==================================================================================================


def linear_probe(fit, val, test=None, penalties=(1.0, 1e-1, 1e-2, 1e-3, 1e-4)):
    """Top-1 in % of logistic regression on frozen features; each part: (n, d), labels (n,).

    The L2 penalty is chosen on val. Without test: top-1 on val. With test: top-1 on test, after a
    refit with that penalty on fit and val. NaN if fit or val has features that are not finite.
    """
    if not common.finite(fit, val):
        return math.nan
    score, best = max(zip(regression_path(*fit, *val, penalties), penalties))
    if test is None:
        return score
    both = [torch.cat(pair) for pair in zip(fit, val)]
    return next(regression_path(*both, *test, [best]))


@torch.enable_grad()
def regression_path(x, y, x_test, y_test, penalties):
    """Fit x, y by L-BFGS and yield top-1 on x_test, y_test, for each penalty from strong to weak.

    x is standardised. Penalties are given for ten classes and rescaled for others. Each fit starts
    from the one before. L-BFGS solves for v, where w = v P: P, from the Cholesky factor of the
    Hessian at w = 0, is a preconditioner, which more than halves the number of steps.
    """
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    x, x_test = (x - mean).div_(std), (x_test - mean).div_(std)
    hessian = x.T @ x / len(x)  # about ten times the loss's, for ten classes
    hessian.diagonal().add_(0.3)  # and ten times a penalty of 0.03
    P = torch.linalg.inv(torch.linalg.cholesky(hessian))
    v = x.new_zeros(int(y.max()) + 1, len(P), requires_grad=True)
    b = x.new_zeros(len(v), requires_grad=True)
    for penalty in penalties:
        penalty *= 10 / len(v)  # with more classes the loss is flatter
        lbfgs = torch.optim.LBFGS(
            [v, b], max_iter=100, tolerance_change=1e-5, line_search_fn="strong_wolfe")

        def objective(penalty=penalty, lbfgs=lbfgs):
            lbfgs.zero_grad()
            w = v @ P
            loss = common.cross_entropy(x, w, b, y) + penalty / 2 * w.square().sum()
            loss.backward()
            return loss

        lbfgs.step(objective)
        correct = F.linear(x_test, v @ P, b).argmax(1) == y_test
        yield 100 * correct.float().mean().item()


def accuracies(f, names, crop, splits, run, limit=math.inf):
    """Linear and k-NN top-1 of each output of f, by name; splits: fit, val and perhaps test, of
    each of which at most `limit` images are used."""
    parts = [common.embed(f, part, crop, run, limit) for part in splits]
    results = {}
    for i, name in enumerate(names):
        labelled = [(part[i], part[-1]) for part in parts]
        results[f"{name}linear_top1"] = linear_probe(*labelled)
        results[f"{name}knn_top1"] = common.knn(*labelled, k=run.args.knn_k, tau=run.args.knn_tau)
    return results


def central(size):
    """The central square; above 64 pixels, 7/8 of its side (SimCLR's released code: above 32)."""
    return [common.Crop(size, scale=1.0 if size <= 64 else 0.875)]


def evaluate(net, data, args, run, test=False):
    """Is q healthy, and how well do h and q separate the classes?

    On validation images. With test, the accuracies are on the test images, next to those of two
    baselines: h of the untrained network, and raw pixels.
    """
    net.eval()
    run.broadcast(net)

    def two_views(views):  # augmented as in training
        (h, q1), (_, q2) = map(net, augment(views, args))
        return h, q1, q2

    results = common.health(*common.embed(two_views, data.val, crops(args), run, limit=1024),
                            name="q")
    share = run.rates.get("random_keys", 0)  # in the last step
    if share > 0:
        filling = f"queue still filling ({share:.0%} random keys)"
        results["verdict"] = f"{filling}, {results['verdict']}"
    view, small = central(args.image_size), central(min(args.image_size, 32))
    if data.labelled:
        splits = data.splits(test)
        results |= accuracies(lambda x: net(*x), ["", "head_"], view, splits, run)
    if data.labelled and test:
        floor = build(args).to(run.device).eval()
        results |= accuracies(lambda x: floor(*x)[:1], ["untrained_"], view, splits, run)
        results |= accuracies(lambda x: [x[0].flatten(1)], ["pixels_"], small, splits, run, 10_000)
    if test:
        common.export(lambda x: net(*x)[:1], data, view, run)  # with --embed
    net.train()
    return run.report(results, test)


def loading(args):
    """Python that rebuilds the backbone with torchvision alone; printed at the end of a run."""
    return ("import torch, torchvision\nfrom torch import nn\n\n"
            f"{ENCODER}\nnet = encoder({args.arch!r}, {args.stem!r})")


def main(argv=None):
    args = common.options("moco", __doc__, OPTIONS, argv)
    with common.Run(args) as run:
        net, data = train(args, run)
        results = evaluate(net, data, args, run, test=True)
        return run.finish(net.backbone, results, MEAN, STD, loading(args))


if __name__ == "__main__":
    main()

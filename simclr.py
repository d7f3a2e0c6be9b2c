"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations
Chen, Kornblith, Norouzi, Hinton, ICML 2020, https://arxiv.org/abs/2002.05709
Slides: "Contrastive Learning: Simple Framework for Contrastive Learning (SimCLR)".

Two random views of an image should be close, views of different images far apart. A network f and
a small head g embed both views of every image in a batch, and each view has to pick out its partner
among all other 2N - 1 views. After training g is thrown away and h = f(x) is the representation.

Algorithm 1 (on the slides), for a batch of N images:
 1. x1 = t(x), x2 = t'(x)       two random augmentations              `crops`, `augment`
 2. h = f([x1, x2])             representations of the 2N views       `SimCLR.forward`
 3. z = g(h)                    projections                           `SimCLR.forward`
 4. s_ij = sim(z_i, z_j) / tau  all pairs of views                    `nt_xent`
 5. L = mean_i -log( exp(s_ij) / sum_{k != i} exp(s_ik) ), j the other view of the same image
 6. update f and g              SGD, or LARS for large batches        `update`, `LARS`, `lr_at`

Symbols: x1, x2 (N, 3, S, S) views in [0, 1]; h (2N, d) representations; z (2N, D) projections, z1
and z2 its halves; s (2N, 2N) similarities; tau temperature. The slides number the two views of
image k as 2k - 1 and 2k, here they are k and k + N.

Departures from the paper:
 1. Crops are resized bilinearly with antialiasing (paper: bicubic), as two matrix products.
 2. The hidden layer of g has batch norm, as in the released code; the paper does not mention it.
    The last batch norm of a residual block does not start at zero as it does there.
 3. LARS multiplies by the learning rate after the momentum (released code: before), as BYOL's code
    does; the same while the rate is constant. Biases and batch norm have no weight decay.
 4. The loss is the paper's mean over 2N anchors; the released code adds the two halves, twice that.
 5. Warm-up is a share of the run. RECIPES: small images are trained by SGD with tau 0.2 (paper:
    LARS, 0.5), after published CIFAR-10 recipes; the built-in set has its own, sized for a CPU.

    python simclr.py    90 s on 2 CPU cores; top-1 of h: 74.0 +- 2.1 % linear, 54.7 +- 3.1 % k-NN,
                        3 seeds (untrained 27.4 and 29.9, pixels 29.6 and 48.5); README: more
"""

import argparse
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

RECIPES = {  # by data, an option overrides an entry; lr is for a batch of 256 and grows with it
    # the built-in set, on a CPU
    "shapes": dict(arch="resnet10", stem="7x7", image_size=32, min_scale=0.5, strength=0.5,
                   blur=0.0, tau=0.2, dim=128, epochs=8, batch_size=64, optimizer="sgd", lr=0.2,
                   weight_decay=1e-4),
    # images up to 64 pixels: no blur, half the strength, as for CIFAR-10 (Appendix B.9)
    "small": dict(arch="resnet18", stem="3x3", image_size=64, min_scale=0.08, strength=0.5,
                  blur=0.0, tau=0.2, dim=128, epochs=200, batch_size=512, optimizer="sgd", lr=0.3,
                  weight_decay=1e-4),
    # larger ones: the paper's ImageNet setting, with a batch for one GPU (the paper: 4096)
    "large": dict(arch="resnet50", stem="7x7", image_size=224, min_scale=0.08, strength=1.0,
                  blur=0.5, tau=0.1, dim=128, epochs=100, batch_size=256, optimizer="lars", lr=0.3,
                  weight_decay=1e-6),
}
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
    o("--out", help="output folder (runs/simclr-<dataset>-s<seed>)")
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
    o("--head", choices=["none", "linear", "mlp"], default="mlp", help="g (mlp)")
    o("--dim", type=whole(1), help="D, width of z (paper: 128)")
    o("--temperature", dest="tau", type=positive, help="tau (paper: 0.1, CIFAR-10 0.5)")
    o("--min-scale", type=share, help="smallest share of the image's area in a crop (paper: 0.08)")
    o("--strength", type=share, help="of the colour jitter (paper: 1, CIFAR-10 0.5)")
    o("--blur", type=share, help="probability of a blur (paper: 0.5, CIFAR-10 0)")
    o("--no-color", action="store_true", help="neither colour jitter nor grey images")
    o("--no-crop", action="store_true", help="the central square instead of random crops")
    o = p.add_argument_group("optimiser").add_argument
    o("--epochs", type=whole(1), help="passes over the training images (paper: 100 to 1000)")
    o("--batch-size", type=whole(2), help="N, images in a step of all processes (paper: 4096)")
    o("--optimizer", choices=["sgd", "lars"], help="(paper: lars)")
    o("--lr", type=positive, help="peak for a batch of 256, others in proportion (paper: 0.3)")
    o("--weight-decay", type=share, help="(paper: 1e-6)")
    o("--warmup", type=share, default=0.1, help="share of the run (0.1; paper: 10 epochs)")
    o = p.add_argument_group("evaluation").add_argument
    o("--eval-every", type=whole(0), help="epochs (a quarter of the run; 0: never)")
    o("--knn-k", type=whole(1), default=20, help="neighbours (20)")
    o("--knn-tau", type=positive, default=0.07, help="temperature of their votes (0.07)")
    o("--init", metavar="FILE", help="start from a backbone.pt, a last.pt or torchvision's weights")
    o("--eval", metavar="FILE", help="evaluate such a file, train nothing")
    return p.parse_args(argv)


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
    """The first part of t ~ T (Appendix A): random crops, two of every image."""
    scale, ratio = (1.0, None) if args.no_crop else ((args.min_scale, 1.0), (3 / 4, 4 / 3))
    return [common.Crop(args.image_size, scale, ratio, count=2)]


def augment(views, args):
    """The rest of it: views (N, 3, S, S) in [0, 1] -> same, an own draw for every image."""
    seen, s = [], args.strength
    for x in views:
        x = common.flip(x, p=0.5)
        if not args.no_color:
            x = common.color_jitter(x, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
            x = common.grey(x, p=0.2)
        if args.blur:  # as wide as a tenth of the image
            x = common.blur(x, sigma=(0.1, 2.0), taps=x.shape[-1] // 20 * 2 + 1, p=args.blur)
        seen.append(x)
    return seen


# ==================================================================================================
# Model
# ==================================================================================================


MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # of the input: RGB in [0, 1] as it is


def resnet(arch, stem, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet without its classifier: (N, 3, S, S) -> (N, d)."""
    net = ResNet(*ARCHS[arch], norm_layer=norm_layer)
    net.dim, net.fc = net.fc.in_features, nn.Identity()
    if stem == "3x3":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


class SimCLR(nn.Module):
    """f and g: (N, 3, S, S) -> h (N, d), z (N, D)."""

    def __init__(self, arch="resnet50", stem="7x7", head="mlp", dim=128):
        super().__init__()
        self.backbone = resnet(arch, stem)
        d = self.backbone.dim
        mlp = [nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, dim)]
        self.head = nn.Sequential(*{"none": [], "linear": mlp[3:], "mlp": mlp}[head])

    def forward(self, x):
        h = self.backbone(x)
        return h, self.head(h)


def build(args):
    """The untrained network: the same weights for the same seed whenever it is called."""
    torch.manual_seed(args.seed)
    return SimCLR(args.arch, args.stem, args.head, args.dim)


# ==================================================================================================
# Loss
# ==================================================================================================


def nt_xent(z1, z2, tau):
    """NT-Xent (paper, equation 1; slide "How does SimCLR work?"), its mean over the 2N anchors i:

        l_ij = -log( exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau) )

    z1, z2: (N, D), row n of both from image n -> scalar. Equal embeddings give ln(2N - 1).
    Test: test_nt_xent_equation.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D), so that sim is the dot product
    s = z @ z.T / tau  # (2N, 2N) pairwise similarities
    s = s.fill_diagonal_(-math.inf)  # k != i
    j = torch.arange(len(s), device=s.device).roll(len(z1))  # (2N,) the other view, i + N or i - N
    return F.cross_entropy(s, j)  # mean of -s_ij + log sum_k exp(s_ik)


# ==================================================================================================
# EMA / queue / centre
# ==================================================================================================

# None: the negatives are the rest of the batch.

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


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017). Test: test_lars_equation.

        v <- mu v + eta |w| / |g + wd w| (g + wd w),   w <- w - lr v      per tensor w

    Biases and normalisation (one dimension): v <- mu v + g.
    """

    def __init__(self, params, lr, momentum, weight_decay, eta=0.001):
        super().__init__(params, lr, momentum, fused=True)
        self.decay, self.eta = weight_decay, eta

    @torch.no_grad()
    def step(self):
        w = [p for group in self.param_groups for p in group["params"] if p.ndim > 1]
        g = [p.grad for p in w]
        torch._foreach_add_(g, w, alpha=self.decay)
        w_norm, g_norm = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(g))
        trust = torch.where(w_norm * g_norm > 0, self.eta * w_norm / g_norm, 1.0)
        torch._foreach_mul_(g, list(trust))
        super().step()


def lr_at(step, steps, warmup, peak):
    """Linear to peak in `warmup` steps, then a half cosine to 0. Test: test_lr_at."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


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
    """Load last.pt (all of net), or the backbone from a backbone.pt or torchvision's weights."""
    found, method = common.read_checkpoint(path), Path(__file__).stem
    if "state" not in found:
        found = found.get("state_dict", found)
        backbone = {k: v for k, v in found.items() if not k.startswith("fc.")}  # fc: classifier
        common.load_into(net.backbone, backbone, path)
        print("the head stays random: what is said of z means nothing before training")
    elif found["method"] == method:
        common.load_into(net, found["state"]["net"], path)
    else:
        common.fail(f"{path} is a run of {found['method']}, not of {method}; give its backbone.pt")


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
    if run.world > 1 and run.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif run.world > 1:
        print("note: no synchronised batch norm on CPUs, each process has its own statistics")
    net = net.to(run.device, memory_format=torch.channels_last)
    compiled = torch.compile if args.compile else lambda f: f
    augmented, model = compiled(augment), compiled(net)  # net stays as it is, for evaluation
    model = nn.parallel.DistributedDataParallel(model) if run.world > 1 else model
    gathered = Gather.apply if run.world > 1 else nn.Identity()
    state = {"net": net}

    # -- optimiser
    peak, warmup = args.lr * batch / 256, round(args.warmup * steps)
    kind = LARS if args.optimizer == "lars" else functools.partial(torch.optim.SGD, fused=True)
    optimizer = kind(net.parameters(), peak, momentum=0.9, weight_decay=args.weight_decay)
    for p in net.parameters():  # PyTorch leaves it unset if the first step of all is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    chance = {"loss": math.log(2 * batch - 1)}  # when nothing is learned
    print(f"{steps:,} steps, {warmup:,} of warm-up to lr {peak:.3g} = {args.lr:g} * {batch} / 256")
    if batch < 64:
        print("warning: a batch under 64 has few negatives, raise --batch-size")
    if args.warmup > 1 / 3:
        print("warning: over a third of the run is warm-up, lower --warmup")

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
            rates = {"lr": lr_at(step, steps, warmup, peak)}
            for group in optimizer.param_groups:
                group["lr"] = rates["lr"]
            buffers = [(b, b.clone()) for b in net.buffers() if b.is_floating_point()]
            x1, x2 = augmented(views, args)  # (N, 3, S, S) each
            x = torch.cat([x1, x2]).contiguous(memory_format=torch.channels_last)
            with run.autocast():
                h, z = model(x)  # (2N, d), (2N, D)
            z1, z2 = z.float().chunk(2)  # (N, D) each
            loss = nt_xent(gathered(z1), gathered(z2), args.tau)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            losses, finite = update(loss, net, optimizer, scaler, buffers)
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
    """The figures of z, which has this shape, in words."""
    spread, rank, D = figures["spread"], figures["rank_z"], shape[1]
    flat = rank < 0.05 * min(shape)
    word = "collapsed to a point" if spread < 0.1 else "dimensional collapse" if flat else "healthy"
    return f"{word}: z has spread {spread:.2f} of 1, rank {rank:.0f} of {D}"


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

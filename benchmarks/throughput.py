"""How fast is a method's training step, what would be the ceiling, and where does time go?

    python benchmarks/throughput.py simclr                               tiny, any machine
    python benchmarks/throughput.py byol --image-size 32 --compile --variants contiguous unfused
    python benchmarks/throughput.py moco --image-size 224 --folder PATH --out imagenet.csv

Options that are not listed in --help (--arch, --batch-size, --image-size, --amp, --compile,
--device, --workers, ...) are those of the method's file. Without --image-size it takes the recipe
for `shapes`, otherwise the one for images of that size, as if the set were as large as ImageNet.
The images are noise: content costs nothing. Nothing is evaluated or written during training.

  step      `train` of the file as it is, timed between the batches that it asks for
  network   forward, backward and fused SGD of the same networks on random views that lie ready,
            with the same autocast, memory format and --compile; a network without gradient has its
            forward alone: the ceiling. ibot, dinov2: under the masks of the first step, with the
            heads of patches; pretext: on what the task makes of the views, with its head
  crops     of uint8 images in memory; augment: the augmentation of all their views; on a GPU also
            with products in TF32 (errors of 1e-3), which the files leave off
  loss      forward and backward, on what it got in a step of the training; dinov2: and targets
  rest      what is left: guard, momentum updates, queues, masks, what a pretext task makes of its
            views, copies, the log

All figures of one call are of one process and one device. The parts are warmed up and then measured
in turns (A B C, A B C, ...) while the training stands still, and a ratio is the median of the
ratios of the rounds: clocks and neighbours change within minutes, and so cancel out.
"""

import argparse
import contextlib
import importlib
import itertools
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common

METHODS = {  # names of the losses, and the forward passes of a step -> list of what is trained; x:
    # views, or what a task makes of them, more: the other inputs of the two passes
    "pretext": (["loss"], lambda net, ema, x, more: net(*x, ask=True)),
    "simclr": (["nt_xent"], lambda net, ema, x, more: [net(torch.cat(x))[1]]),
    "moco": (["info_nce"], lambda net, ema, x, more: (ema(x[1]), [net(x[0])[1]])[1]),
    "byol": (["byol_loss"], lambda net, ema, x, more: (ema(*x), [net(*x)[2]])[1]),
    "dino": (["dino_loss"], lambda net, ema, x, more: (ema(*x[:2]), [net(*x)[2]])[1]),
    "ibot": (["ibot_loss"], lambda net, ema, x, more: (
        ema(*x[:2], with_patches=True), net(*x, with_patches=True, **more)[2:])[1]),
    "dinov2": (["sinkhorn_knopp", "class_loss", "masked_loss", "koleo"], lambda net, ema, x, more: (
        ema(*x[:2], hidden=more["hidden"]), net(*x, **more)[2:])[1]),
}
VARIANTS = {  # of the bare networks: memory format, fused optimiser, cuDNN without trying its
    # convolutions out, mode of torch.compile
    "contiguous": {"channels_last": False}, "unfused": {"fused": False},
    "untried": {"benchmark": False},
    "eager": {"mode": None}, "compile": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"}, "max-autotune": {"mode": "max-autotune"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}
IMAGES = 1_281_167  # ImageNet's, for what a recipe derives from the size of the set


def wait(device):
    """Until the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def masks(method, args, run):
    """What the networks of ibot and dinov2 get beside views: a step's masks, by name."""
    if method.__name__ == "ibot":
        return {"masks": method.draw_masks(0, args, run).to(run.device)}
    if method.__name__ == "dinov2":
        side = args.image_size // args.patch_size
        drawn = method.stratified_masks(0, side, args, run)
        return {k: v.to(run.device) for k, v in zip(("masks", "hidden"), drawn)}
    return {}


def bare(method, args, run, views, channels_last=True, fused=True, benchmark=True,
         mode="as the training"):
    """One step of the networks alone, on views of these shapes -> function."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    net, ema = method.build(args), method.build(args).requires_grad_(False)
    if getattr(args, "drop_path", 0):  # of the student alone, which saves work by it in dinov2
        net = method.build(args, args.drop_path)
    for f in (net, ema):
        f.to(run.device, memory_format=form)
    mode = ("default" if args.compile else None) if mode == "as the training" else mode
    models = [torch.compile(f, mode=mode) if mode else f for f in (net, ema)]
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, fused=fused)
    x, more = [torch.rand_like(v) for v in views], masks(method, args, run)
    if method.__name__ == "pretext":
        x, _ = net.head.make(torch.cat(x))
    x = [v.contiguous(memory_format=form) for v in x]
    _, forward = METHODS[method.__name__]

    def step():
        torch.backends.cudnn.benchmark = benchmark
        with run.autocast():
            out = forward(*models, x, more)
        optimizer.zero_grad()
        sum(t.float().square().mean() for t in out).backward()
        optimizer.step()

    return step


def again(value):
    """An argument of the loss, cut off from the network that made it."""
    if isinstance(value, list | tuple):
        return [again(v) for v in value]
    return value.detach().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value


def losses(calls):
    """Forward and backward of the losses on what they have been called with before."""
    found = [f(*again(a), **more) for f, a, more in calls]
    terms = [t for out in found for t in (out if isinstance(out, tuple) else [out])]
    sum(t.sum() for t in terms if t.requires_grad).backward()


def in_tf32(f):
    def faster():
        torch.backends.cuda.matmul.allow_tf32 = True
        f()
        torch.backends.cuda.matmul.allow_tf32 = False
    return faster


class Noise:
    """Stands in for common.Data: random images in memory, and an epoch that is the stop-watch."""

    side = property(lambda self: self.args.image_size)

    def __init__(self, own, args, method):
        self.own, self.args, self.method, self.seconds = own, args, method, {}

    def __len__(self):
        return IMAGES

    def read(self, size, device, *_):
        side = size if size <= 64 else size * 8 // 7
        n = self.own.images
        pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8).to(device)
        sizes, labels = torch.full((n, 2), side, device=device), torch.tensor(-1).expand(IMAGES)
        self.train = common.Images(labels, pixels, sizes)
        self.val = self.train, labels[:0]

    def batches(self, batch, crops, run, seed):
        for number in itertools.count():
            order = torch.randint(self.own.images, (1000 * batch,))  # copied to the device at once
            yield from common.batches(self.train, order, batch, crops, run.device, 0,
                                      (seed, number))

    @contextlib.contextmanager
    def timed(self, name, steps):
        """Add the seconds of a step to those of this name."""
        wait(self.run.device)
        begun = time.perf_counter()
        yield
        wait(self.run.device)
        self.seconds.setdefault(name, []).append((time.perf_counter() - begun) / steps)

    def epoch(self, number, first, batch, crops, run, seed):
        """Batches for the training loop: between two of them it does its step."""
        self.run, steps, calls = run, self.own.steps, []
        made = self.batches(batch, crops, run, seed)
        with self.timed("first", 1):
            yield next(made)
        names, _ = METHODS[self.method.__name__]
        held = self.method.TASKS[self.args.task] if hasattr(self.method, "TASKS") else self.method

        def noted(loss):
            return lambda *a, **more: calls.append((loss, again(a), more)) or loss(*a, **more)

        with mock.patch.multiple(held, **{name: noted(getattr(held, name)) for name in names}):
            yield next(made)
        for _ in range(4):
            yield next(made)
        wait(run.device)
        self.peak = common.peak_memory_mb(run.device)
        compiled = torch.compile if self.args.compile else lambda f: f
        augmented, more = compiled(self.method.augment), self.batches(batch, crops, run, seed)
        ready, _ = next(more)
        views = augmented(ready, self.args)
        self.views = len(views)
        parts = {
            "network": bare(self.method, self.args, run, views),
            "crops": lambda: next(more),
            "augment": lambda: augmented(ready, self.args),
            "loss": lambda: losses(calls),
        }
        if run.device.type == "cuda":  # matrix products of images in 10 bits
            parts |= {f"{k}, tf32": in_tf32(parts[k]) for k in ("crops", "augment")}
        for name in self.own.variants:
            parts[name] = bare(self.method, self.args, run, views, **VARIANTS[name])
        for f in parts.values():
            for _ in range(3):
                f()
        for _ in range(self.own.rounds):
            with self.timed("step", steps):
                for _ in range(steps):
                    yield next(made)
            for name, f in parts.items():
                with self.timed(name, steps):
                    for _ in range(steps):
                        f()


def training(own, args, method, add):
    """Rows on the step, its parts and the variants of the bare networks -> run."""
    data, stop, batches = Noise(own, args, method), common.Stop(), common.batches
    vars(args).update(dataset="noise", epochs=1, eval_every=0, eval=None, resume=False)
    stop.signal = 0  # not entered: Ctrl-C ends it at once

    def nothing(*_):
        return {}

    def held(images, order, *more):
        return batches(images, order % len(images.pixels), *more)

    silent = dict.fromkeys(("write", "write_rows", "save"), nothing)
    views = {"picturing": lambda epochs, *_: epochs} if hasattr(method, "picturing") else {
        "show_views": nothing}
    with (mock.patch.multiple(common, **silent, Data=lambda *_: data, batches=held,
                              run_folder=lambda *_: Path(os.devnull)),
          mock.patch.multiple(method, **views, report=nothing, finish=nothing)):
        method.train(args, stop)
    seconds = data.seconds
    add("first step", seconds.pop("first")[0], "s")
    add("peak memory of training", data.peak, "MB")
    for name, taken in seconds.items():
        rate, variant = args.batch_size / statistics.median(taken), name in own.variants
        label = f"network, {name}" if variant else name
        add(label, rate, "images/s", *(
            (ratio(seconds["network"], taken), "times the network's speed") if variant
            else (ratio(taken, seconds["step"]), "of the step's time")))
        add(label, data.views * rate, "views/s")
    add("step", ratio(seconds["network"], seconds["step"]), "of the ceiling's speed")
    parts = [sum(t) for t in zip(*(seconds[k] for k in ("network", "crops", "augment", "loss")))]
    add("rest", 1 - ratio(parts, seconds["step"]), "of the step's time")
    return data.run


def evaluation(own, args, method, run, add):
    """Rows on the parts of an evaluation: n images for the probes, as many to test on."""
    n, side, classes = own.eval_images, args.image_size, 10
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8).to(run.device)
    images = common.Images(torch.arange(n) % classes, pixels,
                           torch.full((n, 2), side, device=run.device))
    net = method.build(args).to(run.device, memory_format=torch.channels_last).eval()
    for _ in range(2):  # the second time counts
        wait(run.device)
        begun = time.perf_counter()
        h, y = method.embed(lambda x: net(x[0])[:1], method.central(args),
                            (images, torch.arange(n)), args, run)
        wait(run.device)
        taken = time.perf_counter() - begun
    add(f"features of {n:,} images", taken, "s", n / taken, "images/s")
    for name, f, more in (("k-NN", method.knn, (args.knn_k, args.knn_tau)),
                          ("a linear probe", method.linear_probe, (1e-3,))):
        begun = time.perf_counter()
        f(h, y, h, y, *more)
        wait(run.device)
        add(f"{name}, {n:,} images", time.perf_counter() - begun, "s")


def streaming(own, args, method, run, add):
    """Rows on reading a folder: bare Pillow, and the crops of the method by worker processes."""
    files, _ = common.Data(own.folder, args.data_dir, own.files).parts["train"]
    images = common.Images(torch.zeros(len(files), dtype=torch.int64), files=list(files))
    workers = args.workers
    # The first batch of every worker is not counted, as they are made while the workers start.
    batch = max(1, min(args.batch_size, len(files) // (8 * max(workers, 1))))

    def pillow():
        begun = time.perf_counter()
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB")
        return len(files) / (time.perf_counter() - begun)

    def stream():
        order = torch.randperm(len(files))
        for i, _ in enumerate(common.batches(images, order, batch, method.crops(args), run.device,
                                             workers, (args.seed,))):
            if i == max(workers, 1) - 1:
                wait(run.device)
                begun, left = time.perf_counter(), len(files) - batch * (i + 1)
        wait(run.device)
        return left / (time.perf_counter() - begun)

    pillow()  # now the files are in the system's cache
    rates = [(pillow(), stream()) for _ in range(own.rounds)]
    decoded, streamed = ([r[i] for r in rates] for i in (0, 1))
    each = [rate / max(workers, 1) for rate in streamed]
    add("Pillow decodes, one process", statistics.median(decoded), "images/s")
    add(f"streamed, {workers} workers", statistics.median(streamed), "images/s")
    add("streamed, each worker", statistics.median(each), "images/s", ratio(each, decoded),
        "of Pillow's rate")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--steps", type=int, default=10, help="in a turn (10; on a GPU take 50)")
    p.add_argument("--rounds", type=int, default=5, help="turns of each part (5)")
    p.add_argument("--images", type=int, default=1024, help="in memory to crop from (1024)")
    p.add_argument("--eval-images", type=int, default=1000, help="to evaluate, 0: none (1000)")
    p.add_argument("--variants", nargs="*", choices=VARIANTS, default=[],
                   help="other ways to run the bare networks, in the same rounds")
    p.add_argument("--folder", help="also stream the training images of this folder")
    p.add_argument("--files", type=int, default=2000, help="of the folder, at most (2000)")
    p.add_argument("--out", help="CSV to write")
    own, others = p.parse_known_args(argv)
    method, rows = importlib.import_module(own.method), []
    args = method.options(others)
    if args.compile or own.variants:  # with the limit of 8 the last variants would run eager
        torch._dynamo.config.recompile_limit = 64

    def add(quantity, value, unit, share=math.nan, share_unit=""):
        rows.append({"quantity": quantity, "value": f"{value:.4g}", "unit": unit,
                     "ratio": "" if math.isnan(share) else f"{share:.3f}", "is": share_unit})

    run = training(own, args, method, add)
    if own.eval_images:
        evaluation(own, args, method, run, add)
    if own.folder:
        streaming(own, args, method, run, add)
    cuda = run.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else platform.processor() or run.device.type
    what = {"method": own.method,
            "device": f"{device} x {torch.get_num_threads()} threads" * (not cuda) or device,
            "torch": torch.__version__, "dtype": str(run.dtype or torch.float32)[6:]}
    shown = "task arch stem patch_size image_size batch_size compile".split()
    what |= {k: getattr(args, k) for k in shown if hasattr(args, k)}
    if own.out:
        lines = [[*what, *rows[0]]] + [[*what.values(), *row.values()] for row in rows]
        text = "".join(",".join(str(v).replace(",", "") for v in line) + "\n" for line in lines)
        common.write(own.out, text)
    print("\n" + ", ".join(f"{k} {v}" for k, v in what.items()))
    for row in rows:
        print("{quantity:36} {value:>10} {unit:22} {ratio:>9} {is}".format(**row))
    return rows


if __name__ == "__main__":
    main()

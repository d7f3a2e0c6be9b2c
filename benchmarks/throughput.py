"""How fast is a training step of simclr.py, what would be the ceiling, and where does time go?

All figures of one call are of one device. Those that are compared are measured in turns (A B C,
A B C, ...) in the same run, and a ratio is the median of the ratios of the turns: clocks and
neighbours change within minutes, and so cancel out. Every part is warmed up first.

    python benchmarks/throughput.py                                      tiny, any machine
    python benchmarks/throughput.py --image-size 32 --compile --variants contiguous unfused compile
    python benchmarks/throughput.py --image-size 224 --folder PATH --out imagenet.csv

Options that are not listed in --help (--arch, --stem, --batch-size, --image-size, --amp, --compile,
--device, --workers, ...) are those of simclr.py. Without --image-size it takes its recipe for
`shapes`, otherwise the one for images of that size. The images are noise: content costs nothing.

  step      the step of simclr.train, line by line, with its functions: crops from uint8 images in
            memory, augmentation, forward, loss, backward, guarded update
  network   forward, backward and update of the same network on views that lie ready: the ceiling
  augment   the augmentation of both views; crops: the two crops of every image, in memory
  loss      the loss, forward and backward; what is left is the guard, the copies and the order
"""

import argparse
import itertools
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import simclr

VARIANTS = {  # of the bare network: memory format, fused optimiser, mode of torch.compile
    "contiguous": {"channels_last": False}, "unfused": {"fused": False},
    "eager": {"mode": None}, "compile": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"}, "max-autotune": {"mode": "max-autotune"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}


def wait(device):
    """Until the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def in_turns(parts, rounds, steps, device):
    """parts: name -> function of one step. -> name -> seconds a step, one for each round."""
    for f in parts.values():
        for _ in range(3):
            f()
    seconds = {name: [] for name in parts}
    for _ in range(rounds):
        for name, f in parts.items():
            wait(device)
            begun = time.perf_counter()
            for _ in range(steps):
                f()
            wait(device)
            seconds[name].append((time.perf_counter() - begun) / steps)
    return seconds


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def optimizer_of(net, args, fused=True):
    if args.optimizer == "lars" and fused:
        return simclr.LARS(net.parameters(), 0.1, 0.9, args.weight_decay)
    how = {"momentum": 0.9, "weight_decay": args.weight_decay, "fused": fused}
    return torch.optim.SGD(net.parameters(), 0.1, **how)


def bare(args, run, channels_last=True, fused=True, mode="as simclr.py"):
    """One step of the network alone -> function."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    net = simclr.build(args).to(run.device, memory_format=form)
    mode = ("default" if args.compile else None) if mode == "as simclr.py" else mode
    model = torch.compile(net, mode=mode) if mode else net
    optimizer = optimizer_of(net, args, fused)
    x = torch.rand(2 * args.batch_size, 3, args.image_size, args.image_size, device=run.device)
    x = x.contiguous(memory_format=form)

    def step():
        with run.autocast():
            _, z = model(x)
        optimizer.zero_grad()
        z.float().square().mean().backward()
        optimizer.step()

    return step


def endless(images, args, run):
    """Batches of random crops, pass after pass."""
    n, batch = len(images.labels), args.batch_size
    for epoch in itertools.count():
        order = torch.randperm(n)[: n // batch * batch]
        yield from common.batches(images, order, batch, simclr.crops(args), run.device,
                                  args.workers, (args.seed, epoch))


def full(args, run, images):
    """One step as in simclr.train -> function. Keep it the same as there."""
    net = simclr.build(args).to(run.device, memory_format=torch.channels_last)
    compiled = torch.compile if args.compile else lambda f: f
    view, model = compiled(simclr.augment), compiled(net)
    optimizer = optimizer_of(net, args)
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    batches = endless(images, args, run)

    def step():
        x, _ = next(batches)
        buffers = [(b, b.clone()) for b in net.buffers() if b.is_floating_point()]
        x = torch.cat([view(v, args) for v in x])
        with run.autocast():
            _, z = model(x.contiguous(memory_format=torch.channels_last))
        z1, z2 = z.float().chunk(2)
        loss = simclr.nt_xent(z1, z2, args.tau)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        simclr.update(loss, net, optimizer, scaler, buffers)

    return step


def training(own, args, run, add):
    """Rows on the step, its parts and the variants of the bare network."""
    side = args.image_size if args.image_size <= 64 else args.image_size * 8 // 7
    n = max(own.images, 2 * args.batch_size)
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8).to(run.device)
    sizes = torch.full((n, 2), side, device=run.device)
    images = common.Images(torch.zeros(n, dtype=torch.int64), pixels, sizes)
    begun = time.perf_counter()
    step = full(args, run, images)
    step()
    wait(run.device)
    add("time to first step", time.perf_counter() - begun, "s")
    for _ in range(5):
        step()
    wait(run.device)
    add("peak memory of training", common.peak_memory_mb(run.device), "MB")

    batches, compiled = endless(images, args, run), torch.compile if args.compile else lambda f: f
    view, (ready, _) = compiled(simclr.augment), next(batches)
    z = torch.randn(2, args.batch_size, args.dim, device=run.device, requires_grad=True)
    network = bare(args, run)
    seconds = in_turns({
        "step": step, "network": network, "crops": lambda: next(batches),
        "augment": lambda: torch.cat([view(v, args) for v in ready]),
        "loss": lambda: simclr.nt_xent(*z, args.tau).backward(),
    }, own.rounds, own.steps, run.device)
    for name, taken in seconds.items():
        rate = args.batch_size / statistics.median(taken)
        add(name, rate, "images/s", ratio(taken, seconds["step"]), "of the step's time")
        add(name, 2 * rate, "views/s")
    add("step", ratio(seconds["network"], seconds["step"]), "of the ceiling's speed")
    parts = [sum(t) for t in zip(*(seconds[k] for k in ("network", "crops", "augment", "loss")))]
    add("rest", 1 - ratio(parts, seconds["step"]), "of the step's time")
    for name in own.variants:
        other = bare(args, run, **VARIANTS[name])
        pair = in_turns({"network": network, name: other}, own.rounds, own.steps, run.device)
        rate = 2 * args.batch_size / statistics.median(pair[name])
        add(f"network, {name}", rate, "views/s", ratio(pair["network"], pair[name]),
            "times the network's speed")
        del other  # with it go a recorded graph and its memory


def evaluation(own, args, run, add):
    """Rows on the parts of an evaluation: n images for the probes, as many to test on."""
    n, side, classes = own.eval_images, args.image_size, 10
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8).to(run.device)
    images = common.Images(torch.arange(n) % classes, pixels,
                           torch.full((n, 2), side, device=run.device))
    net = simclr.build(args).to(run.device, memory_format=torch.channels_last).eval()
    for _ in range(2):  # the second time counts
        wait(run.device)
        begun = time.perf_counter()
        h, _, y = simclr.embed(lambda x: net(x[0]), simclr.central(args),
                               (images, torch.arange(n)), args, run)
        wait(run.device)
        taken = time.perf_counter() - begun
    add(f"features of {n:,} images", taken, "s", n / taken, "images/s")
    for name, f, more in (("k-NN", simclr.knn, (args.knn_k, args.knn_tau)),
                          ("a linear probe", simclr.linear_probe, (1e-3,))):
        begun = time.perf_counter()
        f(h, y, h, y, *more)
        wait(run.device)
        add(f"{name}, {n:,} images", time.perf_counter() - begun, "s")


def streaming(own, args, run, add):
    """Rows on reading a folder: bare Pillow, and the crops of simclr.py by worker processes."""
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
        for i, _ in enumerate(common.batches(images, order, batch, simclr.crops(args), run.device,
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
    p.add_argument("--steps", type=int, default=10, help="in a turn (10; on a GPU take 50)")
    p.add_argument("--rounds", type=int, default=5, help="turns of each part (5)")
    p.add_argument("--images", type=int, default=1024, help="in memory to crop from (1024)")
    p.add_argument("--eval-images", type=int, default=1000, help="to evaluate, 0: none (1000)")
    p.add_argument("--variants", nargs="*", choices=VARIANTS, default=[],
                   help="other ways to run the bare network, each in turns with the usual one")
    p.add_argument("--folder", help="also stream the training images of this folder")
    p.add_argument("--files", type=int, default=2000, help="of the folder, at most (2000)")
    p.add_argument("--out", help="CSV to write")
    own, others = p.parse_known_args(argv)
    args = simclr.options(others)
    simclr.complete(args, args.image_size)
    run = common.setup(args.device, args.amp)
    cuda = run.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else platform.processor() or run.device.type
    what = {"device": f"{device} x {torch.get_num_threads()} threads" * (not cuda) or device,
            "torch": torch.__version__, "dtype": str(run.dtype or torch.float32)[6:]}
    what |= {k: getattr(args, k) for k in "arch stem image_size batch_size compile".split()}
    rows = []

    def add(quantity, value, unit, share=math.nan, share_unit=""):
        rows.append({"quantity": quantity, "value": f"{value:.4g}", "unit": unit,
                     "ratio": "" if math.isnan(share) else f"{share:.3f}", "is": share_unit})
        print(".", end="", flush=True)

    training(own, args, run, add)
    if own.eval_images:
        evaluation(own, args, run, add)
    if own.folder:
        streaming(own, args, run, add)
    if own.out:
        lines = [[*what, *rows[0]]] + [[*what.values(), *row.values()] for row in rows]
        text = "".join(",".join(str(v).replace(",", "") for v in line) + "\n" for line in lines)
        common.write(own.out, text)
    print("\n\n" + ", ".join(f"{k} {v}" for k, v in what.items()))
    for row in rows:
        print("{quantity:36} {value:>10} {unit:22} {ratio:>9} {is}".format(**row))
    return rows


if __name__ == "__main__":
    main()

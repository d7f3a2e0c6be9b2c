"""How fast is a method's training step, what is the ceiling, and where does the time go?

    python benchmarks/throughput.py simclr                               tiny, any machine
    python benchmarks/throughput.py byol --image-size 32 --compile --variants unfused eager
    python benchmarks/throughput.py moco --image-size 224 --folder PATH --out imagenet.csv

Options that are not listed in --help (--arch, --batch-size, --image-size, --amp, --compile,
--device, --limit, ...) are those of METHOD.py. Without --image-size it takes the recipe for the
built-in set, otherwise the one for images of that size, as if the set were as large as ImageNet.

METHOD's `train` runs as it is, on a run that keeps time. One step is recorded: what the networks
and the augmentation were called with. Then these parts are timed in turns (A B C, A B C, ...) with
the steps of the training, and a ratio is the median over the rounds: clock rates and other load
change within minutes and so cancel out.

  step      the training, in the middle of its schedule: all of the below
  network   the ceiling: the networks on these inputs, forward, backward and fused SGD, with the
            same autocast, memory format and --compile; the teacher only forward
  crops     of uint8 images in memory
  augment   the augmentation of all their views
  rest      what is left: losses, optimiser beyond SGD, EMA, queues, masks, copies, the log
  VARIANTS  other ways to run the networks; on a GPU also crops and augment in TF32 (errors of 1e-3)

One process, one device.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

METHODS = "pretext simclr moco byol dino ibot dinov2".split()
IMAGES = 1_281_167  # ImageNet's, for what a recipe derives from the size of the set
VARIANTS = {
    "contiguous": {"channels_last": False},
    "unfused": {"fused": False},
    "untried": {"benchmark": False},  # cuDNN does not benchmark its convolutions
    "eager": {"mode": None},
    "compile": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}


def wait(device):
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def tensors(x):
    """All tensors in nested lists and tuples."""
    if isinstance(x, list | tuple):
        return [t for item in x for t in tensors(item)]
    return [x] if torch.is_tensor(x) else []


def contiguous_input(net, inputs):
    return inputs[0].contiguous(), *inputs[1:]


def bare(calls, run, mode, channels_last=True, fused=True, benchmark=True):
    """One step of the networks alone -> function. calls: (network, arguments) of a step."""
    nets = {net: copy.deepcopy(net) for net, *_ in calls}
    for net in nets.values():
        if not channels_last:
            net.to(memory_format=torch.contiguous_format)
            net.backbone.register_forward_pre_hook(contiguous_input)
    params = [p for net in nets.values() for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9, fused=fused)
    if mode:
        nets = {net: torch.compile(own, mode=mode) for net, own in nets.items()}

    def step():
        torch.backends.cudnn.benchmark = benchmark
        with run.autocast():
            outputs = [nets[net](*given, **named) for net, given, named in calls]
        loss = sum(t.float().square().mean() for t in tensors(outputs) if t.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.backends.cudnn.benchmark = True

    return step


def in_tf32(f):
    def faster():
        torch.backends.cuda.matmul.allow_tf32 = True
        f()
        torch.backends.cuda.matmul.allow_tf32 = False

    return faster


class Timed(common.Run):
    """A run of one epoch that keeps time: between two of its batches the training does a step.
    seconds: name of a part -> seconds per step, for each round; peak: MB of a GPU."""

    def __init__(self, args, own):
        super().__init__(args)
        self.own, self.calls, self.noting, self.seconds = own, [], False, {}
        self.peak = ""

    def compiled(self, f):
        called = super().compiled(f)

        def noted(*given, **named):
            if self.noting:
                self.calls.append((f, called, given, named))
            return called(*given, **named)

        return noted

    def epochs(self, data):
        self.per_epoch, self.steps = data.per_epoch, data.per_epoch * self.args.epochs
        self.step = self.steps // 2  # no warm-up, nothing frozen
        yield self.args.epochs // 2

    def end_epoch(self, state):
        return False

    def save(self, state):
        pass

    def endless(self, data, crops):
        while True:
            yield from super().batches(data, 0, crops)

    @contextlib.contextmanager
    def timed(self, name, steps):
        wait(self.device)
        begun = time.perf_counter()
        yield
        wait(self.device)
        self.seconds.setdefault(name, []).append((time.perf_counter() - begun) / steps)

    def batches(self, data, epoch, crops):
        own, given = self.own, self.endless(data, crops)
        with self.timed("first step", 1):
            yield next(given)
        self.noting = True
        yield next(given)
        self.noting = False
        yield next(given)
        if self.device.type == "cuda":
            wait(self.device)
            self.peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
        parts = self.parts(data, crops)
        for f in parts.values():
            for _ in range(3):
                f()
        for _ in range(own.rounds):
            with self.timed("step", own.steps):
                for _ in range(own.steps):
                    yield next(given)
            for name, f in parts.items():
                with self.timed(name, own.steps):
                    for _ in range(own.steps):
                        f()

    def parts(self, data, crops):
        """name -> function that does this part of a step."""
        batch, seed = self.args.batch_size, self.args.seed
        epochs = (data.epoch(n, 0, batch, crops, self, seed) for n in itertools.count())
        views = itertools.chain.from_iterable(epochs)
        nets = [(f, *given) for f, _, *given in self.calls if isinstance(f, torch.nn.Module)]
        others = [call for call in self.calls if not isinstance(call[0], torch.nn.Module)]

        def augment():
            for _, f, given, named in others:
                f(*given, **named)

        mode = "default" if self.args.compile else None
        parts = {"network": bare(nets, self, mode), "crops": lambda: next(views),
                 "augment": augment}
        if self.device.type == "cuda":  # matrix products of images with 10-bit mantissas
            parts |= {f"{name}, tf32": in_tf32(parts[name]) for name in ("crops", "augment")}
        for name in self.own.variants:
            parts[name] = bare(nets, self, **{"mode": mode} | VARIANTS[name])
        return parts


def rows_of(run, batch):
    """Rows (part, images/s, share of the step's time, times the network's speed)."""
    first, seconds = run.seconds.pop("first step")[0], run.seconds
    rows = []
    for name, taken in seconds.items():
        rows.append((name, batch / statistics.median(taken), ratio(taken, seconds["step"]),
                     ratio(seconds["network"], taken)))
    known = [sum(round_) for round_ in zip(*(seconds[k] for k in ("network", "crops", "augment")))]
    return first, [*rows, ("rest", None, 1 - ratio(known, seconds["step"]), None)]


def streaming(folder, method, args, run):
    """images/s from files: Pillow in one process, and the crops of the method by --workers."""
    data = common.Data(folder, limit=args.limit)
    data.read(args.image_size, run.device, 0, args.workers)
    files, workers = data.train.files, max(args.workers, 1)
    batch = max(1, min(args.batch_size, len(files) // (8 * workers)))
    rates = {"Pillow decodes, one process": [], f"streamed, {workers} workers": []}
    for _ in range(run.own.rounds):
        begun = time.perf_counter()
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB")
        decoded = len(files) / (time.perf_counter() - begun)
        views = data.epoch(0, 0, batch, method.crops(args), run, args.seed)
        for _ in range(workers):  # these are made while the workers start
            next(views)
        begun = time.perf_counter()
        images = batch * sum(1 for _ in views)
        wait(run.device)
        streamed = images / (time.perf_counter() - begun)
        for held, rate in zip(rates.values(), (decoded, streamed)):
            held.append(rate)
    return [(name, statistics.median(held), None, None) for name, held in rates.items()]


def options(argv=None):
    """The command line -> own options, those of METHOD.py, METHOD.py."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--steps", type=int, default=10, help="steps per turn (10; on a GPU take 50)")
    p.add_argument("--rounds", type=int, default=5, help="turns of each part (5)")
    p.add_argument("--variants", nargs="*", choices=VARIANTS, default=[],
                   help="other ways to run the bare networks, in the same rounds")
    p.add_argument("--folder", help="also stream the training images of this folder")
    p.add_argument("--out", help="CSV to write")
    own, others = p.parse_known_args(argv)
    method = importlib.import_module(own.method)
    args = common.options(own.method, method.__doc__, method.OPTIONS, others)
    column = 0
    if args.image_size is not None:
        column = 1 if args.image_size <= 64 else 2
    for name, row in method.OPTIONS.items():
        if getattr(args, name) is None:
            value = row[column]
            setattr(args, name, value(args, IMAGES) if callable(value) else value)
    args.limit = args.limit or max(1024, 8 * args.batch_size)  # each epoch makes a GPU wait once
    return own, args, method


def main(argv=None):
    own, args, method = options(argv)
    if args.compile or own.variants:  # with the limit of 8 the last variants would run eager
        torch._dynamo.config.cache_size_limit = 64
    with tempfile.TemporaryDirectory() as folder:
        args.out = f"{folder}/run"
        with Timed(args, own) as run:
            if run.world > 1:
                common.fail("one process only, without torchrun")
            method.train(args, run)
    first, rows = rows_of(run, args.batch_size)
    if own.folder:
        rows += streaming(own.folder, method, args, run)
    device = run.name
    if run.name == "cpu":
        device = f"{platform.processor() or 'cpu'} x {torch.get_num_threads()} threads"
    what = {"method": own.method, "device": device, "torch": torch.__version__,
            "dtype": str(run.dtype or torch.float32)[6:]}
    for name in "task arch stem patch_size image_size batch_size compile".split():
        what[name] = getattr(args, name, "")
    what |= {"first_step_s": f"{first:.1f}", "peak_memory_mb": run.peak}
    print("\n" + ", ".join(f"{k} {v}" for k, v in what.items()))
    print(f"{'':32} images/s  of the step's time  times the network's speed")
    lines = [[*what, "part", "images_per_second", "time_of_step", "speed_of_network"]]
    for name, *figures in rows:
        rate, share, speed = ("" if x is None else f"{x:.4g}" for x in figures)
        print(f"{name:32} {rate:>8} {share:>19} {speed:>26}")
        lines.append([*what.values(), name, rate, share, speed])
    if own.out:
        text = "".join(",".join(str(x).replace(",", "") for x in line) + "\n" for line in lines)
        common.write(own.out, text)
    return lines


if __name__ == "__main__":
    main()

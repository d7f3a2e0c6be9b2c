"""Images in, a run out: what every method file needs and no paper writes about.

You can understand a method without opening this file. It has three parts:
  - a run out: options, processes, precision, log, checkpoints (`options`, `Run`), the features of
    a set and what they say (`embed`, `knn`, `health`), pictures, files written whole or not at all;
  - image operations on batches, with separate random draws for every image;
  - images in: sets by name or folder (`Data`), in memory or streamed, and `batches` of crops.

Images are float32 (N, 3, H, W) in [0, 1] on the device, and stored as uint8.
"""

import argparse
import atexit
import codecs
import contextlib
import difflib
import errno
import functools
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageOps, PngImagePlugin
from torchvision import datasets
from torchvision.utils import save_image

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: Python 3.10 or newer is needed")
tqdm = None  # without it there is no progress bar, only one line per epoch
with contextlib.suppress(ImportError):
    from tqdm import tqdm
fcntl = None  # Windows has none, so a second process in a run's folder goes unnoticed
with contextlib.suppress(ImportError):
    import fcntl

# ==================================================================================================
# Errors and files
# ==================================================================================================


def fail(message):
    """End the program with one sentence on stderr and exit code 2."""
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def main_process():
    """Whether this is the first process of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def torchrun(name, default, below=math.inf):
    """A whole number from torchrun's environment variables: at least 0 and less than `below`."""
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) >= below:
        fail(f"{name} is {text!r}, and has to be a whole number below {below}")
    return int(text)


def printable(name):
    """name on one line, with control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def write(path, content):
    """Write a file; content: text, or a function that saves to the path it is given.

    The file is written whole or not at all, whatever happens. Only the first process writes.
    """
    if not main_process():
        return
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        if isinstance(content, str):
            part.write_text(content, "utf-8")
        else:
            content(part)
        for pause in (0.1, 1, 5, 0):
            try:
                return os.replace(part, path)
            except PermissionError:  # on Windows, as long as somebody reads the file
                if os.name != "nt" or not pause:
                    raise
                time.sleep(pause)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError in torch.save
        why = error if isinstance(error, OSError) else "the disk may be full"
        fail(f"{path} cannot be written: {why}")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # still there after an error or a second signal


def to_json(value):
    """Strict JSON: numbers that are not finite become null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None))


# ==================================================================================================
# Options
# ==================================================================================================


def number(kind, low, high=math.inf):
    """argparse's keywords for an int or a float from low to high, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= min(high, 1e300):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} ({low:g} to {high:g})"  # argparse: "invalid ... value: 4"
    return {"type": parse}


def one_of(names):
    return {"choices": [*names]}


FROM_0, FROM_1, FROM_2, PIXELS = (number(int, low) for low in (0, 1, 2, 8))
POSITIVE, SHARE = number(float, 1e-9), number(float, 0, 1)
FLAG, SWITCH = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """fail, and suggest an option for each unknown one that is spelled like it."""
        known = re.findall(r"--[\w-]+", self.format_help())
        for word in re.findall(r"(?<!\S)--[\w-]+", message.partition("unrecognized ")[2]):
            longer = [name for name in known if name.startswith(word)]
            for name in (longer or difflib.get_close_matches(word, known))[:1]:
                message += f" (for {word}, did you mean {name}?)"
        fail(message)


def options(method, doc, table, argv=None):
    """Parse the command line: the options of every script, and one for each row of table,

        name: (default for the built-in set, for images up to 64 pixels, for larger ones,
               what is allowed: "name|name|..." or keywords of argparse, meaning).

    A default may be a function of (args, number of images). Options of the table that are not
    given stay None until load_data knows the set. The table needs the rows arch (with one_of(names)
    as what is allowed), image_size, epochs and batch_size.
    """
    p = Parser(description=doc.split("\n")[0], allow_abbrev=False)
    p.set_defaults(method=method)
    o = p.add_argument_group("run").add_argument
    o("--seed", **number(int, 0, 2**31), default=0, help="seed of weights, order and draws (0)")
    o("--device", help="cuda, mps (PyTorch 2.13) or cpu (the first available)")
    o("--amp", **one_of(["auto", "bf16", "fp16", "off"]), default="auto",
      help="half precision for the networks (auto: on GPUs)")
    o("--compile", action="store_true", help="compile networks and augmentation")
    o("--out", help=f"output folder (next free runs/{method}-<dataset>-s<seed>)")
    o("--resume", action="store_true", help="resume the last unfinished run of --out, or begin one")
    o("--init", metavar="FILE", help="start from a backbone.pt, a last.pt or released weights")
    o("--eval", metavar="FILE", help="evaluate such a file without training")
    o = p.add_argument_group("data").add_argument
    o("--dataset", help="a folder or a name (toys; with --eval, that of its run): "
      + ", ".join([BUILT_IN, *SETS]))
    o("--data-dir", default="data", help="where downloaded sets are kept (data)")
    o("--labelled", metavar="SET", help="set for the probes, if --dataset has no labels")
    o("--limit", **FROM_1, help="use at most this many images of each split (all)")
    o("--workers", **FROM_0, default=cores(), help="threads that read files (one per core)")
    o("--memory-limit", **number(float, 0), default=memory(),
      help="GB; a larger folder is streamed (8, or a quarter of the memory if less; on Windows 2)")
    o = p.add_argument_group(
        "method", "defaults: built-in set | images up to 64 pixels (without a GPU: the first, "
        "changed by CPU in the file) | larger images").add_argument
    for name, (*defaults, allowed, meaning) in table.items():
        if isinstance(allowed, str):
            allowed = one_of(allowed.split("|"))
        if allowed is not FLAG:
            meaning = f"{meaning} ({' | '.join(map(show_value, defaults))})"
        flag = "--" + name.replace("_", "-")
        o(flag, **allowed, help=meaning.replace("%", "%%"), default=None)
    o = p.add_argument_group("evaluation").add_argument
    o("--eval-every", **FROM_0, help="epochs between evaluations (a quarter of the run; 0: never)")
    o("--knn-k", **FROM_1, default=20, help="neighbours (20)")
    o("--knn-tau", **POSITIVE, default=0.07, help="temperature of their votes (0.07)")
    o("--embed", metavar="FILE", help="write h, name, split, label of all images (.npz)")
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":
            fail(f"--{name.replace('_', '-')} is given without a value")
    if args.init and args.eval:
        fail("--init starts training and --eval does not train: give only one of the two")
    if args.init and not args.resume:
        read_checkpoint(args.init)  # fails before the set is read
    embed = Path(args.embed or "features.npz")
    if embed.is_dir() or not embed.parent.is_dir() or embed.suffix != ".npz":
        fail(f"--embed {args.embed}: give a .npz file in a folder that exists")
    if not args.dataset:
        made = {"dataset": BUILT_IN} | recall(args)
        args.dataset, args.labelled = made["dataset"], args.labelled or made.get("labelled")
    return args


def show_value(value):
    """0.5 -> '0.5', (1.0, 0.1) -> '1.0 0.1', a function -> 'computed', or its name if in words."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    if callable(value):
        return value.__name__ if " " in value.__name__ else "computed"
    return str(value)


def passes(images):
    """Default of --epochs: enough to process `images` images of 32 pixels in all, at most 200."""
    return lambda args, n: min(200, math.ceil(images / n * (32 / args.image_size) ** 2))


def choose_recipe(side, table, cpu, device):
    """Name and values of the recipe for images of this side in pixels; None: the built-in set.

    On a CPU, images of up to 64 pixels use the recipe of the built-in set, updated with cpu.
    """
    built_in, small, large = ({k: row[i] for k, row in table.items()} for i in range(3))
    if side is None:
        return "built-in", built_in
    if side <= 64 and device.type == "cpu":
        return f"CPU (with a GPU {small['arch']}, {small['epochs']} epochs)", built_in | cpu
    name, values = ("small", small) if side <= 64 else ("large", large)
    if device.type == "cpu":
        name += " (for a GPU; --image-size 64 takes one for a CPU)"
    return name, values | {"image_size": min(values["image_size"], side)}


def made_with(found):
    """The options of the run that wrote a file with this content; {} for released weights."""
    made = found.get("meta", found.get("args"))
    return made if isinstance(made, dict) else {}


def recall(args):
    """The options of the run that wrote the file of --eval, except --branch, which says what that
    run started from. If it is another method's, only those of the set and the network."""
    made = made_with(read_checkpoint(args.eval)) if args.eval else {}
    usual = "dataset labelled arch stem patch_size image_size".split()
    return {k: v for k, v in made.items()
            if k in usual or (made.get("method") == args.method and k != "branch")}


def at_most(batch_size, n):
    return min(batch_size, n // 8 * 8 or max(n, 2))


def complete(args, table, values, n):
    """Fill in the options of table that are None from values, for n training images."""
    for k, value in values.items():  # in order: a function may use the rows above its own
        if k in table and getattr(args, k) is None:
            value = value(args, n) if callable(value) else value
            if k == "batch_size":
                value = at_most(value, n)
            setattr(args, k, [*value] if isinstance(value, tuple) else value)


def load_data(args, table, run, cpu=()):
    """Find the set, fill in the options that are not given (from the recipe for the set or, with
    --eval, from the run that wrote the file), and read the set. cpu: see choose_recipe.

    The recipe depends on the smaller of --image-size and the side of the set's images.
    """
    made = recall(args)
    if made.get("arch", args.arch) not in (None, *table["arch"][3]["choices"]):
        fail(f"{args.eval} holds a {made['arch']}, which {args.method}.py does not have")
    out, roots = run.folder.resolve(), [Path(s) for s in (args.dataset, args.labelled) if s]
    if any(out.is_relative_to(root.resolve()) for root in roots) and find_images(out)[0]:
        fail(f"--out {run.folder} is a folder of the images: give the run one of its own")
    data = Data(args.dataset, args.data_dir, args.limit)
    size = args.image_size or made.get("image_size") or math.inf
    side = data.side and min(data.side, size)
    name, values = choose_recipe(side, table, dict(cpu), run.device)
    n, free = len(data.parts["train"][0]), args.batch_size is None
    complete(args, table, values | made, n)
    args.eval_every = math.ceil(args.epochs / 4) if args.eval_every is None else args.eval_every
    recipe = " ".join(f"{k}={show_value(getattr(args, k))}" for k in table)
    print(f"recipe {'of the file' if 'method' in made else name}: {recipe}")
    how = args.image_size, run.device, args.memory_limit, args.workers
    if args.labelled:  # first, as it is the smaller one
        data.probed = Data(args.labelled, args.data_dir)
        data.probed.read(*how)
        data.labelled or fail(f"--labelled {args.labelled} has no labels (train/<class>/*), either")
    data.read(*how)
    run.probed = data.probed
    args.images = n = len(data.train.labels)
    if free and not made:
        args.batch_size = at_most(args.batch_size, n)  # broken files are left out by now
    items, labels = data.parts["train"]  # no labels yet for the built-in set
    names = [os.path.basename(f) for f in items if isinstance(f, str)]
    args.checksum = zlib.crc32(repr((names, np.ravel(labels).tolist())).encode())
    print(f"{n:,} training images, {len(data.val[1]):,} for validation")
    found = [None] * run.world
    if run.world > 1:
        dist.all_gather_object(found, (n, args.checksum))
    if len({*found}) > 1:
        fail(f"the processes do not find the same images: {', '.join(f'{n:,}' for n, _ in found)}")
    if not args.eval and n < args.batch_size:
        fail(f"--batch-size {args.batch_size} is over the number of training images, {n}")
    if not args.eval and args.batch_size % run.world:
        fail(f"--batch-size {args.batch_size} is not a multiple of the number of processes, "
             f"{run.world}")
    if not len(data.val[1]) or (data.labelled and len(data.probed.fit[1]) < 2):
        fail("too few training images: one of a class with two is held out, and two must remain")
    data.per_epoch = max(n // args.batch_size, 1)
    return data


# ==================================================================================================
# A run: processes, precision, log, checkpoint
# ==================================================================================================


class Run:
    """A script's run, opened by `with`: device, rank, world, dtype, folder, step. Set chance: term
    of the loss, to be plotted -> its value where nothing is learned, to be printed.

    Under torchrun it joins the other processes, and only the first one prints. From the first to
    the last epoch SIGTERM, SIGINT and SIGHUP save a checkpoint and end the program; a second
    SIGTERM or SIGINT ends it at once (under torchrun, if at least five seconds have passed).
    """

    def __init__(self, args):
        self.args, self.begun = args, time.perf_counter()
        if hasattr(sys.stdout, "reconfigure"):  # a path may have what the terminal cannot print
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        self.world = torchrun("WORLD_SIZE", "1")
        args.processes = self.world
        try:
            self._choose_device(args.device, args.amp)
            negate = torch.compile(torch.neg) if args.compile else torch.neg
            negate(torch.zeros(2, device=self.device))
        except RuntimeError as error:  # a GPU that is busy or too old, no C++ compiler or Triton
            why = str(error).split("raised:\n")[-1].split("\n")[0]
            fail(f"{self.name}{' with --compile' if args.compile else ''} does not work: {why}")
        self._join()
        name = f"runs/{args.method}-{Path(os.path.abspath(args.dataset)).name}-s{args.seed}"
        self.folder = self._claim(args.out or name + ("-eval" if args.eval else ""))
        self.step, self.seconds, self.rows, self.rates, self.chance = 0, 0.0, [], {}, {}
        self.sums, self.bar, self.signal, self.stopped = None, None, 0, 0
        self.handlers, self.saved = contextlib.ExitStack(), time.perf_counter()
        self.every = 10 if self.device.type == "cuda" else 1  # in steps: a read waits for the GPU
        print(f"{args.method} on {args.dataset}, {self.world} x {self.name}, "
              f"{self.dtype or torch.float32}, to {printable(self.folder)}")

    def _choose_device(self, name, amp):
        found = ["cuda"] if torch.cuda.is_available() else []
        if torch.backends.mps.is_available() and torch.__version__ >= (2, 13) and self.world == 1:
            found.append("mps")  # before 2.13 some operations are missing or wrong; gloo: CPUs only
        found.append("cpu")
        name = name or found[0]
        if name not in found:
            fail(f"--device {name}: PyTorch {torch.__version__} finds {', '.join(found)} here (mps "
                 "needs 2.13 and a single process)")
        if name == "mps" and amp in ("bf16", "fp16"):
            fail("--amp has to be off on mps")
        self.device, self.name, auto = torch.device(name), name, None
        if name == "cuda":
            self.device = torch.device(name, torchrun("LOCAL_RANK", "0", torch.cuda.device_count()))
            self.name = torch.cuda.get_device_name(self.device)
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True  # picks fast convolutions: shapes stay the same
            auto = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        self.dtype = {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

    def _join(self):
        """Meet the other processes of torchrun, if there are any."""
        self.rank = torchrun("RANK", "0", self.world)
        if self.world > 1 and not dist.is_initialized():
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait, too
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            except (ValueError, RuntimeError) as error:  # no such address, a taken port
                fail(f"the processes of torchrun do not meet: {error}".split("\n")[0])
            atexit.register(dist.destroy_process_group)
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def _claim(self, out):
        """Make the folder of this run: out or, if another run has that, out-2, out-3, ...

        With --resume, take the unfinished run with the newest last.pt. If no run has a last.pt, a
        new one begins, so that a job that is restarted again and again can always pass --resume.
        """
        folders = [Path(out)] + [Path(f"{Path(out)}-{n}") for n in range(2, 1000)]
        claimed = [None, False]
        if main_process() and self.args.resume:
            begun = [f for f in folders if (f / "last.pt").exists()]
            stopped = [f for f in begun if not (f / "results.json").exists()]
            if begun and not stopped:
                fail(f"--resume: the run in {printable(out)} is finished, give another --out")
            stopped.sort(key=lambda f: os.path.getmtime(f / "last.pt"))
            if stopped:
                claimed = [stopped[-1], True]
            else:
                print(f"--resume: no last.pt in {printable(out)}, a run begins")
        if main_process() and not claimed[0]:
            claimed[0] = next(filter(claim, folders), None) or fail(f"too many runs in {out}-*")
        if self.world > 1:
            dist.broadcast_object_list(claimed)
        folder, self.args.resume = claimed
        return folder

    def __enter__(self):
        if main_process():
            self.lock = lock(self.folder)
        return self

    def __exit__(self, kind, error, _):
        self.handlers.close()
        if kind and self.world > 1 and not self.stopped:  # others may be waiting: do not wait
            atexit.unregister(dist.destroy_process_group)
        if main_process():
            os.close(self.lock)
        if kind and self.step == 0 and not self.args.resume and main_process():
            (self.folder / "args.json").unlink(missing_ok=True)  # the folder is free again
        if kind is KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        if kind is BrokenPipeError:  # | head
            sys.stdout = open(os.devnull, "w")
            fail("nothing reads the output any more")
        if re.search("MemoryError|out of memory|allocate memory|not enough memory", repr(error)):
            fail(f"the memory of {self.name} is not enough: lower --batch-size, now "
                 f"{self.args.batch_size}, --image-size or --memory-limit, or, in an evaluation, "
                 "probe on a smaller --labelled set")

    # -- networks and processes

    def autocast(self):
        """Autocast to half precision, if it is on: for networks, not for losses."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def place(self, net):
        """Move net to the device; with several GPUs, its batch norm spans all of them."""
        if self.world > 1 and self.device.type == "cuda":
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return net.to(self.device, memory_format=torch.channels_last)

    def compiled(self, f):
        """torch.compile(f) with --compile, else f."""
        return torch.compile(f) if self.args.compile else f

    def parallel(self, net):
        """net as it is called in a step: compiled with --compile, in DistributedDataParallel where
        there are several processes."""
        net = self.compiled(net)
        return torch.nn.parallel.DistributedDataParallel(net) if self.world > 1 else net

    def broadcast(self, net):
        """Give every process the buffers of the first: on CPUs each has its own batch norm."""
        if self.world > 1:
            for b in net.buffers():
                dist.broadcast(b, 0)

    def gather(self, x):
        """Rows of all processes, with gradient: (n, ...) -> (world n, ...).

        For losses that every process computes on the whole batch: each has the whole gradient of
        its own rows. That is multiplied by world here so that DistributedDataParallel, which
        averages, yields the gradient that a single process would have.
        """
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        if x.requires_grad:
            parts[self.rank] = x + (self.world - 1) * (x - x.detach())
        return torch.cat(parts)

    def mean(self, x):
        """Mean over all processes."""
        if self.world == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.world

    def update(self, optimizer, scaler, loss):
        """Take the optimiser's step, unless the loss or gradient of any process is not finite.

        Call it after scaler.unscale_ -> ok, a 0-dim bool tensor. This is decided on the device:
        fused optimisers leave weights and moments alone if their attribute found_inf, which
        GradScaler uses as well, is 1.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not optimizer.defaults.get("fused"):
            fail(f"{type(optimizer).__name__} needs fused=True, to leave out a step that failed")
        if not optimizer.state and optimizer.defaults.get("momentum"):
            for p in params:  # SGD leaves it unset if its very first step is skipped
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        norms = torch._foreach_norm([p.grad for p in params if p.grad is not None])
        failed = ~torch.isfinite(torch.stack(norms).sum() + loss.detach())
        optimizer.found_inf = self.mean(failed.float()).ceil()
        optimizer.step()
        scaler.update()
        return optimizer.found_inf == 0

    # -- the loop

    def epochs(self, data):
        """The epochs that are left to do; none with --eval."""
        write(self.folder / "args.json", to_json(vars(self.args)))
        self.per_epoch, self.steps = data.per_epoch, data.per_epoch * self.args.epochs
        if threading.current_thread() is threading.main_thread():
            stops = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                stops.append(signal.SIGHUP)  # sent when the terminal closes; nohup ignores it
            for number in stops:
                before = signal.signal(number, self._catch)
                self.handlers.callback(signal.signal, number, before)
        yield from range(self.step // self.per_epoch, 0 if self.args.eval else self.args.epochs)
        self.handlers.close()

    def _catch(self, number, frame):
        asked = (signal.SIGTERM, signal.SIGINT)
        if number not in asked:  # SIGHUP, which may come twice
            sys.stdout = sys.stderr = open(os.devnull, "w")
        elif self.signal in asked and (self.world == 1 or time.perf_counter() - self.noticed > 5):
            raise KeyboardInterrupt  # sooner, it may be the first one, passed on by torchrun
        self.noticed = self.noticed if self.signal else time.perf_counter()  # the first one
        self.signal = number

    def batches(self, data, epoch, crops):
        """(step, views) for what is left of an epoch; ends early after a signal."""
        self.first = self.step % self.per_epoch
        items = data.epoch(epoch, self.first, self.args.batch_size, crops, self, self.args.seed)
        if tqdm and sys.stderr and sys.stderr.isatty() and main_process():
            self.bar = tqdm(total=self.per_epoch, desc=f"epoch {epoch + 1}", leave=False)
        self.waiting = 0.0
        tick = self.epoch_begun = self.printed = time.perf_counter()
        for views, _ in items:
            self.waiting += time.perf_counter() - tick
            yield self.step, views
            if self.stopped:
                break
            tick = time.perf_counter()

    def log(self, ok, **figures):
        """End a step. Tensors are averaged over processes and over the steps of the epoch that are
        ok; numbers, such as rates, are recorded as they are. The first tensor is the loss."""
        terms = {k: v.detach().float() for k, v in figures.items() if torch.is_tensor(v)}
        self.rates = {k: v for k, v in figures.items() if k not in terms}
        self.terms = [*terms]
        if self.sums is None:
            self.sums = torch.zeros(len(terms) + 2, device=self.device)
        means = self.mean(torch.stack([*terms.values()]))
        self.sums[:-2] += torch.where(ok, means, 0)
        self.sums[-2] += ok  # good steps
        self.sums[-1] = torch.where(ok, 0, self.sums[-1] + 1)  # failed ones in a row
        self.step += 1
        if self.step % self.every == 0:
            self._look()

    def _look(self):
        """Read the sums to show progress, end a hopeless run, and check for a signal."""
        loss, *_, good, failed = self.sums.tolist()
        rates = "".join(f", {k} {v:.3g}" for k, v in self.rates.items())
        figures = f"loss {loss / max(good, 1):.3f}{self._chance('loss')}{rates}"
        if self.bar:
            self.bar.set_postfix_str(figures)
            self.bar.update(self.step % self.per_epoch - self.bar.n)
        elif time.perf_counter() - self.printed > 300:  # no bar, as in a log file, and a long epoch
            print(f"step {self.step:,} of {self.steps:,}: {figures}")
            self.printed = time.perf_counter()
        if failed >= 50:
            fail(f"no finite loss and gradient for 50 steps, up to {self.step}: lower --lr")
        self._heed()

    def _heed(self):
        """Share a signal that any process received, so that all stop after the same step."""
        self.stopped = self.signal
        if self.world > 1:
            stopped = torch.tensor(self.signal, device=self.device)
            dist.all_reduce(stopped, dist.ReduceOp.MAX)
            self.stopped = int(stopped)

    def _chance(self, name):
        return f" (chance {self.chance[name]:.3f})" if name in self.chance else ""

    def end_epoch(self, state):
        """Record and print the means of an epoch -> whether an evaluation is due.

        If so, save state first: evaluation may take long, and torchrun kills 30 s after a signal.
        """
        *sums, good, _ = self.sums.tolist()  # waits for the GPU, so read it before the clock
        seconds = time.perf_counter() - self.epoch_begun
        self.seconds += seconds
        if self.bar:
            self.bar.close()
        if self.step % self.per_epoch:
            return False  # cut short by a signal
        self.sums[:-1] = 0
        means = {k: total / good if good else math.nan for k, total in zip(self.terms, sums)}
        failed = self.per_epoch - int(good)
        images = (self.per_epoch - self.first) * self.args.batch_size
        row = {"epoch": self.step // self.per_epoch, **means, **self.rates, "skipped": failed,
               "waiting": self.waiting / seconds, "images_per_second": images / seconds}
        self.rows.append(row)
        figures = ", ".join(f"{k} {v:.3f}{self._chance(k)}" for k, v in means.items())
        left = self.seconds / self.step * (self.steps - self.step)
        print(f"epoch {row['epoch']}: {figures}, {failed} steps skipped, {images / seconds:,.0f} "
              f"images/s, {row['waiting']:.0%} waiting for data, {left / 60:.1f} min left")
        due = bool(self.args.eval_every) and row["epoch"] % self.args.eval_every == 0
        if due:
            self._write(state)
        return due

    # -- checkpoint and results

    def restore(self, state):
        """With --resume, load last.pt into state (modules, optimisers, tensors by name)."""
        if not self.args.resume:
            return
        saved = read_checkpoint(self.folder / "last.pt")
        if not {"method", "args", "state", "progress"} <= saved.keys():
            fail(f"--resume: last.pt in {self.folder} is not that of a run")
        free = ("resume out init random_head device dataset data_dir labelled workers "
                "memory_limit compile eval_every knn_k knn_tau embed").split()
        for name in ["method", *vars(self.args)]:
            had, value = saved["args"].get(name), getattr(self.args, name)
            if name not in free and had != value:
                fail(f"--resume: the run had {name} {had}, not {value}")
        for name, value in saved["state"].items():
            if isinstance(value, torch.Tensor):
                state[name].copy_(value)
            elif value:  # the state of a GradScaler that is off is empty
                state[name].load_state_dict(value)
        self.step, self.seconds, self.rows, sums = (
            saved["progress"][k] for k in ("step", "seconds", "rows", "sums"))
        self.sums = torch.tensor(sums, device=self.device)
        self.begun -= saved["progress"].get("total", 0.0)  # seconds until the run was stopped

    def save(self, state):
        """Write metrics.jsonl, and last.pt at most once a minute and at the end; after a signal
        the program ends here."""
        self._heed()  # a signal may have come during an evaluation
        self._write(state)
        if self.stopped:
            print(f"stopped after step {self.step:,} of {self.steps:,}, --resume goes on from here")
            raise SystemExit(128 + self.stopped)

    def _write(self, state):
        write(self.folder / "metrics.jsonl", "".join(to_json(row) + "\n" for row in self.rows))
        if time.perf_counter() - self.saved > 60 or self.stopped or self.step == self.steps:
            progress = {"step": self.step, "seconds": self.seconds, "rows": self.rows,
                        "sums": self.sums.tolist(), "total": time.perf_counter() - self.begun}
            held = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
            saved = {"method": self.args.method, "args": vars(self.args), "state": held,
                     "progress": progress}
            write(self.folder / "last.pt", lambda part: torch.save(saved, part))
            self.saved = time.perf_counter()

    def report(self, results, test):
        """Print an evaluation, with test also as a table beside the floors -> results.

        With --eval and a random head, accuracies of z and the verdict are left out.
        """
        if self.args.eval and self.args.random_head and ": h " not in results["verdict"]:
            results = {k: v for k, v in results.items() if not k.startswith("head_")}
            results["verdict"] = "the head is random: no verdict on z"
        tops = {k.removesuffix("_top1"): v for k, v in results.items() if k.endswith("_top1")}
        figures = "".join(f"{k.replace('_', ' ')} {v:.1f}, " for k, v in tops.items())
        print(f"{'test' if test else 'validation'}: {figures}{results['verdict']}")
        if test and tops:
            title = f"top-1 in % on {len(self.probed.test[1]):,} test images"
            print(f"\n{title:36} {'linear':>8} {'k-NN':>6}")
            for label, prefix in (("h, before the head", ""), ("z, after the head", "head_"),
                                  ("h of the untrained network", "untrained_"),
                                  ("raw pixels, at most 10,000 images", "pixels_")):
                if prefix + "linear" in tops:
                    linear, nearest = tops[prefix + "linear"], tops[prefix + "knn"]
                    print(f"{label:36} {linear:8.1f} {nearest:6.1f}")
        if self.rows and not test:
            self.rows[-1] |= results
        return results

    def finish(self, backbone, results, mean, std, loading):
        """Write backbone.pt, results.json and curves.png, and print how to load the backbone.

        loading: lines of Python that build the untrained backbone `net`.
        """
        path = self.folder.absolute() / "backbone.pt"
        weights = {k: v.cpu().contiguous() for k, v in backbone.state_dict().items()}
        saved = {"state_dict": weights, "meta": vars(self.args) | {"mean": mean, "std": std}}
        write(path, lambda part: torch.save(saved, part))
        results = vars(self.args) | results | {
            "device": self.name, "versions": {"torch": torch.__version__},
            "train_seconds": self.seconds, "total_seconds": time.perf_counter() - self.begun,
            "images_per_second": self.step * self.args.batch_size / max(self.seconds, 1e-9),
            "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20}  # 0 without CUDA
        of_weak = dict.fromkeys(k for row in self.rows for k in row
                                if k.endswith(("_accuracy", "_auc")))
        curves(self.folder / "curves.png", self.rows, {
            "loss": [*self.chance] or ["loss"],
            "validation, %": [*of_weak] or ["linear_top1", "knn_top1"],
            "z": ["spread", "alignment", "uniformity"], "effective rank": ["rank_h", "rank_z"]})
        write(self.folder / "results.json", to_json(results))
        print(f"{results['total_seconds']:.0f} s in all, {self.seconds:.0f} s of training, "
              f"{results['images_per_second']:,.0f} images/s")
        print(f"\nThe backbone, for (RGB in [0, 1] - {mean}) / {std}:\n\n{loading}\n"
              f"net.load_state_dict(torch.load({str(path)!r}, weights_only=True)"
              "['state_dict'])\nnet.eval()\n")
        return results


def claim(folder):
    """Make a folder for a run -> True, or False if another run already has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open(folder / "args.json", "x").close()  # fails where the file exists
        return True
    except OSError as error:
        if not os.path.exists(folder / "args.json"):
            fail(f"--out {folder}: no folder can be made there ({error.strerror})")
    return False


def lock(folder):
    """Lock the folder of a run; fail if another process holds it -> a descriptor to close later."""
    descriptor = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"the run in {folder} is still going on")
    except OSError:  # a file system without locks
        pass
    return descriptor


def source(f):
    """The lines of f, read at import: by the time they are printed, the file may have changed."""
    try:
        return inspect.getsource(f)
    except OSError:  # not from a file
        return ""


class Undo:
    """Put back what a failed step changes besides weights: tensors, and floating-point buffers of
    modules (batch norm's statistics)."""

    def __init__(self, *things):
        buffers = [b for x in things if isinstance(x, torch.nn.Module) for b in x.buffers()]
        self.live = [b for b in buffers if b.is_floating_point()]
        self.live += [x for x in things if isinstance(x, torch.Tensor)]
        self.good = [t.clone() for t in self.live]  # as the last step that did not fail left them

    def __call__(self, unless):
        for live, good in zip(self.live, self.good):
            good.copy_(torch.where(unless, live, good))
            live.copy_(good)


def cores():
    """How many processors this process may use; under torchrun, its share of them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, count // max(1, torchrun("LOCAL_WORLD_SIZE", "1")))


def memory():
    """GB for --memory-limit: 8 or, if less, a quarter of this process's share of the machine's
    memory, as a set is held twice for a while when it is read."""
    if not hasattr(os, "sysconf"):  # on Windows
        return 2
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # the limit of a container: a number, or "max"
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(8, round(size / 2**32 / max(1, torchrun("LOCAL_WORLD_SIZE", "1")), 1))


# ==================================================================================================
# Weights from files
# ==================================================================================================


def read_checkpoint(path):
    """Load the dict of tensors and plain Python values in a file to the CPU, or exit with code 2.

    Released checkpoints also hold argparse's Namespace and numpy scalars, older ones under the
    module names of numpy 1.
    """
    scalar = np.float64(0).__reduce__()[0]
    old = functools.partial(scalar)  # the same function by its older name
    vars(old).update(__module__="numpy.core.multiarray", __name__="scalar", __qualname__="scalar")
    dtypes = {type(np.dtype(t)) for t in "fdilq"}
    known = [argparse.Namespace, codecs.encode, np.dtype, scalar, old, *dtypes]
    torch.serialization.add_safe_globals(known)
    if not os.path.isfile(path):  # refuses pipes, too
        fail(f"{path} does not exist, or is no file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # cut short, or a pickle that wants to run code
        fail(f"{path} is no checkpoint of tensors and plain values ({type(error).__name__})")
    return found if isinstance(found, dict) else fail(f"{path} holds no dict of weights")


OTHER_INPUT = "patch jigsaw colorization splitbrain cpc".split()  # tasks that take no RGB images


def load_weights(net, args, kept="net", branch="teacher", renames=(), adapt=None, mean=None):
    """Load the file of --init or --eval into net, which has a `backbone` and heads beside it.

    It may be a last.pt of the same method, of which `kept` or the student `net` is loaded; or a
    backbone.pt, torchvision's, timm's or released weights, where the tensors may be nested under
    `branch` or a usual name.
    renames: (pattern, replacement) for names in the file; adapt: a last change to the dict of
    tensors; mean: of net's input, compared with the file's (ImageNet's if it names none).
    A file of weights that lacks a head leaves the heads random: then False is returned.
    """
    path = args.eval or args.init
    if not path or (args.resume and not args.eval):  # a resumed run has weights of its own
        return True
    weights = read_checkpoint(path)
    made = made_with(weights)
    is_run = "method" in weights and isinstance(weights.get("state"), dict)
    if is_run and weights["method"] != args.method:
        fail(f"{path} is a run of {weights['method']}: give its backbone.pt")
    if mean and not is_run:
        warn_of_another_input(path, made, args, mean)
    if is_run:
        weights = {"model": weights["state"].get("net" if branch == "student" else kept)}
    for key in (branch, "state_dict", "model"):
        weights = weights[key] if isinstance(weights.get(key), dict) else weights
    weights = {rename(k, renames): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not any(k.startswith("backbone.") for k in weights):
        weights = {f"backbone.{k}": v for k, v in weights.items()}
    if adapt:
        weights = adapt(weights, net)
    own = net.state_dict()
    classifier = ("backbone.fc.", "backbone.head.")
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith(classifier)}
    heads = [k for k in own if not k.startswith("backbone.")]
    whole = is_run or all(k in weights and weights[k].shape == own[k].shape for k in heads)
    if not whole:
        print("the head stays random: z means nothing before training")
        weights = {k: v for k, v in weights.items() if k.startswith("backbone.")}
        own = {k: v for k, v in own.items() if k.startswith("backbone.")}
    fits = [k for k, v in weights.items() if k in own and v.shape == own[k].shape]
    extra = [f"{k} {(*v.shape,)}" for k, v in weights.items() if k not in fits]
    missing = [k for k in own if k not in weights and "num_batches" not in k]  # not in old files
    print(f"{path}: {len(fits)} of {len(weights)} tensors loaded")
    if extra or missing:
        arch = f", --arch {made['arch']}" if "arch" in made else ""
        fail(f"{path} holds another network: it lacks {shortened(missing)}, unknown or of another "
             f"shape are {shortened(extra)}; give the options it was trained with{arch}")
    try:
        net.load_state_dict(weights, strict=False)
    except RuntimeError:
        fail(f"{path} holds tensors that are sparse, quantised or without values")
    if not all(torch.isfinite(v).all() for v in net.state_dict().values()):
        fail(f"{path} holds weights that are not finite")
    args.random_head = not whole
    return whole


def warn_of_another_input(path, made, args, mean):
    """Warn if the file's network was trained with another mean subtracted, or not on RGB images."""
    theirs = [*made.get("mean", (0.485, 0.456, 0.406))]
    if theirs != [*mean]:
        print(f"warning: {path} expects images less a mean of {theirs}, here it is {[*mean]}: its "
              "features are worse until it is trained")
    if made.get("task") in OTHER_INPUT and made["task"] != getattr(args, "task", None):
        print(f"warning: {path} is of --task {made['task']}, which does not take RGB images")


def rename(name, renames):
    """name without the prefixes of wrappers, then changed by each of renames in turn."""
    name = re.sub(r"^((module|_orig_mod|model|net|encoder)\.)+", "", str(name))
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def shortened(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


# ==================================================================================================
# Features and what they say
# ==================================================================================================


@torch.no_grad()
def embed(f, part, crops, run, limit=math.inf):
    """Call f(views), a tuple of (B, ...), on images of part = (images, index): all, or `limit`,
    evenly spaced, as index may be sorted by class.

    -> its outputs (n, ...) in float32, then the labels (n,), in the order of index. Each process
    takes every world-th image and gets the outputs of all.
    """
    images, index = part
    n = min(limit, len(index))
    index = index[torch.arange(n) * len(index) // n]
    n = math.ceil(len(index) / run.world)  # for every process
    mine = index[torch.arange(run.rank, n * run.world, run.world) % len(index)]
    rows = []
    for views, i in batches(images, mine, 512, crops, run.device, run.args.workers,
                            seed=(run.args.seed, 2**31)):
        with run.autocast():
            outputs = f(views)
        rows.append([*(t.float() for t in outputs), images.labels[i].to(run.device)])
    columns = [torch.cat(column) for column in zip(*rows)]
    if run.world > 1:  # process r has rows r, r + world, ...
        columns = [torch.stack(run.gather(c).chunk(run.world), 1).flatten(0, 1) for c in columns]
    return [c[: len(index)] for c in columns]


def export(f, data, crops, run, outputs=("h",)):
    """With --embed, write what f returns for the images of all splits as .npz, h (n, d), with name
    (of the file, or a number), split and label (-1: unknown), each (n,); without broken files.
    classes: name of each label."""
    if not run.args.embed:
        return
    splits = {"train": data.train} | {k: getattr(data, k)[0] for k in data.parts if k != "train"}
    found, columns = [], {"name": [], "split": [], "label": []}
    for split, images in splits.items():
        every = torch.arange(len(images.labels))
        *rows, i = (x.cpu() for x in embed(f, (replace(images, labels=every), every), crops, run))
        good = i == every  # another image stands in for a broken file
        found.append([x[good].numpy() for x in rows])
        columns["name"] += [str(images.names[j]) for j in i[good]]
        columns["split"] += [split] * len(i[good])
        columns["label"] += images.labels[good].tolist()
    arrays = {k: np.concatenate(parts) for k, parts in zip(outputs, zip(*found))}

    def save(part):
        with open(part, "wb") as file:  # savez would add .npz to the name
            np.savez(file, classes=data.classes, **arrays, **columns)

    write(run.args.embed, save)
    shapes = ", ".join(f"{k} {array.shape}" for k, array in arrays.items())
    print(f"{printable(run.args.embed)}: {shapes} of {', '.join(splits)}")


def finite(*parts):
    """Whether the features of all (features, labels) are finite."""
    return all(x.isfinite().all() for x, _ in parts)


def cross_entropy(x, w, b, y, most=2**16):
    """F.cross_entropy(F.linear(x, w, b), y), part by part if there are many rows.

    The backward pass computes each part again: the logits of a million images and 1,000 classes
    would take 4 GB.
    """
    def share(x, y):
        return F.cross_entropy(F.linear(x, w, b), y) * (len(x) / n)

    n = len(x)
    if n <= most:
        return share(x, y)
    return sum(torch.utils.checkpoint.checkpoint(share, *part, use_reentrant=False)
               for part in zip(x.split(most), y.split(most)))


def knn(fit, val, test=None, k=20, tau=0.07):
    """k-NN top-1 in %: the k nearest by cosine vote with exp(cosine / tau) (Wu et al. 2018).

    Each part: features (n, d), labels (n,). Without test, val is scored by its neighbours in fit;
    with test, test is scored by its neighbours in fit and val.
    """
    if not finite(fit, val):
        return math.nan
    x, y = fit if test is None else [torch.cat(pair) for pair in zip(fit, val)]
    x_test, y_test = val if test is None else test
    x, correct = F.normalize(x), 0
    for queries, labels in zip(x_test.split(1024), y_test.split(1024)):
        cosine, i = (F.normalize(queries) @ x.T).topk(min(k, len(x)))  # (n, k), nearest first
        votes = x.new_zeros(len(queries), int(y.max()) + 1)
        votes.scatter_add_(1, y[i], ((cosine - cosine[:, :1]) / tau).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(y_test)


def health(h, z1, z2, *_, name="z", least=0.1):
    """Statistics of h (n, d) and z1, z2 (n, D), of two views of n images, and a verdict.

    All but rank_h are of z / |z|: a loss that does not divide by |z| may shrink z unnoticed.
    spread: standard deviation times sqrt(D): 1 all over the sphere, 0 at a point, which is the
    verdict below `least`. alignment: mean squared distance of the two views; uniformity: log mean
    exp(-2 squared distance) of two images (Wang & Isola 2020). rank: exp of the entropy of the
    singular values (RankMe, Garrido et al. 2023). name: what z is called in the verdict.
    """
    n, D = z1.shape
    if n < 4 or not all(torch.isfinite(t).all() for t in (h, z1, z2)):
        return {"verdict": f"{n} images, too few to say" if n < 4 else "features are not finite"}
    z1, z2 = F.normalize(z1), F.normalize(z2)
    figures = {"spread": z1.std(0).mean().item() * D**0.5,
               "alignment": (z1 - z2).square().sum(1).mean().item(),
               "uniformity": (-2 * torch.pdist(z1.cpu()).square()).exp().mean().log().item(),
               "rank_h": effective_rank(h), "rank_z": effective_rank(z1)}
    spread, rank = figures["spread"], figures["rank_z"]
    word = "dimensional collapse" if rank < 0.03 * min(n, D) else "healthy"
    if spread < least:
        word = "collapsed to a point"
    figures["verdict"] = f"{word}: {name} has spread {spread:.2f} of 1, rank {rank:.0f} of {D}"
    return figures


def effective_rank(x):
    """exp of the entropy of the singular values of x (n, d), scaled to sum to 1."""
    p = torch.linalg.svdvals(x.cpu())
    return torch.special.entr(p / p.sum().clamp(min=1e-12)).sum().exp().item()


# ==================================================================================================
# Pictures
# ==================================================================================================


def show_views(run, data, crops, augment):
    """views.png: eight training images, each followed by views as the network gets them."""
    if run.args.resume and not run.step:  # restore may still refuse
        return
    eight = torch.arange(min(8, len(data.train.labels)))
    columns = []
    for i, c in enumerate([[Crop(crops[0].size, 1.0)], crops, crops, crops]):
        views, _ = next(batches(data.train, eight, 8, c, run.device, seed=(run.args.seed, i)))
        columns += augment(views) if i else views
    picture(run.folder / "views.png", columns)


def curves(path, rows, panels):
    """A PNG of rows (dicts with "epoch") by epoch; panels: title -> keys. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for ax, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for key in keys:
            has = [row for row in rows if key in row]
            ax.plot([row["epoch"] for row in has], [row[key] for row in has], ".-", label=key)
        ax.set(title=title, xlabel="epoch")
        ax.legend(fontsize=8)
    write(path, lambda part: figure.savefig(part, format="png"))


def picture(path, columns):
    """A PNG with a row per image: columns is a list of (N, 3, H, W) in [0, 1]."""
    size = max(96, *(c.shape[-1] for c in columns))
    tiles = torch.stack([F.interpolate(c.float().cpu(), (size, size)) for c in columns], 1)
    write(path, lambda part: save_image(tiles.flatten(0, 1), part, nrow=len(columns), padding=4,
                                        pad_value=1.0, format="png"))


# ==================================================================================================
# Image operations: x (N, 3, H, W) in [0, 1] -> same; draws are from the device's global generator
# ==================================================================================================


def uniform(low, high, shape, device):
    return torch.rand(shape, device=device) * (high - low) + low


def coin(x, p):
    """(N, 1, 1, 1) bool, true with probability p, one draw for each image of x."""
    return torch.rand(len(x), 1, 1, 1, device=x.device) < p


def random_boxes(sizes, scale, ratio, tries=10):
    """RandomResizedCrop's boxes: sizes (N, 2) height, width -> (N, 4) top, left, height, width.

    An area of scale[0] to scale[1] of the image with a log-uniform aspect in ratio, the first of
    `tries` that fits; if none does, the largest central box within ratio, as in torchvision.
    """
    shape, device = (len(sizes), tries), sizes.device
    H, W = sizes.float().split(1, dim=1)  # (N, 1)
    area = uniform(*scale, shape, device) * H * W
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), shape, device).exp()
    w, h = (area * aspect).sqrt().round().clamp(min=1), (area / aspect).sqrt().round().clamp(min=1)
    fits = (w <= W) & (h <= H)
    first, found = fits.byte().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    w = torch.where(found, w.gather(1, first), W.minimum((H * ratio[1]).round()).clamp(min=1))
    h = torch.where(found, h.gather(1, first), H.minimum((W / ratio[0]).round()).clamp(min=1))
    room = torch.cat([H - h, W - w], 1)
    corner = (torch.rand(room.shape, device=device) * (room + 1)).floor().minimum(room)
    return torch.cat([torch.where(found, corner, (room / 2).floor()), h, w], 1)


def central_boxes(sizes, share):
    """The central square of `share` times the shorter side: sizes (N, 2) -> boxes (N, 4)."""
    side = (sizes.amin(1, keepdim=True) * share).round().clamp(min=1).expand(-1, 2)
    return torch.cat([((sizes - side) / 2).floor(), side], 1)


def resize_weights(start, length, out, size):
    """(N, out, size): row o weighs the pixels [start, start + length) of a line for output pixel o.

    When shrinking, a triangle one output pixel wide at half height: torchvision's antialias=True.
    """
    length = length.view(-1, 1, 1)
    pixel = torch.arange(size, device=start.device) + 0.5 - start.view(-1, 1, 1)  # (N, 1, size)
    centre = (torch.arange(out, device=start.device).view(1, -1, 1) + 0.5) * length / out
    w = (1 - ((pixel - centre) / (length / out).clamp(min=1)).abs()).clamp(min=0)
    w = w * ((pixel > 0) & (pixel < length))
    return w / w.sum(2, keepdim=True)


def crop_resize(x, boxes, out):
    """Each image's box (N, 4) of whole pixels resized to (out, out): two matrix products."""
    rows = resize_weights(boxes[:, 0], boxes[:, 2], out, x.shape[2])  # (N, out, H)
    cols = resize_weights(boxes[:, 1], boxes[:, 3], out, x.shape[3])  # (N, out, W)
    return rows.unsqueeze(1) @ x @ cols.unsqueeze(1).mT


def flip(x, p):
    return torch.where(coin(x, p), x.flip(3), x)


def to_grey(x):
    """(N, 3, H, W) -> (N, 1, H, W), torchvision's weights."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def grey(x, p):
    return torch.where(coin(x, p), to_grey(x), x)


def turn_hue(x, shift):
    """Turn the hue by shift (N, 1, 1, 1) of a full turn: adjust_hue, via value, chroma, hue."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    (r, g, b), c = x.split(1, 1), chroma.clamp(min=1e-12)
    green_or_blue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, green_or_blue) + 6 * shift  # in sixths of a turn
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + hue) % 6
    return value - chroma * k.minimum(4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, p):
    """torchvision's ColorJitter with probability p; every image has its own factors and order.

    Brightness, contrast and saturation are blends with black, the mean grey and the grey image.
    Turning the hue takes most of the time, so it comes first, second, third and last for one
    random quarter of the batch each.
    """
    n, device, jittered = len(x), x.device, coin(x, p)
    draws = uniform(-1, 1, (3, n), device)
    strengths = (brightness, contrast, saturation)
    factor = torch.stack([1 + draw * most for draw, most in zip(draws, strengths)]).clamp(min=0)
    shift = torch.where(jittered, uniform(-hue, hue, (n, 1, 1, 1), device), 0.0)
    order = torch.rand(3, n, device=device).argsort(0)
    factor = torch.where(jittered.flatten(), factor, 1.0).gather(0, order)
    shuffle = torch.rand(n, device=device).argsort()  # PyTorch 2.11 can't compile x[randperm(n)]
    x = x[shuffle]
    for turn in range(4):
        quarter = slice(n * turn // 4, n * (turn + 1) // 4)
        x[quarter] = turn_hue(x[quarter], shift[quarter])
        if turn < 3:
            which, f = (t[turn].view(-1, 1, 1, 1) for t in (order, factor))
            g = to_grey(x)
            black_or_mean = torch.where(which == 0, 0.0, g.mean((2, 3), keepdim=True))
            x = torch.lerp(torch.where(which == 2, g, black_or_mean), x, f).clamp(0, 1)
    return torch.empty_like(x).index_copy_(0, shuffle, x)


def solarize(x, p, threshold=0.5):
    """Invert values at or above the threshold, with probability p: v -> 1 - v."""
    return torch.where(coin(x, p) & (x >= threshold), 1 - x, x)


def blur(x, sigma, taps, p):
    """Gaussian blur: sigma from a range in pixels, kernel `taps` (odd) wide, edges reflected."""
    s = torch.where(coin(x, p), uniform(*sigma, (len(x), 1, 1, 1), x.device), 1e-3).view(-1, 1)
    offset = torch.arange(taps, device=x.device) - taps // 2
    k = torch.exp(-0.5 * (offset / s) ** 2)  # (N, taps); sigma 1e-3 leaves the image as it is

    def band(length):  # (N, 1, length, length): the convolution of a line as a matrix
        to = (torch.arange(length, device=x.device).unsqueeze(1) + offset).abs()
        to = (length - 1 - (length - 1 - to).abs()).expand(len(x), -1, -1)
        weights = (k / k.sum(1, keepdim=True)).unsqueeze(1).expand_as(to)
        return x.new_zeros(len(x), length, length).scatter_add_(2, to, weights).unsqueeze(1)

    return band(x.shape[2]) @ x @ band(x.shape[3]).mT


# ==================================================================================================
# Images in: the built-in set
# ==================================================================================================

BUILT_IN, SIZES = "toys", {"train": 4000, "test": 2000}

THINGS = {  # parts, from back to front: a texture, then shapes that are joined (+) or cut out (-)
    "fish": "plain +-.75,0,.4,.42 --1,0,.28,.28; rings +.13,0,.79,.48",
    "house": "bricks +0,-.21,.55,.55,.42; plain +0,.51,.72,.03,.34",
    "tree": "plain +0,-.81,.15,.15,.35; dots +0,.14,.62,.62",
    "car": "plain +0,-.02,.86,.86,.24 +-.03,.34,.45,.45,.23; checks +-.45,-.34,.25,.25"
           " +.46,-.34,.25,.25",
    "shirt": "across +0,-.12,.43,.43,.59 +0,.31,.86,.86,.2",
    "boat": "plain +0,-.28,.69,1.01,.23; diagonal +0,.5,.55,.03,.53",
    "cup": "plain +.42,.04,.4,.4 -.42,.04,.23,.23; checks +-.09,-.01,.49,.49,.63",
    "flower": "plain +0,-.74,.07,.07,.35 +0,.49,.28,.28 +.44,.18,.28,.28 +-.44,.18,.28,.28"
              " +.26,-.3,.28,.28 +-.26,-.3,.28,.28; dots +0,.05,.24,.24",
    "bag": "plain +0,.35,.47,.47 -0,.35,.31,.31; zigzag +0,-.09,.64,.64,.48",
    "bottle": "upright +0,-.18,.43,.43,.68; plain +0,.78,.17,.17,.45",
}
TEXTURES = {  # bright where it is over 0, dark where it is under 0
    "plain": lambda x, y: 0 * x,
    "across": lambda x, y: (16 * y).sin(),
    "upright": lambda x, y: (16 * x).sin(),
    "diagonal": lambda x, y: (12 * (x + y)).sin(),
    "checks": lambda x, y: (14 * x).sin() * (14 * y).sin(),
    "bricks": lambda x, y: (6 * x).sin() * (15 * y).sin(),
    "dots": lambda x, y: (12 * x).sin() * (12 * y).sin() - 0.2,
    "rings": lambda x, y: (16 * torch.hypot(x, y)).sin(),
    "zigzag": lambda x, y: (14 * y + 1.6 * (7.5 * x).sin()).sin(),
}


def covered(shapes, x, y):
    """Whether points are in shapes: ellipses "+x,y,w,h" with radii w and h, and trapezoids
    "+x,y,b,t,h" with half width b at the bottom and t at the top, and half height h."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    for shape in shapes:
        cx, cy, *sizes, h = map(float, shape[1:].split(","))
        dx, dy = x - cx, (y - cy) / h
        if len(sizes) == 1:
            here = (dx / sizes[0]) ** 2 + dy**2 < 1
        else:
            here = (dx.abs() < torch.lerp(*torch.tensor(sizes), (dy + 1) / 2)) & (dy.abs() < 1)
        inside = inside | here if shape[0] == "+" else inside & ~here
    return inside


def toys(n, size, seed):
    """n images, each of one thing made of textured parts on a plain, darker background: images
    (n, 3, size, size) uint8, labels (n,), parts (n, size, size) uint8, numbered from 1, 0 where
    there is none, depth of the same shape, 0 near to 1 far, and factors: name -> (n,).

    The class is the kind of thing. The factors do not depend on it: radius, x and y of the centre
    (in half sides of the image), tilt in degrees, direction, lightness, contrast of the textures,
    ground. All kinds have the same area on average, stand upright and are lit from above; colour
    follows from lightness.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=g) % len(THINGS)
    ranges = {"radius": (math.log(0.65), 0), "x": (-1, 1), "y": (-1, 1), "tilt": (-25, 25),
              "direction": (-1, 1), "lightness": (0.6, 0.8), "contrast": (0.11, 0.17),
              "ground": (0.42, 0.45)}
    f = {k: torch.rand(n, generator=g) * (b - a) + a for k, (a, b) in ranges.items()}
    f["radius"], f["direction"] = f["radius"].exp(), f["direction"].sign()
    for place in "xy":
        f[place] *= 1 - 0.65 * f["radius"]
    light, depth = torch.empty(2, n, size, size)
    parts = torch.empty(n, size, size, dtype=torch.uint8)
    fine = (torch.arange(2 * size) + 0.5) / size - 1  # 2 x 2 points a pixel
    px, py = fine.view(1, 1, -1), -fine.view(1, -1, 1)
    for kind in labels.unique():
        thing = [part.split() for part in [*THINGS.values()][kind].split(";")]
        for i in (labels == kind).nonzero().squeeze(1).split(256):
            radius, cx, cy, tilt, direction, lightness, contrast, ground = (
                v[i].view(-1, 1, 1) for v in f.values())
            dx, dy = (px - cx) / radius, (py - cy) / radius
            cos, sin = tilt.deg2rad().cos(), tilt.deg2rad().sin()
            x, y = (dx * cos + dy * sin) * direction, dy * cos - dx * sin
            value, part = ground.expand_as(x), torch.zeros_like(x)
            for number, (texture, *shapes) in enumerate(thing, 1):
                here = covered(shapes, x, y)
                shade = lightness + 0.04 * dy + contrast * TEXTURES[texture](x, y).sign()
                value, part = torch.where(here, shade, value), torch.where(here, number, part)
            far = torch.where(part > 0, 0.5 - 0.3 * radius, 0.8 + 0.2 * py)
            light[i], depth[i] = F.avg_pool2d(value, 2), F.avg_pool2d(far, 2)
            parts[i] = part[:, ::2, ::2].byte()
    warm = ((light - 0.2) / 0.7).clamp(0, 1) - 0.4  # dark is blue, bright is yellow
    colour = torch.stack([1 + 0.5 * warm, 1 + 0.15 * warm, 1 - 0.65 * warm], 1)
    images = light.unsqueeze(1) * colour + 0.06 * torch.randn(n, 3, size, size, generator=g)
    return (images.clamp(0, 1) * 255).round().byte(), labels, parts, depth, f


# ==================================================================================================
# Images in: files
# ==================================================================================================

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # Pillow refuses over 1 MB of metadata by default
SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def hidden(name):
    """Whether a file or folder is not the user's, but one that systems put beside images."""
    return name.startswith((".", "@eaDir", "__MACOSX"))


def find_images(folder):
    """All image files below a folder, sorted, and how many other files there are.

    Links are followed. Hidden names and folders that hold a run are left out, and folders that
    cannot be read are reported.
    """
    found, others, entered = [], 0, set()
    for path, folders, files in os.walk(folder, onerror=print, followlinks=True):
        real = os.path.realpath(path)
        if real in entered or {"args.json", "views.png"} <= {*files}:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(f for f in folders if not hidden(f))
        files = [f for f in files if not hidden(f)]
        regular = {f.name for f in os.scandir(path) if f.is_file()}  # opening a pipe waits
        images = [os.path.join(path, f) for f in files
                  if os.path.splitext(f)[1].lower() in SUFFIXES and f in regular]
        found += images
        others += len(files) - len(images)
    return sorted(found), others


def rgb(image):
    """A Pillow image of any kind -> 8-bit RGB, transparent pixels on white.

    Deeper images are scaled by the range they use: from 0, or their least value if lower, to the
    first of 1, 3, 7, 15, ..., the maxima of 1, 2, 3, ... bits, that suffices. A thousandth of the
    pixels, which may be broken, does not count at either end.
    """
    if image.mode[0] in "IF":  # modes that Pillow would clip
        a = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        low = min(np.quantile(a, 0.001, method="higher"), 0)
        most = max(np.quantile(a, 0.999, method="lower"), 1)
        top = 2.0 ** math.ceil(math.log2(most + 1)) - 1
        image = Image.fromarray(np.uint8(np.clip((a - low) / (top - low), 0, 1) * 255))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(file, shorter=1024):
    """(H, W, 3) uint8 with a shorter side of at most `shorter` pixels, or why it cannot be read.

    Of an image that is more than twice as long as wide, only the middle is kept. Errors that may
    come from the disk or the network, and pass, are waited out.
    """
    for pause in (1, 5, 20, 60, 0):
        image, number = decode(file, shorter)
        if number in (None, errno.ENOENT, errno.EACCES):
            break
        time.sleep(pause)
    return image


def decode(file, shorter):
    """The array or reason of read_image, and the errno if the operating system raised the error."""
    try:
        image = Image.open(file)
        image.draft("RGB", (shorter, shorter))  # JPEG: decodes at 1/2, 1/4 or 1/8
        with contextlib.suppress(Exception):  # bad metadata is no reason to give up
            image = ImageOps.exif_transpose(image)
        w, h = image.size
        x, y = max(0, w - 2 * h) // 2, max(0, h - 2 * w) // 2
        image = rgb(image.crop((x, y, w - x, h - y)))
        factor = shorter / min(image.size)
        if factor < 1:
            image = image.resize([round(factor * s) for s in image.size], Image.BILINEAR)
        high = image.height >= image.width
        planes = np.asarray(image).transpose((2, 0, 1) if high else (2, 1, 0)).copy()
        return planes.transpose((1, 2, 0) if high else (2, 1, 0)), None  # so that pad only copies
    except Exception as error:  # a broken file raises whatever its decoder likes
        return str(error) or type(error).__name__, getattr(error, "errno", None)


def read_all(files, shorter, memory_gb, workers):
    """read_image of all files, or None if they take over memory_gb, padded to one size."""
    images, largest = [], np.zeros(2)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for n in range(0, len(files), 1000):  # of a million, these often suffice to know
            images += pool.map(read_image, files[n : n + 1000], [shorter] * 1000)
            read = [image for image in images[n:] if not isinstance(image, str)]
            largest = np.max([largest, *(sorted(image.shape[:2]) for image in read)], 0)
            if len(files) * 3 * largest.prod() > memory_gb * 2**30:
                return None
    return images


def report_broken(reasons):
    """Name the files that cannot be read; reasons: file -> why."""
    if reasons:
        print(printable(f"left out, as they cannot be read: {len(reasons)} image file(s) "
                        f"({shortened([*reasons])}): {next(iter(reasons.values()))}"))


def report_odd(files, images):
    """Print what may be wrong with a sample of a set; images: those that can be read."""
    deep = pages = 0
    for file in files:
        with contextlib.suppress(Exception), Image.open(file) as image:
            deep += image.mode[0] in "IF"
            image.seek(1)  # an error if there is one page; to count them all can take minutes
            pages += image.format != "MPO"  # a photograph and its preview
    plain = sum(image.max() < 32 or image.min() > 223 for image in images)
    odd = {"deeper than 8 bits, each scaled by the range it uses": deep,
           "with several pages, of which the first is used": pages,
           "almost black or almost white, look at views.png": plain}
    for what, count in odd.items():
        if count:
            print(f"sample of {len(files)} images: {count} {what}")
    if images and not any(np.ptp(image, 2).any() for image in images):
        print("grey images: all three channels are the same")


# ==================================================================================================
# Images in: a set, found by name or folder
# ==================================================================================================

SETS = {  # torchvision's class, arguments for its training and its test split, side in pixels
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, 32),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, 32),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}, 28),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}, 96),
    "imagenette": ("Imagenette", {"size": "160px"}, {"size": "160px", "split": "val"}, 160),
}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Images:
    """N images: labels (N,) int64 (-1: unknown) and either files, to be read with a shorter side of
    at most `shorter`, or, on the device, pixels (N, 3, H, W) uint8, joined by `pad`, and sizes
    (N, 2), their heights and widths before that. names: of the files, or numbers."""

    labels: torch.Tensor
    pixels: torch.Tensor = None
    sizes: torch.Tensor = None
    files: list = None
    shorter: int = None
    names: list = None

    def read(self, i):
        """i and the pixels of file i. A broken file is dropped, and another drawn instead."""
        draw = random.Random(i)
        while any(self.files):
            if file := self.files[i]:  # read once: other threads may drop it
                image = read_image(file, self.shorter)
                if not isinstance(image, str):
                    return i, image
                report_broken({file: image})
                self.files[i] = None
            i = draw.randrange(len(self.files))
        return i, f"none of the {len(self.files)} image files can be read"


class Data:
    """A set by name (the built-in one or a key of SETS) or folder: PATH/train/<class>/* with
    PATH/{val,validation} and PATH/test in the same form (without a test split, the validation split
    is the test) and, beside the classes of train, images without a label; or any tree of images,
    without labels.

    train: its training images; fit, val, test: (images, index) for the probes. Without a validation
    split, val is a tenth of the labelled training images of every class; without a test split
    either, test is another tenth. limit: keep only the first images of a fixed shuffle, this many
    of each split at most (the built-in set is made anew). side: the shorter side of its images in
    pixels.
    """

    def __init__(self, name, root="data", limit=None):
        self.side, self.parts, self.numbers, self.classes = None, {}, {}, [*THINGS]
        self.probed = self  # the set the probes are fitted, chosen and tested on
        if name in (BUILT_IN, *SETS) and os.path.isdir(name):
            print(f"{name} is the set of this name, not the folder: that is --dataset ./{name}")
        if name == BUILT_IN:
            self.parts = {k: (range(min(n, limit or n)), None) for k, n in SIZES.items()}
        elif name in SETS:
            self._find_in_torchvision(name, Path(root))
        elif os.path.isdir(name):
            self._find_in_folder(Path(name))
        else:
            fail(f"{name!r}, from {os.getcwd()}, is neither a folder nor "
                 f"{', '.join([BUILT_IN, *SETS])}")
        for split, (items, labels) in self.parts.items() if limit and name != BUILT_IN else ():
            keep = shuffle(len(items))[:limit]  # from what is left after test images were held out
            self.parts[split] = [items[i] for i in keep], labels[keep]
            self.numbers[split] = keep.tolist()

    def _find_in_torchvision(self, name, root):
        kind, train, test, self.side = SETS[name]
        if not main_process():
            dist.barrier()  # until the first process has downloaded it
        try:
            load = functools.partial(getattr(datasets, kind), root, download=True)
            sets = {"train": load(**train), "test": load(**test)}
        except Exception as error:
            fail(f"{name} is not in {root}/ and cannot be downloaded ({error}): copy {root}/ from "
                 "where there is a network, or give --dataset a folder of images")
        if main_process() and dist.is_available() and dist.is_initialized():
            dist.barrier()
        self.classes = [*map(str, getattr(sets["test"], "classes", []))]
        for split, items in sets.items():
            images, labels = zip(*items)
            self._add(split, [np.array(image) for image in images], torch.tensor(labels))

    def _find_in_folder(self, root):
        folders = sorted(f for f in next(os.walk(root), ("", [], []))[1] if not hidden(f))
        splits = [f for name in SPLITS for f in folders if f.lower() == name]  # train first
        top = root / splits[0] if "train" in map(str.lower, splits) else root
        files, others = find_images(top)
        if not files:
            fail(f"no images of a format that Pillow reads in {top}")
        place = str(top).rstrip(os.sep).count(os.sep) + 1  # of the class in the path of a file
        names = {f.split(os.sep)[place] for f in files if top != root and f.count(os.sep) > place}
        classes = {c: label for label, c in enumerate(sorted(names))}
        self.classes = [*classes]
        entered = splits if classes else []
        for split in entered:
            found = files if root / split == top else find_images(root / split)[0]
            of = {f: f.split(os.sep)[place] for f in found}
            other = sorted({*of.values()} - {*classes})  # also images beside the folders
            if other and root / split != top:
                fail(f"{root / split} has images of no class of train: {shortened(other)}")
            found.sort(key=of.get)
            labels = torch.tensor([classes.get(of[f], -1) for f in found])
            self._add(SPLITS[split.lower()], found, labels)
        if not classes:
            self._add("train", files, torch.full((len(files),), -1))
        if classes and "test" not in self.parts:  # ImageNet's validation split is the test
            self.parts["test"] = self.parts.pop("val", None) or self._split_off_test()
        loose = int((self.parts["train"][1] < 0).sum())
        loose = f", {loose:,} training images without a label" if loose else ""
        kinds = [f"no train/<class>/*, so no labels: all of {top} is for training",
                 "one class only, so accuracies say nothing",
                 f"{len(classes)} classes ({shortened(self.classes)}){loose}"]
        counts = ", ".join(f"{k} {len(v):,}" for k, (v, _) in self.parts.items())
        unused = sorted({*folders} - {*entered, top.name}) if top != root else []
        print(printable(f"{root}: {kinds[min(len(classes), 2)]}; images: {counts}; {others} other "
                        f"files ignored, folders not entered: {shortened(unused)}"))
        sample = [files[i] for i in shuffle(len(files))[:64]]
        images = [image for image in map(read_image, sample) if not isinstance(image, str)]
        self.side = int(np.median([min(image.shape[:2]) for image in images] or [64]))
        report_odd(sample, images)

    def _split_off_test(self):
        print("no test folder: a tenth of the training images of every class is held out")
        files, labels = self.parts["train"]
        kept, tenth = hold_out(labels)
        known = labels[tenth] >= 0  # the others stay
        kept, tenth = torch.cat([kept, tenth[~known]]), tenth[known]
        self.parts["train"] = [files[i] for i in kept], labels[kept]
        return [files[i] for i in tenth] or fail("too few training images"), labels[tenth]

    def _add(self, split, items, labels):
        if not items or split in self.parts:
            fail(f"{'two folders' if items else 'no images'} for the {split} split")
        self.parts[split] = items, labels

    def read(self, size, device, memory_gb, workers):
        """Read the training images, and set on which images the probes are fitted and chosen."""
        self.how = (size, device, memory_gb, workers)
        self.train = self.load("train")
        known = (self.train.labels >= 0).nonzero().squeeze(1)
        if "val" in self.parts:
            images = self.load("val")
            self.val, self.fit = (images, torch.arange(len(images.labels))), (self.train, known)
        else:
            index = known if len(known) else torch.arange(len(self.train.labels))
            kept, tenth = hold_out(self.train.labels[index])
            self.val, self.fit = (self.train, index[tenth]), (self.train, index[kept])

    @property
    def labelled(self):
        return bool((self.probed.train.labels >= 0).any())

    @functools.cached_property
    def test(self):
        images = self.load("test")  # when first asked for
        return images, torch.arange(len(images.labels))

    def splits(self, test):
        """(images, index) of fit and val, or of fit, val and test."""
        names = ["fit", "val", "test"] if test else ["fit", "val"]
        return [getattr(self.probed, name) for name in names]

    def load(self, split):
        """The Images of a split: as pixels on the device, or as files if pixels would take more
        than memory_gb."""
        items, labels = self.parts[split]
        numbers = self.numbers.get(split, range(len(items)))
        names = items if isinstance(items[0], str) else numbers
        size, device, memory_gb, workers = self.how
        if isinstance(items, range):
            made, labels, *_ = toys(len(items), size, seed=["train", "test"].index(split))
            items = made.permute(0, 2, 3, 1).numpy()
        elif isinstance(items[0], str):
            files, items = items, read_all(items, 3 * size, memory_gb, workers)
            if not items:
                print(f"{split}: {len(files):,} images take over --memory-limit {memory_gb:g} GB: "
                      f"streamed by {max(workers, 1)} threads")
                return Images(labels, files=[*files], shorter=3 * size, names=names)
            report_broken({f: x for f, x in zip(files, items) if isinstance(x, str)})
            good = [i for i, x in enumerate(items) if not isinstance(x, str)]
            good = good or fail(f"none of the {len(files)} {split} images can be read")
            items, labels, names = [items[i] for i in good], labels[good], [names[i] for i in good]
        pixels, sizes = (t.to(device) for t in pad(items))
        return Images(labels, pixels, sizes, names=names)

    def epoch(self, number, first, batch_size, crops, run, seed):
        """Batches of a shuffled pass over the training images from batch `first` on; with several
        processes each has its part of every batch. run: device, rank, world."""
        steps = len(self.train.labels) // batch_size
        mix = torch.Generator().manual_seed(seed * 2**20 + number)
        order = torch.randperm(len(self.train.labels), generator=mix)
        order = order[: steps * batch_size].view(steps, run.world, -1)[first:, run.rank]
        return batches(self.train, order.flatten(), order.shape[1], crops, run.device, self.how[-1],
                       (seed, number, run.rank), first)


def shuffle(n):
    """The same order of n items every time."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def hold_out(labels):
    """Indices of nine tenths and of one tenth of every class; a class of two or more loses at least
    one image."""
    kept, tenth, order = [], [], shuffle(len(labels))
    order = order[labels[order].argsort(stable=True)]  # class by class
    for i in order.split(labels.unique(return_counts=True)[1].tolist()):
        n = 0 if len(i) < 2 else math.ceil(len(i) / 10)
        kept.append(i[n:])
        tenth.append(i[:n])
    return torch.cat(kept), torch.cat(tenth)


def pad(images, pin=False):
    """List of arrays (H, W[, 3]) uint8 -> (N, 3, longest, widest), and their sizes (N, 2). Images
    wider than high are stored transposed: otherwise, padding all to one size would double the work.
    pin: use memory that a GPU copies from while the host goes on."""
    sizes = torch.tensor([image.shape[:2] for image in images])
    shape = len(images), 3, int(sizes.amax()), int(sizes.amin(1).amax())
    pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=pin)
    for place, image in zip(pixels, images):
        image = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)
        image = image.mT if image.shape[1] < image.shape[2] else image
        place[:, : image.shape[1], : image.shape[2]] = image  # grey: one channel fills all three
    return pixels, sizes


# ==================================================================================================
# Images in: batches of crops
# ==================================================================================================


class Crop(NamedTuple):
    """`count` views of size x size pixels: random boxes with area share and aspect in the ranges
    scale and ratio; without a ratio, the central square of `scale` times the shorter side."""

    size: int
    scale: float | tuple
    ratio: tuple = None
    count: int = 1

    def cut(self, x, sizes):
        """One view (N, 3, size, size) of x, floats in [0, 1] laid out by pad, with wide ones
        transposed; sizes (N, 2): their heights and widths before that."""
        boxes = (random_boxes(sizes, self.scale, self.ratio) if self.ratio
                 else central_boxes(sizes, self.scale))
        high = sizes.diff(dim=1) <= 0  # (N, 1), height >= width
        turned = boxes.view(-1, 2, 2).flip(2).flatten(1)  # left, top, width, height
        view = crop_resize(x, torch.where(high, boxes, turned), self.size)
        return torch.where(high[..., None, None], view, view.mT)


def reseed(*numbers):
    """Seed torch's generators from integers."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(state)  # seeds all devices; slow if there are none


def to_device(x, device):
    """x on the device. CUDA copies while the host goes on; MPS must not, as it would read memory
    that may have been freed (github.com/pytorch/pytorch/issues/189690)."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def batches(images, order, size, crops, device, workers=0, seed=(0,), first=0):
    """Yield (views, index) for `order` (indices into images) cut into batches of `size`.

    views: `count` tensors for every crop, float (B, 3, S, S) in [0, 1]. seed, a tuple: batch
    i and all that is drawn while it is in use depend on (*seed, first + i) alone.
    """
    chunks = order.split(size)
    if images.files:
        pin = torch.device(device).type == "cuda"
        items = stream(images, chunks, workers, pin)
    else:
        here = order.to(device).split(size)  # at once, as every copy to a GPU waits
        items = ((images.pixels[i], images.sizes[i], j) for i, j in zip(here, chunks))
    for i, (x, sizes, index) in enumerate(items):
        x = to_device(x, device).float().div_(255)
        sizes = to_device(sizes, device)
        reseed(*seed, first + i)
        views = [c.cut(x, sizes) for c in crops for _ in range(c.count)]
        del x  # frees up to gigabytes for the step
        yield views, index


def stream(images, chunks, workers, pin=False, ahead=3):
    """Yield pixels (B, 3, H, W) uint8, sizes (B, 2) and the index of every chunk. Threads, in which
    Pillow decodes in parallel, read `ahead` chunks ahead. pin: see pad."""
    pool = ThreadPoolExecutor(max(workers, 1))

    def start(chunk):
        return [pool.submit(images.read, i) for i in chunk.tolist()]

    reading = [start(chunk) for chunk in chunks[:ahead]]
    try:
        for n in range(len(chunks)):
            index, arrays = zip(*(future.result() for future in reading.pop(0)))
            reading += [start(chunk) for chunk in chunks[n + ahead : n + ahead + 1]]
            _ = [fail(reason) for reason in arrays if isinstance(reason, str)]  # none can be read
            yield *pad(arrays, pin), torch.tensor(index)
    finally:
        pool.shutdown(cancel_futures=True)

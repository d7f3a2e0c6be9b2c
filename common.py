"""Images in, a run out: what every method file needs and no paper writes about.

To understand a method you need not open this file. It has three parts:
  - a run out: options, processes, precision, log, checkpoints (`options`, `Run`), the features of
    a set and what they say (`embed`, `knn`, `health`), pictures, files that are whole or not there;
  - image operations: on batches, where every image has draws of its own;
  - images in: sets by name or folder (`Data`), in memory or streamed, and `batches` of crops.

Images are float32 (N, 3, H, W) in [0, 1] on the device, and uint8 where they are stored.
"""

import argparse
import atexit
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets

try:
    from tqdm import tqdm
except ImportError:  # then there is no bar, only a line an epoch
    tqdm = None
try:
    import resource
except ImportError:  # Windows
    resource = None

# ==================================================================================================
# Errors and files
# ==================================================================================================


def fail(message):
    """End the program with one sentence on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main_process():
    """Whether this is the first process of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def write(path, content):
    """Write text, or what a function saves to a path, or torch.save anything else.

    The file is whole or not there, whatever happens. Only the first process writes.
    """
    if not main_process():
        return
    part = Path(f"{path}.part")
    try:
        if isinstance(content, str):
            part.write_text(content)
        elif callable(content):
            content(part)
        else:
            torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError in torch.save
        part.unlink(missing_ok=True)
        fail(f"{path} cannot be written: {error}".split("\n")[0])


def to_json(value):
    """Strict JSON: what is not finite becomes null."""

    def strict(x):
        if isinstance(x, dict):
            return {k: strict(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [strict(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(strict(value), allow_nan=False)


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

    parse.__name__ = f"number, {kind.__name__} from {low:g} to {high:g}:"  # argparse: "invalid ..."
    return {"type": parse}


def one_of(names):
    return {"choices": [*names]}


FROM_0, FROM_1, FROM_2, PIXELS = (number(int, low) for low in (0, 1, 2, 8))
POSITIVE, SHARE = number(float, 1e-9), number(float, 0, 1)
FLAG, SWITCH = {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def options(method, doc, table, argv=None):
    """The command line: what every script has, and an option for each row of table,

        name: (default for the built-in set, for images up to 64 pixels, for larger ones,
               what is allowed: "name|name|..." or keywords of argparse, meaning).

    A default may be a function of (args, number of images). Options of the table that are not
    given are None until load_data knows the set.
    """
    p = Parser(description=doc.split("\n")[0], allow_abbrev=False)
    p.set_defaults(method=method)
    o = p.add_argument_group("run").add_argument
    o("--seed", **number(int, 0, 2**31), default=0, help="of weights, order and draws (0)")
    o("--device", help="cuda, mps or cpu (the first there is)")
    o("--amp", **one_of(["auto", "bf16", "fp16", "off"]), default="auto", help="autocast (auto)")
    o("--compile", action="store_true", help="compile networks and augmentation")
    o("--out", help=f"output folder (runs/{method}-<dataset>-s<seed>)")
    o("--resume", action="store_true", help="go on with the interrupted run in --out")
    o("--init", metavar="FILE", help="start from a backbone.pt, a last.pt or released weights")
    o("--eval", metavar="FILE", help="evaluate such a file, train nothing")
    o = p.add_argument_group("data").add_argument
    o("--dataset", default="shapes", help="shapes, a torchvision set or a folder (shapes)")
    o("--data-dir", default="data", help="where downloaded sets are kept (data)")
    o("--limit", **FROM_1, help="use only so many training images (all)")
    o("--workers", **FROM_0, default=cores(), help="readers of files (a core each)")
    o("--memory-limit", **number(float, 0), default=8, help="GB; more is streamed (8)")
    o = p.add_argument_group(
        "method", "defaults: built-in set | images up to 64 pixels | larger images").add_argument
    for name, (*defaults, allowed, meaning) in table.items():
        if isinstance(allowed, str):
            allowed = one_of(allowed.split("|"))
        if allowed is not FLAG:
            meaning = f"{meaning} ({' | '.join(map(show_value, defaults))})"
        flag = "--" + name.replace("_", "-")
        o(flag, **allowed, default=None, help=meaning.replace("%", "%%"))
    o = p.add_argument_group("evaluation").add_argument
    o("--eval-every", **FROM_0, help="epochs (a quarter of the run; 0: never)")
    o("--knn-k", **FROM_1, default=20, help="neighbours (20)")
    o("--knn-tau", **POSITIVE, default=0.07, help="temperature of their votes (0.07)")
    args = p.parse_args(argv)
    if args.init and args.eval:
        fail("--init starts a training and --eval does without one: give one of the two")
    return args


def show_value(value):
    """0.5 -> '0.5', (1.0, 0.1) -> '1.0 0.1', a function -> its name."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return value.__name__ if callable(value) else str(value)


def load_data(args, table, run):
    """Find the set, take what is left open in args from its column of the table, read it."""
    data = Data(args.dataset, args.data_dir, args.limit)
    names = ["built-in", "images up to 64 pixels", "larger images"]
    column = 0 if data.side is None else 1 if data.side <= 64 else 2
    for name, row in table.items():  # in order: a function may use the rows above its own
        if getattr(args, name) is None:
            value = row[column]
            if callable(value):
                value = value(args, len(data))
            elif name == "image_size" and data.side:
                value = min(value, data.side)
            setattr(args, name, [*value] if isinstance(value, tuple) else value)
    if args.eval_every is None:
        args.eval_every = math.ceil(args.epochs / 4)
    recipe = " ".join(f"{k}={show_value(getattr(args, k))}" for k in table)
    print(f"recipe for the {names[column]} set: {recipe}")
    data.read(args.image_size, run.device, args.memory_limit, args.workers)
    args.images = n = len(data.train.labels)
    print(f"{n:,} training images, {len(data.val[1]):,} validation images")
    if not args.eval and (n < args.batch_size or args.batch_size % run.world):
        fail(f"--batch-size {args.batch_size} has to be at most the number of training images, "
             f"{n}, and a multiple of that of processes, {run.world}")
    data.per_epoch = max(n // args.batch_size, 1)
    write(run.folder / "args.json", to_json(vars(args)))
    return data


# ==================================================================================================
# A run: processes, precision, log, checkpoint
# ==================================================================================================


class Gather(torch.autograd.Function):
    """Rows of all processes, with gradient: (n, ...) -> (world n, ...).

    Every process computes the loss of the whole batch. The gradients that the copies of a row get
    are added up here and averaged by DistributedDataParallel: the gradient of a single process.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class Run:
    """A run of a script, to be opened by `with`: device, rank, world, dtype, folder, step.

    Under torchrun it joins the other processes, and only the first one prints. From the first to
    the last epoch SIGTERM and SIGINT save a checkpoint and end the program; a second one ends it
    at once.
    """

    def __init__(self, args):
        self.args, self.begun = args, time.perf_counter()
        self._choose_device(args.device, args.amp)
        self._join()
        name = f"runs/{args.method}-{Path(args.dataset).name}-s{args.seed}"
        self.folder = self._claim(args.out or name + ("-eval" if args.eval else ""))
        self.step, self.seconds, self.rows, self.rates, self.chance = 0, 0.0, [], {}, {}
        self.tally, self.signal, self.stopped = None, 0, 0
        self.handlers, self.notes, self.saved = {}, set(), time.perf_counter()
        self.every = 10 if self.device.type == "cuda" else 1  # to read from a GPU is to wait for it
        print(f"{args.method} on {args.dataset}, {self.world} x {self.name}, {self.dtype}, "
              f"to {self.folder}")

    def _choose_device(self, name, amp):
        found = ["cpu"]
        if torch.backends.mps.is_available():
            found.insert(0, "mps")
        if torch.cuda.is_available():
            found.insert(0, "cuda")
        name = name or found[0]
        if name not in found:
            fail(f"--device {name}: this machine has {', '.join(found)}")
        if name == "mps" and amp in ("bf16", "fp16"):
            fail("--amp has to be off on mps")
        self.device, self.name, auto = torch.device(name), name, None
        if name == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            self.device = torch.device(name, local)
            self.name = torch.cuda.get_device_name(self.device)
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True  # tries convolutions out: shapes stay the same
            auto = torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        self.dtype = {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

    def _join(self):
        """Meet the other processes of torchrun, if there are any."""
        names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
        missing = [k for k in names if k not in os.environ]
        if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            if missing:
                fail(f"RANK or WORLD_SIZE is set, but not {', '.join(missing)}: start with "
                     "torchrun, or unset them")
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")

    def _claim(self, out):
        """Make the folder of this run: out, or where a run has it already out-2, out-3, ...

        With --resume: the last of them whose run was interrupted.
        """
        folders = (Path(f"{Path(out)}-{n}" if n > 1 else out) for n in itertools.count(1))
        found = [None]
        try:
            if not main_process():
                pass
            elif self.args.resume:
                runs = itertools.takewhile(lambda f: (f / "args.json").exists(), folders)
                open_runs = [f for f in runs if not (f / "results.json").exists()
                             and (f / "last.pt").exists()]
                if not open_runs:
                    fail(f"--resume: no interrupted run in {out}; name its folder with --out, or "
                         "drop --resume to start another")
                found = open_runs[-1:]
            while main_process() and not found[0]:
                found = [next(folders)]
                found[0].mkdir(parents=True, exist_ok=True)
                try:
                    open(found[0] / "args.json", "x").close()  # fails if another run has made it
                except FileExistsError:
                    found = [None]
        except OSError as error:
            fail(f"--out {out}: no folder can be made there ({error.strerror})")
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._restore_handlers()
        if kind and self.step == 0 and not self.args.resume and main_process():
            (self.folder / "args.json").unlink(missing_ok=True)  # the folder is free again

    def note(self, text):
        """Print it, once a run."""
        if text not in self.notes:
            self.notes.add(text)
            print(f"note: {text}")

    # -- networks and processes

    def autocast(self):
        """Half precision where it is on; for networks, not for losses."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def place(self, net):
        """net on the device; with several GPUs its batch norm is over all of them."""
        norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
        if self.world > 1 and norms and self.device.type == "cuda":
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        elif self.world > 1 and norms:
            self.note("no synchronised batch norm on CPUs, each process has its own statistics")
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
        """Rows of all processes, with gradient: (n, ...) -> (world n, ...)."""
        return Gather.apply(x) if self.world > 1 else x

    def mean(self, x):
        """Mean over all processes."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.world
        return x

    def update(self, optimizer, scaler, loss):
        """The optimiser's step, unless loss or gradient of any process are not finite.

        To be called after scaler.unscale_ -> ok, a 0-dim bool tensor. Decided on the device: the
        fused optimisers leave weights and moments alone where their attribute found_inf, which
        GradScaler uses as well, is 1.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not optimizer.state and optimizer.defaults.get("momentum"):
            for p in params:  # which SGD leaves unset where its very first step is left out
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
        self.per_epoch, self.steps = data.per_epoch, data.per_epoch * self.args.epochs
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._catch)
        yield from range(self.step // self.per_epoch, 0 if self.args.eval else self.args.epochs)
        self._restore_handlers()

    def _catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def _restore_handlers(self):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def batches(self, data, epoch, crops):
        """(step, views) for what is left of an epoch; ends early after a signal."""
        self.first = self.step % self.per_epoch
        items = data.epoch(epoch, self.first, self.args.batch_size, crops, self, self.args.seed)
        self.bar = Bar(items, self.per_epoch, self.first, f"epoch {epoch + 1}/{self.args.epochs}")
        for views, _ in self.bar:
            yield self.step, views
            if self.stopped:
                break

    def log(self, ok, **figures):
        """End a step. Tensors are averaged over the steps of the epoch that are ok and over
        processes; numbers, such as rates, are noted as they are. The first tensor is the loss."""
        terms = {k: v.detach().float() for k, v in figures.items() if torch.is_tensor(v)}
        self.rates = {k: v for k, v in figures.items() if k not in terms}
        self.terms, n = [*terms], len(terms)
        if self.tally is None:
            self.tally = torch.zeros(n + 2, device=self.device)
        means = self.mean(torch.stack([*terms.values()]))
        self.tally[:n] += torch.where(ok, means, 0)
        self.tally[n] += ok  # good steps
        self.tally[n + 1] = torch.where(ok, 0, self.tally[n + 1] + 1)  # failed ones in a row
        self.step += 1
        if self.step % self.every == 0:
            self._look()

    def _look(self):
        """Read the tally: the bar, the end of a hopeless run, and whether a signal came."""
        loss, *_, good, failed = self.tally.tolist()
        rates = "".join(f", {k} {v:.3g}" for k, v in self.rates.items())
        self.bar.say(f"loss {loss / max(good, 1):.3f}{self._chance('loss')}{rates}")
        if failed >= 50:
            fail(f"no finite loss and gradient in 50 steps up to step {self.step}: lower --lr or "
                 "turn --amp off; nothing was saved since")
        caught = torch.tensor(self.signal, device=self.device)
        if self.world > 1:  # all processes stop after the same step
            dist.all_reduce(caught, dist.ReduceOp.MAX)
        self.stopped = int(caught)

    def _chance(self, name):
        return f" (chance {self.chance[name]:.3f})" if name in self.chance else ""

    def end_epoch(self):
        """Note and print the means of an epoch -> whether an evaluation is due."""
        *sums, good, failed = self.tally.tolist()  # waits until a GPU is done, so before the clock
        seconds = self.bar.seconds
        self.seconds += seconds
        if self.step % self.per_epoch:
            return False  # cut short by a signal
        self.tally[:-1] = 0
        means = {k: total / good if good else math.nan for k, total in zip(self.terms, sums)}
        images = (self.per_epoch - self.first) * self.args.batch_size
        row = {"epoch": self.step // self.per_epoch, **means, **self.rates,
               "skipped": self.per_epoch - int(good), "waiting": self.bar.waiting / seconds,
               "images_per_second": images / seconds}
        self.rows.append(row)
        figures = ", ".join(f"{k} {v:.3f}{self._chance(k)}" for k, v in means.items())
        left = self.seconds / self.step * (self.steps - self.step)
        print(f"epoch {row['epoch']}: {figures}, {row['skipped']} steps skipped, "
              f"{row['images_per_second']:,.0f} images/s, {row['waiting']:.0%} waiting for data, "
              f"{duration(left)} left")
        return bool(self.args.eval_every) and row["epoch"] % self.args.eval_every == 0

    # -- checkpoint and results

    def restore(self, state):
        """With --resume, load last.pt into state (modules, optimisers, tensors by name)."""
        if not self.args.resume:
            return
        path = self.folder / "last.pt"
        saved = read_checkpoint(path)
        if not {"method", "args", "state", "progress"} <= saved.keys():
            fail(f"--resume: {path} is not the last.pt of a run")
        for name, value in self._shape().items():
            if saved["args"].get(name) != value:
                fail(f"--resume: {path} was begun with {name} {saved['args'].get(name)}, "
                     f"not {value}")
        for name, value in saved["state"].items():
            if isinstance(value, torch.Tensor):
                state[name].copy_(value)
            elif value:  # the state of a GradScaler that is off is empty
                state[name].load_state_dict(value)
        self.step, self.seconds, self.rows, tally = (
            saved["progress"][k] for k in ("step", "seconds", "rows", "tally"))
        self.tally = torch.tensor(tally, device=self.device)

    def _shape(self):
        """The options that shape a run, and so have to be the same when it is resumed."""
        free = ("resume out device dataset data_dir workers memory_limit compile eval_every knn_k "
                "knn_tau").split()
        options = {k: v for k, v in vars(self.args).items() if k not in free}
        return options | {"processes": self.world}

    def save(self, state):
        """Write metrics.jsonl, and last.pt at most once a minute and at the end; after a signal
        the program ends here."""
        write(self.folder / "metrics.jsonl", "".join(to_json(row) + "\n" for row in self.rows))
        due = time.perf_counter() - self.saved > 60
        if due or self.stopped or self.step == self.steps:
            progress = {"step": self.step, "seconds": self.seconds, "rows": self.rows,
                        "tally": self.tally.tolist()}
            held = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
            options = vars(self.args) | {"processes": self.world}
            write(self.folder / "last.pt", {"method": self.args.method, "args": options,
                                            "state": held, "progress": progress})
            self.saved = time.perf_counter()
        if self.stopped:
            print(f"stopped after step {self.step:,} of {self.steps:,}, --resume goes on from here")
            raise SystemExit(128 + self.stopped)

    def report(self, results, test):
        """Print an evaluation, with test beside the floors -> results."""
        tops = {k.removesuffix("_top1"): v for k, v in results.items() if k.endswith("_top1")}
        figures = "".join(f"{k.replace('_', ' ')} {v:.1f}, " for k, v in tops.items())
        print(f"{'test' if test else 'validation'}: {figures}{results['verdict']}")
        if test and tops:
            print("\ntop-1 in % on the test images         linear   k-NN")
            for label, prefix in (("h, before the head", ""), ("z, after the head", "head_"),
                                  ("h of the untrained network", "untrained_"),
                                  ("raw pixels, at most 32 x 32", "pixels_")):
                print(f"{label:36} {tops[prefix + 'linear']:8.1f} {tops[prefix + 'knn']:6.1f}")
        elif self.rows and not test:
            self.rows[-1] |= results
        return results

    def finish(self, backbone, results, mean, std, loading):
        """Write backbone.pt, results.json and curves.png, print how to load the backbone.

        loading: lines of Python that make the untrained backbone as `net`.
        """
        path = self.folder / "backbone.pt"
        weights = {k: v.cpu().contiguous() for k, v in backbone.state_dict().items()}
        write(path, {"state_dict": weights, "meta": vars(self.args) | {"mean": mean, "std": std}})
        results = vars(self.args) | results | {
            "device": self.name, "versions": {"torch": torch.__version__},
            "train_seconds": self.seconds, "peak_memory_mb": peak_memory_mb(self.device),
            "images_per_second": self.step * self.args.batch_size / max(self.seconds, 1e-9),
            "total_seconds": time.perf_counter() - self.begun}
        curves(self.folder / "curves.png", self.rows, {
            "loss": [*self.chance], "validation, %": ["linear_top1", "knn_top1",
                                                      "head_linear_top1"],
            "z": ["spread", "alignment", "uniformity"], "effective rank": ["rank_h", "rank_z"]})
        write(self.folder / "results.json", to_json(results))
        print(f"{results['total_seconds']:.0f} s in all, {self.seconds:.0f} s of training, "
              f"{results['images_per_second']:,.0f} images/s, "
              f"{results['peak_memory_mb']:,.0f} MB peak")
        print(f"\nThe backbone, for (RGB in [0, 1] - {mean}) / {std}:\n\n{loading}\n"
              f"net.load_state_dict(torch.load({str(path)!r}, weights_only=True)['state_dict'])\n")
        return results


class Undo:
    """Put back what a failed step changes besides weights: tensors, and floating-point buffers of
    modules (batch norm's statistics)."""

    def __init__(self, *things):
        self.live = []
        for thing in things:
            if isinstance(thing, torch.nn.Module):
                self.live += [b for b in thing.buffers() if b.is_floating_point()]
            else:
                self.live.append(thing)
        self.good = [t.clone() for t in self.live]  # as the last step that did not fail left them

    def __call__(self, unless):
        for live, good in zip(self.live, self.good):
            good.copy_(torch.where(unless, live, good))
            live.copy_(good)


class Bar:
    """Iterate over items, with a bar on a terminal; counts `seconds` and those spent `waiting`."""

    def __init__(self, items, total, first, title):
        self.items, self.waiting, self.start = items, 0.0, time.perf_counter()
        hidden = not sys.stderr.isatty() or not main_process()
        self.bar = tqdm and tqdm(total=total, initial=first, desc=title, unit="step", leave=False,
                                 disable=hidden)

    def __iter__(self):
        tick = time.perf_counter()
        try:
            for item in self.items:
                self.waiting += time.perf_counter() - tick
                yield item
                if self.bar:
                    self.bar.update()
                tick = time.perf_counter()
        finally:
            if self.bar:
                self.bar.close()

    def say(self, text):
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)

    @property
    def seconds(self):
        return time.perf_counter() - self.start


def cores():
    """Processors this process may use, its share of them under torchrun."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def duration(seconds):
    """90 -> '1:30', 4000 -> '1:06:40'."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


def peak_memory_mb(device):
    """Peak of CUDA's allocator, elsewhere of the whole process, in MB (nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
    return usage / (2**20 if sys.platform == "darwin" else 2**10)


# ==================================================================================================
# Weights from files
# ==================================================================================================


def read_checkpoint(path):
    """The dict in a file of tensors and plain Python, on the CPU; exit code 2 without one.

    Released checkpoints also hold argparse's Namespace and numpy scalars, the older ones by the
    module names of numpy 1.
    """
    scalar = np.float64(0).__reduce__()[0]
    numpy_1 = functools.partial(scalar)  # the same function by its older name
    numpy_1.__module__, numpy_1.__name__ = "numpy.core.multiarray", "scalar"
    dtypes = {type(np.dtype(t)) for t in "fdilq"}
    torch.serialization.add_safe_globals([argparse.Namespace, np.dtype, scalar, numpy_1, *dtypes])
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} does not exist")
    except Exception as error:  # cut short, or a pickle that wants to run code
        fail(f"{path} is no checkpoint of tensors and plain values ({type(error).__name__})")
    return found if isinstance(found, dict) else fail(f"{path} holds no dict of weights")


def load_weights(net, args, kept="net", branch="teacher", renames=(), adapt=None):
    """Load the file of --init or --eval into net, which has a `backbone` and heads beside it.

    Understood: last.pt of the same method, of which the network `kept` is taken; backbone.pt;
    torchvision's, timm's and released weights, with `branch` or a usual name above the tensors.
    renames: (pattern, replacement) for names of the file; adapt: changes the dict of tensors last.
    Heads that are not in the file stay random.
    """
    path = args.init or args.eval
    if not path:
        return
    weights = read_checkpoint(path)
    if {"method", "state"} <= weights.keys():
        if weights["method"] != args.method:
            fail(f"{path} is a run of {weights['method']}, not of {args.method}; give its "
                 "backbone.pt")
        weights = weights["state"].get(kept, {})
    for key in (branch, "state_dict", "model"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    weights = {rename(k, renames): v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    if not any(k.startswith("backbone.") for k in weights):
        weights = {f"backbone.{k}": v for k, v in weights.items()}
    own = net.state_dict()
    classifier = ("backbone.fc.", "backbone.head.")
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith(classifier)}
    heads = [k for k in own if not k.startswith("backbone.")]
    if any(k not in weights or weights[k].shape != own[k].shape for k in heads):
        print("the head stays random: z means nothing before training")
        weights = {k: v for k, v in weights.items() if k.startswith("backbone.")}
    else:
        heads = []
    if adapt:
        weights = adapt(weights, net)
    fits = [k for k, v in weights.items() if k in own and v.shape == own[k].shape]
    extra = [k for k in weights if k not in fits]
    missing = [k for k in own if k not in weights and k not in heads]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]  # not in old files
    print(f"{path}: {len(fits)} of {len(weights)} tensors loaded")
    if extra or missing:
        fail(f"{path} holds another network (not in it: {shortened(missing)}; not of its shape or "
             f"not known: {shortened(extra)}); give the options it was trained with")
    net.load_state_dict(weights, strict=False)


def rename(name, renames):
    """Without the prefixes of wrappers, and with the first of renames that fits."""
    name = re.sub(r"^((module|_orig_mod)\.)+", "", name)
    for pattern, replacement in renames:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def shortened(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


# ==================================================================================================
# Features and what they say
# ==================================================================================================


@torch.no_grad()
def embed(f, part, crops, run, limit=None):
    """f(views), a tuple of (B, ...), for all images of part = (images, index).

    -> its outputs (n, ...) in float32, then the labels (n,), in the order of index. Every process
    takes every world-th image and gets the outputs of all.
    """
    images, index = part[0], part[1][:limit]
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


def knn(fit, val, test=None, k=20, tau=0.07):
    """Top-1 in % of the k nearest by cosine, with votes exp(cosine / tau) (Wu et al. 2018).

    Each part: features (n, d), labels (n,). The neighbours of val are in fit; those of test, where
    it is given, in fit and val.
    """
    x, y = fit if test is None else [torch.cat(pair) for pair in zip(fit, val)]
    x_test, y_test = val if test is None else test
    if not torch.isfinite(x).all():
        return math.nan
    x, correct = F.normalize(x), 0
    for queries, labels in zip(x_test.split(1024), y_test.split(1024)):
        cosine, i = (F.normalize(queries) @ x.T).topk(min(k, len(x)))  # (n, k), nearest first
        votes = x.new_zeros(len(queries), int(y.max()) + 1)
        votes.scatter_add_(1, y[i], ((cosine - cosine[:, :1]) / tau).exp())
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(y_test)


def health(h, z1, z2, *_, name="z", least=0.1):
    """What h (n, d) and z1, z2 (n, D), of two views of n images, look like, and a verdict.

    spread: standard deviation of z / |z|, times sqrt(D): 1 all over the sphere, 0 at a point, which
    it is called below `least`. alignment: mean squared distance of the two views; uniformity: log
    mean exp(-2 squared distance) of two images (Wang & Isola 2020). rank: exp of the entropy of the
    singular values (RankMe, Garrido et al. 2023). name: what z is called in the verdict.
    """
    n, D = z1.shape
    figures = dict.fromkeys(["spread", "alignment", "uniformity", "rank_h", "rank_z"], math.nan)
    if n < 4:
        return figures | {"verdict": f"too few images to say: {n}"}
    if not all(torch.isfinite(t).all() for t in (h, z1, z2)):
        return figures | {"verdict": "features are not finite"}
    z1, z2 = F.normalize(z1), F.normalize(z2)
    figures = {"spread": z1.std(0).mean().item() * D**0.5,
               "alignment": (z1 - z2).square().sum(1).mean().item(),
               "uniformity": (-2 * torch.pdist(z1.cpu()).square()).exp().mean().log().item(),
               "rank_h": effective_rank(h), "rank_z": effective_rank(z1)}
    spread, rank = figures["spread"], figures["rank_z"]
    word = "healthy"
    if spread < least:
        word = "collapsed to a point"
    elif rank < 0.05 * min(n, D):
        word = "dimensional collapse"
    verdict = f"{word}: {name} has spread {spread:.2f} of 1, rank {rank:.0f} of {D}"
    return figures | {"verdict": verdict}


def effective_rank(x):
    """exp of the entropy of the singular values of x (n, d), taken as shares."""
    p = torch.linalg.svdvals(x.cpu())
    return torch.special.entr(p / p.sum()).sum().exp().item()


# ==================================================================================================
# Pictures
# ==================================================================================================


def show_views(run, data, crops, augment):
    """views.png: eight training images, each followed by views as the network gets them."""
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
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points) if points else ((), ()), ".-", label=key.replace("_", " "))
        ax.set(title=title, xlabel="epoch")
        ax.legend(fontsize=8)
    write(path, lambda part: figure.savefig(part, format="png"))


def picture(path, columns, size=96):
    """A PNG with a row per image: columns is a list of (N, 3, H, W) in [0, 1]."""
    size = max(size, *(c.shape[-1] for c in columns))
    tiles = [F.interpolate(c.float().cpu(), size=(size, size)) for c in columns]
    tiles = torch.stack([F.pad(t, (0, 4, 0, 4), value=1.0) for t in tiles], 1)
    rows = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (N*H, columns*W, 3)
    image = Image.fromarray((rows.clamp(0, 1) * 255).round().byte().numpy())
    write(path, lambda part: image.save(part, format="png"))


# ==================================================================================================
# Image operations: x (N, 3, H, W) in [0, 1] -> same, drawn from the device's global generator
# ==================================================================================================


def uniform(low, high, shape, device):
    return torch.rand(shape, device=device) * (high - low) + low


def coin(x, p):
    """(N, 1, 1, 1) bool, true with probability p, one draw for each image of x."""
    return torch.rand(len(x), 1, 1, 1, device=x.device) < p


def random_boxes(sizes, scale, ratio, tries=10):
    """RandomResizedCrop's boxes: sizes (N, 2) height, width -> (N, 4) top, left, height, width.

    An area of scale[0] to scale[1] of the image with a log-uniform aspect in ratio, the first of
    `tries` that fits; where none does, the largest central box within ratio, as torchvision.
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

    A triangle, as wide as an output pixel where it shrinks: resize(antialias=True) of torchvision.
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
    """Hue moved by shift (N, 1, 1, 1) of a full turn: adjust_hue, through value, chroma, hue."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    (r, g, b), c = x.split(1, 1), chroma.clamp(min=1e-12)
    green_or_blue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, green_or_blue) + 6 * shift  # in sixths of a turn
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + hue) % 6
    return value - chroma * k.minimum(4 - k).clamp(0, 1)


def color_jitter(x, brightness, contrast, saturation, hue, p):
    """torchvision's ColorJitter with probability p; every image has its own factors and order.

    Brightness, contrast and saturation are blends with black, the mean grey and the grey image.
    Turning the hue takes most of the time, so a random quarter of the batch each has it done
    first, second, third or last.
    """
    n, device, jittered = len(x), x.device, coin(x, p)
    draws = uniform(-1, 1, (3, n, 1, 1, 1), device)
    strengths = (brightness, contrast, saturation)
    factor = torch.stack([1 + draw * most for draw, most in zip(draws, strengths)]).clamp(min=0)
    factor = torch.where(jittered, factor, 1.0)
    shift = torch.where(jittered, uniform(-hue, hue, (n, 1, 1, 1), device), 0.0)
    order = torch.rand(3, n, 1, 1, 1, device=device).argsort(0)
    shuffle = torch.randperm(n, device=device)
    x = x[shuffle]
    for turn in range(4):
        quarter = slice(n * turn // 4, n * (turn + 1) // 4)
        x[quarter] = turn_hue(x[quarter], shift[quarter])
        if turn < 3:
            which, f, g = order[turn], factor.gather(0, order[turn : turn + 1])[0], to_grey(x)
            black_or_mean = torch.where(which == 0, 0.0, g.mean((2, 3), keepdim=True))
            x = torch.lerp(torch.where(which == 2, g, black_or_mean), x, f).clamp(0, 1)
    return torch.empty_like(x).index_copy_(0, shuffle, x)


def solarize(x, p, threshold=0.5):
    """Values from the threshold on are inverted: v -> 1 - v."""
    return torch.where(coin(x, p) & (x >= threshold), 1 - x, x)


def blur(x, sigma, taps, p):
    """Gaussian blur with sigma in a range of pixels, `taps` (odd) wide, edges reflected."""
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
# What comes in: the built-in set
# ==================================================================================================

TRAIN_SHAPES, TEST_SHAPES = 4000, 2000


def _star(x, y):
    turn = torch.atan2(x, y) / (0.4 * math.pi)
    angle, r = (turn - turn.round()).abs() * 0.4 * math.pi, torch.hypot(x, y)  # 0 at a point
    u, v, cu, cv = r * angle.cos(), r * angle.sin(), 0.5 * math.cos(math.pi / 5), 0.294
    return (u - 1) * cv < v * (cu - 1)  # inside the edge from (1, 0) to the corner (cu, cv)


SHAPES = {  # inside or not, x to the right, y up, in about [-1, 1]
    "disc": lambda x, y: x**2 + y**2 < 0.72,
    "square": lambda x, y: x.abs().maximum(y.abs()) < 0.76,
    "triangle": lambda x, y: (y > -0.65) & (1.75 * x.abs() + y < 0.95),
    "star": _star,
    "cross": lambda x, y: (x.abs().minimum(y.abs()) < 0.28) & (x.abs().maximum(y.abs()) < 0.92),
    "ring": lambda x, y: (x**2 + y**2 - 0.555).abs() < 0.295,
    "heart": lambda x, y: (x**2 + y**2 - 0.6) ** 3 < x**2 * y**3,
    "moon": lambda x, y: (x**2 + y**2 < 0.85) & ((x - 0.42) ** 2 + (y - 0.12) ** 2 > 0.5),
    "arrow": lambda x, y: (y > -0.9) & (x.abs() < torch.where(y < 0, 0.27, 0.9 - y)),
    "tee": lambda x, y: (y > -0.9) & (y < 0.88) & (x.abs() < torch.where(y < 0.36, 0.26, 0.85)),
}


def shapes(n, size, seed):
    """n images of one upright object before a quiet background, under sensor noise: images
    (n, 3, size, size) uint8, labels (n,), masks (n, size, size) bool, depth alike, 0 near to 1 far.

    The class is the shape. All classes have the same area on average, place and size vary, the tilt
    is at most 25 degrees, light comes from above. The material (plain, striped, checked) is drawn
    whatever the class, and the hue goes with the material. Supervised, the default network of
    simclr.py reaches 92.9 % on the test images in 60 s on 2 CPU cores (one run).
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=g) % len(SHAPES)
    images, truth = torch.empty(n, 3, size, size), torch.empty(2, n, size, size)  # mask, depth
    fine = (torch.arange(2 * size) + 0.5) / size - 1  # 2 x 2 points a pixel
    px, py, grid = fine.view(1, 1, -1), -fine.view(1, -1, 1), torch.linspace(-1.2, 1.2, 200)

    def draw(low, high):  # (m, 1, 1)
        return torch.rand(len(part), 1, 1, generator=g) * (high - low) + low

    chunks = [c for k in range(len(SHAPES)) for c in (labels == k).nonzero().squeeze(1).split(256)
              if len(c)]
    for part in chunks:
        inside = list(SHAPES.values())[labels[part[0]]]
        X, Y = torch.meshgrid(grid, grid, indexing="xy")
        X, Y = X[inside(X, Y)], Y[inside(X, Y)]  # len(X) is the area, their mean the centre
        radius = draw(math.log(0.48), math.log(0.8)).exp() * (12500 / len(X)) ** 0.5
        room = (1 - 0.85 * radius).clamp(min=0)
        dx, dy = (px - draw(-1, 1) * room) / radius, (py - draw(-1, 1) * room) / radius
        tilt = draw(-25, 25) * math.pi / 180
        x, y = dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()
        here, material = inside(x + X.mean(), y + Y.mean()), draw(0, 3).floor()
        striped, checked = (8 * y).sin().sign(), (7 * x).sin().sign() * (7 * y).sin().sign()
        pattern = (material == 1) * striped + (material == 2) * checked
        k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + 2 * material.unsqueeze(1)) % 6
        colour = 1 - 0.4 * k.minimum(4 - k).clamp(0, 1)  # (m, 3, 1, 1): red, green or blue
        light = (draw(0.7, 0.84) + 0.06 * dy + 0.04 * pattern).unsqueeze(1)
        light = light * colour / colour.mean(1, keepdim=True)
        picture = torch.where(here.unsqueeze(1), light, (0.5 + 0.04 * py).unsqueeze(1))
        ball = (1 - dx**2 - dy**2).clamp(min=0)
        depth = torch.where(here, 0.5 - 0.2 * ball - 0.3 * radius, 0.8 + 0.2 * py)
        images[part] = F.avg_pool2d(picture, 2)
        truth[:, part] = F.avg_pool2d(torch.stack([here.float(), depth]), 2)
    images += 0.1 * torch.randn(images.shape, generator=g)
    return (images.clamp(0, 1) * 255).round().byte(), labels, truth[0] > 0.5, truth[1]


# ==================================================================================================
# What comes in: a set, found by name or folder
# ==================================================================================================

SETS = {  # torchvision's class, what names its training and its test split, shorter side in pixels
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, 32),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, 32),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}, 28),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}, 96),
    "imagenette": ("Imagenette", {"split": "train", "size": "160px"}, 160),
}
SUFFIXES = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}


@dataclass
class Images:
    """N images: labels (N,) int64, -1 unknown, and either files or, on the device, pixels
    (N, 3, H, W) uint8, padded at the right and bottom, with sizes (N, 2) height, width."""

    labels: torch.Tensor
    pixels: torch.Tensor = None
    sizes: torch.Tensor = None
    files: list = None
    unreadable: set = field(default_factory=set)


class Data:
    """A set by name (`shapes`, a key of SETS) or folder. A folder is PATH/train/<class>/* with
    PATH/{val,validation} and PATH/test in the same form, or any tree of images, without labels.

    parts: train, val, test -> (items, labels), items being files, uint8 arrays (N, H, W[, 3]) or,
    for shapes, a number. Where there is no validation split it is a fixed tenth of the labelled
    training images. limit: the first so many training images of a fixed shuffle, and at most as
    many test images. side: the shorter side of its images in pixels, None for any.
    """

    def __init__(self, name, root="data", limit=None):
        self.side, self.parts = None, {}
        if name == "shapes":
            counts = {"train": TRAIN_SHAPES, "test": TEST_SHAPES}
            self.parts = {k: (min(n, limit or n), None) for k, n in counts.items()}
            return
        if name in SETS:
            self._torchvision(name, Path(root))
        elif Path(name).is_dir():
            self._folder(Path(name))
        else:
            fail(f"--dataset {name} is neither a folder nor one of shapes, {', '.join(SETS)}")
        for split, (items, labels) in self.parts.items() if limit else ():
            keep = self._shuffle(len(items))[:limit]
            self.parts[split] = [items[i] for i in keep], labels[keep]

    def __len__(self):
        items, _ = self.parts["train"]
        return items if isinstance(items, int) else len(items)

    def _shuffle(self, n):
        return torch.randperm(n, generator=torch.Generator().manual_seed(0))

    def _torchvision(self, name, root):
        kind, *splits, self.side = SETS[name]
        if not main_process():
            dist.barrier()  # until the first process has downloaded it
        try:
            sets = [getattr(datasets, kind)(root, download=True, **split) for split in splits]
        except Exception as error:
            fail(f"{name} is not in {root}/ and cannot be downloaded ({error}); fetch it where "
                 f"there is a network and copy {root}/, or give --dataset a folder of images")
        if main_process() and dist.is_initialized():
            dist.barrier()
        if name == "imagenette":
            return self._folder(root / "imagenette2-160")
        for split, (images, labels) in zip(("train", "test"), (zip(*s) for s in sets)):
            self.parts[split] = [np.array(image) for image in images], torch.tensor(labels)

    def _folder(self, root):
        def images(folder):
            return sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)

        top = root / "train" if (root / "train").is_dir() else root
        classes = sorted(d.name for d in top.iterdir() if d.is_dir()) if top != root else []
        for split, names in (("train", "train"), ("val", "val validation"), ("test", "test")):
            folder = next((root / n for n in names.split() if (root / n).is_dir()), None)
            if classes and folder:
                found = [(f, c) for c, name in enumerate(classes) for f in images(folder / name)]
                self.parts[split] = [f for f, _ in found], torch.tensor([c for _, c in found])
        if not classes:  # one tree, no labels
            files = images(top)
            self.parts["train"] = files, torch.full((len(files),), -1)
        files, labels = self.parts["train"]
        if not files:
            fail(f"no images in {top}, as <class>/* or below it; formats: {' '.join(SUFFIXES)}")
        if classes and "test" not in self.parts and "val" in self.parts:
            self.parts["test"] = self.parts.pop("val")  # ImageNet: its validation split is the test
        elif classes and "test" not in self.parts:
            order, cut = self._shuffle(len(files)), math.ceil(len(files) / 10)
            for split, index in (("test", order[:cut]), ("train", order[cut:])):
                self.parts[split] = [files[i] for i in index], labels[index]
            print(f"{root} has no test folder: a tenth of the training images is held out as test")
        for split in [k for k, (files, _) in self.parts.items() if not files]:
            fail(f"no images of the training classes in the {split} part of {root}")
        self.side = int(np.median(_sizes(self.parts["train"][0]).min(1)))

    def read(self, *how):
        """Read the training images as `train`; `fit` and `val` are (images, index) for probes."""
        self.how, self.train = how, self.load("train", *how)
        known = (self.train.labels >= 0).nonzero().squeeze(1)
        pool = known if len(known) else torch.arange(len(self.train.labels))
        pool, tenth = pool[self._shuffle(len(pool))], math.ceil(len(pool) / 10)
        self.val, self.fit = (self.train, pool[:tenth]), (self.train, pool[tenth:])
        if "val" in self.parts:
            images = self.load("val", *how)
            self.val, self.fit = (images, torch.arange(len(images.labels))), (self.train, known)

    def epoch(self, number, first, batch_size, crops, run, seed):
        """Batches of a shuffled pass over the training images from batch `first` on; with several
        processes each has its part of every batch. run: device, rank, world."""
        steps, mix = len(self.train.labels) // batch_size, torch.Generator()
        mix.manual_seed(seed * 2**20 + number)
        order = torch.randperm(len(self.train.labels), generator=mix)
        order = order[: steps * batch_size].view(steps, run.world, -1)[first:, run.rank]
        return batches(self.train, order.flatten(), order.shape[1], crops, run.device, self.how[-1],
                       (seed, number, run.rank), first)

    @property
    def labelled(self):
        return bool((self.train.labels >= 0).any())

    @functools.cached_property
    def test(self):
        """(images, index) of the test split, read when first asked for."""
        images = self.load("test", *self.how)
        return images, torch.arange(len(images.labels))

    def splits(self, test):
        """(images, index) of fit and val, or of fit, val and test."""
        return [self.fit, self.val, self.test] if test else [self.fit, self.val]

    def load(self, split, size, device, memory_gb, workers):
        """The Images of a split: on the device if they take at most memory_gb, else as files.

        In memory an image is kept with a longer side of at most four times `size`.
        """
        items, labels = self.parts[split]
        if isinstance(items, int):
            made, labels, _, _ = shapes(items, size, seed=["train", "test"].index(split))
            items = made.permute(0, 2, 3, 1).numpy()
        elif isinstance(items[0], str):
            H, W = np.minimum(_sizes(items), 4 * size).max(0)
            need = len(items) * 3 * H * W / 2**30
            if all(_read(f, size) is None for f in items):  # as a rule the first can be read
                fail(f"none of the {len(items)} image files of the {split} split can be read")
            if need > memory_gb:
                print(f"{split}: {len(items):,} images take {need:.2g} GB decoded, over "
                      f"--memory-limit {memory_gb:g}: streamed by {workers} worker processes")
                return Images(labels, files=list(items))
            with ProcessPoolExecutor(max(workers, 1)) as pool:
                read = list(pool.map(_read, items, [4 * size] * len(items), chunksize=64))
            warn_unreadable([f for f, image in zip(items, read) if image is None])
            good = [i for i, image in enumerate(read) if image is not None]
            items, labels = [read[i] for i in good], labels[good]
        sizes = torch.tensor([image.shape[:2] for image in items])
        pixels = torch.zeros(len(items), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
        for p, image in zip(pixels, items):
            image = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)  # grey: one channel
            p[:, : image.shape[1], : image.shape[2]] = image
        return Images(labels, pixels.to(device), sizes.to(device))


def warn_unreadable(files):
    if files:
        shown = ", ".join(files[:5]) + ", ..." * (len(files) > 5)
        print(f"unreadable and skipped: {len(files)} image file(s): {shown}")


# ==================================================================================================
# What comes in: files
# ==================================================================================================


def rgb(image):
    """A Pillow image of any kind -> 8-bit RGB, upright, transparent pixels on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip
        scale = 255 / 65535 if image.mode[0] == "I" else 255
        a = np.asarray(image, dtype=np.float32) * scale
        image = Image.fromarray(np.uint8(a.clip(0, 255)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read(file, most):
    """(H, W, 3) uint8 with a longer side of at most `most`, None where it cannot be read."""
    try:
        image = Image.open(file)
        image.draft("RGB", (most, most))
        image = rgb(image)
        image.thumbnail((most, most), Image.BILINEAR)
        return np.asarray(image)
    except Exception:  # a broken file raises whatever its decoder likes
        return None


def _sizes(files, most=256):
    """(n, 2) height, width from the headers of about `most` files spread over the list."""
    found = []
    for file in files[:: math.ceil(len(files) / most)]:
        try:
            found.append(Image.open(file).size[::-1])
        except Exception:
            continue
    return np.array(found or [(64, 64)])


# ==================================================================================================
# What comes in: batches of crops
# ==================================================================================================


class Crop(NamedTuple):
    """`count` views of size x size pixels: random boxes with area share and aspect in the ranges
    scale and ratio; without a ratio, the central square of `scale` times the shorter side."""

    size: int
    scale: float | tuple
    ratio: tuple = None
    count: int = 1

    def boxes(self, sizes):
        if self.ratio is None:
            return central_boxes(sizes, self.scale)
        return random_boxes(sizes, self.scale, self.ratio)


def reseed(*numbers):
    """Seed torch's generators from integers."""
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(state)  # of all devices; slow where there is none


def batches(images, order, size, crops, device, workers=0, seed=None, first=0):
    """Yield (views, index) for `order` (indices into images) cut into batches of `size`.

    views: for every crop and each of its count, float (B, 3, S, S) in [0, 1]. seed, a tuple: batch
    i and all that is drawn while it is in use depend on (*seed, first + i) alone.
    """
    chunks = order.split(size)
    stream = _stream(images, chunks, crops, device, workers, seed) if images.files else None
    places = order.to(device).split(size)  # once: copying to a GPU makes it wait
    for i, (index, at) in enumerate(zip(chunks, places)):
        if stream:
            views, index = next(stream)
            views = [v.to(device, non_blocking=True).movedim(3, 1).float() / 255 for v in views]
        if seed is not None:
            reseed(*seed, first + i)
        if not stream:
            x, sizes = images.pixels[at].float() / 255, images.sizes[at]
            views = [crop_resize(x, c.boxes(sizes), c.size) for c in crops for _ in range(c.count)]
        yield views, index


def _stream(images, chunks, crops, device, workers, seed):
    loader = torch.utils.data.DataLoader(
        _Files(images.files, crops, seed), batch_sampler=[c.tolist() for c in chunks],
        num_workers=workers, collate_fn=_collate, pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent)
    for views, index, bad in loader:
        bad = set().union(*bad) - images.unreadable
        warn_unreadable(sorted(bad))
        images.unreadable |= bad
        yield views, index


def _collate(items):
    views, index, bad = zip(*items)
    return [torch.from_numpy(np.stack(v)) for v in zip(*views)], torch.tensor(index), bad


def _leave_signals_to_the_parent(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Files(torch.utils.data.Dataset):
    """i -> crops of file i, uint8 (S, S, 3), i, unreadable files; the next stands in for those."""

    def __init__(self, files, crops, seed):
        self.files, self.crops, self.seed = files, crops, seed

    def __getitem__(self, i):
        bad = []
        while len(bad) < len(self.files):
            try:
                return self.views(i), i, bad
            except Exception:  # a broken file raises whatever its decoder likes
                bad.append(self.files[i])
                i = (i + 1) % len(self.files)
        raise RuntimeError(f"none of the {len(bad)} image files can be read")

    def views(self, i):
        if self.seed is not None:
            reseed(*self.seed, i, 1)  # 1: not the draws of batch i
        image = Image.open(self.files[i])
        turned = image.getexif().get(0x0112, 1) > 4
        width, height = image.size[::-1] if turned else image.size
        sizes = torch.tensor([[height, width]])
        boxes = [(c.size, *box) for c in self.crops
                 for box in c.boxes(sizes.expand(c.count, 2)).tolist()]
        need = max(size / min(h, w) for size, _, _, h, w in boxes)
        draft = image.draft("RGB", [math.ceil(need * s) for s in image.size])  # JPEG: 1/2, 1/4, 1/8
        f = max(draft[1][2:]) / max(width, height) if draft else 1.0
        image = rgb(image)
        return [np.asarray(image.resize((size, size), Image.BILINEAR,
                                        (f * x, f * y, f * (x + w), f * (y + h))))
                for size, y, x, h, w in boxes]

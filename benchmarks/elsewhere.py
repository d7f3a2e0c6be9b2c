"""Where does a run lose time beside its steps? A whole run of a method, with a stop-watch on the
rest.

    python benchmarks/elsewhere.py simclr
    python benchmarks/elsewhere.py dino --dataset cifar10 --epochs 20 --compile --out dino.csv

Options that are not in --help are those of the method's file; the files of the run itself go to a
temporary folder. Seconds, and their share of this run and of one with --of epochs: there the steps
and the lines on progress are more, last.pt is written once a minute, and reading, the first step
(with --compile it compiles), four evaluations and the end cost what they cost here.

"First step" is what it takes longer than the others. The rest is on no stop-watch: building the
networks, the order of images. A GPU's steps are counted where the program waits for it, every tenth
step.
"""

import argparse
import contextlib
import importlib
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common

METHODS = "pretext simclr moco byol dino ibot dinov2".split()
PARTS = {  # name: the functions whose time it is, those of common with a dot
    "reading the images": [".Data.__init__", ".Data.read"],
    "views.png": ["show_views"],
    "evaluations while it trains": ["evaluate"],
    "last.pt": [".save"],
    "metrics.jsonl, args.json": [".write_rows"],
    "progress bar and lines": [".Bar.say", "print"],
    "test images, floors": ["report"],
    "backbone.pt, curves, results": ["finish"],
}
ONCE = {"first step", "reading the images", "views.png", "evaluations while it trains",
        "test images, floors", "backbone.pt, curves, results", "rest"}  # however many epochs


class Watch:
    """Seconds and calls by name; what runs inside another watched function is that one's."""

    def __init__(self):
        self.seconds, self.calls, self.depth = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0), 0

    def on(self, name, f):
        def watched(*given, **more):
            self.depth, begun = self.depth + 1, time.perf_counter()
            try:
                return f(*given, **more)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds[name] += time.perf_counter() - begun
                    self.calls[name] += 1
        return watched


def steps_of(watch):
    """Data.epoch with the clock read at every batch -> it, and the list of seconds of all steps."""
    epoch, taken = common.Data.epoch, []

    def timed(*given):
        last = None
        for item in epoch(*given):
            now, lost = time.perf_counter(), sum(watch.seconds.values())
            if last:
                taken.append(now - last[0] - (lost - last[1]))
            last = now, lost
            yield item
        taken.append(time.perf_counter() - last[0] - sum(watch.seconds.values()) + last[1])

    return timed, taken


def measure(method, args):
    """One run -> rows of (name, calls, seconds), and the seconds of the whole."""
    watch = Watch()
    timed, taken = steps_of(watch)
    with contextlib.ExitStack() as stack:
        for name, functions in PARTS.items():
            for f in functions:
                *path, last = f.split(".")
                owner = common if path else method
                owner = getattr(owner, path[1]) if len(path) > 1 else owner
                real = print if last == "print" else getattr(owner, last, None)
                if real:
                    stack.enter_context(mock.patch.object(owner, last, watch.on(name, real),
                                                          create=last == "print"))
        stack.enter_context(mock.patch.object(common.Data, "epoch", timed))
        begun = time.perf_counter()
        with common.Stop() as stop:
            method.train(args, stop)
        whole = time.perf_counter() - begun
    usual = statistics.median(taken[1:])
    rows = [("steps", len(taken), usual + sum(taken[1:])),
            ("first step", 1, taken[0] - usual)]
    rows += [(name, watch.calls[name], seconds) for name, seconds in watch.seconds.items()]
    return rows + [("rest", 1, whole - sum(seconds for *_, seconds in rows))], whole


def longer(rows, epochs, whole):
    """rows of a run of `epochs` -> seconds in one of epochs * whole / epochs: name -> seconds."""
    factor = whole / epochs
    found = {name: s * (1 if name in ONCE else factor) for name, _, s in rows}
    calls, seconds = next((n, s) for name, n, s in rows if name == "last.pt")
    found["last.pt"] = seconds / calls * max(1, sum(found.values()) // 60)
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--of", type=int, default=200, help="epochs of the run to come (200)")
    p.add_argument("--out", help="CSV to write")
    own, others = p.parse_known_args(argv)
    method = importlib.import_module(own.method)
    with tempfile.TemporaryDirectory() as folder:
        args = method.options([*others, "--out", f"{folder}/run"])
        rows, whole = measure(method, args)
    found = longer(rows, args.epochs, own.of)
    total = sum(found.values())
    cuda = torch.cuda.is_available() and args.device in (None, "cuda")
    device = torch.cuda.get_device_name() if cuda else (
        f"{platform.processor() or 'cpu'} x {torch.get_num_threads()} threads")
    lines = [["method", "dataset", "device", "epochs", "part", "calls", "seconds", "share",
              f"share of {own.of} epochs"]]
    for name, calls, seconds in rows:
        lines.append([own.method, args.dataset, device, args.epochs, name.replace(",", ""), calls,
                      f"{seconds:.3f}", f"{seconds / whole:.4f}", f"{found[name] / total:.4f}"])
    if own.out:
        common.write(own.out, "".join(",".join(map(str, line)) + "\n" for line in lines))
    print(f"\n{own.method} on {args.dataset}, {device}: {whole:.0f} s, {args.epochs} epochs; "
          f"{own.of} epochs would take {common.duration(total)}")
    print(f"{'':40}{'calls':>6}{'seconds':>10}{'share':>8}{f'of {own.of} epochs':>15}")
    for name, calls, seconds in rows:
        print(f"{name:40}{calls:6}{seconds:10.2f}{seconds / whole:8.1%}{found[name] / total:15.1%}")
    return rows


if __name__ == "__main__":
    main()

"""Where does a run spend time besides its steps? A whole run of a method, timed.

    python benchmarks/elsewhere.py simclr
    python benchmarks/elsewhere.py dino --dataset cifar10 --epochs 20 --compile --out dino.csv

Options that are not in --help are those of METHOD.py; the files of the run itself go to a temporary
folder. It prints the seconds of each part, and its share of this run and of one with --of epochs,
in which the parts of PER_EPOCH grow with the epochs, last.pt is written once a minute, and the
others, four evaluations among them, cost what they cost here.

Every second is in one part. "first step" is what the first step takes beyond the others (with
--compile, compiling). A GPU's steps are counted where the program waits for it: every tenth step,
and at the end of an epoch.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

METHODS = "pretext simclr moco byol dino ibot dinov2".split()
PER_EPOCH = "steps", "end of an epoch", "metrics.jsonl"


class Watched(common.Run):
    """A run that times its parts; parts: name -> list of seconds."""

    def __init__(self, args):
        self.parts, self.last = {}, time.perf_counter()
        super().__init__(args)

    def lap(self, name):
        """Time since the last lap goes to this part."""
        now = time.perf_counter()
        self.parts.setdefault(name, []).append(now - self.last)
        self.last = now

    def epochs(self, data):
        self.lap("images, views.png, networks")
        yield from super().epochs(data)

    def batches(self, data, epoch, crops):
        for batch in super().batches(data, epoch, crops):
            yield batch
            self.lap("steps")

    def end_epoch(self, state):
        self.before_writing = "end of an epoch"
        due = super().end_epoch(state)
        self.lap(self.before_writing)
        self.before_writing = "evaluations" if due else "end of an epoch"
        return due

    def _write(self, state):
        self.lap(self.before_writing)
        before = self.saved
        super()._write(state)
        self.lap("metrics.jsonl" if self.saved == before else "last.pt")

    def report(self, results, test):
        results = super().report(results, test)
        if test:
            self.lap("test images, floors")
        return results

    def finish(self, *given):
        super().finish(*given)
        self.lap("backbone.pt, curves, results")


def measure(method, args):
    """One run -> name: list of seconds."""
    with Watched(args) as run:
        net, data = method.train(args, run)
        results = method.evaluate(net, data, args, run, test=True)
        run.finish(net.backbone, results, method.MEAN, method.STD, method.loading(args))
    first, *others = run.parts["steps"]
    if not others:
        common.fail("a run of one step has nothing to compare with: give more --epochs or images")
    usual = statistics.median(others)
    return run.parts | {"steps": [usual, *others], "first step": [first - usual]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--of", type=int, default=200, help="epochs of the longer run (200)")
    p.add_argument("--out", help="CSV to write")
    own, options = p.parse_known_args(argv)
    method = importlib.import_module(own.method)
    args = common.options(own.method, method.__doc__, method.OPTIONS, options)
    with tempfile.TemporaryDirectory() as folder:
        args.out = f"{folder}/run"
        parts = measure(method, args)
    here = {name: sum(seconds) for name, seconds in parts.items()}
    longer = dict(here)
    for name in longer.keys() & PER_EPOCH:
        longer[name] *= own.of / args.epochs
    minutes = sum(longer.values()) / 60
    longer["last.pt"] = statistics.mean(parts["last.pt"]) * max(1, minutes)
    whole, total = sum(here.values()), sum(longer.values())
    print(f"\n{own.method} on {args.dataset}: {whole:.0f} s, {args.epochs} epochs; {own.of} epochs "
          f"would take {total / 60:.1f} minutes")
    print(f"{'':32} times   seconds   share   of {own.of} epochs")
    lines = [f"method,dataset,epochs,part,times,seconds,share,share of {own.of} epochs"]
    for name, seconds in here.items():
        times, share, later = len(parts[name]), seconds / whole, longer[name] / total
        print(f"{name:32} {times:5} {seconds:9.2f} {share:7.1%} {later:10.1%}")
        lines.append(f"{own.method},{args.dataset},{args.epochs},{name.replace(',', '')},{times},"
                     f"{seconds:.3f},{share:.4f},{later:.4f}")
    if own.out:
        common.write(own.out, "\n".join([*lines, ""]))
    return parts


if __name__ == "__main__":
    main()

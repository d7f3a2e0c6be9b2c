"""Why DINO centres and sharpens: the two collapses (DINO).

Slides: "How does DINO work?", "Avoiding Collapse": DINO centres and sharpens the teacher's outputs
so that it does not say the same of every image. Paper: Section 5.3, Figure 7: the loss is the
teacher's entropy plus KL(teacher, student); without one of the two KL goes to 0, and nothing is
learned. The entropy tells the two ways apart: without sharpening it goes to ln K (all classes
alike, "uniform teacher"), without centring to 0 (one class for all images, "one-hot teacher").

On `shapes` (2,000 images, 186 steps, one seed) the entropy is 0 after 15 steps without centring and
ln K all along without sharpening or without both, and in all three KL is 0 after 50 steps. With
both the entropy moves between 3.5 and 6.2 of 6.24, and KL, 0.06 at the end, does not stay at 0. No
run has learned anything by then (14 to 16 % linear): this small network has batch norm in dino.py's
recipe, and not here.

    python lessons/dino_collapse.py                        4 runs of 46 s with one thread
    python lessons/dino_collapse.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to dino.py. The head has no batch norm here, as in the
paper: it centres by itself (--head-bn shows it). Writes lessons/dino_collapse.csv, a line for every
few steps of a run, and lessons/dino_collapse.png. What is said of the features is of validation
images, never of the test set.
"""

import argparse
import math
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dino

RUNS = {
    "DINO": [],
    "no centring": ["--no-centering"],
    "no sharpening": ["--no-sharpening"],
    "neither of the two": ["--no-centering", "--no-sharpening"],
}
TERMS = {"entropy": "entropy of the teacher", "kl": "KL(teacher, student)"}
SAID = ["linear_top1", "knn_top1"]


def observed(argv, every):
    """A run of dino.py -> its results, and a row for every so many steps: means of loss, entropy
    and KL."""
    terms, update = [], dino.clipped_update

    def looking(*given):
        losses, finite = update(*given)
        terms.append(losses)  # read at the end: to read is to wait for a GPU
        return losses, finite

    # In place of the report on test images: the evaluation on validation images.
    with (mock.patch.object(dino, "clipped_update", looking),
          mock.patch.object(dino, "report", dino.evaluate)):
        results = dino.main(argv)
    chunks, step, rows = torch.stack(terms).cpu().split(every), 0, []
    for chunk in chunks:
        step += len(chunk)
        rows.append({"step": step} | dict(zip(("loss", *TERMS), chunk.nanmean(0).tolist())))
    return results, rows


def figure(path, rows, chance):
    """Figure 7: a line per run, the mean of its seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(10, 4), layout="constrained")
    for ax, (key, title) in zip(whole.subplots(1, 2), TERMS.items()):
        for style, name in zip(("-", "-", "-", "--"), RUNS):  # the last two may lie on each other
            lines = {}
            for row in (row for row in rows if row["run"] == name):
                lines.setdefault(row["step"], []).append(row[key])
            means = [sum(v) / len(v) for v in lines.values()]
            ax.plot(list(lines), means, style, label=name, alpha=0.8)
        ax.set(title=title, xlabel="step")
        ax.axhline(0, ls=":", c="grey")
    whole.axes[0].axhline(chance, ls=":", c="grey")
    for ax, y, text in ((0, chance, "ln K: all classes alike"), (0, 0, "one class for all images"),
                        (1, 0, "nothing left to learn")):
        whole.axes[ax].annotate(text, (0, y), fontsize=8, color="grey", va="bottom")
    whole.axes[0].margins(y=0.1)
    whole.axes[1].legend(fontsize=8)
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--limit", type=int, default=2000, help="training images (2000)")
    p.add_argument("--epochs", type=int, default=6, help="of each run (6)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    p.add_argument("--every", type=int, default=5, help="steps in a line of the CSV (5)")
    p.add_argument("--runs", default="runs/lessons/dino_collapse", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows, ends = [], []
    for seed in range(args.seeds):
        for name, change in RUNS.items():
            own = ["--limit", str(args.limit), "--epochs", str(args.epochs), "--seed", str(seed),
                   "--eval-every", "0", "--no-head-bn", *others, *change,
                   "--out", f"{args.runs}/{name.replace(' ', '-')}-s{seed}"]
            print(f"\n{name}")
            results, steps = observed(own, args.every)
            word = {"verdict": results["verdict"].split(":")[0]}
            ends.append({"run": name, "seed": seed} | steps[-1]
                        | {k: results[k] for k in SAID if k in results} | word)
            rows += [{"run": name, "seed": seed} | row | word for row in steps]

    def lines(rows):
        return [[f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()]
                for row in rows]

    table = [list(rows[0]), *lines(rows)]
    common.write(f"{args.out}/dino_collapse.csv", "".join(",".join(c) + "\n" for c in table))
    figure(f"{args.out}/dino_collapse.png", rows, math.log(results["out_dim"]))
    print(f"\nthe last {args.every} steps; ln K is {math.log(results['out_dim']):.3f}")
    for line in [list(ends[0]), *lines(ends)]:
        print(f"{line[0]:20}" + "".join(f"{cell:>13}" for cell in line[1:-1]) + f"  {line[-1]}")


if __name__ == "__main__":
    main()

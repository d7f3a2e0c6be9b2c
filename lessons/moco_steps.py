"""From MoCo v1 to v2, one change at a time; and what the queue and the momentum do (MoCo).

Slides: "MoCov2 vs. SimCLR": rows v1 and (a) to (d) switch the MLP head (MLP), v2's augmentation
(aug+) and the cosine schedule (cos) on. Paper: v2, Table 1; v1, Figure 3 (K) and Section 4.1 (m).

tau goes with the head, as in v2: 0.07 with the linear one, 0.2 with the MLP. On images
up to 64 pixels the recipes do not blur, so aug+ is a weaker hue and a jitter of 80 % of the images;
with --blur 0.5 it is the paper's.

With 2,000 images of `shapes` (8 epochs, one seed, 200 validation images) v1 and (a) to (d) have 50,
34, 40, 43.5 and 39.5 % linear: so early v2's changes do not pay, and with the MLP alone z is near a
point (spread 0.05).

    python lessons/moco_steps.py --limit 2000              6 min with one thread
    python lessons/moco_steps.py                           5 short runs on `shapes`, 2 CPU cores
    python lessons/moco_steps.py --dataset cifar10 --epochs 200 --seeds 3

The two ablations, v2 with other lengths of the queue and with other momenta of the key encoder:

    python lessons/moco_steps.py --queues 64 128 256 512 1024
    python lessons/moco_steps.py --ms 0 0.9 0.99 0.999

Options that are not listed in --help go to moco.py. Writes lessons/moco_steps.csv, a line per run,
and lessons/moco_steps.png, the ablations with -queues or -ms in the name. Our figures are of the
validation images, never of the test set; those beside them are the papers', on ImageNet. A queue
that is long beside the run holds random keys for a good part of it.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco

ROWS = {  # of the slide -> what is on, its ImageNet top-1
    "v1": ("", 60.6), "(a)": ("MLP", 66.2), "(b)": ("aug+", 63.4), "(c)": ("MLP aug+", 67.3),
    "(d)": ("MLP aug+ cos", 67.5)}
SWITCHES = {  # off, on
    "MLP": ("--head linear --temperature 0.07", "--head mlp --temperature 0.2"),
    "aug+": ("--aug v1", "--aug v2"), "cos": ("--schedule step", "--schedule cosine")}
OF_M = {0: math.nan, 0.9: 55.2, 0.99: 57.8, 0.999: 59.0}  # v1, K 4096; with 0 it "fails"
SHOWN = ("linear_top1", "knn_top1", "spread", "rank_h", "loss")
KEYS = ("case", "head", "aug", "schedule", "tau", "queue", "m", "seed", "epochs", *SHOWN)


def cases(args):
    """Case -> the options that make it, the paper's top-1 on ImageNet or nan."""
    if args.queues:
        return {f"K {k}": (["--queue", str(k)], math.nan) for k in args.queues}
    if args.ms:
        return {f"m {m:g}": (["--m", str(m)], OF_M.get(m, math.nan)) for m in args.ms}
    made = {}
    for row, (on, top1) in ROWS.items():
        change = " ".join(pair[name in on.split()] for name, pair in SWITCHES.items())
        made[f"{row} {on}".strip()] = change.split(), top1
    return made


def figure(path, table, paper, epochs):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    known = {case: top1 for case, top1 in paper.items() if top1 == top1}
    whole = Figure(figsize=(11 if known else 6, 4), layout="constrained")
    left, *right = whole.subplots(1, 1 + bool(known), squeeze=False)[0]
    for i, key in enumerate(("linear_top1", "knn_top1")):
        means, deviations = zip(*(columns[key] for columns in table.values()))
        place = [x + (i - 0.5) * 0.4 for x in range(len(table))]
        bars = left.bar(place, means, 0.38, yerr=deviations, label=f"h, {key[:-5]}")
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set(ylabel="validation top-1, %", title=f"here, after {epochs} epochs")
    left.margins(y=0.2)
    left.legend(fontsize=8, ncols=2, loc="upper center")
    for ax in right:
        ax.bar_label(ax.bar(range(len(known)), known.values(), 0.6), fmt="%.1f", fontsize=8)
        ax.set(title="ImageNet, after 200 epochs (papers)", ylabel="top-1, %")
    for ax, names in zip((left, *right), (table, known)):
        ax.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    sweep = p.add_mutually_exclusive_group()
    sweep.add_argument("--queues", type=int, nargs="+", help="in place of the rows: values of K")
    sweep.add_argument("--ms", type=float, nargs="+", help="in place of the rows: values of m")
    p.add_argument("--epochs", type=int, default=8, help="of each run (8)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    p.add_argument("--runs", default="runs/lessons/moco_steps", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows, todo = [], cases(args)
    for seed in range(args.seeds):
        for case, (change, _) in todo.items():
            folder = common.run_folder(f"{args.runs}/{case.replace(' ', '-')}-s{seed}", False)
            own = ["--epochs", str(args.epochs), "--seed", str(seed), "--eval-every", "0"]
            # In place of the report on test images: the evaluation on validation images.
            with mock.patch.object(moco, "report", moco.evaluate):
                results = moco.main([*own, *others, *change, "--out", str(folder)])
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            rows.append(results | {"case": case, "loss": last["loss"] or math.nan})
    if "linear_top1" not in rows[0]:
        common.fail("these images have no labels, there is nothing to probe for")
    name = f"{args.out}/moco_steps" + "-queues" * bool(args.queues) + "-ms" * bool(args.ms)
    lines = [KEYS] + [[f"{v:.5g}" if isinstance(v := row[k], float) else str(v) for k in KEYS]
                      for row in rows]
    common.write(f"{name}.csv", "".join(",".join(line) + "\n" for line in lines))
    table = {}
    for case in todo:
        columns = torch.tensor([[row[k] for k in SHOWN] for row in rows if row["case"] == case]).T
        deviations = columns.std(1) if args.seeds > 1 else torch.zeros(len(SHOWN))
        table[case] = dict(zip(SHOWN, zip(columns.mean(1).tolist(), deviations.tolist())))
    figure(f"{name}.png", table, {case: top1 for case, (_, top1) in todo.items()}, args.epochs)
    print(f"\nvalidation, {args.seeds} seed(s)" + "".join(f"{k:>13}" for k in SHOWN) + "  ImageNet")
    for case, columns in table.items():
        print(f"{case:21}" + "".join(f"{m:7.2f} ±{d:4.1f}" for m, d in columns.values())
              + f"{todo[case][1]:10.1f}".replace("nan", ""))


if __name__ == "__main__":
    main()

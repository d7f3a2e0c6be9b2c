"""Why does BYOL not collapse? What happens without each of its parts (BYOL, SimSiam).

Slides: "How does BYOL work?" (predictor, moving average); "What's special about BYOL?": no
negatives, though the same vector for all images is a perfect solution. Papers: BYOL, Section 5 (m =
0 collapses, as does no predictor) and the appendix on a near-optimal predictor (m = 0 works where
the predictor learns faster); SimSiam (Chen & He 2020, arXiv 2011.10566), Section 4 (predictor and
stop-gradient are needed, the moving average is not).

Seen on `shapes` (2000 images, 6 epochs, one seed): without predictor or without stop-gradient z is
at a point after an epoch or two, spread 0.07 and 0.05 in the end, and the loss, 0.009 and 0.003, is
the lowest of all. With both, the spread is 0.87 and the loss 0.71. m = 0 does not collapse, in 186
steps at least: spread 0.85, and 0.86 with ten times the rate for the predictor. So it is in
SimSiam; in BYOL's paper m = 0 ends near chance. The k-NN of h tells none of this so early: 32 %
with BYOL, 34.5 and 33 % in the collapsed runs, 27 and 33.5 % with m = 0, 24.5 % untrained, each
give or take 3 points (200 images). Neither a low loss nor a fair h says that all is well: ask z.

    python lessons/collapse.py                             5 short runs on `shapes`, 2 CPU cores
    python lessons/collapse.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to byol.py. Writes lessons/collapse.csv, a line per run and
epoch, and lessons/collapse.png: over training the loss, the spread of z (1: all over the sphere, 0:
at a point) and the k-NN top-1 of h. All figures are of validation images, never of the test set.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))
import byol
import common

RUNS = {
    "BYOL": [],
    "no predictor": ["--no-predictor"],
    "m = 0": ["--m", "0"],
    "m = 0, predictor x 10": ["--m", "0", "--predictor-lr-scale", "10"],
    "no stop-gradient": ["--no-stop-gradient"],
}
PANELS = {"loss": "loss", "spread": "spread of z", "knn_top1": "k-NN of h, validation top-1, %"}
TOP1 = "linear_top1", "knn_top1", "untrained_knn_top1"  # of h, none without labels
KEYS = *"run seed epoch loss spread rank_z alignment uniformity rank_h".split(), *TOP1, "verdict"


def untrained(state, data, args, run):
    """In place of byol.report: k-NN of the network as it was at first, on validation images."""
    if not data.labelled:
        return {}
    f, view = byol.build(args).to(run.device).eval(), byol.central(args)
    parts = [byol.embed(lambda x: f(x[0])[:1], view, p, args, run) for p in (data.fit, data.val)]
    return {"untrained_knn_top1": byol.knn(*parts[0], *parts[1], args.knn_k, args.knn_tau)}


def figure(path, rows):
    """A line per run, the mean of its seeds; rows: of all runs, seeds and epochs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    panels = {k: title for k, title in PANELS.items() if k in rows[0]}  # no top-1 without labels
    whole = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    epochs = sorted({row["epoch"] for row in rows})
    for ax, (key, title) in zip(whole.subplots(1, len(panels)), panels.items()):
        for name in RUNS:
            values = [[row[key] for row in rows if (row["run"], row["epoch"]) == (name, epoch)]
                      for epoch in epochs]
            ax.plot(epochs, [sum(v) / len(v) for v in values], ".-", label=name, alpha=0.8)
        floor = {"loss": 2.0, "spread": 0.1}.get(key, rows[0].get("untrained_knn_top1"))
        label = {"loss": "nothing learned", "spread": "a point"}.get(key, "untrained network")
        ax.axhline(floor, ls=":", c="grey")
        ax.annotate(label, (epochs[-1], floor), fontsize=8, color="grey", ha="right", va="bottom")
        ax.set(title=title, xlabel="epoch")
        ax.set_ylim(bottom=0)
    whole.axes[0].legend(fontsize=8)
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--limit", type=int, default=2000, help="training images (2000)")
    p.add_argument("--epochs", type=int, default=6, help="of each run (6)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    p.add_argument("--runs", default="runs/lessons/collapse", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows = []
    for seed in range(args.seeds):
        for name, change in RUNS.items():
            short = name.replace(" = ", "").replace(", ", "-").replace(" ", "-")
            folder = common.run_folder(f"{args.runs}/{short}-s{seed}", False)  # a free name
            own = ["--limit", str(args.limit), "--epochs", str(args.epochs), "--seed", str(seed),
                   "--eval-every", "1", *others, *change, "--out", str(folder)]
            print(f"\n{name}")
            with mock.patch.object(byol, "report", untrained):
                results = byol.main(own)
            floor = {k: v for k, v in results.items() if k == "untrained_knn_top1"}
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            rows += [{"run": name, "seed": seed} | json.loads(line) | floor for line in lines]
    keys = [k for k in KEYS if k in rows[0]]
    table = []
    for row in rows:
        row["verdict"] = row["verdict"].split(":")[0]
        table.append([f"{v:.5g}" if isinstance(v := row[k], float) else str(v) for k in keys])
    quoted = [[f'"{cell}"' if "," in cell else cell for cell in line] for line in [keys, *table]]
    common.write(f"{args.out}/collapse.csv", "".join(",".join(line) + "\n" for line in quoted))
    figure(f"{args.out}/collapse.png", rows)
    shown = [k for k in ("seed", "loss", "spread", *TOP1) if k in keys]
    print(f"\nvalidation, after {args.epochs:<12}" + "".join(f"{k:>20}" for k in shown))
    for row in [row for row in rows if row["epoch"] == args.epochs]:
        cells = "".join(f"{row[k]:20.3g}" for k in shown)
        print(f"{row['run']:30}{cells}  {row['verdict']}")


if __name__ == "__main__":
    main()

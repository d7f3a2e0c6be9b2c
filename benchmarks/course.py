"""Accuracy over the minutes of training: runs/ -> a CSV, and from the CSV a picture.

    python benchmarks/course.py --name '*-cifar10-cpu-s*' --out benchmarks/cifar10-cpu

Every evaluation of a run on validation images is a row of OUT.csv, with the minutes of training up
to it, and a point of OUT.png, with a line per run and a colour per method. Horizontal lines are raw
pixels, untrained networks, and the same networks with labels (supervised.py, after its last epoch),
on test images, means over the runs. Rows of other runs stay in the CSV.
"""

import argparse
import csv
import json
import statistics
from itertools import accumulate
from pathlib import Path

TOP1 = {"linear_top1": "linear probe of h", "knn_top1": "k-NN of h"}
FLOORS = [f"{kind}_{key}" for kind in ("pixels", "untrained") for key in TOP1]
COLUMNS = ["run", "method", "arch", "epoch", "minutes", *TOP1, *FLOORS]
NAMES = "simclr moco byol dino ibot pretext dinov2".split()
COLOURS = {name: f"C{i}" for i, name in enumerate(NAMES)}  # of matplotlib


def rows_of(folder):
    """A row for each evaluation. An epoch that was interrupted is timed by its second part."""
    results = json.loads((folder / "results.json").read_text())
    first = {"run": folder.name, "method": results["method"], "arch": results["arch"]}
    if results.get("supervised_top1"):
        return [first | {"epoch": results["epochs"], "minutes": results["train_seconds"] / 60}
                | {key: results[key] for key in TOP1}]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    took = [*accumulate(1 / row["images_per_second"] for row in metrics)]
    return [first | {k: results[k] for k in FLOORS} | {k: row[k] for k in TOP1}
            | {"epoch": row["epoch"], "minutes": results["train_seconds"] / 60 * t / took[-1]}
            for row, t in zip(metrics, took) if "linear_top1" in row]


def merge(path, rows):
    """Write the CSV: these rows, and those of other runs already in it -> all, as text."""
    made, held = {row["run"] for row in rows}, []
    if path.exists():
        with path.open() as file:
            held = [row for row in csv.DictReader(file) if row["run"] not in made]
    rows = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    rows = sorted(held + rows, key=lambda row: (row["run"], int(row["epoch"])))
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def panel(ax, key, rows):
    for run in dict.fromkeys(row["run"] for row in rows):
        line = [row for row in rows if row["run"] == run and row[f"pixels_{key}"]]
        if line:
            ax.plot([float(row["minutes"]) for row in line], [float(row[key]) for row in line],
                    "o-", ms=4, c=COLOURS[line[0]["method"]], label=line[0]["method"])
    levels = {}
    for row in rows:
        if not row[f"pixels_{key}"]:
            levels.setdefault((f"{row['arch']}, with labels", "--"), {})[row["run"]] = row[key]
            continue
        levels.setdefault(("raw pixels", "-."), {})[row["run"]] = row[f"pixels_{key}"]
        kind = "ViT" if row["arch"].startswith("vit") else "convnets"
        levels.setdefault((f"{kind}, untrained", ":"), {})[row["run"]] = row[f"untrained_{key}"]
    for (label, style), values in sorted(levels.items()):
        height = statistics.mean(map(float, values.values()))
        ax.axhline(height, c="black", ls=style, lw=0.8, zorder=0)
        x, side = (0.01, "left") if label == "raw pixels" else (0.99, "right")
        va = "top" if label.startswith("ViT") else "bottom"  # as pixels are close to a ViT
        ax.annotate(f"{label} {height:.1f}", (x, height), va=va, ha=side, fontsize=8,
                    xycoords=("axes fraction", "data"))
    ax.set(xlabel="minutes of training", ylabel="top-1, %", title=TOP1[key], xlim=(0, None))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    p.add_argument("--name", default="*", help="which of them, a pattern (*)")
    p.add_argument("--out", required=True, help="CSV and PNG to write, without suffix")
    args = p.parse_args(argv)
    files = sorted(Path(args.runs).glob(f"{args.name}/results.json"))
    folders = [f.parent for f in files if not json.loads(f.read_text()).get("eval")]
    rows = merge(Path(f"{args.out}.csv"), [row for f in folders for row in rows_of(f)])
    if not rows:
        raise SystemExit(f"error: no finished run in {args.runs}/ is called {args.name}")
    from matplotlib.figure import Figure  # the CSV is written without it

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, key in zip(panels, TOP1):
        panel(ax, key, rows)
    handles, labels = panels[0].get_legend_handles_labels()
    methods = dict(zip(labels, handles))
    figure.legend(methods.values(), methods, loc="outside right upper")
    figure.savefig(f"{args.out}.png")
    return figure


if __name__ == "__main__":
    main()

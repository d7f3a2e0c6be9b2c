"""runs/*/results.json -> a CSV: mean and standard deviation over the seeds of every experiment.

    python benchmarks/table.py [--runs runs] [--name 'moco-*'] [--out benchmarks/results.csv]

An experiment is the name of a folder without its seed: runs/moco-cifar10-s0, -s1 and -s2 are one.
If a seed was run again (-s0-2), the last run counts. Evaluations (-eval) are left out. With one
seed the deviation is empty, not 0. Rows of other experiments stay in the CSV.
"""

import argparse
import csv
import json
import re
import statistics
from pathlib import Path

SAME = "method dataset epochs image_size device".split()  # columns besides the results
FREE = "seed out resume eval data_dir workers memory_limit".split()  # may differ between seeds
FIGURES = ("linear_top1 knn_top1 head_linear_top1 head_knn_top1 untrained_linear_top1 "
           "untrained_knn_top1 pixels_linear_top1 pixels_knn_top1 supervised_top1 spread "
           "alignment uniformity rank_h rank_z train_seconds total_seconds images_per_second "
           "peak_memory_mb").split()


def written(file):
    return file.stat().st_mtime


def collect(runs, pattern):
    """experiment -> {seed: (results, options)}."""
    found = {}
    for file in sorted(Path(runs).glob(f"{pattern}/results.json"), key=written):
        name = file.parent.name
        if re.search(r"-eval(-\d+)?$", name):
            continue
        results = json.loads(file.read_text())
        options = json.loads(file.with_name("args.json").read_text())
        experiment = re.sub(r"-s\d+(-\d+)?$", "", name)
        found.setdefault(experiment, {})[results["seed"]] = results, options  # the last one counts
    return found


def check(name, seeds):
    """The seeds of an experiment have to differ in nothing else."""
    settings = [options | {k: results[k] for k in SAME} for results, options in seeds]
    for key in sorted(set().union(*settings) - set(FREE)):
        values = sorted({str(options.get(key)) for options in settings})
        if len(values) > 1:
            raise SystemExit(f"error: the runs of {name} differ in {key}: {', '.join(values)}; "
                             "move one of them or give it another --out")


def row_of(name, seeds):
    check(name, seeds)
    runs = [results for results, _ in seeds]
    row = {"experiment": name, "seeds": len(runs)} | {k: runs[0][k] for k in SAME}
    for key in FIGURES:
        values = [results[key] for results in runs if results.get(key) is not None]
        row[key] = f"{statistics.mean(values):.4g}" if values else ""
        row[f"{key}_sd"] = f"{statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return row


def merge(path, rows):
    """Write the CSV: these rows, and those of other experiments already in it."""
    held = []
    if path.exists():
        with path.open() as file:
            held = list(csv.DictReader(file))
    table = {row["experiment"]: row for row in [*held, *rows]}
    columns = dict.fromkeys([*rows[0], *(held[0] if held else [])])
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows(table[name] for name in sorted(table))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    p.add_argument("--name", default="*", help="which of them, a pattern (*)")
    p.add_argument("--out", help="CSV to write or add to (none: only print)")
    args = p.parse_args(argv)
    found = collect(args.runs, args.name)
    rows = [row_of(name, [*found[name].values()]) for name in sorted(found)]
    if not rows:
        raise SystemExit(f"error: no {args.runs}/{args.name}/results.json; run something first")
    if args.out:
        merge(Path(args.out), rows)
    print(f"{'experiment':36} seeds  linear top-1     k-NN top-1    minutes   images/s")
    for row in rows:
        top1 = [f"{row[k] or '-':>6} ± {row[k + '_sd'] or '-':5}" for k in FIGURES[:2]]
        minutes = float(row["train_seconds"] or "nan") / 60
        print(f"{row['experiment']:36} {row['seeds']:5} {' '.join(top1)} {minutes:10.1f} "
              f"{row['images_per_second']:>10}")
    return rows


if __name__ == "__main__":
    main()

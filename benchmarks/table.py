"""runs/*/results.json -> a CSV: mean and standard deviation over the seeds of every experiment.

    python benchmarks/table.py [--runs runs] [--name 'moco-*'] [--out benchmarks/results.csv]

An experiment is the name of a folder without its seed: runs/simclr-shapes-s0, -s1 and -s2 are one.
If a seed was run again (-s0-2) the last of them counts. Evaluations (-eval) are left out. With one
seed the deviation is empty, not 0. Rows of other experiments that the CSV holds stay in it.
"""

import argparse
import csv
import io
import json
import re
import statistics
from pathlib import Path

SAME = "method dataset epochs image_size device".split()  # columns beside the figures
FREE = "seed out resume eval data_dir workers memory_limit".split()  # may differ between seeds
FIGURES = ("linear_top1 knn_top1 head_linear_top1 head_knn_top1 untrained_linear_top1 "
           "untrained_knn_top1 pixels_linear_top1 pixels_knn_top1 supervised_top1 spread "
           "alignment uniformity rank_h rank_z train_seconds total_seconds images_per_second "
           "peak_memory_mb").split()


def collect(runs, pattern):
    """experiment -> {seed: (results, options)}."""
    found = {}
    files = Path(runs).glob(f"{pattern}/results.json")
    for file in sorted(files, key=lambda f: f.stat().st_mtime):  # a later run replaces an earlier
        name, results = file.parent.name, json.loads(file.read_text())
        if not re.search(r"-eval(-\d+)?$", name):
            options = json.loads(file.with_name("args.json").read_text())
            seeds = found.setdefault(re.sub(r"-s\d+(-\d+)?$", "", name), {})
            seeds[results["seed"]] = results, options
    return found


def row_of(name, seeds):
    runs = [results for results, _ in seeds.values()]
    settings = [{k: r[k] for k in SAME} | {k: v for k, v in o.items() if k not in (*FREE, *SAME)}
                for r, o in seeds.values()]
    for key in sorted(set().union(*settings)):
        values = sorted({str(s.get(key)) for s in settings})
        if len(values) > 1:
            raise SystemExit(f"error: the runs of {name} differ in {key}: {', '.join(values)}; "
                             "move one of them or give it another --out")
    row = {"experiment": name, "seeds": len(runs)} | {k: settings[0][k] for k in SAME}
    for key in FIGURES:
        values = [run[key] for run in runs if key in run]
        row[key] = f"{statistics.mean(values):.4g}" if values else ""
        row[f"{key}_sd"] = f"{statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return row


def merge(path, rows):
    """Write the CSV: these rows, and those of other experiments that it has."""
    held = csv.DictReader(io.StringIO(path.read_text() if path.exists() else ""))
    table = {row["experiment"]: row for row in [*held, *rows]}
    columns = list(dict.fromkeys(k for row in [*rows, *table.values()] for k in row))
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows(table[k] for k in sorted(table))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    p.add_argument("--name", default="*", help="which of them, a pattern (*)")
    p.add_argument("--out", help="CSV to write or add to (none: only print)")
    args = p.parse_args(argv)
    rows = [row_of(*item) for item in sorted(collect(args.runs, args.name).items())]
    if not rows:
        raise SystemExit(f"error: no {args.runs}/{args.name}/results.json; run something first")
    if args.out:
        merge(Path(args.out), rows)
    print(f"{'experiment':36} seeds  linear top-1     k-NN top-1    minutes   images/s")
    for row in rows:
        top1 = [f"{row[k] or '-':>6} ± {row[k + '_sd'] or '-':5}" for k in FIGURES[:2]]
        name, speed = row["experiment"], row["images_per_second"]
        minutes = f"{float(row['train_seconds'] or 'nan') / 60:.1f}"
        print(f"{name:36} {row['seeds']:5} {' '.join(top1)} {minutes:>10} {speed:>10}")
    return rows


if __name__ == "__main__":
    main()

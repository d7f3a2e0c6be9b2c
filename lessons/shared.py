"""What several lessons do: options, runs, means over seeds, a table, a figure."""

import csv
import io
import re
from pathlib import Path

import torch

import common


def parser(doc, name, epochs):
    """The options of a lesson; what it does not know goes to the method."""
    p = common.Parser(description=doc.split("\n")[0], allow_abbrev=False)
    p.add_argument("--epochs", **common.FROM_1, default=epochs, help=f"of each run ({epochs})")
    p.add_argument("--seeds", **common.FROM_1, default=1, help="number of seeds (1)")
    p.add_argument("--runs", default=f"runs/lessons/{name}", help="folder of the runs")
    p.add_argument("--out", default=Path(__file__).parent, help="folder of CSV and PNG")
    return p


def train(method, own, name, seed, options, kind=common.Run):
    """Train a method and evaluate it, on validation images -> the network, the data, and the run,
    whose `rows` hold the figures of every epoch, the last those of the evaluation as well."""
    print(f"\n{name}, seed {seed}")
    folder = re.sub(r"[^\w.]+", "-", name).strip("-")
    argv = ["--epochs", own.epochs, "--seed", seed, "--eval-every", 0, *options,
            "--out", f"{own.runs}/{folder}-s{seed}"]
    args = common.options(method.__name__, method.__doc__, method.OPTIONS, [*map(str, argv)])
    if args.eval:
        common.fail(f"a lesson trains its networks: give --eval to {args.method}.py")
    with kind(args) as run:
        net, data = method.train(args, run)
        if "verdict" not in run.rows[-1]:
            method.evaluate(net, data, args, run)
    if "spread" not in run.rows[-1]:
        common.fail(f"nothing to show, {name}: {run.rows[-1]['verdict']}")
    return net, data, run


def over_seeds(rows, by, keys):
    """A row for every value of the columns `by`, with the means of the columns `keys`, and in
    <key>_sd their standard deviations."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in by), []).append(row)
    means = []
    for value, group in groups.items():
        mean = dict(zip(by, value))
        for k in keys:
            x = torch.tensor([row[k] for row in group], dtype=torch.float64)
            mean[k] = x.mean(0).tolist()
            mean[f"{k}_sd"] = x.std(0, correction=min(1, len(x) - 1)).tolist()
        means.append(mean)
    return means


def cell(row, key):
    value, deviation = row[key], row.get(f"{key}_sd", 0)
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f"{text} ± {deviation:.2g}" if deviation else text


def write_csv(path, rows, keys):
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(keys)
    table.writerows([cell(row, k) for k in keys] for row in rows)
    common.write(path, text.getvalue())


def show(rows, keys):
    """Print these columns. All figures that `train` finds are of validation images."""
    print("\nvalidation images".ljust(25) + "".join(f"{k:>20}" for k in keys[1:]))
    for row in rows:
        print(f"{row[keys[0]]:<24}" + "".join(f"{cell(row, k):>20}" for k in keys[1:]))


def figure(path, size, draw, *given):
    """The PNG that draw(figure, *given) makes with matplotlib, where that is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=size, layout="constrained")
    draw(whole, *given)
    common.write(path, lambda part: whole.savefig(part, format="png"))


def lines(ax, rows, by, x, y):
    """Of column y over column x, one for each value of the column `by`."""
    for value in dict.fromkeys(row[by] for row in rows):
        line = [row for row in rows if row[by] == value]
        places = [row[x] for row in line]
        ax.plot(places, [row[y] for row in line], ".-", label=value, alpha=0.8)
    ax.set(xlabel=x)

"""What the lessons share: options, runs, means over seeds, a table, a figure."""

import csv
import io
import math
import re
import textwrap
from pathlib import Path

import torch

import common


def parser(doc, name, epochs=None):
    """The options of a lesson; those it does not know are passed on to the method."""
    p = common.Parser(description=doc.split("\n")[0], allow_abbrev=False)
    if epochs:
        p.add_argument("--epochs", **common.FROM_1, default=epochs, help=f"per run ({epochs})")
    p.add_argument("--seeds", **common.FROM_1, default=3, help="number of seeds (3)")
    p.add_argument("--runs", default=f"runs/lessons/{name}", help="folder of the runs")
    p.add_argument("--out", type=folder, default=Path(__file__).parent, help="folder for CSV, PNG")
    return p


def folder(path):
    """A folder for results, made before the long runs start."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        common.fail(f"--out {path}: no folder can be made there ({error.strerror})")
    return Path(path)


def refuse(options, *others):
    """Fail on options that make no sense where a lesson trains networks of its own, and others."""
    useless = {"--seed", "--resume", "--eval", *others}
    given = {str(o).split("=")[0] for o in options} & useless
    if given:
        common.fail(f"this lesson does not take {min(given)}: it trains its own networks, with "
                    "--seeds seeds, on known images")


def need_labels(data):
    if not data.labelled:
        common.fail("these images have no labels, and this lesson needs them")


class LabelledRun(common.Run):
    """A run that does not begin to train on images without labels."""

    def epochs(self, data):
        need_labels(data)
        yield from super().epochs(data)


def train(method, own, name, seed, options, kind=common.Run):
    """Train a method and evaluate it on validation images -> the network, the data, and the run,
    whose `rows` hold the results of every epoch, the last one also those of the evaluation."""
    refuse(options)
    print(f"\n{name}, seed {seed}")
    label = re.sub(r"[^\w.]+", "-", name).strip("-")
    argv = ["--epochs", own.epochs, "--seed", seed, "--eval-every", 0, *options,
            "--out", f"{own.runs}/{label}-s{seed}"]
    args = common.options(method.__name__, method.__doc__, method.OPTIONS, [*map(str, argv)])
    with kind(args) as run:
        net, data = method.train(args, run)
        if "verdict" not in run.rows[-1]:
            method.evaluate(net, data, args, run)
    if "spread" not in run.rows[-1]:
        common.fail(f"nothing to show for {name}: {run.rows[-1]['verdict']}")
    return net, data, run


def untrained(method, data, run):
    """The floor: linear and k-NN top-1 of h of this run's network before training, named
    untrained_linear_top1 and untrained_knn_top1; empty without labels."""
    if not data.labelled:
        return {}
    net = method.build(run.args).to(run.device).eval()
    view, splits = method.central(run.args.image_size), data.splits(test=False)
    return method.accuracies(lambda x: net(*x)[:1], ["untrained_"], view, splits, run)


def over_seeds(rows, by, keys):
    """A row for every value of the columns `by`: the means of the columns `keys`, their standard
    deviations in <key>_sd, and in `seeds` the number of rows that were averaged."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in by), []).append(row)
    means = []
    for value, group in groups.items():
        mean = dict(zip(by, value)) | {"seeds": len(group)}
        for k in keys:
            x = torch.tensor([row[k] for row in group], dtype=torch.float64)
            mean[k] = x.mean(0).tolist()
            mean[f"{k}_sd"] = x.std(0, correction=min(1, len(x) - 1)).tolist()
        means.append(mean)
    return means


def difference(a, b, key, other=None):
    """a[key] - b[other or key] of means, and its standard error, 0 with one seed; a, b: rows of
    over_seeds, of as many seeds."""
    other = other or key
    error = math.sqrt((a[f"{key}_sd"] ** 2 + b[f"{other}_sd"] ** 2) / a["seeds"])
    return a[key] - b[other], error


def compare(a, b, key, other=None):
    """1 if the mean a[key] is above b[other or key], -1 if it is below, and 0 if the difference is
    within twice its standard error (or nan). With one seed any difference counts."""
    change, error = difference(a, b, key, other)
    return (change > 2 * error) - (change < -2 * error)


def answer(held, text):
    """The sentence below a figure; held: for each part of its claim, whether the rows show it."""
    word = "Yes" if all(held) else "Partly" if any(held) else "Not in these runs"
    return f"{word}: {text}"


def plural(count, thing):
    """2, "run" -> "2 runs"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


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


def show(rows, keys, title="validation images"):
    """Print these columns."""
    widths = {k: max(22, len(k) + 2) for k in keys[1:]}
    print(f"\n{title}\n{keys[0]:<24}" + "".join(f"{k:>{n}}" for k, n in widths.items()))
    for row in rows:
        print(f"{row[keys[0]]:<24}" + "".join(f"{cell(row, k):>{n}}" for k, n in widths.items()))


def figure(path, size, draw, *given, claim="", answer=""):
    """Write the PNG that draw(figure, *given) makes, if matplotlib is installed, with the claim
    above it and the answer below; print both. size: width, height in inches."""
    for text in filter(None, (claim, answer)):
        print("\n" + textwrap.fill(text, 100))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=size, layout="constrained", dpi=120)
    if claim:
        whole.suptitle(textwrap.fill(claim, int(9 * size[0])), fontsize=13, fontweight="bold")
    if answer:
        text = answer.replace(" %", "\u00a0%")  # a number and its % stay on one line
        whole.supxlabel(textwrap.fill(text, int(11 * size[0])), fontsize=11)
    draw(whole, *given)
    common.write(path, lambda part: whole.savefig(part, format="png"))


def lines(ax, rows, by, x, y):
    """Column y over column x, a line for each value of the column `by`; with rows of over_seeds,
    error bars are standard deviations."""
    for value in dict.fromkeys(row[by] for row in rows):
        line = [row for row in rows if row[by] == value]
        deviations = [row.get(f"{y}_sd", 0) for row in line]
        ax.errorbar([row[x] for row in line], [row[y] for row in line], deviations, fmt=".-",
                    label=value, alpha=0.8, capsize=3)
    ax.set(xlabel=x)


def bars(ax, rows, by, columns, hatched=(), fmt="%.0f"):
    """A group of bars for each row of over_seeds, named by its column `by`, with a bar for each of
    `columns` (key -> label). Error bars are standard deviations."""
    width = 0.8 / len(columns)
    for i, (key, label) in enumerate(columns.items()):
        places = [x + (i - (len(columns) - 1) / 2) * width for x in range(len(rows))]
        heights, deviations = [row[key] for row in rows], [row[f"{key}_sd"] for row in rows]
        drawn = ax.bar(places, heights, 0.9 * width, yerr=deviations, label=label, capsize=2,
                       hatch="//" if key in hatched else "", edgecolor="white")
        ax.bar_label(drawn, fmt=fmt, fontsize=8, padding=1)
    ax.set_xticks(range(len(rows)), [str(row[by]) for row in rows])
    ax.margins(y=0.2)


def floor(ax, level, label="untrained network", side="right"):
    """A dotted line at a level that is reached without learning."""
    ax.axhline(level, ls=":", c="black", lw=1)
    ax.annotate(label, (0.99 if side == "right" else 0.005, level), ha=side, va="bottom",
                xycoords=("axes fraction", "data"), fontsize=8,
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5})

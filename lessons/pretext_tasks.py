"""Which pretext task teaches what? All nine at the same budget (pretext.py).

Slides: "SSL: Pretext Task Taxonomy" and the trade-off before it: reconstructive tasks "capture
low-level details, may miss semantics", predictive and contrastive ones "focus on high-level
information". Kolesnikov et al. 2019 (arXiv 1901.09005) compare such tasks with the same networks:
there, too, a task that is solved better need not leave better features.

Every task trains the same ResNet on the same images for the same number of epochs; linear probe and
k-NN of h stand beside those of the untrained network, of raw pixels, and of the same network
trained with labels for as long. With --guards the pairs are shown instead: tasks with their guards
against shortcuts and without, where the task gets easier and the features, as a rule, worse.

On `shapes` (2 epochs, 400 validation images, one seed: 5 points are nothing) linear and k-NN top-1
are 30 and 29 for the untrained network, 29 and 48 for pixels, 88 and 85 with labels; split-brain 65
and 49, rotation 60 and 44, colorization 54 and 29, CPC 46 and 42, denoising 44 and 35, inpainting
42 and 42, view 40 and 28, patch 38 and 47, jigsaw 35 and 45: the taxonomy does not order them here.
--guards: rotation falls from 60 to 34 when the light tells the answer (solved in 99.8 % of cases)
or the interpolation does (59 %), view from 40 to 26 when the target moves along (loss 0, collapse),
inpainting from 42 to 32 with the hole always in the middle; patches without gaps are easier (33 %
solved for 25 %) and linear stays (38, 37), k-NN falls (47, 41).

    python lessons/pretext_tasks.py                        11 min on 2 CPU cores
    python lessons/pretext_tasks.py --guards               7 min
    python lessons/pretext_tasks.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to pretext.py. Writes lessons/pretext_tasks.csv (with
--guards: pretext_guards.csv), a line per network, and a figure of the same name. All figures are of
the validation images, never of the test set.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import pretext

TASKS = {task: ["--task", task] for task in pretext.TASKS}
GUARDS = {name: flags.split() for name, flags in {
    "rotation": "--task rotation", "light from above": "--task rotation --shade 0",
    "turns by interpolation": "--task rotation --without exact",
    "patch": "--task patch", "no gaps": "--task patch --without gap jitter",
    "view": "--task view", "the target moves": "--task view --without fixed",
    "inpainting": "--task inpainting", "hole in the middle": "--task inpainting --without place",
}.items()}
KEYS = "name seed loss accuracy linear_top1 knn_top1 rank_h seconds".split()


def figures(row, found):
    """What is kept of a network: row, and what is found of it."""
    return {k: row.get(k, found.get(k, "")) for k in KEYS}


def floors(args, data, run):
    """Untrained network, raw pixels, and the same network trained with labels: rows."""
    net = pretext.build(args).to(run.device)
    rows = [figures({"name": "untrained"}, pretext.evaluate({"net": net}, data, args, run))]
    parts = [pretext.embed(lambda x: [x[0].flatten(1)], pretext.central(args), part, args, run)
             for part in (data.fit, data.val)]
    linear, near = pretext.probes(parts, args)
    rows.append(figures({"name": "pixels"}, {"linear_top1": linear, "knn_top1": near}))
    begun, images, index = time.perf_counter(), *data.fit
    both = nn.Sequential(net.backbone, nn.Linear(net.backbone.dim, int(images.labels.max()) + 1))
    both.to(run.device).train()
    adamw, batch = torch.optim.AdamW(both.parameters(), weight_decay=0.01), min(32, len(index))
    mix, steps = torch.Generator().manual_seed(args.seed), args.epochs * (len(index) // batch)
    order = [index[torch.randperm(len(index), generator=mix)] for _ in range(args.epochs)]
    read = common.batches(images, torch.cat(order)[: steps * batch], batch, pretext.crops(args),
                          run.device, args.workers, (args.seed, 0))
    for step, (views, i) in enumerate(read):
        adamw.param_groups[0]["lr"] = pretext.lr_at(step, steps, steps // 10, 1e-3)
        with run.autocast():
            logits = both(torch.cat([common.flip(x, p=0.5) for x in views]))
        loss = F.cross_entropy(logits.float(), images.labels[i].to(run.device).repeat(2))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    row = {"name": "with labels", "loss": loss.item(), "seconds": time.perf_counter() - begun}
    return rows + [figures(row, pretext.evaluate({"net": net}, data, args, run))]


def summary(rows):
    """name -> {column: (mean, standard deviation over seeds)}."""
    table = {}
    for row in rows:
        for key in ("linear_top1", "knn_top1"):
            own = torch.tensor([r[key] for r in rows if r["name"] == row["name"]])
            deviation = own.std().item() if len(own) > 1 else 0.0
            table.setdefault(row["name"], {})[key] = own.mean().item(), deviation
    return table


def figure(path, table, epochs):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(10, 4.5), layout="constrained")
    ax = whole.subplots()
    for i, (key, label) in enumerate((("linear_top1", "linear"), ("knn_top1", "k-NN"))):
        means, deviations = zip(*(columns[key] for columns in table.values()))
        place = [x + 0.4 * i - 0.2 for x in range(len(table))]
        bars = ax.bar(place, means, 0.36, yerr=deviations, label=f"h, {label}")
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    for key, style in (("linear_top1", "--"), ("knn_top1", ":")):
        ax.axhline(table["untrained"][key][0], ls=style, c="grey", lw=1)
    ax.set(xticks=range(len(table)), ylabel="validation top-1, %", xlabel=f"after {epochs} epochs")
    ax.set_xticklabels(table, rotation=30, ha="right")
    ax.legend(fontsize=8)
    ax.margins(y=0.15)
    whole.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--guards", action="store_true", help="with and without guards, not all tasks")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="which (all)")
    p.add_argument("--limit", type=int, help="training images (all)")
    p.add_argument("--epochs", type=int, default=2, help="of each run (2)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    p.add_argument("--runs", default="runs/lessons/pretext", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    own, others = p.parse_known_args(argv)
    rows, runs = [], GUARDS if own.guards else {task: TASKS[task] for task in own.tasks}
    limit = ["--limit", str(own.limit)] if own.limit else []
    for seed in range(own.seeds):
        shared = [*limit, "--epochs", str(own.epochs), "--seed", str(seed), *others]
        args = pretext.options(shared)
        run = common.setup(args.device, args.amp)
        data = common.Data(args.dataset, args.data_dir, args.limit)
        pretext.complete(args, data.side, len(data))
        data.read(args.image_size, run.device, args.memory_limit, args.workers)
        if not data.labelled:
            common.fail("these images have no labels, there is nothing to probe for")
        rows += [row | {"seed": seed} for row in floors(args, data, run)]
        for name, flags in runs.items():
            print(f"\n{name}")
            folder = common.run_folder(f"{own.runs}/{name.replace(' ', '-')}-s{seed}", False)
            # In place of the report on test images: the evaluation on validation images.
            with mock.patch.object(pretext, "report", pretext.evaluate):
                found = pretext.main([*shared, *flags, "--eval-every", "0", "--out", str(folder)])
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            row = {"name": name, "seed": seed, "seconds": found["train_seconds"]}
            rows.append(figures(row, found | last))
    lines = [KEYS] + [[f"{v:.5g}" if isinstance(v := row[k], float) else str(v) for k in KEYS]
                      for row in rows]
    file = "pretext_guards" if own.guards else "pretext_tasks"
    common.write(f"{own.out}/{file}.csv", "".join(",".join(line) + "\n" for line in lines))
    table = summary(rows)
    figure(f"{own.out}/{file}.png", table, own.epochs)
    print(f"\nvalidation, after {own.epochs} epochs      linear         k-NN")
    for name, columns in table.items():
        print(f"{name:26}" + "".join(f"{m:8.1f} ±{d:4.1f}" for m, d in columns.values()))


if __name__ == "__main__":
    main()

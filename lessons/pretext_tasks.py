"""Which pretext task teaches what? All nine after equally many epochs (pretext.py).

Slides: "SSL: Pretext Task Taxonomy" and the trade-off before it: reconstructive tasks "capture
low-level details, may miss semantics", predictive and contrastive ones "focus on high-level
information". Kolesnikov et al. 2019 (arXiv 1901.09005) compare such tasks with the same networks:
there, too, solving a task better need not lead to better features.

Every task trains the same network on the same images for the same number of epochs, some with
several crops or tiles of an image; linear probe and k-NN of h are compared with those of rotation's
untrained network, of raw pixels, and of the same network trained with labels for as long. --guards
compares tasks with and without their guards against shortcuts instead: without them the task gets
easier and the features, as a rule, worse.

    python lessons/pretext_tasks.py
    python lessons/pretext_tasks.py --guards
    python lessons/pretext_tasks.py --dataset cifar10 --epochs 50

Options that are not listed in --help go to pretext.py. Writes lessons/pretext_tasks.csv (with
--guards: pretext_guards.csv), a line per network, and a figure of the same name. All results are on
validation images, except accuracy and loss of the task, which are from its last epoch of training
(the loss "with labels": from the last batch).
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import pretext
from lessons import shared

KINDS = {
    "reconstructive": "denoising inpainting colorization splitbrain".split(),
    "predictive": "rotation patch jigsaw".split(),
    "contrastive": ["cpc"],
    "step to BYOL": ["view"],
}
TASKS = {task: f"--task {task}" for kind in KINDS.values() for task in kind}
GUARDS = {  # a task, and below it the same without a guard
    "rotation": "--task rotation",
    "light from above": "--task rotation --shade 0",
    "turns by interpolation": "--task rotation --without exact",
    "patch": "--task patch",
    "no gaps": "--task patch --without gap jitter",
    "inpainting": "--task inpainting",
    "hole in the middle": "--task inpainting --without place",
    "view": "--task view",
    "the target moves": "--task view --without fixed",
}
CLAIMS = ("Every pretext task teaches something about the class, some far more in the same "
          "number of epochs",
          "A task without its guard against shortcuts teaches less")
KEYS = ["name", "seed", "loss", "accuracy", "linear_top1", "knn_top1", "rank_h", "seconds"]
FLOORS = {"untrained": "untrained network", "pixels": "pixels", "with labels": "with labels"}


def floors(own, seed, options):
    """Rows of the untrained network, raw pixels, and the same network trained with labels."""
    argv = ["--epochs", own.epochs, "--seed", seed, *options, "--out", f"{own.runs}/floors-s{seed}"]
    args = common.options("pretext", pretext.__doc__, pretext.OPTIONS, [*map(str, argv)])
    with common.Run(args) as run:
        data = common.load_data(args, pretext.OPTIONS, run)
        shared.need_labels(data)
        net = run.place(pretext.build(args))
        untrained = pretext.evaluate(net, data, args, run)
        pixels = pretext.accuracies(lambda x: [x[0].flatten(1)], [""],
                                    pretext.central(min(args.image_size, 32)), data.splits(False),
                                    run)
        supervised = train_with_labels(net, data, args, run)
        supervised |= pretext.evaluate(net, data, args, run)
    return [{"name": "untrained"} | untrained, {"name": "pixels"} | pixels,
            {"name": "with labels"} | supervised]


def train_with_labels(net, data, args, run):
    """For as many epochs as the tasks, on the images that the probe is fitted to."""
    begun, (images, index) = time.perf_counter(), data.fit
    batch, mix = min(32, len(index)), torch.Generator().manual_seed(args.seed)
    steps = args.epochs * (len(index) // batch)
    epochs = [index[torch.randperm(len(index), generator=mix)] for _ in range(args.epochs)]
    classifier = nn.Linear(net.backbone.dim, int(images.labels.max()) + 1)
    both = nn.Sequential(net.backbone, classifier).to(run.device).train()
    optimizer = torch.optim.AdamW(both.parameters(), weight_decay=0.01)
    batches = common.batches(images, torch.cat(epochs)[: steps * batch], batch, pretext.crops(args),
                             run.device, args.workers, (args.seed, 0))
    for step, (views, i) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = pretext.lr_at(step, steps, steps // 10, 1e-3)
        with run.autocast():
            logits = both(torch.cat([common.flip(x, p=0.5) for x in views]))
        loss = F.cross_entropy(logits.float(), images.labels[i].to(run.device).repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": loss.item(), "seconds": time.perf_counter() - begun}


def draw(whole, means, epochs):
    """means: a row for each network, the floors and the ceiling among them."""
    left, right = whole.subplots(2, 1, sharex=True)
    tasks = [row for row in means if row["name"] not in FLOORS]
    for ax, key, label in ((left, "linear_top1", "linear"), (right, "knn_top1", "k-NN")):
        shared.bars(ax, tasks, "name", {key: ""})
        for row, bar in zip(tasks, ax.patches):
            bar.set_facecolor("tab:blue" if row["name"] in TASKS else "tab:orange")
        for row in means[: len(FLOORS)]:
            side = "left" if row["name"] == "pixels" else "right"  # they may be at the same height
            shared.floor(ax, row[key], FLOORS[row["name"]], side)
        ax.set(ylabel=f"{label} top-1 of h, %")
        ax.margins(x=0.13)
    for label in right.get_xticklabels():
        label.set(rotation=20, ha="right", rotation_mode="anchor")
    unguarded = any(row["name"] not in TASKS for row in tasks)
    right.set(xlabel=f"after {epochs} epochs" + unguarded * "; orange: without a guard")


def of_tasks(rows, means):
    """In words: whether all tasks are above the untrained network, and the mean of each kind."""
    named = {row["name"]: row for row in means}
    tasks = sorted((row for name, row in named.items() if name not in FLOORS),
                   key=lambda row: row["linear_top1"])
    above = [shared.compare(row, named["untrained"], "linear_top1") > 0 for row in tasks]
    kinds = [{"kind": kind, "seed": row["seed"], "linear_top1": row["linear_top1"]}
             for row in rows for kind, names in KINDS.items() if row["name"] in names]
    average = shared.over_seeds(
        shared.over_seeds(kinds, ["kind", "seed"], ["linear_top1"]), ["kind"], ["linear_top1"])
    text = ", ".join(f"{row['kind']} {row['linear_top1']:.0f} ± {row['linear_top1_sd']:.0f}"
                     for row in average)
    ends = " to ".join(f"{row['linear_top1']:.0f} ({row['name']})" for row in (tasks[0], tasks[-1]))
    return shared.answer([all(above)], (
        f"{sum(above)} of {len(tasks)} tasks are above the untrained network beyond the noise in "
        f"the linear probe of h, {ends} %; on average {text} %."))


def of_guards(means):
    """In words: how many guards make a difference."""
    named = {row["name"]: row for row in means}
    parts, fallen = [], []
    for name, flags in GUARDS.items():
        task = flags.split()[1]
        if name != task:
            fallen.append(shared.compare(named[name], named[task], "linear_top1") < 0)
            parts.append(", ".join(f"{k} {named[k]['linear_top1']:.0f} %" for k in (task, name)))
    return shared.answer(fallen, f"{sum(fallen)} of {len(fallen)} without a guard are worse beyond "
                         f"the noise in the linear probe of h: {'; '.join(parts)}.")


def main(argv=None):
    p = shared.parser(__doc__, "pretext", epochs=3)
    p.add_argument("--guards", action="store_true", help="compare tasks with and without guards")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="tasks to run (all)")
    own, options = p.parse_known_args(argv)
    shared.refuse(options, "--labelled")
    if own.guards and own.tasks != [*TASKS]:
        common.fail("--tasks is for runs without --guards")
    runs = GUARDS if own.guards else {task: TASKS[task] for task in own.tasks}
    rows = []
    for seed in range(own.seeds):
        found = floors(own, seed, options)
        for name, flags in runs.items():
            _, _, run = shared.train(pretext, own, name, seed, [*options, *flags.split()])
            found.append(run.rows[-1] | {"name": name, "seconds": run.seconds})
        rows += [{k: row.get(k, "") for k in KEYS} | {"seed": seed} for row in found]
    file = "pretext_guards" if own.guards else "pretext_tasks"
    shared.write_csv(f"{own.out}/{file}.csv", rows, KEYS)
    means = shared.over_seeds(rows, ["name"], ["linear_top1", "knn_top1"])
    shared.figure(f"{own.out}/{file}.png", (10, 6.5), draw, means, own.epochs,
                  claim=CLAIMS[own.guards],
                  answer=of_guards(means) if own.guards else of_tasks(rows, means))
    shared.show(means, ["name", "linear_top1", "knn_top1"])


if __name__ == "__main__":
    main()

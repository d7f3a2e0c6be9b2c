"""What weak labels are good for: rules, bags, wrong labels and few labels (weak.py).

Slides: "How can we do Weak Supervised Learning?", a panel for each of the four ways.

  labeling  A label model learns from votes alone which sources to trust. With planted sources it is
            better than the majority where some are better than others, the same where they are
            alike, and worse where one is counted five times more, as it takes agreement for
            accuracy. Last group: networks that learned from rules on images.
  bags      Only the bag has a label. AUC of bags, and of the images in them by attention or logit;
            below, a bag, with the attention of every image as a black bar.
  noisy     Two networks that select for each other, one that learns all labels, and true labels.
            Bars: after the last epoch; dots: the best epoch. Dot over bar: labels learned by heart.
  pseudo    Few labels and many images without, few labels alone, and all labels.

    python lessons/weak.py --seeds 3
    python lessons/weak.py --tasks bags noisy pseudo --dataset cifar10 --epochs 50

Options that are not listed in --help go to weak.py. Writes lessons/weak.csv, a line per run and
figure, and lessons/weak.png. All figures are of the validation images, never of the test set.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, for weak.py
import common
import weak
from lessons import shared

RUNS = {  # task: what is compared, with its flags
    "labeling": {"rules, network": ""},
    "bags": {pool: f"--pool {pool}" for pool in ("attention", "gated", "max", "noisy-or")},
    "noisy": {"20 % wrong": "--rate 0.2", "50 % wrong": "--rate 0.5",
              "45 %, pairs": "--noise pair --rate 0.45"},
    "pseudo": {"4": "--labels 4", "10": "--labels 10", "40": "--labels 40"},
}
WORLDS = {  # accuracies of two-class sources, and how often the first one is counted
    "unequal": ([0.95, 0.6, 0.6, 0.6, 0.6], 1),
    "alike": ([0.7] * 5, 1),
    "one 6 times": ([0.6] + [0.75] * 10, 6),
}
TITLES = {
    "labeling": "Write simple rules to\nlabel data automatically",
    "bags": "We only know if a bag has\nsomething, not which item",
    "noisy": "Handle wrong or\nnoisy labels",
    "pseudo": "Mix a small set of good labels\nwith lots of weak ones",
}


def planted(accuracies, copies, seed, n=4000):
    """Right labels in %, of the label model and of the majority, where the sources are known."""
    mix = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n, 1), generator=mix)
    right = torch.rand(n, len(accuracies), generator=mix) < torch.tensor(accuracies)
    votes = torch.where(right, y, 1 - y)
    votes = torch.cat([votes[:, :1].expand(-1, copies - 1), votes], 1)
    labels = {"label_model": weak.label_model(votes, 2)[1], "majority": weak.majority(votes, 2)}
    return {f"{k}_accuracy": 100 * (q.argmax(1) == y[:, 0]).double().mean().item()
            for k, q in labels.items()}


@torch.no_grad()
def weighed(net, data, run):
    """A positive bag of validation images as one picture (H, W, 3), with the share of each."""
    images, index = data.val
    rows = weak.cut_bags(index, run.args.bag_size, 0)
    has = ((images.labels[rows] == run.args.positive) & (rows >= 0)).any(1)
    bag = rows[has.int().argmax()]
    bag = bag[bag >= 0]
    size = run.args.image_size
    x, _ = common.embed(lambda x: x, (images, bag), [common.Crop(size, 1.0)], run)
    net.eval()
    _, s, *_ = net(x, mask=torch.ones(1, len(x), dtype=torch.bool, device=x.device))
    line = (torch.arange(size, device=x.device) + 0.5) / size
    bars = (line > s[0, 1:].view(-1, 1, 1, 1)).float().expand(-1, 3, 4, -1)
    tiles = F.pad(torch.cat([x, bars], 2), (1, 1, 1, 1), value=1.0)  # (k, 3, S + 6, S + 2)
    return tiles.permute(2, 0, 3, 1).flatten(1, 2).cpu()


def measure(own, task, name, seed, options):
    """One run -> a row for each of its figures, and for bags a picture."""
    flags = ["--task", task, *RUNS[task][name].split()]
    if task == "noisy":
        flags += ["--eval-every", 1]
    net, data, run = shared.train(weak, own, f"{task} {name}", seed, [*options, *flags])
    ends = "accuracy", "auc", "precision"
    figures = {k: v for k, v in run.rows[-1].items() if k.endswith(ends)}
    if task == "noisy":
        figures |= {f"best_{k}": max(row[k] for row in run.rows)
                    for k in figures if k.endswith("accuracy")}
    picture = weighed(net, data, run) if RUNS[task][name] == "--pool attention" else None
    return as_rows(task, name, seed, figures), picture


def as_rows(task, name, seed, figures):
    return [{"task": task, "name": name, "seed": seed, "figure": k, "value": v}
            for k, v in figures.items()]


def draw(whole, means, pictures):
    """means: a row for each task, name and figure."""
    tasks = [task for task in RUNS if any(row["task"] == task for row in means)]
    for ax, task in zip(whole.subplots(1, len(tasks), squeeze=False)[0], tasks):
        rows = [row for row in means if row["task"] == task]
        table = {(row["name"], row["figure"]): row for row in rows}
        names = list(dict.fromkeys(row["name"] for row in rows))
        keys = [f"{k}_accuracy" for k in weak.NETWORKS[task] if k != "peer"]
        if task == "bags":
            keys = ["bags_auc", "bags_image_auc", "mean_auc", "images_auc"]
        for i, key in enumerate(keys):
            here = [(x, table[name, key]) for x, name in enumerate(names) if (name, key) in table]
            places = [x + 0.2 * i for x, _ in here]
            heights = [row["value"] for _, row in here]
            ax.bar(places, heights, 0.18, yerr=[row["value_sd"] for _, row in here],
                   label=key.replace("_accuracy", "").replace("_", " "))
            best = [(x + 0.2 * i, table[name, f"best_{key}"]["value"])
                    for x, name in enumerate(names) if (name, f"best_{key}") in table]
            ax.plot(*zip(*best) if best else ([], []), "k.")
        ax.set_xticks([x + 0.2 for x in range(len(names))], names, fontsize=8)
        unit = "AUC" if task == "bags" else "accuracy"
        ax.set(title=TITLES[task], ylabel=f"validation {unit}, %", ylim=(0, 125))
        ax.legend(fontsize=8, ncols=2, loc="upper center")
        if task == "bags" and pictures:
            strip = ax.inset_axes([0.0, 0.0, 1.0, 0.15])
            strip.imshow(pictures[0].numpy())
            strip.set_axis_off()


def main(argv=None):
    p = shared.parser(__doc__, "weak", epochs=12)
    p.add_argument("--tasks", nargs="+", choices=RUNS, default=[*RUNS], help="which (all)")
    own, options = p.parse_known_args(argv)
    rows, pictures = [], []
    for seed in range(own.seeds):
        for task in own.tasks:
            if task == "labeling":
                for name, world in WORLDS.items():
                    rows += as_rows(task, name, seed, planted(*world, seed))
            for name in RUNS[task]:
                found, picture = measure(own, task, name, seed, options)
                rows += found
                if picture is not None:
                    pictures.append(picture)
    keys = ["task", "name", "seed", "figure", "value"]
    shared.write_csv(f"{own.out}/weak.csv", rows, keys)
    means = shared.over_seeds(rows, ["task", "name", "figure"], ["value"])
    shared.figure(f"{own.out}/weak.png", (18, 5), draw, means, pictures)
    shared.show(means, keys[:2] + keys[3:])


if __name__ == "__main__":
    main()

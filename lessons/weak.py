"""What weak labels are good for: rules, bags, wrong labels and few labels (weak.py).

Slides: "How can we do Weak Supervised Learning?", a figure for each of the four ways, with what the
method reaches between a floor and a ceiling.

  labeling  A label model learns from votes alone which sources to trust. With planted sources it
            beats the majority if they differ in accuracy, equals it if they do not, and is worse if
            one is counted six times, as it mistakes agreement for accuracy. Last: networks trained
            on labels that rules give to images.
  bags      Only the bag has a label. AUC of bags, and of the images in them by attention or logit;
            below, a bag, with the attention of every image as a black bar.
  noisy     Two networks that select images for each other, one trained on all labels, and one on
            true labels, after the last epoch; "best": the best epoch of the one on all labels,
            which is higher if wrong labels are memorised later on.
  pseudo    Few labels and many unlabelled images, few labels alone, and all labels.

    python lessons/weak.py                  33 runs, 22 minutes of a CPU core
    python lessons/weak.py --tasks bags noisy pseudo --dataset cifar10 --epochs 50

Options that are not listed in --help go to weak.py. Writes lessons/weak_TASK.csv, a line per run,
and lessons/weak_TASK.png. All results are on validation images, never on the test set.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
CLAIMS = {
    "labeling": "Write simple rules to label data automatically",
    "bags": "We only know if a bag has something, not which item",
    "noisy": "Handle wrong or noisy labels",
    "pseudo": "Mix a small set of good labels with lots of weak ones",
}
COLUMNS = {  # task: column -> its name in the figure; method, floor, ceiling, and any others
    "labeling": {"label_model_accuracy": "label model", "majority_accuracy": "majority (floor)",
                 "truth_accuracy": "truth (ceiling)"},
    "bags": {"bags_auc": "bags", "mean_auc": "bags, mean of the logits (floor)",
             "images_auc": "bags, from labels of images (ceiling)",
             "bags_image_auc": "images in them"},
    "noisy": {"coteaching_accuracy": "co-teaching", "plain_accuracy": "all labels (floor)",
              "clean_accuracy": "true labels (ceiling)", "best_plain_accuracy": "all labels, best"},
    "pseudo": {"pseudo_accuracy": "FixMatch", "few_accuracy": "few alone (floor)",
               "all_accuracy": "all labels (ceiling)"},
}


def planted(accuracies, copies, seed, n=4000):
    """Accuracy in % of the label model and of the majority, for sources of known accuracies."""
    mix = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n, 1), generator=mix)
    right = torch.rand(n, len(accuracies), generator=mix) < torch.tensor(accuracies)
    votes = torch.where(right, y, 1 - y)
    votes = torch.cat([votes[:, :1].expand(-1, copies - 1), votes], 1)
    labels = {"label_model": weak.label_model(votes, 2)[1], "majority": weak.majority(votes, 2)}
    return {"truth_accuracy": 100.0} | {
        f"{k}_accuracy": 100 * (q.argmax(1) == y[:, 0]).double().mean().item()
        for k, q in labels.items()}


@torch.no_grad()
def weighed(net, data, run):
    """A positive bag of validation images as one picture (H, W, 3), with the attention to each."""
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
    """One run -> its row, and, for bags by attention, a picture."""
    flags = ["--task", task, *RUNS[task][name].split()]
    if task == "noisy":
        flags += ["--eval-every", 1]
    net, data, run = shared.train(weak, own, f"{task} {name}", seed, [*options, *flags])
    row = {"name": name, "seed": seed} | run.rows[-1]
    if task == "noisy":
        row["best_plain_accuracy"] = max(epoch["plain_accuracy"] for epoch in run.rows)
    picture = weighed(net, data, run) if RUNS[task][name] == "--pool attention" else None
    return row, picture


def draw(whole, means, task, pictures):
    """means: a row for each name."""
    upper, lower = whole.subfigures(2, 1, height_ratios=[4, 1]) if pictures else (whole, None)
    ax = upper.subplots()
    shared.bars(ax, means, "name", COLUMNS[task], fmt="%.1f")
    unit = {"bags": "validation AUC", "labeling": "accuracy"}.get(task, "validation accuracy")
    ax.set(ylabel=f"{unit}, %", ylim=(0, 140), yticks=range(0, 101, 20),
           xlabel="labels per class" if task == "pseudo" else "")
    ax.legend(fontsize=8, ncols=2, loc="upper center")
    if pictures:
        strip = lower.subplots()
        strip.imshow(pictures[0].numpy())
        strip.set_title("a bag, with the attention of every image", fontsize=9)
        strip.set_axis_off()


def answer(task, means):
    """Is the method above its floor where that is claimed: in the last row of labeling, in the
    first row of the other tasks?"""
    ours, floor, ceiling, *_ = COLUMNS[task]
    row = means[-1 if task == "labeling" else 0]
    parts = [f"{row['name']}: {row[ours]:.1f} ({row[floor]:.1f}, {row[ceiling]:.1f})"
             for row in means]
    return shared.answer([shared.compare(row, row, ours, floor) > 0],
                         f"in %, with floor and ceiling in brackets: {'; '.join(parts)}.")


def main(argv=None):
    p = shared.parser(__doc__, "weak", epochs=12)
    p.add_argument("--tasks", nargs="+", choices=RUNS, default=[*RUNS], help="tasks to run (all)")
    own, options = p.parse_known_args(argv)
    for task in own.tasks:
        rows, pictures = [], []
        for seed in range(own.seeds):
            if task == "labeling":
                rows += [{"name": name, "seed": seed} | planted(*world, seed)
                         for name, world in WORLDS.items()]
            for name in RUNS[task]:
                row, picture = measure(own, task, name, seed, options)
                rows.append(row)
                pictures += [] if picture is None else [picture]
        report(own.out, task, rows, pictures)


def report(folder, task, rows, pictures):
    keys = [*COLUMNS[task]]
    shared.write_csv(f"{folder}/weak_{task}.csv", rows, ["name", "seed", *keys])
    means = shared.over_seeds(rows, ["name"], keys)
    shared.figure(f"{folder}/weak_{task}.png", (8, 4.5), draw, means, task, pictures,
                  claim=CLAIMS[task], answer=answer(task, means))
    shared.show(means, ["name", *keys])


if __name__ == "__main__":
    main()

"""Which images a network finds alike: the nearest by pixels, before and after training.

Slides: "Self-Supervised Learning (SSL)": useful representations without manual annotation. It shows
the nearest training images by cosine for one test image of each of six classes, framed green if the
class is the same; above, the share of the same class among the five nearest, over all test images.

    python dino.py --epochs 100
    python lessons/neighbours.py runs/dino-toys-s0/backbone.pt

It takes the backbone.pt of any method and writes lessons/neighbours.png.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from lessons import checkpoint, shared

METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "dino": "DINO", "ibot": "iBOT",
           "dinov2": "DINOv2"}


@torch.no_grad()
def features(f, images, size):
    """f of the central squares -> unit vectors (n, d)."""
    order = torch.arange(len(images.labels))
    crop = [common.Crop(size, scale=1.0)]
    parts = [f(*views).flatten(1) for views, _ in common.batches(images, order, 256, crop, "cpu")]
    return F.normalize(torch.cat(parts))


def tile(images, i, size, color=None):
    """(size + 4, size + 4, 3) of image i in a frame of this colour."""
    view, _ = next(common.batches(images, torch.tensor([i]), 1, [common.Crop(size, 1.0)], "cpu"))
    framed = torch.tensor(color or (1.0, 1.0, 1.0)).view(3, 1, 1).repeat(1, size + 4, size + 4)
    framed[:, 2:-2, 2:-2] = view[0][0]
    return framed.permute(1, 2, 0)


def draw(whole, columns, queries, bank, size):
    """columns: title -> index (queries, k) into bank; queries: Images and index."""
    images, chosen = queries
    widths = [1, *([n.shape[1] for n in columns.values()])]
    axes = whole.subplots(1, len(widths), width_ratios=widths)
    axes[0].imshow(torch.cat([tile(images, i, size) for i in chosen]).numpy(),
                   interpolation="nearest")
    axes[0].set_title("image")
    for ax, (title, nearest) in zip(axes[1:], columns.items()):
        rows = []
        for i, row in zip(chosen, nearest.tolist()):
            right = [bool(bank.labels[j] == images.labels[i]) for j in row]
            colors = [(0.2, 0.7, 0.3) if r else (0.85, 0.3, 0.25) for r in right]
            rows.append(torch.cat([tile(bank, j, size, c) for j, c in zip(row, colors)], 1))
        ax.imshow(torch.cat(rows).numpy(), interpolation="nearest")
        ax.set_title(title)
    for ax in axes:
        ax.axis("off")


def main(argv=None):
    p = common.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("checkpoint", help="backbone.pt of a run")
    p.add_argument("--dataset", help="a name or a folder (that of the run)")
    p.add_argument("--classes", **common.FROM_1, default=6, help="classes, one image of each (6)")
    p.add_argument("--out", type=shared.folder, default=Path(__file__).parent, help="for the PNG")
    own = p.parse_args(argv)
    net, meta = checkpoint.backbone(own.checkpoint)
    size = meta["image_size"]
    data = common.Data(own.dataset or meta["dataset"], meta["data_dir"], meta["limit"])
    data.read(size, "cpu", meta["memory_limit"], meta["workers"])
    shared.need_labels(data)
    bank, (test, _) = data.train, data.test
    chosen = [int((test.labels == c).nonzero()[0]) for c in test.labels.unique()[: own.classes]]
    name = METHODS.get(meta["method"], meta["method"])
    labels = "with" if meta["method"] == "weak" or meta.get("supervised") else "without"
    columns = {}
    for title, f in (("pixels less their mean", lambda x: x - x.mean((1, 2, 3), keepdim=True)),
                     ("untrained network", checkpoint.untrained(meta, meta["seed"]).eval()),
                     (f"{name}, {meta['epochs']} epochs {labels} labels", net.eval())):
        cosine = features(f, test, size) @ features(f, bank, size).T
        nearest = cosine.topk(5).indices
        right = (bank.labels[nearest] == test.labels[:, None]).float().mean()
        columns[f"{title}: {right:.0%}"] = nearest[chosen]
        print(f"{title}: {right:.1%} of the five nearest are of the same class")
    shared.figure(f"{own.out}/neighbours.png", (13, 0.78 * len(chosen) + 0.8), draw, columns,
                  (test, chosen), bank, size)


if __name__ == "__main__":
    main()

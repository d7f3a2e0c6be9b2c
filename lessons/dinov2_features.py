"""Without labels, patches of the same part of different objects become neighbours (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", the coloured patches. Paper:
Figure 1 (the first principal components of the patch tokens, over images of a category: the same
parts get the same colour), Section 7.3 (retrieval by cosine, here of class tokens).

    python dino.py --epochs 100
    python lessons/dinov2_features.py runs/dino-toys-s0/last.pt --method dino --labels 1 8
    python lessons/dinov2_features.py runs/dinov2-toys-s*/last.pt
    python lessons/dinov2_features.py dinov2_vits14_reg4_pretrain.pth --registers 4 \\
        --dataset PATH --image-size 518 --finer 1

CHECKPOINT: last.pt or backbone.pt of dinov2.py (or of --method), or a released file; or several,
for different seeds. Options that are not listed in --help are those of that method (--device,
--patch-size), by default as in the run. Images are whole central squares: new ones for `toys`,
validation images for other sets, all images of a folder without labels.

Writes lessons/dinov2_features.png: images of two classes with three components of their patches,
and images with those whose class tokens are nearest. On `toys`, where the parts of the objects are
known, also lessons/dinov2_features.csv, three times with other images (several checkpoints take
turns): how often do a patch's 20 nearest patches in other images vote for its object and part?
Nearest is by the cosine of tokens, trained or not, or of the patches' pixels, each minus the mean
of all, or by the distance of colours or positions.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dino
import dinov2
import ibot
from lessons import checkpoint, shared

CLAIM = "Without labels, patches of the same part of different objects become neighbours"
METHODS = {"dino": dino, "ibot": ibot, "dinov2": dinov2}
SHOWN = 5
NEAREST = 3


def components(x, k):
    """Scores on the first k principal components: (n, D) -> (n, k), their signs arbitrary."""
    x = (x - x.mean(0)).double()
    _, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    return (x @ vectors[:, -k:].flip(1)).float()


def foreground(patches):
    """(N, h, w, D) -> bool (N, h, w): the first component of all patches together, cut at 0 (paper,
    Section 7.5). Its sign is arbitrary: the side that is commoner in the middle is the object."""
    first = components(patches.flatten(0, 2), 1).view(patches.shape[:3])
    side = len(first[0])
    inner = slice(side // 4, side - side // 4)
    share = (first > 0).float().mean()
    middle = (first[:, inner, inner] > 0).float().mean()
    return first > 0 if middle >= share else first < 0


def colours(patches, kept):
    """Three components of the kept patches alone as red, green and blue, the rest black:
    (N, h, w, D), bool (N, h, w) -> (N, h, w, 3) in [0, 1]."""
    out = torch.zeros(*kept.shape, 3)
    if kept.sum() > 3:
        scores = components(patches[kept], 3)
        low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
        shares = (scores - low) / (high - low).clamp(min=1e-12)
        out[kept] = 0.1 + 0.9 * shares.clamp(0, 1)
    return out


def nearest(h, k):
    """The k other images nearest to each by class token: (N, D) -> (N, k)."""
    h = F.normalize(h)
    cosine = (h @ h.T).fill_diagonal_(-2.0)
    return cosine.topk(min(k, len(h) - 1)).indices


def without_network(x, step):
    """Colour and position of each square of `step` pixels: (N, 3, S, S) -> name -> (N, h, w, D)."""
    colours = checkpoint.per_patch(x.flatten(0, 1), step).unflatten(0, (-1, 3)).movedim(1, 3)
    line = torch.linspace(-1, 1, colours.shape[1])
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    return {"colour": colours, "place": places.expand(len(x), -1, -1, -1)}


def knn_by_part(features, parts, k=20):
    """Share in % of the patches in the last quarter of the images whose part is the commonest among
    their k nearest patches in the other images. features: (N, h, w, D); parts: (N, h, w), 0 for the
    background, which is left out."""
    n = len(features) * 3 // 4
    fit, test = features[:n][parts[:n] > 0], features[n:][parts[n:] > 0]
    known, truth = parts[:n][parts[:n] > 0], parts[n:][parts[n:] > 0]
    found = []
    for rows in test.split(1000):
        index = torch.cdist(rows, fit).topk(min(k, len(fit)), largest=False).indices
        found.append(known[index].mode(1).values)
    return 100 * (torch.cat(found) == truth).float().mean().item()


def measure(method, net, x, labels, parts, seed, run):
    """A row for each kind of features. parts: (N, S, S)."""
    step = net.backbone.patch_size
    known = checkpoint.most(parts, step)
    known = torch.where(known > 0, 10 * labels.view(-1, 1, 1) + known, 0)  # a part of an object
    found = {}
    kinds = checkpoint.kinds_of_features(method, method.__name__, net, seed, run)
    for name, f in kinds.items():
        features = f(x)
        found[name] = F.normalize(features - features.mean((0, 1, 2)), dim=-1)
    found |= without_network(x, step)
    return [{"features": name, "seed": seed, "same_part": knn_by_part(features, known)}
            for name, features in found.items()]


def pictures(x, h, tokens, labels, chosen):
    """Columns of the figure: title -> (n, ...). chosen: label -> name."""
    columns = {}
    for label, name in chosen.items():
        of = labels == label
        painted = colours(tokens[of], foreground(tokens[of]))
        columns[name] = x[of][:SHOWN]
        columns[f"{name}, components"] = painted[:SHOWN].movedim(3, 1)
    columns["any image"] = x[:SHOWN]
    for k, column in enumerate(nearest(h, NEAREST)[:SHOWN].T, 1):
        columns[f"nearest {k}"] = x[column]
    return columns


def draw(whole, columns, means):
    """means: a row for each kind of features, or none."""
    if not means:
        return checkpoint.grid(whole, columns)
    left, right = whole.subfigures(1, 2, width_ratios=[2.2, 1])
    checkpoint.grid(left, columns)
    ax = right.subplots()
    shared.bars(ax, means, "features", {"same_part": ""})
    ax.tick_params("x", rotation=20)
    ax.set(title="patches whose nearest patches\nvote for the right part, %")


def main(argv=None):
    p = checkpoint.parser(__doc__)
    p.add_argument("--labels", **common.FROM_0, nargs="+", help="classes to show (the first two)")
    p.add_argument("--method", choices=METHODS, default="dinov2", help="of the checkpoint (dinov2)")
    own, options = p.parse_known_args(argv)
    method = METHODS[own.method]
    trained = [checkpoint.load(method, own, options, path) for path in own.checkpoints]
    rows = []
    for seed in range(own.seeds):
        net, data, run = trained[seed % len(trained)]
        x, labels, parts = checkpoint.images(own, data, run, seed)
        if parts is None:
            break
        rows += measure(method, net, x, labels, parts, seed, run)
    chosen = own.labels or labels.unique()[:2].tolist()
    if not set(chosen) <= set(labels.tolist()):
        common.fail(f"--labels {chosen}: not all of these classes are among the {len(x)} images")
    things = dict(enumerate(common.THINGS)) if rows else {}
    chosen = {label: things.get(label, f"class {label}") for label in chosen}
    columns = pictures(x, *checkpoint.tokens(net, x, run), labels, chosen)
    if not rows:
        shape = (1.4 * len(columns), 1.5 * SHOWN)
        return shared.figure(f"{own.out}/dinov2_features.png", shape, draw, columns, [])
    shared.write_csv(f"{own.out}/dinov2_features.csv", rows, ["features", "seed", "same_part"])
    means = shared.over_seeds(rows, ["features"], ["same_part"])
    ours, *others = means
    best = max(others, key=lambda row: row["same_part"])
    runs = shared.plural(min(own.seeds, len(trained)), "run")
    text = (f"the 20 nearest patches vote for the right part for {ours['same_part']:.0f} % of the "
            f"patches by tokens of {own.method}.py ({runs}), for {best['same_part']:.0f} % by "
            f"{best['features']}, the best of the others.")
    ahead = shared.compare(ours, best, "same_part") > 0
    shared.figure(f"{own.out}/dinov2_features.png", (14, 6), draw, columns, means, claim=CLAIM,
                  answer=shared.answer([ahead], text))
    shared.show(means, ["features", "same_part"], f"{shared.plural(own.seeds, 'set')} of images")
    return rows


if __name__ == "__main__":
    main()

"""What patch and class tokens know without further training: PCA, matching, retrieval (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", the coloured patches. Paper:
Figure 1 (the first principal components of the patch tokens, over images of a category), Figure 10
(patches matched between two images; there by Euclidean distance as an assignment, thinned out, here
every patch to the nearest by cosine), Section 7.3 (retrieval by cosine, here of class tokens).

Nobody told the patches apart. If what varies most separates object from background, and what varies
next gives the same part of two objects the same colour, the network has found parts by itself.

    python dinov2.py
    python lessons/dinov2_features.py runs/dinov2-toys-s0/last.pt
    python lessons/dinov2_features.py runs/dinov2-toys-s0/last.pt --label 3 --size 64
    python lessons/dinov2_features.py dinov2_vits14_pretrain.pth --dataset PATH --image-size 518
    python lessons/dinov2_features.py dinov2_vits14_reg4_pretrain.pth --registers 4 \\
        --dataset PATH --image-size 518

CHECKPOINT: last.pt or backbone.pt of dinov2.py, or a released file. Options that are not listed in
--help are those of dinov2.py (--device, --patch-size); what is not given is as in the run. --size
is 12 patches, or as in training where that is more, up to 224.

Writes lessons/dinov2_features.png: six images of a class, their foreground, their PCA and three
pairs of them matched; below, images with those whose class tokens are nearest. On `toys`, where
masks and classes are known, also lessons/dinov2_features.csv, of all classes: the foreground
against the mask, patches of an object that are matched to an object, neighbours of the same class;
beside the untrained network and chance. Patches are taken from images of --size, class tokens at
the size of the training. Images are whole central squares: of `toys` new ones, of other sets
validation images, of a folder without labels all.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dinov2
from lessons import checkpoint, shared

OURS = "without labels"
SHOWN = 6
QUERIES = 3
NEAREST = 5
KEYS = ["network", "foreground_jaccard", "object_to_object", "same_class_of_5"]


def components(x, k):
    """Scores on the first k principal components: (n, D) -> (n, k), their signs arbitrary."""
    x = (x - x.mean(0)).double()
    _, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    return (x @ vectors[:, -k:].flip(1)).float()


def foreground(patches):
    """(N, h, w, D) -> bool (N, h, w): the first component of all patches together, cut at 0 (paper,
    Section 7.5). Its sign means nothing: the side more of the middle lies on is the object."""
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


def matches(a, b):
    """The patch of a nearest to every patch of b by cosine: (T, D), (U, D) -> (U,)."""
    cosine = F.normalize(b) @ F.normalize(a).T
    return cosine.argmax(1)


def matched(a, b, kept_a, kept_b):
    """Kept patches of a in the colours of their places, those of b in the colour of the patch of a
    that they match: (h, w, D), bool (h, w) -> 2 x (h, w, 3)."""
    line = torch.linspace(0, 1, len(kept_a))
    y, x = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack([x, 1 - (x + y) / 2, y], -1)
    one = places * kept_a.unsqueeze(-1)
    two = torch.zeros_like(places)
    if kept_a.any():
        two[kept_b] = places[kept_a][matches(a[kept_a], b[kept_b])]
    return one, two


def nearest(h, k):
    """The k other images nearest to each by class token: (N, D) -> (N, k)."""
    h = F.normalize(h)
    cosine = (h @ h.T).fill_diagonal_(-2.0)
    return cosine.topk(min(k, len(h) - 1)).indices


def in_numbers(h, patches, labels, masks):
    """On images with masks, in %: mean Jaccard of the foreground, by PCA of every class by itself;
    patches of an object whose match in another image of the class is on its object; images of the
    same class among the five nearest."""
    patch = masks.shape[1] // patches.shape[1]
    on = checkpoint.per_patch(masks, patch).flatten(1) > 0.5  # (N, T)
    tokens = patches.flatten(1, 2)
    overlap = []
    hits = []
    for label in labels.unique():
        of = (labels == label).nonzero().squeeze(1)
        found = foreground(patches[of]).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        both = (found & masks[of]).sum((1, 2))
        either = (found | masks[of]).sum((1, 2))
        overlap.append(both / either.clamp(min=1))
        for a, b in zip(of, of.roll(1)):
            to = matches(tokens[a], tokens[b][on[b]])
            hits.append(on[a][to])
    same = labels[nearest(h, NEAREST)] == labels.unsqueeze(1)
    found = torch.cat(overlap), torch.cat(hits), same
    return [100 * v.float().mean().item() for v in found]


def chance(labels, masks, patch):
    """The same for the whole image, for any patch, for any other image."""
    same = labels == labels.unsqueeze(1)
    other = ~torch.eye(len(labels), dtype=torch.bool)
    found = masks, checkpoint.per_patch(masks, patch) > 0.5, same[other]
    return [100 * v.float().mean().item() for v in found]


def draw(whole, x, h, patches, shown):
    """Above, a row for each image shown; below, a row for each query."""
    above, below = whole.subfigures(2, 1, height_ratios=[len(shown), QUERIES])
    images, p = x[shown], patches[shown]
    kept = foreground(p)
    pairs = []
    for i in range(0, len(shown) - 1, 2):
        pairs += matched(p[i], p[i + 1], kept[i], kept[i + 1])
    columns = {
        "image": images,
        "foreground": checkpoint.lit(images, kept),
        "three components of it": colours(p, kept).movedim(3, 1),
        "same colour: matched": [picture.movedim(2, 0) for picture in pairs],
    }
    checkpoint.grid(above, columns)
    columns = {"query": x[:QUERIES]}
    for k, column in enumerate(nearest(h, NEAREST).T, 1):
        columns[f"nearest {k}"] = x[column[:QUERIES]]
    checkpoint.grid(below, columns)


def main(argv=None):
    p = checkpoint.parser(__doc__)
    p.add_argument("--label", **common.FROM_0, help="class to show (of the first)")
    own, options = p.parse_known_args(argv)
    net, data, run = checkpoint.load(dinov2, own, options)
    args = run.args
    patch = args.patch_size
    size = checkpoint.side(own, run)
    x, labels, masks = checkpoint.images(own, size, data, run)
    label = labels[0] if own.label is None else own.label
    shown = (labels == label).nonzero().squeeze(1)[:SHOWN]
    if not len(shown):
        common.fail(f"--label {label}: none of the {len(x)} images is of that class")
    size = min(size, args.image_size // patch * patch)  # as in training
    small = F.interpolate(x, (size, size), mode="bilinear", antialias=True)

    def both_tokens(f):
        return checkpoint.tokens(f, small, run)[0], checkpoint.tokens(f, x, run)[1]

    h, patches = both_tokens(net)
    shared.figure(f"{own.out}/dinov2_features.png", (9, 14), draw, x, h, patches, shown)
    if masks is None:
        return []
    untrained = both_tokens(dinov2.build(args))
    rows = [
        [OURS, *in_numbers(h, patches, labels, masks)],
        ["random weights", *in_numbers(*untrained, labels, masks)],
        ["whole image or chance", *chance(labels, masks, patch)],
    ]
    checkpoint.table(f"{own.out}/dinov2_features.csv", KEYS, rows)
    return rows


if __name__ == "__main__":
    main()

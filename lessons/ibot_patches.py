"""Do patch tokens find their place in another view, and in another object (iBOT)?

Slides: "Contrastive Learning: Image BERT Pre-Training with Online Tokenizer (iBOT)". Paper,
Appendix G.3, "Sparse correspondence": patch tokens of two views of an image, or of two images of a
class, are matched. Here two tokens match if each is the other's nearest by cosine, after
subtracting the mean of all (paper: and if they have the highest self-attention).

A single masked patch can be guessed from its neighbours; for a masked block one has to know what it
is part of. So a token should learn to say which part of what it shows, and the same part elsewhere
should say the same. Whether a match needs that is another matter: patches that look alike match by
their pixels, too, if only these do not depend on which view is mirrored.

    python ibot.py --epochs 100
    python lessons/ibot_patches.py runs/ibot-toys-s0/last.pt
    python lessons/ibot_patches.py checkpoint_teacher.pth --dataset PATH --size 448 --finer 1

CHECKPOINT: last.pt or backbone.pt of ibot.py, or a released file; or several, for different seeds.
Options that are not listed in --help are those of ibot.py (--device, --patch-size), by default as
in the run.

Writes lessons/ibot_patches.csv and lessons/ibot_patches.png: matched patches, and how many matches
are right, three times with other images (several checkpoints take turns). The views are crops of 40
to 100 % of the area, one mirrored, in other colours, so it is known which places correspond. On
`toys` the parts are known, too, and only matches of patches that show an object are counted. iBOT's
tokens are compared with those of the untrained network, with the patches' pixels, with symmetric
pixels (of a patch and its mirror image the larger value), which are the same in a mirrored view,
and with random pairs: every patch of the one with every patch of the other. Images are whole
central squares: new ones for `toys`, validation images for other sets, all images of a folder
without labels.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import ibot
from lessons import checkpoint, shared

CLAIM = "A patch token finds its place in another view more often than pixels do"
OURS, SYMMETRIC, PAIRS = "iBOT", "symmetric pixels", "random pairs"
SHOWN = 4
KEYS = ["features", "seed", "same_place", "same_part"]


def mutual(a, b):
    """Patches that are each other's nearest by cosine, the best first: tokens (h, w, D) -> index
    in a (M,), index in b (M,)."""
    cosine = F.normalize(a.flatten(0, -2)) @ F.normalize(b.flatten(0, -2)).T  # (T, T)
    nearest = cosine == cosine.amax(1, keepdim=True)
    nearest &= cosine == cosine.amax(0)
    i, j = nearest.nonzero(as_tuple=True)
    order = cosine[i, j].argsort(descending=True)
    return i[order], j[order]


def symmetric(patches, side):
    """The same for a patch and its mirror image: pixels (..., 3 side^2) -> as many, the larger of
    both images."""
    patches = patches.unflatten(-1, (3, side, side))
    return patches.maximum(patches.flip(-1)).flatten(-3)


def draw_views(n, size):
    """Boxes in pixels (2, n, 4), top, left, height, width, and which of the two is mirrored
    (2, n, 1, 1)."""
    sizes = torch.full((2 * n, 2), size)
    boxes = common.random_boxes(sizes, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3))
    mirrored = torch.rand(n, 1, 1) < 0.5
    return boxes.view(2, n, 4), torch.stack([mirrored, ~mirrored])


def cut(x, boxes, mirrored):
    """A view of each image: (N, C, S, S), (N, 4), (N, 1, 1) -> (N, C, S, S)."""
    x = common.crop_resize(x, boxes, x.shape[-1])
    return torch.where(mirrored.unsqueeze(1), x.flip(3), x)


def places(boxes, mirrored, side):
    """Centres of the patches of views, in pixels of their images: (N, 4), (N, 1, 1) -> (N, T, 2)
    of y, x."""
    step = (torch.arange(side) + 0.5) / side
    centre = torch.cartesian_prod(step, step)  # (T, 2), as shares of the box
    flipped = torch.cartesian_prod(step, step.flip(0))
    corner, size = boxes.unsqueeze(1).split(2, dim=2)  # (N, 1, 2)
    return corner + size * torch.where(mirrored, flipped, centre)


def near(boxes, mirrored, side):
    """Which patches of two views are at most one patch apart along both axes, with the mean size of
    a patch in the two views: (2, N, 4), (2, N, 1, 1) -> (N, T, T) bool."""
    patch = boxes[:, :, None, 2:].mean(0) / side  # (N, 1, 2)
    a, b = (places(*view, side) / patch for view in zip(boxes, mirrored))
    return torch.cdist(a, b, p=math.inf) <= 1.0001


def alike(a, b, patch):
    """Which pairs of patches show the same part: parts (N, S, S) of N pairs of images of a class ->
    (N, T, T), 0 or 1, nan where the patch of a shows no part."""
    a, b = (checkpoint.most(parts, patch).flatten(1) for parts in (a, b))
    return torch.where(a.unsqueeze(2) > 0, (a.unsqueeze(2) == b.unsqueeze(1)).float(), math.nan)


def share(good, found=None):
    """Share in % of pairs of patches that are good. good: (N, T, T), nan is left out; found: N
    lists of pairs, or None for all."""
    if found is not None:
        good = torch.cat([g[pair] for g, pair in zip(good, found)])
    return 100 * good.nanmean().item()


def two_images(labels):
    """Indices of pairs of images of the same class: (M,), (M,)."""
    order = labels.argsort(stable=True)
    a, b = order[:-1], order[1:]
    same = labels[a] == labels[b]
    if not same.any():
        common.fail("no two images are of the same class, raise --images")
    return a[same], b[same]


def measure(net, x, labels, parts, seed, run):
    """A row for each kind of features; and pairs of images to show, by title, each with its matches
    and whether pairs of patches are good."""
    step = net.backbone.patch_size
    common.reseed(seed)
    boxes, mirrored = draw_views(len(x), x.shape[-1])
    views = [cut(x, *view) for view in zip(boxes, mirrored)]
    views = [common.color_jitter(view, 0.4, 0.4, 0.2, 0.1, p=0.8) for view in views]
    place = near(boxes, mirrored, x.shape[-1] // step).float()
    a, b = two_images(labels)
    part = place[a] * math.nan  # not known
    if parts is not None:
        part = alike(parts[a], parts[b], step)
        things = cut((parts > 0).float().unsqueeze(1), boxes[0], mirrored[0])[:, 0]
        things = checkpoint.per_patch(things, step).flatten(1).unsqueeze(2)
        place = torch.where(things > 0.5, place, math.nan)
    rows, shown = [], {}
    kinds = checkpoint.kinds_of_features(ibot, OURS, net, seed, run)
    kinds[SYMMETRIC] = lambda x: symmetric(kinds["pixels"](x), run.args.patch_size)
    for name, f in kinds.items():
        centre = f(x).mean((0, 1, 2))
        *two, tokens = (f(images) - centre for images in (*views, x))
        in_views = [mutual(*pair) for pair in zip(*two)]
        in_images = [mutual(tokens[i], tokens[j]) for i, j in zip(a, b)]
        rows.append({"features": name, "same_place": share(place, in_views),
                     "same_part": share(part, in_images)})
        if name == OURS:
            shown["two views"] = [*zip(*views, in_views, place)][:SHOWN]
            shown["two objects"] = [*zip(x[a], x[b], in_images, part)][:: len(a) // SHOWN + 1]
    rows.append({"features": PAIRS, "same_place": share(place), "same_part": share(part)})
    return rows, shown


def known(means):
    """The columns of which something is known of these images."""
    return [key for key in KEYS[2:] if not math.isnan(means[0][key])]


def draw(whole, shown, means, side):
    """Matched patches, lime where they are right, white on a set of which the parts are not known;
    means: a row for each kind of features."""
    left, right = whole.subfigures(1, 2, width_ratios=[1.3, 1])
    for axes, (title, pairs) in zip(left.subplots(SHOWN, 2, squeeze=False).T, shown.items()):
        axes[0].set_title(title)
        for ax in axes:
            ax.axis("off")
        for ax, (a, b, found, good) in zip(axes, pairs):
            ax.imshow(torch.cat([a, b], 2).movedim(0, -1), extent=(0, 2 * side, side, 0))
            if good.isnan().all():
                good = good.nan_to_num(nan=2)
            good, found = good[found], torch.stack(found)  # (M,), (2, M)
            y = found // side + 0.5
            x = found % side + 0.5 + torch.tensor([[0], [side]])
            for value, colour in enumerate(("orange", "lime", "white")):
                ax.plot(x[:, good == value], y[:, good == value], "o-", c=colour, ms=4)
    ax = right.subplots()
    means = [row | {"features": row["features"].replace(" ", "\n")} for row in means]
    shared.bars(ax, means, "features", {k: k.replace("_", " ") for k in known(means)})
    ax.set_title("matches that are right, %")
    ax.legend()


def answer(means, count):
    """count: number of checkpoints."""
    ours, parts, wins = means[0], [], []
    for key in known(means):
        best = max(means[1:], key=lambda row: row[key])
        wins.append(shared.compare(ours, best, key) > 0)
        parts.append(f"{ours[key]:.0f} % are of the {key.replace('_', ' ')}, by {best['features']} "
                     f"{best[key]:.0f} %")
    other = f"; in another object of its class {parts[1]}" if parts[1:] else ""
    text = f"of the matches {parts[0]}{other} ({shared.plural(count, 'run')} of iBOT)."
    return shared.answer(wins[:1], text)


def main(argv=None):
    p = checkpoint.parser(__doc__, images=200)
    own, options = p.parse_known_args(argv)
    trained = [checkpoint.load(ibot, own, options, path) for path in own.checkpoints]
    rows = []
    for seed in range(own.seeds):
        net, data, run = trained[seed % len(trained)]
        x, labels, parts = checkpoint.images(own, data, run, seed)
        found, shown = measure(net, x, labels, parts, seed, run)
        rows += [row | {"seed": seed} for row in found]
    shared.write_csv(f"{own.out}/ibot_patches.csv", rows, KEYS)
    means = shared.over_seeds(rows, ["features"], KEYS[2:])
    shared.figure(f"{own.out}/ibot_patches.png", (12, 6), draw, shown, means,
                  x.shape[-1] // net.backbone.patch_size, claim=CLAIM,
                  answer=answer(means, min(own.seeds, len(trained))))
    shared.show(means, ["features", *known(means)], f"{shared.plural(own.seeds, 'set')} of images")
    return rows


if __name__ == "__main__":
    main()

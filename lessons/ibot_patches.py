"""Hidden blocks, and parts that find each other: what patch tokens are taught and learn (iBOT).

Slides: "Contrastive Learning: Image BERT Pre-Training with Online Tokenizer (iBOT)", the masked
student. Paper, Appendix G.3, "Sparse correspondence": patch tokens of two views of an image, or of
two images of a class, are matched. Here those are that are each other's nearest by cosine; shown
and counted are the twelve with the highest cosine (paper: with the highest self-attention).

A single hidden patch can be guessed from its neighbours; of a hidden block one has to know what it
is part of. So a token is drawn to say which part of what it shows, and the same part elsewhere is
to say the same.

    python ibot.py
    python lessons/ibot_patches.py runs/ibot-toys-s0/last.pt
    python lessons/ibot_patches.py runs/ibot-toys-s0/last.pt --size 32
    python lessons/ibot_patches.py checkpoint_teacher.pth --dataset PATH --size 448

CHECKPOINT: last.pt or backbone.pt of ibot.py, or a released file. Options that are not listed in
--help are those of ibot.py (--device, --patch-size); what is not given is as in the run. --size is
12 patches, or as in training where that is more.

Writes lessons/ibot_patches.csv and lessons/ibot_patches.png: above, an image as the student gets
it, with hidden blocks and with hidden single patches ("rand" in the released code); below, matched
patches. The views are crops of 40 to 100 % of the area, one mirrored, in other colours: which place
of one is which of the other is known. On `toys` so are the objects. Random pairs: every patch of
the one with every patch of the other. Images are whole central squares: of `toys` new ones, of
other sets validation images, of a folder without labels all.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import ibot
from lessons import checkpoint, shared

OURS = "without labels"
VIEWS, IMAGES = "views of one image", "images of a class"
BEST = 12
KEYS = ["network", "two", "matches", "same_place", "both_on_object"]


def mutual(a, b, most=BEST):
    """Patches that are each other's nearest by cosine, the best first: tokens (h, w, D) -> index
    in a (M,), index in b (M,), M <= most."""
    cosine = F.normalize(a.flatten(0, -2)) @ F.normalize(b.flatten(0, -2)).T  # (T, T)
    nearest = cosine == cosine.amax(1, keepdim=True)
    nearest &= cosine == cosine.amax(0)
    i, j = nearest.nonzero(as_tuple=True)
    order = cosine[i, j].argsort(descending=True)[:most]
    return i[order], j[order]


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
    """Which patches of two views are at most one patch apart along both axes, a patch being as
    large as it is in the two on average: (2, N, 4), (2, N, 1, 1) -> (N, T, T) bool."""
    patch = boxes[:, :, None, 2:].mean(0) / side  # (N, 1, 2)
    a, b = (places(*view, side) / patch for view in zip(boxes, mirrored))
    return torch.cdist(a, b, p=math.inf) <= 1.0001


def both(a, b, patch):
    """Which pairs of patches are mostly object on both sides: masks (N, 1, S, S) of the two images
    -> (N, T, T), 0 or 1, nan where the masks are."""
    a, b = (F.avg_pool2d(mask.round(), patch).round().flatten(1) for mask in (a, b))
    return a.unsqueeze(2) * b.unsqueeze(1)


def share(good, found=None):
    """Share in % of pairs of patches that are good: (N, T, T), N lists of pairs or None for all."""
    if found is not None:
        good = torch.cat([g[pair] for g, pair in zip(good, found)])
    return 100 * good.float().mean().item()


def hidden(x, side, ratio):
    """Columns of the figure, title -> (1, 3, S, S): the image x as the student gets it, a share of
    its patches grey."""
    columns = {"image": x}
    for title, make in (("hidden blocks", ibot.block_mask), ("hidden patches", ibot.random_mask)):
        mask = make(side, side, ratio, torch.Generator())
        mask = F.interpolate(mask[None, None].float(), x.shape[2:])
        columns[title] = torch.where(mask > 0, 0.6, x)
    return columns


def draw(whole, columns, pairs, side):
    """Masks above, below the patches that match. pairs: title, images a and b, patches in a and
    in b, which pairs are good (T, T)."""
    top, below = whole.subfigures(2, 1)
    checkpoint.grid(top, columns)
    for ax, (title, a, b, found, good) in zip(below.subplots(2, 2).flat, pairs):
        picture = torch.cat([a, b], 2).movedim(0, -1)
        ax.imshow(picture, extent=(0, 2 * side, side, 0))
        ax.set_title(title)
        ax.axis("off")
        good = good[found] > 0
        found = torch.stack(found)  # (2, M)
        y = found // side + 0.5
        x = found % side + 0.5 + torch.tensor([[0], [side]])
        ax.plot(x, y, "o-", c="orange")
        ax.plot(x[:, good], y[:, good], "o-", c="lime")


def main(argv=None):
    p = checkpoint.parser(__doc__, images=200)
    own, options = p.parse_known_args(argv)
    net, data, run = checkpoint.load(ibot, own, options)
    args = run.args
    patch = args.patch_size
    size = checkpoint.side(own, run)
    x, labels, masks = checkpoint.images(own, size, data, run)
    side = size // patch
    if masks is None:
        masks = x[:, 0] * math.nan  # not known
    masks = masks.float().unsqueeze(1)
    common.reseed(args.seed)
    boxes, mirrored = draw_views(len(x), size)
    views = []
    cuts = []
    for view in zip(boxes, mirrored):
        views.append(common.color_jitter(cut(x, *view), 0.4, 0.4, 0.2, 0.1, p=0.8))
        cuts.append(cut(masks, *view))
    order = labels.argsort(stable=True)
    a, b = order[:-1], order[1:]
    alike = labels[a] == labels[b]
    a, b = a[alike], b[alike]
    if not len(a):
        common.fail("there are no two images of a class, raise --images")
    same = near(boxes, mirrored, side)
    kinds = {  # images, images, which patches are of the same place, which are both on the object
        VIEWS: (*views, same, both(*cuts, patch)),
        IMAGES: (x[a], x[b], same[a] * math.nan, both(masks[a], masks[b], patch)),
    }
    nets = {
        OURS: net,
        "random weights": ibot.build(args),
        "random pairs": None,  # of patches, not of tokens
    }
    rows = []
    pairs = []
    for name, f in nets.items():
        for kind, (one, two, same, objects) in kinds.items():
            found = None
            count = math.nan
            if f:
                tokens = [checkpoint.tokens(f, view, run)[1] for view in (one, two)]
                found = [mutual(*pair) for pair in zip(*tokens)]
                count = sum(len(i) for i, _ in found) / len(found)
                good = same if kind == VIEWS else objects
                pairs.append((f"{name}, two {kind}", one[0], two[0], found[0], good[0]))
            rows.append([name, kind, count, share(same, found), share(objects, found)])
    checkpoint.table(f"{own.out}/ibot_patches.csv", KEYS, rows)
    columns = hidden(x[:1], side, args.mask_ratio[1])
    shared.figure(f"{own.out}/ibot_patches.png", (9, 8), draw, columns, pairs, side)
    return rows


if __name__ == "__main__":
    main()

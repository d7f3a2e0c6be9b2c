"""What the class token attends to: self-attention, and objects cut out by it (DINO).

Slides: Figure 1 (self-attention of the class token on the heads of the last layer), Figure 4 with
its table: the patches that hold 60 % of a head's attention, against the object's true mask. Paper:
Jaccard similarity on PASCAL VOC12, ViT-S/16: random weights 22.0, supervised 27.3, DINO 45.9.

The token is never told where anything is. It has to say the same of every crop of an image, and
what the crops share is, as a rule, the object; a supervised token needs only as much of the object
as tells its class.

    python dino.py
    python lessons/attention.py runs/dino-toys-s0/last.pt
    python lessons/attention.py runs/dino-toys-s0/last.pt --size 96
    python lessons/attention.py runs/dino-cifar10-s0/backbone.pt --dataset cifar10 --size 128
    python lessons/attention.py dino_deitsmall8_pretrain.pth --patch-size 8 --dataset PATH

CHECKPOINT: last.pt or backbone.pt of dino.py, or a released file. Options that are not listed in
--help are those of dino.py (--device, --patch-size); what is not given is as in the run.

Writes lessons/attention.png: images and the attention of every head. On `toys`, the default,
where the objects are known, also what holds 60 % of the attention of the best head, and
lessons/attention.csv, a line for each head: beside the checkpoint the same network with random
weights and trained with labels, on the images that the checkpoint had. Images are whole central
squares: of `toys` new ones, of other sets validation images, never of the test set.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dino
from lessons import checkpoint, shared


def attention_maps(vit, x):
    """Self-attention of the last block: (N, 3, H, W) -> (N, heads, 1 + T, 1 + T). Row i says how
    much token i takes from each token; the class token comes first."""
    *blocks, last = vit.blocks
    x = vit.tokens(vit.patch_embed(x))
    for block in blocks:
        x = block(x)
    qkv = last.attn.qkv(last.norm1(x))
    qkv = qkv.unflatten(2, (3, last.attn.heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, 1 + T, D / heads) each
    s = q @ k.mT * q.shape[-1] ** -0.5
    return s.softmax(-1)


@torch.no_grad()
def class_maps(net, x):
    """Of the class token to the patches: (N, 3, S, S) in [0, 1] -> (N, heads, S / P, S / P)."""
    net.eval()
    side = x.shape[-1] // net.backbone.patch_size
    x = x.to(net.mean.device)
    w = attention_maps(net.backbone, (x - net.mean) / net.std)
    return w[:, :, 0, 1:].unflatten(2, (side, side)).cpu()


def holding(attention, mass):
    """(..., T) -> bool: the smallest set of patches that holds this share of the attention (the
    released visualize_attention.py)."""
    value, index = attention.sort(dim=-1)
    share = value.cumsum(-1) / value.sum(-1, keepdim=True)
    none = torch.zeros_like(attention, dtype=torch.bool)
    return none.scatter(-1, index, share > 1 - mass)


def masks(attention, mass, size):
    """Maps (N, heads, h, w) -> what holds this share, in pixels (N, heads, size, size)."""
    kept = holding(attention.flatten(2), mass).view_as(attention)
    return F.interpolate(kept.float(), size) > 0.5  # nearest


def jaccard(found, truth):
    """(..., H, W) bool -> (...): intersection over union."""
    both = (found & truth).sum((-2, -1))
    either = (found | truth).sum((-2, -1))
    return both / either.clamp(min=1)


def supervised(data, epochs, run):
    """The same network trained with labels on the images that dino.py had but for those of the
    validation: crops and flips, AdamW, half a cosine."""
    args = run.args
    images, index = data.fit
    labels = images.labels.to(run.device)
    net = dino.build(args)
    net.classifier = nn.Linear(net.backbone.dim, 1 + int(labels.max()))
    net.to(run.device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    crop = [common.Crop(args.image_size, (0.5, 1.0), ratio=(3 / 4, 4 / 3))]
    batch = min(64, len(index))
    per_epoch = len(index) // batch
    steps = epochs * per_epoch
    step = 0
    for epoch in range(epochs):
        mix = torch.Generator().manual_seed(args.seed * 2**20 + epoch)
        order = index[torch.randperm(len(index), generator=mix)][: per_epoch * batch]
        seed = (args.seed, epoch)
        for (x,), i in common.batches(images, order, batch, crop, run.device, seed=seed):
            lr = 1e-3 * min(1, (step + 1) / max(steps // 10, 1))  # a tenth of warm-up
            lr = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = lr
            h = net(common.flip(x, p=0.5))[0]
            loss = F.cross_entropy(net.classifier(h), labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    net.eval()
    crop = [common.Crop(args.image_size, 1.0)]
    s, y = common.embed(lambda views: [net.classifier(net(*views)[0])], data.val, crop, run)
    correct = s.argmax(1) == y
    print(f"supervised: {100 * correct.float().mean():.1f} % on validation images")
    return net


def measure(nets, x, truth, mass):
    """-> rows of the table: network, head, Jaccard, share of the image; and, by network, the masks
    of the head that fits an image best (n, S, S), as in the paper."""
    rows = []
    best = {}

    def add(name, head, mask):
        score = 100 * jaccard(mask, truth).mean().item()
        area = 100 * mask.float().mean().item()
        rows.append([name, head, score, area])

    for name, net in nets.items():
        found = masks(class_maps(net, x), mass, x.shape[-1])  # (n, heads, S, S)
        for i, mask in enumerate(found.unbind(1), 1):
            add(name, str(i), mask)
        head = jaccard(found, truth.unsqueeze(1)).argmax(1)
        best[name] = found[torch.arange(len(x)), head]
        add(name, "best", best[name])
    add("whole image", "", torch.ones_like(truth))  # what needs no attention
    return rows, best


def main(argv=None):
    p = checkpoint.parser(__doc__)
    p.add_argument("--shown", **common.FROM_1, default=6, help="in the picture (6)")
    p.add_argument("--mass", **common.SHARE, default=0.6, help="of attention in a mask (0.6)")
    p.add_argument("--supervised-epochs", **common.FROM_0, default=12, help="0: not (12)")
    own, options = p.parse_known_args(argv)
    net, data, run = checkpoint.load(dino, own, options)
    size = checkpoint.side(own, run, run.args.image_size)
    x, _, truth = checkpoint.images(own, size, data, run)
    shown = x[: own.shown]
    columns = {"image": shown}
    for i, head in enumerate(class_maps(net, shown).unbind(1), 1):
        columns[f"head {i}"] = head
    rows = []
    if truth is not None:
        nets = {"without labels": net}
        nets["random weights"] = dino.build(run.args).to(run.device)
        if own.supervised_epochs:
            nets["supervised"] = supervised(data, own.supervised_epochs, run)
        rows, best = measure(nets, x, truth, own.mass)
        best["the object"] = truth
        for name, mask in best.items():
            columns[name] = checkpoint.lit(shown, mask[: own.shown])
        keys = ["network", "head", "jaccard", "share_of_image"]
        checkpoint.table(f"{own.out}/attention.csv", keys, rows)
    shape = (1.4 * len(columns), 1.4 * len(shown))
    shared.figure(f"{own.out}/attention.png", shape, checkpoint.grid, columns)
    return rows


if __name__ == "__main__":
    main()

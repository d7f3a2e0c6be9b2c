"""Every lesson once, on next to nothing: it runs and writes its table and its figure."""

import csv
import functools
import importlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools import close, completed, draw, fails, options, train

import byol
import common
import dino
import dinov2
import ibot
import pretext
import simclr
from lessons import checkpoint, shared

DEVICE = "--device cpu --workers 0".split()
TINY = [*DEVICE, *"--limit 40 --image-size 16 --epochs 1".split()]


def lesson(name):
    return importlib.import_module(f"lessons.{name}")


def written(folder, name):
    """The rows of its CSV; its figure is there, too."""
    assert (folder / f"{name}.png").stat().st_size > 5000
    with open(folder / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name, rows, own", [
    ("head", 3, "--batch-size 40"),
    ("competing", 2 * 4, "--batch-size 20 --bits 2 1"),
    ("circle", 3, "--batch-size 12"),
    ("augmentations", 3, "--batch-size 40"),
    ("temperature", 3, "--batch-size 40 --taus 0.2 1 --longer 2 --longer-taus 1 --batch-sizes 40"),
    ("byol_collapse", 2, "--batch-size 40"),
    ("dino_collapse", 2 * 2, "--batch-size 20 --every 1"),
    ("teacher", 3 * 2, "--batch-size 40"),
    ("moco_momentum", 2, "--batch-size 40 --ms 0.9 --short-ms 0.9"),
    ("pretext_tasks", 3 + 1, "--tasks patch"),
])
def test_lesson(tmp_path, monkeypatch, name, rows, own):
    module = lesson(name)
    for table in {"RUNS", "ROWS"} & vars(module).keys():
        first, *_, last = getattr(module, table).items()
        monkeypatch.setattr(module, table, dict([first, last]))  # the others take as long again
    pairs = [("none", "none"), ("crop", "crop"), ("crop", "colour")]
    monkeypatch.setattr(module, "PAIRS", pairs, raising=False)
    module.main([*TINY, "--seeds", "1", *own.split(), "--runs", str(tmp_path / "runs"), "--out",
                 str(tmp_path)])
    found = written(tmp_path, name)
    assert len(found) == rows and all(0 <= float(row.get("linear_top1", 0)) <= 100 for row in found)


def test_weak(tmp_path, monkeypatch):
    """A figure, a table and an answer for each task; a planted source can be trusted or not."""
    module = lesson("weak")
    some = {task: dict([next(iter(runs.items()))]) for task, runs in module.RUNS.items()}
    monkeypatch.setattr(module, "RUNS", some)
    module.main([*TINY, *"--batch-size 20 --limit 60 --epochs 2 --seeds 2 --runs".split(),
                 str(tmp_path / "runs"), "--out", str(tmp_path)])
    for task, columns in module.COLUMNS.items():
        found = written(tmp_path, f"weak_{task}")
        assert len(found) == 2 * (4 if task == "labeling" else 1)
        assert all(0 <= float(row[k]) <= 100 for row in found for k in columns)
    best = written(tmp_path, "weak_noisy")
    assert all(float(row["best_plain_accuracy"]) >= float(row["plain_accuracy"]) for row in best)
    worlds = {k: module.planted(*world, seed=0) for k, world in module.WORLDS.items()}
    ahead = {k: v["label_model_accuracy"] - v["majority_accuracy"] for k, v in worlds.items()}
    assert ahead["unequal"] > 5 and abs(ahead["alike"]) < 1 and ahead["one 6 times"] < -5


def test_measures_on_the_circle_are_of_what_the_loss_gets(tmp_path, monkeypatch):
    module, nt_xent, got = lesson("circle"), simclr.nt_xent, []
    monkeypatch.setattr(simclr, "nt_xent", lambda z1, z2, tau: (
        got.append(common.health(z1, z1, z2)), nt_xent(z1, z2, tau))[1])
    monkeypatch.setattr(module, "STEPS", {1, 3})
    argv = [*TINY, "--batch-size", 12, "--dim", 2, "--out", tmp_path / "run"]
    _, _, run = train(simclr, argv, module.StepRun)
    assert run.kept == [{"step": i, "alignment": got[i - 1]["alignment"],
                         "uniformity": got[i - 1]["uniformity"]} for i in (1, 3)]


def test_the_network_before_training_is_that_of_a_step(tmp_path):
    """Evaluated with the first statistics of batch norm, all its z would be alike."""
    module, argv = lesson("circle"), [*TINY, "--dim", 2, "--out", tmp_path / "run"]
    _, data, run = train(simclr, argv, module.StepRun)
    x = common.toys(64, 16, 0)[0] / 255

    def uniformity(net):
        z = net.eval()(x)[1].detach()
        return common.health(z, z, z)["uniformity"]

    assert uniformity(module.untrained(data, run)) < -0.4 < uniformity(simclr.build(run.args)) / 4


def test_labels_are_not_those_of_the_test(tmp_path, monkeypatch):
    """The network with labels learns none of the images that it is evaluated on."""
    module, given = lesson("competing"), []
    labelled = module.supervised.Labelled
    monkeypatch.setattr(module.supervised, "Labelled", lambda data, hide: (
        given.append((data, labelled(data, hide).labels)), labelled(data, hide))[1])
    own = module.shared.parser("", "competing", epochs=1).parse_args(["--runs", str(tmp_path)])
    module.with_labels(simclr, own, "labels", 0, TINY, functools.partial(module.MarkedRun, 1))
    (data, labels), = given
    assert (labels[data.val[1]] == -100).all() and len(data.val[1]) > 2
    assert torch.equal(labels[data.fit[1]], data.train.labels[data.fit[1]])


def test_answer_of_circle():
    """Both forces have to show: together first, then apart."""
    def row(step, alignment, uniformity):
        return {"step": step, "seeds": 3, "alignment": alignment, "alignment_sd": 0.1,
                "uniformity": uniformity, "uniformity_sd": 0.05}

    answer = lesson("circle").answer
    start, closest, apart = row(1, 1.2, -1.0), row(15, 0.0, -0.02), row(700, 0.2, -0.98)
    assert answer([start, closest, apart], {}).startswith("Yes")
    assert "-0.02 in step 15, -0.98 in the last" in answer([start, closest, apart], {})
    assert answer([start, closest], {}).startswith("Partly")
    assert answer([start, start | {"step": 9}], {}).startswith("Not in these runs")


def test_answer_of_weak():
    module = lesson("weak")
    ours, floor, ceiling, *_ = module.COLUMNS["pseudo"]
    row = {"name": "4", "seeds": 3, ours: 82.0, floor: 72.0, ceiling: 100.0,
           f"{ours}_sd": 4.0, f"{floor}_sd": 2.0}
    assert module.answer("pseudo", [row]).endswith(" 4: 82.0 (72.0, 100.0).")
    assert module.answer("pseudo", [row]).startswith("Yes")
    assert module.answer("pseudo", [row | {f"{ours}_sd": 9.0}]).startswith("Not in these runs")


def test_weak_picture(tmp_path):
    """A positive bag, image beside image, with bars as long as their attention."""
    module, method = lesson("weak"), importlib.import_module("weak")
    argv = [*TINY, "--limit", 60, "--batch-size", 20, "--task", "bags", "--out", tmp_path / "run"]
    net, data, run = train(method, argv)
    image = module.weighed(net, data, run)
    count = image.shape[1] // 18
    assert image.shape == (16 + 6, 18 * count, 3) and 1 <= count <= 10
    bars = image[17:21, :, 0].unflatten(1, (count, 18))[:, :, 1:-1]
    assert ((bars == 0) | (bars == 1)).all() and 0 < (bars == 0).float().mean() < 0.5


@pytest.mark.parametrize("method, table", [
    (byol, lesson("byol_collapse").RUNS),
    (dino, lesson("dino_collapse").RUNS),
    (pretext, {k: v.split() for k, v in lesson("pretext_tasks").GUARDS.items()})])
def test_runs_differ(method, table):
    made = [vars(completed(method, flags)) for flags in table.values()]
    assert all(a != b for i, a in enumerate(made) for b in made[:i])


def test_marks(tmp_path):
    """By hand; and the same image has the same mark in training and evaluation."""
    module = lesson("competing")
    rust, turned = torch.tensor([0.8, 0.4, 0.3]), torch.tensor([0.3, 0.7, 0.8])
    x = rust.view(1, 3, 1, 1).expand(8, 3, 2, 2)
    found = module.mark(x, torch.arange(8), 3)[:, :, 0, 0]
    assert torch.allclose(found[[0, 4]], torch.stack([rust, turned]), atol=1e-6)
    assert torch.allclose(found[[1, 5]], torch.stack([1 - rust, 1 - turned]), atol=1e-6)
    assert len(found.mul(100).round().unique(dim=0)) == 8
    assert torch.allclose(module.mark(x, torch.zeros(8, dtype=torch.long), 0), x)

    class Ground(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).median(1, keepdim=True).values, x

    argv = [*TINY, "--limit", 200, "--batch-size", 50, "--out", tmp_path]
    _, data, run = train(simclr, argv, functools.partial(module.MarkedRun, 1))
    plain = common.toys(200, 16, seed=0)[0]
    inverted = run.marks == 1
    assert 50 < inverted.sum() < 150
    assert (data.train.pixels[inverted].int() - 255 + plain[inverted].int()).abs().max() <= 1
    assert (data.train.pixels[~inverted].int() - plain[~inverted].int()).abs().max() <= 1
    assert module.marks_from(Ground(), simclr, data, run) == 100

    kind = functools.partial(module.MarkedRun, 3, shared=False)
    _, data, run = train(simclr, [*argv, "--no-color", "--no-crop"], kind)
    _, (a, b) = next(run.batches(data, 0, [common.Crop(16, scale=1.0, count=2)]))
    agree = (a - b).abs().flatten(1).amax(1) < 0.01
    assert 0 < agree.sum() < 20  # of 50; one in eight has the same mark twice


def test_hidden_factors(tmp_path):
    """Planted: a goal in the features and one that is not; and the place of what is bright."""
    module, g = lesson("head"), torch.Generator().manual_seed(0)
    x, other = torch.randn(300, 4, generator=g), torch.randn(300, 1, generator=g)
    y = torch.cat([x @ torch.randn(4, 1, generator=g) + 3, other], 1)
    found = module.r2((x[:200], y[:200]), (x[200:], y[200:]))
    assert found[0] > 0.999 and found[1] < 0.1

    class Place(torch.nn.Module):
        def forward(self, x):
            bright = (x.mean(1) - 0.5).clamp(min=0)  # (n, H, W)
            column = torch.linspace(-1, 1, x.shape[3])
            h = (bright * column).sum((1, 2)) / bright.sum((1, 2))
            return h[:, None], torch.zeros(len(x), 1)

    argv = [*TINY, "--limit", 200, "--batch-size", 50, "--out", tmp_path]
    _, data, run = train(simclr, argv)
    scores = module.hidden_factors(Place(), data, run)
    assert scores["h_x"] > 0.7 and max(scores["h_y"], scores["z_x"]) < 0.1


def test_added_augmentations(tmp_path):
    """Turned images are turned, all four ways; what is added is what the loss sees."""
    module, x = lesson("augmentations"), draw(40, 3, 5, 5, dtype=torch.float32)
    turned = module.turn(x)
    ways = [[torch.equal(a, b.rot90(k, (1, 2))) for k in range(4)] for a, b in zip(turned, x)]
    assert all(sum(way) == 1 for way in ways) and all(map(any, zip(*ways)))
    kind = functools.partial(module.AddedRun, [torch.zeros_like])
    _, _, run = train(simclr, [*TINY, "--batch-size", 20, "--out", tmp_path], kind)
    assert run.rows[-1]["loss"] == pytest.approx(math.log(2 * 20 - 1), abs=1e-4)


def test_answers():
    """Yes where the rows show the claim beyond the noise, and only there."""
    def row(**figures):
        return {"seeds": 3} | figures | {f"{k}_sd": 1.0 for k in figures}

    answer = lesson("moco_momentum").answer
    for short, last, holds in ((50, 90, "Yes"), (60, 90, "Partly"), (50, 51, "Not")):
        rows = [row(m=m, linear_top1=v, knn_top1=v, untrained_linear_top1=50) | {"queue": keys}
                for keys, first in ((500, 50), (64, short))
                for m, v in ((0, first), (0.9, last), (0.99, 40))]
        assert answer(rows).startswith(holds)
    answer = lesson("augmentations").answer
    for alone, pair, holds in ((70, 90, "Yes"), (61, 90, "Partly"), (91, 90, "Not"),
                               (40, 60, "Not")):
        rows = [row(linear_top1=v) | dict(zip(("first", "second"), names)) for names, v in (
            (("none", "none"), 60), (("crop", "crop"), alone), (("crop", "colour"), pair))]
        assert answer(rows).startswith(holds)
    answer = lesson("byol_collapse").answer
    for spread, knn, holds in ((0.01, 20, "Yes"), (0.5, 20, "Not"), (0.01, 60, "Not")):
        rows = [row(loss=20, spread=0.9, knn_top1=60, untrained_knn_top1=20)
                | {"run": "BYOL", "epoch": 4},
                row(loss=2, spread=spread, knn_top1=knn) | {"run": "no predictor", "epoch": 4}]
        assert answer(rows).startswith(holds)
        for loss, word in ((20, holds), (1, "Not")):
            other = rows[0] | {"run": "SimSiam (m = 0)", "loss": loss}
            assert answer([rows[0], other, rows[1]]).startswith(word)
    answer = lesson("temperature").answer
    for later, holds in ((-30, "Yes"), (-18, "Not")):
        rows = [row(tau=tau, uniformity=u, linear_top1=50) | {"epochs": epochs}
                for epochs, small in ((4, -10), (24, later)) for tau, u in ((0.1, small), (1, -20))]
        assert answer(rows).startswith(holds)
    answer = lesson("competing").answer
    for marked, holds in ((50, "Yes"), (89, "Not")):
        rows = [row(linear_top1=v) | {"method": "DINO", "bits": b}
                for b, v in ((0, 90), (1, marked))]
        assert answer(rows).startswith(holds)
    apart, good = [row(linear_top1=v) | {"method": "DINO, mark not shared", "bits": 1}
                   for v in (51, 80)]
    rows[1]["linear_top1"] = 50
    assert answer([*rows, apart]).startswith("Not") and answer([*rows, good]).startswith("Yes")


def test_answers_of_vits_and_tasks():
    """Rows by hand for which a claim holds, and the same in which it does not."""
    teacher, collapse, tasks = map(lesson, ("teacher", "dino_collapse", "pretext_tasks"))
    rows = [{"m": m, "seed": seed, "epoch": 1, "network": name, "knn_top1": top1 + seed}
            for m in teacher.SCHEDULES for seed in range(3)
            for name, top1 in (("student", 30), ("teacher", 35))]
    means = shared.over_seeds(rows, ["m", "epoch", "network"], ["knn_top1"])
    text = teacher.answer(rows, means)
    assert "5.0 ± 0.0 if it rises to 1" in text and text.startswith("Not")
    fallen = [row | {"knn_top1": 20 + row["seed"]} if row["m"] == teacher.ZERO else row
              for row in rows]
    means = shared.over_seeds(fallen, ["m", "epoch", "network"], ["knn_top1"])
    assert teacher.answer(fallen, means).startswith("Yes")
    ends = [{"run": name, "seed": seed, "verdict": collapse.COLLAPSES.get(name, "healthy"),
             "knn_top1": 20 + seed + 20 * (name == "DINO")}
            for name in collapse.RUNS for seed in range(3)]
    means = shared.over_seeds(ends, ["run"], ["knn_top1"])
    assert collapse.answer(ends, means).startswith("Yes")
    assert "2 of 3 runs end with a one-hot" in collapse.answer(
        [*ends[:3], ends[3] | {"verdict": "healthy"}, *ends[4:]], means)
    rows = [{"name": name, "seed": seed, "linear_top1": 50 + seed + (name in tasks.TASKS) * 10}
            for name in tasks.GUARDS for seed in range(3)]
    means = shared.over_seeds(rows, ["name"], ["linear_top1"])
    assert tasks.of_guards(means).startswith("Yes: 5 of 5") and "no gaps 51 %" in tasks.of_guards(
        means)
    for worst, holds in ((60, "Yes: 9 of 9"), (50, "Not in these runs: 8 of 9")):
        levels = {"untrained": 50} | dict.fromkeys(tasks.TASKS, 70) | {"jigsaw": worst}
        rows = [{"name": name, "seed": seed, "linear_top1": level + seed}
                for name, level in levels.items() for seed in range(2)]
        means = shared.over_seeds(rows, ["name"], ["linear_top1"])
        assert tasks.of_tasks(rows, means).startswith(holds)


def test_terms_of_every_step(tmp_path):
    """Their means over an epoch are what the run prints."""
    argv = [*TINY, "--epochs", 2, "--batch-size", 10, "--eval-every", 0, "--out", tmp_path]
    _, _, run = train(dino, argv, lesson("dino_collapse").StepRun)
    rows = run.means(4)
    assert [row["step"] for row in rows] == [4, 8] and len(run.means(3)) == 3
    for row, of_epoch in zip(rows, run.rows):
        for k in ("loss", "entropy", "kl"):
            assert row[k] == pytest.approx(of_epoch[k], abs=1e-5)


def test_tables(tmp_path, capsys):
    rows = [{"a": "x, y", "n": 1, "v": 1.0, "w": [0.0, 1.0]}, {"a": "z", "n": 1, "v": 5.0,
            "w": [3.0, 3.0]}, {"a": "x, y", "n": 1, "v": 4.0, "w": [1.0, 2.0]}]
    means = shared.over_seeds(rows, ["a", "n"], ["v", "w"])
    assert means[0] == {"a": "x, y", "n": 1, "seeds": 2, "v": 2.5, "v_sd": pytest.approx(4.5**0.5),
                        "w": [0.5, 1.5], "w_sd": pytest.approx([0.5**0.5] * 2)}
    assert means[1] == {"a": "z", "n": 1, "seeds": 1, "v": 5, "v_sd": 0, "w": [3, 3],
                        "w_sd": [0, 0]}
    shared.write_csv(tmp_path / "t.csv", rows, ["a", "v"])
    assert (tmp_path / "t.csv").read_text() == 'a,v\n"x, y",1\nz,5\n"x, y",4\n'
    shared.show(means, ["a", "v"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["x,", "y", "2.5", "±", "2.1"], ["z", "5"]]


def test_compare():
    """By hand: variances 1 and 4 of 3 seeds, the error is the root of 5 / 3, twice it 2.58."""
    b = {"v": 10, "v_sd": 2.0, "seeds": 3}
    for v, sign in ((12.5, 0), (12.6, 1), (7.5, 0), (7.4, -1)):
        a = {"v": v, "v_sd": 1.0, "w": 10, "w_sd": 2.0, "seeds": 3}
        found = shared.difference(a, b, "v")
        assert found == shared.difference(a, a, "v", "w") == pytest.approx((v - 10, (5 / 3) ** 0.5))
        assert shared.compare(a, b, "v") == shared.compare(a, a, "v", "w") == sign
    one, other = ({"v": v, "v_sd": 0, "seeds": 1} for v in (1, 2))
    assert shared.difference(other, one, "v") == (1, 0)
    assert (shared.compare(one, other, "v"), shared.compare(one, one, "v")) == (-1, 0)


def test_word_of_an_answer():
    for held, word in (([1], "Yes"), ([1, 1], "Yes"), ([1, 0], "Partly"), ([0, 1], "Partly"),
                       ([0], "Not in these runs"), ([0, 0], "Not in these runs")):
        assert shared.answer([*map(bool, held)], "of 3.") == f"{word}: of 3."


def test_floor(tmp_path):
    """What the floor scores is not what the trained network does, and what evaluate says of it."""
    argv = [*TINY, "--batch-size", 20, "--epochs", 2, "--out", tmp_path]
    net, data, run = train(simclr, argv)
    net.load_state_dict(simclr.build(run.args).state_dict())
    found = shared.untrained(simclr, data, run)
    for key, value in simclr.evaluate(net, data, run.args, run).items():
        assert key not in ("linear_top1", "knn_top1") or found[f"untrained_{key}"] == value


def test_what_a_lesson_cannot_use(tmp_path, capsys):
    argv = [*TINY, *"--batch-size 40 --arch convnet --stem 7x7 --runs".split(), tmp_path / "runs"]
    assert "--eval" in refused("head", capsys, *argv, "--eval", "last.pt")
    assert "toys" in refused("head", capsys, *argv, "--dataset", "cifar10")
    for name in ("head", "competing", "pretext_tasks"):
        assert "--labelled" in refused(name, capsys, *argv, "--labelled", tmp_path)
    for flag in ("--labelled", "--eval", "--seed"):
        assert flag in refused("few_labels", capsys, tmp_path / "backbone.pt", flag, "1")
    assert "--guards" in refused("pretext_tasks", capsys, *TINY, "--guards", "--tasks", "patch")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, flags", [
    ("temperature", "--taus 0"), ("temperature", "--longer 1"), ("temperature", "--longer-taus -1"),
    ("temperature", "--batch-sizes 1"), ("moco_momentum", "--ms 0.9 1.1"),
    ("moco_momentum", "--short-ms -0.1"), ("byol_collapse", "--limit 0"),
    ("competing", "--bits 2 2"), ("competing", "--bits 4")])
def test_values_that_a_lesson_cannot_use(tmp_path, capsys, name, flags):
    argv = [*TINY, "--runs", tmp_path / "runs", "--out", tmp_path, *flags.split()]
    assert flags.split()[0] in refused(name, capsys, *argv) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", "augmentations competing moco_momentum teacher pretext_tasks "
                         "dinov2_table few_labels neighbours".split())
def test_a_lesson_that_needs_labels(tmp_path, capsys, name):
    """It says so before it has trained any network."""
    argv = [*TINY, "--batch-size", 20, "--runs", tmp_path / "runs"]
    if name in ("few_labels", "neighbours"):
        untrained(simclr, tmp_path)
        argv = [tmp_path / "backbone.pt", *(argv if name == "few_labels" else [])]
    argv += ["--values", "toys"] if name == "dinov2_table" else []  # for their batch size
    argv += ["--dataset", folder_of(40, tmp_path / "images"), "--out", tmp_path]
    assert "no labels" in refused(name, capsys, *argv)
    assert not [*(tmp_path / "runs").rglob("*.pt")]


def test_dinov2_table(tmp_path, monkeypatch, capsys):
    """A row in two parts: what is finished is not run again, nor taken for another run."""
    module, runs = lesson("dinov2_table"), tmp_path / "runs"
    some = {"iBOT reproduced": module.ROWS["iBOT reproduced"]}
    monkeypatch.setattr(module, "ROWS", some)  # eleven rows would take minutes
    argv = [*TINY, "--image-size", "24", "--local-size", "8", "--hidden", "16", "--local-crops",
            "1", "--runs", str(runs), "--out", str(tmp_path)]
    module.main([*argv, "--seeds", "1"])
    first = {f: f.stat().st_mtime_ns for f in runs.glob("*/results.json")}
    means = module.main([*argv, "--seeds", "2"])
    assert all(f.stat().st_mtime_ns == time for f, time in first.items())
    assert sorted(f.name for f in runs.iterdir()) == ["0-s0", "0-s1"]
    for folder in runs.iterdir():
        made = json.loads((folder / "args.json").read_text())
        assert folder.name == f"0-s{made['seed']}"
        assert (made["image_size"], made["patch_size"], made["koleo"]) == (24, 8, 0)
    assert [(row["row"], row["seeds"]) for row in means] == [(name, 2) for name in some]
    assert len(written(tmp_path, "dinov2_table")) == 2
    argv += ["--seeds", "1", "--knn-k", "5"]
    assert "other options" in refused("dinov2_table", capsys, *argv)
    assert "take --eval" in refused("dinov2_table", capsys, *argv, "--eval", "last.pt")


def test_dinov2_table_rows():
    """Every row changes the options that it names and no others; on dinov2.py's command line, too.
    From row to row the figures change as the slide's arrows say."""
    module = lesson("dinov2_table")
    named = ["", "layer_scale drop_path", "out_dim", "koleo", "ffn", "patch_size", "m",
             "warmup tau_t_warmup", "batch_size", "centering", "tied_heads"]
    for values in module.VALUES:
        table = module.options(values).values()
        rows = [vars(options(dinov2, module.flags(row))) for row in table]
        for row, above, names in zip(rows[1:], rows[:-1], named[1:], strict=True):
            assert {k for k in row if row[k] != above[k]} == set(names.split())
        assert all(rows[-1][k] == dinov2.OPTIONS[k][2] for k in ("centering", "tied_heads"))
    k_nn, linear = zip(*(figures for _, *figures in module.ROWS.values()))
    of_slide = [0.9, 1.2, 2.3, -0.2, 0.2, 0.5, 1.1, 1.2, 0, 0.3]
    assert [b - a for a, b in zip(k_nn, k_nn[1:])] == pytest.approx(of_slide)
    of_slide = [-1.2, -0.1, 0.6, 0.6, 0.4, 0.1, 0.2, 0.9, 0, -0.2]
    assert [b - a for a, b in zip(linear, linear[1:])] == pytest.approx(of_slide)


def test_dinov2_table_differences(capsys):
    """By hand: of variance 1 and 3 seeds, the error is the root of 2 / 3."""
    module = lesson("dinov2_table")

    def means(figures, seeds=3):
        rows = [{"row": name} | dict.fromkeys(module.TOP1, v + i - seeds // 2)
                for name, v in zip(module.ROWS, figures) for i in range(seeds)]
        return shared.over_seeds(rows, ["row"], module.TOP1)

    for figures, text in (((20, 30, 31), "Not in these runs: 2 of 4 differences"),
                          ((20, 30, 20, 30), "Partly: 6 of 6 differences")):
        assert module.answer(means(figures)).startswith(text)
    assert module.answer(means((20, 30), seeds=1)).startswith("One seed: no telling")
    module.show(means((20, 30), seeds=1))
    assert capsys.readouterr().out.split()[-5:] == ["30.0", "+10.0", "one", "seed", "-1.2"]
    module.show(means((20, 30, 31)))
    lines = capsys.readouterr().out.splitlines()
    for key, slide in ((0, ("+0.9", "+1.2")), (5, ("-1.2", "-0.1"))):
        assert lines[key + 3].split()[5:] == ["30.0", "+10.0", "±", "0.8", slide[0]]
        assert lines[key + 4].split()[3:] == ["31.0", "+1.0", "±", "0.8", "within", "noise",
                                              slide[1]]


def untrained(method, folder, *argv):
    """last.pt and backbone.pt of a run of no steps, at weights that its seed does not give."""
    args = completed(method, [*TINY, *argv])
    net = method.build(SimpleNamespace(**vars(args) | {"seed": 5}))
    state = {"net": net.state_dict(), "net_ema": net.state_dict()}
    meta = vars(args) | {"mean": method.MEAN, "std": method.STD}
    folder.mkdir(exist_ok=True)
    torch.save({"method": args.method, "args": vars(args), "state": state, "progress": {}},
               folder / "last.pt")
    torch.save({"state_dict": net.backbone.state_dict(), "meta": meta}, folder / "backbone.pt")
    return net.eval()


def folder_of(n, path):
    """Images without labels."""
    path.mkdir()
    for i, x in enumerate(torch.rand(n, 3, 40, 40, generator=torch.Generator().manual_seed(0))):
        common.picture(path / f"{i}.png", [x[None]])
    return path


def refused(name, capsys, *argv):
    return fails(lambda: lesson(name).main([str(a) for a in argv]), capsys)


def test_a_lesson_has_its_own_seeds(tmp_path, capsys):
    """And begins anew; the folder of its results is made before the runs."""
    for flags in (["--seed", "5"], ["--resume"], ["--eval=x.pt"]):
        argv = [*TINY, *flags, "--out", tmp_path / "new" / "folder"]
        assert flags[0].split("=")[0] in refused("moco_momentum", capsys, *argv)
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    error = refused("moco_momentum", capsys, *TINY, "--out", tmp_path / "file" / "folder")
    assert "no folder can be made" in error


def test_few_labels(tmp_path, monkeypatch, capsys):
    """The four ways learn from so many labels and no more, not from validation images, either; the
    test images are not read before all is chosen. Many labels have more updates."""
    untrained(simclr, tmp_path)
    module, read, fitted, updates = lesson("few_labels"), [], [], []
    monkeypatch.setattr(simclr, "lr_at", lambda step, steps, *given, lr_at=simclr.lr_at: (
        updates.append((step, steps)), lr_at(step, steps, *given))[1])
    monkeypatch.setattr(module, "outputs", lambda net, part, run, outputs=module.outputs: (
        read.append(part[0]), outputs(net, part, run))[1])
    monkeypatch.setattr(simclr, "regression_path", lambda x, *given, path=simclr.regression_path: (
        fitted.append(len(x)), path(x, *given))[1])
    argv = [str(tmp_path / "backbone.pt"), *TINY, *"--labels 1 2 --choose-at 2".split(),
            *"--updates 3 --passes 2 --seeds 2 --lrs 0.1 0.2 --batch-size 8".split(),
            "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    rows = module.main(argv)
    assert len(rows) == 2 * 2 * 4 and len({row["how"] for row in rows}) == 4
    assert all(0 <= row["test_top1"] <= 100 for row in rows)
    assert len(written(tmp_path, "few_labels")) == 16
    assert max(fitted) <= 2 * 10 and len(fitted) == 2 + 2 * 2 * 2
    assert not any(images is read[-1] for images in read[: 2 * 2 + 2 * 2])
    few, more = [(i, 3) for i in range(3)], [(i, 5) for i in range(5)]  # 10 labels, then 20
    assert updates == 4 * more + 4 * few + 4 * more
    assert "smallest class has" in refused("few_labels", capsys, *argv, "--labels", 1, 40)


def test_subset_of_few_labels():
    module, labels = lesson("few_labels"), torch.arange(60) % 3
    pool = torch.arange(0, 60, 2)
    few, more = (module.subset(labels, pool, each, seed=1) for each in (2, 5))
    assert torch.equal(labels[few].bincount(), torch.tensor([2, 2, 2])) and not (few % 2).any()
    assert set(few.tolist()) < set(more.tolist())  # the draws are nested
    assert set(few.tolist()) != set(module.subset(labels, pool, 2, seed=2).tolist())


@pytest.mark.parametrize("method", [byol, ibot, dinov2], ids=lambda method: method.__name__)
def test_backbone_is_fed_as_in_its_training(method, tmp_path):
    net = untrained(method, tmp_path)
    backbone, meta = checkpoint.backbone(tmp_path / "backbone.pt")
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    h = net(x)[0]
    raw = backbone.eval().backbone(x)  # without its mean and deviation
    raw = raw[:, 0] if raw.ndim == 3 else raw
    assert torch.allclose(backbone(x), h, atol=1e-6) and not torch.allclose(raw, h, atol=1e-3)


def test_attention(tmp_path):
    module, shared_argv = lesson("attention"), [*DEVICE, "--out", str(tmp_path)]
    untrained(dino, tmp_path, "--hidden", "16")
    files = [str(tmp_path / "last.pt"), "--supervised", str(tmp_path / "backbone.pt")]
    rows = module.main([*files, *shared_argv, "--images", "12", "--size", "32", "--seeds", "1"])
    assert [row["network"] for row in rows] == [*module.OF_SLIDE]
    assert all(0 < row[k] < 100 for row in rows for k in module.KEYS[2:])
    assert len(written(tmp_path, "attention")) == len(rows)
    folder = folder_of(2, tmp_path / "images")
    assert not module.main([str(tmp_path / "backbone.pt"), *shared_argv, "--dataset", str(folder),
                            "--size", "64"])


def test_attention_measure(tmp_path):
    """Heads of which each sees one half of the object, drawn by hand: their mean sees all of it."""
    module = lesson("attention")
    maps = torch.full((1, 2, 4, 4), 1e-6)
    maps[0, 0, :2, 0], maps[0, 1, :2, 1] = 1, 1
    truth = (maps.mean(1) > 0.1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    net = SimpleNamespace(maps=maps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "class_maps", lambda net, x: net.maps)
        figures, found = module.measure(net, torch.zeros(1, 3, 32, 32), truth, 0.9)
    assert torch.equal(found, truth) and figures == {
        "jaccard": 100, "best_head": 50, "share_of_image": 25, "whole_image": 25}
    means = [{"network": name, "jaccard": v, "jaccard_sd": 1.0, "seeds": 3}
             for name, v in zip(module.OF_SLIDE, (20, 30, 40))]
    counts = dict.fromkeys(module.OF_SLIDE, 3)
    assert module.answer(means, counts, 0.6).startswith("Yes")
    assert module.answer(means[::-1], counts, 0.6).startswith("Not")


@pytest.mark.parametrize("times", [1, 2, 4])
def test_overlapping_patches(times):
    """Of linear patches a convolution with a smaller stride; of what is learned nothing changes."""
    net = torch.nn.Conv2d(3, 5, 8, 8)
    x = draw(2, 3, 16, 24, dtype=torch.float32)
    step = 8 // times
    before = (8 - step) // 2
    wide = torch.nn.functional.pad(x, (before, 8 - step - before) * 2, mode="replicate")
    oracle = torch.nn.functional.conv2d(wide, net.weight, net.bias, stride=step)
    found = checkpoint.Overlapping(net, 8, times)(x)
    assert found.shape == (2, 5, 2 * times, 3 * times) and torch.allclose(found, oracle, atol=1e-5)
    rows = checkpoint.pixels(x[..., :16], 8, step) @ net.weight.flatten(1).T
    found = checkpoint.Overlapping(net, 8, times)(x[..., :16])
    assert torch.allclose((rows + net.bias).movedim(3, 1), found, atol=1e-5)


def test_attention_masks():
    """The smallest set of patches with 60 % of the mass, and its overlap, by hand."""
    module, g = lesson("attention"), torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 9, generator=g) ** 3
    for w, kept in zip(attention.flatten(0, 1), module.holding(attention, 0.6).flatten(0, 1)):
        order, mass, most = w.argsort(descending=True).tolist(), 0.0, []
        while mass < 0.6 * w.sum():
            most.append(order[len(most)])
            mass += w[most[-1]].item()
        assert sorted(most) == kept.nonzero().flatten().tolist()
    found = module.masks(attention.unflatten(2, (3, 3)), 0.6, 12)
    kept = module.holding(attention, 0.6).unflatten(2, (3, 3))
    assert torch.equal(found, kept.repeat_interleave(4, 2).repeat_interleave(4, 3))
    a, b = (torch.rand(2, 5, 5, generator=g) > 0.4 for _ in range(2))
    for i in range(2):
        pairs = [(p, q) for p, q in zip(a[i].flatten().tolist(), b[i].flatten().tolist())]
        both, either = sum(p and q for p, q in pairs), sum(p or q for p, q in pairs)
        assert module.jaccard(a, b)[i].item() == pytest.approx(both / either)


def test_ibot_patches(tmp_path, capsys):
    module, out = lesson("ibot_patches"), [*DEVICE, "--seeds", "1", "--out", str(tmp_path)]
    untrained(ibot, tmp_path, "--hidden", "16")
    last = str(tmp_path / "last.pt")
    rows = module.main([last, "--images", "22", "--size", "32", *out])
    assert [row["features"] for row in rows] == [module.OURS, "random weights", "pixels",
                                                 module.SYMMETRIC, module.PAIRS]
    assert all(0 <= row[k] <= 100 for row in rows for k in ("same_place", "same_part"))
    assert 0 < rows[4]["same_place"] < 60 and len(written(tmp_path, "ibot_patches")) == 5
    folder = folder_of(2, tmp_path / "images")
    row, *_ = module.main([str(tmp_path / "backbone.pt"), "--dataset", str(folder), "--size", "24",
                           *out])
    assert 0 <= row["same_place"] <= 100 and math.isnan(row["same_part"])
    assert "1 set of images" in capsys.readouterr().out
    refused("ibot_patches", capsys, last, "--size", 3, *out)
    assert "--finer 3" in refused("ibot_patches", capsys, last, "--finer", 3, *out)
    assert "none.pt" in refused("ibot_patches", capsys, tmp_path / "none.pt", *out)


def test_colours_of_matches():
    """Right, wrong, and of a patch that shows no part; then white, where no part is known."""
    module, figure = lesson("ibot_patches"), pytest.importorskip("matplotlib.figure")
    x, found = torch.zeros(3, 8, 8), (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    good = torch.tensor([[1.0], [0.0], [math.nan], [0.0]]).expand(4, 4)
    for parts, part, drawn, columns in (
            (good, 50.0, {"orange": 1, "lime": 1}, ["same place", "same part"]),
            (good * math.nan, math.nan, {"white": 3}, ["same place"])):
        shown = {"two views": [(x, x, found, good)], "two objects": [(x, x, found, parts)]}
        row = {"features": "iBOT", "same_place": 50.0, "same_part": part, "same_place_sd": 1.0,
               "same_part_sd": 1.0}
        whole = figure.Figure()
        module.draw(whole, shown, [row], side=2)
        lines = whole.axes[1].lines
        colours = [line.get_color() for line in lines if line.get_xdata().size]
        assert {c: colours.count(c) for c in colours} == drawn
        assert [t.get_text() for t in whole.axes[-1].get_legend().get_texts()] == columns


def test_symmetric_pixels():
    """Of a mirrored image the same in mirrored order, for patches that overlap, too; and of a
    patch by hand."""
    module, x = lesson("ibot_patches"), draw(2, 3, 16, 16, dtype=torch.float32)
    for step in (8, 4, 2):
        a, b = (module.symmetric(checkpoint.pixels(images, 8, step), 8)
                for images in (x, x.flip(3)))
        assert a.shape == (2, 16 // step, 16 // step, 192) and torch.equal(a, b.flip(2))
    row = torch.tensor([1, 2, 5, 0, 0, 3, 0, 4, 9, 9, 9, 9])
    assert module.symmetric(row, 2).tolist() == [2, 2, 5, 5, 3, 3, 4, 4, 9, 9, 9, 9]


def test_alike():
    """By hand: parts 1 and 2 of an image, and the background, beside those of another."""
    a, b = (torch.tensor([rows]).repeat_interleave(4, 1).repeat_interleave(4, 2)
            for rows in ([[0, 1], [2, 1]], [[1, 1], [0, 2]]))
    good = lesson("ibot_patches").alike(a, b, 4)[0]
    assert good[0].isnan().all()
    assert good[1:].tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
    assert lesson("ibot_patches").share(good[None]) == pytest.approx(100 * 5 / 12)


def test_mutually_nearest_patches():
    """As a loop over all pairs finds them; and a shuffle that was planted."""
    module, g = lesson("ibot_patches"), torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 6, generator=g), torch.randn(15, 6, generator=g)
    cosine = [[float(x @ y / x.norm() / y.norm()) for y in b] for x in a]
    pairs = [(i, j) for i in range(20) for j in range(15) if cosine[i][j] == max(cosine[i])
             and cosine[i][j] == max(row[j] for row in cosine)]
    pairs = sorted(pairs, key=lambda p: -cosine[p[0]][p[1]])
    found = [tuple(p) for p in torch.stack(module.mutual(a, b)).T.tolist()]
    assert len(pairs) > 3 and found == pairs
    order = torch.randperm(20, generator=g)
    i, j = module.mutual(a, 3 * a[order])
    assert len(i) == 20 and torch.equal(order[j], i)


def test_places_of_views():
    """An image whose colours are its coordinates: the views' patches say where they were cut."""
    module, size, side = lesson("ibot_patches"), 48, 6
    ramp = torch.arange(size) + 0.5
    image = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"))
    common.reseed(0)
    boxes, mirrored = module.draw_views(8, size)
    assert mirrored.sum(0).eq(1).all() and mirrored[0].any() and mirrored[1].any()
    seen = []
    for view in zip(boxes, mirrored):
        patches = torch.nn.functional.avg_pool2d(
            module.cut(image.expand(8, 2, -1, -1), *view), size // side).flatten(2).mT
        assert (patches - module.places(*view, side)).abs().max() < 0.3
        seen.append(patches)
    width = boxes[:, :, 2:].mean(0) / side
    apart = (seen[0].unsqueeze(2) - seen[1].unsqueeze(1)).abs() / width[:, None, None]
    near, clear = module.near(boxes, mirrored, side), (apart.amax(-1) - 1).abs() > 0.1
    assert torch.equal(near[clear], (apart.amax(-1) < 1)[clear])
    assert 0.02 < near.float().mean() < 0.3
    one = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 1]])
    good = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert module.share(good, [tuple(t[0] for t in one)]) == 50 and module.share(good) == 25


@pytest.fixture(scope="module")
def dinov2_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    untrained(dinov2, folder, *"--registers 2 --ffn swiglu --hidden 16".split())
    return folder


def test_dinov2_features(tmp_path, dinov2_run, capsys):
    module, out = lesson("dinov2_features"), [*DEVICE, "--seeds", "1", "--out", str(tmp_path)]
    rows = module.main([str(dinov2_run / "last.pt"), "--images", "33", "--size", "32", *out])
    assert [row["features"] for row in rows] == ["dinov2", "random weights", "pixels", "colour",
                                                 "place"]
    assert all(0 <= row["same_part"] <= 100 for row in rows)
    assert len(written(tmp_path, "dinov2_features")) == 5
    folder = folder_of(2, tmp_path / "images")
    assert not module.main([str(dinov2_run / "backbone.pt"), "--dataset", str(folder),
                            "--size", "24", *out])
    argv = [dinov2_run / "last.pt", *out, "--images", "20"]
    assert "--labels [10]" in refused("dinov2_features", capsys, *argv, "--labels", "10")
    assert "--size 3" in refused("dinov2_features", capsys, *argv, "--size", "3")


def test_dinov2_features_planted():
    """Two parts of an object on a background: cut out, whatever the sign, each part in a colour of
    its own in every image; neighbours of the same part; and images that are known neighbours."""
    module, g = lesson("dinov2_features"), torch.Generator().manual_seed(0)
    far, part, *_ = torch.linalg.qr(torch.randn(12, 12, generator=g))[0]
    kind = torch.zeros(4, 8, 8, dtype=torch.long)
    for i, image in enumerate(kind):
        shift = min(i, 2)
        image[2:5, 1 + shift : 6 + shift], image[5:7, 1 + shift : 6 + shift] = 1, 2
    plain = torch.stack([-4 * far, 4 * far + part, 4 * far - part])[kind]
    patches = plain + 0.05 * torch.randn(plain.shape, generator=g)
    for features in (patches, -patches):
        kept = module.foreground(features)
        assert torch.equal(kept, kind > 0)
        painted = module.colours(features, kept)
        assert (painted[~kept] == 0).all() and (painted[kept] > 0).all()
        first = [painted[kind == k][:, 0] for k in (1, 2)]
        assert (first[0].min() > first[1].max()) or (first[1].min() > first[0].max())
    assert module.knn_by_part(patches, kind, k=5) == 100
    other = torch.cat([kind[:3], 3 - kind[3:]])  # the last image's parts are called otherwise
    other[kind == 0] = 0
    assert module.knn_by_part(patches, other, k=5) == 0
    angle = torch.tensor([0.0, 1.0, 3.0, 3.1])  # of class tokens on a circle, of any length
    h = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [9.0], [1.0], [5.0]])
    assert module.nearest(h, 1).flatten().tolist() == [1, 0, 3, 2]
    parts = kind.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(checkpoint.most(parts, 4), kind)


def test_without_a_network():
    """Colour and place of each square, by hand."""
    x = draw(2, 3, 16, 16, dtype=torch.float32)
    found = lesson("dinov2_features").without_network(x, 4)
    assert {k: v.shape for k, v in found.items()} == {"colour": (2, 4, 4, 3), "place": (2, 4, 4, 2)}
    assert close(found["colour"][1, 2, 3], x[1, :, 8:12, 12:].mean((1, 2)), 1e-6)
    assert found["place"][0, 0, 3].tolist() == [-1, 1]


def test_dinov2_dense(tmp_path, dinov2_run, capsys):
    module, out = lesson("dinov2_dense"), [*DEVICE, "--seeds", "1", "--out", str(tmp_path)]
    last = str(dinov2_run / "last.pt")
    rows = module.main([last, "--images", "40", "--shown", "2", *out])
    table = {row["features"]: row for row in rows}
    assert [*table] == [module.OURS, "random weights", "pixels", module.PLACED, module.TRUTH]
    best = table[module.TRUTH]
    assert all(best["miou"] > row["miou"] and best["rmse"] < row["rmse"] for row in rows[:-1])
    assert len(written(tmp_path, "dinov2_dense")) == 5
    assert "--size 3" in refused("dinov2_dense", capsys, last, "--size", "3", *out)
    assert "toys alone" in refused("dinov2_dense", capsys, last, "--dataset", tmp_path, *out)


def test_dinov2_dense_scores():
    """Perfect, and by hand."""
    module, g = lesson("dinov2_dense"), torch.Generator().manual_seed(0)
    truth, far = torch.randint(3, (3, 4, 4), generator=g), torch.rand(3, 4, 4, generator=g)
    assert module.scores(truth, far, truth, far) == {"miou": 100, "accuracy": 100, "rmse": 0}
    found, depth = torch.randint(3, (3, 4, 4), generator=g), torch.rand(3, 4, 4, generator=g)
    cells = list(zip(found.flatten().tolist(), truth.flatten().tolist()))
    each = [100 * sum(a == b == k for a, b in cells) / sum(k in (a, b) for a, b in cells)
            for k in range(3)]
    errors = [(a - b) ** 2 for a, b in zip(depth.flatten().tolist(), far.flatten().tolist())]
    figures = module.scores(found, depth, truth, far)
    assert figures["miou"] == pytest.approx(sum(each) / 3)
    assert figures["accuracy"] == pytest.approx(100 * sum(a == b for a, b in cells) / 48)
    assert figures["rmse"] == pytest.approx((sum(errors) / 48) ** 0.5)


def test_dinov2_dense_answer():
    """Partly, if pixels with their place are better in depth; and the place, by hand."""
    module = lesson("dinov2_dense")
    rows = [{"features": name, "miou": u, "miou_sd": 1, "rmse": e, "rmse_sd": 0.001, "seeds": 3}
            for name, u, e in (("ours", 40, 0.12), ("pixels", 12, 0.15), ("placed", 13, 0.11))]
    for floors, word in ((rows[1:], "Partly"), (rows[1:2], "Yes"), (rows[:1], "Not")):
        assert module.answer(rows[0], *floors, count=3).startswith(word)
    found = module.placed(torch.zeros(2, 2, 2, 3))
    assert torch.equal(found[1, 1, 0], torch.tensor([0.0, 0, 0, 0, 0, 1, 0]))


def test_dinov2_dense_layers():
    """Both layers at their optimum, and on planted features what was planted."""
    module, g = lesson("dinov2_dense"), torch.Generator().manual_seed(0)
    x = module.standardised(torch.randn(60, 4, generator=g), 0.0, 1.0)
    y, bias = torch.rand(60, 3, generator=g).softmax(1), torch.tensor([[0.0, 0, 0, 0, 1]]).T
    for fit, out in ((module.ridge, lambda s: s), (module.logistic, lambda s: s.softmax(1))):
        w = fit(x, y, 0.3)
        slope = x.T @ (out(x @ w) - y) / 60 + 0.3 * w * (1 - bias)
        assert slope.abs().max() < 1e-4 and fit(x, y, 1e6)[:-1].abs().max() < 1e-4
    kinds = torch.randint(3, (12, 4, 4), generator=g)
    far = torch.rand(12, 4, 4, 1, generator=g)
    shares = torch.nn.functional.one_hot(kinds).float()
    mix = torch.randn(4, 6, generator=g)
    features = torch.cat([shares, far], 3) @ mix + 0.01 * torch.randn(12, 4, 4, 6, generator=g)
    classes, depth = module.linear(features[:8], shares[:8], far[:8], features[8:], 4)
    assert torch.equal(classes, kinds[8:]) and (depth - far[8:, ..., 0]).abs().max() < 0.05
    image = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    assert torch.equal(checkpoint.pixels(image, 2, 2)[1, 0, 1], image[1, :, :2, 2:].flatten())
    assert module.per_patch(image[:, 0], 2)[0, 1, 0] == image[0, 0, 2:, :2].mean()


def test_neighbours(tmp_path, capsys):
    """The shares are those of the five nearest by cosine, in float64."""
    argv = [*TINY, "--batch-size", "20", "--out", str(tmp_path / "run")]
    simclr.main(argv)
    lesson("neighbours").main([str(tmp_path / "run" / "backbone.pt"), "--out", str(tmp_path)])
    assert (tmp_path / "neighbours.png").stat().st_size > 5000
    x, labels, *_ = common.toys(40, 16, 0)
    x_test, labels_test, *_ = common.toys(40, 16, 1)
    a, b = (t.double().flatten(1) for t in (x_test, x))
    cosine = torch.corrcoef(torch.cat([a, b]))[:40, 40:]  # of pixels less their mean
    same = labels[cosine.argsort(1, descending=True)[:, :5]] == labels_test[:, None]
    out = capsys.readouterr().out
    assert f"mean: {same.double().mean():.1%} of the five" in out and "without labels" in out


def test_claims():
    """The claim above a figure is the heading of its section in lessons/README.md."""
    folder = Path(shared.__file__).parent
    headings = set(re.findall("^## (.*)$", (folder / "README.md").read_text("utf-8"), re.M))
    claims = []
    for path in sorted({*folder.glob("*.py")} - {folder / "weak.py"}):  # it quotes the slides
        module = lesson(path.stem)
        claims += getattr(module, "CLAIMS", [getattr(module, "CLAIM", "")])
    assert len(claims) > 12 and {*claims} - {""} <= headings

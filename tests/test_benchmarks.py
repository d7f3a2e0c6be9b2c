"""Every script of benchmarks/ on next to nothing."""

import csv
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from tools import TINY, quiet, refused

from lessons import finetune

ROOT = Path(__file__).resolve().parents[1]
METHODS = "simclr moco byol dino ibot dinov2 pretext".split()


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ==================================================================================================
# supervised.py, table.py
# ==================================================================================================


@pytest.mark.parametrize("method, own", [
    ("simclr", "--limit 64 --epochs 8 --lr 0.2 --scale 0.9"),
    ("dino", "--limit 32 --epochs 20 --lr 8e-3 --scale 1")])
def test_supervised(tmp_path, method, own):
    """It learns its training images, and what it leaves is read by table.py and finetune.py."""
    supervised, folder = benchmark("supervised"), tmp_path / "runs" / f"supervised-{method}-s1"
    results, out = quiet(supervised, [method, *TINY, *own.split(), "--image-size", 32, "--seed", 1,
                                      "--out", folder])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == results["epochs"] and rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[0]["train_top1"] < 40 and rows[-1]["train_top1"] > 70  # chance: 10
    assert json.loads((folder / "results.json").read_text()) == results
    [row], _ = quiet(benchmark("table"), ["--runs", tmp_path / "runs"])
    assert (row["experiment"], row["method"], row["dataset"], row["seeds"]) == (
        f"supervised-{method}", "supervised", "shapes", 1)
    for key in ("supervised_top1", "linear_top1", "knn_top1", "images_per_second"):
        assert float(row[key]) == pytest.approx(results[key], rel=1e-3) and results[key] > 0
    assert f"{results['linear_top1']:.1f}" in out
    backbone, meta = finetune.rebuild(folder / "backbone.pt")
    assert meta["arch"] == results["arch"] and results["lr"] == float(own.split()[5])


def test_supervised_defaults():
    net = torch.nn.Linear(2, 2)
    for is_vit, lr, decay in ((False, 0.2, [5e-4, 5e-4]), (True, 5e-4, [0.05, 0])):
        args = SimpleNamespace(lr=None, weight_decay=None)
        optimizer = benchmark("supervised").optimiser(net, args, is_vit)
        assert args.lr == lr and [g["weight_decay"] for g in optimizer.param_groups] == decay


def test_supervised_errors(tmp_path, capsys):
    supervised, argv = benchmark("supervised"), ["simclr", *TINY, "--out", tmp_path / "run"]
    assert "no finite loss" in refused(supervised, [*argv, "--lr", "1e30"], capsys)
    assert not (tmp_path / "run" / "results.json").exists()
    assert "--resume" in refused(supervised, [*argv, "--resume"], capsys)
    assert "labels" in refused(supervised, [*argv, "--batch-size", "49"], capsys)
    refused(supervised, ["nothing"], capsys)


def written(runs, name, options=None, **results):
    """A folder as a run leaves it."""
    same = {"method": "moco", "dataset": "shapes", "epochs": 3, "image_size": 32, "device": "cpu"}
    seed = int(name.split("-s")[-1].split("-")[0])
    (runs / name).mkdir(parents=True)
    (runs / name / "args.json").write_text(json.dumps(
        {"seed": seed, "lr": 0.1} | (options or {})))
    (runs / name / "results.json").write_text(json.dumps(
        same | {"seed": seed, "train_seconds": 60.0, "images_per_second": 9.0} | results))
    when = len(list(runs.iterdir()))  # a later one counts
    os.utime(runs / name / "results.json", (when, when))


def test_table(tmp_path, capsys):
    table, runs, out = benchmark("table"), tmp_path / "runs", tmp_path / "t.csv"
    for seed, top1 in ((0, 99.0), (1, 50.0), (2, 53.0)):
        written(runs, f"moco-shapes-s{seed}", {"eval": f"{seed}.pt"}, linear_top1=top1)
    written(runs, "moco-shapes-s0-2", linear_top1=47.0)
    written(runs, "moco-shapes-s0-eval", linear_top1=1.0)
    written(runs, "byol-shapes-s0", method="byol", linear_top1=40.0)
    out.write_text("experiment,seeds,linear_top1\nold,1,7\nmoco-shapes,1,8\n")
    quiet(table, ["--runs", runs, "--out", out])
    rows = {row["experiment"]: row for row in csv.DictReader(out.open())}
    assert list(rows) == ["byol-shapes", "moco-shapes", "old"] and rows["old"]["linear_top1"] == "7"
    moco = rows["moco-shapes"]
    assert (moco["seeds"], moco["linear_top1"], moco["linear_top1_sd"]) == ("3", "50", "3")
    assert rows["byol-shapes"]["linear_top1_sd"] == "" == moco["supervised_top1"]
    written(runs, "moco-shapes-s3", {"lr": 0.2})
    with pytest.raises(SystemExit, match="differ in lr: 0.1, 0.2"):
        quiet(table, ["--runs", runs])
    with pytest.raises(SystemExit, match="run something first"):
        quiet(table, ["--runs", runs, "--name", "none"])


# ==================================================================================================
# figure.py
# ==================================================================================================


def overlaps(figure):
    """Pairs of texts of a panel that cover each other."""
    draw, pairs = figure.canvas.get_renderer(), []
    for ax in figure.axes:
        boxes = [(t.get_text(), Text.get_window_extent(t, draw)) for t in ax.texts]  # no arrows
        pairs += [(a, b) for (a, x), (b, y) in combinations(boxes, 2) if x.overlaps(y)]
    return pairs


def test_figure_of_shapes(tmp_path):
    out = tmp_path / "shapes.png"
    figure = benchmark("figure").main(["--csv", str(ROOT / "benchmarks/results.csv"), "--name",
                                       "*-shapes", "--out", str(out)])
    assert np.asarray(Image.open(out)).std() > 20 and not overlaps(figure)
    said = [{t.get_text() for t in ax.texts} for ax in figure.axes]
    assert {"simclr", "dinov2", "pixels 29.6"} <= said[0] and "pixels 48.5" in said[1]
    assert "cpu, 3 seeds" in figure.get_suptitle()
    with pytest.raises(SystemExit, match="nothing"):
        benchmark("figure").main(["--csv", str(ROOT / "benchmarks/results.csv"), "--name",
                                  "nothing", "--out", str(out)])


def test_figure_with_peers(tmp_path):
    """Budgets are joined, k-NN is that of the second evaluation, minutes those of the training."""
    module, runs = benchmark("figure"), tmp_path / "runs"
    made = {"simclr": (85, 90, 93), "moco": (84, 89, 92.5), "dino": (70, 77, 80),
            "dino-resnet18": (71, 78, 84)}
    for i, (name, tops) in enumerate(made.items()):
        for epochs, top1 in zip((80, 200, 1000), tops):
            more = dict(dataset="data/cifar10", epochs=epochs, linear_top1=top1, device="H100",
                        untrained_knn_top1=30.0 + 4 * i)
            out = f"{name}-cifar10-e{epochs}"
            written(runs, f"{out}-s0", train_seconds=(6 + i) * epochs, knn_top1=1.0, **more)
            written(runs, f"{out}-k200-s0", train_seconds=0.0, knn_top1=top1 - 3,
                    **more | {"untrained_knn_top1": 20.0 + 4 * i})
    written(runs, "supervised-dino-cifar10-e200-s0", method="supervised", supervised_top1=88.0,
            dataset="data/cifar10", linear_top1=87.0, knn_top1=86.0)
    quiet(benchmark("table"), ["--runs", runs, "--out", tmp_path / "t.csv"])
    argv = ["--csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "t.png")]
    figure = module.main([*argv, "--peers"])
    assert not overlaps(figure)
    linear, knn = figure.axes
    said = [t.get_text() for ax in figure.axes for t in ax.texts]
    for text in ("simclr e1000", "dino-resnet18 e80", "ViT, supervised 88.0",
                 "ViT, supervised 86.0", "ResNet, untrained 25.3", "ViT, untrained 28.0",
                 "solo-learn BYOL e1000 92.6", "lightly SimCLR e80, JPEG"):
        assert text in said, (text, said)
    for ax, low in ((linear, 0), (knn, 3)):
        lines = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "-"]
        assert len(lines) == 4 and any(np.allclose(
            line, [(8, 85 - low), (20, 90 - low), (100, 93 - low)]) for line in lines)
    plain = module.main(argv)
    assert "ResNet, untrained 35.3" in [t.get_text() for t in plain.axes[1].texts]
    assert module.spread([3.0, 1.0, 1.1, 9.0], 1.0) == pytest.approx([3, 0.55, 1.55, 9])
    assert module.spread([1.3, 2.0, 1.2], 1.0) == pytest.approx([1.5, 2.5, 0.5])


# ==================================================================================================
# throughput.py, cifar10.sh
# ==================================================================================================


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_throughput(tmp_path, name):
    rows, _ = quiet(benchmark("throughput"), [
        name, *"--steps 1 --rounds 1 --eval-images 0 --batch-size 8 --images 16 --device cpu "
        "--image-size 16 --variants contiguous".split(), "--out", tmp_path / "t.csv",
        *["--stem", "7x7", "--arch", "resnet10"] * (name == "simclr"),
        *["--arch", "vit_nano", "--hidden", "64"] * (name == "dino")])
    value = {(row["quantity"], row["unit"]): float(row["value"]) for row in rows}
    ratio = {(row["quantity"], row["is"]): float(row["ratio"]) for row in rows if row["ratio"]}
    share = "of the step's time"
    parts = sum(ratio[part, share] for part in ("network", "crops", "augment", "loss"))
    assert parts + value["rest", share] == pytest.approx(1, abs=0.01)
    assert value["step", "of the ceiling's speed"] == pytest.approx(
        value["step", "images/s"] / value["network", "images/s"], rel=0.01)
    assert 0 < ratio["network, contiguous", "times the network's speed"] < 10
    assert len(list(csv.reader((tmp_path / "t.csv").open()))) == 1 + len(rows)


def test_elsewhere(tmp_path):
    """Every second is on one stop-watch; those that grow with the epochs do."""
    module, out = benchmark("elsewhere"), tmp_path / "t.csv"
    rows, _ = quiet(module, ["simclr", *TINY, "--out", out, "--of", 6])
    calls = {name: n for name, n, _ in rows}
    assert calls["steps"] == 9 and calls["last.pt"] == 1
    assert calls["evaluations while it trains"] == 3 and calls["test images, floors"] == 1
    assert all(seconds > 0 for name, _, seconds in rows if name not in ("first step", "rest"))
    table = list(csv.reader(out.open()))[1:]
    assert [float(row[6]) for row in table] == pytest.approx([s for *_, s in rows], abs=1e-3)
    assert sum(float(row[7]) for row in table) == pytest.approx(1, abs=1e-2)
    assert sum(float(row[8]) for row in table) == pytest.approx(1, abs=1e-2)
    more = module.longer([("steps", 9, 60.0), ("first step", 1, 5.0),
                          ("last.pt", 2, 3.0), ("rest", 1, 1.0)], 3, 6)
    assert more == {"steps": 120.0, "first step": 5.0,
                    "last.pt": 3.0, "rest": 1.0}  # written every minute of two


@pytest.fixture
def scripts(tmp_path):
    """A copy of the scripts; a stand-in for Python that notes its arguments and writes results."""
    (tmp_path / "benchmarks").mkdir()
    for file in ("cifar10.sh", "run.sh"):
        shutil.copy(ROOT / "benchmarks" / file, tmp_path / "benchmarks")
    for name in METHODS:
        (tmp_path / f"{name}.py").touch()
    stub = tmp_path / "python"
    stub.write_text("""#!/usr/bin/env bash
    echo "$@" >> commands
    while (($#)); do
        if [ "$1" = --out ]; then
            case $2 in
            *.csv) printf '%s,\\n' simclr-cifar10-e200 simclr-cifar10look > "$2" ;;
            *.png) touch "$2" ;;
            *) mkdir -p "$2" && touch "$2/results.json" ;;
            esac
        fi
        shift
    done""")
    stub.chmod(0o755)

    def run(*argv, **env):
        (tmp_path / "commands").write_text("")
        env = os.environ | {"PYTHON": str(stub)} | env
        done = subprocess.run(["bash", "benchmarks/cifar10.sh", *argv], cwd=tmp_path, text=True,
                              env=env, capture_output=True)
        commands = (tmp_path / "commands").read_text().splitlines()
        return done, [command.split() for command in commands]

    return run


def trained(name, epochs, seed=0):
    """The folders of a run and of its second evaluation."""
    return [f"runs/{name}-cifar10-e{epochs}{k}-s{seed}" for k in ("", "-k200")]


def value(command, option):
    return command[command.index(option) + 1]


def test_cifar10_in_order(scripts):
    done, commands = scripts("all", "--", "--amp", "off")
    assert done.returncode == 0, done.stderr
    assert all(c[-2:] == ["--amp", "off"] for c in commands[:-3])
    outs = [value(c, "--out") for c in commands]
    speed = [f"benchmarks/throughput-{m}-{size}.csv" for m in METHODS for size in (32, 224)]
    ceilings = [f"runs/supervised-{m}-cifar10-e200-s0" for m in ("simclr", "dino")]
    short = [f for name in ("simclr", "moco", "byol", "dino-resnet18", "dino", "ibot", "dinov2",
                            "pretext") for f in trained(name, 200)]
    long = [f for name in ("simclr", "moco", "byol", "dino-resnet18") for f in trained(name, 1000)]
    look = [f"runs/{m}-cifar10look-s0" for m in ("simclr", "moco", "byol", "pretext", "dino",
                                                 "ibot", "dinov2")]
    look += [f"runs/supervised-{m}-cifar10look-s0" for m in ("simclr", "dino")]
    pictures = ["benchmarks/cifar10.csv", "benchmarks/cifar10.png", "benchmarks/cifar10look.png"]
    assert outs == [*speed, *ceilings, *trained("simclr", 80), *short, *long, *look, *pictures]
    for command in commands[len(speed) : -3]:
        name, argv = command[0][:-3], command[1:]
        if name == "benchmarks/supervised":
            name, argv = argv[0], argv[1:]
        args = importlib.import_module(name).options(argv)  # each is understood
        folder = Path(args.out).name
        assert folder.removeprefix("supervised-").startswith(name) and args.amp == "off"
        assert (args.knn_k, args.knn_tau) == ((200, 0.1) if "-k200" in folder else (20, 0.07))
        assert args.eval == (args.out.replace("-k200", "") + "/last.pt" if "-k200" in folder
                             else None)
        assert args.compile == ("-k200" not in folder and "look" not in folder)
        assert args.dataset == ("data/cifar10-jpg" if "look" in folder else "cifar10")
        epochs = (8 if name == "pretext" else 20) if "look" in folder else int(
            folder.split("-e")[1].split("-")[0])
        assert args.epochs == epochs and ("resnet18" in folder) == (args.arch == "resnet18")
    again, commands = scripts("all")
    assert again.returncode == 0 and [c[0] for c in commands] == [
        "benchmarks/table.py", "benchmarks/figure.py", "benchmarks/figure.py"]
    assert again.stdout.count("skipped") == len(METHODS) + len(outs) - len(speed) - 3


def test_cifar10_goes_on(scripts, tmp_path):
    """What is finished is left alone, what was cut is resumed, what fails ends it."""
    for folder, file in ((trained("simclr", 200)[0], "results.json"),
                         (trained("moco", 200)[0], "last.pt")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).touch()
    done, commands = scripts("main")
    said = {value(c, "--out"): c for c in commands}
    assert done.stdout == f"{trained('simclr', 200)[0]} is finished: skipped\n"
    assert [k for k, c in said.items() if "--resume" in c] == [trained("moco", 200)[0]]
    assert list(said)[:2] == [trained("simclr", 200)[1], trained("moco", 200)[0]]
    done, commands = scripts("simclr80", DATA="sets/cifar10-jpg", SEEDS="0 1")
    assert [value(c, "--out") for c in commands] == [
        f"runs/simclr-cifar10-jpg-e80{k}-s{seed}" for seed in (0, 1) for k in ("", "-k200")]
    assert [value(c, "--seed") for c in commands] == ["0", "0", "1", "1"]
    assert value(commands[0], "--dataset") == "sets/cifar10-jpg"
    for argv in ([], ["nothing"], ["simclr80", "nothing"]):
        done, commands = scripts(*argv)
        assert done.returncode == 2 and "STAGE" in done.stderr and not commands
    done, commands = scripts("rest", PYTHON="false")
    assert done.returncode == 1 and not (tmp_path / trained("ibot", 200)[0]).exists()

"""Every script of benchmarks/ on next to nothing."""

import csv
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tools import TINY, quiet, refused

import common

ROOT = Path(__file__).resolve().parents[1]
METHODS = "simclr moco byol dino ibot dinov2 pretext".split()


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ==================================================================================================
# supervised.py
# ==================================================================================================


@pytest.mark.parametrize("method, own", [
    ("simclr", "--image-size 16 --epochs 1 --batch-size 16 --limit 48"),
    ("dino", "--image-size 32 --epochs 20 --batch-size 16 --limit 32 --lr 8e-3 --scale 1")])
def test_supervised(tmp_path, method, own):
    """What it writes is read by table.py, and a ViT learns 32 images by heart."""
    folder = tmp_path / f"supervised-{method}-s1"
    argv = [method, "--device", "cpu", "--workers", 0, *own.split(), "--seed", 1, "--out", folder]
    results, printed = quiet(benchmark("supervised"), argv)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == results["epochs"] and results["lr"] == (8e-3 if method == "dino" else 0.2)
    if method == "dino":
        assert rows[0]["train_top1"] < 40 and rows[-1]["train_top1"] > 70  # chance: 10
    [row], _ = quiet(benchmark("table"), ["--runs", tmp_path])
    assert (row["experiment"], row["method"]) == (f"supervised-{method}", "supervised")
    for key in ("supervised_top1", "linear_top1", "knn_top1", "images_per_second"):
        assert float(row[key]) == pytest.approx(results[key], rel=1e-3)
    assert f"linear_top1 {results['linear_top1']:.1f}" in printed
    weights = torch.load(folder / "backbone.pt", weights_only=True)["state_dict"]
    file = importlib.import_module(method)
    args = common.options(method, "", file.OPTIONS, [])
    vars(args).update(results)
    file.build(args).backbone.load_state_dict(weights)


def test_supervised_optimizer():
    module, net = benchmark("supervised"), torch.nn.Linear(2, 2)
    for arch, lr, decays in (("resnet18", 0.2, [5e-4]), ("vit_tiny", 5e-4, [0.05, 0])):
        args = common.options("x", "", {"arch": (*["a"] * 3, {}, "")}, ["--arch", arch])
        args.lr, args.weight_decay = module.rate(args, 0), module.decay(args, 0)
        groups = module.make_optimizer(net, args).param_groups
        assert [g["weight_decay"] for g in groups] == decays and groups[0]["lr"] == lr
    assert [module.lr_at(t, 4, 2, 1.0) for t in range(4)] == pytest.approx([0.5, 1, 1, 0.5])


def test_supervised_errors(tmp_path, capsys):
    argv = ["simclr", *TINY, "--out", tmp_path / "run"]
    torch.save({}, tmp_path / "x.npz")
    for flag in ("--init", "--eval", "--embed"):
        words = refused(benchmark("supervised"), [*argv, flag, tmp_path / "x.npz"], capsys)
        assert "method's own file" in words
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    argv += ["--dataset", tmp_path, "--batch-size", 2]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert "labels" in refused(benchmark("supervised"), argv, capsys)


# ==================================================================================================
# table.py, figure.py, course.py
# ==================================================================================================


def written(runs, name, options=None, **results):
    """A folder as a run leaves it."""
    same = {"method": "moco", "dataset": "data/cifar10", "epochs": 3, "image_size": 32,
            "device": "H100", "seed": int(name.split("-s")[-1].split("-")[0]),
            "train_seconds": 60.0, "images_per_second": 9.0}
    (runs / name).mkdir(parents=True)
    (runs / name / "args.json").write_text(json.dumps({"lr": 0.1} | (options or {})))
    (runs / name / "results.json").write_text(json.dumps(same | results))
    when = len(list(runs.iterdir()))  # a later one counts
    os.utime(runs / name / "results.json", (when, when))


def test_table(tmp_path):
    table, runs, out = benchmark("table"), tmp_path / "runs", tmp_path / "t.csv"
    for seed, top1 in ((0, 99.0), (1, 50.0), (2, 53.0)):
        written(runs, f"moco-x-s{seed}", {"eval": f"{seed}.pt"}, linear_top1=top1, rank_z=None)
    written(runs, "moco-x-s0-2", linear_top1=47.0)
    written(runs, "moco-x-s0-eval", linear_top1=1.0)
    written(runs, "byol-x-s0", linear_top1=40.0)
    out.write_text("experiment,seeds,linear_top1\nold,1,7\nmoco-x,1,8\n")
    quiet(table, ["--runs", runs, "--out", out])
    rows = {row["experiment"]: row for row in read(out)}
    assert list(rows) == ["byol-x", "moco-x", "old"] and rows["old"]["linear_top1"] == "7"
    moco = rows["moco-x"]
    assert (moco["seeds"], moco["linear_top1"], moco["linear_top1_sd"]) == ("3", "50", "3")
    assert rows["byol-x"]["linear_top1_sd"] == "" == moco["supervised_top1"] == moco["rank_z"]
    written(runs, "moco-x-s3", {"lr": 0.2})
    with pytest.raises(SystemExit, match="differ in lr: 0.1, 0.2"):
        quiet(table, ["--runs", runs])
    with pytest.raises(SystemExit, match="run something first"):
        quiet(table, ["--runs", runs, "--name", "none"])


def test_course(tmp_path):
    """Minutes follow from the images/s of the epochs; rows of runs that are gone stay."""
    course, runs, out = benchmark("course"), tmp_path / "runs", tmp_path / "c"
    floors = dict(zip(course.FLOORS, (40.0, 30.0, 45.0, 35.0)))
    for name, top1 in (("simclr-x-s0", 60.0), ("dino-x-s0", 50.0)):
        method, arch = name.split("-")[0], {"s": "convnet", "d": "vit_conv"}[name[0]]
        written(runs, name, method=method, arch=arch, train_seconds=240.0, **floors)
        metrics = [{"epoch": 1, "images_per_second": 10}, {"epoch": 2, "images_per_second": 30}]
        for row in metrics:
            row |= {"linear_top1": top1 + row["epoch"], "knn_top1": top1}
        metrics.insert(1, {"epoch": 1, "images_per_second": 15})  # 6, 4, 2 parts of 240 s
        (runs / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    written(runs, "supervised-x-s0", supervised_top1=88.0, linear_top1=87.0, knn_top1=86.0,
            arch="convnet")
    figure = course.main(["--runs", str(runs), "--out", str(out)])
    rows = read(f"{out}.csv")
    assert [row["minutes"] for row in rows] == ["2", "4", "2", "4", "1"]
    assert [row["linear_top1"] for row in rows] == ["51", "52", "61", "62", "87"]
    lines = [[*line.get_xdata()] for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [2.0, 4.0] in lines and np.asarray(Image.open(f"{out}.png")).std() > 20
    texts = [{t.get_text() for t in ax.texts} for ax in figure.axes]
    assert texts[0] == {"raw pixels 40.0", "convnets, untrained 45.0", "ViT, untrained 45.0",
                        "convnet, with labels 87.0"}
    assert "ViT, untrained 35.0" in texts[1] and "convnet, with labels 86.0" in texts[1]
    shutil.rmtree(runs / "dino-x-s0")
    course.main(["--runs", str(runs), "--out", str(out)])
    assert read(f"{out}.csv") == rows
    with pytest.raises(SystemExit, match="no finished run"):
        course.main(["--runs", str(runs), "--name", "none", "--out", str(tmp_path / "d")])


def test_figure(tmp_path):
    """Budgets are joined, k-NN is that of the second evaluation, minutes those of the training."""
    runs, out = tmp_path / "runs", tmp_path / "t.png"
    for minutes, (name, pixels) in enumerate((("simclr", 20.0), ("dino-resnet18", 30.0)), 6):
        for epochs, top1 in ((80, 85.0), (200, 90.0)):
            more = {"epochs": epochs, "linear_top1": top1, "untrained_knn_top1": pixels}
            experiment = f"{name}-cifar10-e{epochs}"
            seconds = 60.0 * minutes * epochs / 80
            written(runs, f"{experiment}-s0", train_seconds=seconds, knn_top1=1.0, **more)
            written(runs, f"{experiment}-k200-s0", train_seconds=0.0, knn_top1=top1 - 3, **more)
    written(runs, "supervised-dino-cifar10-e200-s0", supervised_top1=88.0, knn_top1=86.0)
    written(runs, "byol-cifar10-e80-k200-s0", train_seconds=60.0, knn_top1=70.0, epochs=80,
            linear_top1=75.0)  # trained and judged in one run
    quiet(benchmark("table"), ["--runs", runs, "--out", tmp_path / "t.csv"])
    argv = ["--csv", str(tmp_path / "t.csv"), "--out", str(out)]
    figure = benchmark("figure").main([*argv, "--peers"])
    assert np.asarray(Image.open(out)).std() > 20
    labels = [{t.get_text() for t in ax.get_legend().texts} for ax in figure.axes]
    assert {"simclr", "dino-resnet18", "ViT, supervised 88.0"} < labels[0]
    assert {"ViT, supervised 86.0", "ResNet, untrained 25.0"} < labels[1]
    assert "byol, solo-learn, 1000 epochs 92.6" in labels[0]
    assert "simclr, lightly, 80 epochs, JPEG 75.0" in labels[1]
    for ax, less in zip(figure.axes, (0, 3)):
        lines = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "-"]
        assert any(np.allclose(line, [(6, 85 - less), (15, 90 - less)]) for line in lines)
        assert any(np.allclose(line, [(1, 75 if less == 0 else 70)]) for line in lines)
    with pytest.raises(SystemExit, match="nothing"):
        benchmark("figure").main([*argv, "--name", "nothing"])


# ==================================================================================================
# throughput.py, elsewhere.py, compare.py
# ==================================================================================================


@pytest.mark.parametrize("method, own", [
    ("simclr", "--stem 7x7 --arch convnet"), ("dino", "--arch vit_nano --hidden 64 --out-dim 64")])
def test_throughput(tmp_path, method, own):
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i in range(16):
        Image.new("RGB", (20, 20)).save(tmp_path / "train" / "a" / f"{i}.png")
    argv = ("--steps 1 --rounds 1 --batch-size 8 --limit 16 --device cpu --image-size 16 "
            "--workers 0 --variants contiguous unfused").split()
    files = ["--folder", tmp_path, "--out", tmp_path / "t.csv"]
    quiet(benchmark("throughput"), [method, *argv, *own.split(), *files])
    rows = {row["part"]: row for row in read(tmp_path / "t.csv")}
    share = {part: float(row["time_of_step"] or 0) for part, row in rows.items()}
    pillow, streamed = "Pillow decodes one process", "streamed 1 workers"
    assert [*rows] == [*"step network crops augment contiguous unfused rest".split(), pillow,
                       streamed]
    assert all(float(rows[k]["images_per_second"]) > 0 for k in rows if k != "rest")
    assert sum(share[k] for k in ("network", "crops", "augment", "rest")) == pytest.approx(1, 1e-2)
    assert float(rows["step"]["speed_of_network"]) == pytest.approx(share["network"], 1e-2)
    speed = {part: float(rows[part]["images_per_second"]) for part in ("step", "network")}
    assert speed["step"] / speed["network"] == pytest.approx(share["network"], 1e-2)


def test_throughput_replays_the_step():
    """The bare networks get what they got in the step, and gradients only where it has some."""
    module, run = benchmark("throughput"), common.Run.__new__(common.Run)
    run.device, run.dtype = torch.device("cpu"), None
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    inputs = []
    for net in (student, teacher):
        net.register_forward_hook(lambda net, given, out: inputs.append((given[0], out)))
    x = torch.ones(3, 2)
    module.bare([(student, (x,), {}), (teacher, (2 * x,), {})], run, None)()
    assert [given.sum() for given, _ in inputs] == [6, 12]
    assert [out.requires_grad for _, out in inputs] == [True, False]
    assert student.weight.grad is None  # copies are trained


def test_elsewhere(tmp_path):
    """Every second is in one part; those that grow with the epochs do."""
    argv = ["dino", *TINY, "--out", tmp_path / "t.csv", "--of", 6]
    parts, _ = quiet(benchmark("elsewhere"), argv)
    times = {name: len(seconds) for name, seconds in parts.items()}
    assert times["steps"] == 9 and times["evaluations"] == 3 and times["test images, floors"] == 1
    rows = read(tmp_path / "t.csv")
    for column in ("share", "share of 6 epochs"):
        assert sum(float(row[column]) for row in rows) == pytest.approx(1, abs=1e-2)
    here, later = ({row["part"]: float(row[column]) for row in rows}
                   for column in ("share", "share of 6 epochs"))
    growth = {name: later[name] / here[name] for name in here if here[name] > 0.01}
    assert growth["steps"] / growth["test images floors"] == pytest.approx(2, rel=0.05)


def test_compare(tmp_path):
    """Two checkouts whose runs take what they are told; the second round begins with the other."""
    for name, speed in (("new", 30), ("old", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "simclr.py").write_text(f"""
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
(out / "results.json").write_text(json.dumps({{"images_per_second": {speed}}}))
open({str(tmp_path / "order")!r}, "a").write("{name} ")
assert sys.argv[1:3] == ["--epochs", "2"], "no epochs"
""")
    argv = [tmp_path / "new", tmp_path / "old", "simclr", "--rounds", 2]
    ratios, printed = quiet(benchmark("compare"), [*argv, "--epochs", 2])
    assert ratios == [1.5, 1.5] and "median 1.500 of 2 rounds" in printed
    assert (tmp_path / "order").read_text() == "new old old new "
    with pytest.raises(SystemExit, match="no epochs"):
        quiet(benchmark("compare"), argv)


# ==================================================================================================
# run.sh, cifar10.sh
# ==================================================================================================


@pytest.fixture
def scripts(tmp_path):
    """A copy of the scripts; a stand-in for Python that notes its arguments and writes results."""
    if os.name == "nt":
        pytest.skip("needs bash")
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
            *.csv) printf '%s,\\n' simclr-cifar10-e200 simclr-cifar10-cpu > "$2" ;;
            *.png) touch "$2" ;;
            *) mkdir -p "$2" && touch "$2/results.json" ;;
            esac
        fi
        shift
    done""")
    stub.chmod(0o755)

    def run(file, *argv, **env):
        (tmp_path / "commands").write_text("")
        done = subprocess.run(["bash", f"benchmarks/{file}.sh", *argv], cwd=tmp_path, text=True,
                              env=os.environ | {"PYTHON": str(stub)} | env, capture_output=True)
        lines = (tmp_path / "commands").read_text().splitlines()
        return done, [line.split() for line in lines]

    return run


def trained(name, epochs):
    """The folders of a run and of its second evaluation."""
    return [f"runs/{name}-cifar10-e{epochs}{k}-s0" for k in ("", "-k200")]


def value(command, option):
    return command[command.index(option) + 1]


def parsed(command):
    """The options of a command, as its file understands them."""
    name, *argv = command
    if name == "benchmarks/throughput.py":
        return benchmark("throughput").options(argv)[1]
    if name == "benchmarks/supervised.py":
        name, *argv = argv
    return common.options(name, "", importlib.import_module(name.removesuffix(".py")).OPTIONS, argv)


def test_run(scripts):
    done, commands = scripts("run", "simclr", "toys", "--lr", "0.1", SEEDS="0 5")
    assert done.returncode == 0, done.stderr
    assert commands == [f"simclr.py --dataset toys --seed {s} --lr 0.1".split() for s in (0, 5)]
    done, commands = scripts("run", "moco", "table")
    assert commands == [
        "benchmarks/table.py --name moco-* --out benchmarks/results.csv".split()]
    done, commands = scripts("run", "simclr", "imagenet", TORCHRUN="python", IMAGENET="/x",
                             PATH=f".:{os.environ['PATH']}")
    assert commands == ["--nproc-per-node 8 simclr.py --compile --dataset /x --out "
                        "runs/simclr-imagenet-s0".split()]
    for argv in ((), ("simclr",), ("nothing", "toys")):
        done, commands = scripts("run", *argv)
        assert done.returncode == 2 and "METHOD SET" in done.stderr and not commands


def test_cifar10_in_order(scripts):
    done, commands = scripts("cifar10", "cpu", "all", "--", "--amp", "off")
    assert done.returncode == 0, done.stderr
    assert all(c[-2:] == ["--amp", "off"] for c in commands[:-3])
    speed = [f"benchmarks/throughput-{m}-{size}.csv" for m in METHODS for size in (32, 224)]
    ceilings = [f"runs/supervised-{m}-cifar10-e200-s0" for m in ("simclr", "dino")]
    first = "simclr moco byol dino-resnet18".split()
    short = [f for name in (*first, *METHODS[3:]) for f in trained(name, 200)]
    long = [f for name in first for f in trained(name, 1000)]
    cpu = [f"runs/{m}-cifar10-cpu-s0" for m in (
        "simclr", "moco", "byol", "pretext", "dino", "ibot", "dinov2", "supervised-simclr",
        "supervised-dino")]
    pictures = ["benchmarks/cifar10.csv", "benchmarks/cifar10.png", "benchmarks/cifar10-cpu"]
    outs = [value(c, "--out") for c in commands]
    assert outs == [*cpu, *speed, *ceilings, *trained("simclr", 80), *short, *long, *pictures]
    again, commands = scripts("cifar10", "cpu", "all")
    assert again.returncode == 0 and [c[0] for c in commands] == [
        "benchmarks/table.py", "benchmarks/figure.py", "benchmarks/course.py"]
    assert again.stdout.count("skipped") == len(METHODS) + len(outs) - len(speed) - 3


def test_cifar10_options(scripts):
    """Every option exists, and means what it should."""
    _, commands = scripts("cifar10", "cpu", "all")
    for command in commands[:-3]:
        args, folder = parsed(command), Path(value(command, "--out")).name
        if command[0] == "benchmarks/throughput.py":
            assert f"-{args.image_size}.csv" in folder and args.compile
            continue
        again, cpu, supervised = (k in folder for k in ("-k200", "cpu", "supervised"))
        name = folder.removeprefix("supervised-")
        assert name.startswith(command[1] if supervised else command[0][:-3])
        assert (args.knn_k, args.knn_tau) == ((200, 0.1) if again else (20, 0.07))
        assert args.eval == (args.out.replace("-k200", "") + "/last.pt" if again else None)
        assert args.compile == (not again and not cpu)
        assert args.dataset == "cifar10"
        if cpu:
            assert args.device == "cpu" and (args.epochs is None) == (not supervised)
        else:
            assert args.epochs == int(folder.split("-e")[1].split("-")[0])
        assert ("resnet18" in folder) == (args.arch == "resnet18")


def test_cifar10_goes_on(scripts, tmp_path):
    """What is finished is left alone, what was cut is resumed, what fails ends it."""
    for folder, file in ((trained("simclr", 200)[0], "results.json"),
                         (trained("moco", 200)[0], "last.pt")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).touch()
    done, commands = scripts("cifar10", "main")
    by_folder = {value(c, "--out"): c for c in commands}
    assert done.stdout == f"{trained('simclr', 200)[0]} is finished: skipped\n"
    assert [k for k, c in by_folder.items() if "--resume" in c] == [trained("moco", 200)[0]]
    assert list(by_folder)[:2] == [trained("simclr", 200)[1], trained("moco", 200)[0]]
    done, commands = scripts("cifar10", "simclr80", DATA="sets/cifar10-jpg", SEEDS="0 1")
    assert [value(c, "--out") for c in commands] == [
        f"runs/simclr-cifar10-jpg-e80{k}-s{seed}" for seed in (0, 1) for k in ("", "-k200")]
    assert [value(c, "--seed") for c in commands] == ["0", "0", "1", "1"]
    assert value(commands[0], "--dataset") == "sets/cifar10-jpg"
    for argv in ([], ["nothing"], ["simclr80", "nothing"]):
        done, commands = scripts("cifar10", *argv)
        assert done.returncode == 2 and "STAGE" in done.stderr and not commands
    done, commands = scripts("cifar10", "rest", PYTHON="false")
    assert done.returncode == 1 and not (tmp_path / trained("ibot", 200)[0]).exists()


@pytest.mark.parametrize("method, flags", [("simclr", ""), ("dino", "--local-crops 2")])
def test_peers(method, flags, tmp_path, capsys):
    pytest.importorskip("lightly")
    for i in range(24):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    argv = [method, "--dataset", str(tmp_path), "--limit", "16", "--batch-size", "8", "--rounds",
            "1", "--image-size", "16", *flags.split()]
    benchmark("peers").main(argv)
    out = capsys.readouterr().out
    assert f"{method}, " in out and "batch 8, 16 pixels" in out and " times as fast" in out

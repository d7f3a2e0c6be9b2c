"""Every lesson once, on next to nothing: it runs and writes its table and its figure."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--limit", "80", "--image-size", "16", "--epochs", "1"]


def lesson(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "lessons" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, rows, own", [
    ("head", 3, ["--batch-size", "16"]),
    ("augmentations", 4, ["--batch-size", "16"]),
    ("temperature", 3, ["--taus", "0.2", "1", "--batch-sizes", "32"]),
])
def test_lesson(tmp_path, name, rows, own):
    lesson(name).main([*TINY, *own, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
    assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == 1 + rows
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_finetune(tmp_path):
    import simclr

    simclr.main([*TINY, "--eval-every", "0", "--out", str(tmp_path / "run")])
    rows = lesson("finetune").main([
        str(tmp_path / "run" / "backbone.pt"), "--limit", "80", "--epochs", "1", "--min-steps", "2",
        "--lrs", "0.1", "--seeds", "1", "--out", str(tmp_path)])
    assert len(rows) == 9 and {row["start"] for row in rows} >= {"fine-tuned", "frozen"}
    assert len((tmp_path / "finetune.csv").read_text().splitlines()) == 10
    assert (tmp_path / "finetune.png").stat().st_size > 5000

"""Is a method as fast in one checkout of this project as in another? The same run in turns.

    python benchmarks/compare.py . ../before simclr --limit 1000 --epochs 2 --eval-every 0

Runs METHOD.py with these options in both checkouts, --rounds times, and prints images/s of the
training (as in results.json) and, for each round, the ratio of the first checkout to the second: a
machine that gets slower or faster meanwhile does so for both. Every other round begins with the
second.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def speed(checkout, method, options):
    """images/s of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{method}.py", *options, "--out", f"{folder}/run"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {method}.py failed in {checkout}: {done.stderr.strip()}")
        return json.loads(Path(folder, "run", "results.json").read_text())["images_per_second"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("first", help="folder of a checkout")
    p.add_argument("second", help="folder of the other one")
    p.add_argument("method", help="simclr, dino, ...; other options go to METHOD.py")
    p.add_argument("--rounds", type=int, default=3, help="runs in each checkout (3)")
    own, options = p.parse_known_args(argv)
    ratios = []
    for number in range(own.rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        rates = {i: speed((own.first, own.second)[i], own.method, options) for i in order}
        ratios.append(rates[0] / rates[1])
        print(f"{own.method}: {rates[0]:.1f} images/s in {own.first}, "
              f"{rates[1]:.1f} in {own.second}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"{own.method}: ratio {min(ratios):.3f} to {max(ratios):.3f}, median "
          f"{statistics.median(ratios):.3f} of {own.rounds} rounds")
    return ratios


if __name__ == "__main__":
    main()

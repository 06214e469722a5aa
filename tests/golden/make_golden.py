#!/usr/bin/env python3
"""Makes everything under tests/golden that is not written by hand.

    python make_golden.py                 models, adapters and expectations
    python make_golden.py --only expected only what is computed from the committed models, adapters and data
    python make_golden.py --check         recompute the expectations elsewhere and compare with the committed files
"""
import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import load_file

from maker import adapters, data, expected, models, renders, trl_check

HERE = Path(__file__).resolve().parent
TOLERANCE = 2e-5  # of a recomputed number: another processor sums in another order


def make_models(root, names):
    for name in names:
        models.build(root / "models", name)
        adapters.build(root / "models", name)


def make_expected(root, names):
    files = data.read_all(root / "data")
    for name in names:
        facts = expected.write(root, name, files)
        renders.write(root, name, files["turns"])
        worst = trl_check.check(root / "models" / name, files)
        print(name, "losses", {k: round(v["loss"], 4) for k, v in facts.items()}, "z0", facts["kto"]["z0"])
        print(name, "TRL agrees; gradient difference", {k: f"{v:.1e}" for k, v in worst.items()}, flush=True)


def check(names):
    """Recomputes into a copy and compares: JSON by value, tensors by their norm."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "golden"
        shutil.copytree(HERE, root)
        shutil.rmtree(root / "expected")
        make_expected(root, names)
        files = sorted(p.relative_to(root) for n in names for p in (root / "expected" / n).iterdir())
        bad = [str(f) for f in files if not same(HERE / f, root / f)]
    print(f"differ: {bad}" if bad else f"{len(files)} files agree with the committed ones")
    return bool(bad)


def same(a, b):
    if a.suffix == ".json":
        return close(json.loads(a.read_text("utf-8")), json.loads(b.read_text("utf-8")))
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).norm() <= TOLERANCE * a[k].norm() for k in a)


def close(a, b):
    if isinstance(a, float):
        return abs(a - b) <= TOLERANCE * max(1, abs(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b


def be_quiet():
    """No progress bars, and none of the deprecation warnings which the libraries give each other."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["models", "expected"])
    parser.add_argument("--models", nargs="*", default=list(models.SPECS), metavar="NAME")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    be_quiet()
    if options.check:
        sys.exit(check(options.models))
    if options.only != "expected":
        make_models(HERE, options.models)
    if options.only != "models":
        make_expected(HERE, options.models)

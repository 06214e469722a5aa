#!/usr/bin/env python3
"""Makes plugins/*/golden.json: what TRL and the authors of the papers compute for the objectives of a plugin.

    python make_objectives.py PEERS           write them
    python make_objectives.py PEERS --check   compute them again and compare with the committed files

Every plugin with a golden.py gets one: `expectations(others)` there yields the `maker.expect.Expectation`s, and a dict STEPS, if
it has one, adds steps of its own to those of maker/steps.py. PEERS is a folder with what requirements.txt cannot
hold beside TRL 1.16; see README.md, "Objectives"."""
import argparse
import importlib.util
import json
import sys
from pathlib import Path

from make_golden import be_quiet, close
from maker import steps

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


def load(path):
    spec = importlib.util.spec_from_file_location(f"golden of {path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(module, others):
    described, used, out = {**steps.describe(), **getattr(module, "STEPS", {})}, {}, []
    for expected in module.expectations(others):
        used |= {name: described[name] for name in [*expected.before, expected.step]}
        prompts = steps.load(described[expected.step])
        loss = expected.loss(prompts)
        loss.backward()
        dlogp = [[g for g in r.logps.grad.tolist()] if r.logps.grad is not None else [0.0] * r.n
                 for r in steps.flat(prompts)]
        out.append({"objective": expected.objective, "params": expected.params, "before": expected.before,
                    "step": expected.step, "source": expected.source,
                    "loss": loss.item(), "dlogp": [g for gradients in dlogp for g in gradients]})
    return {"steps": used, "expected": out}


def text(made):
    """One step and one expectation a line."""
    described = [f"  {json.dumps(name)}: {json.dumps(step)}" for name, step in made["steps"].items()]
    expected = [f"  {json.dumps(e)}" for e in made["expected"]]
    return '{"steps": {\n' + ",\n".join(described) + '\n}, "expected": [\n' + ",\n".join(expected) + "\n]}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path, metavar="PEERS")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    be_quiet()
    sys.dont_write_bytecode = True
    all_same = True
    for source in sorted(PLUGINS.glob("*/golden.py")):
        path, made = source.with_suffix(".json"), make(load(source), options.peers)
        if options.check:
            same = close(json.loads(path.read_text("utf-8")), json.loads(json.dumps(made)))
            all_same &= same
            print(f"{source.parent.name}: {'agrees' if same else 'differs'}")
        else:
            path.write_text(text(made), "utf-8")
            print(f"{source.parent.name}: {len(made['expected'])} expectations")
    sys.exit(not all_same)

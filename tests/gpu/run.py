#!/usr/bin/env python3
"""Everything that uft needs a GPU for, in one call of less than ten minutes: tests, times, whole steps, and a table of them.

    python3 run.py [--out DIR] [--parts NAME,…] [--budget SECONDS] [--device cuda|emulated] [--only TEXT]

Runs in a folder that pack.py made, on a machine without Rust and without a network. What is needed: Python 3.11, an NVIDIA
driver and NVRTC; for comparisons PyTorch, transformers and PEFT; compute-sanitizer. What is missing is said in the table.
Parts run in the order of their worth, each within its share of the budget and what the ones before have left.
`DIR/results.json` and `DIR/table.md` are rewritten after every record, so a run that is cut off leaves what it has.

Exits with 0 if all that ran was right, 1 if a test or check failed, 2 for wrong arguments."""
import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import parts
import report

HERE = Path(__file__).resolve().parent
STATE = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit,memory.total,memory.used"


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [name for name, *_ in parts.PARTS]
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results.json, table.md and run.log")
    parser.add_argument("--parts", default=",".join(names), help=f"some of {', '.join(names)}; in the order of their worth")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for all parts (560)")
    parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda", help="emulated: small sizes, no times")
    parser.add_argument("--only", default="", help="tests and kernels whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each measurement of a kernel (0.25)")
    parser.add_argument("--work", type=Path, help="folder for the model of the whole steps, 15 GB (a temporary one)")
    parser.add_argument("--binaries", type=Path, default=HERE / "bin", help="folder of the programs (bin beside this file)")
    parser.add_argument("--list", action="store_true", help="say what the parts are, and end")
    options = parser.parse_args(argv)
    options.parts = [part for part in options.parts.split(",") if part]
    unknown = [part for part in options.parts if part not in names]
    if unknown:
        parser.error(f"--parts: there is no {', '.join(unknown)}, but {', '.join(names)}")
    if not options.parts:
        parser.error("--parts: none are named")
    if options.budget <= 0:
        parser.error("--budget: it must be more than 0")
    return options


def shares(chosen, budget):
    """Seconds of each chosen part: what its share is among those chosen."""
    table = {name: share for name, _, share, _ in parts.PARTS if name in chosen}
    return {name: budget * share / sum(table.values()) for name, share in table.items()}


def asked(command):
    """A command's output in one line, or what is wrong with it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    text = " ".join((done.stdout if done.returncode == 0 else done.stderr).split())
    return text if done.returncode == 0 else f"not known: {text[-200:]}"


def gpu_state():
    """What nvidia-smi says of the first GPU now."""
    if not shutil.which("nvidia-smi"):
        return None
    values = asked(["nvidia-smi", "-i", "0", f"--query-gpu={STATE}", "--format=csv,noheader"])
    cells = [cell.strip() for cell in values.split(",")]
    names = STATE.split(",")
    return dict(zip(names, cells)) if len(cells) == len(names) else {"nvidia-smi": values}


def versions():
    ask = ("import importlib.metadata as m\n"
           "for n in ('torch', 'transformers', 'peft', 'triton', 'flash-attn', 'nvidia-cuda-nvrtc'):\n"
           "    try: print(n, m.version(n), end='; ')\n"
           "    except m.PackageNotFoundError: print(n, 'none', end='; ')")
    return asked([sys.executable, "-c", ask]).rstrip("; ")


class Run:
    """The results, on the disk at every moment."""

    def __init__(self, options):
        self.options, self.start = options, time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (options.out / "run.log").open("w")
        manifest = HERE / "manifest.json"
        packed = json.loads(manifest.read_text()) if manifest.exists() else {}
        self.results = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": packed.get("commit", "not packed"), "device": options.device, "budget": options.budget,
            "machine": platform.platform(), "versions": versions(), "gpu": gpu_state(),
            "uft": asked([str(options.binaries / "uft"), "device"]), "parts": [], "log": [],
        }

    def log(self, text):
        line = f"[{time.monotonic() - self.start:7.1f}] {text}"
        self.log_file.write(line + "\n")
        self.log_file.flush()
        self.results["log"].append(line.partition("\n")[0][:300])

    def save(self):
        for name, text in [("results.json", json.dumps(self.results, indent=1)), ("table.md", report.table(self.results))]:
            unfinished = self.options.out / f"{name}.part"
            unfinished.write_text(text)
            unfinished.replace(self.options.out / name)

    def part(self, name, does, seconds, measure):
        part = {"name": name, "does": does, "state": "cut off", "seconds": 0.0, "before": gpu_state(), "records": []}
        self.results["parts"].append(part)
        self.save()
        start = time.monotonic()
        self.log(f"== {name}: {does}, {seconds:.0f} s")
        context = parts.Context(self.options, start + seconds)
        context.capability = self.results.get("capability")
        try:
            for record in measure(context):
                part["records"].append(record)
                part["seconds"] = round(time.monotonic() - start, 1)
                self.save()
            part["state"] = "done"
        except parts.Missing as missing:
            part["state"], part["why"] = "missing", str(missing)
        except Exception as error:  # the parts after it go on
            self.log(f"{type(error).__name__}: {error}")
            part["state"], part["why"] = "failed", f"{type(error).__name__}: {error}"
        part["seconds"], part["after"] = round(time.monotonic() - start, 1), gpu_state()
        self.save()


def main(argv):
    options = arguments(argv)
    if options.list:
        for name, does, share, _ in parts.PARTS:
            print(f"{name:10} {does}, {share:.0%} of the time")
        return 0
    options.environment = dict(os.environ)
    if options.device == "emulated":
        # So that nothing here depends on what lies in a home directory.
        options.environment.setdefault("UFT_CACHE_DIR", str(options.out.resolve() / "cache"))
    run = Run(options)
    options.log = run.log
    run.results["capability"] = capability(run.results["uft"])
    planned, spare = shares(options.parts, options.budget), 0.0
    for name, does, _, measure in parts.PARTS:
        if name not in planned:
            run.results["parts"].append({"name": name, "does": does, "state": "not asked for", "seconds": 0.0, "records": []})
            continue
        # What a part does not need, the next one has.
        start, seconds = time.monotonic(), planned[name] + spare
        run.part(name, does, seconds, measure)
        spare = max(0.0, seconds - (time.monotonic() - start))
    run.save()
    print(report.table(run.results))
    return 1 if report.failures(run.results) else 0


def capability(text):
    """Of the first GPU, from `uft device`."""
    return text.partition("compute capability ")[2].split(",")[0].split(" ")[0] or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""Builds uft for a machine with a GPU that has neither Rust nor a network, and gathers what run.py needs in a folder.

    python3 pack.py OUT [--artifacts FILE] [--list]

OUT gets bin/ (the command line, its plugins, the kernels' tests and gpu-kernels, in release), the scripts of this folder and
manifest.json: the commit, every file's size and hash, and the oldest glibc that the programs run with. `--artifacts` names
a JSON file {"uft": PATH, "kernels-tests": PATH, "gpu-kernels": PATH, "plugins": [PATH, …]} and nothing is built. `--list` says
what would be built and packed, and ends."""
import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# All of this folder but this one and what predicts, which needs no GPU.
SCRIPTS = ["run.py", "parts.py", "whole_steps.py", "step_peer.py", "peers.py", "model.py", "report.py"]
PROGRAMS = ["uft", "kernels-tests", "gpu-kernels"]
# The command line with its plugins, what times kernels, and the kernels' tests.
BUILDS = [
    ["cargo", "build", "--release", "--locked", "--message-format=json"],
    ["cargo", "build", "--release", "--locked", "--message-format=json", "-p", "uft-tests", "--bin", "gpu-kernels"],
    ["cargo", "test", "--release", "--locked", "--message-format=json", "-p", "uft-kernels", "--lib", "--no-run"],
]
LARGEST = 64 << 20


def built(messages):
    """Programs and plugins among the messages of cargo, by the names that they are packed under."""
    found = {"plugins": []}
    for line in messages:
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("reason") != "compiler-artifact":
            continue
        target, executable = message["target"], message.get("executable")
        if message["profile"]["test"] and target["name"] == "uft_kernels" and executable:
            found["kernels-tests"] = executable
        elif target["kind"] == ["bin"] and target["name"] in PROGRAMS and executable:
            found[target["name"]] = executable
        elif "cdylib" in target["kind"]:
            found["plugins"] += [name for name in message["filenames"] if name.endswith(".so")]
    return found


def build():
    found = {"plugins": []}
    for command in BUILDS:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ, CARGO_INCREMENTAL="0"))
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)} failed")
        found = {**found, **{name: value for name, value in built(done.stdout.splitlines()).items() if value}}
    return found


def checked(artifacts):
    """What is to be packed, or a sentence on what is not there."""
    missing = [name for name in PROGRAMS if name not in artifacts]
    missing += [str(path) for path in [*artifacts.get("plugins", []), *(artifacts.get(name) for name in PROGRAMS)]
                if path and not Path(path).is_file()]
    if not artifacts.get("plugins"):
        missing.append("plugins")
    if missing:
        sys.exit(f"not built: {', '.join(missing)}")
    return artifacts


def glibc(path):
    """The newest version of glibc that a program asks for: (2, 34)."""
    asked = re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())
    return max((tuple(map(int, version)) for version in asked), default=(0, 0))


def commit():
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def gather(artifacts, out):
    if out.exists() and any(out.iterdir()):
        if not (out / "manifest.json").exists():
            sys.exit(f"{out} is not empty and was not packed by this program")
        shutil.rmtree(out)
    binaries = out / "bin"
    binaries.mkdir(parents=True)
    for name in PROGRAMS:
        shutil.copy2(artifacts[name], binaries / name)
    for plugin in artifacts["plugins"]:
        shutil.copy2(plugin, binaries / Path(plugin).name)
    programs = [path for path in binaries.iterdir() if path.read_bytes().startswith(b"\x7fELF")]
    if programs and shutil.which("strip"):
        # Line tables; names of functions stay, for what a panic says.
        subprocess.run(["strip", "--strip-debug", *programs], check=True)
    for script in SCRIPTS:
        shutil.copy2(HERE / script, out / script)
    needed = max(glibc(path) for path in binaries.iterdir())
    files = {str(path.relative_to(out)): {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in sorted(out.rglob("*")) if path.is_file()}
    manifest = {"commit": commit(), "glibc": list(needed), "files": files}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to be made")
    parser.add_argument("--artifacts", type=Path, help="JSON of what is built already")
    parser.add_argument("--list", action="store_true", help="say what would be built and packed, and end")
    options = parser.parse_args()
    if options.list:
        print(*(shlex.join(command) for command in BUILDS), sep="\n")
        print(*(f"bin/{name}" for name in PROGRAMS), "bin/lib*.so", *SCRIPTS, "manifest.json", sep="\n")
        return
    manifest = gather(checked(json.loads(options.artifacts.read_text()) if options.artifacts else build()), options.out)
    size = sum(file["bytes"] for file in manifest["files"].values())
    version = ".".join(map(str, manifest["glibc"]))
    print(f"{options.out}: {len(manifest['files'])} files, {size / (1 << 20):.1f} MiB, needs glibc {version} or newer")
    if size > LARGEST:
        print(f"more than {LARGEST >> 20} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()

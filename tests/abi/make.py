#!/usr/bin/env python3
"""Builds tests/plugins/archived against the uft-core of a commit, small, and keeps it in this folder.

    python tests/abi/make.py COMMIT [--rustc 1.95.0]     from the repository's root, on x86-64 Linux with glibc

COMMIT.so.gz is the library, its line in archive.toml says what it was made of. The source is the working tree's,
which must be as committed; crates are those of the commit's Cargo.lock. Needs rustup with that toolchain, and blake3 (pip)."""
import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from blake3 import blake3

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE = "tests/plugins/archived"
PROFILE = '\n[profile.release]\nopt-level = "z"\nlto = true\ncodegen-units = 1\nstrip = true\n'
MANIFEST = HERE / "archive.toml"
HEAD = """\
# Builds of tests/plugins/archived against earlier cores, oldest first, made by make.py: what it was linked with, and in
# `declarations` the hash of the table of docs/abi.md at that commit, empty before there was one. `blake3` is of
# the library, unpacked.
"""


def run(*command, **more):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **more).stdout


def declarations(page):
    """The table of docs/abi.md, hashed as tests/tests/archive.rs does."""
    table = re.search(r"^\| declaration \| fingerprint \|\n(\|.*\n)+", page, re.M)
    return blake3(table[0].encode()).hexdigest()[:16] if table else ""


def workspace(manifest):
    """The commit's workspace with nothing in it but the core and the plugin."""
    kept = re.sub(r"^(default-)?members = .*\n", "", manifest, flags=re.M)
    kept = re.sub(r"\n\[profile[^\n]*\]\n[^[]*", "\n", kept)
    return kept.replace("[workspace]\n", '[workspace]\nmembers = ["core", "archived"]\n', 1) + PROFILE


def build(commit, toolchain, work):
    subprocess.run(f"git archive {commit} core Cargo.toml Cargo.lock | tar x -C {work}", shell=True, check=True, cwd=ROOT)
    subprocess.run(f"git archive --prefix=archived/ HEAD:{SOURCE} | tar x -C {work}", shell=True, check=True, cwd=ROOT)
    manifest = work / "Cargo.toml"
    manifest.write_text(workspace(manifest.read_text()))
    # No path of the machine that it was built on.
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    to = {**{str(path): "/crates" for path in home.glob("registry/src/*")}, str(home): "/cargo", str(work): "/uft"}
    flags = "\x1f".join(f"--remap-path-prefix={path}={name}" for path, name in sorted(to.items(), key=lambda x: len(x[0])))
    env = {**os.environ, "CARGO_ENCODED_RUSTFLAGS": flags, "CARGO_TARGET_DIR": str(work / "target")}
    subprocess.run(["cargo", f"+{toolchain}", "build", "--release", "-p", "archived"], check=True, cwd=work, env=env)
    library = (work / "target/release/libarchived.so").read_bytes()
    for path in to:
        if path.encode() in library:
            sys.exit(f"{path} is in the library")
    return library


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("commit")
    options.add_argument("--rustc", default="1.95.0")
    a = options.parse_args()
    if run("git", "status", "--porcelain", SOURCE, cwd=ROOT):
        sys.exit(f"{SOURCE} is not as committed")
    commit = run("git", "rev-parse", a.commit + "^{commit}", cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as work:
        library = build(commit, a.rustc, Path(work))
    def at(path):
        shown = subprocess.run(["git", "show", f"{commit}:{path}"], capture_output=True, text=True, cwd=ROOT)
        return shown.stdout if shown.returncode == 0 else ""
    name = f"{commit[:7]}.so.gz"
    (HERE / name).write_bytes(gzip.compress(library, 9, mtime=0))
    entry = dict(
        file=name,
        revision=int(re.search(r"ABI_REVISION: u32 = (\d+)", at("core/src/abi.rs"))[1]),
        core=re.search(r'^version = "(.*)"', at("Cargo.toml"), re.M)[1],
        commit=commit,
        committed=run("git", "log", "-1", "--format=%cI", commit, cwd=ROOT, text=True).strip(),
        rustc=run("rustc", f"+{a.rustc}", "--version", text=True).split()[1],
        declarations=declarations(at("docs/abi.md")),
        blake3=blake3(library).hexdigest())
    kept = tomllib.loads(MANIFEST.read_text())["library"] if MANIFEST.exists() else []
    kept = sorted([old for old in kept if old["file"] != name] + [entry], key=lambda entry: entry["committed"])
    tables = ["\n[[library]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items()) for entry in kept]
    MANIFEST.write_text(HEAD + "".join(tables))
    print(f"{name}: {len(library)} bytes, {(HERE / name).stat().st_size} packed")


if __name__ == "__main__":
    main()

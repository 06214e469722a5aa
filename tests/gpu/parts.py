"""What a run on a GPU consists of: the parts in the order of their worth, and how each is done.

A part gets a `Context` and yields records, dictionaries that report.py understands, as soon as it has them. It raises
`Missing` with a sentence where something that it needs is not there, and ends early when `context.left()` says so."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import whole_steps

HERE = Path(__file__).resolve().parent
# Of compute-sanitizer; racecheck first, because nothing else here sees a race on the hardware.
TOOLS = ["racecheck", "memcheck", "synccheck", "initcheck"]
# Tests that are small enough to be executed a hundred times slower, a few of every kernel.
SANITIZED = ["cuda::hardware::", "hopper::hardware::", "order::hardware::", "matmul::cuda::tests::nt_agrees", "matmul::cuda::tests::nn_agrees",
             "matmul::cuda::tests::few_", "matmul::cuda::hopper::tests::the_portable_products_agree",
             "matmul::cuda::fused::tests::a_rotated", "matmul::cuda::fused::tests::an_activat", "adapter::tests::gradients_agree",
             "attention::cuda::tests::agrees_with_f64_over_many_tiles", "attention::cuda::tests::every_order",
             "attention::cuda::hopper::tests::every_order", "logprob::cuda::tests::company", "rmsnorm::cuda::tests::forward",
             "rmsnorm::cuda::tests::backward", "rope::cuda::", "swiglu::cuda::", "embedding::cuda::", "elementwise::cuda::", "adamw::cuda::"]
# Seconds that a group of tests, a test by itself and a case of gpu-kernels may take: a kernel may never end.
GROUP, ALONE, CASE = 40.0, 12.0, 25.0
# Seconds until a process that has been ended must be gone.
STUCK = 20.0
# Peers that need no compilation, and the head's, which counts.
AT_ONCE = ["mm", "mm_added", "copy", "sdpa", "gradient_of_b", "decode", "log_probs"]
RESULT = re.compile(r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED|ignored)", re.M)


class Missing(Exception):
    """What a part needs and does not have."""


def end(process):
    """Ends a process and those that it started, which compute-sanitizer's target is one of."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


class Context:
    """What a part works with: options, the time that it has, and running programs within that."""

    def __init__(self, options, deadline):
        self.options, self.deadline = options, deadline
        self.emulated = options.device == "emulated"
        self.binaries = options.binaries
        self.environment = dict(options.environment, UFT_TEST_DEVICE=options.device)
        self.capability = None

    def left(self):
        """Seconds until the part's time is over."""
        return self.deadline - time.monotonic()

    def binary(self, name):
        path = self.binaries / name
        if not path.exists():
            raise Missing(f"{path} is not there: pack.py builds it")
        return str(path)

    def run(self, command, most=float("inf")):
        """Output, error output and exit status; -9 and what there was if the time, or `most` seconds, were over."""
        self.options.log(" ".join(map(str, command)))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                                   env=self.environment, process_group=0)
        try:
            out, err = process.communicate(timeout=max(min(self.left(), most), 1.0))
            status = process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            status = -9
            try:
                out, err = process.communicate(timeout=STUCK)
            except subprocess.TimeoutExpired:
                out, err = "", "the driver does not let go of its process"
        if status != 0:
            self.options.log(f"exit status {status}\n{err[-4000:]}")
        return out, err, status

    def lines(self, command, stdin="", most=float("inf")):
        """JSON objects that a command prints, one a line, as they come; the last one may be {"error": …}. The command ends when it
        has printed none for `most` seconds."""
        self.options.log(" ".join(map(str, command)))
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+", errors="replace") as said:
            given.write(stdin)
            given.seek(0)
            process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=said, text=True, errors="replace",
                                       env=self.environment, process_group=0)
            def clock():
                timer = threading.Timer(max(min(self.left(), most), 1.0), end, [process])
                timer.start()
                return timer
            timer = clock()
            try:
                for line in process.stdout:
                    timer.cancel()
                    timer = clock()
                    # Not what else is printed, nor half a line of a program that was ended.
                    if line.startswith("{") and line.endswith("}\n"):
                        yield json.loads(line)
                status = process.wait()
            finally:
                timer.cancel()
                end(process)
            said.seek(0)
            err = said.read()
        if status != 0:
            self.options.log(f"exit status {status}\n{err[-4000:]}")
            last = (err.strip().splitlines() or [f"exit status {status}"])[-1]
            yield {"error": "its time was over" if self.left() <= 0 else last, "command": Path(command[0]).name}


# ---- tests ----


def all_tests(context):
    out, err, status = context.run([context.binary("kernels-tests"), "--list"])
    names = [line.removesuffix(": test") for line in out.splitlines() if line.endswith(": test")]
    if status != 0 or not names:
        raise Missing(f"the kernels' tests cannot be listed: {(err.strip().splitlines() or ['no output'])[-1]}")
    return names


def assumption(name):
    """Whether a test is of what the emulation assumes of the hardware."""
    return name.startswith(("cuda::hardware::", "cuda::tests::hopper::hardware::", "cuda::tests::hopper::order::hardware::"))


def why_not(name, context):
    """Why a test is not for this device, or None. Faults and the emulation's own tests need no GPU."""
    if "::cuda::" not in name and not name.startswith("cuda::full_size") and not assumption(name):
        return "of the processor or of the emulation"
    if "fault" in name:
        return "plants a fault, which is done in the emulation"
    if ("hopper" in name or "::fused::" in name) and not context.emulated and context.capability != "9.0":
        return f"for compute capability 9.0, this is {context.capability}"
    return None


def run_tests(context, names, full=False, most=GROUP):
    """A record for every test, in processes of one group of modules each, with so many seconds."""
    groups = {}
    for name in names:
        why = why_not(name, context)
        if why:
            yield {"test": name, "state": "left out", "why": why}
        else:
            groups.setdefault(name.rsplit("::", 1)[0], []).append(name)
    for group in sorted(groups, key=lambda g: ("full_size" in g, g)):
        wanted = groups[group]
        if context.left() <= 0:
            yield from ({"test": name, "state": "not finished", "why": "its time was over"} for name in wanted)
            continue
        start = time.monotonic()
        # Others are to have some of the time whatever these do.
        found = tested(context, wanted, full, min(most, max(context.left() / 3, ALONE)))
        # A kernel that fails or never ends takes others of its process with it. Numbers that are wrong are wrong alone, too.
        again = [name for name in wanted if found[name]["state"] == "not finished" or "CUDA" in found[name].get("why", "")]
        until = time.monotonic() + GROUP / 2
        for name in again if len(wanted) > 1 else []:
            if context.left() > 0 and time.monotonic() < until:
                found[name] = tested(context, [name], full, ALONE)[name]
        yield from found.values()
        yield {"group": group, "tests": len(wanted), "seconds": round(time.monotonic() - start, 2)}


def tested(context, wanted, full, most):
    """A record of each of some tests, by name, from one process with so many seconds."""
    command = [context.binary("kernels-tests"), "--exact", *wanted] + (["--include-ignored"] if full else [])
    start = time.monotonic()
    out, err, status = context.run(command, most)
    found, records = dict(RESULT.findall(out)), {}
    for name in wanted:
        state = {"ok": "ok", "FAILED": "failed", "ignored": "left out"}.get(found.get(name), "not finished")
        record = records[name] = {"test": name, "state": state}
        if state == "left out":
            record["why"] = "needs a GPU"
        elif state == "failed":
            record["why"] = message(out, name)
        elif state == "not finished" and status == -9 and context.left() > 0:
            record["why"] = f"it did not end in {time.monotonic() - start:.0f} s"
        elif state == "not finished":
            record["why"] = "its time was over" if status == -9 else f"its process ended with status {status}: {err.strip()[-300:]}"
    return records


def message(out, name):
    """What a failed test said, in one line."""
    _, found, rest = out.partition(f"---- {name} stdout ----")
    if not found:
        return "no message"
    lines = rest.partition("\n---- ")[0].partition("\nfailures:")[0].strip().splitlines()
    return " ".join(line.strip() for line in lines if "RUST_BACKTRACE" not in line)[:600]


def hardware(context):
    yield from run_tests(context, [name for name in all_tests(context) if assumption(name)], most=ALONE)


def tests(context):
    names = [name for name in all_tests(context) if not assumption(name) and context.options.only in name]
    yield from run_tests(context, names, full=not context.emulated)


def sanitizer(context):
    tool = shutil.which("compute-sanitizer", path=context.environment.get("PATH")) or "/usr/local/cuda/bin/compute-sanitizer"
    if context.emulated:
        raise Missing("the emulated device has checks of its own")
    if not Path(tool).exists():
        raise Missing("compute-sanitizer is not installed")
    names = [name for name in all_tests(context) if any(part in name for part in SANITIZED) and not why_not(name, context)]
    for i, which in enumerate(TOOLS):
        if context.left() < 5:
            yield {"tool": which, "state": "not finished", "why": "its time was over"}
            continue
        command = [tool, "--tool", which, "--error-exitcode", "77", "--print-limit", "20", context.binary("kernels-tests"),
                   "--exact", "--test-threads", "1", *names]
        start = time.monotonic()
        # Memory that a test has filled with NaN counts as initialised.
        context.environment["UFT_TEST_POISON"] = "0" if which == "initcheck" else "1"
        out, err, status = context.run(command, context.left() / (len(TOOLS) - i))
        yield sanitized(which, out + err, status, names, round(time.monotonic() - start, 2))


def sanitized(tool, text, status, names, seconds):
    """A record of what compute-sanitizer said."""
    summary = re.findall(r"========= (?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    done = len(RESULT.findall(text))
    record = {"tool": tool, "tests": len(names), "finished": done, "seconds": seconds}
    if status == -9:
        return dict(record, state="not finished", why="its time was over")
    if not summary:
        return dict(record, state="failed", why=(text.strip().splitlines() or ["no output"])[-1][:300])
    clean = status == 0 and all(re.match(r"0 (errors|hazards)", line) for line in summary)
    first = next((line for line in text.splitlines() if line.startswith("========= ") and "SANITIZER" not in line), "")
    return dict(record, state="ok" if clean else "failed", summary=summary[-1], **({} if clean else {"why": first[10:300]}))


# ---- times ----


def kernels(context):
    """Every kernel, then what it is compared with."""
    # The emulated device that takes all kernels that a GPU with Hopper does.
    device = "emulated-hopper" if context.emulated else context.options.device
    command = [context.binary("gpu-kernels"), "--device", device, "--only", context.options.only]
    command += ["--seconds", str(context.options.seconds)]
    whole, cases = context.deadline, []
    # Peers take about as long.
    context.deadline = time.monotonic() + 0.55 * context.left()
    for record in cases_of(context, command):
        cases.append(record)
        yield record
    context.deadline = whole
    # What PyTorch has to compile takes it longest.
    wanted = sorted((case for case in cases if case.get("peer")), key=lambda case: case["peer"]["op"] not in AT_ONCE)
    if not whole_steps.installed("torch"):
        yield {"missing": "peers", "why": "PyTorch is not installed, so no kernel has a peer and no product measures the ceiling"}
        return
    device = "cpu" if context.emulated else "cuda"
    command = [sys.executable, str(HERE / "peers.py"), "--device", device, "--seconds", str(context.options.seconds)]
    yield from context.lines(command, stdin="".join(json.dumps(case) + "\n" for case in wanted))


def cases_of(context, command):
    """Records of all cases of gpu-kernels. After one that fails or never ends, those that are left have a process of their own: what
    a kernel did wrong stays with its process."""
    met = set()
    while True:
        begun = None
        # Closed at the end of a turn, which ends the process.
        lines = context.lines(command + [word for name in sorted(met) for word in ("--without", name)], most=CASE)
        for record in lines:
            if "begins" in record:
                begun = record["begins"]
                met.add(begun)
                continue
            if record.get("case") == begun:
                begun = None
            elif begun and "case" not in record:
                why = record["error"] if context.left() <= 0 else f"it ended its process, or did not end in {CASE:.0f} s: {record['error']}"
                record = {"case": begun, "flops": 0, "bytes": 0, "peer": None, "error": why}
            yield record
            # A section that cannot be set up has no case that began.
            if record.get("error") and record.get("case", begun) in met:
                break
        else:
            return
        lines.close()
        if context.left() <= 0 or context.emulated:
            return


def steps(context):
    yield from whole_steps.measure(context, Missing)


# Name, what it does, share of the time, function; in the order of their worth.
PARTS = [
    ("hardware", "what the emulation assumes of the hardware", 0.08, hardware),
    ("tests", "all tests of kernels, at full size", 0.22, tests),
    ("kernels", "every kernel's time, the ceilings and peers", 0.25, kernels),
    ("steps", "whole training steps at Mistral-7B's shape beside PEFT", 0.35, steps),
    ("sanitizer", "compute-sanitizer on small tests", 0.10, sanitizer),
]

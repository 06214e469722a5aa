#!/usr/bin/env python3
"""A run's results as a table for docs/benchmarks.md.

    python3 report.py results.json

Nothing is left out silently: a part that was not asked for, could not be done or was cut off is a line that says so, and
so is every test that was left out, by reason. Times without a GPU are none."""
import json
import sys
from collections import Counter
from pathlib import Path

# The targets: cases whose name begins so, what is compared, and how much it should be. For an H100.
TARGETS = [
    ("nt ", "peer", 0.98), ("nn ", "peer", 0.98),
    ("attention forward", "TFLOP/s", 560), ("attention backward", "TFLOP/s", 450),
    # 700 forward and 650 back, in one time.
    ("log-probs with gradient", "TFLOP/s", 674), ("log-probs", "TFLOP/s", 700),
    ("copy", None, None), ("attention decode", None, None), ("u = ", None, None),
    ("", "copy", 0.92),
]
STEPS_TARGET = 18_000
# The lines of docs/kernels.md's table of Hopper's kernels, and the case that each is measured in.
ON_HOPPER = [
    ("`hopper_nt_rope`: q, and u of q, k and v", "nt with rotation, q"), ("`hopper_nt_rope`: k", "nt with rotation, k"),
    ("`hopper_nt`: v", "nt k, v"), ("`hopper_nt`: o, its u, and the residual", "nt with residual, o"),
    ("`hopper_nt_swiglu`: gate and up, their u, and u of down", "nt with activation, gate and up"),
    ("`hopper_nt`: down, and the residual", "nt with residual, down"),
    ("`hopper_nn_swiglu_backward`: down, its input and dB, and du of gate and up", "nn with activation, down"),
    ("`hopper_nn`: gate and up, their dA and dB, and dA of down", "nn with gradients, gate and up"),
    ("`hopper_nn`: o, du, dA and dB", "nn with gradients, o"),
    ("`hopper_nn`: q, k and v, du, dA and dB", "nn with gradients, q, k and v"),
    ("`hopper_logprob_logits`, 1024 tokens", "log-probs with gradient"),
    ("`hopper_logprob_backward`, 1024 tokens", "log-probs with gradient"),
    ("`hopper_attention_forward`", "attention forward"), ("`hopper_attention_backward`", "attention backward"),
    ("`hopper_attention_backward_finish`", "attention backward"), ("`hopper_attention_backward_keys`", "attention backward"),
    ("`hopper_attention_backward_queries`", "attention backward"),
]


def cell(value):
    return "—" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def rows(head, lines):
    """A Markdown table; the first column to the left."""
    out = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    return out + ["| " + " | ".join(map(cell, line)) + " |" for line in lines]


def number(value, digits=3):
    """Three significant digits, or more where the number has them before the point."""
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def part(results, name):
    return next((p for p in results["parts"] if p["name"] == name), {"records": []})


# ---- what happened ----


def failures(results):
    """Sentences on what is wrong: failed tests, failed checks, parts that ended in an error."""
    found = []
    for p in results["parts"]:
        if p["state"] == "failed":
            found.append(f"{p['name']}: {p['why']}")
        for record in p["records"]:
            what = record.get("test") or record.get("tool") or record.get("case") or record.get("task")
            if record.get("state") in ("failed", "not finished") and not over(record):
                found.append(f"{what}: {record.get('why', record['state'])}")
            elif record.get("error") and not over(record) and not of_peer(record):
                found.append(f"{what or record.get('command', p['name'])}: {record['error']}")
    return found


def of_peer(record):
    """What a peer cannot do is no failure of ours."""
    return record.get("who", "uft") != "uft" or ("peer" in record and "case" not in record)


def over(record):
    return "time was over" in record.get("why", record.get("error", ""))


def state_of(p):
    if p["state"] == "missing":
        return f"not done: {p['why']}"
    if p["state"] == "failed":
        return f"failed: {p['why']}"
    if any(over(record) for record in p["records"]):
        return "its time was over before all was done"
    return {"done": "done", "cut off": "the run was cut off here", "not asked for": "not asked for"}[p["state"]]


def counted(p):
    """What a part's records come to, in a few words."""
    tests = Counter(record["state"] for record in p["records"] if "test" in record)
    if tests:
        return ", ".join(f"{count} {state}" for state, count in sorted(tests.items()))
    cases = [record for record in p["records"] if "case" in record or "task" in record or "tool" in record]
    return f"{len(cases)} lines" if cases else ""


def head(results):
    gpu = results.get("gpu") or {}
    made_up = results.get("made up")
    lines = [f"**{made_up}**", ""] if made_up else []
    where = f"{gpu['name']}, driver {gpu['driver_version']}" if "name" in gpu else gpu.get("nvidia-smi", "no GPU that nvidia-smi knows")
    if results["device"] == "emulated":
        where += "; the emulated device, whose times say nothing"
    lines += [f"{results['date']}, commit {results['commit']}, {where}; {results['versions']}.", "",
              f"`python3 {results['command']}`", "", f"`uft device`: {results['uft']}", ""]
    lines += rows(["part", "what", "outcome", "counts", "s"],
                  [[p["name"], p["does"], state_of(p), counted(p), p["seconds"]] for p in results["parts"]])
    clocks = [[p["name"], when, state.get("clocks.sm"), state.get("clocks.mem"), state.get("temperature.gpu"), state.get("power.draw")]
              for p in results["parts"] for when in ("before", "after") if (state := p.get(when)) and "name" in state]
    if clocks:
        lines += [""] + rows(["part", "", "SM clock", "memory clock", "°C", "power"], clocks)
    return lines


def tested(results):
    lines = []
    wrong = failures(results)
    lines += ["Wrong:", ""] + [f"- {line}" for line in wrong] + [""] if wrong else []
    for name, title in [("hardware", "assumptions"), ("tests", "tests")]:
        records = [record for record in part(results, name)["records"] if "test" in record]
        ran = [record for record in records if record["state"] != "left out"]
        if name == "hardware" and ran:
            lines += rows(["assumption", "holds"], [[r["test"].rsplit("::", 1)[-1].replace("_", " "), r["state"]] for r in ran]) + [""]
        why = Counter((record["state"], record["why"]) for record in records if record["state"] == "left out" or over(record))
        lines += [f"- {title}: {count} {state}: {reason}" for (state, reason), count in sorted(why.items())]
    checks = part(results, "sanitizer")["records"]
    if checks:
        lines += [""] + rows(["compute-sanitizer", "tests", "finished", "outcome", "summary"],
                             [[r["tool"], r.get("tests"), r.get("finished"), r["state"], r.get("summary", r.get("why"))] for r in checks])
    return lines


# ---- times ----


def ceilings(results):
    """Operations a second of the square product through cuBLAS, bytes a second of the copy; None where not measured."""
    records = part(results, "kernels")["records"]
    peers = {json.dumps(r["peer"], sort_keys=True): r for r in records if r.get("by")}
    case = {r["case"]: r for r in records if "case" in r}
    square = next((r for name, r in case.items() if name.startswith("nt ") and name.endswith("³")), None)
    product = square and peers.get(json.dumps(square["peer"], sort_keys=True))
    copies = [r for r in [case.get("copy")] if r]
    copies += [peers[key] for r in copies[:1] if (key := json.dumps(r["peer"], sort_keys=True)) in peers]
    times = [r["ms"] for r in copies if r.get("ms")]
    return (square["flops"] / product["ms"] * 1e3 if product and product.get("ms") else None,
            case["copy"]["bytes"] / min(times) * 1e3 if times else None)


def kernel_lines(results):
    """For each case a dictionary of what the table shows."""
    records = part(results, "kernels")["records"]
    peers = {json.dumps(r["peer"], sort_keys=True): r for r in records if "peer" in r and "case" not in r}
    product, copy = ceilings(results)
    for record in (r for r in records if "case" in r):
        line = {"case": record["case"], "error": record.get("error"), "ms": record.get("ms")}
        peer = peers.get(json.dumps(record.get("peer"), sort_keys=True), {})
        line["by"], line["peer_ms"] = peer.get("by") or peer.get("error"), peer.get("ms")
        if line["ms"]:
            floors = [record["flops"] / product * 1e3 if product else None, record["bytes"] / copy * 1e3 if copy else None]
            line["floor"] = max(floors) if None not in floors else None
            line["bound"] = None if line["floor"] is None else "operations" if floors[0] > floors[1] else "bytes"
            line["tflops"] = record["flops"] / line["ms"] / 1e9 or None
            line["gbs"] = record["bytes"] / line["ms"] / 1e6
            line["of_peer"] = line["peer_ms"] / line["ms"] if line["peer_ms"] else None
            line["of_copy"] = line["gbs"] * 1e9 / copy if copy else None
        line["target"], line["met"] = target(line)
        yield line


def target(line):
    kind, least = next((kind, least) for name, kind, least in TARGETS if line["case"].startswith(name))
    value = {"peer": line.get("of_peer"), "TFLOP/s": line.get("tflops"), "copy": line.get("of_copy"), None: None}[kind]
    text = {"peer": lambda: f"{least:.0%} of cuBLAS", "TFLOP/s": lambda: f"{least} TFLOP/s", "copy": lambda: f"{least:.0%} of a copy",
            None: lambda: None}[kind]()
    return text, None if value is None or least is None else "yes" if value >= least else "no"


def percent(value):
    return None if value is None else f"{value:.0%}"


def kernels(results):
    lines = list(kernel_lines(results))
    if not lines:
        return []
    product, copy = ceilings(results)
    missing = [r["why"] for r in part(results, "kernels")["records"] if r.get("missing")]
    ceiling = (f"Ceilings, measured in this run: {number(product and product / 1e12)} TFLOP/s (8192³ through cuBLAS), "
               f"{number(copy and copy / 1e9)} GB/s (copy, bytes read and written)." if product or copy else "No ceilings were measured.")
    table = [[line["case"], number(line["ms"]), number(line.get("tflops")), number(line.get("gbs")), line.get("bound"),
              percent(line["floor"] / line["ms"]) if line.get("floor") else None, number(line["peer_ms"]),
              percent(line.get("of_peer")), line["by"], line["target"], line["error"] or line["met"]] for line in lines]
    return [ceiling, *missing, "", *rows(["kernel", "ms", "TFLOP/s", "GB/s", "bound by", "of its floor", "peer, ms", "peer's time / ours",
                                         "peer", "target (H100)", "met"], table)]


def on_hopper(results):
    """The measured column of docs/kernels.md: milliseconds of the kernel's launches in the first case that has it; of the head's, which takes
    so many tokens at a time, of one."""
    cases = [r for r in part(results, "kernels")["records"] if r.get("launches")]
    lines = []
    for name, begins in ON_HOPPER:
        for case in (case for case in cases if case["case"].startswith(begins)):
            found = next(((count, ms) for kernel, count, ms in case["launches"] if f"`{kernel}`" in name), None)
            if found:
                count, ms = found
                lines.append([name, number(ms and ms / (count if name.endswith(" tokens") else 1)), case["case"]])
                break
    return rows(["on Hopper", "ms", "case"], lines) if lines else []


def launches(results):
    """Cases of several kernels, each timed for itself."""
    cases = [r for r in part(results, "kernels")["records"] if len(r.get("launches", [])) > 1]
    lines = [[case["case"], kernel, count, number(ms), percent(ms and ms / sum(each for *_, each in case["launches"]))]
             for case in cases for kernel, count, ms in case["launches"]]
    return rows(["case", "kernel", "launches", "ms", "of all"], lines) if lines else []


def steps(results):
    records = [r for r in part(results, "steps")["records"] if "task" in r]
    if not records:
        return []
    best = {}
    for record in records:
        if record["who"] != "uft" and record.get("tokens_per_second"):
            best[record["task"]] = max(best.get(record["task"], 0), record["tokens_per_second"])
    table = []
    for r in records:
        rate = r.get("tokens_per_second")
        ours = r["who"] == "uft" and r.get("recompute", "auto") == "auto"
        met = None if not ours or not rate or not r["task"].startswith("texts") else "yes" if rate >= STEPS_TARGET else "no"
        table.append([r["task"], r["who"], r.get("how"), r.get("steps"), number(r.get("seconds_per_step")), number(rate),
                      f"{rate / best[r['task']]:.2f}" if ours and rate and best.get(r["task"]) else None, number(r.get("memory_gib")),
                      None if r.get("loss") is None else f"{r['loss']:.4f}",
                      f"{STEPS_TARGET:,} tok/s" if ours and r["task"].startswith("texts") else None, r.get("error") or met])
    why = [f"- {r['why']}" for r in part(results, "steps")["records"] if r.get("missing")]
    why = [""] + why if why else []
    return rows(["task", "who", "how", "steps", "s a step", "tok/s", "uft / best peer", "GiB", "first loss", "target (H100)", "met"],
                table) + why


def copies(results):
    """What a step pays for computing layers again, and for having their inputs wait in the machine's memory."""
    runs = {r["recompute"]: r for r in part(results, "steps")["records"] if r.get("recompute") and r["task"].startswith("texts")}
    if "offload" not in runs:
        return []
    seconds = {name: r.get("seconds_per_step") for name, r in runs.items()}
    kept, again, offloaded = (seconds.get(name) for name in ("auto", "all", "offload"))

    def longer(a, b):
        return a - b if a and b else None

    cases = part(results, "kernels")["records"]
    alone = next((r for r in cases if r.get("case") == "copy out and back" and r.get("ms")), None)
    rate = alone and alone["bytes"] / alone["ms"] * 1e3
    copied = 2 * runs["offload"].get("copied_each_way", 0)
    moving, exposed = copied / rate if rate else None, longer(offloaded, again)
    lines = [
        ["layers computed again, against what the plan keeps", longer(again, kept), again],
        [f"copies out and back by themselves, {copied / 1e9:.3g} GB at {number(rate and rate / 1e9)} GB/s", moving, offloaded],
        ["of these, what shows", exposed, offloaded],
    ]
    table = [[what, number(value and value * 1e3), percent(value / whole) if value is not None and whole else None]
             for what, value, whole in lines]
    hidden = percent(max(0.0, 1 - exposed / moving)) if moving and exposed is not None else None
    return rows(["texts, inputs offloaded", "ms of a step", "of the step"], table + [["of these, hidden", None, hidden]])


def log(results):
    lines = [line if len(line) <= 160 else line[:157] + "..." for line in results.get("log", [])]
    return ["```text", *lines, "```"] if lines else []


def table(results):
    sections = [("", head), ("### Tests", tested), ("### Kernels", kernels), ("### Kernels of Hopper", on_hopper),
                ("### Cases of several kernels", launches), ("### Whole steps", steps),
                ("### Copies beside launches", copies), ("### Log", log)]
    out = []
    for title, section in sections:
        lines = section(results)
        if lines:
            out += [title, ""] if title else []
            out += lines + [""]
    return "\n".join(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(json.loads(Path(sys.argv[1]).read_text())))

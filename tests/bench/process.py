"""Running a program and looking at its memory."""
import time
from pathlib import Path


def finish(child, each=None):
    """Waits for a child and gives its peak memory in MB; calls `each` every few milliseconds.

    Read from /proc while it runs: what wait4 says of a child counts the memory of the Python process that forked it."""
    status, peak = Path(f"/proc/{child.pid}/status"), 0
    while child.poll() is None:
        try:
            peak = max(peak, next((int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")), 0))
        except OSError:
            pass
        if each:
            each()
        time.sleep(0.003)
    return peak / 1024

"""What `import parity` adds to a bare interpreter, in turn, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 21


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    codes = {"bare": "pass", "parity": "import parity", "plugin": "import parity.plugin", "pytest": "import pytest"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(RUNS):
        for name, code in codes.items():
            times[name].append(seconds(code))
    bare = statistics.median(times["bare"])
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:<8} median {1e3 * median:6.1f} ms (min {1e3 * min(values):.1f}, max {1e3 * max(values):.1f}), "
            f"{1e3 * (median - bare):+6.1f} ms over bare, ratio {median / bare:.2f}, n = {RUNS}"
        )


if __name__ == "__main__":
    main()

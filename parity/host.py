"""What a machine does while a server works: memory of its processes, and the GPU's own counters through NVML.

NVML is NVIDIA's library behind nvidia-smi, called directly: a call takes microseconds where nvidia-smi takes tens of
milliseconds. Where there is no GPU, or none that the server may see, everything of a GPU is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.fingerprint import Scalar
from parity.guardian import descendants
from parity.timings import HostSample

_SM_CLOCK = 1
_NO_COUNTERS = dict.fromkeys(("gpu_utilisation", "gpu_power_watts", "gpu_sm_clock_mhz", "gpu_throttled"))
# The hardware or its driver slowed the clock down for heat or power delivery. The software power cap (0x4) is not among
# them: a busy data-centre GPU works at it all day.
_THROTTLED = 0x8 | 0x20 | 0x40 | 0x80


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilisation(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class Gpus:
    """The GPUs that a process with this environment may use."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._nvml: Any = None
        self._devices: list[ctypes.c_void_p] = []
        with contextlib.suppress(OSError, AttributeError):
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            if nvml.nvmlInit_v2() == 0:
                self._nvml = nvml
                self._devices = self._visible(environment.get("CUDA_VISIBLE_DEVICES"))

    def __len__(self) -> int:
        return len(self._devices)

    def used_bytes(self) -> int | None:
        """Memory in use by anybody, of all of them together."""
        found = self._each("nvmlDeviceGetMemoryInfo", _Memory)
        return sum(int(memory.used) for memory in found) if found else None

    def facts(self) -> dict[str, Scalar]:
        """How many there are, and how many processes are on them now."""
        return {"gpu.count": len(self), "gpu.processes": sum(map(self._processes, self._devices))}

    def counters(self) -> dict[str, Any]:
        """Utilisation (mean), power (sum), SM clock (least), throttled (any): fields of `HostSample`."""
        busy = [int(found.gpu) / 100.0 for found in self._each("nvmlDeviceGetUtilizationRates", _Utilisation)]
        power = [found.value / 1000.0 for found in self._each("nvmlDeviceGetPowerUsage", ctypes.c_uint)]
        clocks = [found.value for found in self._each("nvmlDeviceGetClockInfo", ctypes.c_uint, _SM_CLOCK)]
        reasons = self._each("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong)
        return {
            "gpu_utilisation": sum(busy) / len(busy) if busy else None,
            "gpu_power_watts": sum(power) if power else None,
            "gpu_sm_clock_mhz": float(min(clocks)) if clocks else None,
            "gpu_throttled": any(reason.value & _THROTTLED for reason in reasons) if reasons else None,
        }

    def _visible(self, wanted: str | None) -> list[ctypes.c_void_p]:
        count = ctypes.c_uint()
        if self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        names: Sequence[str] = [str(i) for i in range(count.value)]
        if wanted is not None:
            names = [name.strip() for name in wanted.split(",") if name.strip()]
        handles = []
        for name in names:
            handle = ctypes.c_void_p()
            if name.isdigit():
                failed = self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
            else:
                failed = self._nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
            if failed:
                break  # CUDA ignores what follows a device that is not there
            handles.append(handle)
        return handles

    def _each(self, function: str, kind: Any, *before: int) -> list[Any]:
        """One value of every device; nothing where a device does not say."""
        found = []
        for device in self._devices:
            value = kind()
            if getattr(self._nvml, function)(device, *before, ctypes.byref(value)):
                return []
            found.append(value)
        return found

    def _processes(self, device: ctypes.c_void_p) -> int:
        count = ctypes.c_uint(0)  # asked for none, NVML says how many there are
        self._nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), None)
        return int(count.value)


def resident_bytes(root: int) -> int:
    """Resident memory of everything that `root` started; pages that they share are counted for each of them."""
    pages = 0
    for pid in descendants(root):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages += int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def look(at_s: float, *, root: int | None, gpus: Gpus | None, idle_bytes: int | None) -> HostSample:
    """The machine at this moment.

    root: the process above the engine's; None: its memory is unknown. idle_bytes: GPU memory in use before it started.
    """
    used = None if gpus is None else gpus.used_bytes()
    memory = None if root is None or used is not None else resident_bytes(root)
    if used is not None:
        memory = max(0, used - (idle_bytes or 0))
    counters = _NO_COUNTERS if gpus is None else gpus.counters()
    return HostSample(at_s=round(at_s, 3), engine_bytes=memory, load_average=os.getloadavg()[0], **counters)

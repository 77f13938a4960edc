"""Contract probes: what one engine really does with a request, found out without a second engine.

    first()                        base questions, to be answered once
    second(recording of first)     the base questions again, and experiments made from the answers
    observe(recording of second)   what the experiments show: one `Probe` for each parameter

Pure: it makes workloads and is handed recordings. What is asked and why, and what each probe can and cannot see:
docs/probes.md.
"""

from __future__ import annotations

from parity.probes.judgement import SIGMA_NATS, observe
from parity.probes.probe import Answer, Cause, Probe
from parity.probes.questions import first, second

__all__ = ["SIGMA_NATS", "Answer", "Cause", "Probe", "first", "observe", "second"]

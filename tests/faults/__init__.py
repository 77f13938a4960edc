"""Planted faults: a check or a runner is trusted only after it has caught these."""

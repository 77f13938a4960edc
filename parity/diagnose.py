"""What is probably wrong, from facts that both sides recorded. Only asked once a check has failed."""

from __future__ import annotations

from collections.abc import Sequence

from parity.fingerprint import Difference, differences
from parity.recording import Recording

# Spelled differently by engines and library versions without changing what is computed, at any depth.
_HARMLESS = ("transformers_version", "_name_or_path")
_LONGEST_VALUE = 60


def changed(reference: Recording, candidate: Recording) -> tuple[Difference, ...]:
    """The identity facts on which the two sides differ, and the engine versions."""
    facts = list(differences(reference.fingerprint.identity, candidate.fingerprint.identity))
    names = {"engine.version", "host.cpu", "gpu.0.name"}
    context = differences(reference.fingerprint.context, candidate.fingerprint.context)
    return tuple(
        [d for d in facts if d.name.rpartition(".")[2] not in _HARMLESS] + [d for d in context if d.name in names]
    )


def causes(differing: Sequence[Difference]) -> tuple[str, ...]:
    """Sentences on facts that alone can explain a numeric difference, most telling first."""
    found = [
        f"the candidate's model configuration differs: {d.name.removeprefix('model.config.')} {_values(d)}"
        for d in differing
        if d.name.startswith("model.config.")
    ]
    for difference in differing:
        if difference.name == "model.weights_sha256":
            found.append(
                f"the weights are not the same: sha256 {str(difference.reference)[:12]} in the reference, "
                f"{str(difference.candidate)[:12]} in the candidate"
            )
        if difference.name == "quantization":
            found.append(f"quantization {_values(difference)}")
    return tuple(found)


def _values(difference: Difference) -> str:
    ours, theirs = ("not set" if v is None else repr(v) for v in (difference.reference, difference.candidate))
    if max(len(ours), len(theirs)) > _LONGEST_VALUE:
        return "is not the same in the reference and in the candidate"
    return f"is {ours} in the reference and {theirs} in the candidate"

"""What is probably wrong: from facts that both sides recorded, and from which checks failed and which did not.

Only asked once a check has failed. A cause is stated as certain where a recorded fact or the engine's own numbers prove
it, as likely where it rests on the pattern of findings; where nothing fits, that is what is said. A wrong cause stated
with confidence costs more than none. How often each is right: docs/diagnosis.md. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from parity.fingerprint import Difference, Fingerprint, differences
from parity.hypotheses import Support
from parity.recording import Recording
from parity.verdict import Finding, Outcome, Verdict

# Spelled differently by engines and library versions without changing what is computed, at any depth.
_HARMLESS = ("transformers_version", "_name_or_path")
_LONGEST_VALUE = 60
_LAWS_OF_SHAPE = ("numbers", "ends", "stop strings", "text and tokens")
_NUMERIC = ("lockstep", "decode", "logic", "stepwise", "greedy")
_LOW_PRECISION = ("fp8", "int8", "fp4", "int4", "e4m3", "e5m2")


class Confidence(Enum):
    """How far a cause is proved; the value is the word a person reads."""

    CERTAIN = "certain"
    LIKELY = "likely"
    NONE = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The most likely cause in one sentence, and what it rests on."""

    confidence: Confidence
    sentence: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that a run found out about its two sides."""

    verdicts: Mapping[str, Verdict]
    reference: Fingerprint
    candidate: Fingerprint
    supports: tuple[Support, ...]

    def failed(self, *checks: str) -> bool:
        """Whether any of these checks failed."""
        return any(self._outcome(c) is Outcome.FAIL for c in checks)

    def passed(self, *checks: str) -> bool:
        """Whether each of these checks was asked and passed."""
        return all(self._outcome(c) is Outcome.PASS for c in checks)

    def finding(self, check: str, metric: str) -> Finding | None:
        """A failed finding of a check, by its metric."""
        found = self.verdicts.get(check)
        for finding in found.findings if found else ():
            if finding.metric == metric and finding.outcome is Outcome.FAIL:
                return finding
        return None

    def _outcome(self, check: str) -> Outcome | None:
        found = self.verdicts.get(check)
        return None if found is None else found.outcome


def most_likely(
    verdicts: Sequence[Verdict],
    *,
    reference: Fingerprint,
    candidate: Fingerprint,
    supports: tuple[Support, ...] = (),
) -> Diagnosis | None:
    """The first rule that fits, the best proved first; None where no check failed.

    supports: what is known of the prompts' way into the candidate, see `parity.hypotheses`.
    """
    if not any(v.outcome is Outcome.FAIL for v in verdicts):
        return None
    seen = Seen(verdicts={v.check: v for v in verdicts}, reference=reference, candidate=candidate, supports=supports)
    for rule in _RULES:
        if (found := rule(seen)) is not None:
            return found
    failed = ", ".join(v.check for v in verdicts if v.outcome is Outcome.FAIL)
    return Diagnosis(
        confidence=Confidence.NONE,
        sentence=f"no known cause fits: {failed} failed, and no recorded fact differs that would explain it",
        evidence=tuple(v.headline for v in verdicts if v.outcome is Outcome.FAIL),
    )


# Rules, the best proved first ---------------------------------------------------------------------------------------


def _what_the_engine_does(seen: Seen) -> Diagnosis | None:
    """A contract probe caught the engine at it: no second engine is needed to prove that."""
    return _by_causes(seen, "contract")


def _broken_law(seen: Seen) -> Diagnosis | None:
    """Ends, numbers or texts that no correct engine gives."""
    if any(seen.finding("shape", metric) for metric in _LAWS_OF_SHAPE):
        return _by_causes(seen, "shape")
    return None


def _not_greedy(seen: Seen) -> Diagnosis | None:
    found = seen.finding("greedy", "greedy decoding")
    return None if found is None else _certain(found.sentence, found)


def _other_sampling(seen: Seen) -> Diagnosis | None:
    return _by_causes(seen, "sampling")


def _other_inputs(seen: Seen) -> Diagnosis | None:
    return _by_causes(seen, "inputs")


def _other_facts(seen: Seen) -> Diagnosis | None:
    """A recorded fact that alone can explain other numbers, where the numbers are other."""
    if not seen.failed(*_NUMERIC):
        return None
    found = (*causes(_identity(seen.reference, seen.candidate)), *_own_facts(seen.candidate))
    numeric = tuple(v.headline for v in seen.verdicts.values() if v.outcome is Outcome.FAIL and v.check in _NUMERIC)
    if not found:
        return None
    return Diagnosis(confidence=Confidence.CERTAIN, sentence=found[0], evidence=(*found[1:], *numeric))


def _other_prompt(seen: Seen) -> Diagnosis | None:
    """The candidate agrees with the reference about a prompt that neither was sent."""
    if not seen.failed(*_NUMERIC):
        return None
    found = next((s for s in seen.supports if s.convinces), None)
    if found is None:
        return None
    return Diagnosis(confidence=Confidence.CERTAIN, sentence=found.hypothesis.value, evidence=(found.sentence,))


def _decoding_alone(seen: Seen) -> Diagnosis | None:
    if seen.failed("decode", "stepwise") and seen.passed("lockstep") and not seen.failed("logic"):
        return _likely(
            seen,
            "the decode path: what is prefilled agrees and what is decoded token by token does not, so positions "
            "during decoding, or the KV cache (a dropped or stale block, its precision)",
        )
    return None


def _long_contexts(seen: Seen) -> Diagnosis | None:
    drift = seen.finding("lockstep", "drift with context") or seen.finding("decode", "drift with context")
    if drift is not None and seen.finding("lockstep", "KL divergence") is None:
        return _likely(
            seen, "something that only long contexts show: rotary scaling, a sliding window, chunked prefill"
        )
    return None


def _below_rounding(seen: Seen) -> Diagnosis | None:
    if seen.failed("logic") and not seen.failed("lockstep", "decode", "greedy"):
        return _likely(
            seen,
            "the candidate computes a slightly other function than the reference, by less than 16-bit rounding: an "
            "epsilon, a rotary base, a scale, a bias, or some weights",
        )
    return None


def _precision(seen: Seen) -> Diagnosis | None:
    if seen.failed("lockstep", "decode") and seen.passed("logic") and not seen.failed("stepwise"):
        return _likely(
            seen,
            "precision: in float32 both sides compute the same function, so something is stored or multiplied in fewer "
            "bits on the candidate's 16-bit path",
        )
    return None


def _another_function(seen: Seen) -> Diagnosis | None:
    if seen.failed("logic") and seen.failed("lockstep", "decode"):
        return _likely(
            seen,
            "the candidate computes another function although weights, configuration and prompt token ids are recorded "
            "as the same: inside the engine a kernel, a mask or an activation is wrong",
        )
    return None


_RULES: tuple[Callable[[Seen], Diagnosis | None], ...] = (
    _what_the_engine_does,
    _broken_law,
    _not_greedy,
    _other_sampling,
    _other_inputs,
    _other_prompt,
    _other_facts,
    _decoding_alone,
    _long_contexts,
    _below_rounding,
    _precision,
    _another_function,
)


def _by_causes(seen: Seen, check: str) -> Diagnosis | None:
    """What a failed check itself says is the cause."""
    verdict = seen.verdicts.get(check)
    if verdict is None or verdict.outcome is not Outcome.FAIL or not verdict.causes:
        return None
    failed = next(f for f in verdict.findings if f.outcome is Outcome.FAIL)
    return Diagnosis(
        confidence=Confidence.CERTAIN, sentence=verdict.causes[0], evidence=(*verdict.causes[1:], *failed.evidence[:1])
    )


def _certain(sentence: str, finding: Finding) -> Diagnosis:
    return Diagnosis(confidence=Confidence.CERTAIN, sentence=sentence, evidence=finding.evidence[:1])


def _likely(seen: Seen, sentence: str) -> Diagnosis:
    asked = (v for v in seen.verdicts.values() if v.check in _NUMERIC)
    evidence = tuple(f"{v.check} {v.outcome.value}: {v.headline}" for v in asked)
    return Diagnosis(confidence=Confidence.LIKELY, sentence=sentence, evidence=evidence)


# Facts --------------------------------------------------------------------------------------------------------------


def changed(reference: Recording, candidate: Recording) -> tuple[Difference, ...]:
    """The identity facts on which the two sides differ, and versions; of one engine's two sides also their options."""
    names = {"engine.version", "host.cpu", "gpu.0.name"}
    prefixes = ("option.", "engine.") if reference.spec.engine_label == candidate.spec.engine_label else ()
    context = differences(reference.fingerprint.context, candidate.fingerprint.context)
    shown = [d for d in context if d.name in names or d.name.startswith(prefixes)]
    return (*_identity(reference.fingerprint, candidate.fingerprint), *shown)


def _identity(reference: Fingerprint, candidate: Fingerprint) -> tuple[Difference, ...]:
    facts = differences(reference.identity, candidate.identity)
    return tuple(d for d in facts if d.name.rpartition(".")[2] not in _HARMLESS)


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


def _own_facts(candidate: Fingerprint) -> Iterator[str]:
    """What the candidate says of itself and what alone moves numbers, whatever the reference is."""
    context = candidate.context
    cache = str(context.get("engine.kv_cache_dtype", ""))
    if any(word in cache for word in _LOW_PRECISION):
        yield f"the candidate keeps its KV cache in {cache}"
    if (overrides := context.get("option.hf_overrides")) is not None:
        yield f"the candidate's options override the model's configuration: hf_overrides {overrides}"


def _values(difference: Difference) -> str:
    ours, theirs = ("not set" if v is None else repr(v) for v in (difference.reference, difference.candidate))
    if max(len(ours), len(theirs)) > _LONGEST_VALUE:
        return "is not the same in the reference and in the candidate"
    return f"is {ours} in the reference and {theirs} in the candidate"

"""One verdict from two stages: screen, then confirm on fresh data. How a run of many rules keeps its false alarms rare.

A run asks fifteen rules of chance about two engines. Each is screened at `SCREEN`; a check that is flagged is judged
once more on prompts that no rule has seen, at `CONFIRM`, and fails only if it fails there too. The two stages share no
data, so the chance that a correct engine fails a rule is the product, whatever the rules share among each other:

    RULES * (SCREEN * CONFIRM + DECISIVE) = 0.0043        any false alarm of theirs in a run

Checks of one engine by itself (contract, determinism, structured, laws) are judged in one stage at rates that add at
most 0.005, which leaves a run at 1 %.

A fault so large that it fails at `DECISIVE` needs no second look. Laws (numbers, ends, texts, token ids, mismatches
beyond rounding) are no rules of chance; a breach fails at once. The PASS side is not shared out: every check has to
pass on its own. Repeating until it passes is no stage: the second judgement is final.

Source of the design and its simulated power: docs/checks/README.md, "Error rates of a run". Pure.
"""

from __future__ import annotations

from dataclasses import replace

from parity.verdict import Outcome, Verdict

RULES = 15
"""Lock step 5, decode 4, shape 3, sampling 2, greedy 1."""
SCREEN = 0.02
CONFIRM = 0.014
DECISIVE = 5e-6
ONE_STAGE = 0.002
"""Where there are no fresh prompts (two stored recordings), a rule is judged once, at this rate."""
GOLDEN = 0.0005
"""A golden has no fresh prompts. Its ten rules (lock step 6, shape 3, greedy 1) are judged once, at this rate: any
false alarm of theirs in a run at most 0.5 %, beside the 1 % of the comparison with the reference."""


def settled(verdict: Verdict) -> Verdict:
    """A check that needs no second look: not flagged, or far beyond chance."""
    rate = SCREEN if verdict.outcome is not Outcome.FAIL else DECISIVE
    how = "screened" if verdict.outcome is not Outcome.FAIL else "failed at once"
    return _rated(verdict, f"{how} at {rate:g} a rule; any false alarm in a run at most 1 %")


def unconfirmed(strict: Verdict) -> Verdict:
    """A flagged check that nothing fresh can confirm: judged in one stage."""
    note = (
        f"flagged at the screening rate {SCREEN:g}, and there are no fresh prompts to confirm it on: judged in one "
        f"stage at {ONE_STAGE:g} a rule; a target with 'confirm' records them"
    )
    return _rated(replace(strict, warnings=(*strict.warnings, note)), f"one stage at {ONE_STAGE:g} a rule")


def against_golden(verdict: Verdict) -> Verdict:
    """A comparison with a golden: one stage."""
    return _rated(verdict, f"one stage at {GOLDEN:g} a rule; any false alarm against the golden at most 0.5 %")


def combined(screened: Verdict, confirmed: Verdict) -> Verdict:
    """What the fresh prompts say of a flagged check is final; both stages stay visible.

    FAIL only if both failed. Where the fresh prompts pass, the flag was chance; where they are too few, nothing is
    known.
    """
    flagged = [f"screened: {f.metric}: {f.sentence}" for f in screened.findings if f.outcome is Outcome.FAIL]
    if confirmed.outcome is Outcome.FAIL:
        warnings = confirmed.warnings
        headline = f"{confirmed.headline} (fresh prompts; flagged before on the others: {screened.headline})"
    else:
        warnings = (
            *confirmed.warnings,
            f"flagged at the screening rate {SCREEN:g} and not confirmed on fresh prompts, which this verdict shows; "
            f"{'; '.join(flagged)}",
        )
        headline = f"{confirmed.headline} (fresh prompts; a flag on the others was not confirmed)"
    both = f"screened at {SCREEN:g} and confirmed at {CONFIRM:g} a rule on fresh prompts"
    return _rated(
        replace(confirmed, headline=headline, warnings=warnings), f"{both}; any false alarm in a run at most 1 %"
    )


def _rated(verdict: Verdict, rates: str) -> Verdict:
    return replace(verdict, basis=(*verdict.basis, rates))

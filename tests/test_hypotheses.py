"""Another prompt than was sent: found where the numbers agree with it, and not claimed where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep_cases import ROUNDING, Logits, World
from parity import hypotheses
from parity.diagnose import Confidence, most_likely
from parity.fingerprint import Fingerprint
from parity.hypotheses import Hypothesis
from parity.prompts import Prompt, Request, SamplingParams, Workload
from parity.recording import Recording
from parity.verdict import Finding, Outcome, Verdict

WORLD = World(prompts=12, tokens=12)
TOKENS = WORLD.tokens_of(WORLD.model())
FACTS = Fingerprint(identity={}, context={}, health={}, packages={})
FAILED = Verdict(
    check="lockstep", reference="r", candidate="c", outcome=Outcome.FAIL, headline="apart", causes=(), changed=(),
    warnings=(),
    findings=(Finding(metric="KL divergence", outcome=Outcome.FAIL, sentence="apart", unit="nats", reference=None,
                      candidate=None, delta=None, interval=None, limit="none", n=12, evidence=()),),
)  # fmt: skip


def recording(logits: list[Logits], *, prompt: tuple[int, ...] = (0, 1, 2, 3, 4), dtype: str = "float32") -> Recording:
    made = WORLD.recording(logits, TOKENS, dtype=dtype, forced_from="f" * 64)
    return replace(made, completions=tuple(replace(c, prompt_token_ids=prompt) for c in made.completions))


def otherwise(seed: int, *, rounding: float = 0.0) -> list[Logits]:
    """What the model says behind another prompt; the same for whoever is asked, up to rounding."""
    return WORLD.rounded(seed, size=rounding, fault=0.5)


def run(candidate: list[Logits]) -> dict[str, Recording]:
    return {
        "reference": recording(WORLD.model()),
        "candidate-scores": recording(candidate, dtype="bfloat16"),
        Hypothesis.FIRST_DROPPED.role: recording(otherwise(3), prompt=(1, 2, 3, 4)),
        Hypothesis.FIRST_DOUBLED.role: recording(WORLD.rounded(4, size=0.5), prompt=(0, 0, 1, 2, 3, 4)),
    }


def test_a_candidate_that_agrees_with_a_changed_prompt_reads_that_prompt() -> None:
    best, other = hypotheses.supports(run(otherwise(3, rounding=ROUNDING)))
    assert (best.hypothesis, best.convinces, other.convinces) == (Hypothesis.FIRST_DROPPED, True, False)
    assert (best.prompts, best.closer) == (12, 12)
    said = most_likely([FAILED], reference=FACTS, candidate=FACTS, supports=(best, other))
    assert said is not None
    assert (said.confidence, said.sentence) == (Confidence.CERTAIN, Hypothesis.FIRST_DROPPED.value)
    assert "closer on 12 of 12 prompts" in said.evidence[0]


def test_a_candidate_that_is_wrong_in_another_way_convinces_of_nothing() -> None:
    assert not any(s.convinces for s in hypotheses.supports(run(WORLD.rounded(9, size=1.0))))


def test_a_correct_candidate_convinces_of_nothing() -> None:
    assert not any(s.convinces for s in hypotheses.supports(run(WORLD.rounded(9))))


def test_too_few_touched_prompts_convince_of_nothing() -> None:
    found = run(otherwise(3, rounding=ROUNDING))
    role = Hypothesis.FIRST_DROPPED.role
    found[role] = replace(found[role], completions=found[role].completions[:7])
    best = hypotheses.supports(found)[0]
    assert best.prompts == 7
    assert not best.convinces


def test_without_scores_nothing_is_known() -> None:
    found = run(WORLD.model())
    assert hypotheses.supports({k: v for k, v in found.items() if k != "candidate-scores"}) == ()
    assert hypotheses.supports({k: v for k, v in found.items() if not k.startswith("hypothesis-")}) == ()


@pytest.mark.parametrize(
    ("role", "sent"),
    [
        (Hypothesis.FIRST_DROPPED.role, [(2, 3), tuple(range(2, 41))]),
        (Hypothesis.FIRST_DOUBLED.role, [(1, 1, 2, 3), (1, *range(1, 41))]),
        (Hypothesis.LAST_DROPPED.role, [(1, 2), tuple(range(1, 40))]),
        (Hypothesis.CUT_TO_32.role, [tuple(range(9, 41))]),
    ],
)
def test_prompts_are_changed_as_the_hypothesis_says_and_left_out_where_it_changes_nothing(
    role: str, sent: list[tuple[int, ...]]
) -> None:
    greedy = SamplingParams.greedy(max_tokens=4, logprobs=3)
    ids = {"a": (1, 2, 3), "b": tuple(range(1, 41)), "c": (7,)}
    requests = tuple(
        Request(prompt=Prompt(id=i, text=i), sampling=greedy, forced_token_ids=(5, 6), prompt_token_ids=p)
        for i, p in ids.items()
    )
    found = hypotheses.workloads(Workload(name="scored", requests=requests))
    kept = [r.prompt_token_ids for r in found[role].requests if r.id != "c"]
    assert kept == sent
    assert all(r.forced_token_ids == (5, 6) for r in found[role].requests)
    assert Hypothesis.CUT_TO_128.role not in found

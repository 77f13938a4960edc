"""Known divergences: left out for a reason, said to be, and reported when they have outlived it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import recordings
from drills import inline
from golden_cases import save
from lockstep_cases import ROUNDING, World
from parity import judge, known
from parity.errors import ConfigError, IncomparableError
from parity.judge import Evidence
from parity.known import Known
from parity.recording import FinishReason, Recording
from parity.verdict import Outcome, Policy, Verdict

LINE = {
    "target": "cpu",
    "id": "p-003",
    "engine": "vllm",
    "versions": ">=0.32,<0.34",
    "reason": "0.32 sums the logits in another order",
    "link": "https://example.org/12345",
    "date": "2026-11-24",
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / known.FILE
    path.write_text(text, "utf-8")
    return path


def line(**changes: object) -> str:
    """One `[[known]]` table; a key that is changed to None is left out."""
    values = {**LINE, **changes}
    return "[[known]]\n" + "".join(f"{k} = {inline(v)}\n" for k, v in values.items() if v is not None)


# The file ----------------------------------------------------------------------------------------------------------


def test_the_lines_are_read_in_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, line() + line(id="p-004").replace('"2026-11-24"', "2026-11-24"))
    first, second = known.read(path)
    assert first == Known(**LINE)
    assert second == Known(**{**LINE, "id": "p-004"})
    assert known.from_json(json.loads(json.dumps(known.to_json([first, second])))) == (first, second)


def test_no_file_and_an_empty_file_hold_no_lines(tmp_path: Path) -> None:
    assert known.read(tmp_path / known.FILE) == ()
    assert known.read(written(tmp_path, "# nothing yet\n")) == ()


@pytest.mark.parametrize("key", list(LINE))
def test_a_line_that_lacks_anything_is_refused(key: str, tmp_path: Path) -> None:
    path = written(tmp_path, line() + line(**{key: None}))
    with pytest.raises(ConfigError) as caught:
        known.read(path)
    assert str(caught.value).startswith(
        f"{path} [[known]] 2 lacks the key {key!r}; a divergence is accepted with all of"
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[known]", "known.toml' cannot be read as TOML: "),
        ("a = " + "[" * 5000, "known.toml' cannot be read as TOML: "),
        ("knwon = 3\n", "known.toml' has the unknown key 'knwon'; it holds tables [[known]]"),
        ("known = 3\n", "known.toml': 'known' must be a list of tables, written [[known]]"),
        ("known = [3]\n", "known.toml [[known]] 1 must be a table, not 3"),
        (
            line(why="x"),
            "[[known]] 1 has the unknown key 'why'; valid are target, id, engine, versions, reason, link, date",
        ),
        (line(id=7), "[[known]] 1: 'id' must be a text, not 7"),
        (line(reason="  "), "[[known]] 1: 'reason' must be a text, not '  '"),
        (line(link=["x"]), "[[known]] 1: 'link' must be a text, not ['x']"),
        (line(versions="0.32"), "[[known]] 1: '0.32' is no range of versions such as '>=0.32,<0.34'"),
        (line(versions=">=latest"), "[[known]] 1: '>=latest' is no range of versions such as '>=0.32,<0.34'"),
        (line(date="soon"), "[[known]] 1: 'soon' is no day such as 2026-11-24"),
        (line().replace('"2026-11-24"', "2026-11-24T10:00:00"), "'2026-11-24T10:00:00' is no day such as 2026-11-24"),
        (line(date="2026-02-30"), "[[known]] 1: '2026-02-30' is no day such as 2026-11-24"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_what_is_wrong(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        known.read(written(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / known.FILE
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"known.toml' cannot be read as TOML: "):
        known.read(path)


# Whom a line concerns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "versions", "concerned"),
    [
        ("0.32.0", ">=0.32,<0.34", True),
        ("0.33.9", ">=0.32,<0.34", True),
        ("0.34.0", ">=0.32,<0.34", False),
        ("0.31.2", ">=0.32,<0.34", False),
        ("0.32.1rc1", ">=0.32,<0.34", True),
        ("0.34.0rc1", ">=0.32,<0.34", False),
        ("0.32.0+cpu", "==0.32.0", True),
        ("0.32.1.dev7+gabc", ">=0.32", True),
        ("0.32.0", ">=0", True),
        ("a1b2c3", ">=0", False),
        (None, ">=0", False),
    ],
)
def test_a_line_speaks_of_its_range_of_versions(version: str | None, versions: str, concerned: bool) -> None:
    """Of an engine whose version is none, no line says anything."""
    candidate = recordings.recording([recordings.completion()], engine="vllm", context={"engine.version": version})
    assert Known(**{**LINE, "versions": versions}).concerns("cpu", candidate) is concerned


@pytest.mark.parametrize("other", [{"target": "gpu"}, {"engine": "transformers"}])
def test_a_line_speaks_of_its_target_and_engine_alone(other: dict[str, str]) -> None:
    candidate = recordings.recording([recordings.completion()], engine="vllm", version="0.32.0")
    assert Known(**LINE).concerns("cpu", candidate)
    assert not Known(**{**LINE, **other}).concerns("cpu", candidate)


# What is said of it ------------------------------------------------------------------------------------------------


def test_each_line_is_said_to_be_at_work_or_to_have_outlived_its_reason() -> None:
    same, other = recordings.completion("same"), recordings.completion("other")
    ended = recordings.completion("ended")
    accepted = recordings.recording([same, other, ended])
    cut = replace(ended, terminator=None, finish_reason=FinishReason.LENGTH)
    candidate = recordings.recording([same, recordings.completion("other", token_ids=(30, 31, 99)), cut])
    lines = [Known(**{**LINE, "id": id_}) for id_ in ("same", "other", "ended", "gone")]
    assert known.remarks(lines, accepted, candidate) == (
        "known.toml: 'same' is answered like the golden again; remove the line",
        "'other' is left out as a known divergence: 0.32 sums the logits in another order "
        "(https://example.org/12345, 2026-11-24)",
        "'ended' is left out as a known divergence: 0.32 sums the logits in another order "
        "(https://example.org/12345, 2026-11-24)",
        "known.toml: 'gone' is no prompt of this golden; remove the line",
    )


# Judged without them -----------------------------------------------------------------------------------------------

CHECKS = ("inputs", "shape", "greedy", "lockstep")


def sides(*, prompts: int = 48, tokens: int = 8, wrong: Sequence[int] = ()) -> dict[str, Recording]:
    """A golden and an engine that answers the prompts `wrong` with something else entirely."""
    world = World(prompts=prompts, tokens=tokens)
    own, theirs = world.rounded(10), world.rounded(11, size=0.8 * ROUNDING)
    chosen = world.tokens_of(own)
    accepted = world.recording(own, chosen, dtype="bfloat16", engine="vllm")
    other = world.rounded(12, fault=5.0)
    for number in wrong:
        theirs[number] = other[number]
    candidate = world.recording(theirs, world.tokens_of(theirs), dtype="bfloat16", engine="vllm")
    scores = world.recording(theirs, chosen, dtype="bfloat16", forced_from=accepted.digest, engine="vllm")
    exact = world.recording(world.model(), chosen, dtype="float32", forced_from=accepted.digest)
    return {"reference": accepted, "candidate": candidate, "candidate-scores": scores, "noise": exact}


def evidence(found: dict[str, Recording], *lines: Known) -> Evidence:
    return Evidence(
        recordings=found, policy=Policy.IDENTITY, limits={}, directories={}, accepted=True, known=tuple(lines)
    )


def verdicts(found: Evidence) -> dict[str, Verdict]:
    return {check: judge.judge(found, check) for check in CHECKS}


def test_a_divergence_fails_until_it_is_known() -> None:
    found = sides(tokens=48, wrong=[3])
    unknown, accepted = verdicts(evidence(found)), verdicts(evidence(found, Known(**LINE)))
    for check in ("greedy", "lockstep"):
        assert unknown[check].outcome is Outcome.FAIL
        assert accepted[check].outcome is Outcome.PASS
        assert "p-003" not in str(accepted[check].findings)
        assert any(w.startswith("'p-003' is left out as a known divergence: ") for w in accepted[check].warnings)


def test_a_known_prompt_leaves_both_sides_and_nothing_else() -> None:
    """The verdict is the one on recordings that never had it."""
    found = sides(wrong=[3])
    found.pop("noise")  # which is measured on the golden alone, its known prompts included
    never = {role: without(recording, "p-003") for role, recording in found.items()}
    ours, theirs = verdicts(evidence(found, Known(**LINE))), verdicts(evidence(never))
    for check in CHECKS:
        assert ours[check].findings == theirs[check].findings
        assert ours[check].outcome is theirs[check].outcome


def without(recording: Recording, id_: str) -> Recording:
    asked = tuple(i for i in recording.workload.request_ids if i != id_)
    return replace(
        recording,
        completions=tuple(c for c in recording.completions if c.id != id_),
        workload=replace(recording.workload, request_ids=asked),
    )


def test_a_line_about_a_prompt_that_nobody_has_changes_nothing_but_is_said() -> None:
    found = sides()
    line = Known(**{**LINE, "id": "p-999"})
    for ours, theirs in zip(verdicts(evidence(found, line)).values(), verdicts(evidence(found)).values(), strict=True):
        assert ours.findings == theirs.findings
        assert ours.warnings == (*theirs.warnings, "known.toml: 'p-999' is no prompt of this golden; remove the line")


def test_what_diverges_besides_still_fails() -> None:
    assert verdicts(evidence(sides(wrong=[3, 4]), Known(**LINE)))["greedy"].outcome is Outcome.FAIL


def test_leaving_out_most_prompts_is_never_a_pass() -> None:
    found = sides(tokens=48)
    ids = list(found["reference"].by_id)
    for check in ("shape", "greedy", "lockstep"):
        few = evidence(found, *(Known(**{**LINE, "id": id_}) for id_ in ids[10:]))
        assert judge.judge(few, check).outcome is Outcome.INCONCLUSIVE
    none = evidence(found, *(Known(**{**LINE, "id": id_}) for id_ in ids))
    with pytest.raises(IncomparableError, match="share no prompt with an answer"):
        judge.judge(none, "lockstep")
    assert judge.judge(none, "greedy").outcome is Outcome.INCONCLUSIVE


def test_the_lines_of_a_run_are_kept_with_it(tmp_path: Path) -> None:
    """A golden's verdict can be reproduced after known.toml has changed."""
    made = sides(prompts=3)
    for role, recording in made.items():
        save(tmp_path / role, recording)
    run = {
        "recordings": list(made),
        "policy": "identity",
        "limits": {},
        "accepted": True,
        "known": known.to_json([Known(**LINE)]),
    }
    (tmp_path / judge.RUN).write_text(json.dumps(run))
    assert judge.gather(tmp_path).known == (Known(**LINE),)

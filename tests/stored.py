"""A project with targets, finished runs and goldens on disk, and no engine: small, everything with a default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import recordings
from drills import inline
from parity import config, golden, store
from parity.config import Target
from parity.golden import Acceptance, Golden, Shelf
from parity.recording import Completion, FinishReason, Recording, Terminator, WorkloadRecord
from parity.verdict import Outcome

VERSION = "0.32.0"
ACCEPTED_AT = "2026-11-24T12:00:00Z"


def text_of(result: pytest.RunResult) -> str:
    """What a run of pytest printed, without a traceback of ours."""
    text = f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in text
    assert "INTERNALERROR" not in text
    return text


def answers(count: int = 40, *, other: Sequence[int] = ()) -> list[Completion]:
    """`count` answers of eight tokens; those numbered in `other` say something entirely different from token 4 on."""
    made = []
    for index in range(count):
        token_ids = [100 + 10 * position for position in range(8)]
        if index in other:
            token_ids[4:] = [30_000 + position for position in range(4)]
        made.append(recordings.completion(f"p-{index:02}", token_ids=token_ids))
    return made


def shorter_answers(count: int = 40) -> list[Completion]:
    """The same, two tokens shorter and without log-probabilities."""
    end = Terminator(token_id=recordings.EOS, logprobs=None)
    return [
        recordings.completion(
            c.id, token_ids=c.token_ids[:6], rows=None, terminator=end, finish_reason=FinishReason.STOP
        )
        for c in answers(count)
    ]


def scores(answered: Recording, *, dtype: str = "float32") -> Recording:
    """What an engine that agrees with every answer says of its tokens."""
    forced = [
        replace(
            c,
            own_prompt_token_ids=None,
            prompt_text=None,
            text=None,
            terminator=None,
            finish_reason=FinishReason.LENGTH,
        )
        for c in answered.completions
    ]
    return recordings.recording(forced, dtype=dtype, forced_from=answered.digest)


def save(directory: Path, made: Recording) -> Path:
    """Seal a recording."""
    header = store.make_header(
        spec=made.spec,
        workload=made.workload,
        fingerprint=made.fingerprint,
        created_at=made.created_at,
        resumed=made.resumed,
        key="k",
    )
    store.write(directory, header=header, completions=made.completions)
    return directory


@dataclass(frozen=True)
class Project:
    """`suites/targets.toml` with targets of one workload, `golden/`, and `.parity/` with runs."""

    root: Path

    @property
    def targets_file(self) -> Path:
        return self.root / "suites" / "targets.toml"

    @property
    def runs(self) -> Path:
        return self.root / ".parity" / "recordings"

    @property
    def shelf(self) -> Shelf:
        return golden.shelf(self.root / "suites", self.root / ".parity")

    def write(self, *names: str, prompts: int = 40, goldens: bool = True, **file: object) -> Project:
        """`file` goes into targets.toml beside the targets; the first target is the default one."""
        suites = self.root / "suites"
        suites.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": f"p-{i:02}", "text": f"prompt {i}"}) for i in range(prompts)]
        (suites / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
        side = {"engine": "replay", "dtype": "float32"}
        table = {"model": "model", "workload": "small", "reference": side, "candidate": side, "golden": goldens}
        data = {
            "default": names[0],
            "workloads": {"small": {"prompts": ["prompts.jsonl"], "max_tokens": 64, "logprobs": 3}},
            "targets": dict.fromkeys(names, table),
            **file,
        }
        self.targets_file.write_text("".join(f"{key} = {inline(value)}\n" for key, value in data.items()))
        return self

    def target(self, name: str | None = None) -> Target:
        return config.read_target(self.targets_file, name)

    def recording(self, completions: Sequence[Completion] | None = None, *, version: str = VERSION) -> Recording:
        """An answer to the target's whole question; fewer completions are a limited run."""
        found = answers() if completions is None else list(completions)
        asked = WorkloadRecord.of(config.limited_to(self.target(), len(found)).workload)
        return recordings.recording(found, asked=asked, version=version)

    def run(
        self,
        name: str = "cpu",
        *,
        candidate: Recording | None = None,
        reference: Recording | None = None,
        scored: bool = True,
        target: str | None = None,
        more: Mapping[str, object] | None = None,
    ) -> Path:
        """A finished run in `.parity/recordings/NAME`, as `parity record` leaves it."""
        theirs = candidate or self.recording()
        ours = reference or self.recording(theirs.completions, version="5.19.0")
        roles = {"reference": ours, "candidate": theirs}
        if scored:
            roles["reference-scores"] = scores(theirs)
        for role, made in roles.items():
            save(self.runs / name / role, made)
        run = {"target": target or name, "policy": "equivalence", "limits": {}, "recordings": list(roles)}
        (self.runs / name / "run.json").write_text(json.dumps({**run, **(more or {})}))
        return self.runs / name

    def accept(self, name: str = "cpu", *, made: Recording | None = None, at: str = ACCEPTED_AT) -> Golden:
        """A golden that was accepted without a question."""
        source = self.root / "sources" / f"{name}-{len(list(self.root.glob('sources/*')))}"
        acceptance = Acceptance(
            target=name,
            answers=save(source, made or self.recording()),
            arbiter=None,
            samples=None,
            outcomes={"greedy": Outcome.PASS},
            by="Ada",
            reason="the first one",
            at=at,
        )
        return self.shelf.accept(acceptance)

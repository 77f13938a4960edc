"""From a target to a performance verdict: starts in turn, kept as they are measured, gone on with when interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import mock_server
from lmeval_cases import write_model
from load_runs import load_run, slower
from parity import bench, fingerprint, performance_history, timings
from parity.bench import CANDIDATE, REFERENCE, Bench, Side
from parity.checks.performance import Limits
from parity.cli import main
from parity.engines import EngineSpec
from parity.errors import ConfigError, IncomparableError, RecordingError
from parity.fingerprint import Scalar
from parity.record import Places, Recorder
from parity.timings import LoadRun
from parity.traffic import plan
from parity.verdict import Outcome
from session_cases import PROFILE

SPEC = EngineSpec(engine="toy", model="toy", dtype="float32", options={}, env={})


class Silent:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int, detail: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Toy(Bench):
    """Starts whose speed is known; `order` says which side was started when."""

    losses: Mapping[str, float]
    order: list[str] = field(default_factory=list)
    dies_at: int = 10**9

    def _start(self, side: Side, path: Path) -> LoadRun:
        if len(self.order) >= self.dies_at:
            raise KeyboardInterrupt
        self.order.append(side.label)
        random = np.random.default_rng(len(self.order) + int(path.parent.name) * 1000)
        return slower(load_run(), (1 + self.losses[side.label]) * float(np.exp(random.normal(0.0, 0.007))))


def side(label: str) -> Side:
    return Side(label=label, spec=SPEC, command=None, url="http://127.0.0.1:1", facts={"engine": label})


def toy(tmp_path: Path, *, candidate: float = 0.0, **changes: object) -> Toy:
    found = Toy(
        target="mine",
        profile=PROFILE,
        plan=plan(PROFILE, seed=7, vocabulary=range(100), max_positions=64),
        reference=side("old"),
        candidate=side("new"),
        limits=Limits(),
        directory=tmp_path / "performance",
        recorder=Recorder(directory=tmp_path, places=Places.of(tmp_path, tmp_path), observer=Silent()),
        losses={"old": 0.0, "new": candidate},
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def test_the_sides_are_started_in_turn_and_an_engine_as_fast_passes(tmp_path: Path) -> None:
    found = toy(tmp_path)
    measured, verdict = found.compare(None)
    assert verdict.outcome is Outcome.PASS
    assert len(measured.pairs) == Limits().unknown
    assert found.order[:4] == ["old", "new", "new", "old"]


def test_a_slower_engine_fails_by_fresh_pairs(tmp_path: Path) -> None:
    measured, verdict = toy(tmp_path, candidate=0.2).compare(None)
    assert verdict.outcome is Outcome.FAIL
    assert len(measured.fresh) >= 4


def test_an_engine_beside_itself_says_that_the_host_may_judge_and_makes_comparisons_shorter(tmp_path: Path) -> None:
    found = toy(tmp_path)
    _, controls = found.with_itself(found.candidate, 8)
    assert controls["tpot_p50_s"].outcome is Outcome.PASS
    assert set(found.order) == {"new"}
    measured, verdict = found.compare(None)
    assert verdict.outcome is Outcome.PASS
    assert len(measured.pairs) < Limits().unknown
    assert any("new with itself" in line for line in verdict.basis)


def test_what_another_machine_measured_of_itself_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = toy(tmp_path)
    found.with_itself(found.candidate, 8)
    assert found.history.self_runs
    machine: dict[str, Scalar] = {"host.cpu": "another", "host.cores": 1}
    monkeypatch.setattr(fingerprint, "machine", lambda: machine)
    assert not found.history.self_runs


def test_an_interrupted_comparison_goes_on_with_the_next_pair(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, dies_at=5).compare(None)
    again = toy(tmp_path)
    again.compare(None)
    assert len(again.order) == 2 * Limits().unknown - 4  # two pairs were whole, the half one is measured again
    assert any("going on with" in note for note in again.recorder.observer.notes)  # type: ignore[attr-defined]
    assert [path.name for path in again.directory.iterdir()] == ["0001"]


@pytest.mark.parametrize("change", ["finished", "limits", "plan", "candidate"])
def test_another_comparison_never_uses_the_starts_of_this_one(tmp_path: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, dies_at=5).compare(None)
    changes: dict[str, Callable[[], dict[str, object]]] = {
        "finished": lambda: toy(tmp_path).compare(None) and {},
        "limits": lambda: {"limits": Limits(margin=0.06)},
        "plan": lambda: {"plan": plan(PROFILE, seed=8, vocabulary=range(100), max_positions=64)},
        "candidate": lambda: {"candidate": replace(side("new"), facts={"environment.digest": "other"})},
    }
    again = replace(toy(tmp_path), **changes[change]())  # type: ignore[arg-type]
    again.compare(None)
    assert len(again.order) == 2 * Limits().unknown
    assert (again.directory / "0002").is_dir()


def test_a_start_that_was_cut_on_disk_is_measured_again_with_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, dies_at=4).compare(None)
    path = tmp_path / "performance" / "0001" / f"pair-02-{REFERENCE}.jsonl"
    path.write_text(path.read_text()[:-20])
    again = toy(tmp_path)
    again.compare(None)
    assert again.order[:2] == ["new", "old"]
    assert timings.from_json_lines(path.read_text()).profile == "toy"


# Against accepted days ------------------------------------------------------------------------------------------------


def accepted(found: Toy, days: int) -> performance_history.History:
    history = replace(found.history, self_runs=())
    for number in range(days):
        history = history.with_day(
            performance_history.day(f"2026-11-{number + 1:02}", "new", by="a", reason="b", starts=found.starts(3))
        )
    return history


def test_days_of_an_accepted_engine_gate_from_five_on_and_raise_suspicion_before(tmp_path: Path) -> None:
    golden = accepted(toy(tmp_path), 6)
    same, slow = toy(tmp_path), toy(tmp_path, candidate=0.2)
    assert same.against(golden, same.starts(3))["tpot_p50_s"].outcome is Outcome.PASS
    assert slow.against(golden, slow.starts(3))["tpot_p50_s"].outcome is Outcome.FAIL
    few = replace(golden, days=golden.days[:3])
    suspicion = slow.against(few, slow.starts(3))["tpot_p50_s"]
    assert suspicion.flagged
    assert suspicion.outcome is Outcome.INCONCLUSIVE


def test_days_of_another_machine_or_other_requests_judge_nothing(tmp_path: Path) -> None:
    found = toy(tmp_path)
    golden = accepted(found, 1)
    other = replace(golden, hardware={**golden.hardware, "gpu.0.name": "NVIDIA H200"})
    with pytest.raises(IncomparableError, match=r"measured with gpu.0.name 'NVIDIA H200', this run with None"):
        found.against(other, found.starts(3))
    with pytest.raises(ConfigError, match="up to 3 starts and today has 2"):
        found.against(golden, found.starts(2))
    with pytest.raises(IncomparableError, match="measured with plan 'abc'"):
        found.against(replace(golden, plan_sha256="abc"), found.starts(3))


def test_accepted_days_survive_their_file_and_a_damaged_one_is_one_sentence(tmp_path: Path) -> None:
    found = toy(tmp_path)
    golden = accepted(found, 2).with_self_run(
        performance_history.self_run("2026-11-24", "new", found.with_itself(found.candidate, 2)[0].pairs)
    )
    path = bench.golden_file(tmp_path, "mine", "toy")
    assert bench.read_history(path) is None
    bench.accept(path, golden)
    assert bench.read_history(path) == golden
    for text, sentence in (
        (path.read_text()[:-30], "is damaged"),
        (path.read_text().replace('"schema": 1', '"schema": 2'), "has schema 2, this parity reads 1"),
        (path.read_text().replace('"starts"', '"begins"'), "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(RecordingError, match=sentence):
            bench.read_history(path)
        bench.accept(path, golden)


# Through the command line, against a server of known speed ------------------------------------------------------------


def project(tmp_path: Path, **candidate: float) -> Path:
    """A target whose two servers are mock servers."""
    suites = tmp_path / "suites"
    (suites / "traffic").mkdir(parents=True)
    write_model(tmp_path / "model")
    (suites / "prompts.jsonl").write_text('{"id": "p", "text": "a"}\n')
    (suites / "traffic" / "toy.toml").write_text(
        'description = "toy"\nrequests = 6\nwarmup = 1\ngated = ["tpot_p50_s"]\n[arrivals]\nkind = "offline"\n'
        '[prompt_tokens]\nkind = "fixed"\ntokens = 4\n[output_tokens]\nkind = "fixed"\ntokens = 8\n'
    )
    sides = {
        name: {"command": mock_server.command(ttft_s=0.01, **{"tpot_s": 0.004, **knobs})}
        for name, knobs in ((REFERENCE, {}), (CANDIDATE, candidate))
    }
    engine = f'engine = "transformers"\ndtype = "float32"\npython = "{sys.executable}"\n'
    lines = [
        'default = "mine"\n[workloads.w]\nprompts = ["prompts.jsonl"]\n',
        '[targets.mine]\nmodel = "../model"\nworkload = "w"\n',
        '[targets.mine.performance]\nprofiles = ["toy"]\n',
        *(
            f"[targets.mine.performance.{name}]\ncommand = {json.dumps(side['command'])}\n"
            for name, side in sides.items()
        ),
        *(f"[targets.mine.{name}]\n{engine}" for name in sides),
    ]
    (suites / "targets.toml").write_text("".join(lines))
    return tmp_path


def parity(root: Path, *words: str) -> int:
    return main([*words, "--suites", str(root / "suites"), "--home", str(root / "home")])


def test_servers_are_started_and_measured_by_the_commands_of_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = project(tmp_path)
    assert parity(root, "aa", "--pairs", "2") in (1, 3)  # two pairs never say that a host may judge
    said = capsys.readouterr().out
    assert "toy, tpot_p50_s: " in said
    assert "PASS" not in said
    row = next(line for line in said.splitlines() if line.startswith("tpot_p50_s"))
    assert float(row.split()[1]) > 0.002  # 0.004 s, as well as a busy machine keeps it
    assert (root / "home" / "performance" / "mine" / "toy" / "history.json").is_file()


def test_what_cannot_be_measured_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = project(tmp_path)
    for words, sentence in (
        (("bench", "--profile", "tou"), "there is no traffic profile 'tou'"),
        (("bench", "--pairs", "1"), "at least 3 are needed, not 1"),
        (("bench", "--golden"), "has no accepted days under 'toy'"),
        (("bench", "--accept"), "--accept goes with --golden and --reason TEXT"),
        (("aa", "--pairs", "1"), "at least 2 are needed, not 1"),
    ):
        assert parity(root, *words) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("parity: ")
        assert sentence in said


def test_a_log_becomes_a_profile_and_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = project(tmp_path)
    log = tmp_path / "log.jsonl"
    rows = [{"timestamp": 10.0 + 0.5 * n, "prompt_tokens": 20 + n, "output_tokens": 5} for n in range(30)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert parity(root, "traffic", str(log), "ours") == 0
    assert "fitted to 30 requests" in capsys.readouterr().out
    assert parity(root, "traffic", str(log), "ours") == 2
    assert "exists; choose another name" in capsys.readouterr().err

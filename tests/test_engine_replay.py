"""The replay engine repeats a recording and refuses to invent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parity import store
from parity.engines import EngineSpec
from parity.engines.replay import open_engine
from parity.errors import EngineError
from parity.prompts import Prompt, Request, SamplingParams
from recordings import completion, recording

SAMPLING = SamplingParams.greedy(max_tokens=64, logprobs=3)


def spec(wire: Path | None) -> EngineSpec:
    options = {} if wire is None else {"wire": str(wire)}
    return EngineSpec(engine="replay", model="none", dtype="float32", options=options, env={})


def request(id: str = "p-001", ids: tuple[int, ...] = (1, 20, 21)) -> Request:  # noqa: A002
    return Request(prompt=Prompt(id=id, text="Hello there"), sampling=SAMPLING, prompt_token_ids=ids)


@pytest.fixture
def wire(tmp_path: Path) -> Path:
    path = tmp_path / "wire.jsonl"
    store.export_wire(recording([completion("p-001"), completion("p-002", terminator=None)]), path)
    return path


def test_answers_what_was_recorded(wire: Path, tmp_path: Path) -> None:
    engine = open_engine(spec(wire), tmp_path)
    assert list(engine.generate([request("p-002"), request("p-001")])) == [
        completion("p-002", terminator=None),
        completion("p-001"),
    ]
    assert [t.token_ids for t in engine.tokenize([request().prompt])] == [(1, 20, 21)]


def test_refuses_what_was_not_recorded(wire: Path, tmp_path: Path) -> None:
    engine = open_engine(spec(wire), tmp_path)
    with pytest.raises(EngineError, match="no answer to prompt 'p-003'"):
        list(engine.generate([request("p-003")]))
    with pytest.raises(EngineError, match="other prompt token ids"):
        list(engine.generate([request(ids=(1, 20))]))
    with pytest.raises(EngineError, match="other tokens than those to be scored"):
        list(engine.generate([replace(request(), forced_token_ids=(5,))]))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        open_engine(spec(tmp_path / "absent.jsonl"), tmp_path)
    with pytest.raises(EngineError, match=r"needs options\.wire"):
        open_engine(spec(None), tmp_path)

"""Several jobs of one engine: made from each other's answers, in turns, and no more starts than needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from drills import DRILL, bare_interpreter, counting_engine, make_model, starts
from parity import store
from parity.engines import EngineSpec
from parity.errors import EngineError
from parity.prompts import Prompt, Request, SamplingParams, Workload
from parity.record import Places, Recorder, Sequel
from parity.recording import Recording

GREEDY = SamplingParams.greedy(max_tokens=6, logprobs=4)


class Silent:
    def note(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int, detail: str) -> None: ...


def recorder(tmp_path: Path) -> Recorder:
    return Recorder(directory=tmp_path / "run", places=Places.of(tmp_path, tmp_path), observer=Silent())


def spec(tmp_path: Path, engine: Path = DRILL) -> EngineSpec:
    model = make_model(tmp_path / "model")
    return EngineSpec(
        engine=str(engine), model=str(model), dtype="float32", python=bare_interpreter(), options={}, env={}
    )


def request(name: str, **changes: object) -> Request:
    made = Request(prompt=Prompt(id=name, text=f"prompt {name} says"), sampling=GREEDY)
    return replace(made, **changes)  # type: ignore[arg-type]


def workload(*requests: Request) -> Workload:
    return Workload(name="jobs", requests=requests)


def test_a_job_is_made_from_the_answers_before_it_without_starting_the_engine_again(tmp_path: Path) -> None:
    def again(done: Mapping[str, Recording]) -> Workload:
        tokens = {c.id: c.token_ids for c in done["first"].completions}
        sent = {c.id: c.prompt_token_ids for c in done["first"].completions}
        asked = workload(request("a"), request("b")).with_prompt_token_ids(sent)
        return asked.forced(tokens_of=tokens, forced_from=done["first"].digest)

    jobs: dict[str, Workload | Sequel] = {"first": workload(request("a"), request("b")), "scores": again}
    found = recorder(tmp_path).record(spec(tmp_path, counting_engine(tmp_path)), jobs)
    assert list(found) == ["first", "scores"]
    assert starts(tmp_path) == 1
    for id_ in ("a", "b"):
        answered, scored = found["first"].by_id[id_], found["scores"].by_id[id_]
        assert answered.token_ids == scored.token_ids
        assert answered.logprobs is not None
        assert scored.logprobs is not None
        assert bytes(answered.logprobs.chosen) == bytes(scored.logprobs.chosen)


def test_a_job_that_asks_nothing_is_left_out(tmp_path: Path) -> None:
    jobs: dict[str, Workload | Sequel] = {"first": workload(request("a")), "nothing": lambda _: None}
    assert list(recorder(tmp_path).record(spec(tmp_path), jobs)) == ["first"]


def test_turns_go_to_the_engine_one_after_the_other_and_the_recording_keeps_the_order_of_asking(tmp_path: Path) -> None:
    asked = workload(request("late", turn=2), request("early"), request("middle", turn=1))
    found = recorder(tmp_path).record(spec(tmp_path), {"turns": asked})["turns"]
    assert [c.id for c in found.completions] == ["late", "early", "middle"]
    # The drill's clock begins anew in each batch, so every turn of one request finishes as its first.
    assert max(c.timing.finished_ns for c in found.completions) < 5e9


def test_each_request_keeps_its_own_sampling_on_disk(tmp_path: Path) -> None:
    short = replace(GREEDY, max_tokens=3)
    asked = workload(request("a"), request("b", sampling=short), request("c"))
    found = recorder(tmp_path).record(spec(tmp_path), {"mixed": asked})["mixed"]
    back = store.read(tmp_path / "run" / "mixed")
    for recording in (found, back):
        assert [recording.workload.sampling_of(i) for i in "abc"] == [GREEDY, short, GREEDY]
        assert [len(recording.by_id[i].token_ids) for i in "abc"] == [6, 3, 6]
        assert recording.workload.others == {"b": short}


def test_what_an_engine_cannot_honour_is_refused_by_name(tmp_path: Path) -> None:
    asked = workload(request("a", sampling=replace(GREEDY, temperature=0.5)))
    with pytest.raises(EngineError, match=r"cannot honour temperature 0.5 of prompt 'a'"):
        recorder(tmp_path).record(spec(tmp_path), {"refused": asked})


def test_a_text_that_is_not_the_decoding_of_its_tokens_is_recorded_with_that_decoding(tmp_path: Path) -> None:
    engine = tmp_path / "mumbling.py"
    engine.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\n"
        f"exec(compile(Path({str(DRILL)!r}).read_text(), {str(DRILL)!r}, 'exec'))\n"
        "_complete = DrillEngine._complete\n"
        "DrillEngine._complete = lambda self, r, s: replace(_complete(self, r, s), text='mumble')\n"
    )
    found = recorder(tmp_path).record(spec(tmp_path, engine), {"a": workload(request("a"))})["a"]
    honest = recorder(tmp_path / "honest").record(spec(tmp_path), {"a": workload(request("a"))})["a"]
    assert (honest.by_id["a"].decoded_text, found.by_id["a"].text) == (None, "mumble")
    assert found.by_id["a"].decoded_text == honest.by_id["a"].text
    assert store.read(tmp_path / "run" / "a").by_id["a"].decoded_text == honest.by_id["a"].text

"""Faults in the running vLLM: each changes what it says and nothing else, wherever vLLM is not needed to tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from parity import config
from parity.display import Display
from parity.engines import EngineSpec, Progress
from parity.engines.vllm import VllmEngine
from parity.errors import EngineError
from parity.prompts import Message, Prompt, Request, SamplingParams, Workload
from parity.record import Places, Recorder
from parity.recording import Completion, Recording
from parity.sensitivity import vllm_faults
from parity.sensitivity.vllm_faults import FAULTS, FaultyVllmEngine, Kind
from recordings import completion

GREEDY = SamplingParams.greedy(max_tokens=24, logprobs=20)
TELLING = replace(
    GREEDY, temperature=1.0, top_p=0.9, top_k=10, seed=7, min_tokens=5, stop=("\n",), stop_token_ids=(9,),
    repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25,
)  # fmt: skip
"""Every parameter that a fault could touch is asked for."""
SPEC = EngineSpec(engine="vllm", model="m", dtype="bfloat16", options={"enforce_eager": True}, env={})


def changes(name: str, asked: SamplingParams) -> dict[str, object]:
    """The fields that the fault changes, with what they become."""
    before, after = asdict(asked), asdict(FAULTS[name].sampling(asked))
    return {field: value for field, value in after.items() if value != before[field]}


def with_fault(spec: EngineSpec, name: str | None) -> EngineSpec:
    return replace(spec, options={**spec.options, "fault": name})


def request(**given: Any) -> Request:
    plain = Request(prompt=Prompt(id="p-001", token_ids=(1, 20, 21)), sampling=TELLING, prompt_token_ids=(1, 20, 21))
    return replace(plain, **given)


def test_no_two_faults_share_a_name() -> None:
    registries = (vllm_faults._MODEL, vllm_faults._PROMPT, vllm_faults._REQUEST, vllm_faults._BATCH)
    assert len(FAULTS) == sum(map(len, registries))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_planted_at_exactly_one_place_and_it_is_the_one_that_its_kind_names(
    fault: vllm_faults.VllmFault,
) -> None:
    places = {
        Kind.MODEL: [fault.model is not None],
        Kind.PROMPT: [fault.prompt is not vllm_faults._unchanged],
        Kind.REQUEST: [fault.sampling is not vllm_faults._unchanged, bool(fault.params), bool(fault.options)],
        Kind.BATCH: [fault.batch is not vllm_faults._unchanged],
    }
    assert [kind for kind, planted in places.items() for p in planted if p] == [fault.kind]
    assert fault.shows


def test_only_the_wider_lm_head_and_the_order_of_a_batch_are_harmless_variations() -> None:
    assert [f.name for f in FAULTS.values() if f.harmless] == ["lm_head in float32", "batch order reversed"]


@pytest.mark.parametrize(
    ("name", "asked", "wanted"),
    [
        ("repetition_penalty 1.05 applied", GREEDY, {"repetition_penalty": 1.05}),
        ("temperature 1.1 for 1.0", TELLING, {"temperature": 1.1}),
        ("temperature 1.1 for 1.0", replace(TELLING, temperature=1.95), {"temperature": 2.0}),
        ("top_p ignored", TELLING, {"top_p": 1.0}),
        ("top_k off by one", TELLING, {"top_k": 11}),
        ("max_tokens one short", TELLING, {"max_tokens": 23}),
        ("max_tokens one short", replace(TELLING, min_tokens=24), {"max_tokens": 23, "min_tokens": 23}),
        ("stop string kept", TELLING, {}),
        ("stop string ignored", TELLING, {"stop": ()}),
        ("greedy sampled at 0.7", GREEDY, {"temperature": 0.7}),
        ("seed fixed", TELLING, {"seed": 0}),
        ("logprobs processed", TELLING, {}),
        ("min_tokens ignored", TELLING, {"min_tokens": 0}),
        (
            "penalties ignored",
            TELLING,
            {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        ),
        ("EOS wrong", TELLING, {"ignore_eos": True, "stop_token_ids": (9, 0)}),
    ],
)
def test_a_fault_of_the_request_changes_what_it_says_and_nothing_else(
    name: str, asked: SamplingParams, wanted: dict[str, object]
) -> None:
    assert changes(name, asked) == wanted


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("repetition_penalty 1.05 applied", TELLING),
        ("temperature 1.1 for 1.0", GREEDY),
        ("top_k off by one", GREEDY),
        ("max_tokens one short", replace(GREEDY, max_tokens=1)),
        ("greedy sampled at 0.7", TELLING),
        ("EOS wrong", replace(GREEDY, ignore_eos=True)),
    ],
)
def test_a_fault_of_the_request_leaves_alone_what_does_not_concern_it(name: str, asked: SamplingParams) -> None:
    assert changes(name, asked) == {}


@given(st.lists(st.integers(0, 100), min_size=1, max_size=80).map(tuple))
def test_a_spoilt_prompt_is_never_empty_and_keeps_the_order_of_its_tokens(ids: tuple[int, ...]) -> None:
    missing, doubled, cut = (FAULTS[n].prompt(ids) for n in ("BOS missing", "BOS doubled", "prompt truncated"))
    assert missing == (ids[1:] if len(ids) > 1 else ids)
    assert doubled == (ids[0], *ids)
    assert cut == ids[len(ids) - len(cut) :]
    assert len(cut) == min(len(ids), 32)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Request], tuple[Request, Completion]]:
    """What vLLM is asked and what comes back, for one request under a fault; vLLM itself is left out."""

    def run(name: str, asked: Request) -> tuple[Request, Completion]:
        received: list[Request] = []

        def own(self: VllmEngine, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
            received.extend(requests)
            yield Progress(tokens=1)
            yield from (completion(r.id, prompt_token_ids=r.prompt_token_ids or ()) for r in requests)

        monkeypatch.setattr(VllmEngine, "generate", own)
        engine = object.__new__(FaultyVllmEngine)
        engine._fault = FAULTS[name]
        _, answer = engine.generate([asked])
        assert isinstance(answer, Completion)
        (reached,) = received
        return reached, answer

    return run


@pytest.mark.parametrize("forced", [None, (30, 31)])
def test_a_spoilt_prompt_reaches_generation_and_scoring_and_is_not_reported(
    generate: Callable[[str, Request], tuple[Request, Completion]], forced: tuple[int, ...] | None
) -> None:
    reached, answer = generate("BOS doubled", request(forced_token_ids=forced))
    assert reached == request(prompt_token_ids=(1, 1, 20, 21), forced_token_ids=forced)
    assert answer.prompt_token_ids == (1, 20, 21)


def test_a_fault_of_the_request_leaves_scoring_untouched(
    generate: Callable[[str, Request], tuple[Request, Completion]],
) -> None:
    scoring = request(forced_token_ids=(30, 31))
    assert generate("penalties ignored", scoring)[0] == scoring
    assert generate("penalties ignored", request())[0].sampling.repetition_penalty == 1.0


def test_a_batch_backwards_is_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Request] = []

    def own(self: VllmEngine, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        received.extend(requests)
        yield from (completion(r.id, prompt_token_ids=r.prompt_token_ids or ()) for r in requests)

    monkeypatch.setattr(VllmEngine, "generate", own)
    engine = object.__new__(FaultyVllmEngine)
    engine._fault = FAULTS["batch order reversed"]
    asked = [request(prompt=Prompt(id=f"p-{n}", token_ids=(1, n)), prompt_token_ids=(1, n)) for n in range(3)]
    answers = list(engine.generate(asked))
    assert received == asked[::-1]
    assert {a.id for a in answers if isinstance(a, Completion)} == {"p-0", "p-1", "p-2"}


def test_the_stop_string_is_kept_in_generation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngine, "_sampling_params", lambda self, asked: SimpleNamespace())
    engine = object.__new__(FaultyVllmEngine)
    engine._fault = FAULTS["stop string kept"]
    assert vars(engine._sampling_params(request())) == {"include_stop_str_in_output": True}
    assert vars(engine._sampling_params(request(forced_token_ids=(30,)))) == {}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The specs with which vLLM is started, and then the changes of its model; vLLM itself is left out."""
    seen: list[object] = []

    def start(self: VllmEngine, spec: EngineSpec, model: Path) -> None:
        seen.append(spec)
        self._llm = SimpleNamespace(apply_model=seen.append)

    monkeypatch.setattr(VllmEngine, "__init__", start)
    return seen


def test_an_unknown_fault_is_refused_in_one_sentence_that_names_the_known_ones(
    started: list[object], tmp_path: Path
) -> None:
    for name in ("relu", None):
        with pytest.raises(EngineError, match=rf"^there is no fault {name!r}; there are gelu .*, EOS wrong, "):
            vllm_faults.open_engine(with_fault(SPEC, name), tmp_path)
    assert started == []


@pytest.mark.parametrize(("processes", "eager"), [("1", True), (None, True), ("0", False)])
def test_a_model_that_vllm_compiled_or_keeps_elsewhere_is_not_spoilt(
    processes: str | None, eager: bool, started: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(vllm_faults.WANTED_MODE, raising=False)
    if processes is not None:
        monkeypatch.setenv(vllm_faults.WANTED_MODE, processes)
    spec = replace(SPEC, options={"enforce_eager": eager})
    with pytest.raises(EngineError, match="needs VLLM_ENABLE_V1_MULTIPROCESSING=0 and enforce_eager"):
        vllm_faults.open_engine(with_fault(spec, "KV block dropped"), tmp_path)
    vllm_faults.open_engine(with_fault(spec, "BOS doubled"), tmp_path)  # nothing in the model is touched
    assert started == [spec]


def test_the_model_is_changed_once_vllm_has_loaded_it(
    started: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(vllm_faults.WANTED_MODE, "0")
    vllm_faults.open_engine(with_fault(SPEC, "KV block dropped"), tmp_path)
    assert started == [SPEC, FAULTS["KV block dropped"].model]


def test_an_option_that_is_the_fault_wins_over_the_users(started: list[object], tmp_path: Path) -> None:
    spec = replace(SPEC, options={"logprobs_mode": "raw_logprobs", "max_model_len": 64})
    vllm_faults.open_engine(with_fault(spec, "logprobs processed"), tmp_path)
    assert started == [replace(spec, options={"logprobs_mode": "processed_logprobs", "max_model_len": 64})]


def test_rounding_the_lm_head_is_refused_where_it_is_rounded_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(bfloat16="bfloat16", float32="float32"))

    def model(dtype: str) -> SimpleNamespace:
        return SimpleNamespace(logits_processor=SimpleNamespace(head_dtype=dtype))

    rounded, wide, spoilt = model("float32"), model("bfloat16"), FAULTS["lm_head rounded to bfloat16"].model
    assert spoilt is not None
    spoilt(rounded)
    assert rounded == model("bfloat16")
    with pytest.raises(EngineError, match="a bfloat16 run is bfloat16 already, so this fault needs dtype float32"):
        spoilt(rounded)
    widened = FAULTS["lm_head in float32"].model
    assert widened is not None
    widened(wide)
    assert wide == model("float32")


@pytest.mark.real
def test_faults_of_decoding_leave_the_first_token_and_the_scores_alone_and_spoil_the_rest(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every engine runs the same batches, so what a fault does not touch is the same to the bit."""
    home = ROOT / ".parity"
    candidate = config.read_target(ROOT / "suites" / "targets.toml", "cpu").candidate
    asked = Workload(
        name="decoding",
        requests=tuple(Request(prompt=Prompt(id=text, messages=chat(text)), sampling=GREEDY) for text in QUESTIONS),
    )

    def recorded(fault: str | None, right: Recording | None) -> Mapping[str, Recording]:
        def scores(found: Mapping[str, Recording]) -> Workload:
            answers = right or found["answers"]
            sent = asked.with_prompt_token_ids({c.id: c.prompt_token_ids for c in answers.completions})
            tokens_of = {c.id: c.token_ids for c in answers.completions}
            return sent.forced(tokens_of=tokens_of, forced_from=answers.digest)

        spec = candidate
        if fault is not None:
            spec = with_fault(replace(candidate, engine=vllm_faults.__file__), fault)
        name = "fault-in-vllm-" + (fault or "none").replace(" ", "-")
        with capfd.disabled(), Display(sys.stderr) as display:
            places = Places.of(ROOT / "suites", home)
            recorder = Recorder(directory=home / "recordings" / name, places=places, observer=display)
            return recorder.record(spec, {"answers": asked, "scores": scores})

    right = recorded(None, None)
    for fault in ("positions +1 in decode", "KV block dropped"):
        wrong = recorded(fault, right["answers"])
        for question in QUESTIONS:
            assert np.array_equal(top(right["scores"], question), top(wrong["scores"], question))
            before, after = top(right["answers"], question), top(wrong["answers"], question)
            assert np.array_equal(before[0], after[0])
            assert not np.array_equal(before[1], after[1])


ROOT = Path(__file__).parent.parent
QUESTIONS = ("Name five things you would find in a toolbox.", "Write a short poem about rain.")


def chat(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def top(recording: Recording, question: str) -> NDArray[np.float32]:
    """The top-k log-probabilities at each position, in nats: float32 [T, K]."""
    logprobs = recording.by_id[question].logprobs
    assert logprobs is not None
    return np.frombuffer(logprobs.top, np.float32).reshape(-1, logprobs.k)

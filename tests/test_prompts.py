"""What is asked: a digest that names the question and nothing else, forms that exclude each other, and wire forms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parity
from parity.errors import ConfigError
from parity.prompts import (
    Grammar,
    Message,
    Prompt,
    Request,
    SamplingParams,
    Structured,
    Workload,
    prompt_from_json,
    prompt_to_json,
    request_from_json,
    request_to_json,
)

GREEDY = SamplingParams.greedy(max_tokens=8, logprobs=4)
CHAT = Prompt(id="chat", messages=(Message(role="user", content="Hé? \u2028 🙂"),))
TEXT = Prompt(id="text", text="Once upon")
IDS = Prompt(id="ids", token_ids=(1, 49000, 2))
WORKLOAD = Workload(name="three", requests=tuple(Request(prompt=p, sampling=GREEDY) for p in (CHAT, TEXT, IDS)))

# One other value for every field of SamplingParams; a new field without one here fails the test that uses it.
OTHER: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": None,
    "max_tokens": 9,
    "min_tokens": 1,
    "stop": ("\n",),
    "stop_token_ids": (7,),
    "ignore_eos": True,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logprobs": 5,
    "structured": Structured(grammar=Grammar.REGEX, definition="a+"),
}

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
# Lone surrogates too: a JSON prompt set may hold one.
STRINGS = st.text(st.characters(codec=None, exclude_categories=["Cs"]) | st.sampled_from("\ud800\u2028🙂"), max_size=8)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
FORMS = st.one_of(
    st.builds(lambda v: {"text": v}, STRINGS),
    st.builds(lambda v: {"token_ids": v}, TOKENS),
    st.builds(
        lambda v: {"messages": v}, st.lists(st.builds(Message, role=STRINGS, content=STRINGS), max_size=3).map(tuple)
    ),
)
PROMPTS = st.builds(
    lambda id_, form, tags: Prompt(id=id_, tags=tags, **form), STRINGS, FORMS, st.lists(STRINGS, max_size=2).map(tuple)
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=NUMBERS,
    top_p=NUMBERS,
    top_k=st.integers(0, 100),
    min_p=NUMBERS,
    seed=st.none() | st.integers(),
    max_tokens=st.integers(1, 100),
    min_tokens=st.integers(0, 100),
    stop=st.lists(STRINGS, max_size=2).map(tuple),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    repetition_penalty=NUMBERS,
    presence_penalty=NUMBERS,
    frequency_penalty=NUMBERS,
    logprobs=st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    prompt=PROMPTS,
    sampling=SAMPLING,
    forced_token_ids=st.none() | TOKENS,
    prompt_token_ids=st.none() | TOKENS,
)


def with_prompt(prompt: Prompt, *, at: int) -> Workload:
    requests = list(WORKLOAD.requests)
    requests[at] = replace(requests[at], prompt=prompt)
    return replace(WORKLOAD, requests=tuple(requests))


def with_sampling(sampling: SamplingParams) -> Workload:
    return replace(WORKLOAD, requests=tuple(replace(r, sampling=sampling) for r in WORKLOAD.requests))


# The digest --------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_question_never_changes() -> None:
    """Recordings of years refer to their question by this value; a change here makes all of them incomparable."""
    assert WORKLOAD.digest == "190992d86ec0c0df344ef2bd3d0d72fac8e2b72f777956a78d0b4bbf14e44245"


def test_names_tags_and_a_tokenizers_splitting_are_not_part_of_the_question() -> None:
    assert replace(WORKLOAD, name="renamed").digest == WORKLOAD.digest
    assert with_prompt(replace(TEXT, tags=("new",)), at=1).digest == WORKLOAD.digest
    assert WORKLOAD.with_prompt_token_ids({"chat": (1,), "text": (2,), "ids": (3,)}).digest == WORKLOAD.digest
    assert replace(WORKLOAD, forced_from="f" * 64).digest == WORKLOAD.digest


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplingParams)])
def test_every_sampling_parameter_is_part_of_the_question(name: str) -> None:
    changed = replace(GREEDY, **{name: OTHER[name]})
    assert getattr(changed, name) != getattr(GREEDY, name)
    assert with_sampling(changed).digest != WORKLOAD.digest


def test_ids_forms_order_and_forced_tokens_are_part_of_the_question() -> None:
    assert CHAT.messages is not None
    asked = [
        WORKLOAD,
        with_prompt(replace(TEXT, text="Once upon "), at=1),
        with_prompt(replace(TEXT, id="other"), at=1),
        with_prompt(replace(CHAT, messages=(replace(CHAT.messages[0], role="system"),)), at=0),
        with_prompt(replace(CHAT, messages=CHAT.messages * 2), at=0),
        with_prompt(replace(IDS, token_ids=(1, 49000)), at=2),
        with_prompt(Prompt(id="text", messages=(Message(role="", content="Once upon"),)), at=1),
        replace(WORKLOAD, requests=WORKLOAD.requests[::-1]),
        replace(WORKLOAD, requests=WORKLOAD.requests[:2]),
        WORKLOAD.forced(tokens_of={"chat": (1,), "text": (2,), "ids": (3,)}, forced_from="0"),
        WORKLOAD.forced(tokens_of={"chat": (1,), "text": (2,), "ids": (4,)}, forced_from="0"),
    ]
    for one, other in itertools.combinations(asked, 2):
        assert one.digest != other.digest


@settings(max_examples=40)
@given(st.lists(REQUESTS, max_size=3, unique_by=lambda r: r.id))
def test_a_question_has_the_same_digest_on_the_far_side_of_the_wire(requests: list[Request]) -> None:
    sent = Workload(name="sent", requests=tuple(requests))
    wire = json.dumps([request_to_json(r) for r in requests])
    arrived = Workload(name="arrived", requests=tuple(request_from_json(r) for r in json.loads(wire)))
    assert arrived.requests == sent.requests
    assert arrived.digest == sent.digest


def test_two_prompts_of_one_workload_never_share_an_id() -> None:
    with pytest.raises(ConfigError, match=r"workload 'w' has two prompts with the id 'text'; ids must differ"):
        Workload(name="w", requests=(WORKLOAD.requests[1], WORKLOAD.requests[1]))


def test_prompts_without_tokens_are_left_out_of_the_forced_twin() -> None:
    forced = WORKLOAD.forced(tokens_of={"chat": (), "text": (5, 6)}, forced_from="abc")
    assert [(r.id, r.forced_token_ids) for r in forced.requests] == [("text", (5, 6))]
    assert (forced.name, forced.forced_from) == ("three-forced", "abc")


# Forms and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_forms", [(), ("text", "messages"), ("text", "token_ids"), ("messages", "token_ids")])
def test_a_prompt_has_exactly_one_form(given_forms: tuple[str, ...]) -> None:
    values: dict[str, Any] = {"text": "", "messages": (), "token_ids": ()}
    with pytest.raises(ConfigError, match="must have exactly one of text, messages, token_ids") as caught:
        Prompt(id="p", **{name: values[name] for name in given_forms})
    assert str(caught.value).endswith(f"it has {' and '.join(given_forms) or 'none of them'}")


@settings(max_examples=40)
@given(PROMPTS)
def test_a_prompt_survives_its_line_in_a_prompt_set(prompt: Prompt) -> None:
    assert prompt_from_json(json.loads(json.dumps(prompt_to_json(prompt)))) == prompt


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"id": "p", "txt": "x"}, "prompt 'p' has the unknown key 'txt'; known are"),
        ({"text": "x"}, "a prompt needs an id that is a string, not None"),
        ({"id": 3, "text": "x"}, "a prompt needs an id that is a string, not 3"),
        ({"id": "p", "text": 3}, "prompt 'p': 'text' must be a string, not 3"),
        ({"id": "p", "messages": "hi"}, "prompt 'p': 'messages' must be a list of objects with the strings"),
        ({"id": "p", "messages": [{"role": "user"}]}, "'messages' must be a list of objects"),
        ({"id": "p", "messages": [{"role": "user", "content": None}]}, "'messages' must be a list of objects"),
        ({"id": "p", "token_ids": "12"}, "prompt 'p': 'token_ids' must be a list of whole numbers, not '12'"),
        ({"id": "p", "token_ids": [1, -1]}, "prompt 'p': 'token_ids' must be a list of whole numbers"),
        ({"id": "p", "token_ids": [True]}, "prompt 'p': 'token_ids' must be a list of whole numbers"),
        ({"id": "p", "text": "x", "tags": "long"}, "prompt 'p': 'tags' must be a list of strings, not 'long'"),
        (["p"], r"a prompt must be a JSON object, not \['p'\]"),
    ],
)
def test_a_wrong_line_of_a_prompt_set_is_refused_by_name(line: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        prompt_from_json(line)


# The package -------------------------------------------------------------------------------------------------------


def test_the_public_names_are_sorted_and_importable() -> None:
    assert list(parity.__all__) == sorted(parity.__all__)
    public = {
        name
        for name, value in vars(parity).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("parity")
    }
    assert public == set(parity.__all__)


@pytest.mark.parametrize(
    "module",
    ["parity", *(f"parity.{name}" for name in ("worker", "recording", "prompts", "fingerprint", "verdict", "engines"))],
)
def test_ring_0_needs_the_standard_library_only(module: str, tmp_path: Path) -> None:
    """An engine's interpreter holds whatever its pins say, so none of our own dependencies may be asked of it."""
    (tmp_path / "parity").symlink_to(Path(parity.__file__).parent)
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); before = set(sys.modules); import {module}; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "['parity']\n"

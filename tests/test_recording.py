"""What was answered: log-probabilities to the bit, and completions that survive the wire."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recordings
from parity.engines import EngineSpec
from parity.fingerprint import Fingerprint
from parity.recording import (
    NO_TOKEN,
    Completion,
    FinishReason,
    Terminator,
    Timing,
    TokenLogprobs,
    missing_ids,
)

FLOATS = st.floats(width=32) | st.sampled_from([math.nan, -math.inf, -0.0, -1e-45])
ROWS = st.lists(st.tuples(st.integers(0, 2**31 - 1), FLOATS), max_size=5)


@st.composite
def token_logprobs(draw: st.DrawFn, *, length: int | None = None, k: int | None = None) -> TokenLogprobs:
    """Rows may be shorter and longer than k."""
    k = draw(st.integers(1, 4)) if k is None else k
    count = draw(st.integers(0, 4)) if length is None else length
    rows = draw(st.lists(ROWS, min_size=count, max_size=count))
    return TokenLogprobs.from_rows(draw(st.lists(FLOATS, min_size=count, max_size=count)), rows, k=k)


# Lone surrogates are text too: an engine may cut an answer inside a character.
TEXTS = st.text(st.characters(codec=None, exclude_categories=["Cs"]) | st.sampled_from("\ud800\u2028🙂\n"), max_size=8)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)


@st.composite
def completions(draw: st.DrawFn, *, id: str | None = None, k: int | None = None) -> Completion:  # noqa: A002
    """Everything an adapter may answer, of one top-k width."""
    k = draw(st.integers(1, 4)) if k is None else k
    token_ids = draw(IDS)
    body = draw(st.none() | token_logprobs(length=len(token_ids), k=k))
    terminator = None
    if draw(st.booleans()):
        step = draw(st.none() | token_logprobs(length=1, k=k)) if body is not None else None
        terminator = Terminator(token_id=draw(st.integers(0, 2**31 - 1)), logprobs=step)
    prompt = draw(IDS)
    return Completion(
        id=draw(TEXTS) if id is None else id,
        prompt_token_ids=prompt,
        own_prompt_token_ids=draw(st.none() | st.just(prompt) | IDS),
        prompt_text=draw(st.none() | TEXTS),
        token_ids=token_ids,
        text=draw(st.none() | TEXTS),
        terminator=terminator,
        finish_reason=draw(st.sampled_from(FinishReason)),
        stop_reason=draw(st.none() | TEXTS | st.integers(0, 10)),
        logprobs=body,
        timing=Timing(submitted_ns=0, first_token_ns=draw(st.none() | st.integers(0, 9)), finished_ns=10),
    )


def bits(logprobs: TokenLogprobs) -> tuple[int, bytes, bytes, bytes]:
    """NaN differs from itself; its bits do not."""
    return logprobs.k, logprobs.chosen.tobytes(), logprobs.top_token_ids.tobytes(), logprobs.top.tobytes()


def over_the_wire(data: object) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


# Log-probabilities -------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(token_logprobs())
def test_log_probabilities_cross_the_wire_to_the_bit(sent: TokenLogprobs) -> None:
    arrived = TokenLogprobs.from_json(over_the_wire(sent.to_json()))
    assert bits(arrived) == bits(sent)
    assert (len(arrived), arrived.chosen.format, arrived.top_token_ids.format) == (len(sent), "f", "i")


def test_the_wire_is_little_endian() -> None:
    """Worked by hand: 4 bytes each, least significant first, in base64."""
    wire = TokenLogprobs.from_rows([-1.0], [[(258, -1.0)]], k=1).to_json()
    assert wire == {"k": 1, "chosen": "AACAvw==", "top_token_ids": "AgEAAA==", "top": "AACAvw=="}


def test_short_rows_are_filled_and_long_rows_are_cut() -> None:
    made = TokenLogprobs.from_rows([-0.5, -1.0, -2.0], [[(7, -0.5)], [(8, -1.0), (9, -3.0), (1, -4.0)], []], k=2)
    assert made.top_token_ids.tolist() == [7, NO_TOKEN, 8, 9, NO_TOKEN, NO_TOKEN]
    assert made.top.tolist() == [-0.5, -math.inf, -1.0, -3.0, -math.inf, -math.inf]
    assert [made.row(i) for i in range(3)] == [((7, -0.5),), ((8, -1.0), (9, -3.0)), ()]


@settings(max_examples=40)
@given(token_logprobs(), st.data())
def test_a_slice_holds_the_rows_of_its_positions(whole: TokenLogprobs, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    part = whole.rows(start, stop)
    assert len(part) == stop - start
    for position in range(start, stop):
        assert bits(part.rows(position - start, position - start + 1)) == bits(whole.rows(position, position + 1))
        assert repr(part.row(position - start)) == repr(whole.row(position))
    assert bits(TokenLogprobs.from_json(part.to_json())) == bits(part)


@settings(max_examples=40)
@given(token_logprobs())
def test_numpy_reads_the_buffers_in_place_and_nobody_writes_them(made: TokenLogprobs) -> None:
    for buffer, dtype in ((made.chosen, np.float32), (made.top, np.float32), (made.top_token_ids, np.int32)):
        assert np.frombuffer(buffer, dtype).tobytes() == buffer.tobytes()
        assert buffer.readonly
    assert len(made.top) == len(made.top_token_ids) == len(made) * made.k


def test_float32_is_what_is_kept() -> None:
    made = TokenLogprobs.from_rows([-0.1], [[(1, -0.1)]], k=1)
    assert made.chosen[0] == struct.unpack("f", struct.pack("f", -0.1))[0] != -0.1


# Completions -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(completions())
def test_a_completion_survives_the_wire(sent: Completion) -> None:
    arrived = Completion.from_json(over_the_wire(sent.to_json()))
    assert arrived.to_json() == sent.to_json()
    assert (arrived.own_prompt_token_ids, arrived.terminator is None) == (
        sent.own_prompt_token_ids,
        sent.terminator is None,
    )


@pytest.mark.parametrize(("own", "written"), [((1, 20, 21), "same"), (None, None), ((), []), ((1,), [1])])
def test_what_the_engines_own_tokenizer_made_is_written_short_and_read_back(
    own: tuple[int, ...] | None, written: object
) -> None:
    sent = recordings.completion(own_prompt_token_ids=own)
    assert sent.to_json()["own_prompt_token_ids"] == written
    assert Completion.from_json(sent.to_json()).own_prompt_token_ids == own


@settings(max_examples=40)
@given(st.lists(st.text(max_size=3), unique=True, max_size=6), st.data())
def test_missing_ids_are_what_was_asked_without_what_was_answered(asked: list[str], data: st.DataObject) -> None:
    done = data.draw(st.sets(st.sampled_from(asked))) if asked else set()
    answered = [recordings.completion(i) for i in sorted(done)]
    assert missing_ids(asked, answered) == tuple(i for i in asked if i not in done)


def test_a_recording_finds_completions_by_id_and_names_its_engine() -> None:
    made = recordings.recording(
        [recordings.completion("a"), recordings.completion("b")], engine="/somewhere/drill.py", version="3"
    )
    assert made.by_id["b"] is made.completions[1]
    assert made.label == "drill 3 float32"


# Facts -------------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
FACTS = st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)


@settings(max_examples=40)
@given(FACTS, FACTS, FACTS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_a_fingerprint_survives_the_wire(
    identity: dict[str, Any], context: dict[str, Any], health: dict[str, Any], packages: dict[str, str]
) -> None:
    sent = Fingerprint(identity=identity, context=context, health=health, packages=packages)
    assert Fingerprint.from_json(over_the_wire(sent.to_json())) == sent


@settings(max_examples=40)
@given(st.lists(st.text(max_size=4), max_size=3).map(tuple), FACTS)
def test_an_engine_spec_survives_the_wire(launcher: tuple[str, ...], options: dict[str, Any]) -> None:
    sent = EngineSpec(engine="vllm", model="m", dtype="auto", launcher=launcher, options=options, env={"A": "1"})
    assert EngineSpec.from_json(over_the_wire(sent.to_json())) == sent

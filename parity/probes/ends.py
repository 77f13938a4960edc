"""How answers begin and end: the first token, lengths, stop tokens and stop strings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise

from parity.probes.probe import Cause, Found, as_asked, many, otherwise, unknown
from parity.probes.questions import CHATS, Experiment
from parity.probes.seen import Seen
from parity.recording import Completion, FinishReason

_ENDS_MOVED = (Experiment.SCORE, Experiment.IGNORE_EOS, Experiment.MIN_TOKENS)
_FEWEST_RUN_ON = 3  # answers; a text may hold a token of the template by chance


def first_token(seen: Seen) -> Found:
    """The beginning-of-sequence token is not there twice.

    A template that writes it once is right, whatever else that token is used for.
    """
    beginnings = {c.id: c.own_prompt_token_ids or c.prompt_token_ids for c in seen.of(Experiment.BASE)}
    bos = seen.model_token_ids("bos_token_id")
    doubled = [i for i, ids in beginnings.items() if len(ids) > 1 and ids[0] == ids[1] and ids[0] in bos]
    if doubled:
        sentence = (
            f"{len(doubled)} of {many(len(beginnings), 'prompt')} begin with token {beginnings[doubled[0]][0]} twice"
        )
        witnesses = [f"{i}: {list(beginnings[i][:4])}" for i in doubled]
        return otherwise(Cause.BOS_DOUBLED, sentence, len(beginnings), witnesses)
    if not bos:
        return unknown("the model's configuration names no beginning-of-sequence token", len(beginnings))
    return as_asked(
        f"none of {many(len(beginnings), 'prompt')} begins with token {_listed(bos)} twice", len(beginnings)
    )


def max_tokens(seen: Seen) -> Found:
    """An answer that ends by length has max_tokens tokens, none has more, and the finish reason says how each ended."""
    given_up = [c.id for c in seen.recording.completions if c.finish_reason is FinishReason.ABORT]
    if given_up:
        sentence = f"{len(given_up)} of {many(len(seen.recording.completions), 'request')} were given up"
        return otherwise(Cause.GIVES_UP, sentence, len(seen.recording.completions), given_up)
    answers = [c for c in seen.answers if seen.experiment(c) is not Experiment.SCORE]
    wrong = [c for c in answers if _has_wrong_length(c, seen.asked(c).max_tokens)]
    if wrong:
        shown = [f"{c.id}: {many(len(c.token_ids), 'token')} for max_tokens {seen.asked(c).max_tokens}" for c in wrong]
        sentence = f"{len(wrong)} of {many(len(answers), 'answer')} have the wrong length, as {shown[0]}"
        return otherwise(Cause.MAX_TOKENS_OTHER, sentence, len(answers), shown)
    # An unnamed end by a stop string is a matter of that probe.
    unclear = [c for c in answers if not seen.asked(c).stop and (c.finish_reason is FinishReason.STOP) != _has_end(c)]
    if unclear:
        shown = [f"{c.id}: {c.finish_reason.value}, {_end(c)}" for c in unclear]
        sentence = f"the finish reason of {len(unclear)} of {many(len(answers), 'answer')} is wrong"
        return otherwise(Cause.FINISH_REASON_WRONG, sentence, len(answers), shown)
    by_length = sum(c.finish_reason is FinishReason.LENGTH for c in answers)
    asked = sorted({seen.asked(c).max_tokens for c in seen.of(Experiment.MAX_TOKENS)})
    sentence = f"{by_length} of {many(len(answers), 'answer')} end by length, each with as many tokens as were asked"
    return as_asked(sentence + f" ({', '.join(map(str, asked))} on one question)" * bool(asked), len(answers))


def _has_wrong_length(answer: Completion, wanted: int) -> bool:
    count = len(answer.token_ids)
    return count > wanted or (answer.finish_reason is FinishReason.LENGTH and count < wanted)


def _has_end(answer: Completion) -> bool:
    return answer.terminator is not None or answer.stop_reason is not None


def _end(answer: Completion) -> str:
    if answer.terminator is not None:
        return f"ended by token {answer.terminator.token_id}"
    return "no stop token" if answer.stop_reason is None else f"ended by {answer.stop_reason!r}"


def min_tokens(seen: Seen) -> Found:
    """An answer that ends by itself goes on to min_tokens."""
    return _goes_on(
        seen,
        Experiment.MIN_TOKENS,
        ended=lambda c: c.finish_reason is FinishReason.STOP and len(c.token_ids) < seen.asked(c).min_tokens,
        cause=Cause.MIN_TOKENS_IGNORED,
    )


def ignore_eos(seen: Seen) -> Found:
    """An answer that ends by itself goes on to max_tokens."""
    return _goes_on(
        seen,
        Experiment.IGNORE_EOS,
        ended=lambda c: c.finish_reason is FinishReason.STOP,
        cause=Cause.IGNORE_EOS_IGNORED,
    )


def _goes_on(seen: Seen, experiment: Experiment, *, ended: Callable[[Completion], bool], cause: Cause) -> Found:
    answers, name = seen.of(experiment), experiment.value
    if not answers:
        return unknown(f"no base answer was short enough and ended by itself, so {name} had nothing to change")
    wrong = [c for c in answers if ended(c)]
    if wrong:
        shown = [f"{c.id}: {many(len(c.token_ids), 'token')}, {_end(c)}" for c in wrong]
        return otherwise(
            cause, f"{len(wrong)} of {many(len(answers), 'answer')} end in spite of {name}", len(answers), shown
        )
    return as_asked(f"{many(len(answers), 'answer')} go on past the end that they had without {name}", len(answers))


def stop_token(seen: Seen) -> Found:
    """A token of the base answer, given as a stop token, ends the answer."""
    stopped: list[Completion] = []
    passed: list[str] = []
    for answer in seen.of(Experiment.STOP_TOKEN):
        (token_id,) = seen.asked(answer).stop_token_ids
        end = answer.stop_reason if answer.terminator is None else answer.terminator.token_id
        if token_id in answer.token_ids:
            passed.append(f"{answer.id}: goes on after token {token_id} at position {answer.token_ids.index(token_id)}")
        elif answer.finish_reason is FinishReason.STOP and end == token_id:
            stopped.append(answer)
    n = len(stopped) + len(passed)
    if passed:
        return otherwise(Cause.STOP_TOKEN_IGNORED, f"{len(passed)} of {many(n, 'answer')} go on", n, passed)
    if not stopped:
        return unknown("no answer came to a stop token: the base answers are short, or were answered otherwise again")
    return as_asked(f"{many(n, 'answer')} end at the token asked, and name it", n)


def stop_string(seen: Seen) -> Found:
    """A string of the base answer's text, given as a stop string, ends the answer, is not in its text, and is named."""
    faults: dict[Cause, list[str]] = {}
    stopped: list[Completion] = []
    for answer in seen.of(Experiment.STOP_AT_WORDS, Experiment.STOP_INSIDE_WORD):
        (stop,), text, base = seen.asked(answer).stop, answer.text, seen.base(answer)
        if text is None:
            continue
        whole = answer.decoded_text or (base.text if base is not None else None) or ""
        named = answer.finish_reason is FinishReason.STOP and answer.stop_reason == stop
        if named and stop not in text:
            stopped.append(answer)
        elif named or stop in text:
            cause = Cause.STOP_STRING_KEPT if named else Cause.STOP_STRING_IGNORED
            faults.setdefault(cause, []).append(f"{answer.id}: {stop!r} is in {text!r}")
        elif answer.terminator is None and len(text) < len(whole) and whole.startswith(text + stop):
            shown = f"{answer.id}: cut before {stop!r}, reason {answer.stop_reason!r}"
            faults.setdefault(Cause.STOP_STRING_UNNAMED, []).append(shown)
    n = len(stopped) + sum(map(len, faults.values()))
    if not n:
        return unknown(
            "no answer came to a stop string: the base answers hold no two words, or were answered otherwise"
        )
    if not faults:
        return as_asked(f"{many(n, 'answer')} end before the string asked, within a token too, and name it", n)
    cause, witnesses = next(iter(faults.items()))
    if cause is Cause.STOP_STRING_IGNORED and _only_inside_a_word(witnesses, stopped):
        cause = Cause.STOP_STRING_BY_TOKENS
    return otherwise(cause, f"{len(witnesses)} of {many(n, 'answer')} do not end as asked", n, witnesses)


def _only_inside_a_word(ignored: Sequence[str], stopped: Sequence[Completion]) -> bool:
    inside = f"{Experiment.STOP_INSIDE_WORD.value}:"
    return all(i.startswith(inside) for i in ignored) and any(not c.id.startswith(inside) for c in stopped)


def end_of_sequence(seen: Seen) -> Found:
    """The model's end-of-sequence tokens end answers, and some base answers end by themselves."""
    ends = seen.model_token_ids("eos_token_id")
    answers = [c for c in seen.answers if seen.experiment(c) not in _ENDS_MOVED]
    inside = [(c, token_id) for c in answers for token_id in [i for i in c.token_ids if i in ends][:1]]
    if inside:
        shown = [f"{c.id}: goes on after token {i} at position {c.token_ids.index(i)}" for c, i in inside]
        sentence = f"{len(inside)} of {many(len(answers), 'answer')} go on after an end-of-sequence token"
        return otherwise(Cause.END_PASSED, sentence, len(answers), shown)
    base = seen.of(Experiment.BASE)
    run_on = _end_of_turn(base)
    if run_on is not None:
        token_id, holders = run_on
        sentence = (
            f"no answer in a chat ends by itself, and {len(holders)} go on after token {token_id}, with which the "
        )
        return otherwise(Cause.END_OF_TURN_PASSED, f"{sentence}chat template goes on too", len(base), holders)
    by = {c.terminator.token_id for c in base if c.terminator is not None}
    if not by:
        return unknown(
            f"none of {many(len(base), 'base answer')} ends by itself, so nothing shows what ends one", len(base)
        )
    ended = sum(c.terminator is not None for c in base)
    sentence = (
        f"{ended} of {many(len(base), 'base answer')} end by themselves, at token {_listed(by)}; none goes on after "
    )
    return as_asked(f"{sentence}an end-of-sequence token", len(answers))


def _end_of_turn(base: Sequence[Completion]) -> tuple[int, list[str]] | None:
    """A token after which several answers go on as the chat template does, where no answer in a chat ends.

    An engine that lacks the token with which the template ends messages shows exactly this: the model ends its turn and
    then plays the next one. A token that texts without a template hold is no such token.
    """
    chats, texts = [[c for c in base if (c.id in CHATS) is chat] for chat in (True, False)]
    if not chats or any(c.terminator is not None for c in chats):
        return None
    template = set.intersection(*(set(pairwise(c.prompt_token_ids)) for c in chats))
    ordinary = {token_id for c in texts for token_id in (*c.prompt_token_ids, *c.token_ids)}
    holders = defaultdict(list)
    for c in chats:
        after = (
            one for one, following in pairwise(c.token_ids) if (one, following) in template and one not in ordinary
        )
        for token_id in islice(after, 1):
            holders[token_id].append(c.id)
    most = max(holders.items(), key=lambda item: len(item[1]), default=None)
    return most if most is not None and len(most[1]) >= _FEWEST_RUN_ON else None


def _listed(token_ids: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(token_ids)))

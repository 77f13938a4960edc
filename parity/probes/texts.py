"""Whether the text is that of the tokens, given whole and streamed.

U+FFFD at the very end is left aside: of a character that an answer cuts in two, some engines hold the first bytes back
and others show them so.
"""

from __future__ import annotations

from collections.abc import Sequence

from parity import detokenised
from parity.comparable import first_difference
from parity.divergence import Kind, Scale, compare
from parity.probes.probe import Cause, Found, as_asked, many, otherwise, unknown
from parity.probes.questions import Experiment
from parity.probes.seen import Seen

_EXCERPT = 20
_BENIGN_SIGMAS, _MISMATCH_SIGMAS = 6.0, 25.0  # as in the greedy check
_FEWEST_SUSPICIOUS = 2  # of three: one in 400 is suspicious by chance, two are once in 50,000 runs
_CAUSES = (Cause.TEXT_CHARACTERS, Cause.TEXT_SPACES, Cause.TEXT_OTHER)
_Texts = tuple[str, str, str]  # an answer's id, its text, and what the text should be


def text(seen: Seen) -> Found:
    """An answer's text is what its tokens decode to, all at once; a stop string cuts it short."""
    streamed = {c.id for c in seen.of(Experiment.STREAM)}
    answers = [c for c in seen.answers if c.text is not None and c.id not in streamed]
    if not answers:
        return unknown("the engine returned no texts")
    apart, kept = [], []
    for c in answers:
        whole, given = c.decoded_text or c.text or "", c.text or ""
        cut = bool(seen.asked(c).stop) and whole.startswith(given)
        if not cut and not detokenised.alike(given, whole):
            apart.append((c.id, given, whole))
            # A stop token's own text behind that of all tokens before it.
            kept.append(bool(seen.asked(c).stop_token_ids) and c.terminator is not None and given.startswith(whole))
    if apart and all(kept):
        sentence = f"{many(len(apart), 'text')} of {len(answers)} hold the stop token too"
        return otherwise(Cause.STOP_TOKEN_KEPT, sentence, len(answers), list(map(_witness, apart)))
    if apart:
        sentence = f"{len(apart)} of {many(len(answers), 'text')} are not what their tokens decode to"
        return otherwise(_cause(apart), sentence, len(answers), list(map(_witness, apart)))
    return as_asked(f"each of {many(len(answers), 'text')} is what its tokens decode to", len(answers))


def stream(seen: Seen) -> Found:
    """A streamed answer has the tokens and the text of the same answer given whole.

    Where rounding moves a token, the streamed text is held against its own tokens.
    """
    pairs = [(base, c) for c in seen.of(Experiment.STREAM) if (base := seen.base(c)) is not None]
    if not pairs:
        can = seen.recording.fingerprint.context.get("engine.can_stream") is True
        return unknown(
            "the engine gave the streamed answers up" if can else "the engine does not say that it can stream"
        )
    sigma = seen.sigma_nats
    scale = Scale(tie_nats=0.0, benign_nats=_BENIGN_SIGMAS * sigma, mismatch_nats=_MISMATCH_SIGMAS * sigma)
    compared = [compare(*pair, scale) for pair in pairs]
    parted = [p for p in compared if p.kind in (Kind.MISMATCH, Kind.LENGTH)]
    suspicious = [p for p in compared if p.kind is Kind.SUSPICIOUS]
    if len(suspicious) >= _FEWEST_SUSPICIOUS:
        parted += suspicious
    if parted:
        sentence = (
            f"{len(parted)} of {many(len(pairs), 'streamed answer')} part from the whole ones, which rounding cannot"
        )
        witnesses = [f"{p.candidate.id}: parts at token {p.position}" for p in parted]
        return otherwise(Cause.STREAM_TOKENS, sentence, len(pairs), witnesses)
    apart = []
    for p in compared:
        given, own = p.candidate.text or "", p.candidate.decoded_text
        whole = p.reference.text if p.kind is Kind.IDENTICAL else own
        if whole is not None and not detokenised.alike(given, whole):
            apart.append((p.candidate.id, given, whole))
    if apart:
        sentence = f"{len(apart)} of {many(len(pairs), 'streamed text')} are not those of the whole answers"
        return otherwise(_cause(apart), sentence, len(pairs), list(map(_witness, apart)))
    unsure = len(suspicious) + sum(p.kind is Kind.UNKNOWN for p in compared)
    if unsure:
        return unknown(
            f"{unsure} of {many(len(pairs), 'streamed answer')} have other tokens, perhaps by rounding", len(pairs)
        )
    equal = sum(p.kind is Kind.IDENTICAL for p in compared)
    sentence = f"{equal} of {many(len(pairs), 'streamed answer')} equal the whole ones"
    return as_asked(sentence + ", the others part as rounding makes them" * (equal < len(pairs)), len(pairs))


def _cause(apart: Sequence[_Texts]) -> Cause:
    return min((_cause_of(given, whole) for _, given, whole in apart), key=_CAUSES.index)


def _cause_of(given: str, whole: str) -> Cause:
    if given.count("\ufffd") > whole.count("\ufffd"):
        return Cause.TEXT_CHARACTERS
    return Cause.TEXT_SPACES if "".join(given.split()) == "".join(whole.split()) else Cause.TEXT_OTHER


def _witness(texts: _Texts) -> str:
    id_, given, whole = texts
    at = first_difference(given, whole)
    start = max(0, at - _EXCERPT // 2)
    return f"{id_}: {given[start : at + _EXCERPT]!r} where its tokens are {whole[start : at + _EXCERPT]!r}"

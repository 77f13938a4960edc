"""Examples for the laws of `parity.laws`: drawn at random, asked of an engine, and shrunk where one breaks a law.

Hypothesis draws and we shrink: an engine answers a hundred prompts in one batch in hardly more time than one, so a
round proposes many smaller examples at once and asks them together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parity.checks import laws as check
from parity.errors import ConfigError
from parity.laws import LAWS, Law, Role, Rules, Weight, cases_of, described
from parity.noise import Noise
from parity.prompts import Message, Prompt, Request, SamplingParams, Workload
from parity.recording import Recording
from parity.verdict import Outcome, Verdict

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LONGEST = 24
"""The most tokens that an example asks for: most laws break early, and every token is asked eight times."""
_LOGPROBS = 20
_LONG_BYTES = 1200  # no tokenizer makes more tokens of a text than it has bytes
_TEMPLATE_BYTES = 100
_STEP_BYTES = 2000
_NEIGHBOURS = 16
_APART = (Role.ALONE, Role.SEEDED, Role.AGAIN)
_ENTROPY_BYTES = 1 << 14
_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt with the parameters that it is asked with.

    chat: the prompt is a user's message; else it is a text to go on with, which must not be empty.
    short, long: max_tokens n and m, 1 <= n < m.
    stop: at least one stop string.
    temperature, seed: of the sampled requests; top_k of those with a seed.

    Raises:
        ValueError: If these do not hold; an engine could not be blamed for its answers.
    """

    prompt: str
    chat: bool
    short: int
    long: int
    min_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        if not (self.prompt or self.chat) or not all(self.stop) or not self.stop:
            raise ValueError(f"a text prompt and stop strings must not be empty: {self}")
        if not (1 <= self.short < self.long and 0 <= self.min_tokens <= self.long and self.top_k > 1):
            raise ValueError(f"1 <= short < long, 0 <= min_tokens <= long and top_k > 1 must hold: {self}")
        if self.temperature <= 0.0:
            raise ValueError(f"a sampled request needs a temperature above 0: {self}")


def workload(examples: Sequence[Example], *, can_stream: bool) -> Workload:
    """All requests of these examples; their ids say which is which.

    Most go in one large batch. What must not depend on it, and what has a seed, comes in small later turns, whose
    prompts fit into one step of the engine: vLLM 0.32.0 on a CPU ends with an error where the prompt of a request with
    a seed is split between two.
    """
    requests: list[Request] = []
    for number, (example, group) in enumerate(zip(examples, _groups(examples), strict=True)):
        for role, sampling in _samplings(example).items():
            if role is Role.STREAM and not can_stream:
                continue
            name = role.id_of(f"{number:03}")
            prompt = (
                Prompt(id=name, messages=(Message(role="user", content=example.prompt),))
                if example.chat
                else Prompt(id=name, text=example.prompt)
            )
            turn = len(_APART) * group + _APART.index(role) + 1 if role in _APART else 0
            requests.append(Request(prompt=prompt, sampling=sampling, turn=turn, stream=role is Role.STREAM))
    return Workload(name="laws", requests=tuple(requests))


def _groups(examples: Sequence[Example]) -> list[int]:
    """For each example the number of its group; the prompts of a group are few and short enough for one step."""
    groups: list[int] = []
    members, size = 0, 0
    for example in examples:
        more = len(example.prompt.encode()) + _TEMPLATE_BYTES
        if members == _NEIGHBOURS or size + more > _STEP_BYTES:
            members, size = 0, 0
        members, size = members + 1, size + more
        groups.append((groups[-1] if groups else -1) + (members == 1))
    return groups


def _samplings(example: Example) -> Mapping[Role, SamplingParams]:
    plain = SamplingParams.greedy(max_tokens=example.long, logprobs=_LOGPROBS)
    stopped = replace(plain, stop=example.stop)
    seeded = replace(plain, temperature=example.temperature, top_k=example.top_k, seed=example.seed)
    return {
        Role.LONG: plain,
        Role.SHORT: replace(plain, max_tokens=example.short),
        Role.AT_LEAST: replace(plain, min_tokens=example.min_tokens),
        Role.STOP: stopped,
        Role.STREAM: stopped,
        Role.ALONE: plain,
        Role.TOP_1: replace(seeded, top_k=1, seed=None),
        Role.SEEDED: seeded,
        Role.AGAIN: seeded,
    }


# Drawing -------------------------------------------------------------------------------------------------------------

_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "[INST]", "[/INST]", "<unk>", "<|eot_id|>")
_ORDINARY = (
    "Say yes.",
    "What is the capital of France? One word.",
    "Count from one to ten.",
    "Write a short poem about the sea.",
    "The quick brown fox jumps over the lazy dog",
    "Once upon a time there was a",
    "Repeat after me: apple, banana, cherry.",
    "Translate to Spanish: I have no money, but I have time.",
    "Answer with nothing.",
    "Why is the sky blue?",
)
_CODE = (
    "def add(a, b):\n    return ",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "SELECT name FROM users WHERE id = '1' OR '1'='1';",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9"}',
    "#!/bin/sh\nset -e\necho \"$HOME\" | sed 's/\\//_/g'",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
)
_WHITE = " \t\n\r\v\f\x00\u00a0\u200b\u2003\u2028\u3000\ufeff"
_EMOJI = ("😀", "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "❤️", "🏴‍☠️", "🧑‍🚀", "☃", "#️⃣")
_MARKS = "\u0301\u0308\u0327\u0338\u20dd\u0e49\u05b8\u0651\u094d\u200d\u202e"
# First and last letter: Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, Georgian; Hangul, Ethiopic, Khmer,
# kana, Han, Han beyond the basic plane, Gothic, mathematical letters.
_SCRIPTS = (
    *("\u00c0\u024f", "\u0391\u03c9", "\u0410\u044f", "\u05d0\u05ea", "\u0621\u064a", "\u0905\u0939", "\u0e01\u0e2e"),
    *("\u10d0\u10f0", "\uac00\ud7a3", "\u1200\u1248", "\u1780\u17a2", "\u3041\u30fe", "\u4e00\u9fa5"),
    *("\U00020000\U0002a6d6", "\U00010330\U0001034a", "\U0001d400\U0001d433"),
)
_STOPS = (
    *("e", "a", "o", "t", "1", " ", ".", ",", ":", "\n", "\n\n", "the", " the", "in", "ing", "is", ", ", "I "),
    *("\u00e9", "\u3002", "<|", "\U0001f642"),
)


def draw(count: int, seed: int) -> tuple[Example, ...]:
    """`count` examples that follow from `seed`: the same everywhere with one version of Hypothesis.

    Fewer are the beginning of more.

    Raises:
        ConfigError: If the package hypothesis is missing.
    """
    try:
        import hypothesis  # noqa: PLC0415  an optional extra
        from hypothesis import strategies  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"drawing examples needs the Python package 'hypothesis', which cannot be imported ({error}); "
            "run: pip install 'engine-parity[properties]'"
        ) from error
    drawn: list[Example] = []

    @hypothesis.settings(database=None)
    @hypothesis.given(_examples(strategies))
    def collect(example: Example) -> None:
        drawn.append(example)

    # Not by calling `collect` under a fixed seed: Hypothesis then mixes in constants of whatever modules happen to be
    # loaded, so that one seed would mean other examples in pytest than on the command line.
    for place in range(2 * count):
        if len(drawn) < count:
            entropy = random.Random(f"{seed}:{place}").randbytes(_ENTROPY_BYTES)  # noqa: S311  no secret
            collect.hypothesis.fuzz_one_input(entropy)  # type: ignore[attr-defined]
    return tuple(drawn)


def _examples(st: Any) -> SearchStrategy[Example]:
    """`st` is `hypothesis.strategies`."""
    prompts = _prompts(st)

    @st.composite  # type: ignore[untyped-decorator]
    def example(pick: Callable[[SearchStrategy[Any]], Any]) -> Example:
        prompt = pick(prompts)
        long = pick(st.integers(2, LONGEST))
        return Example(
            prompt=prompt,
            chat=pick(st.booleans()) if prompt else True,
            short=pick(st.integers(1, long - 1)),
            long=long,
            min_tokens=pick(st.integers(0, long)),
            stop=tuple(pick(st.lists(st.sampled_from(_STOPS), min_size=1, max_size=3, unique=True))),
            temperature=pick(st.sampled_from((0.3, 0.7, 1.0, 1.5))),
            top_k=pick(st.integers(2, 8)),
            seed=pick(st.integers(0, 2**31 - 1)),
        )

    found: SearchStrategy[Example] = example()
    return found


def _prompts(st: Any) -> SearchStrategy[str]:
    """Mostly short; of every dozen about one is long."""
    special = st.sampled_from(_SPECIAL)
    ordinary = st.sampled_from(_ORDINARY)
    script = st.sampled_from(_SCRIPTS).flatmap(
        lambda ends: st.text(
            st.characters(min_codepoint=ord(ends[0]), max_codepoint=ord(ends[1])), min_size=1, max_size=20
        )
    )
    white = st.text(_WHITE, min_size=1, max_size=6)
    digits = st.text("0123456789., -+", min_size=1, max_size=30)
    marked = st.tuples(st.sampled_from("aeo\u0e01\u05d0\u0639"), st.text(_MARKS, min_size=1, max_size=8)).map("".join)
    cut = st.tuples(special, st.integers(1, 10), st.booleans()).map(
        lambda parts: parts[0][: parts[1]] if parts[2] else parts[0][-parts[1] :]
    )
    emoji, code = st.sampled_from(_EMOJI), st.sampled_from(_CODE)
    short = (ordinary, script, white, digits, marked, special, cut, emoji, code)
    mixed = st.lists(st.one_of(short), min_size=2, max_size=6).map("".join)
    long = st.tuples(st.one_of(script, digits, emoji, ordinary, special), st.integers(1, _LONG_BYTES)).map(
        lambda parts: parts[0] * max(1, parts[1] // len(parts[0].encode()))
    )
    kinds = (*short, ordinary, ordinary, mixed, mixed, mixed, mixed, long, st.just(""))
    found: SearchStrategy[str] = st.sampled_from(range(len(kinds))).flatmap(lambda kind: kinds[kind])
    return found


# Searching -----------------------------------------------------------------------------------------------------------


def search(
    ask: Callable[[Workload], Recording], *, count: int, seed: int, can_stream: bool, noise: Noise | None
) -> Verdict:
    """Draw examples, ask them once, judge, and shrink the smallest failing example of each broken law.

    ask: answers a workload on the engine; called once, and where laws are broken at most four times more. The evidence
    of a broken law then ends with the smallest example that still breaks it and how to see it again.

    Raises:
        ConfigError: If the package hypothesis is missing.
    """
    examples, limits = draw(count, seed), check.Limits()
    rules = check.rules_of(noise, limits)
    recording = ask(workload(examples, can_stream=can_stream))
    verdict = check.check(None, recording, noise=noise, limits=limits)
    failed = {f.metric for f in verdict.findings if f.outcome is Outcome.FAIL}
    broken = [law for law in LAWS if law.name in failed]
    found = [_weights(law, recording, rules) for law in broken]
    # Suspicious breaches are followed only where nothing better is known: chance makes some of them.
    heavy = [{Weight.PROVEN} if Weight.PROVEN in w.values() else {Weight.PROVEN, Weight.SUSPICIOUS} for w in found]
    failing = [
        min((examples[place] for place, weight in weights.items() if weight in counted), key=_size)
        for weights, counted in zip(found, heavy, strict=True)
    ]

    def breaks(proposals: Mapping[int, Sequence[Example]]) -> dict[int, list[bool]]:
        asked = [example for group in proposals.values() for example in group]
        answered, start, answers = ask(workload(asked, can_stream=can_stream)), 0, {}
        for place, group in proposals.items():
            weights = _weights(broken[place], answered, rules)
            answers[place] = [weights.get(start + i) in heavy[place] for i in range(len(group))]
            start += len(group)
        return answers

    smallest = {law.name: e for law, e in zip(broken, _shrink_all(failing, breaks, _ROUNDS), strict=True)}
    again = f"see it again: parity laws TARGET --seed {seed} --examples {count}"
    findings = tuple(
        replace(f, evidence=(*f.evidence, _minimal(smallest[f.metric]), again)) if f.metric in smallest else f
        for f in verdict.findings
    )
    return replace(verdict, findings=findings)


def _weights(law: Law, recording: Recording, rules: Rules) -> dict[int, Weight]:
    """What each example that breaks a law is worth, by its place in the workload."""
    seen = {int(c.number): law.look(c, rules) for c in cases_of(recording) if law.needs <= c.answers.keys()}
    return {place: s.breaches[0].weight for place, s in seen.items() if s.breaches}


def _minimal(example: Example) -> str:
    form = "chat message" if example.chat else "text"
    return f"smallest found that breaks it: {form} {example.prompt!r}; {described(_samplings(example))}"


# Shrinking -----------------------------------------------------------------------------------------------------------


def shrink(
    failing: Example, broken: Callable[[Sequence[Example]], Sequence[bool]], *, rounds: int = _ROUNDS
) -> Example:
    """The smallest example found that still breaks, at the cost of at most `rounds` calls of `broken`.

    broken: says of each proposed example whether it breaks; one call is one batch of an engine.
    """
    (smallest,) = _shrink_all([failing], lambda proposals: {0: broken(proposals[0])}, rounds)
    return smallest


def _shrink_all(
    failing: Sequence[Example],
    breaks: Callable[[Mapping[int, Sequence[Example]]], Mapping[int, Sequence[bool]]],
    rounds: int,
) -> list[Example]:
    """Shrink some examples side by side; `breaks` is asked once a round, with the proposals for each by its place."""
    smallest, going = list(failing), list(range(len(failing)))
    for _ in range(rounds):
        proposals = {place: found for place in going if (found := _smaller(smallest[place]))}
        if not proposals:
            break
        answers = breaks(proposals)
        going = []
        for place, proposed in proposals.items():
            # The proposals come smallest first.
            still = next((e for e, yes in zip(proposed, answers[place], strict=True) if yes), None)
            if still is not None:
                smallest[place] = still
                going.append(place)
    return smallest


def _smaller(example: Example) -> tuple[Example, ...]:
    """Examples that are simpler in the prompt, in one parameter, or in nearly all at once; smallest first."""
    plainer = replace(example, short=1, min_tokens=0, stop=example.stop[:1], temperature=1.0, top_k=2, seed=0)
    half = max(example.short + 1, example.long // 2)
    found = {
        plainer,
        replace(plainer, long=2),
        replace(plainer, long=half),
        replace(plainer, long=half, min_tokens=min(half, example.min_tokens)),
        replace(plainer, min_tokens=example.min_tokens),
        replace(example, short=1),
        replace(example, min_tokens=0),
        replace(example, min_tokens=example.min_tokens // 2),
        replace(example, long=half, min_tokens=min(half, example.min_tokens)),
        replace(example, chat=not example.prompt),
        *(replace(example, stop=(stop,)) for stop in example.stop),
    }
    for text in _smaller_texts(example.prompt):
        if text or example.chat:
            found |= {replace(example, prompt=text), replace(plainer, prompt=text, long=2, chat=not text)}
    return tuple(sorted((e for e in found if _size(e) < _size(example)), key=_size))


def _smaller_texts(text: str) -> list[str]:
    """Halves, quarters, eighths; the text without each quarter; its special pieces and first characters alone."""
    found = ["", "a" * len(text), *(piece for piece in _SPECIAL if piece in text), *dict.fromkeys(text[:3] + text[-1:])]
    for parts in (2, 4, 8):
        edges = [len(text) * part // parts for part in range(parts + 1)]
        for start, stop in itertools.pairwise(edges):
            found += [text[start:stop], text[:start] + text[stop:]] if parts < 8 else [text[start:stop]]
    return found


def _size(example: Example) -> tuple[object, ...]:
    """What a person has to read, most important first; the rest only decides between equals."""
    other = sum(not character.isascii() for character in example.prompt)
    parameters = (example.long, example.short, example.min_tokens, len(example.stop), sum(map(len, example.stop)))
    rest = (example.chat, example.temperature != 1.0, example.top_k, example.seed, example.prompt, example.stop)
    return (len(example.prompt), other, *parameters, *rest)

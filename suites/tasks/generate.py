"""Writes the documents of the local tasks: `python suites/tasks/generate.py` rewrites `data/*.jsonl`, byte for byte.

Standard library only. Everything random is drawn from `random.Random.random`, which Python promises to repeat for a
seed on every version and machine, which it does not for `shuffle` and `sample`; each task has a seed of its own, so a
change to one leaves the others as they were.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomllib

HERE = Path(__file__).parent
T = TypeVar("T")
Document = dict[str, Any]


class Draw:
    """Seeded choices."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, stop: int) -> int:
        """A whole number from 0 to stop - 1."""
        return int(self._random() * stop)

    def between(self, first: int, last: int) -> int:
        """A whole number from first to last."""
        return first + self.below(last - first + 1)

    def one(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def some(self, values: Sequence[T], count: int) -> list[T]:
        """`count` different places of the values, in random order."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """All of them, in random order."""
        return self.some(values, len(values))


class Facts:
    """The word lists of facts.toml."""

    def __init__(self, path: Path) -> None:
        self._tables: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))

    def words(self, name: str) -> list[str]:
        """A list."""
        return _words(self._tables[name])

    def pairs(self, name: str) -> list[tuple[str, str]]:
        """A list of pairs."""
        return _pairs(self._tables[name])

    def rows(self, name: str) -> list[list[str]]:
        """A table: a line each, cells between bars."""
        return [[cell.strip() for cell in line.split("|")] for line in self._tables[name].strip().splitlines()]

    def groups(self, name: str) -> dict[str, list[tuple[str, str]]]:
        """Pairs by group; of a plain word the second half is empty."""
        return {group: _pairs(text) for group, text in self._tables[name].items()}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.replace("\n", " ").split(",")]


def _pairs(text: str) -> list[tuple[str, str]]:
    halves = (word.partition(":") for word in _words(text))
    return [(left.strip(), right.strip()) for left, _, right in halves]


FACTS = Facts(HERE / "facts.toml")


def choose(draw: Draw, text: str, right: str, wrong: Sequence[str], *, cluster: str | None = None) -> Document:
    """A question with its choices, the right one at a random place."""
    choices = draw.shuffled([right, *wrong])
    return {"cluster": cluster, "text": text, "choices": choices, "gold": choices.index(right)}


def answer(text: str, target: str, *, cluster: str | None = None) -> Document:
    """A prompt and the one answer that is right."""
    return {"cluster": cluster, "text": text, "target": target}


def distinct(count: int, make: Callable[[], Document]) -> list[Document]:
    """That many documents, no two with the same text."""
    found: dict[str, Document] = {}
    while len(found) < count:
        document = make()
        found.setdefault(document["text"], document)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------ numbers


def arithmetic(draw: Draw) -> list[Document]:
    """Sums of a number of one or two digits and a digit."""

    def asked(last: int) -> Document:
        a, b = draw.between(1 if last < 10 else 10, last), draw.between(1, 9)
        return answer(f"{a} + {b} =", str(a + b))

    return [*distinct(50, lambda: asked(9)), *distinct(100, lambda: asked(40))]


def sums(draw: Draw) -> list[Document]:
    """Sums of two small numbers, to be chosen among sums that are well off."""

    def asked() -> Document:
        a, b = draw.between(2, 40), draw.between(2, 9)
        wrong = [n for n in range(4, 50) if abs(n - a - b) > 4]
        return choose(draw, f"{a} + {b} =", str(a + b), [str(n) for n in draw.some(wrong, 3)])

    return distinct(100, asked)


def counting(draw: Draw) -> list[Document]:
    """The number that follows a number."""

    def asked() -> Document:
        number = draw.between(130, 999)
        return answer(f"after {number} comes", str(number + 1))

    return distinct(100, asked)


UNITS, TENS = FACTS.words("units"), FACTS.words("tens")


def spelled(number: int) -> str:
    """A number below 1,000 in words."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    return f"{UNITS[number // 100]} hundred" + (f" and {spelled(number % 100)}" if number % 100 else "")


def numerals(draw: Draw) -> list[Document]:
    """Numbers in words, to be written in digits."""

    def asked() -> Document:
        number = draw.between(21, 999)
        return answer(f"{spelled(number)} =", str(number))

    return distinct(120, asked)


def sorting(draw: Draw) -> list[Document]:
    """Four digits, to be written in order."""

    def asked() -> Document:
        numbers = draw.some(range(1, 10), 4)
        return answer(" ".join(map(str, numbers)) + " ->", " ".join(map(str, sorted(numbers))))

    return distinct(120, asked)


# ------------------------------------------------------------------------------------------------------------ writing


def copying(draw: Draw) -> list[Document]:
    """Lists of words or letters, to be repeated."""
    words = FACTS.words("things") + FACTS.words("places") + FACTS.words("colours")

    def asked(values: Sequence[str], count: int) -> Document:
        row = " ".join(draw.one(values) for _ in range(count))
        return answer(f"{row} ->", row)

    of_words = [document for n in (3, 4, 5, 6, 8) for document in distinct(26, lambda n=n: asked(words, n))]  # type: ignore[misc]
    return of_words + distinct(30, lambda: asked("abcdefgh", 4))


def selecting(draw: Draw) -> list[Document]:
    """The last word of a list."""
    words = FACTS.words("things") + FACTS.words("places") + FACTS.words("colours")

    def asked() -> Document:
        row = draw.some(words, draw.between(3, 6))
        return answer(f"{' '.join(row)} ->", row[-1])

    return distinct(120, asked)


def capitals(draw: Draw) -> list[Document]:
    """Words in small letters, to be written in capital letters."""
    members = [member for members in FACTS.groups("kinds").values() for member, _ in members if member.islower()]
    return [answer(f"{word} ->", word.upper()) for word in draw.some(members, 120)]


def inflection(_: Draw) -> list[Document]:
    """Plurals and past tenses."""
    plurals = [answer(f"one {one}, two", many) for one, many in FACTS.pairs("plurals")]
    return plurals + [answer(f"today I {now}, yesterday I", then) for now, then in FACTS.pairs("pasts")]


def extraction(draw: Draw) -> list[Document]:
    """One field of a record that is told in a sentence, as JSON."""

    def asked() -> Document:
        name, job, city = (draw.one(FACTS.words(kind)) for kind in ("names", "jobs", "cities"))
        age, number = draw.between(18, 79), draw.between(1000, 9999)
        record = {"name": name, "age": age, "city": city, "job": job, "id": number}
        field = draw.one(list(record))
        sentence = draw.one(
            [
                f"{name} from {city} is {age} years old and works as a {job} under number {number}.",
                f"Number {number} belongs to {name}, a {job} of {age} who lives in {city}.",
                f"The {job} {name}, number {number}, moved to {city} at the age of {age}.",
            ]
        )
        return answer(f'Text: {sentence}\nJSON: {{"{field}":', json.dumps(record[field]))

    return distinct(150, asked)


def needle(draw: Draw, *, sentences: int, count: int) -> list[Document]:
    """A passage in which three things have a code; the code of one is asked for."""

    def asked() -> Document:
        things = [f"{draw.one(FACTS.words('colours'))} {thing}" for thing in draw.some(FACTS.words("things"), 3)]
        codes = [str(draw.between(1000, 9999)) for _ in things]
        passage = [_filler(draw) for _ in range(sentences)]
        for thing, code in zip(things, codes, strict=True):
            passage.insert(draw.below(len(passage)), f"The {thing} has the code {code}.")
        return answer(f"{' '.join(passage)}\nThe {things[0]} has the code", codes[0])

    return distinct(count, asked)


def _filler(draw: Draw) -> str:
    name, thing, place = (draw.one(FACTS.words(kind)) for kind in ("names", "things", "places"))
    return draw.one(
        [
            f"{name} left the {thing} near the {place}.",
            f"In the {place} {name} was looking for a {thing}.",
            f"{name} and a friend walked to the {place} with a {thing}.",
            f"Nobody at the {place} had seen the {thing} of {name}.",
        ]
    )


# ------------------------------------------------------------------------------------------------------------ choices


def countries(draw: Draw) -> list[Document]:
    """Capitals, among capitals of the same continent; continents. One country is one cluster."""
    groups, documents = FACTS.groups("capitals"), []
    for continent, pairs in groups.items():
        others = [other for other in groups if other != continent]
        for country, capital in pairs:
            wrong = draw.some([c for _, c in pairs if c != capital], 3)
            documents.append(choose(draw, f"The capital of {country} is", capital, wrong, cluster=country))
            wrong = draw.some(others, 3)
            documents.append(choose(draw, f"{country} is a country in", continent, wrong, cluster=country))
    return documents


def vocabulary(draw: Draw) -> list[Document]:
    """What a thing is a kind of; opposites."""
    kinds, opposites = FACTS.groups("kinds"), FACTS.pairs("opposites")
    documents = []
    for kind, members in kinds.items():
        for member, _ in members:
            wrong = draw.some([k for k in kinds if k != kind], 3)
            documents.append(choose(draw, f"{member.capitalize()} is a kind of", kind, wrong))
    for word, opposite in opposites:
        wrong = draw.some([o for _, o in opposites if o != opposite], 3)
        documents.append(choose(draw, f"The opposite of {word} is", opposite, wrong))
    return documents


def facts(draw: Draw) -> list[Document]:
    """Chemical symbols, authors, currencies, young animals, everyday sense."""
    documents = []
    for name, question in (
        ("elements", "The chemical symbol of {} is"),
        ("authors", "{} was written by"),
        ("currencies", "The currency of {} is the"),
        ("young", "A young {} is called a"),
    ):
        pairs = FACTS.pairs(name)
        answers = list(dict.fromkeys(right for _, right in pairs))
        for thing, right in pairs:
            wrong = draw.some([a for a in answers if a != right], 3)
            documents.append(choose(draw, question.format(thing), right, wrong))
    return documents + [choose(draw, text, right, wrong) for text, right, *wrong in FACTS.rows("sense")]


def grammar(draw: Draw) -> list[Document]:
    """Pairs of forms of which one is right: agreement of verbs, nouns and pronouns, and forms of irregular verbs.

    Sentences about the same frame, noun or verb are one cluster.
    """
    documents = []
    for subjects, joint, others in FACTS.rows("agreement"):
        for number, (subject, other) in enumerate(zip(_words(subjects), reversed(_words(others)), strict=True)):
            verbs, likes = draw.one([("is", "are"), ("was", "were"), ("has", "have")]), draw.one(["liked", "needed"])
            for text, forms in (
                (f"The {subject} that the {other} {likes}", verbs),
                (f"The {subject} {joint} {other} quickly", ("disappears", "disappear")),
            ):
                cluster = f"{subjects} {joint} {others}"
                documents.append(choose(draw, text, forms[number], [forms[1 - number]], cluster=cluster))
    for nouns in FACTS.pairs("plurals"):
        if nouns[0] == nouns[1]:
            continue
        for determiners, adjective in ((("this", "these"), ""), (("every", "several"), " old")):
            number = draw.below(2)
            text = f"They talked about {determiners[number]}{adjective}"
            documents.append(choose(draw, text, nouns[number], [nouns[1 - number]], cluster=nouns[0]))
    for pronoun in ("himself", "herself"):
        for name in FACTS.words(pronoun):
            other = "herself" if pronoun == "himself" else "himself"
            verb = draw.one(["saw", "hurt", "blamed", "praised", "taught"])
            documents.append(choose(draw, f"{name} {verb}", pronoun, [other], cluster=name))
    past_of = dict(FACTS.pairs("pasts"))
    for verb, participle in FACTS.pairs("participles"):
        documents.append(choose(draw, "The men have already", participle, [past_of[verb]], cluster=verb))
        documents.append(choose(draw, "Yesterday the men", past_of[verb], [participle], cluster=verb))
    return documents


TASKS: Mapping[str, Callable[[Draw], list[Document]]] = {
    "arithmetic": arithmetic,
    "sums": sums,
    "counting": counting,
    "numerals": numerals,
    "sorting": sorting,
    "copying": copying,
    "selecting": selecting,
    "capitals": capitals,
    "inflection": inflection,
    "extraction": extraction,
    # Lengths in tokens of SmolLM2's tokenizer, about.
    "needle_256": lambda draw: needle(draw, sentences=20, count=50),
    "needle_512": lambda draw: needle(draw, sentences=44, count=30),
    "needle_1024": lambda draw: needle(draw, sentences=93, count=20),
    "countries": countries,
    "vocabulary": vocabulary,
    "facts": facts,
    "grammar": grammar,
}


def lines_of(task: str) -> str:
    """The JSON Lines of a task, in a random order, so that its first documents are a fair sample of it."""
    draw = Draw(task)
    documents = draw.shuffled(TASKS[task](draw))
    rows = ({"id": f"{task}-{number:03}", **document} for number, document in enumerate(documents))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    """Write all of them."""
    (HERE / "data").mkdir(exist_ok=True)
    for task in TASKS:
        (HERE / "data" / f"{task}.jsonl").write_text(lines_of(task), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The local accuracy tasks: their data are what the script writes, and every task says what lm-eval would assume."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parent.parent / "suites" / "tasks"
CHOICE, GENERATION = "multiple_choice", "generate_until"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads `!function` as the name it gives."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@cache
def configurations() -> dict[str, dict[str, Any]]:
    """Every task's YAML, by file name."""
    return {path.stem: yaml.load(path.read_text(encoding="utf-8"), _Loader) for path in sorted(FOLDER.glob("*.yaml"))}


@cache
def documents(task: str) -> list[dict[str, Any]]:
    text = (FOLDER / "data" / f"{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"suites_tasks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_data() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "data").glob("*.jsonl"))


def local(output_type: str) -> Iterator[str]:
    return (task for task in with_data() if configurations()[task]["output_type"] == output_type)


def test_the_script_writes_the_committed_data_byte_for_byte() -> None:
    generate = script("generate")
    assert sorted(generate.TASKS) == with_data()
    for task in generate.TASKS:
        committed = (FOLDER / "data" / f"{task}.jsonl").read_bytes()
        assert generate.lines_of(task).encode() == committed, f"{task}: run `python suites/tasks/generate.py`"


def test_every_data_file_has_a_task_of_its_name_that_reads_it() -> None:
    for task in with_data():
        config = configurations()[task]
        assert config["task"] == f"parity_{task}"
        assert config["custom_dataset"] == "local.documents"
        assert config["dataset_kwargs"] == {"file": f"{task}.jsonl"}
        assert config["tag"] == "parity_local"


def test_what_is_not_in_data_reads_what_is_installed() -> None:
    others = {name: config for name, config in configurations().items() if name not in with_data()}
    assert {name: (c["custom_dataset"], c["tag"]) for name, c in others.items()} == {
        "mmlu_dev": ("local.mmlu_dev", "parity_installed")
    }


@pytest.mark.parametrize("name", sorted(configurations()))
def test_nothing_is_left_to_a_default_of_lm_eval(name: str) -> None:
    config = configurations()[name]
    for key in ("test_split", "output_type", "num_fewshot", "doc_to_text", "doc_to_target", "target_delimiter"):
        assert key in config, f"{name} does not say {key}"
    assert config["num_fewshot"] == 0
    assert config["target_delimiter"] == " "
    assert not config["doc_to_text"].endswith(" ")
    judged = config["metric_list"][0]
    assert {"metric", "aggregation", "higher_is_better"} <= judged.keys()
    assert config["metadata"].keys() == {"version", "chance"}
    if config["output_type"] == CHOICE:
        assert judged["metric"] == "acc"
        assert config["doc_to_choice"] == "{{choices}}"
        assert config["doc_to_target"] == "gold"
    else:
        assert config["output_type"] == GENERATION
        assert judged["metric"] == "exact_match"
        kwargs = config["generation_kwargs"]
        assert kwargs.keys() == {"until", "max_gen_toks", "temperature", "do_sample"}
        assert kwargs["temperature"] == 0.0
        assert kwargs["do_sample"] is False
        assert 1 <= kwargs["max_gen_toks"] <= 16
        # In single quotes YAML's \n is two characters, which no answer ends with.
        assert "\n" in kwargs["until"]
        assert [step["function"] for step in config["filter_list"][0]["filter"]] == ["remove_whitespace", "take_first"]


def test_ids_are_unique_over_all_tasks_and_begin_with_their_task() -> None:
    ids = [(task, document["id"]) for task in with_data() for document in documents(task)]
    assert len({document_id for _, document_id in ids}) == len(ids)
    assert all(re.fullmatch(rf"{task}-\d{{3}}", document_id) for task, document_id in ids)


def test_the_right_choice_is_among_different_choices() -> None:
    for task in local(CHOICE):
        for document in documents(task):
            assert document.keys() == {"id", "cluster", "text", "choices", "gold"}
            assert 0 <= document["gold"] < len(document["choices"]), document
            assert len(set(document["choices"])) == len(document["choices"]), document


def test_chance_is_at_least_what_guessing_would_reach() -> None:
    for task in local(CHOICE):
        (count,) = {len(document["choices"]) for document in documents(task)}
        assert configurations()[task]["metadata"]["chance"] == 1 / count
    for task in local(GENERATION):
        ((same_answer_always, right),) = Counter(document["target"] for document in documents(task)).most_common(1)
        assert right / len(documents(task)) <= configurations()[task]["metadata"]["chance"], (task, same_answer_always)


def test_the_right_choice_is_at_every_place_about_as_often() -> None:
    """An engine whose scores are all equal picks the first choice: it must not look good."""
    for task in local(CHOICE):
        places = Counter(document["gold"] for document in documents(task))
        chance, count = configurations()[task]["metadata"]["chance"], len(documents(task))
        for place in range(round(1 / chance)):
            assert abs(places[place] - chance * count) < 4 * (count * chance * (1 - chance)) ** 0.5, (task, places)


def test_what_is_to_be_generated_is_a_line_that_the_stop_strings_do_not_cut() -> None:
    for task in local(GENERATION):
        stops = configurations()[task]["generation_kwargs"]["until"]
        for document in documents(task):
            assert document.keys() == {"id", "cluster", "text", "target"}
            assert document["target"] == document["target"].strip() != ""
            assert not any(stop in document["target"] for stop in stops), document


def test_no_document_is_there_twice() -> None:
    seen: dict[tuple[object, ...], str] = {}
    for task in with_data():
        for document in documents(task):
            question = (task, document["text"], *sorted(document.get("choices", ())))
            assert question not in seen, f"{document['id']} asks the same as {seen[question]}"
            seen[question] = document["id"]


def test_documents_about_one_fact_are_one_cluster_and_no_cluster_is_large() -> None:
    clusters: defaultdict[tuple[str, str], int] = defaultdict(int)
    for task in ("countries", "grammar"):
        for document in documents(task):
            clusters[task, document["cluster"]] += 1
    assert max(clusters.values()) <= 4
    for document in documents("countries"):
        assert document["cluster"] in document["text"]


def test_no_prompt_gives_its_answer_away_in_an_example() -> None:
    for task in with_data():
        examples = configurations()[task]["doc_to_text"].removesuffix("{{text}}").splitlines()
        for document in documents(task):
            assert not any(example.startswith(document["text"]) for example in examples), document


def test_there_are_enough_documents_and_the_files_are_small() -> None:
    assert sum(len(documents(task)) for task in with_data()) >= 1500
    assert len([task for task in with_data() if task.startswith("needle")]) == 3
    assert sum(path.stat().st_size for path in (FOLDER / "data").iterdir()) < 1_000_000


def test_questions_are_read_from_worked_examples_and_long_ones_are_left_out() -> None:
    pytest.importorskip("datasets")
    question = "Q: Which is odd?\n(A) 2 (B) 4 (C) 5 (D) 8\nA: Let's think step by step. 5 is. The answer is (C)."
    long = question.replace("Which", "Which one " * 20)
    nothing = "Q: What is odd?\nA: 5 is."
    found = script("local").mmlu_questions(
        {"numbers": "\n\n".join(["Examples about numbers.", question, long, nothing])}
    )
    assert found == [
        {
            "id": "mmlu_dev-numbers-0",
            "cluster": None,
            "text": "Which is odd?",
            "choices": ["2", "4", "5", "8"],
            "gold": 2,
        }
    ]


@pytest.mark.parametrize(
    ("number", "name"),
    [(7, "seven"), (40, "forty"), (95, "ninety-five"), (300, "three hundred"), (342, "three hundred and forty-two")],
)
def test_numbers_are_spelled_as_people_do(number: int, name: str) -> None:
    assert script("generate").spelled(number) == name

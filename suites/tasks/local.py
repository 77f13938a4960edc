"""Reads the documents of the tasks beside this file: what `custom_dataset` in their YAML files names.

lm-eval finds this module through `!function local.documents`, relative to the YAML file, so no path has to be absolute
and nothing has to be rewritten when tasks are loaded.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]


def documents(*, file: str, **_: object) -> dict[str, Dataset]:
    """The documents of `data/<file>`, in order, as the split `test`. lm-eval also passes the task's metadata."""
    lines = (Path(__file__).parent / "data" / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def mmlu_dev(**_: object) -> dict[str, Dataset]:
    """The short questions among those that lm-eval itself carries as examples for MMLU (Hendrycks and others, MIT)."""
    source = files("lm_eval") / "tasks" / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
    return {"test": Dataset.from_list(mmlu_questions(json.loads(source.read_text(encoding="utf-8"))))}


def mmlu_questions(examples: dict[str, str], *, longest: int = 200) -> list[dict[str, Any]]:
    """Questions and choices from worked examples by subject; those longer than `longest` characters are left out."""
    pattern = r"Q: (.*?)\n\(A\) (.*?)\(B\) (.*?)\(C\) (.*?)\(D\) (.*?)\nA: .*answer is \(?([A-D])"
    documents = []
    for subject, text in examples.items():
        for number, example in enumerate(text.split("\n\n")[1:]):
            if (found := re.match(pattern, example.strip(), re.DOTALL)) and len(found[1]) <= longest:
                choices = [found[place].strip() for place in range(2, 6)]
                gold = "ABCD".index(found[6])
                row = {"id": f"mmlu_dev-{subject}-{number}", "cluster": None, "text": found[1], "choices": choices}
                documents.append({**row, "gold": gold})
    return documents

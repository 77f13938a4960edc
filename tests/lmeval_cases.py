"""A model directory with a tokenizer, and task folders: all that lm-eval needs to ask without an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import yaml
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE

BOS, EOS = 256, 257
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DATA = """
import json, pathlib
from datasets import Dataset

def documents(*, file, **_):
    lines = (pathlib.Path(__file__).parent / file).read_text("utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}

def prefer(document, results):
    return {"length": float(len(results[0]))}
"""
CHOICE: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}


def write_model(folder: Path, **settings: Any) -> Path:
    """One token a byte, and a beginning-of-sequence token that the tokenizer adds by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    numbers = {"max_position_embeddings": 256, "bos_token_id": BOS, "eos_token_id": [EOS, 0]}
    (folder / "config.json").write_text(json.dumps(numbers))
    return folder


def write_task(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any], **changes: Any
) -> Path:
    """Write a task file with its data, and return the folder; a change to None leaves a key out."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.py").write_text(DATA)
    config = {
        "task": name,
        "test_split": "test",
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "num_fewshot": 0,
        "metadata": {"version": 2},
        **base,
        **changes,
    }
    config = {key: value for key, value in config.items() if value is not None}
    body = "custom_dataset: !function data.documents\n" if "dataset_path" not in config else ""
    (folder / f"{name}.yaml").write_text(body + yaml.safe_dump(config))
    return folder

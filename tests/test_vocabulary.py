"""What a token id reads as, by the tokenizer.json of three kinds of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import vocabulary

BYTE_LEVEL = {
    "added_tokens": [{"id": 3, "content": "<|end|>"}],
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"Ġthe": 0, "Ċ": 1, "Ã": 2, "<|end|>": 3, "Ã©té": 4, "Ã©tÃ©": 5}},
}
MARKED = {
    "added_tokens": [],
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]},
    "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁the", -1.5], ["<0xAB>", -2.0]]},
}


def save(directory: Path, data: Any) -> Path:
    (directory / "tokenizer.json").write_text(json.dumps(data))
    return directory


def test_bytes_as_characters_are_read_as_text_and_fragments_as_bytes(tmp_path: Path) -> None:
    text = vocabulary.token_texts(save(tmp_path, BYTE_LEVEL))
    assert [text(i) for i in range(6)] == [" the", "\n", "<0xC3>", "<|end|>", "ét<0xE9>", "été"]
    assert text(6) is None


def test_marked_spaces_are_spaces(tmp_path: Path) -> None:
    text = vocabulary.token_texts(save(tmp_path, MARKED))
    assert [text(i) for i in range(4)] == ["<unk>", " the", "<0xAB>", None]


def test_byte_level_is_found_inside_a_sequence(tmp_path: Path) -> None:
    inside = {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}
    assert vocabulary.token_texts(save(tmp_path, {**BYTE_LEVEL, "decoder": inside}))(0) == " the"


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}', "\xff"])
def test_without_a_readable_vocabulary_every_token_is_unknown(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    assert vocabulary.token_texts(tmp_path)(0) is None


@given(text=st.text(min_size=1, max_size=20))
def test_any_text_comes_back_from_its_bytes(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    piece = "".join(character[b] for b in text.encode())
    directory = tmp_path_factory.mktemp("model")
    data = {"decoder": {"type": "ByteLevel"}, "model": {"vocab": {piece: 0}}}
    assert vocabulary.token_texts(save(directory, data))(0) == text

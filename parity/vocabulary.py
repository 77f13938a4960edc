"""What a token id reads as, from a model directory's tokenizer.json alone: no engine and no tokenizer package.

Three ways of writing text into a vocabulary are undone: bytes as printable characters (GPT-2 and everything after it),
the mark U+2581 for a space (SentencePiece), and plain text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def token_texts(model_directory: Path) -> Callable[[int], str | None]:
    """A function from a token id to its text.

    Leading spaces are kept; bytes that are no whole character read as <0xAB>. Without a readable tokenizer.json every
    token is unknown: a report then shows ids.
    """
    try:
        data = json.loads((model_directory / "tokenizer.json").read_text("utf-8"))
        pieces = _pieces(data["model"]["vocab"])
        read = _bytes_as_characters if "ByteLevel" in json.dumps(data.get("decoder")) else _marked_spaces
        texts = {token_id: read(piece) for piece, token_id in pieces.items()}
        texts |= {int(added["id"]): str(added["content"]) for added in data.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return lambda _: None
    return texts.get


def _pieces(vocabulary: Any) -> Mapping[str, int]:
    """Token to id, in both forms: an object, or a list of (token, score) in the order of their ids."""
    if isinstance(vocabulary, list):
        return {str(piece): token_id for token_id, (piece, _) in enumerate(vocabulary)}
    return {str(piece): int(token_id) for piece, token_id in vocabulary.items()}


def _marked_spaces(piece: str) -> str:
    return piece.replace(_SPACE, " ")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: a printable byte of Latin-1 stands for itself, the others for 256, 257, ... in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE = _byte_of_character()
_FRAGMENT = {0xDC00 + byte: f"<0x{byte:02X}>" for byte in range(0x80, 0x100)}


def _bytes_as_characters(piece: str) -> str:
    if not all(character in _BYTE for character in piece):
        return piece
    return bytes(_BYTE[c] for c in piece).decode("utf-8", "surrogateescape").translate(_FRAGMENT)

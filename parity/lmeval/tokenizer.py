"""A model directory's tokenizer and chat template, in the host: no engine and no transformers.

Token ids are made here once and sent to every engine, so that engines are compared and not tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parity.errors import ConfigError

_LIMITS = ("n_positions", "max_position_embeddings", "n_ctx")
_TODAY = datetime(2024, 7, 26, tzinfo=timezone.utc)
"""The day of every chat: a prompt that names the day of the run would be another prompt tomorrow."""
_CUT = "<parity:cut>"


class HostTokenizer:
    """Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `config.json` of a model directory.

    special_tokens: name to text, e.g. "bos_token". prefix_id: what a text without a context follows, the
    beginning-of-sequence token or else the end-of-sequence token.

    Raises:
        ConfigError: If there is no tokenizer.json that the `tokenizers` package can read, or it names no token to
            begin or end a text with.
    """

    def __init__(self, model: Path) -> None:
        try:
            import tokenizers  # noqa: PLC0415  not everyone who judges recordings has it
        except ImportError as error:
            raise ConfigError(
                "lm-eval tasks need the package tokenizers; install it with pip install 'engine-parity[accuracy]'"
            ) from error
        self.model = model
        self._settings = _json(model / "tokenizer_config.json")
        self._config = _json(model / "config.json")
        try:
            definition = (model / "tokenizer.json").read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the package raises bare exceptions
            raise ConfigError(f"model directory {str(model)!r} has no readable tokenizer.json: {error}") from error
        self.sha256 = hashlib.sha256(definition).hexdigest()
        # A tokenizer.json may carry the padding and truncation of whoever saved it.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special_tokens = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in self._settings.items()
            if name.endswith("_token") and isinstance(token, (str, Mapping))
        }
        bos, self.eos_id = self._special_id("bos"), self._special_id("eos")
        prefix = self.eos_id if bos is None else bos
        text = None if prefix is None else self._tokenizer.id_to_token(prefix)
        if prefix is None or text is None:
            raise ConfigError(f"model directory {str(model)!r} names neither a bos_token nor an eos_token of its own")
        self.prefix_id, self._prefix_text = prefix, text

    @property
    def max_positions(self) -> int | None:
        """The positions that the model was made for, as its config.json says."""
        config = self._config.get("text_config") or self._config
        found = [config[name] for name in _LIMITS if isinstance(config.get(name), int)]
        return found[0] if found else None

    @cached_property
    def chat_template(self) -> str | None:
        """The model's own, in the order in which transformers looks for it; of several the one named "default"."""
        file = self.model / "chat_template.jinja"
        if file.is_file():
            return file.read_text("utf-8")
        found = self._settings.get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        return found if isinstance(found, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; a text that begins with the beginning-of-sequence token gets no second one."""
        add = add_special_tokens and not text.startswith(self._prefix_text)
        return list(self._tokenizer.encode(text, add_special_tokens=add).ids)

    def render(self, messages: Sequence[Mapping[str, str]], *, continue_last: bool) -> str:
        """The chat as text, by the model's own template.

        continue_last: the answer goes on where the last message ends, instead of beginning a new one.

        Raises:
            ConfigError: If there is no template, or it refuses the messages.
        """
        chat = [dict(message) for message in messages]
        if continue_last:
            chat[-1]["content"] += f"{_CUT} "  # whether the space is still there tells if the template trims
        try:
            text = self._template.render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=not continue_last,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"the chat template of {str(self.model)!r} refuses a chat of {roles}: {error}; leave out what it "
                "refuses, or ask without a chat template"
            ) from error
        if not continue_last:
            return text
        head, found, tail = text.rpartition(_CUT)
        if not found:
            raise ConfigError(f"the chat template of {str(self.model)!r} does not show the last message as it is")
        return head if tail.startswith(" ") else head.rstrip()

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ConfigError(f"model directory {str(self.model)!r} has no chat template; ask without one")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise, strftime_now=_TODAY.strftime)
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template of {str(self.model)!r} is not valid Jinja: {error}") from error

    def _special_id(self, name: str) -> int | None:
        """By its text in tokenizer_config.json, where null means that there is none; else by number in config.json."""
        if f"{name}_token" in self._settings:
            text = self.special_tokens.get(f"{name}_token")
            return None if text is None else self._tokenizer.token_to_id(text)
        number = self._config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if isinstance(number, int) else None


class _Generation(Extension):
    """`{% generation %}` marks for training what an assistant said; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012  jinja's own name and type

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, **options: Any) -> str:
    """As transformers does: jinja's own would escape HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""A recorded engine: answers again what another engine answered before.

For tests of our own code and for trying a suite without an engine; never a stand-in for one in a result. The option
`wire` names a file of completions in wire form, one a line, as `parity.store.export_wire` writes it. A request that
differs from the recorded one (other prompt token ids, other forced tokens) is refused: a replay invents nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parity.engines import EngineSpec, Progress, TokenizedPrompt
from parity.errors import EngineError
from parity.prompts import Prompt, Request
from parity.recording import Completion

if TYPE_CHECKING:
    from parity.fingerprint import Scalar


def open_engine(spec: EngineSpec, model: Path) -> ReplayEngine:  # noqa: ARG001  a replay needs no model
    """Read the recorded completions."""
    wire = spec.options.get("wire")
    if not isinstance(wire, str):
        raise EngineError(
            "the replay engine needs options.wire, the path of a file written by parity.store.export_wire"
        )
    try:
        lines = Path(wire).read_text("utf-8").split("\n")
    except OSError as error:
        raise EngineError(f"the replay file {wire!r} cannot be read ({error.strerror})") from error
    return ReplayEngine({c.id: c for c in (Completion.from_json(json.loads(line)) for line in lines if line)})


class ReplayEngine:
    """Completions by prompt id."""

    def __init__(self, recorded: Mapping[str, Completion]) -> None:
        self._recorded = recorded

    def facts(self) -> Mapping[str, Scalar]:
        """There is no engine behind a replay, and its version says so."""
        return {"engine.version": "replay"}

    def tokenize(self, prompts: Sequence[Prompt]) -> Sequence[TokenizedPrompt]:
        """What the recorded engine's tokenizer had made of the prompts."""
        found = []
        for prompt in prompts:
            recorded = self._find(prompt.id)
            if recorded.own_prompt_token_ids is None:
                raise EngineError(f"the replay file has no tokenisation of prompt {prompt.id!r}")
            found.append(TokenizedPrompt(text=recorded.prompt_text, token_ids=recorded.own_prompt_token_ids))
        return found

    def detokenize(self, token_ids: Sequence[int]) -> str | None:  # noqa: ARG002  a replay has no tokenizer
        """Nothing: what was recorded stays as it is."""
        return None

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Progress]:
        """The recorded completions, in the order asked."""
        for request in requests:
            recorded = self._find(request.id)
            if recorded.prompt_token_ids != request.prompt_token_ids:
                raise EngineError(f"prompt {request.id!r} was recorded with other prompt token ids than those sent now")
            if request.forced_token_ids is not None and request.forced_token_ids != recorded.token_ids:
                raise EngineError(f"prompt {request.id!r} was recorded with other tokens than those to be scored now")
            yield recorded

    def close(self) -> None:
        """Nothing to free."""

    def _find(self, prompt_id: str) -> Completion:
        if prompt_id not in self._recorded:
            raise EngineError(f"the replay file holds no answer to prompt {prompt_id!r}")
        return self._recorded[prompt_id]

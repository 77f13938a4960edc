"""The recipes in docs never rot: their YAML parses, their script runs, their command lines are real ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from parity import cli

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = sorted((DOCS / "ci").glob("*.md"))
PAGES = [*RECIPES, DOCS / "goldens.md", DOCS / "upgrade.md"]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`((?:parity|pytest) [^`\n]+)`")
_OPERATORS = {"&&", "||", ";", "|", ">", ">>", "<", "2>", "&", "(", ")"}


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(language, text) for language, text in _FENCE.findall(page.read_text("utf-8"))]


def commands_of(text: str) -> Iterator[list[str]]:
    """Every call of parity or pytest in shell text: its words, up to where the shell goes on with something else."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"(?:^|[\s/;(])(?:parity|pytest) ", line):
            continue
        lexer = shlex.shlex(line.replace("$$", "$"), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # an apostrophe in a sentence
            continue
        call: list[str] = []
        at_start = True
        for word in [*words, ";"]:
            if word in _OPERATORS:
                if call:
                    yield call
                at_start, call = True, []
            elif call:
                call.append(word)
            elif at_start and Path(word).name in ("parity", "pytest"):
                call = [Path(word).name]
            else:  # a prompt, a prefix, a variable: the command is still to come
                at_start = at_start and (word in ("$", "-", "run:", "env", "nice") or "=" in word)


def all_strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from all_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from all_strings(inner)


def calls(page: Path) -> list[list[str]]:
    found: list[list[str]] = []
    for block in blocks(page):
        texts = all_strings(yaml.safe_load(block.text)) if block.language == "yaml" else [block.text]
        for text in texts:
            found += commands_of(text)
    # In a sentence a verb stands for its command, and brackets for what may be left out.
    for text in _INLINE.findall(_FENCE.sub("", page.read_text("utf-8"))):
        found += (call for call in commands_of(text.translate({ord(c): None for c in "[]"})) if len(call) > 2)
    return found


def refuse(config: pytest.Config, call: list[str]) -> str | None:
    """Why the real argument parser does not take a call; None if it does."""
    program, *arguments = call
    try:
        if program == "parity":
            cli._parser().parse_args(arguments)
        else:
            config._parser.parse(arguments)
    except (SystemExit, pytest.UsageError) as error:
        return f"{shlex.join(call)}: {error}"
    return None


def of_ci(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", RECIPES, ids=of_ci)
def test_every_yaml_block_parses(page: Path) -> None:
    parsed = [yaml.safe_load(block.text) for block in blocks(page) if block.language == "yaml"]
    assert all(isinstance(document, dict) for document in parsed)
    assert bool(parsed) == (page.name != "README.md")


@pytest.mark.parametrize("page", PAGES, ids=of_ci)
def test_every_command_line_is_taken_by_the_real_parser(
    page: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    found = calls(page)
    assert found
    assert [why for call in found if (why := refuse(pytestconfig, call))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parity upgrade a b || code=$?", [["parity", "upgrade", "a", "b"]]),
        ("  $ .venv/bin/parity status && parity diff A B\n", [["parity", "status"], ["parity", "diff", "A", "B"]]),
        ("env -u CI parity accept cpu", []),  # an option of another program may be anything
        ("env CI= parity accept cpu", [["parity", "accept", "cpu"]]),
        ('parity accept \\\n  x --reason "a b"', [["parity", "accept", "x", "--reason", "a b"]]),
        ("echo parity upgrade", []),
        ("parity: target cpu", []),
        ("pytest suites > log", [["pytest", "suites"]]),
    ],
)
def test_calls_are_found_in_shell_text(text: str, expected: list[list[str]]) -> None:
    assert list(commands_of(text)) == expected


@pytest.mark.parametrize("call", [["parity", "upgrad"], ["parity", "accept"], ["pytest", "--parity-tarjet", "x"]])
def test_a_call_that_is_none_would_be_found(
    call: list[str], pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refuse(pytestconfig, call) is not None


def test_the_recipes_keep_the_run_and_the_report_whatever_the_outcome() -> None:
    wanted = {".parity/reports", ".parity/recordings"}
    for block in blocks(DOCS / "ci" / "github-actions.md"):
        if block.language == "yaml":
            (job,) = yaml.safe_load(block.text)["jobs"].values()
            (kept,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
            assert (kept["if"], kept["with"]["include-hidden-files"]) == ("always()", True)
            assert wanted <= set(kept["with"]["path"].split())
    (block,) = [b for b in blocks(DOCS / "ci" / "gitlab-ci.md") if b.language == "yaml"]
    kept = yaml.safe_load(block.text)[".parity"]["artifacts"]
    assert (kept["when"], set(kept["paths"])) == ("always", wanted)
    (block,) = [b for b in blocks(DOCS / "ci" / "buildkite.md") if b.language == "yaml"]
    for step in yaml.safe_load(block.text)["steps"]:
        assert {f"{place}/**/*" for place in wanted} <= set(step["artifact_paths"])


# The script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository whose branch pins another engine than its base, and a `parity` that ends as it is told."""
    (script,) = [b.text for b in blocks(DOCS / "ci" / "README.md") if b.text.startswith("#!")]
    (tmp_path / "ci").mkdir()
    (tmp_path / "ci" / "engine-upgrade").write_text(script)
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "parity"
    stub.write_text('#!/bin/sh\necho "$@"\nexit "$ENDS_WITH"\n')
    stub.chmod(0o755)
    pin = tmp_path / "serving" / "engine.txt"
    pin.parent.mkdir()
    pin.write_text("vllm==0.32.0\n")
    git = ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    for command in ([*git, "init", "-q"], [*git, "add", "serving"], [*git, "commit", "-qm", "base"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    pin.write_text("vllm==0.33.0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (0, ""),
        (1, "HOLD: a difference between vllm==0.32.0 and vllm==0.33.0 was shown"),
        (2, "Nothing was decided"),
        (3, "UNDECIDED: too little data to show that vllm==0.33.0 does what vllm==0.32.0 does"),
    ],
)
def test_the_gates_script_reads_both_pins_and_ends_as_the_decision_does(
    code: int, sentence: str, checkout: Path
) -> None:
    done = subprocess.run(
        ["bash", "ci/engine-upgrade", "HEAD"],
        cwd=checkout,
        env={**os.environ, "PATH": f"{checkout}/bin:{os.environ['PATH']}", "ENDS_WITH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "upgrade vllm==0.32.0 vllm==0.33.0 --output .parity/reports/upgrade\n"
    assert done.returncode == code
    assert done.stderr.startswith(sentence)
    assert bool(done.stderr) == bool(sentence)


@pytest.mark.parametrize("page", RECIPES, ids=of_ci)
def test_every_shell_block_is_shell(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")

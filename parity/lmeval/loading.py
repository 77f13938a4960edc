"""Loads lm-eval's tasks, and turns whatever can be wrong with one into one sentence.

Imports lm-eval; only `parity.lmeval` imports this, when it must.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import numpy as np
import yaml
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from parity.errors import ConfigError, ParityError, ProvisionError

_SOURCES = ("dataset_path", "dataset_name", "dataset_kwargs")
_NETWORK_ERRORS = frozenset({"HTTPError", "RequestException", "TransportError"})
"""Of httpx and requests, whichever the hub's client uses; what it raises itself is an OSError."""
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


def load(names: Sequence[str], *, folder: Path, model: Path, official: bool, num_fewshot: int | None) -> dict[str, Any]:
    """lm-eval's task objects by name, groups and tags resolved, checked for what would only fail after an engine ran.

    Raises:
        ConfigError: If a name is not known, or a task's file or data are wrong.
        ProvisionError: If a task's data are not there.
    """
    if not names:
        raise ConfigError("no task is named; name at least one")
    with harness("the tasks cannot be listed"):
        # Some tasks fit their texts to a tokenizer, which they find by this name.
        manager = TaskManager(include_path=str(folder), include_defaults=official, metadata={"pretrained": str(model)})
    loaded: dict[str, Any] = {}
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(_unknown(name, folder, list(manager.task_index), official))
        entry = manager.task_index[name]
        try:
            with _quietly():
                loaded.update(manager.load([name])["tasks"])
        except Exception as error:
            raise _not_loaded(name, entry, error) from error
    for name, task in loaded.items():
        _require_usable(name, task)
        _set_examples(name, task, num_fewshot)
    return loaded


@contextlib.contextmanager
def harness(what: str) -> Iterator[None]:
    """Run lm-eval's code; an error of its own becomes one sentence that begins with `what`.

    Raises:
        ConfigError: If lm-eval or a task's own code fails.
    """
    try:
        with _quietly():
            yield
    except ParityError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {_reason(error)}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """With lm-eval's own fixed seeds for what tasks draw at random, and without its bars and remarks."""
    random_state, numpy_state = random.getstate(), np.random.get_state()
    bar, bars = lm_eval.api.task.tqdm, not datasets.are_progress_bars_disabled()
    from_string = lm_eval.utils.env.from_string
    levels = {log: log.level for log in map(logging.getLogger, ("lm_eval", "datasets", "huggingface_hub"))}
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    lm_eval.api.task.tqdm = _no_bar
    lm_eval.utils.env.from_string = _compiled
    for log in levels:
        log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        lm_eval.api.task.tqdm = bar
        lm_eval.utils.env.from_string = from_string
        for log, level in levels.items():
            log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


_compiled = lru_cache(maxsize=256)(lm_eval.utils.env.from_string)
"""lm-eval compiles each of a task's templates anew for every document, which takes most of its time."""


def _no_bar(documents: Iterable[Any], **_: object) -> Iterable[Any]:
    return documents


def _unknown(name: str, folder: Path, known: Sequence[str], official: bool) -> str:
    """Why a name is in no index: lm-eval leaves files that it cannot read out of it without a word."""
    for path in sorted(folder.rglob("*.yaml")):
        if (reason := _unreadable(path)) and (path.stem == name or name in path.read_text("utf-8", "replace")):
            return f"the task file {str(path)!r} cannot be read: {reason}"
    nearest = difflib.get_close_matches(name, known)
    meant = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    others = "" if official else ", and lm-eval's own are looked for only where official ones are asked for"
    return (
        f"there is no task {name!r} among the {len(known)} of {str(folder)!r}{' and lm-eval' * official}{others}{meant}"
    )


def _unreadable(path: Path) -> str | None:
    """What is wrong with a task file; None where it can be read."""
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_AnyTag)  # noqa: S506  a safe loader that ignores tags
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{error.problem}{line}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _reason(error)
    if not isinstance(content, Mapping):
        return "it holds no table of settings"
    return None if {"task", "group", "include"} & content.keys() else "it names no task"


class _AnyTag(yaml.SafeLoader):  # type: ignore[misc]  # Any to the type checker
    """Reads files with `!function` without looking for the function."""


def _tag(_: _AnyTag, suffix: str, __: yaml.Node) -> str:
    return suffix


_AnyTag.add_multi_constructor("!", _tag)


def _not_loaded(name: str, entry: Any, error: Exception) -> ParityError:
    """The causes that people meet, each by its own sentence."""
    config: Mapping[str, Any] = entry.cfg or {}
    file = str(entry.yaml_path or entry.name)
    source = " ".join(str(config[key]) for key in _SOURCES if config.get(key))
    splits = [config[key] for key in _SPLITS if config.get(key)]
    if isinstance(error, KeyError) and error.args and error.args[0] in splits:
        return ConfigError(f"task {name!r}: its data have no split {error.args[0]!r}, which {file!r} names")
    if isinstance(error, ValueError) and "valid or test docs" in str(error):
        return ConfigError(f"task {name!r}: {file!r} names neither a test_split nor a validation_split")
    if isinstance(error, IndexError) and "size 0" in str(error):
        return ConfigError(f"task {name!r} has no documents; {file!r} reads {source}")
    if isinstance(error, OSError) and error.filename:
        return ProvisionError(f"task {name!r} needs the file {str(error.filename)!r}, which is not there")
    if isinstance(error, OSError) or _NETWORK_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
        return ProvisionError(
            f"task {name!r} needs what is neither here nor reachable: {_reason(error)}; its data are {source or file}; "
            "load it once where the hub or a mirror can be reached, and bring the cache of `datasets` here"
        )
    return ConfigError(f"task {name!r} cannot be loaded from {file!r}: {_reason(error)}")


def _require_usable(name: str, task: Any) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name!r} asks with pictures or sounds, which no engine here is given")
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name!r} runs code that a model wrote; that is not done here")
    own = callable(task.config.process_results)
    missing = [metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None]
    if missing and not own:
        raise ConfigError(
            f"task {name!r} is judged by the metric {missing[0]!r}, which lm-eval does not bring and could not load; "
            "name one that it brings, or a function"
        )


def _set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """As `simple_evaluate` does, except that a number which a task refuses is refused, not ignored."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 != num_fewshot:
        raise ConfigError(
            f"task {name!r} fixes its examples at 0 and {num_fewshot} are asked for; leave num_fewshot out"
        )
    task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

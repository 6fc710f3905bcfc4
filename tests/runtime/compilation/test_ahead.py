"""Programs compiled ahead are those of the stages."""

import jax
import pytest

from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.runtime.compilation import ahead
from rlhf_jax.runtime.config import PPOConfig, RewardConfig, SFTConfig, resolve
from rlhf_jax.runtime.stages.offline import PolicyStage, RewardModelStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

KEY = jax.eval_shape(lambda: jax.random.key(0))


def lowered(programs):
    return [program.function.lower(*program.arguments).as_text() for program in programs]


def offline_text(stage):
    shapes = jax.eval_shape(stage._init, stage.params)
    return stage._step.lower(shapes, stage.batches.at(0), KEY).as_text()


# Texts that are targets throughout, the completions alone, and those of packed sequences.
@pytest.mark.newest
@pytest.mark.parametrize(
    ("data", "targets"),
    [
        ({}, None),
        ({"max_prompt_length": 24, "max_response_length": 24}, 24),
        ({"max_prompt_length": 8, "max_response_length": 16, "packing": True}, 32),
    ],
)
def test_the_program_of_sft_is_that_of_the_stage(tmp_path, data, targets):
    section = {"batch_size": 8, "eval_batch_size": 8, "gradient_accumulation_steps": 2}
    stage = PolicyStage(resolve(SFTConfig, small.sft(tmp_path, sft=section, data=data)))
    positions = stage.batches.at(0).target_positions
    assert (None if positions is None else positions.shape[1]) == targets
    assert lowered(ahead.programs(stage.config, stage.model, stage.mesh)) == [offline_text(stage)]


@pytest.mark.newest
@pytest.mark.parametrize("objective", ["last_token", "ranking"])
def test_the_program_of_the_reward_model_is_that_of_the_stage(tmp_path, sft_run, objective):
    section = {"batch_size": 8, "eval_batch_size": 8, "objective": objective}
    config = small.reward(tmp_path, sft_run[0], reward=section)
    stage = RewardModelStage(resolve(RewardConfig, config))
    count = stage.batches.at(0).responses.shape[1] if objective == "ranking" else 4
    programs = ahead.programs(stage.config, stage.model, stage.mesh, num_responses=count)
    assert lowered(programs) == [offline_text(stage)]


@pytest.mark.newest
@pytest.mark.parametrize(
    "ppo", [{}, {"num_layers_unfrozen": 1, "value_model": "reward", "scale_reward": "running"}]
)
def test_the_program_of_ppo_is_that_of_the_stage(tmp_path, sft_run, reward_run, ppo):
    config = small.ppo(tmp_path, sft_run[0], reward_run[0], ppo=ppo)
    stage = OnlineStage(resolve(PPOConfig, config))
    shapes = jax.eval_shape(stage._init, stage.params, stage.reward_params, stage.value_params)
    text = stage._step.lower(shapes, stage._batch(0), KEY).as_text()
    assert lowered(ahead.programs(stage.config, stage.model, stage.mesh)) == [text]


@pytest.mark.newest
def test_the_halves_of_ppo_around_other_rewards_are_those_of_the_stage(tmp_path, sft_run):
    rewards = [{"function": "tests.small:short_response"}]
    stage = OnlineStage(resolve(PPOConfig, small.ppo(tmp_path, sft_run[0], rewards=rewards)))
    shapes = jax.eval_shape(stage._init, stage.params, stage.reward_params, stage.value_params)
    programs = ahead.programs(stage.config, stage.model, stage.mesh)
    rollout, scores = programs[1].arguments[2:4]
    batch = stage._batch(0)
    assert lowered(programs) == [
        stage._sample.lower(shapes, batch, KEY).as_text(),
        stage._update.lower(shapes, batch, rollout, scores, KEY).as_text(),
    ]
    assert [program.name for program in programs] == ["rollout", "update"]


def test_reward_models_of_an_untied_policy_have_no_unembedding():
    model = Decoder(DecoderConfig(300, 8, 16, 2, 2, 1, 4, 64))
    values = small.ppo("run", "sft", ppo={"value_model": "reward"})
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    (step,) = ahead.programs(resolve(PPOConfig, values), model, mesh)
    state = step.arguments[0]
    assert "lm_head" in state.params["model"]
    for scorer in (state.frozen["reward"], state.params["value_model"]):
        assert set(scorer["model"]) == {"embed_tokens", "layers", "norm"}

"""The command `compile-for`: its flags, its errors, and the stage that it finds."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlhf_jax import training
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands import compile_for
from rlhf_jax.training import sft_settings

FLAGS = ["--sft.batch_size", "16", "--sft.eval_batch_size", "16", "--data.max_length", "32"]


def test_the_command_prints_the_numbers_and_writes_them(config_folder, capsys):
    file = f"{config_folder}/numbers.json"
    flags = ["--topology", "local", "--model", config_folder, "--json", file, *FLAGS]
    assert compile_for.main(flags) == 0
    printed = capsys.readouterr().out
    numbers = json.loads(Path(file).read_text())
    assert numbers["stage"] == "sft"
    assert len(numbers["programs"]) == 1
    assert "sft of" in printed
    assert "held at most" in printed


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_trainer_with_a_computed_reference(config_folder, name):
    sizes = ["--data.max_prompt_length", "8", "--data.max_response_length", "8"]
    flags = ["--topology", "local", "--model", config_folder, "--stage", name, *sizes]
    assert compile_for.run_compile_for(flags)["programs"][0]["flops"] > 0


def test_a_further_trainer_is_compiled_from_its_record(config_folder, monkeypatch):
    again = dataclasses.replace(
        sft_settings.TRAINER, name="sft_again", module="rlhf_jax.training.sft"
    )
    monkeypatch.setattr(training, "TRAINERS", (*training.TRAINERS, again))
    flags = [each.replace("--sft.", "--sft_again.") for each in FLAGS]
    numbers = compile_for.run_compile_for(["--topology", "local", "--model", config_folder, *flags])
    assert numbers["stage"] == "sft_again"
    assert numbers["programs"][0]["flops"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology is missing"),
        (["--topology", "h100:2x2"], "--topology 'h100:2x2' is not known; give v5e:4x4"),
        (["--topology", "cpu:4096"], "needs 4096 devices"),
        (["--topology", "local", "--model", "gpt9"], "There is no model 'gpt9' here"),
        (["--topology", "local", "--stage", "trpo"], "--stage must be one of sft, reward, ppo"),
        (["--topology", "local", "--mesh.fsdp", "3"], "does not fit"),
        (["--topology", "local", "--model.attention", "cudnn"], "is of NVIDIA GPUs, which no topo"),
        (["--topology", "local", "--sft.batch", "3"], "Unknown key 'sft.batch'"),
        (
            ["--topology", "local", "--ppo.lam", "1"],
            "give --stage sft, reward, ppo, dpo, kto, online_dpo, rft, grpo or rloo.",
        ),
    ],
)
def test_an_error_is_one_sentence(flags, message):
    jax.devices()  # before JAX has its devices, there could be 4096 of them
    named = [] if "--model" in flags else ["--model", "gpt2"]
    with pytest.raises(InputError, match=re.escape(message)):
        compile_for.run_compile_for([*flags, *FLAGS, *named])


def test_responses_of_several_turns_are_not_compiled_ahead(config_folder):
    flags = ["--topology", "local", "--model", config_folder, "--grpo.environment_fn", "games:play"]
    with pytest.raises(InputError, match=r"grpo.environment_fn calls a program for each turn"):
        compile_for.run_compile_for(flags)


def test_the_stage_of_a_file_is_found(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("reward: {batch_size: 4}\nmodel: {path: gpt2}\n")
    config = compile_for.read_config(["--config", str(file)], None)
    assert config.trainer.name == "reward"
    assert config.settings.batch_size == 4
    file.write_text("data: {sft: {max_length: 7}}\nppo: {batch_size: 4, num_mini_batches: 1}\n")
    config = compile_for.read_config([f"--config={file}", "--mesh.fsdp", "2"], "ppo")
    assert config.trainer.name == "ppo"
    assert config.settings.batch_size == 4
    assert config.mesh.fsdp == 2
    config = compile_for.read_config(["--config", str(file)], "sft")
    assert config.data.max_length == 7
    flags = ["--config", str(file), "--model.reward_path", "somewhere"]
    with pytest.raises(InputError, match="has the stages sft, ppo, but not reward"):
        compile_for.read_config(flags, "reward")


def test_help_does_without_jax():
    code = "import sys; from rlhf_jax.runtime.commands import compile_for as c; "
    code += "status = c.main(['--help']); sys.exit(status or 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--topology" in done.stdout

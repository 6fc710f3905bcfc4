"""The commands as a user runs them: exit status, and what they say on the terminal."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from rlhf_jax.runtime import train_sft
from rlhf_jax.runtime.commands import terminal
from tests import small

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "train_sft": "sft",
    "train_reward": "reward",
    "train_ppo": "ppo",
    "run_rlhf": "run",
    "generate": "generate",
    "evaluate": "evaluate",
    "compile_for": "compile-for",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Without a network, and with a folder of its own for what commands keep of the user."""
    ours = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    ours["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    # Commands keep what they compile themselves, as they do for a user.
    theirs = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return {**theirs, **ours}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a trained model."""
    folder = tmp_path_factory.mktemp("sft")
    train_sft(small.sft(folder))
    return f"{folder}/hf"


@pytest.fixture
def short_texts(tmp_path):
    """A configuration of texts that nothing is to be said about: none is cut or dropped."""
    (tmp_path / "texts.jsonl").write_text('{"text": "a good film"}\n' * 32)
    data = {
        "path": str(tmp_path / "texts.jsonl"),
        "eval_rows": 0,
        "max_length": 48,
        "packing": False,
    }
    config = small.sft(tmp_path / "run", logging={"progress": False, "num_samples": 0})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"data": data}))
    return ["--config", str(tmp_path / "config.yaml")]


def command(name, *flags):
    return [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *flags]


def run(environment, name, *flags):
    """(exit status, standard output, standard error)"""
    done = subprocess.run(command(name, *flags), env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """A command in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr(terminal, "_set_up_logging", lambda: None)  # caplog would hear nothing then
    monkeypatch.setattr("sys.path", [*sys.path])

    def called(name, *flags):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return called


@pytest.mark.parametrize("name", COMMANDS)
def test_each_script_is_a_command(name, call):
    status, out, err = call(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: rlhf {COMMANDS[name]} ")


def test_an_input_error_is_one_line_and_status_2(call, tmp_path):
    status, out, err = call("train_ppo", "--ppo.kl_ceof", "1")
    assert (status, out) == (2, "")
    assert err.startswith("error: Unknown key 'ppo.kl_ceof' (did you mean kl_coef?); the section")
    assert err.count("\n") == 1
    status, out, err = call(
        "train_sft", "--data.path", "no.jsonl", "--run_dir", str(tmp_path / "run")
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: There is no file or folder no.jsonl: give one that exists")


def test_functions_of_the_working_directory_are_found(call, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(prompts, completions, **columns): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.modules", sys.modules.copy())
    flags = ("--model.path", str(tmp_path / "none"), "--rewards")
    _, _, err = call("train_ppo", *flags, '[{function: "mine:score"}]')
    assert err.startswith("error: There is no f"), err
    assert "mine" not in err
    _, _, err = call("train_ppo", *flags, '[{function: "mine:other"}]')
    assert err.startswith("error: 'mine:other' names no function")


def test_a_hub_name_that_cannot_be_reached_is_one_line(environment):
    status, out, err = run(environment, "generate", "--model.path", "no/such", "--prompt", "hi")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: The tokenizer no/such is neither a local folder nor reachable on")


def test_a_run_prints_one_line(environment, short_texts, tmp_path):
    status, out, err = run(environment, "train_sft", *short_texts)
    said = f"sft: the model is in {tmp_path}/run/hf, the report in {tmp_path}/run/report.html\n"
    assert (status, out, err) == (0, "", said)
    # Its programs are kept where JAX reads them without messages.
    kept = list(Path(environment["XDG_CACHE_HOME"], "rlhf-jax").glob("xla/*/jit_step-*-cache"))
    assert len(kept) == (jax.__version_info__ >= (0, 12))
    status, out, err = run(environment, "train_sft", *short_texts, "--seed", "1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "was made with another configuration: seed is 0 there and 1 here" in err


def test_a_nan_loss_is_one_line_and_status_1(call, short_texts):
    hot = ("--optimizer.learning_rate", "1e30", "--optimizer.max_grad_norm", "null")
    status, out, err = call("train_sft", *short_texts, *hot)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: train/loss is nan at step 2 of the stage sft; training stopped")


@pytest.mark.newest
def test_ctrl_c_is_status_130_and_says_how_to_go_on(environment, short_texts, tmp_path):
    long = (*short_texts, "--sft.num_epochs", "100000")
    process = subprocess.Popen(
        command("train_sft", *long), env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    first, last = err.strip().splitlines()
    assert first == "Stopping after this step; once more to stop at once."
    assert last.startswith("Stopped after step ")
    assert last.endswith("Run the same command again to continue.")
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert last.startswith(f"Stopped after step {step} of 400000; everything is saved in")


@pytest.mark.newest
def test_generate_writes_json_alone_and_the_same_in_every_process(environment, model, tmp_path):
    flags = ("--model.path", model, "--prompt", "It was", "--generation.temperature", "0")
    flags += ("--generation.max_new_tokens", "6")
    status, out, err = run(environment, "generate", *flags)
    assert (status, err) == (0, "")
    assert json.loads(out)["prompt"] == "It was"
    output = tmp_path / "out.jsonl"
    assert run(environment, "generate", *flags, "--output", str(output)) == (0, "", "")
    assert output.read_text() == out


@pytest.mark.newest
def test_a_reader_that_has_seen_enough_is_no_error(environment, model):
    flags = ("--model.path", model, "--prompt", "hi", "--generation.max_new_tokens", "6")
    process = subprocess.Popen(
        command("generate", *flags), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_pairs_are_made_of_texts_with_labels(call, tmp_path):
    labelled = [("good", 1), ("bad", 0), ("fine", 1), ("dull", 0), ("nice", 1)]
    source, output = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps({"text": x, "label": y}) + "\n" for x, y in labelled))
    status, out, err = call("pair_by_label", str(source), str(output))
    assert (status, out, err) == (0, "2 pairs\n", "")
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert {pair["chosen"] for pair in pairs} < {"good", "fine", "nice"}
    assert {pair["rejected"] for pair in pairs} == {"bad", "dull"}


@pytest.mark.parametrize(
    ("output", "flags", "message"),
    [
        ("pairs.jsonl", ("--label", "stars"), "no column 'stars'; its columns are text, label."),
        ("pairs.jsonl", ("--preferred", "2"), "No pair with the labels 2 and 0: there are 1."),
        ("none/pairs.jsonl", ("--other", "1"), "cannot be written: No such file or directory"),
    ],
)
def test_an_error_of_labels_is_one_line(call, tmp_path, output, flags, message):
    (tmp_path / "texts.jsonl").write_text('{"text": "good", "label": 1}\n')
    places = (str(tmp_path / "texts.jsonl"), str(tmp_path / output))
    status, out, err = call("pair_by_label", *places, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err

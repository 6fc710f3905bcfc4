"""Files of a run folder, and their uses."""

import itertools
import json
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained, load_reward_model
from rlhf_jax.runtime import run_evaluate, run_generate, train_ppo, train_reward, train_sft
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small
from tests.runtime.run import counting

SUPERVISED = {"train/loss", "train/accuracy", "train/grad_norm"}


@pytest.fixture(params=["sft", "reward", "ppo"])
def finished(request):
    """(name, folder, result, what trained it) of each stage."""
    folder, result = request.getfixturevalue(f"{request.param}_run")
    train = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}[request.param]
    return request.param, folder, result, train


def test_the_folder_holds_the_documented_files(finished):
    name, folder, result, _ = finished
    assert result.run_dir == str(folder)
    files = {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "hf", "report.html"}
    assert files <= {path.name for path in folder.iterdir()}
    assert [entry["step"] for entry in small.entries(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    samples = small.entries(folder / "samples.jsonl")
    assert {row["step"] for row in samples} == {0, 2, 4}
    assert all(isinstance(entry["prompt"] + entry["response"], str) for entry in samples)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["run_dir"] == str(folder)
    assert config[name]["batch_size"] == 8
    assert load_checks(name)(folder / "hf")
    assert "<html" in (folder / "report.html").read_text()[:500].lower()


def load_checks(name):
    load = load_reward_model if name == "reward" else load_pretrained
    return lambda folder: load(folder)[0].config.n_embd == 32


def test_metrics_have_the_names_that_users_know(finished):
    name, folder, result, _ = finished
    first, second = small.entries(folder / "metrics.jsonl")[:2]
    if name == "ppo":
        objective = {"scores", "kl", "rlhf_reward", "non_score_reward", "entropy", "kl_coef"}
        wanted = {f"objective/{part}" for part in objective}
        wanted |= {"policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg"}
        wanted |= {"loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio"}
        evaluated = {"eval/scores", "eval/kl", "eval/win_rate_scores", "eval/response_length"}
    else:
        wanted, evaluated = SUPERVISED, {"eval/loss", "eval/accuracy"}
    evaluated |= {"sft": {"eval/perplexity"}, "reward": {"eval/margin"}}.get(name, set())
    assert wanted <= first.keys()
    assert not any(key.startswith("eval/") for key in first)
    assert evaluated <= second.keys()
    assert {"perf/tokens_per_sec", "perf/step_time"} <= result.metrics.keys()
    assert "perf/tokens" not in result.metrics
    assert all(isinstance(value, float) for value in result.metrics.values())


def test_the_same_call_again_does_nothing(finished, capsys, monkeypatch):
    _, folder, result, train = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(loop, "Checkpoints", None)  # nothing is opened, let alone trained
    assert train(folder / "config.yaml") == result
    assert capsys.readouterr().err == f"{folder} is complete; nothing is left to do.\n"
    after = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.newest
def test_the_configuration_fed_back_repeats_the_run(finished, tmp_path):
    _, folder, _, train = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    train({**config, "run_dir": str(tmp_path)})
    small.assert_same_run(folder, tmp_path)


def test_another_seed_is_another_run(tmp_path, sft_run):
    train_sft(small.sft(tmp_path, seed=1))
    ours, theirs = (small.entries(folder / "metrics.jsonl") for folder in (tmp_path, sft_run[0]))
    assert ours[0]["train/loss"] != theirs[0]["train/loss"]


def test_a_run_may_continue_with_another_logging_section(tmp_path, monkeypatch):
    """An error after two steps stopped it; afterwards it logs and saves less often."""
    with monkeypatch.context() as patch:
        step = counting.CountingStage.step
        patch.setattr(
            counting.CountingStage,
            "step",
            lambda self, state, index: step(self, state, index if index != 2 else 1 / 0),
        )
        with pytest.raises(ZeroDivisionError):
            counting.train(tmp_path, checkpoint={"every": 1})
    watched = {"log_every": 4, "eval_every": 0, "samples_every": 0, "num_samples": 1}
    counting.train(tmp_path, checkpoint={"every": 3, "keep": 1}, logging=watched)
    assert [entry["step"] for entry in small.entries(tmp_path / "metrics.jsonl")] == [1, 2, 4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["logging"]["log_every"] == 4


def test_samples_of_responses_need_the_output_of_a_step():
    """Without one, as after a restart, there are none; before the first step there may be."""
    for stage, state in (({"held_out": None}, {"step": 0}), ({"held_out": 1}, {"step": 3})):
        stage, state = types.SimpleNamespace(**stage), types.SimpleNamespace(**state)
        assert OnlineStage.samples(stage, state, None, 2) == []


def test_tokens_of_ppo_samples_have_kl_value_and_advantage(ppo_run):
    lines = [line for line in small.entries(ppo_run[0] / "samples.jsonl") if line["step"] > 0]
    for line in lines:
        tokens = line["tokens"]
        assert tokens.keys() == {"text", "kl", "value", "advantage"}
        assert len({len(values) for values in tokens.values()}) == 1
        assert "".join(tokens["text"]).startswith(line["response"])
        assert sum(tokens["kl"]) == pytest.approx(line["kl"], abs=1e-3)
    assert any(line["tokens"]["advantage"] for line in lines)
    assert "data-measures" in (ppo_run[0] / "report.html").read_text()


def test_the_first_samples_of_ppo_are_of_the_initial_policy(ppo_run):
    first, *_ = [line for line in small.entries(ppo_run[0] / "samples.jsonl") if line["step"] == 0]
    compared = json.loads((ppo_run[0] / "evaluation.json").read_text())["samples"][0]
    assert (first["prompt"], first["response"]) == (compared["prompt"], compared["before"])
    assert first["score"] == pytest.approx(compared["before_score"], rel=1e-6)
    assert first["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("steps", "evaluated"),
    [(3, [1, 2, 3]), (10, list(range(1, 11))), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25])],
)
def test_a_run_is_evaluated_and_sampled_ten_times_by_default(tmp_path, steps, evaluated):
    logging = {"eval_every": None, "samples_every": None}
    counting.train(tmp_path, logging=logging, steps=steps)
    lines = small.entries(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/loss" in line] == evaluated
    sampled = dict.fromkeys(line["step"] for line in small.entries(tmp_path / "samples.jsonl"))
    assert list(sampled) == [0, *evaluated]


def test_the_newest_checkpoints_are_kept(tmp_path):
    counting.train(tmp_path, checkpoint={"every": 1, "keep": 3})
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["2", "3", "4"]


def test_ppo_writes_a_comparison_with_the_policy_it_started_from(ppo_run, sft_run):
    evaluation = json.loads((ppo_run[0] / "evaluation.json").read_text())
    assert evaluation["metrics"]["num_prompts"] == 8
    assert len(evaluation["samples"]) == 2
    rows = {row["metric"]: row for row in evaluation["table"]}
    before = rows["KL to the reference (nats per response)"]
    assert before["before"] == pytest.approx(0.0, abs=1e-5)
    assert rows["score"]["after"] == pytest.approx(evaluation["metrics"]["scores"], rel=1e-6)
    last = small.entries(ppo_run[0] / "metrics.jsonl")[-1]
    assert last["eval/scores"] == evaluation["metrics"]["scores"]
    ours, theirs = (load_pretrained(f"{run[0]}/hf")[1] for run in (ppo_run, sft_run))
    assert not jnp.array_equal(ours["ln_f"]["scale"], theirs["ln_f"]["scale"])


# --- generate ------------------------------------------------------------------------------------


def generate(capsys, **values):
    """The lines that `run_generate` writes to standard output."""
    count = run_generate(values)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == count
    return lines


def test_generate_writes_json_lines(tmp_path, capsys, sft_run):
    shared = {
        "model": {"path": f"{sft_run[0]}/hf"},
        "data": {"builtin_rows": 4, "eval_rows": 5},
        "generation": {"max_new_tokens": 4, "batch_size": 4},
    }
    lines = generate(capsys, **shared)
    assert len(lines) == 5  # two batches, of which the second is not full
    assert all(line.keys() == {"prompt", "response"} for line in lines)
    assert run_generate({**shared, "output": str(tmp_path / "out.jsonl")}) == 5
    assert capsys.readouterr().out == ""
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines


def test_generate_renders_a_message_by_the_chat_template(capsys, sft_run):
    shared = {
        "model": {"path": f"{sft_run[0]}/hf"},
        "message": "Hello",
        "generation": {"max_new_tokens": 4, "batch_size": 4},
    }
    template = "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}:"
    (line,) = generate(capsys, **shared, tokenizer={"chat_template": template})
    assert line["prompt"] == "<user>Hello:"
    with pytest.raises(InputError, match="message needs a chat template"):
        run_generate(shared)
    with pytest.raises(InputError, match="both given"):
        run_generate({**shared, "prompt": "Hello"})


def test_greedy_responses_do_not_hang_on_the_seed_and_sampled_ones_do(capsys, sft_run):
    def respond(seed, temperature):
        generation = {"max_new_tokens": 8, "temperature": temperature}
        model = {"path": f"{sft_run[0]}/hf"}
        (line,) = generate(capsys, model=model, generation=generation, prompt="It was", seed=seed)
        assert line["prompt"] == "It was"
        return line["response"]

    assert respond(0, 0.0) == respond(1, 0.0)
    assert respond(0, 1.0) == respond(0, 1.0)
    assert respond(0, 1.0) != respond(1, 1.0)


# --- evaluate ------------------------------------------------------------------------------------


def evaluate(tmp_path, kind, **values):
    evaluation = run_evaluate({"kind": kind, "run_dir": str(tmp_path), **values})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    return evaluation["metrics"]


def test_evaluation_of_texts_equals_that_of_training(tmp_path, capsys, sft_run):
    data = small.sft("-")["data"]
    metrics = evaluate(tmp_path, "text", model={"path": f"{sft_run[0]}/hf"}, data=data)
    last = small.entries(sft_run[0] / "metrics.jsonl")[-1]
    assert metrics["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(last["eval/perplexity"], rel=1e-5)
    assert "perplexity" in capsys.readouterr().out


def test_evaluation_of_pairs_equals_that_of_training(tmp_path, reward_run):
    data = small.reward("-", "-")["data"]
    model = {"reward_path": f"{reward_run[0]}/hf"}
    metrics = evaluate(tmp_path, "pairs", model=model, data=data)
    last = small.entries(reward_run[0] / "metrics.jsonl")[-1]
    assert metrics["num_pairs"] == 8
    assert metrics["accuracy"] == pytest.approx(last["eval/accuracy"])
    assert metrics["loss"] == pytest.approx(last["eval/loss"], rel=1e-4)
    at_the_end = json.loads((reward_run[0] / "evaluation.json").read_text())
    assert at_the_end["metrics"] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert metrics["calibration_error"] == pytest.approx(
        sum(
            b["num_pairs"] / 8 * abs(b["correct"] - b["confidence"])
            for b in at_the_end["pairs"]["calibration"]
        ),
        abs=1e-4,
    )


@pytest.mark.newest
@pytest.mark.parametrize("objective", ["tokenwise", "ranking"])
def test_every_objective_trains_and_is_judged_on_pairs(tmp_path, sft_run, caplog, objective):
    texts = ["It was a fine film.", "It was long.", "Bad.", "I slept."]
    rows = [
        {"prompt": f"Film {i}.", "responses": texts[: 2 + i % 3], "margin": i % 2}
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_rows": 8}
    settings = {"objective": objective, "num_epochs": 0.5}
    config = small.reward(tmp_path / "run", sft_run[0], data=data, reward=settings)
    result = train_reward(config)
    assert {"train/margin", "eval/margin", *SUPERVISED} <= result.metrics.keys()
    assert f"have a margin, which reward.objective {objective} ignores" in caplog.text
    labels = {entry["label"] for entry in small.entries(tmp_path / "run" / "samples.jsonl")}
    assert {"ranking": "place 1", "tokenwise": "chosen"}[objective] in labels

    at_the_end = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    counts = [b["num_pairs"] for b in at_the_end["pairs"]["calibration"]]
    assert sum(counts) == at_the_end["metrics"]["num_pairs"]
    assert at_the_end["metrics"]["accuracy"] == pytest.approx(result.metrics["eval/accuracy"])
    if objective == "ranking":
        assert at_the_end["metrics"]["loss"] == pytest.approx(result.metrics["eval/loss"], rel=1e-4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Accuracy by length" in page
    # What evaluation says of the exported model, on the same pairs one by one.
    model = {"reward_path": f"{tmp_path}/run/hf"}
    metrics = evaluate(tmp_path, "pairs", model=model, data=config["data"])
    del metrics["loss"], at_the_end["metrics"]["loss"]  # here with the margins of the data
    assert metrics == pytest.approx(at_the_end["metrics"], rel=1e-4, abs=1e-6)


def test_evaluation_of_a_policy(tmp_path, capsys, sft_run, reward_run, ppo_run):
    model = {"path": f"{ppo_run[0]}/hf", "reward_path": f"{reward_run[0]}/hf"}
    shared = {
        "data": small.ppo("-", "-")["data"],
        "generation": {"max_new_tokens": 8, "temperature": 0.0},
        "evaluation": {"gold_fn": "rlhf_jax.data.builtin:gold_scores", "batch_size": 8},
    }
    alone = evaluate(tmp_path, "policy", model=model, **shared)
    assert alone.keys() == {"scores", "gold", "response_length", "num_prompts"}
    model["reference_path"] = f"{sft_run[0]}/hf"
    compared = evaluate(tmp_path, "policy", model=model, **shared)
    assert compared["scores"] == pytest.approx(alone["scores"], rel=1e-5)
    assert 0 <= compared["win_rate"] <= 1
    assert compared["kl"] != 0
    assert "win rate by the gold score" in capsys.readouterr().out


def test_a_checkpoint_is_due_when_enough_time_has_passed(tmp_path, monkeypatch):
    """The clock advances a minute per reading; a checkpoint is due every two and a half."""
    clock = itertools.count(0.0, 60.0)
    # The loop's alone: writing threads read the clock as well.
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    saved, save = [], loop.Checkpoints.save
    monkeypatch.setattr(
        loop.Checkpoints,
        "save",
        lambda self, step, *args: saved.append(step) or save(self, step, *args),
    )
    quiet = {"eval_every": 0, "samples_every": 0, "progress": False}
    counting.train(tmp_path, checkpoint={"minutes": 2.5}, logging=quiet)
    assert saved == [3, 4]


def test_an_export_to_an_address_is_made_here_and_copied_with_the_configuration_last(
    tmp_path, monkeypatch
):
    """A local folder stands in for the bucket."""
    path_of = epath.Path
    monkeypatch.setattr(
        shared.epath,
        "Path",
        lambda path: path_of(str(path).replace("gs://bucket", str(tmp_path))),
    )
    monkeypatch.setattr(shared, "is_remote", lambda path: True)
    copied = []

    def save(folder, text):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (Path(folder) / name).write_text(f"{text} {name}")
            copied.append(name)

    shared.export("gs://bucket/run", save, "the")
    written = {file.name: file.read_text() for file in (tmp_path / "run" / "hf").iterdir()}
    assert written == {name: f"the {name}" for name in copied}
    order = sorted((tmp_path / "run" / "hf").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert order[-1].name == "config.json"

"""Compilations of a run: each program once for each bucket, and none after all were seen.

A bucket is a shape of batches.
"""

import json

import jax
import pytest

from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.offline import PolicyStage, RewardModelStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

COMPILED = "/jax/core/compile/backend_compile_duration"
OFTEN = {"every": 2}  # checkpoints, as evaluations and samples


class Diary:
    """Events of a run, in order: ("step", index), ("shapes", ...), ("compiled", name), ..."""

    def __init__(self, monkeypatch, stage):
        self.entries = []
        self._note(monkeypatch, stage, "step", lambda self, state, index: index)
        self._note(monkeypatch, stage, "finish", lambda self, state: None)
        self._note(monkeypatch, loop._Loop, "_log", lambda self, *rest: self.unlogged[0][0])
        batch_at = shared.batch_at

        def noted(batches, *place):
            batch = batch_at(batches, *place)
            self.entries.append(("shapes", tuple(array.shape for array in jax.tree.leaves(batch))))
            return batch

        monkeypatch.setattr(shared, "batch_at", noted)

    def _note(self, monkeypatch, owner, name, what):
        function = getattr(owner, name)

        def noted(*args, **more):
            self.entries.append((name, what(*args)))
            return function(*args, **more)

        monkeypatch.setattr(owner, name, noted)

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event, seconds, **more):
        if event == COMPILED:
            self.entries.append(("compiled", more.get("fun_name")))

    def steps(self):
        """[(shapes of the batch, names compiled until the next step)]"""
        places = [place for place, (name, _) in enumerate(self.entries) if name == "step"]
        end = [name for name, _ in self.entries].index("finish")
        for start, stop in zip(places, [*places[1:], end], strict=True):
            entries = self.entries[start:stop]
            shapes = tuple(what for name, what in entries if name == "shapes")
            yield shapes, [what for name, what in entries if name == "compiled"]


def assert_compiled_once(diary, buckets=1):
    """Once a step was evaluated, sampled and saved, only batches of a new shape compile."""
    seen, late = set(), []
    for index, (shapes, names) in enumerate(diary.steps()):
        if shapes in seen and index >= 2:
            late += [(index, name) for name in names]
        if shapes not in seen:
            assert any("step" in name for name in names), (index, names)
        seen.add(shapes)
    assert late == []
    assert len(seen) == buckets
    assert index >= buckets + 2


def test_supervised_steps(tmp_path, monkeypatch, sft_run):
    with Diary(monkeypatch, PolicyStage) as diary:
        train_sft(small.sft(tmp_path, checkpoint=OFTEN))
    assert_compiled_once(diary)


def test_reward_steps(tmp_path, monkeypatch, sft_run, reward_run):
    with Diary(monkeypatch, RewardModelStage) as diary:
        train_reward(small.reward(tmp_path, sft_run[0], checkpoint=OFTEN))
    assert_compiled_once(diary)


def test_ppo_iterations(tmp_path, monkeypatch, sft_run, reward_run, ppo_run):
    with Diary(monkeypatch, OnlineStage) as diary:
        train_ppo(small.ppo(tmp_path, sft_run[0], reward_run[0], checkpoint=OFTEN))
    assert_compiled_once(diary)


@pytest.mark.newest
def test_ppo_iterations_of_two_buckets_and_with_rewards_in_python(tmp_path, monkeypatch, sft_run):
    prompts = ["good", "good", "this was a long and slow story with too many words"] * 6
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    config = small.ppo(
        tmp_path / "run",
        sft_run[0],
        data={"path": str(tmp_path / "prompts.jsonl"), "eval_rows": 2, "length_buckets": 2},
        ppo={"total_episodes": 12, "batch_size": 2, "response_length": 4, "num_ppo_epochs": 1},
        evaluation={"batch_size": 2},
        checkpoint=OFTEN,
    )
    with Diary(monkeypatch, OnlineStage) as diary:
        train_ppo(config, small.short_response)
    assert_compiled_once(diary, buckets=2)


def test_a_step_is_under_way_while_the_one_before_is_logged(tmp_path, monkeypatch):
    logging = {"eval_every": 0, "samples_every": 0}
    with Diary(monkeypatch, PolicyStage) as diary:
        train_sft(small.sft(tmp_path, logging=logging))
    order = [entry for entry in diary.entries if entry[0] in ("step", "_log")]
    assert order[1:5] == [("step", 1), ("_log", 1), ("step", 2), ("_log", 2)]

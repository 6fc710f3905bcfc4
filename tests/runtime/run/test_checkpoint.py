"""Checkpoints by themselves: what is read back, what is refused, and which ones stay."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.run.checkpoint import Checkpoints
from rlhf_jax.runtime.run.records import checksum, fingerprint
from rlhf_jax.runtime.run.settings import CheckpointSettings
from tests import small


def state_of(step):
    values = jax.random.normal(jax.random.key(step), (40, 30))
    return {
        "params": {"kernel": values, "none": jnp.zeros((0, 3))},
        "step": jnp.asarray(step, jnp.int32),
        "frozen": {"fingerprint": fingerprint(values)},
    }


def zeros():
    return jax.tree.map(jnp.zeros_like, state_of(0))


def anything(record):
    return None


def saved(folder, *steps, settings=None, evaluations=()):
    checkpoints = Checkpoints(str(folder), settings or CheckpointSettings())
    checkpoints.evaluations = dict(evaluations)
    for step in steps:
        assert checkpoints.save(step, state_of(step), {"n": step})
    checkpoints.close()
    return checkpoints


def restored(folder, like=None, check=anything):
    return Checkpoints(str(folder), CheckpointSettings()).restore(
        zeros() if like is None else like, check
    )


def assert_is(restored_run, step):
    assert restored_run.step == step
    jax.tree.map(np.testing.assert_array_equal, restored_run.state, state_of(step))


def our_warnings(caplog):
    """Without what asyncio says of reads that Orbax gave up."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("rlhf_jax")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    saved(folder, 1, 2)
    return folder


def test_a_checkpoint_restores_every_bit_and_its_record(two):
    restored_run = restored(two)
    assert_is(restored_run, 2)
    assert restored_run.record["n"] == 2
    assert restored_run.record["arrays"]["params/kernel"][:2] == [[40, 30], "float32"]
    assert restored(two / "elsewhere") is None


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(6, dtype=np.int8),
        np.arange(6).reshape(3, 2) > 2,
        np.asarray(7, np.uint32),
        jnp.arange(5, dtype=jnp.bfloat16),
    ],
    ids=lambda array: str(array.dtype),
)
def test_a_checksum_is_that_of_a_loop_and_sees_every_element(array):
    array = jnp.asarray(array)
    full = np.asarray(array)
    bits = (full if full.dtype == bool else full.view(f"u{full.itemsize}")).reshape(-1)
    expected = sum((2 * i + 1) * int(x) for i, x in enumerate(bits)) % 2**32
    assert int(jax.jit(checksum)(array)) == expected
    for place in range(array.size):
        changed = full.copy().reshape(-1)
        changed[place] = not changed[place] if full.dtype == bool else changed[place] + 1
        assert int(checksum(jnp.asarray(changed.reshape(full.shape)))) != expected


# --- damage --------------------------------------------------------------------------------------

DAMAGES = {
    "deleted": lambda data: None,
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
}
# Nothing is read from these, or nothing that is not known otherwise.
UNREAD = {"_sharding", "commit_success.txt"}


def damage(file, how):
    data = DAMAGES[how](file.read_bytes())
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)


@pytest.mark.parametrize("how", DAMAGES)
def test_no_damage_to_any_file_goes_unseen(tmp_path, two, caplog, how):
    """The saved state is read, or the one before it with a warning that says why."""
    newest = two / "checkpoints" / "2"
    reported = set()
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        folder = tmp_path / "run"
        shutil.copytree(two, folder)
        name = file.relative_to(newest)
        damage(folder / "checkpoints" / "2" / name, how)
        caplog.clear()
        restored_run = restored(folder)
        assert_is(restored_run, restored_run.step)
        if restored_run.step == 1:
            reported.add(name)
            assert small.checkpoint_names(folder) == ["1", "bad-2"]
            (warning,) = our_warnings(caplog)
            start = f"The checkpoint of step 2 in {folder}/checkpoints cannot be used ("
            assert warning.startswith(start)
            assert "\n" not in warning
            assert warning.endswith("; it is now bad-2, and the run continues from step 1.")
            saved(folder, 2)
            assert_is(restored(folder), 2)
        else:
            assert not our_warnings(caplog)
        shutil.rmtree(folder)
    seen = {name.name for name in reported}
    assert not seen & UNREAD
    assert {"_CHECKPOINT_METADATA", "manifest.ocdbt"} <= seen
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    assert largest.relative_to(newest) in reported


def test_several_bad_ones_are_put_aside_and_their_names_do_not_clash(tmp_path, two, caplog):
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    for _ in range(2):
        shutil.rmtree(folder / "checkpoints" / "2" / "default" / "d")
        assert_is(restored(folder), 1)
        saved(folder, 2)
    shutil.rmtree(folder / "checkpoints" / "2" / "default")
    (folder / "checkpoints" / "3").mkdir()
    assert_is(restored(folder), 1)
    assert small.checkpoint_names(folder) == ["1", "bad-2", "bad-2-1", "bad-2-2", "bad-3"]
    assert "_CHECKPOINT_METADATA is missing" in caplog.text


def test_without_a_complete_checkpoint_one_sentence_says_so_and_nothing_is_touched(tmp_path, two):
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    for step in "12":
        (folder / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(InputError) as raised:
        restored(folder)
    assert str(raised.value) == (
        f"No checkpoint in {folder}/checkpoints can be used (step 2: _CHECKPOINT_METADATA is no "
        "record; step 1: _CHECKPOINT_METADATA is no record); put the folder back from a copy, or "
        "choose another --run_dir to start anew."
    )
    assert small.checkpoint_names(folder) == ["1", "2"]


def test_errors_of_the_machine_are_no_fault_of_a_checkpoint(two, monkeypatch):
    def denied(*args, **kwargs):
        raise ValueError("PERMISSION_DENIED: no token")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", denied)
    with pytest.raises(ValueError, match="PERMISSION_DENIED"):
        restored(two)
    assert small.checkpoint_names(two) == ["1", "2"]


# --- another run's -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: state["params"].update(kernel=jnp.zeros((40, 3, 10))),
            "params/kernel is float32[40, 30] there and float32[40, 3, 10] here",
        ),
        (
            lambda state: state.update(step=jnp.zeros((), jnp.uint32)),
            "step is int32[] there and uint32[] here",
        ),
        (
            lambda state: state.update(more=jnp.zeros(2)),
            "more is missing there and float32[2] here",
        ),
        (lambda state: state.pop("step"), "step is int32[] there and missing here"),
    ],
)
def test_another_models_checkpoint_is_refused_by_the_first_difference(two, change, said):
    folder = two
    like = zeros()
    change(like)
    with pytest.raises(InputError) as raised:
        restored(folder, like)
    assert str(raised.value) == (
        f"The checkpoint of step 2 in {folder} is of another model or another version: {said}; put "
        "back what the run began with, or choose another --run_dir."
    )
    assert "2" in small.checkpoint_names(folder)


def test_another_configuration_is_refused_before_the_arrays_are_read(two):
    def check(record):
        raise InputError(f"no {record['n']}")

    with pytest.raises(InputError, match="no 2"):
        restored(two, {}, check)


# --- saving --------------------------------------------------------------------------------------


def test_background_writes_are_not_of_arrays_that_the_next_step_overwrites(tmp_path, monkeypatch):
    state, given = state_of(1), []
    save = ocp.CheckpointManager.save

    def spy(self, step, *, args, **kwargs):
        given.append(args.item)
        return save(self, step, args=args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", spy)
    checkpoints = Checkpoints(str(tmp_path), CheckpointSettings())
    checkpoints.save(1, state)
    pointers = [tree["params"]["kernel"].unsafe_buffer_pointer() for tree in (state, given[0])]
    assert pointers[0] != pointers[1]
    donating = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    jax.block_until_ready(donating(state))
    checkpoints.close()
    assert_is(restored(tmp_path), 1)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), CheckpointSettings())
    assert not checkpoints.save(1, state_of(1) | {"nan": jnp.asarray([0.0, jnp.nan])})
    assert checkpoints.latest_step() is None
    assert checkpoints.save(1, state_of(1))
    assert checkpoints.save(1, state_of(2))  # is there already
    assert checkpoints.latest_step() == 1
    checkpoints.close()
    assert_is(restored(tmp_path), 1)


def test_a_save_that_was_killed_is_cleared_away_by_the_next(tmp_path):
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    assert restored(tmp_path) is None
    saved(tmp_path, 2)
    assert small.checkpoint_names(tmp_path) == ["2"]


# --- the best ------------------------------------------------------------------------------------

LOSSES = {1: 0.5, 2: 0.25, 3: 0.75, 4: 0.25, 5: float("nan"), 7: 0.5}
EVALUATIONS = {step: {"eval/loss": loss} for step, loss in LOSSES.items()}


@pytest.mark.parametrize(
    ("mode", "best", "kept"),
    [("min", (2, 0.25), ["2", "6", "7"]), ("max", (3, 0.75), ["3", "6", "7"])],
)
def test_the_best_checkpoint_is_kept(tmp_path, mode, best, kept):
    settings = CheckpointSettings(best_metric="eval/loss", best_mode=mode)
    saved(tmp_path, 1, 2, 3, settings=settings, evaluations=EVALUATIONS)
    checkpoints = saved(tmp_path, 4, 5, 6, 7, settings=settings, evaluations=EVALUATIONS)
    assert checkpoints.best() == best
    assert small.checkpoint_names(tmp_path) == kept
    assert_is(checkpoints.restore_best(zeros()), best[0])
    # An evaluation that is not saved yet counts, if it is better.
    checkpoints.evaluations[8] = {"eval/loss": 0.5}
    assert checkpoints.best(8) == best
    checkpoints.evaluations[8] = {"eval/loss": 0.1 if mode == "min" else 1.0}
    assert checkpoints.best(8)[0] == 8
    assert checkpoints.best() == best
    # If the best one is damaged, the next best one is read, and nothing is moved.
    shutil.rmtree(tmp_path / "checkpoints" / kept[0] / "default")
    assert_is(checkpoints.restore_best(zeros()), 7)
    assert small.checkpoint_names(tmp_path) == kept


def test_without_a_metric_no_checkpoint_is_the_best(tmp_path):
    assert saved(tmp_path, 1, evaluations=EVALUATIONS).best() is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"best_mode": "least"}, "checkpoint.best_mode must be min or max, but is 'least'."),
        ({"export_best": True}, "checkpoint.export_best needs a metric to judge by; give --check"),
        ({"keep": 0}, "checkpoint.keep must be above 0, but is 0."),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(InputError) as raised:
        CheckpointSettings(**settings)
    assert str(raised.value).startswith(said)

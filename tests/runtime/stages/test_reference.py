"""A reference that is computed once: its file, its checks, and continued runs."""

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime import train_dpo, train_kto
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.offline import OfflineStage
from tests import small


@pytest.fixture(scope="module")
def run(tmp_path_factory, sft_run):
    """A finished run of `train_dpo`, as (folder, result)."""
    folder = tmp_path_factory.mktemp("dpo")
    return folder, train_dpo(small.dpo(folder, sft_run[0]))


def stopped(monkeypatch, folder, config):
    """A run that is stopped after its second step."""
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, OfflineStage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train_dpo(config)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]


@pytest.mark.newest
def test_a_run_learns_and_reports(run):
    folder, result = run
    assert result.metrics["eval/loss"] < np.log(2)
    assert {"eval/loss", "eval/accuracy", "eval/margin", "eval/longer_wins"} <= set(result.metrics)
    assert "eval/perplexity" not in result.metrics
    first = small.metrics_by_step(folder)[1]
    # Policy and reference are the same model, up to the rounding of two programs.
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["rewards/accuracies"] == 0.0
    with np.load(folder / "reference.npz") as file:
        shapes = {name: file[name].shape for name in file.files if name != "mark"}
    assert shapes == {
        f"{split}/ref_{response}": (size,)
        for split, size in (("train", 32), ("eval", 8))
        for response in ("chosen", "rejected")
    }
    assert "Preference optimization" in (folder / "report.html").read_text()


def test_a_stopped_run_reads_its_file_and_continues_bit_for_bit(
    tmp_path, monkeypatch, capfd, sft_run, run
):
    config = small.dpo(tmp_path, sft_run[0])
    stopped(monkeypatch, tmp_path, config)
    written = (tmp_path / "reference.npz").read_bytes()
    assert "computing log-probabilities of the reference" in capfd.readouterr().err
    train_dpo(config)
    assert "computing" not in capfd.readouterr().err
    assert (tmp_path / "reference.npz").read_bytes() == written
    small.assert_same_run(run[0], tmp_path)


@pytest.mark.parametrize(
    ("options", "other"),
    [({"builtin_rows": 31}, "other examples"), ({"seed": 1}, "other examples")],
    ids=["number", "seed"],
)
def test_a_file_of_other_examples_is_refused(tmp_path, sft_run, run, options, other):
    (tmp_path / "reference.npz").write_bytes((run[0] / "reference.npz").read_bytes())
    with pytest.raises(InputError, match=f"reference.npz holds log-probabilities of {other}: put"):
        train_dpo(small.dpo(tmp_path, sft_run[0], data=options))


def test_a_file_of_another_reference_is_refused(tmp_path, run):
    """The model that DPO has trained is another one than the one it began with."""
    (tmp_path / "reference.npz").write_bytes((run[0] / "reference.npz").read_bytes())
    with pytest.raises(InputError, match="holds log-probabilities of another reference: put back"):
        train_dpo(small.dpo(tmp_path, run[0]))


def test_a_file_of_other_settings_is_refused(tmp_path, sft_run, run):
    (tmp_path / "reference.npz").write_bytes((run[0] / "reference.npz").read_bytes())
    with pytest.raises(InputError, match="holds log-probabilities of other settings: put back"):
        train_dpo(small.dpo(tmp_path, sft_run[0], dpo={"ld_alpha": 0.5}))


def test_a_damaged_file_is_refused(tmp_path, sft_run):
    (tmp_path / "reference.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="reference.npz is damaged; delete it to compute it"):
        train_dpo(small.dpo(tmp_path, sft_run[0]))


@pytest.mark.newest
def test_without_precomputed_reference_a_stopped_run_continues_bit_for_bit(
    tmp_path, monkeypatch, sft_run
):
    """A reference that moves is part of the checkpoint."""
    options = {"precompute_ref": False, "sync_ref_model": True, "ref_model_sync_steps": 1}
    folders = tmp_path / "full", tmp_path / "parts"
    configs = [small.dpo(folder, sft_run[0], dpo=options) for folder in folders]
    train_dpo(configs[0])
    stopped(monkeypatch, folders[1], configs[1])
    train_dpo(configs[1])
    small.assert_same_run(*folders)
    assert "reference" in small.checkpoint(folders[1])


def references(folder):
    with np.load(folder / "reference.npz") as file:
        return {name: file[name] for name in file.files if name != "mark"}


@pytest.mark.newest
def test_the_reference_of_another_folder(tmp_path, monkeypatch, sft_run, run):
    """It gives what a run that begins with it computes."""
    configs = {
        "own": small.dpo(tmp_path / "own", run[0]),
        "other": small.dpo(
            tmp_path / "other", sft_run[0], model={"reference_path": f"{run[0]}/hf"}
        ),
    }
    for config in configs.values():
        with monkeypatch.context() as patch:
            small.interrupt_in(patch, OfflineStage, "step", 1)
            with pytest.raises(loop.Interrupted):
                train_dpo(config)
    own, other = (references(tmp_path / name) for name in configs)
    assert own.keys() == other.keys()
    for name, values in own.items():
        np.testing.assert_array_equal(values, other[name])
    assert (own["train/ref_chosen"] != references(run[0])["train/ref_chosen"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref": False}, "but with dpo.precompute_ref false the reference is the model"),
        ({"kind": "simpo"}, "but dpo.kind simpo has no reference; leave it out"),
    ],
    ids=str,
)
def test_a_reference_that_is_not_read_is_refused(tmp_path, sft_run, options, message):
    with pytest.raises(InputError, match=f"model.reference_path is given, {message}"):
        train_dpo(small.dpo(tmp_path, sft_run[0], dpo=options, model={"reference_path": "other"}))


def test_kto_trains_on_pairs_as_single_responses(tmp_path, sft_run):
    result = train_kto(small.kto(tmp_path, sft_run[0]))
    assert result.metrics["rewards/margins"] > 0
    assert {"eval/accuracy", "eval/loss", "train/kl"} <= set(result.metrics)
    with np.load(tmp_path / "reference.npz") as file:
        assert file["train/ref_other"].shape == (64,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "", "chosen": "a", "rejected": "b"}',
            "40 of 40 examples have an empty prompt",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "No pair is left: of 40, 0 have an"),
    ],
)
def test_pairs_that_cannot_be_learned_from_are_one_sentence(tmp_path, sft_run, line, message):
    file = tmp_path / "pairs.jsonl"
    file.write_text((line + "\n") * 40)
    data = {"path": str(file), "eval_rows": 0}
    with pytest.raises(InputError, match=f"^{message}"):
        train_dpo(small.dpo(tmp_path / "run", sft_run[0], data=data))


def test_labels_that_are_all_equal_are_one_sentence(tmp_path, sft_run):
    file = tmp_path / "labelled.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 8)
    config = small.kto(tmp_path / "run", sft_run[0], data={"path": str(file), "eval_rows": 0})
    with pytest.raises(InputError, match="^All 8 training examples have the label true, so that"):
        train_kto(config)

"""What the stages are assembled from: keys, checksums, folders behind an address."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rlhf_jax.data.tokenizers import Settings as TokenizerSettings
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.runtime import assemble
from rlhf_jax.runtime.sft import prompt_of, text_of


def test_no_two_stages_share_a_key():
    keys = [
        tuple(np.asarray(jax.random.key_data(key)).tolist())
        for seed in (0, 1)
        for stage in ("sft", "reward", "ppo")
        for key in assemble.stage_keys(seed, stage, 3)
    ]
    assert len(set(keys)) == len(keys) == 18


def test_a_fingerprint_sees_each_bit_and_each_place():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}
    same = jax.tree.map(jnp.copy, tree)
    changed = [
        {**tree, "a": tree["a"].at[1, 2].set(jnp.nextafter(5.0, 6.0))},
        {**tree, "a": tree["a"].at[0, 0].set(-0.0)},
        {**tree, "a": tree["a"][::-1]},
        {**tree, "b": {"c": jnp.ones(4).at[3].set(2.0)}},
        {"a": tree["a"]},
    ]
    prints = [int(assemble.fingerprint(each)) for each in (tree, same, *changed)]
    assert prints[0] == prints[1]
    assert all(a != b for a, b in itertools.combinations(prints[1:], 2))


def test_a_folder_behind_an_address_is_copied_and_a_local_one_is_not(tmp_path, monkeypatch):
    """A local folder stands in for the bucket."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with assemble.local_folder(str(tmp_path)) as folder:
        assert folder == str(tmp_path)
    path_of = epath.Path
    monkeypatch.setattr(
        assemble.epath,
        "Path",
        lambda path: path_of(str(path).replace("gs://bucket", str(tmp_path))),
    )
    with assemble.local_folder("gs://bucket/hf") as folder:
        assert (Path(folder) / "config.json").read_text() == "{}"
        assert not folder.startswith(str(tmp_path))
    assert not Path(folder).exists()


def test_a_chat_template_of_the_settings_stays_with_the_tokenizer(tmp_path):
    template = "{% for turn in messages %}[{{ turn['content'] }}]{% endfor %}"
    settings = TokenizerSettings(vocab_size=258, chat_template=template)
    tokenizer = assemble.choose_tokenizer(settings, None, lambda: ["a", "b"])
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi."}]
    row = {"prompt": messages, "completion": [{"role": "assistant", "content": "Ho."}]}
    assert prompt_of(row, 1, load_tokenizer(tmp_path)) == "[Hi.]"
    assert text_of(row) == "Hi.Ho."
    assert text_of({"responses": ["a", messages]}) == "aHi."
    # Another template takes the place of that in the folder.
    other = TokenizerSettings(path=str(tmp_path), chat_template="{{ messages[0]['content'] }}")
    assert prompt_of(row, 1, assemble.choose_tokenizer(other, None, list)) == "Hi."

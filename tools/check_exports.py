"""Opens folders that this library writes in transformers, and compares logits and scores.

    python tools/check_exports.py write FOLDER [MODEL_TYPE ...]      # with this library
    python tools/check_exports.py compare FOLDER [MODEL_TYPE ...]    # transformers, 4.57 or 5

A tiny model with random parameters of each family, and a reward model of it, on texts padded on the
right. Windows of attention are shorter than the texts. Prints the largest difference of each
folder, and exits with 1 if one exceeds 2e-5. A classifier that transformers lacks is named.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

LIMIT = 2e-5
TYPES = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "olmo2"),
    *("phi3", "granite"),
)


def write(folder, types):
    """Two folders of each family, with our numbers beside them."""
    import jax

    from rlhf_jax.models import decoder_readers, huggingface
    from rlhf_jax.models.heads import apply_head
    from rlhf_jax.models.settings import ModelSettings

    sizes = ModelSettings(n_layer=4, n_embd=32, n_head=4, n_positions=64, dropout=0.0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 211, (3, 12)).astype(np.int32)
    lengths = np.array([12, 5, 9])
    mask = np.arange(12) < lengths[:, None]

    def noise(path, leaf):
        # Gemma's scales are 1 + these numbers.
        mean = path[-1].key == "scale" and not kind.startswith("gemma")
        return mean + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)

    def numbers_of(model, params, head):
        hidden = model.hidden(params, tokens, mask)
        scores = apply_head(head, hidden)[np.arange(3), lengths - 1]
        return {"logits": model.logits(params, hidden), "scores": scores}

    for kind in types:
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = huggingface.fresh_model(sizes, vocab_size=211, model_type=kind, **ids)
        data = json.loads(getattr(model.config, "source", "{}"))
        if data.get("sliding_window"):
            config = decoder_readers.read_config({**data, "sliding_window": 5})
            model = dataclasses.replace(model, config=config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.tree_util.tree_map_with_path(noise, shapes)
        head = {"kernel": rng.standard_normal(32).astype(np.float32)}
        numbers = jax.jit(numbers_of, static_argnums=0)(model, params, head)
        huggingface.save_pretrained(folder / kind, model, params)
        reward = {"model": model.without_unembedding(params), "head": head}
        huggingface.save_reward_model(folder / f"{kind}_reward", model, reward)
        np.savez(folder / f"{kind}.npz", tokens=tokens, mask=mask, **numbers)


def compare(folder, types):
    """The number of folders that differ, after a line for each."""
    import torch
    import transformers

    failures = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for kind in types:
        ours = np.load(folder / f"{kind}.npz")
        for name, quantity in ((kind, "logits"), (f"{kind}_reward", "scores")):
            config = json.loads((folder / name / "config.json").read_text())
            (architecture,) = config["architectures"]
            if not hasattr(transformers, architecture):
                print(f"{name}: no {architecture}")
                continue
            model = getattr(transformers, architecture).from_pretrained(
                folder / name, dtype=torch.float32, attn_implementation="eager"
            )
            mask, pad = ours["mask"], config.get("pad_token_id")
            tokens = np.where(mask, ours["tokens"], 0 if pad is None else pad)
            arrays = (torch.from_numpy(x).long() for x in (tokens, mask))
            with torch.no_grad():
                theirs = forward(model, *arrays)
            real = mask if quantity == "logits" else slice(None)
            theirs = theirs if quantity == "logits" else theirs[:, 0]
            difference = np.abs(theirs - ours[quantity])[real].max()
            failures += not difference <= LIMIT
            print(f"{name}: {architecture}, {quantity} differ by {difference:.1e} at most")
    return failures


def forward(model, tokens, mask):
    """The logits of a model in evaluation."""
    return model.eval()(input_ids=tokens, attention_mask=mask).logits.numpy()


if __name__ == "__main__":
    command, folder, *types = sys.argv[1:]
    run = {"write": write, "compare": compare}[command]
    sys.exit(bool(run(Path(folder), types or TYPES)))

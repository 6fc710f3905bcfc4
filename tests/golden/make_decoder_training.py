"""Makes tests/golden/decoder_training.npz: ten AdamW steps of PyTorch on transformers' decoders.

    python tests/golden/make_decoder_training.py

It needs `torch` and `transformers` 4.57; the tests read only what it wrote. Models and weights are
those of `make_decoders.py`, but for a vocabulary of 211. The gradients of some steps are clipped,
and matrices decay.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from decoder_weights import weights
from make_decoders import LLAMA3, SIZES, logits, nll

FOLDER = pathlib.Path(__file__).parent
CASES = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_scaled": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
STEPS = 10
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, MAX_NORM = 0.1, 2.0


def main() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 211, (2, 4, 16))
    lengths = np.array([[16, 9, 12, 2], [5, 16, 14, 11]])
    mask = np.arange(16) < lengths[..., None]
    arrays = {"tokens": tokens, "mask": mask}
    for case, (model_type, settings) in CASES.items():
        sizes = {**SIZES, "vocab_size": 211}
        config = transformers.AutoConfig.for_model(model_type, **sizes, **settings)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                start = weights(name, tuple(parameter.shape)) + np.float32("norm" in name)
                parameter.copy_(torch.from_numpy(start))
        arrays[f"{case}/config"] = np.array(json.dumps(config.to_dict(), sort_keys=True))
        losses, norms = train(model, tokens, mask)
        arrays[f"{case}/losses"], arrays[f"{case}/norms"] = losses, norms
        with torch.no_grad():
            arrays[f"{case}/logits"] = logits(model, tokens[0], mask[0]).numpy()
    np.savez_compressed(FOLDER / "decoder_training.npz", **arrays)


def train(model, tokens, mask, steps=STEPS):
    """(losses before each update, norms of gradients before clipping), batches in turn."""
    groups = [
        {"params": [x for x in model.parameters() if x.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [x for x in model.parameters() if x.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    losses, norms = [], []
    for step in range(steps):
        batch = step % len(tokens)
        optimizer.zero_grad()
        loss = nll(logits(model, tokens[batch], mask[batch]), tokens[batch], mask[batch])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), np.array(norms)


if __name__ == "__main__":
    main()

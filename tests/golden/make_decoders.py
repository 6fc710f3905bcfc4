"""Makes tests/golden/decoders.npz: what PyTorch's decoders of `transformers` compute.

    python tests/golden/make_decoders.py

It needs `torch` and `transformers` 4.57; the tests read only what it wrote. The models are tiny,
with weights from `decoder_weights.py`, so that only configurations and numbers are kept. Windows
are shorter than the texts, and switches that are off by default are on in some case.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from decoder_weights import direction, weights

FOLDER = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
CASES = {
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": LINEAR}),
    "llama_yarn": ("llama", {"rope_scaling": YARN, "head_dim": 16, "tie_word_embeddings": True}),
    "llama_llama3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3_bias": ("qwen3", {"attention_bias": True, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "sliding_window_pattern": 3,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            "rope_scaling": LINEAR,
            "final_logit_softcapping": 3.0,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3_sliding": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "smollm3_list": ("smollm3", {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": 5}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
}

# Also in bfloat16, weights and products.
IN_BFLOAT16 = ("qwen3_bias", "gemma2")


def main() -> None:
    rng, arrays = np.random.default_rng(0), {}
    tokens = rng.integers(3, SIZES["vocab_size"], (3, 12))
    lengths = np.array([12, 5, 9])
    right = np.arange(12) < lengths[:, None]
    masks = {"right": right, "left": right[:, ::-1].copy()}
    arrays["tokens"], arrays["right"], arrays["left"] = tokens, right, masks["left"]
    for case, (model_type, settings) in CASES.items():
        config = transformers.AutoConfig.for_model(model_type, **SIZES, **settings)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        offset = float(model_type.startswith("gemma"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = weights(name, tuple(parameter.shape))
                if "norm" in name:
                    values = values + np.float32(1.0 - offset)
                parameter.copy_(torch.from_numpy(values))
        arrays[f"{case}/config"] = np.array(json.dumps(config.to_dict(), sort_keys=True))
        for side, mask in masks.items():
            arrays[f"{case}/{side}"] = logits(model, tokens, mask).detach().numpy()
        loss = nll(logits(model, tokens, right), tokens, right)
        loss.backward()
        arrays[f"{case}/loss"] = loss.detach().numpy()
        slopes = {
            name: float((parameter.grad.numpy() * direction(name, tuple(parameter.shape))).sum())
            for name, parameter in model.named_parameters()
        }
        arrays[f"{case}/slopes"] = np.array(json.dumps(slopes))
        arrays[f"{case}/greedy"] = greedy(model, tokens, masks["left"])
        if case in IN_BFLOAT16:
            for name, dtype in (("bfloat16", torch.bfloat16), ("of_bfloat16", torch.float32)):
                for parameter in model.parameters():  # buffers stay float32, as when it is loaded
                    parameter.data = parameter.data.to(dtype)
                with torch.no_grad():
                    arrays[f"{case}/{name}"] = logits(model, tokens, right).float().numpy()
    np.savez_compressed(FOLDER / "decoders.npz", **arrays)


def logits(model, tokens, mask):
    """Logits with positions that count real tokens."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return model(
        torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        position_ids=torch.from_numpy(positions),
    ).logits


def nll(scores, tokens, mask):
    """The mean negative log-likelihood of real tokens but the first one of each text."""
    logprobs = torch.log_softmax(scores[:, :-1], -1)
    target = torch.from_numpy(tokens[:, 1:, None])
    real = torch.from_numpy(mask[:, 1:])
    return -logprobs.gather(-1, target)[..., 0][real].mean()


def greedy(model, tokens, mask, count=8):
    """The likeliest tokens, each chosen by a full pass over the text before it."""
    start = tokens.shape[1]
    for _ in range(count):
        with torch.no_grad():
            best = logits(model, tokens, mask)[:, -1].argmax(-1).numpy()
        tokens = np.concatenate([tokens, best[:, None]], 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
    return tokens[:, start:]


if __name__ == "__main__":
    main()

"""Makes tests/golden/adapters.npz: what PEFT's adapters on PyTorch's decoders compute.

    python tests/golden/make_adapters.py

It needs `torch`, `transformers` 4.57 and `peft`; the tests read only what it wrote. Weights of
bases and adapters come from `decoder_weights.py`, so that only configurations and numbers are kept.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from decoder_weights import weights
from make_decoders import SIZES, logits, nll
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

FOLDER = pathlib.Path(__file__).parent
STEPS = 5
GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
CASES = {
    "llama": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "mlp.down_proj", "v_proj"],
            "exclude_modules": ["layers.3.self_attn.v_proj"],
            "layers_to_transform": [1, 3],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"layers.3.self_attn.q_proj": 9},
            "modules_to_save": ["lm_head"],
        },
    ),
    "dora": (
        "llama",
        {"r": 3, "use_dora": True, "target_modules": r".*layers\.[23]\..*(o_proj|up_proj)"},
    ),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "lora_alpha": 8}),
    "phi3": ("phi3", {"r": 2, "target_modules": "all-linear"}),
}
TRAINED = ("llama", "dora")


def main() -> None:
    rng, arrays = np.random.default_rng(0), {}
    tokens = rng.integers(3, SIZES["vocab_size"], (3, 12))
    mask = np.arange(12) < np.array([12, 5, 9])[:, None]
    arrays["tokens"], arrays["mask"] = tokens, mask
    for case, (model_type, settings) in CASES.items():
        sizes = GPT2 if model_type == "gpt2" else SIZES
        ids = {name: SIZES[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = transformers.AutoConfig.for_model(model_type, **{**sizes, **ids})
        config._attn_implementation = "eager"
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                offset = np.float32("norm" in name)
                parameter.copy_(torch.from_numpy(weights(name, tuple(parameter.shape)) + offset))
        transposed = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
        lora = LoraConfig(task_type="CAUSAL_LM", **settings, **transposed)
        model = get_peft_model(base, lora).eval()
        shapes = {n: tuple(x.shape) for n, x in get_peft_model_state_dict(model).items()}
        drawn = {
            name: torch.from_numpy(weights(name, shape) + np.float32("magnitude" in name))
            for name, shape in shapes.items()
        }
        set_peft_model_state_dict(model, drawn)
        data = {key: sorted(v) if isinstance(v, set) else v for key, v in lora.to_dict().items()}
        arrays[f"{case}/config"] = np.array(json.dumps(config.to_dict(), sort_keys=True))
        arrays[f"{case}/adapter"] = np.array(json.dumps(data, sort_keys=True))
        arrays[f"{case}/shapes"] = np.array(json.dumps(shapes, sort_keys=True))
        arrays[f"{case}/logits"] = logits(model, tokens, mask).detach().numpy() * mask[..., None]
        if case in TRAINED:
            arrays[f"{case}/losses"] = np.array(train(model, tokens, mask), np.float32)
    np.savez_compressed(FOLDER / "adapters.npz", **arrays)


def train(model, tokens, mask):
    """Losses of AdamW steps on the parameters that PEFT trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = nll(logits(model, tokens, mask), tokens, mask)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


if __name__ == "__main__":
    main()

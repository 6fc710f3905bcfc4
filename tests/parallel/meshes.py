"""All stages on one device and on eight, and the comparison of their results."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.data import builtin
from rlhf_jax.data.tokenizers import train_tokenizer
from rlhf_jax.models.family import TOKEN_IDS
from rlhf_jax.models.huggingface import described_model, save_pretrained
from tests import small

# Every way to write 8 as a product of three.
FACTORISATIONS = tuple(
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8
)
# Few: a difference in rounding can change a sampled token, and each further step is another chance.
STEPS = 4
STAGES = ("sft", "reward", "ppo", "frozen", "trunk", "dpo", "kto", "online_dpo", "rft", "grpo")
SAMPLING = ("ppo", "frozen", "trunk", "online_dpo", "grpo")  # whose steps sample responses
# Sums in another order differ in their last bits, which Adam's early steps, of nearly the sign of
# the gradient, enlarge.
TOLERANCE = 1e-5
# Families by `model_type`. Of the decoders, keys and values have half as many heads as queries.
FAMILIES = ("gpt2", "qwen3", "llama")
DECODER = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def mesh_name(sizes):
    return "x".join(map(str, sizes))


def model_of(family, base):
    """The section "model": sizes of a fresh GPT-2, or the folder of a fresh decoder, written here.

    The decoder has a tokenizer; its output is tied to the embedding but for Qwen3.
    """
    if family == "gpt2":
        return {"n_layer": 2, "n_head": 8, "n_embd": 64}
    folder = Path(base) / family / "base"
    if not folder.exists():
        folder.mkdir(parents=True)
        examples = builtin.texts(0, 64)
        texts = [text for example in examples for text in example.values()]
        tokenizer = train_tokenizer(texts, DECODER["vocab_size"])
        config = {**DECODER, "model_type": family, "tie_word_embeddings": family != "qwen3"}
        config |= {name: getattr(tokenizer, name) for name in TOKEN_IDS}
        (folder / "config.json").write_text(json.dumps(config))
        model = described_model(folder)
        save_pretrained(folder, model, model.init(jax.random.key(0)), tokenizer)
    return {"path": str(folder)}


def make_configs(base, family, sizes):
    """The stages of a family on a mesh, each from the results of those on one device, by name.

    "ppo" mixes in texts; "frozen" has frozen layers, a value model of its own, an evaluation, and
    computes layers again; "trunk" has frozen layers, and a value head on the layers of the policy.
    "dpo" sorts the batch, and trains adapters of the upper layer on a base in int8; "kto" has a
    reference that is computed before. "online_dpo" has frozen layers, and trains on two of three
    responses, "grpo" on all.
    """
    folder, one_device = (run_folder(base, family, mesh) for mesh in (sizes, (1, 1, 1)))
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    logging = {"eval_every": 0, "samples_every": 1, "num_samples": 8, "progress": False}
    shared = {"mesh": mesh, "logging": logging}
    data = {"builtin_rows": 8 * STEPS, "eval_rows": 0}
    sft, rewarded = one_device / "sft", one_device / "reward"
    options = {"normalize_before": True, "normalize_after": True, "num_layers_unfrozen": 1}
    texts = {"builtin_rows": 32, "eval_rows": 0, "max_length": 16}

    def ppo(name, data=data, **sections):
        iterations = {"total_episodes": 8 * STEPS, **sections.pop("ppo", {})}
        return small.ppo(
            folder / name, sft, rewarded, **shared, data=data, ppo=iterations, **sections
        )

    frozen = {"num_layers_unfrozen": 1, "value_model": "policy"}
    halves = {**data, "builtin_rows": 4 * STEPS}  # of a pair two examples
    preference = {"kind": "aot", "precompute_ref": False}
    lora = {"r": 4, "layers_to_transform": [1], "base": "int8"}
    online = {"total_episodes": 24 * STEPS, "num_responses": 3, "num_layers_unfrozen": 1}
    best = {"rft": {"batch_size": 8}, "generation": {"batch_size": 16}}
    grouped = {"total_episodes": 24 * STEPS, "beta": 0.1, "gradient_accumulation_steps": 2}
    model = model_of(family, base)
    return {
        "sft": small.sft(folder / "sft", **shared, data=data, model=model),
        "reward": small.reward(folder / "reward", sft, **shared, data=data, reward=options),
        "ppo": ppo("ppo", ppo={"ptx_coef": 0.5}, ptx=texts),
        "frozen": ppo("frozen", data={**data, "eval_rows": 8}, ppo=frozen, model={"remat": "full"}),
        "trunk": ppo("trunk", ppo={"num_layers_unfrozen": 1}),
        "dpo": small.dpo(folder / "dpo", sft, **shared, data=data, dpo=preference, lora=lora),
        "kto": small.kto(folder / "kto", sft, **shared, data=halves),
        "online_dpo": small.online_dpo(
            folder / "online_dpo", sft, rewarded, **shared, data=data, online_dpo=online
        ),
        "rft": small.rft(folder / "rft", sft, **shared, data=data, **best),
        "grpo": small.grpo(folder / "grpo", sft, rewarded, **shared, data=data, grpo=grouped),
    }


def trainer_of(stage):
    """The name of the trainer of a stage."""
    return "ppo" if stage in ("frozen", "trunk") else stage


def run_folder(base, family, sizes):
    """The folder of the runs of a family on a mesh."""
    return Path(base) / family / mesh_name(sizes)


def differences(one, several):
    """By metric, how far two run folders lie apart, as a share of what is tolerated."""
    logs = [small.entries(Path(folder) / "metrics.jsonl") for folder in (one, several)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert len(logs[0]) == STEPS
    shares: dict[str, float] = {}
    for expected, actual in zip(*logs, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            share = abs(actual[name] - value) / (TOLERANCE * (1 + abs(value)))
            shares[name] = max(shares.get(name, 0.0), share)
    return shares


def selected(folder):
    """The responses that a run of rejection sampling sampled, and those that it trained on."""
    return [
        [(line["prompt"], line["completion"]) for line in small.entries(Path(folder) / name)]
        for name in ("sampled.jsonl", "selected.jsonl")
    ]


def sampled(folder):
    """The responses that the steps of a run sampled, by step and prompt."""
    lines = small.entries(Path(folder) / "samples.jsonl")
    return [(line["step"], line["prompt"], line["response"]) for line in lines]

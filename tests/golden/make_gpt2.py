"""Makes tests/golden/gpt2_*.npz: what PyTorch's GPT-2 of `transformers` computes with a tiny model.

    python tests/golden/make_gpt2.py

The one file of this project that needs `torch` (and `transformers`); the tests read only what it
wrote. Weights are drawn much wider than GPT-2's own start (0.2 instead of 0.02, biases and layer
norms too), so that a transposed kernel or a forgotten bias shows. They are rounded to float16,
which halves the file and loses nothing: PyTorch computes with the rounded numbers.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
SIZES = {"vocab_size": 211, "n_positions": 48, "n_embd": 32, "n_layer": 3, "n_head": 4}
BOS, EOS, PAD = 0, 1, 2
LENGTHS = np.array([10, 3, 7])


def make_config(**more) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        **SIZES,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="eager",
        **more,
    )


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_norm_scale = ".ln_" in name and name.endswith("weight")
            parameter.copy_((noise + 1.0 if is_norm_scale else noise).half().float())


def padded_batch(seed: int, side: str, length: int = 10):
    """(tokens, mask) of LENGTHS real tokens; random tokens stand on the padding too."""
    tokens = np.random.default_rng(seed).integers(3, SIZES["vocab_size"], (len(LENGTHS), length))
    index = np.arange(length)
    mask = index < LENGTHS[:, None] if side == "right" else index >= length - LENGTHS[:, None]
    return tokens, mask


def run(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


def save(name: str, **arrays) -> None:
    arrays = {key: np.asarray(array) for key, array in arrays.items()}
    for key, array in arrays.items():
        if array.dtype == np.int64:
            arrays[key] = array.astype(np.int32)
    np.savez_compressed(FOLDER / f"gpt2_{name}.npz", **arrays)


def make_logits(model) -> None:
    arrays = {}
    for seed, side in enumerate(("left", "right")):
        tokens, mask = padded_batch(seed, side)
        logits = np.where(mask[..., None], run(model, tokens, mask), 0.0).astype(np.float32)
        arrays |= {f"{side}_tokens": tokens, f"{side}_mask": mask, f"{side}_logits": logits}
    save("logits", **arrays)


def generate(model, tokens, mask, stop_token_ids):
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=0,
        eos_token_id=list(stop_token_ids) or None,
    )
    out = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = out.sequences.numpy()[:, tokens.shape[1] :]
    best = torch.stack(out.scores, 1).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-2, "too close to call: take another seed"
    return np.pad(new, ((0, 0), (0, 12 - new.shape[1])))


def make_greedy(model) -> None:
    prompts, mask = padded_batch(2, "left")
    free = generate(model, prompts, mask, ())
    # Two stop tokens: one row stops early, one late, one never.
    stop_token_ids = (int(free[1, 5]), int(free[2, 8]))
    stopped = generate(model, prompts, mask, stop_token_ids)
    print("greedy", free, stop_token_ids, stopped, sep="\n")
    save(
        "greedy",
        prompts=prompts,
        prompt_mask=mask,
        tokens=free,
        stop_token_ids=stop_token_ids,
        stopped_tokens=stopped,
    )


def make_training(model) -> None:
    """Ten AdamW steps on the language-model loss, dropout off, two batches in turn."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    batches = [padded_batch(seed, "right", length=14) for seed in (3, 4)]
    losses = []
    for step in range(10):
        tokens, mask = batches[step % 2]
        loss = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            labels=torch.tensor(np.where(mask, tokens, -100)),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("losses", losses)
    save(
        "training",
        tokens=np.stack([tokens for tokens, _ in batches]),
        mask=np.stack([mask for _, mask in batches]),
        losses=np.array(losses, np.float32),
    )


def make_scores(model) -> None:
    """Scores as `transformers` reads them: at the last token that is not PAD."""
    arrays = {}
    for seed, side in enumerate(("left", "right"), start=5):
        tokens, mask = padded_batch(seed, side)
        tokens = np.where(mask, tokens, PAD)
        scores = run(model, tokens, mask)[:, 0]
        print("scores", side, scores)
        arrays |= {f"{side}_tokens": tokens, f"{side}_mask": mask, f"{side}_scores": scores}
    save("scores", **arrays)


def main() -> None:
    torch.set_num_threads(1)
    model = transformers.GPT2LMHeadModel(make_config()).eval()
    draw_weights(model, seed=0)
    reward_model = transformers.GPT2ForSequenceClassification(make_config(num_labels=1)).eval()
    draw_weights(reward_model, seed=0)
    reward_model.transformer.load_state_dict(model.transformer.state_dict())
    weights = {name: p.detach().numpy().astype(np.float16) for name, p in model.named_parameters()}
    save(
        "weights",
        config=model.config.to_json_string(),
        reward_config=reward_model.config.to_json_string(),
        **weights,
        **{"score.weight": reward_model.score.weight.detach().numpy().astype(np.float16)},
    )
    make_logits(model)
    make_greedy(model)
    make_scores(reward_model)
    make_training(model)  # last: it changes the weights


if __name__ == "__main__":
    main()

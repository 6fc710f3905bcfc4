"""Distances of the sampler's log-probabilities from the training pass's, for a model in a folder.

    python tools/measure_agreement.py --model FOLDER

Responses to 64 short questions are sampled at temperature 1, and the same tokens are scored by the
pass that training uses, in float32 and in bfloat16: quantiles of the distances over real tokens.
The tokenizer of the model has to have a chat template.
"""

import argparse

import jax
import numpy as np

from rlhf_jax.batches import Sequences
from rlhf_jax.models import load_pretrained
from rlhf_jax.rollout import generate, response_logprobs

THINGS = (
    "a cat,the sea,rain,a bicycle,bread,the moon,music,a river,winter,a library,gravity,tea,"
    "a bridge,the sun,paper,a lighthouse"
).split(",")
QUESTIONS = (
    "Write one sentence about {}.",
    "What is {}? Answer briefly.",
    "Tell me a fact about {}.",
    "Why do people like {}?",
)
CHUNK = 16


def padded_prompts(tokenizer):
    """(tokens i32[64, P], mask bool[64, P]), left-padded."""
    texts = [question.format(thing) for question in QUESTIONS for thing in THINGS]
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for text in texts
    ]
    width = max(map(len, prompts))
    mask = np.arange(width) >= width - np.array([len(ids) for ids in prompts])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(prompts)
    return tokens, mask


def distances(folder, dtype, tokenizer, length):
    """Distances of the log-probabilities of all real tokens, in nats."""
    model, params = load_pretrained(folder, dtype=dtype)
    prompts = padded_prompts(tokenizer)
    stop = (tokenizer.eos_token_id,)

    @jax.jit
    def sample(params, prompts, mask, key):
        return generate(
            model, params, prompts, mask, key, max_new_tokens=length, stop_token_ids=stop
        )

    @jax.jit
    def score(params, sequences):
        return response_logprobs(model, params, sequences, temperature=1.0)[0]

    rollout = sample(params, *prompts, jax.random.key(0))
    arrays = (*prompts, rollout.tokens, rollout.mask)
    scored = np.concatenate(
        [
            score(params, Sequences(*(x[i : i + CHUNK] for x in arrays)))
            for i in range(0, len(prompts[0]), CHUNK)
        ]
    )
    return np.abs(scored - np.asarray(rollout.logprobs))[np.asarray(rollout.mask)]


def main():
    """Prints a table."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model")
    parser.add_argument("--length", type=int, default=32, help="tokens of a response at most")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    print("| dtype | tokens | mean | median | 99 % | largest |\n" + "| --- " * 6 + "|")
    for dtype in ("float32", "bfloat16"):
        each = distances(options.model, dtype, tokenizer, options.length)
        numbers = (each.mean(), *np.quantile(each, [0.5, 0.99, 1.0]))
        print(f"| {dtype} | {each.size} | " + " | ".join(f"{x:.1e}" for x in numbers) + " |")


if __name__ == "__main__":
    main()

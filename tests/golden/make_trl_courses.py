"""Makes tests/golden/trl_courses.json: six steps of TRL's own trainers on judged responses.

    python tests/golden/make_trl_courses.py

It needs torch 2.13.0, transformers 4.57 and TRL 0.29.1, and runs their trainers unchanged, on the
GPT-2 of gpt2_weights.npz, without dropout, all examples in one batch. The file holds the examples
as token ids, EOS included, and of each step the metrics that the trainer logs.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from datasets import Dataset
from make_gpt2 import EOS, PAD, make_config
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.kto import KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FOLDER = pathlib.Path(__file__).parent
STEPS, WIDTH = 6, 16
KEPT = ("loss", "grad_norm", "nll_loss", "kl")
RUNS = {
    "sigmoid": (DPOTrainer, DPOConfig, {"loss_type": "sigmoid", "beta": 0.1}),
    "ipo": (DPOTrainer, DPOConfig, {"loss_type": "ipo", "beta": 0.2}),
    "apo_down": (DPOTrainer, DPOConfig, {"loss_type": "apo_down", "beta": 0.3}),
    "simpo": (
        CPOTrainer,
        CPOConfig,
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "cpo": (CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.1}),
    "kto": (KTOTrainer, KTOConfig, {"loss_type": "kto", "beta": 0.1}),
    "kto_weighted": (
        KTOTrainer,
        KTOConfig,
        {"loss_type": "kto", "beta": 0.2, "desirable_weight": 0.5, "undesirable_weight": 1.5},
    ),
    "apo_zero_unpaired": (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired", "beta": 0.1}),
}


def make_tokenizer():
    special = ["<bos>", "<eos>", "<pad>"]
    words = {f"w{n}": n for n in range(3, 211)}
    tokenizer = Tokenizer(
        models.WordLevel({**{s: n for n, s in enumerate(special)}, **words}, "<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=None, eos_token="<eos>", pad_token="<pad>"
    )


def make_model():
    with np.load(FOLDER / "gpt2_weights.npz") as weights:
        tensors = {
            name: torch.tensor(weights[name].astype(np.float32))
            for name in weights
            if weights[name].dtype == np.float16 and not name.startswith("score")
        }
    model = transformers.GPT2LMHeadModel(make_config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def make_examples():
    """(prompts, chosen, rejected) as lists of token ids, without EOS."""
    rng = np.random.default_rng(6)
    lengths = rng.integers((2, 2, 2), (7, 8, 8), size=(8, 3))
    drawn = [[rng.integers(3, 211, size=n).tolist() for n in row] for row in lengths]
    return [list(column) for column in zip(*drawn, strict=True)]


def text_of(tokens):
    return " ".join(f"w{token}" for token in tokens)


def course(name, trainer, config, options, data):
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=8,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_epsilon=1e-8,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=2 * WIDTH,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            **options,
        )
        model = make_model()
        more = {"ref_model": make_model()} if trainer in (DPOTrainer, KTOTrainer) else {}
        runner = trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=make_tokenizer(),
            **more,
        )
        runner.train()
    steps = [entry for entry in runner.state.log_history if "loss" in entry]
    if options.get("cpo_alpha") == 0:  # there is no likelihood loss, and TRL logs 0
        steps = [{key: x for key, x in each.items() if key != "nll_loss"} for each in steps]
    return [
        {key: x for key, x in each.items() if key in KEPT or key.startswith(("rewards/", "logps/"))}
        for each in steps
    ]


def main():
    torch.set_num_threads(1)
    prompts, chosen, rejected = make_examples()
    texts = [[f" {text_of(x)}" for x in column] for column in (chosen, rejected)]
    pairs = [
        {"prompt": text_of(p), "chosen": c, "rejected": r}
        for p, c, r in zip(prompts, *texts, strict=True)
    ]
    labels = [n % 3 != 1 for n in range(8)]
    unpaired = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if x else "rejected"], "label": x}
        for pair, x in zip(pairs, labels, strict=True)
    ]
    result = {
        "prompts": prompts,
        "chosen": [[*x, EOS] for x in chosen],
        "rejected": [[*x, EOS] for x in rejected],
        "labels": labels,
        "courses": {},
    }
    for name, (trainer, config, options) in RUNS.items():
        data = unpaired if trainer is KTOTrainer else pairs
        steps = course(name, trainer, config, options, data)
        result["courses"][name] = {"settings": options, "steps": steps}
        print(name, steps[0])
    assert PAD == 2
    (FOLDER / "trl_courses.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

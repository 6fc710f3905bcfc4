"""One workload in TRL and PyTorch: a program of its own, run by the Python of the extra `bench`.

    python scripts/benchmark/trl_worker.py REQUEST.json ARRAYS.npz

It says {"ready": true, ...} when the model is built and the trainer waits for its first step. Then
it reads a line from standard input before each step, and answers with one JSON object when the step
is done, {"seconds": ...}; the line "reset" forgets the peak of memory until then, and "stop" ends
it, with {"peak_bytes": ..., ...}.

A step is all that the trainer does from one of its `on_step_end` to the next: the batch from its
loader, the step and what it writes down. The peak is that of the GPU's memory as PyTorch allocates
it, or on the CPU of this process, resident, the code of its libraries included. It imports nothing
of rlhf_jax, whose JAX would count as memory of TRL.
"""

import json
import os
import resource
import sys
import tempfile
import time
from importlib import metadata

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn

EOS = "<|endoftext|>"


def main():
    """Builds the workload and answers on standard output until it is told to stop."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the trainers print is no answer
    with open(sys.argv[1]) as file:
        request = json.load(file)
    arrays = dict(np.load(sys.argv[2]))
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies by default
    transformers.utils.logging.set_verbosity_error()
    steps = {"sft": sft, "reward": reward, "generate": generate, "ppo": ppo}[request["kind"]]
    steps(request, arrays, Conversation(answers))


class Conversation:
    """The other end of standard input: tells when a step may begin, and how long it took."""

    def __init__(self, answers):
        self.answers, self.started, self.was_reset = answers, 0.0, False

    def wait(self):
        """Until the next step is asked for; the process ends where none is."""
        if not self.started:
            self._tell(
                {
                    "ready": True,
                    "versions": versions(),
                    "threads": torch.get_num_threads(),
                    "device": device(),
                }
            )
        while (line := sys.stdin.readline().strip()) == "reset":
            self.was_reset = reset_peak()
        if line != "step":
            self._tell(peak_bytes(self.was_reset))
            self.answers.close()
            os._exit(0)  # from within the loop of a trainer, which has no door
        self.started = time.perf_counter()

    def done(self):
        """Answers the step that has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._tell({"seconds": time.perf_counter() - self.started})

    def _tell(self, answer):
        self.answers.write(json.dumps(answer) + "\n")


def versions():
    """Of what the step runs on."""
    names = ("trl", "transformers", "torch", "accelerate", "datasets", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": sys.version.split()[0]}


def device():
    """What PyTorch computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_bytes(was_reset):
    """The most memory that was held since the last reset: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_of": "device"}
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_bytes": peak, "peak_of": "steps" if was_reset else "process"}


def reset_peak():
    """Forgets the peak until now; False where the system cannot."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


class Steps(transformers.TrainerCallback):
    """Makes each step of a trainer wait for its turn."""

    def __init__(self, conversation):
        self.conversation = conversation

    def on_train_begin(self, args, state, control, **kwargs):
        """Before the first step."""
        self.conversation.wait()

    def on_step_end(self, args, state, control, **kwargs):
        """Between two steps."""
        self.conversation.done()
        self.conversation.wait()


def config_of(request):
    """GPT-2 in the sizes and with the dropout asked for; that of the checkpoints is 0.1."""
    names = ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")
    sizes = {name: request[name] for name in names}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), request["dropout"])
    return transformers.GPT2Config(**sizes, **dropout, pad_token_id=request["pad_token_id"])


def policy_of(request):
    """A language model with random weights."""
    return transformers.GPT2LMHeadModel(config_of(request))


def scorer_of(request):
    """A classifier with one label and random weights."""
    config = config_of(request)
    config.num_labels = 1
    return transformers.GPT2ForSequenceClassification(config)


def tokenizer_of(request):
    """A tokenizer that knows the end and the padding of texts, which is all that trainers ask."""
    vocabulary = {f"<{i}>": i for i in range(request["vocab_size"])}
    vocabulary.pop(f"<{request['eos_token_id']}>")
    vocabulary[EOS] = request["eos_token_id"]
    vocabulary.pop(f"<{request['pad_token_id']}>")
    vocabulary["<pad>"] = request["pad_token_id"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token="<pad>"
    )


def training_arguments(request):
    """What all trainers share: nothing but the steps, in the dtype asked for."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": request["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "learning_rate": request["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "seed": 0,
    }


def sft(request, arrays, conversation):
    """`SFTTrainer` on completions alone."""
    from trl import SFTConfig, SFTTrainer

    tokens, learned = arrays["tokens"].tolist(), arrays["loss_mask"].astype(int).tolist()
    rows = Dataset.from_dict({"input_ids": tokens, "completion_mask": learned})
    arguments = SFTConfig(
        **training_arguments(request),
        per_device_train_batch_size=request["batch_size"],
        max_steps=1_000_000,
        completion_only_loss=True,
        max_length=None,
    )
    train(SFTTrainer, policy_of(request), arguments, rows, request, conversation)


def reward(request, arrays, conversation):
    """`RewardTrainer`, with lower layers and embeddings frozen where that is asked for."""
    from trl import RewardConfig, RewardTrainer

    whole = {
        f"{name}_ids": np.concatenate([arrays["prompts"], arrays[name]], axis=1).tolist()
        for name in ("chosen", "rejected")
    }
    arguments = RewardConfig(
        **training_arguments(request),
        per_device_train_batch_size=request["batch_size"],
        max_steps=1_000_000,
        max_length=None,
        disable_dropout=True,
    )
    model = scorer_of(request)
    if request["num_layers_unfrozen"] is not None:
        freeze(model.transformer, request["n_layer"] - request["num_layers_unfrozen"])
    train(RewardTrainer, model, arguments, Dataset.from_dict(whole), request, conversation)


def freeze(trunk, layers):
    """Freezes the embeddings and so many lower layers."""
    for module in (trunk.wte, trunk.wpe, *trunk.h[:layers]):
        module.requires_grad_(requires_grad=False)


def train(trainer, model, arguments, rows, request, conversation):
    """Runs a trainer whose steps wait for their turns."""
    trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer_of(request),
        callbacks=[Steps(conversation)],
    ).train()


def generate(request, arrays, conversation):
    """`generate` of transformers, which TRL samples with; no token ends a response."""
    model = policy_of(request).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    if request["dtype"] == "bfloat16":
        model = model.to(torch.bfloat16)
    prompts = torch.tensor(arrays["prompts"]).long().to(model.device)
    settings = transformers.GenerationConfig(
        max_new_tokens=request["response_length"],
        min_new_tokens=request["response_length"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=request["pad_token_id"],
        eos_token_id=None,
    )
    while True:
        conversation.wait()
        with torch.no_grad():
            mask = torch.ones_like(prompts)
            model.generate(prompts, attention_mask=mask, generation_config=settings)
        conversation.done()


def ppo(request, arrays, conversation):
    """`PPOTrainer` with its four models; no token ends a response."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    batch_size = request["batch_size"]
    arguments = PPOConfig(
        **training_arguments(request),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=request["num_mini_batches"],
        num_ppo_epochs=request["num_ppo_epochs"],
        local_rollout_forward_batch_size=batch_size,
        total_episodes=1_000_000 * batch_size,
        num_sample_generations=0,
        response_length=request["response_length"],
        temperature=1.0,
        stop_token=None,
        kl_coef=0.05,
    )
    policy, reference = policy_of(request), policy_of(request)
    reference.load_state_dict(policy.state_dict())
    scorer, critic = scorer_of(request), scorer_of(request)
    critic.load_state_dict(scorer.state_dict())
    assert isinstance(critic.score, nn.Linear)
    PPOTrainer(
        args=arguments,
        processing_class=tokenizer_of(request),
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": arrays["prompts"].tolist()}),
        callbacks=[Steps(conversation)],
    ).train()


if __name__ == "__main__":
    main()

"""One workload in TRL and PyTorch: a program of its own, run by the Python of the extra `bench`.

    python scripts/benchmark/trl_worker.py REQUEST.json ARRAYS.npz

It writes {"ready": true, ...} when the model is built and the trainer waits for its first step. A
line "step" on standard input runs a step and writes {"seconds": ...}; the line "reset" resets
the peak memory, and "stop" ends the process with {"peak_bytes": ..., ...}.

A step is everything between two calls of the trainer's `on_step_end`: loading the batch, the step
and its logging. The peak is that of the GPU memory that PyTorch allocates, or on the CPU of the
resident memory of this process, including the code of libraries. The program imports nothing of
rlhf_jax, since JAX would count as memory of TRL.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

EOS = "<|endoftext|>"


def main():
    """Builds the workload, and answers on standard output until the line "stop"."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of the trainers goes to standard error
    with open(sys.argv[1]) as file:
        request = json.load(file)
    arrays = dict(np.load(sys.argv[2]))
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies by default
    transformers.utils.logging.set_verbosity_error()
    steps = {
        "sft": sft,
        "reward": reward,
        "dpo": dpo,
        "generate": generate,
        "ppo": ppo,
        "grpo": grpo,
    }
    steps[request["kind"]](request, arrays, Connection(answers))


class Connection:
    """The protocol with the benchmark: waits for requests, and answers with the time of a step."""

    def __init__(self, answers):
        self.answers, self.started, self.was_reset = answers, 0.0, False

    def wait(self):
        """Waits for the line "step"; ends the process at any other line but "reset"."""
        if not self.started:
            self._send(
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
            self._send(peak_bytes(self.was_reset))
            self.answers.close()
            os._exit(0)  # inside the loop of a trainer, which cannot be left otherwise
        self.started = time.perf_counter()

    def done(self):
        """Sends the time of the step that has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._send({"seconds": time.perf_counter() - self.started})

    def _send(self, answer):
        self.answers.write(json.dumps(answer) + "\n")


def versions():
    """The versions of the packages."""
    names = ("trl", "transformers", "torch", "accelerate", "datasets", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": sys.version.split()[0]}


def device():
    """The device of PyTorch."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_bytes(was_reset):
    """The peak memory since the last reset, of the GPU or of this process."""
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
    """Resets the peak memory; False if the system cannot."""
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
    """Makes each step of a trainer wait for a request."""

    def __init__(self, connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        """Before the first step."""
        self.connection.wait()

    def on_step_end(self, args, state, control, **kwargs):
        """Between two steps."""
        self.connection.done()
        self.connection.wait()


def config_of(request):
    """The configuration of a Llama or GPT-2 with the sizes and the dropout of a request."""
    if request["llama"] is not None:
        return transformers.LlamaConfig(
            vocab_size=request["vocab_size"],
            hidden_size=request["n_embd"],
            intermediate_size=request["llama"]["intermediate_size"],
            num_hidden_layers=request["n_layer"],
            num_attention_heads=request["n_head"],
            num_key_value_heads=request["llama"]["num_key_value_heads"],
            max_position_embeddings=request["n_positions"],
            rms_norm_eps=request["llama"]["rms_norm_eps"],
            rope_theta=request["llama"]["rope_theta"],
            tie_word_embeddings=True,
            pad_token_id=request["pad_token_id"],
        )
    names = ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")
    sizes = {name: request[name] for name in names}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), request["dropout"])
    return transformers.GPT2Config(**sizes, **dropout, pad_token_id=request["pad_token_id"])


def policy_of(request):
    """A language model in float32, with the weights of a folder if the request has one."""
    if request["llama"] is None:
        return transformers.GPT2LMHeadModel(config_of(request))
    if request["llama"]["path"] is None:
        return transformers.LlamaForCausalLM(config_of(request))
    path = request["llama"]["path"]
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


def scorer_of(request):
    """A classifier with one label and random weights."""
    config = config_of(request)
    config.num_labels = 1
    return transformers.GPT2ForSequenceClassification(config)


def tokenizer_of(request):
    """A tokenizer with an end-of-text and a padding token, which is all that trainers need."""
    vocabulary = {f"<{i}>": i for i in range(request["vocab_size"])}
    vocabulary.pop(f"<{request['eos_token_id']}>")
    vocabulary[EOS] = request["eos_token_id"]
    vocabulary.pop(f"<{request['pad_token_id']}>")
    vocabulary["<pad>"] = request["pad_token_id"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token="<pad>"
    )


def training_arguments(request):
    """The arguments of all trainers: steps alone, in the dtype of the request."""
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


def sft(request, arrays, connection):
    """`SFTTrainer` with the loss on completions."""
    from trl import SFTConfig, SFTTrainer

    tokens, mask = arrays["tokens"].tolist(), arrays["loss_mask"].astype(int).tolist()
    examples = Dataset.from_dict({"input_ids": tokens, "completion_mask": mask})
    arguments = SFTConfig(
        **training_arguments(request),
        per_device_train_batch_size=request["batch_size"],
        max_steps=1_000_000,
        completion_only_loss=True,
        max_length=None,
    )
    train(SFTTrainer, policy_of(request), arguments, examples, request, connection)


def reward(request, arrays, connection):
    """`RewardTrainer`, with lower layers and embeddings frozen if the request has it."""
    from trl import RewardConfig, RewardTrainer

    examples = {
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
    train(RewardTrainer, model, arguments, Dataset.from_dict(examples), request, connection)


def dpo(request, arrays, connection):
    """`DPOTrainer` with log-probabilities of the reference that it computes before the steps.

    It reads texts, and ends each response with the end of text.
    """
    from trl import DPOConfig, DPOTrainer

    columns = (("prompt", "prompts", None), ("chosen", "chosen", -1), ("rejected", "rejected", -1))
    examples = {
        column: ["".join(f" <{token}>" for token in tokens[:end]) for tokens in arrays[name]]
        for column, name, end in columns
    }
    arguments = DPOConfig(
        **training_arguments(request),
        per_device_train_batch_size=request["batch_size"],
        max_steps=1_000_000,
        max_length=None,
        disable_dropout=True,
        precompute_ref_log_probs=True,
    )
    policy, reference = policy_of(request), policy_of(request)
    reference.load_state_dict(policy.state_dict())
    examples = Dataset.from_dict(examples)
    train(DPOTrainer, policy, arguments, examples, request, connection, ref_model=reference)


def freeze(trunk, layers):
    """Freezes the embeddings and a number of lower layers."""
    for module in (trunk.wte, trunk.wpe, *trunk.h[:layers]):
        module.requires_grad_(requires_grad=False)


def train(trainer, model, arguments, examples, request, connection, **models):
    """Runs a trainer whose steps wait for requests."""
    trainer(
        model=model,
        **models,
        args=arguments,
        train_dataset=examples,
        processing_class=tokenizer_of(request),
        callbacks=[Steps(connection)],
    ).train()


def generate(request, arrays, connection):
    """`generate` of transformers, sampling as TRL does, or greedy; no token ends a response."""
    model = policy_of(request).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    if request["dtype"] == "bfloat16":
        model = model.to(torch.bfloat16)
    prompts = torch.tensor(arrays["prompts"]).long().to(model.device)
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings = transformers.GenerationConfig(
        max_new_tokens=request["response_length"],
        min_new_tokens=request["response_length"],
        do_sample=not request["greedy"],
        **({} if request["greedy"] else sampling),
        pad_token_id=request["pad_token_id"],
        eos_token_id=None,
    )
    model.generation_config = settings  # that of the folder has an end of text
    while True:
        connection.wait()
        with torch.no_grad():
            mask = torch.ones_like(prompts)
            model.generate(prompts, attention_mask=mask, generation_config=settings)
        connection.done()


def ppo(request, arrays, connection):
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
        callbacks=[Steps(connection)],
    ).train()


def grpo(request, arrays, connection):
    """`GRPOTrainer` without a reference; the reward is the share of odd tokens."""
    from trl import GRPOConfig, GRPOTrainer

    def share_of_odd_tokens(completion_ids, **_):
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    length = request["response_length"]
    arguments = GRPOConfig(
        **training_arguments(request),
        per_device_train_batch_size=request["batch_size"] * request["num_generations"],
        gradient_accumulation_steps=1,
        num_generations=request["num_generations"],
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        max_steps=1_000_000,
        beta=0.0,
        temperature=1.0,
        disable_dropout=True,
    )
    texts = ["".join(f" <{token}>" for token in tokens) for tokens in arrays["prompts"]]
    GRPOTrainer(
        model=policy_of(request),
        reward_funcs=share_of_odd_tokens,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer_of(request),
        callbacks=[Steps(connection)],
    ).train()


if __name__ == "__main__":
    main()

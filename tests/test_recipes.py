"""The configurations of configs/: each is read, and each recipe runs a few steps when tiny."""

import copy
import gzip
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf_jax import runtime
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained, load_reward_model
from rlhf_jax.runtime import config
from rlhf_jax.runtime.commands.pairs import pair_by_label, pair_by_prompt
from rlhf_jax.training.settings import OptimizerSettings
from rlhf_jax.training.state import make_optimizer
from scripts import policy_gradients
from scripts.frontier import Config as FrontierConfig
from tests import small

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("**/*.yaml"))
KINDS = {
    "run_rlhf": config.RLHFConfig,
    "train_sft": config.SFTConfig,
    "train_reward": config.RewardConfig,
    "train_ppo": config.PPOConfig,
    "train_grpo": config.config_of(config.trainer_named("grpo")),
    "train_dpo": config.config_of(config.trainer_named("dpo")),
    "frontier": FrontierConfig,
    "policy_gradients": policy_gradients.Config,
}
STAGES = ("sft", "reward", "ppo")
STEPS = 2
# The settings that make a recipe tiny; all others are its own. With one optimizer and
# one length of texts the recipes share compiled steps.
MODEL = {"path": None, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64}
LENGTHS = {"max_length": 64, "max_prompt_length": 40, "max_response_length": 24}
DATA = {**LENGTHS, "eval_rows": 0, "packing": False}
SUPERVISED = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_batch_size": 4,
    "num_epochs": 1,
}
OPTIMIZER = {"learning_rate": 1e-3, "warmup_steps": 1, "schedule": "linear"}
BATCH = {
    "sft": SUPERVISED,
    "reward": SUPERVISED,
    "ppo": {
        "total_episodes": 8,
        "batch_size": 4,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "response_length": 16,
    },
}
LOGGING = {"num_samples": 2}

WORDS = ("tea", "chess", "trees", "trains", "bread", "rain", "maps", "cats")
POSTS = [
    f"SUBREDDIT: r/{w}\nTITLE: On {w}\nPOST: I like {w}, and write of it often." for w in WORDS
]
# Long enough that all texts are cut to one length.
GOOD = [f" {w}: a joy for young and old, by day and by night, in Kyoto or Zagreb." for w in WORDS]
BAD = [f" {w}? Not one bit: dull, far too loud, and quite beyond my purse." for w in WORDS]
HEADS = [f"\n\nHuman: {post}\n\nAssistant: Which?\n\nHuman: Any.\n\nAssistant:" for post in POSTS]
PARTS = list(zip(POSTS, HEADS, GOOD, BAD, strict=True))
# The columns that the recipe's data sets on the hub have.
EXAMPLES = {
    "stanfordnlp/imdb": [{"text": p + good, "label": 1} for p, _, good, _ in PARTS],
    "imdb/pairs_train.jsonl": [{"chosen": p + a, "rejected": p + b} for p, _, a, b in PARTS],
    "Anthropic/hh-rlhf": [{"chosen": h + a, "rejected": h + b} for _, h, a, b in PARTS],
    "imdb/train.jsonl.gz": [{"text": p + good, "label": 1} for p, _, good, _ in PARTS],
    "ukp/train.jsonl": [{"prompt": p, "chosen": a, "rejected": b} for p, _, a, b in PARTS],
    "dialogsum/chat_train.jsonl": [
        {
            "prompt": [{"role": "user", "content": post}],
            "completion": [{"role": "assistant", "content": good}],
        }
        for post, _, good, _ in PARTS
    ],
    "CarperAI/openai_summarize_tldr": [
        {"prompt": f"{post}\nTL;DR:", "label": good} for post, _, good, _ in PARTS
    ],
    "CarperAI/openai_summarize_comparisons": [
        {"prompt": post, "chosen": f"TL;DR:{good}", "rejected": f"TL;DR:{bad}"}
        for post, _, good, bad in PARTS
    ],
}


def command_of(path):
    """The command that a recipe's first comments give for it."""
    text = (ROOT / path).read_text()
    (name,) = re.findall(rf"^# python scripts/(\w+)\.py --config {re.escape(path)}$", text, re.M)
    return name


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_names_its_command_and_is_read_by_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = config.resolve(KINDS[command_of(path)], path)
    assert recipe.run_dir.startswith("runs/")
    if isinstance(recipe, policy_gradients.Config):
        for method in recipe.methods:
            run = policy_gradients.run_config(recipe, method, 0)
            assert run.settings.total_iterations == 400
    settings = recipe.sft.optimizer if hasattr(recipe, "methods") else recipe.optimizer
    is_one = isinstance(settings, OptimizerSettings)
    for each in [settings] if is_one else vars(settings).values():
        make_optimizer(each, 10)


def write_examples(folder, source):
    """A folder with the splits of a data set, as a path to it; or a file."""
    text = "".join(json.dumps(example) + "\n" for example in EXAMPLES[source])
    target = folder / source
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.endswith(".jsonl"):
        target.write_text(text)
    else:
        target.mkdir(exist_ok=True)
        for split in ("train", "test", "valid"):
            (target / f"{split}.jsonl").write_text(text)
    return str(target)


def tiny_data(data, folder):
    """The section `data` of one stage, with local files in the place of the hub's."""
    data = {**data, **DATA, "path": write_examples(folder, data["path"])}
    data.pop("eval_path", None)
    if data["path"].endswith(".jsonl"):
        data.pop("eval_split", None)
    return data


def tiny(path, folder):
    """The configuration of a recipe with tiny sizes."""
    recipe = copy.deepcopy(yaml.safe_load((ROOT / path).read_text()))
    one_stage = not (STAGES[0] in recipe["data"] and STAGES[2] in recipe["data"])
    if one_stage:
        recipe["data"] = tiny_data(recipe["data"], folder)
        recipe["optimizer"] = OPTIMIZER
    else:
        recipe["optimizer"] = dict.fromkeys(STAGES, OPTIMIZER)
        recipe["data"] = {name: tiny_data(data, folder) for name, data in recipe["data"].items()}
    for stage in set(STAGES) & set(recipe):
        recipe[stage] |= BATCH[stage]
        if "num_layers_unfrozen" in recipe[stage]:  # the one layer, over frozen embeddings
            recipe[stage]["num_layers_unfrozen"] = 1
    paths = {
        name: str(folder / there) for name, there in recipe["model"].items() if "runs/" in there
    }
    recipe["model"] = {**MODEL, **paths}
    recipe["tokenizer"] = {"vocab_size": 300} if not paths else {}
    recipe["generation"] = {"max_new_tokens": 4}
    if command_of(path) in ("train_reward", "train_ppo"):
        recipe.pop("generation")
    return recipe | {"logging": LOGGING, "run_dir": str(folder / recipe["run_dir"])}


@pytest.fixture(scope="module", autouse=True)
def cached_datasets(tmp_path_factory):
    """The library of data sets has its cache in here."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def run(path, folder, **model):
    recipe = tiny(path, folder)
    recipe["model"] |= model
    if model:  # a reward model goes with the tokenizer of the policy
        recipe["tokenizer"] = {"path": model["reward_path"]}
    return getattr(runtime, command_of(path))(recipe).metrics


def assert_ran(metrics, ppo_folder, ending):
    """Each stage took its steps, and PPO's prompts are those of the recipe."""
    assert {value for name, value in metrics.items() if name.endswith("/step")} == {float(STEPS)}
    assert 0 < metrics["sft/train/loss"] < 8
    assert 0 < metrics.get("reward/train/loss", 1.0) < 3
    assert "ppo/objective/kl" in metrics
    prompts = [entry["prompt"] for entry in small.entries(ppo_folder / "samples.jsonl")]
    assert len(prompts) == 4  # two before the first step, and two at the end
    assert all(prompt.endswith(ending) for prompt in prompts)


@pytest.fixture(scope="module")
def tldr(tmp_path_factory):
    """The three stages of configs/tldr/ in a row, as (folder, metrics)."""
    folder = tmp_path_factory.mktemp("tldr")
    all_metrics = {}
    for stage in STAGES:
        metrics = run(f"configs/tldr/{stage}.yaml", folder)
        all_metrics |= {f"{stage}/{name}": value for name, value in metrics.items()}
    return folder / "runs" / "tldr", all_metrics


@pytest.mark.newest
def test_tldr_runs_a_few_steps(tldr):
    folder, metrics = tldr
    assert_ran(metrics, folder / "ppo", "\nTL;DR:")


@pytest.mark.newest
def test_tldr_trains_upper_layers_on_scores_less_those_of_the_references(tldr):
    folder, metrics = tldr
    parts = (metrics[f"ppo/objective/{name}_scores"] for name in ("raw", "reference"))
    assert np.subtract(*parts) == pytest.approx(metrics["ppo/objective/scores"], abs=1e-5)
    sft, policy = (load_pretrained(folder / stage / "hf")[1] for stage in ("sft", "ppo"))
    scorer = load_reward_model(folder / "reward" / "hf")[1]["model"]
    for frozen in (policy, scorer):
        kept = frozen["wpe"]["embedding"]
        np.testing.assert_array_equal(kept, sft["wpe"]["embedding"])
        assert np.any(frozen["ln_f"]["bias"] != sft["ln_f"]["bias"])


@pytest.mark.newest
def test_hh_runs_a_few_steps(tmp_path):
    metrics = run("configs/hh/rlhf.yaml", tmp_path)
    assert_ran(metrics, tmp_path / "runs" / "hh" / "ppo", "\n\nAssistant:")


@pytest.mark.newest
def test_imdb_runs_a_few_steps_with_a_reward_model_that_is_there(tldr, tmp_path):
    reward_path = str(tldr[0] / "reward" / "hf")
    metrics = run("configs/imdb/rlhf.yaml", tmp_path, reward_path=reward_path)
    assert_ran(metrics, tmp_path / "runs" / "imdb" / "ppo", "")
    lengths = yaml.safe_load((tmp_path / "runs/imdb/config.yaml").read_text())["data"]["ppo"]
    assert lengths["prompt_tokens"] == [2, 8]


CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class WordCounter:
    """In the place of vaderSentiment's analyzer, which the tests do without."""

    def polarity_scores(self, text):
        return {"compound": 1.0 if text.startswith("SUB") else -1.0}


@pytest.mark.newest
def test_smollm2_runs_a_few_steps_on_a_tiny_decoder(tmp_path, monkeypatch):
    module = types.SimpleNamespace(SentimentIntensityAnalyzer=WordCounter)
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    recipes = {stage: tiny(f"configs/smollm2/{stage}.yaml", tmp_path) for stage in STAGES}
    for stage in ("sft", "reward"):
        recipes[stage]["model"]["family"] = "llama"
        recipes[stage]["tokenizer"]["chat_template"] = CHAT
    recipes["ppo"]["model"] = {"path": str(tmp_path / "runs/smollm2/sft/hf")}
    recipes["ppo"]["tokenizer"] = {}
    sft, reward, ppo = (
        getattr(runtime, f"train_{stage}")(recipe).metrics for stage, recipe in recipes.items()
    )
    assert 0 < sft["train/loss"] < 8
    assert 0 < reward["train/loss"] < 3
    assert ppo["objective/scores"] == 1.0  # of prompt and completion: each review begins so


def write_lines(file, examples):
    """A file of JSON lines, packed if its name says so."""
    data = "".join(json.dumps(example) + "\n" for example in examples).encode()
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)


@pytest.mark.parametrize("path", [path for path in RECIPES if "_small" in path])
def test_the_small_recipes_read_their_files(path, tmp_path, monkeypatch):
    """Files as the comments describe them, and the pairs that the commands there make of them."""
    recipe = config.resolve(config.RLHFConfig, ROOT / path)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        write_lines(f"imdb/{split}.jsonl.gz", EXAMPLES["stanfordnlp/imdb"])
        write_lines(f"imdb/pairs_{split}.jsonl", EXAMPLES["imdb/pairs_train.jsonl"])
        write_lines(f"hh/{split}.jsonl", EXAMPLES["Anthropic/hh-rlhf"])
        examples = [{"prompt": f"{post}\nTL;DR:", "completion": f" It is {post}"} for post in POSTS]
        write_lines(f"dialogsum/{split}.jsonl.gz", examples)
        pairs = f"dialogsum/pairs_{split}.jsonl"
        assert pair_by_prompt(f"dialogsum/{split}.jsonl.gz", pairs) == len(POSTS)
    for stage, kind in zip(STAGES, ("text", "pairs", "prompts"), strict=True):
        train, held_out = load_examples(getattr(recipe.data, stage), kind)
        assert len(train) == len(held_out) == len(POSTS)


def test_pairs_by_prompt_of_equal_texts_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = [{"prompt": f"p{n}", "completion": "the same" if n else "another"} for n in range(5)]
    write_lines("rows.jsonl", examples)
    assert pair_by_prompt("rows.jsonl", "pairs.jsonl") == 2
    assert {pair["chosen"] for pair in small.entries("pairs.jsonl")} == {"the same", "another"}
    assert capsys.readouterr().err == "3 of 5 pairs of equal texts were skipped\n"
    write_lines("rows.jsonl", examples[1:])
    with pytest.raises(InputError, match=r"The completions in rows\.jsonl are all equal; give"):
        pair_by_prompt("rows.jsonl", "pairs.jsonl")


def test_pairs_by_prompt_prefer_the_own_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines("rows.jsonl", [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(5)])
    assert pair_by_prompt("rows.jsonl", "pairs.jsonl") == 5
    pairs = small.entries("pairs.jsonl")
    assert all(pair["chosen"][1:] == pair["prompt"][1:] for pair in pairs)
    assert all(pair["rejected"] != pair["chosen"] for pair in pairs)
    for side in ("chosen", "rejected"):
        assert sorted(pair[side] for pair in pairs) == [f"c{n}" for n in range(5)]
    write_lines("texts.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(
        InputError, match=r"texts\.jsonl has no two examples with the columns `prompt`"
    ):
        pair_by_prompt("texts.jsonl", "pairs.jsonl")


def test_pairs_by_label_of_a_csv_file_have_labels_of_text(tmp_path):
    (tmp_path / "texts.csv").write_text("text,label\ngood,1\nbad,0\nfine,1\nodd,-1\n")
    source, output = str(tmp_path / "texts.csv"), tmp_path / "pairs.jsonl"
    assert pair_by_label(source, str(output)) == 1
    (pair,) = small.entries(output)
    assert pair["rejected"] == "bad"
    assert pair["chosen"] in ("good", "fine")
    with pytest.raises(InputError, match=r"No pair with the labels 3 and 0: there are -1, 0, 1\."):
        pair_by_label(source, str(output), preferred=3)

"""The section `grpo` of a configuration, and the record of GRPO."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    check_effect,
)
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.settings import TurnSettings
from rlhf_jax.training.settings import MinibatchSettings, OptimizerSettings, prompts_kind
from rlhf_jax.training.trainer import Headline, Plot, Trainer

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "rloo"]
ImportanceSamplingMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]


@dataclasses.dataclass(frozen=True)
class Settings(TurnSettings, MinibatchSettings):
    """The section `grpo` of a configuration; names are TRL's, and `rlhf rloo` has the same.

    Those of responses in several turns are in `rollout.settings.TurnSettings`.

    Attributes:
      num_generations: K responses sampled to each prompt, a group.
      num_iterations: passes of the updates over the responses of one iteration.
      loss_type: "grpo", "sapo": mean over responses of the mean over tokens; "dapo" and its synonym
        "bnpo", "cispo": mean over all tokens of an optimizer step; "dr_grpo": sum over tokens /
        (responses * response_length); "luspo": mean over responses of the sum over tokens; "rloo":
        mean over responses, with the ratio of the entire response.
      importance_sampling_level: of the ratio: "token"; "sequence", the geometric mean over the
        tokens of a response (GSPO); or "sequence_token", the same with gradients of tokens.
      epsilon, epsilon_high: the ratio is clipped to 1 - epsilon and 1 + epsilon_high, which is
        epsilon where null; of "cispo" epsilon_high is the largest ratio.
      delta: the largest ratio that raises the loss of a negative advantage, above 1 + epsilon.
      sapo_temperature_pos, sapo_temperature_neg: of "sapo", for positive and other advantages.
      advantage_estimator: "grpo", the score less the mean of its group; "rloo", less the mean of
        the other responses; "reinforce_pp", the score itself, and "reinforce_pp_baseline", less the
        mean of the group, both normalized over the batch.
      scale_rewards: advantages of "grpo" are divided by the standard deviation of the "group" or of
        the "batch", or by "none".
      normalize_advantages: those of "rloo" are normalized over the batch.
      multi_objective_aggregation: several rewards are summed first, or each is normalized in its
        group first (GDPO).
      beta: weight of the KL to the reference, the model that the run begins with; 0 holds none.
      kl_in: "loss", or "reward": subtracted from the score.
      kl_estimator: "k1", "k2" or "k3" of `functional.kl_estimate`.
      use_bias_correction_kl: weights the KL in the loss by the ratio.
      entropy_coef: weight of the entropy of the next token, in nats, which is maximized.
      top_entropy_quantile: the share of tokens, those of highest entropy, that the policy's loss
        trains on.
      mask_truncated_completions: leaves responses that nothing ended out of the loss.
      overlong_buffer: tokens before `response_length` over which a penalty on the score rises from
        0 to `overlong_penalty` (DAPO); null has none.
      overlong_penalty: of a response of `response_length` tokens.
      top_k, top_p: of sampling; other values than 0 and 1 need an `importance_sampling_mode`.
      importance_sampling_mode: weights of tokens or sequences, by the probability that training
        gives to them over that of sampling, truncated at a cap or masked above it; null has none.
      importance_sampling_cap: the largest weight.
      max_sampling_rounds: batches of prompts that an iteration draws at most, to replace groups
        whose scores are all equal (DAPO's dynamic sampling); 1 keeps these groups.
      judge_fn: a judge of two responses in place of rewards, as in the section `online_dpo`.
    """

    section = "grpo"  # of the configuration; without an annotation it is no field

    batch_size: PositiveInt = 32
    num_generations: PositiveInt = 8
    num_iterations: PositiveInt = 1
    loss_type: LossType = "dapo"
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    epsilon: NonNegativeFloat = 0.2
    epsilon_high: NonNegativeFloat | None = None
    delta: PositiveFloat | None = None
    sapo_temperature_pos: PositiveFloat = 1.0
    sapo_temperature_neg: PositiveFloat = 1.05
    advantage_estimator: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    normalize_advantages: bool = False
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    beta: NonNegativeFloat = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = False
    entropy_coef: NonNegativeFloat = 0.0
    top_entropy_quantile: PositiveFraction = 1.0
    mask_truncated_completions: bool = False
    overlong_buffer: PositiveInt | None = None
    overlong_penalty: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: PositiveFraction = 1.0
    importance_sampling_mode: ImportanceSamplingMode | None = None
    importance_sampling_cap: PositiveFloat = 3.0
    max_sampling_rounds: PositiveInt = 1
    judge_fn: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for is_wrong, text in (*self._faults_of_loss(), *self._faults_of_scores()):
            if is_wrong:
                raise InputError(f"{self.section}.{text}")
        self._check_read()

    def _check_read(self) -> None:
        """Raises an InputError for a setting that the others leave without effect."""
        name, loss, estimator = self.section, self.loss_type, self.advantage_estimator
        is_apart = self.multi_objective_aggregation == "normalize_then_sum"
        for is_unread, keys, reader in (
            (not self.has_reference, ("kl_in", "kl_estimator"), f"{name}.beta above 0"),
            (
                not self.has_reference or self.has_kl_in_reward,
                ("use_bias_correction_kl",),
                f"{name}.beta above 0 and {name}.kl_in loss",
            ),
            (
                estimator != "grpo" or is_apart,
                ("scale_rewards",),
                f"{name}.advantage_estimator grpo and rewards that are summed first",
            ),
            (self.overlong_buffer is None, ("overlong_penalty",), f"{name}.overlong_buffer"),
            (loss in ("cispo", "sapo"), ("epsilon",), f"other losses than {name}.loss_type {loss}"),
            (loss == "sapo", ("epsilon_high",), f"other losses than {name}.loss_type sapo"),
            (
                loss != "sapo",
                ("sapo_temperature_pos", "sapo_temperature_neg"),
                f"{name}.loss_type sapo",
            ),
            (
                self.importance_sampling_mode is None,
                ("importance_sampling_cap",),
                f"{name}.importance_sampling_mode",
            ),
        ):
            if is_unread:
                check_effect(self, keys, reader)

    def _faults_of_loss(self) -> list[tuple[bool, str]]:
        """Whether settings of the loss exclude each other, and the sentence about it."""
        name, loss, level = self.section, self.loss_type, self.importance_sampling_level
        mode, high, buffer = self.importance_sampling_mode, self.epsilon_high, self.overlong_buffer
        of_tokens = (
            (self.has_reference and not self.has_kl_in_reward)
            or self.entropy_coef > 0
            or self.top_entropy_quantile < 1
            or level != "token"
        )
        return [
            (
                self.delta is not None and self.delta <= 1 + self.epsilon,
                f"delta must be above 1 + {name}.epsilon = {1 + self.epsilon}, but is "
                f"{self.delta}.",
            ),
            (
                self.delta is not None and loss in ("cispo", "sapo"),
                f"delta is {self.delta}, but {name}.loss_type {loss} does not read it; leave it "
                "out.",
            ),
            (
                loss == "cispo" and (high is None or high < 1),
                f"epsilon_high is {high}, but it is the largest ratio with {name}.loss_type cispo: "
                "give a number of 1 or more, such as 5.0.",
            ),
            (
                loss == "luspo" and level != "sequence",
                f"loss_type luspo needs {name}.importance_sampling_level sequence, but it is "
                f"{level}.",
            ),
            (
                loss == "rloo" and of_tokens,
                "loss_type rloo has one ratio for a response and no terms of tokens: put the KL "
                f"into the reward by {name}.kl_in, and leave {name}.entropy_coef, {name}."
                f"top_entropy_quantile and {name}.importance_sampling_level out.",
            ),
            (
                loss == "rloo" and self.advantage_estimator.startswith("reinforce_pp"),
                f"loss_type rloo has one advantage for a response, but {name}.advantage_estimator "
                f"{self.advantage_estimator} one for each token; use another loss_type.",
            ),
            (
                loss == "rloo" and mode is not None and mode.startswith("token"),
                "loss_type rloo has one weight for a response: use an "
                f"{name}.importance_sampling_mode of sequences.",
            ),
            (
                mode is None and not self.samples_all,
                f"top_k {self.top_k} and {name}.top_p {self.top_p} sample from another "
                f"distribution than the one that is trained: set {name}.importance_sampling_mode, "
                "or leave them out.",
            ),
            (
                buffer is not None and buffer >= self.response_length,
                f"overlong_buffer must be below {name}.response_length = {self.response_length}, "
                f"but is {buffer}.",
            ),
        ]

    def _faults_of_scores(self) -> list[tuple[bool, str]]:
        """The same for settings of advantages."""
        name, estimator = self.section, self.advantage_estimator
        is_plain = estimator == "grpo" and not self.has_kl_in_reward and not self.changes_scores
        return [
            (
                self.num_generations == 1 and estimator != "reinforce_pp",
                f"num_generations is 1, but {name}.advantage_estimator {estimator} compares the "
                "responses to a prompt; give 2 or more, or use reinforce_pp.",
            ),
            (
                self.max_sampling_rounds > 1 and self.num_generations == 1,
                f"max_sampling_rounds is {self.max_sampling_rounds}, but a single response to a "
                f"prompt has no spread of scores; leave it out, or give {name}.num_generations of "
                "2 or more.",
            ),
            (
                self.normalize_advantages and estimator != "rloo",
                f"normalize_advantages is for {name}.advantage_estimator rloo; the others are "
                f"normalized by {name}.scale_rewards, or always.",
            ),
            (
                self.exact_kl and not self.has_reference,
                f"exact_kl needs a reference, which {name}.beta 0 does not hold.",
            ),
            (
                self.multi_objective_aggregation == "normalize_then_sum"
                and (self.judge_fn is not None or not is_plain),
                f"multi_objective_aggregation normalize_then_sum needs {name}.advantage_estimator "
                "grpo, no KL in the reward, no judge, and scores without a penalty, clipping or "
                "scale.",
            ),
        ]

    @property
    def num_responses(self) -> int:
        """K responses to each prompt."""
        return self.num_generations

    @property
    def has_reference(self) -> bool:
        """Whether a reference is held."""
        return self.beta > 0

    @property
    def changes_scores(self) -> bool:
        """Whether a score is penalised, clipped or scaled before it is trained on."""
        penalties = (self.missing_eos_penalty, self.missing_eos_score, self.overlong_buffer)
        others = (self.cliprange_reward, self.scale_reward)
        return any(each is not None for each in (*penalties, *others))

    @property
    def samples_all(self) -> bool:
        """Whether responses are sampled from the distribution that is trained."""
        return self.top_k == 0 and self.top_p == 1

    @property
    def has_kl_in_reward(self) -> bool:
        """Whether the KL is subtracted from the score."""
        return self.has_reference and self.kl_in == "reward"

    @property
    def scores_policy(self) -> bool:
        """Whether the policy runs once more before the first update.

        With a single update its own pass gives the old log-probabilities.
        """
        reads_entropy = self.top_entropy_quantile < 1
        return (
            self.updates_per_iteration > 1
            or reads_entropy
            or self.has_kl_in_reward
            or self.exact_kl
        )

    @property
    def num_epochs(self) -> int:
        """Passes of the updates over the responses of one iteration."""
        return self.num_iterations

    @property
    def num_forward_passes(self) -> int:
        """Forward passes in one iteration: sampling, and those of policy and reference."""
        return 1 + self.scores_policy + self.has_reference


TRAINER = Trainer(
    name="grpo",
    title="GRPO",
    label="GRPO",
    summary="policy gradients without a critic, on groups of responses (GRPO, DAPO, REINFORCE++)",
    settings=Settings,
    reads=prompts_kind,
    online=True,
    # TRL's learning rate.
    optimizer=OptimizerSettings(learning_rate=1e-6),
    first_settings=("total_episodes", "batch_size", "num_generations", "response_length"),
    headlines=(
        Headline("objective/gold", "gold score"),
        Headline("objective/scores", "score"),
        Headline("reward", "reward"),
        Headline("objective/kl", "KL", shows_start=False),
    ),
    losses=("train/loss", "train/grad_norm", "reward"),
    scores=("objective/scores", "reward"),
    plots=(
        Plot("Entropy", "nats per token", {"entropy": "entropy"}),
        Plot(
            "Response length",
            "tokens",
            {"completions/mean_length": "all", "completions/mean_terminated_length": "ended"},
        ),
    ),
    compares_groups=True,
)

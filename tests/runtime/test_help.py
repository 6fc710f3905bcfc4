"""The help of a command: what comes first, and one short entry for each setting."""

import dataclasses
from typing import Literal

import pytest

from rlhf_jax.runtime.commands import main
from rlhf_jax.runtime.help import help_text


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    Attributes:
      rate: after the warm-up. Smith et al. 2020 take 1e-3.
      schedule: "constant" or "cosine".
      norm: gradients are clipped to it; null leaves them.
    """

    rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    norm: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. With more about it.

    Attributes:
      seed: of all random numbers, by the method of Smith et al. 2020; an integer.
      steps: steps of the run that are taken by the optimizer of this section.
    """

    first: Optimizer = Optimizer()
    second: Optimizer = Optimizer(rate=0.5)
    third: Optimizer = Optimizer()
    seed: int = 0
    steps: int | None = None
    packing: bool = True


EXPECTED = """usage: rlhf it [--config FILE.yaml] [--section.key VALUE ...]

A run. With more about it.

  --config FILE.yaml                a file of settings; flags are laid over it
  --print_config                    print the settings as YAML, and exit
  -h, --help                        print this text, and exit

Settings most often changed, with their defaults:
  --seed 0                          of all random numbers, by the method of
                                    Smith et al. 2020; an integer
  --third.rate 0.001                after the warm-up

Section third:
  the settings of the section first

Section first:
  --first.rate 0.001                after the warm-up
  --first.schedule constant         "constant" or "cosine"
  --first.norm 1.0                  gradients are clipped to it; null leaves
                                    them (float or null)

Section second:
  the settings of the section first, but
  --second.rate 0.5                 after the warm-up

Other settings:
  --steps null                      steps of the run that are taken by the
                                    optimizer of this section (int)
  --packing true
"""


def test_the_help_has_first_sentences_defaults_and_each_class_once():
    assert help_text(Config, "rlhf it", ("seed", "third.rate")) == EXPECTED


@pytest.mark.parametrize("command", ["sft", "reward", "ppo", "dpo", "kto", "rft", "run"])
def test_the_help_of_training_begins_with_ten_settings_and_is_short(command, capsys):
    assert main.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    first = text.split("\n\n")[3].splitlines()[1:]
    assert sum(line.startswith("  --") for line in first) == 10
    assert len(text.splitlines()) <= 440
    assert max(map(len, text.splitlines())) <= 80

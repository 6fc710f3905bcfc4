"""Growth of cost: time of steps and of generation, compile time, and memory, each against one size.

    python tools/growth.py

Small GPT-2s, for compile times Llamas, on the default device. All points of a curve are measured
once in each round, so that a machine that slows down changes all of them; a point is the median
over the rounds. Writes growth.json and an SVG file for each figure. Takes about four minutes on two
cores.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import TextBatch
from rlhf_jax.models.huggingface import fresh_model
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.rollout.generation import generate
from rlhf_jax.training import sft

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts" / "lessons"))
from plots import Line, line_plot, save  # noqa: E402  (the lessons' own)

KEY = jax.random.key(0)
VOCABULARY, POSITIONS, PROMPT = 8192, 1024, 32


class Size(NamedTuple):
    """Sizes of a model and its batch; `length` is that of a text, or of a response."""

    layers: int = 4
    width: int = 256
    batch: int = 4
    length: int = 128
    remat: str = "dots"  # as by default
    family: str = "gpt2"

    @property
    def model(self):
        """A model with heads of width 64, without dropout."""
        settings = ModelSettings(
            family=self.family,
            n_layer=self.layers,
            n_head=max(1, self.width // 64),
            n_embd=self.width,
            n_positions=POSITIONS,
            dropout=0.0,
            remat=self.remat,
        )
        return fresh_model(settings, vocab_size=VOCABULARY)


class Curve(NamedTuple):
    """One measured thing against one size.

    Attributes:
      measure: takes a size and returns a function without arguments that measures the point.
      axis: the size that grows, a field of `Size`.
      sizes: its values.
      base: the other sizes.
    """

    measure: Callable
    axis: str
    sizes: tuple[int, ...]
    base: Size = Size()


class Figure(NamedTuple):
    """A plot: its title, its unit, its curves by label, and a dashed power of the size, or 0."""

    title: str
    unit: str
    curves: dict[str, Curve]
    power: int = 0


class Step:
    """A compiled step of supervised fine-tuning, run once by each call; returns seconds."""

    max_rounds = None

    def __init__(self, size):
        self.compiled = lowered_step(size).compile()
        self.state = jax.jit(initial_state, static_argnums=0)(size)
        shape = (size.batch, size.length)
        tokens = jax.random.randint(KEY, shape, 0, VOCABULARY)
        self.batch = TextBatch(tokens, jnp.ones(shape, jnp.int32), jnp.ones(shape, bool))

    def __call__(self):
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch, KEY)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


class Generation:
    """Compiled generation, run once by each call, no response ending early; returns seconds."""

    max_rounds = None

    def __init__(self, size):
        self.compiled = lowered_generation(size).compile()
        shape = (size.batch, PROMPT)
        prompts = jax.random.randint(KEY, shape, 0, VOCABULARY)
        self.arguments = jax.jit(size.model.init)(KEY), prompts, jnp.ones(shape, bool), KEY

    def __call__(self):
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - start


class Compilation:
    """Tracing, lowering and compiling, from the beginning in each call.

    Returns seconds of processor time, since it uses several threads and no device.
    """

    max_rounds = 3

    def __init__(self, lowered, size):
        self.lowered, self.size = lowered, size

    def __call__(self):
        jax.clear_caches()
        start = time.process_time()
        self.lowered(self.size).compile()
        return time.process_time() - start


class Memory:
    """MiB of temporary arrays of a compiled step, by the compiler."""

    max_rounds = 1

    def __init__(self, size):
        analysis = lowered_step(size).compile().memory_analysis()
        self.mib = analysis.temp_size_in_bytes / 2**20

    def __call__(self):
        return self.mib


def initial_state(size):
    """The state before the first step."""
    model, settings = size.model, sft.Settings(batch_size=size.batch)
    return sft.init_state(model, model.init(KEY), settings, KEY)


def lowered_step(size):
    """A lowered step of supervised fine-tuning, which donates its state."""
    state = jax.eval_shape(lambda: initial_state(size))
    tokens = jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    step = sft.make_step(size.model, sft.Settings(batch_size=size.batch))
    batch = TextBatch(tokens, tokens, mask)
    options = compiler_options(jax.default_backend())  # as the commands have it
    return jax.jit(step, donate_argnums=0, compiler_options=options).lower(state, batch, KEY)


def lowered_generation(size):
    """Lowered generation of `length` tokens after prompts of 32."""
    model = size.model

    def sample(params, prompts, mask, key):
        return generate(model, params, prompts, mask, key, max_new_tokens=size.length)

    shape = (size.batch, PROMPT)
    prompts, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
    return jax.jit(sample).lower(jax.eval_shape(model.init, KEY), prompts, mask, KEY)


def compilation_of(lowered):
    """A measure of the compile time of a program."""
    return lambda size: Compilation(lowered, size)


ANSWER = Size(batch=16, length=32)
LAYERS = (4, 8, 16, 32, 48)
FIGURES = {
    "step_batch": Figure(
        "Step of supervised fine-tuning against the batch",
        "seconds",
        {"sequences of 128 tokens": Curve(Step, "batch", (1, 2, 4, 8, 16))},
        power=1,
    ),
    "step_length": Figure(
        "Step of supervised fine-tuning against the length",
        "seconds",
        {"4 sequences of this length": Curve(Step, "length", (64, 128, 256, 512, 768))},
        power=1,
    ),
    "step_width": Figure(
        "Step of supervised fine-tuning against the width",
        "seconds",
        {"4 layers of this width": Curve(Step, "width", (128, 256, 384, 512))},
        power=2,
    ),
    "step_layers": Figure(
        "Step of supervised fine-tuning against the layers",
        "seconds",
        {"layers of width 256": Curve(Step, "layers", (1, 2, 4, 8))},
        power=1,
    ),
    "compile_layers": Figure(
        "Compile time against the layers, of a Llama of width 64",
        "seconds of processor time",
        {
            label: Curve(
                compilation_of(lowered), "layers", LAYERS, base._replace(width=64, family="llama")
            )
            for label, lowered, base in (
                ("step of supervised fine-tuning", lowered_step, Size()),
                ("generation", lowered_generation, ANSWER),
            )
        },
    ),
    "generation_batch": Figure(
        "Generation against the batch",
        "seconds",
        {"responses of 32 tokens": Curve(Generation, "batch", (1, 4, 16, 32, 64), ANSWER)},
        power=1,
    ),
    "generation_length": Figure(
        "Generation against the length of the responses",
        "seconds",
        {"16 responses of this length": Curve(Generation, "length", (16, 32, 64, 128), ANSWER)},
        power=1,
    ),
    "memory_length": Figure(
        "Temporary arrays of a step against the length",
        "MiB",
        {
            f"model.remat {remat}": Curve(
                Memory, "length", (128, 256, 512, 1024), Size(remat=remat)
            )
            for remat in ("none", "dots", "full")
        },
    ),
}


def measured(curve, rounds):
    """For each point of a curve, {the size, "median", "values"}."""
    points = [curve.measure(curve.base._replace(**{curve.axis: size})) for size in curve.sizes]
    limit = points[0].max_rounds
    # Without a limit the first round warms up, and is left out.
    count = min(rounds, limit) if limit else 1 + rounds
    values = [[point() for point in points] for _ in range(count)]
    columns = zip(*(values if limit else values[1:]))
    return [
        {curve.axis: size, "median": statistics.median(column), "values": list(column)}
        for size, column in zip(curve.sizes, columns, strict=True)
    ]


def plotted(figure, results):
    """The text of an SVG file; the dashed line is the power of the size through the last point."""
    lines, axis = [], next(iter(figure.curves.values())).axis
    for colour, (label, points) in enumerate(results.items()):
        xs, ys = [point[axis] for point in points], [point["median"] for point in points]
        if figure.power:
            power = [ys[-1] * (x / xs[-1]) ** figure.power for x in xs]
            name = {1: "in proportion", 2: "as the square"}[figure.power]
            lines.append(Line(name, xs, power, colour=7, dashed=True))
        lines.append(Line(label, xs, ys, colour=colour))
        lines.append(Line("", xs, ys, colour=colour, dots=True))
    top = 1.05 * max(max(line.ys) for line in lines)
    return line_plot(figure.title, lines, labels=(axis, figure.unit), y_range=(0.0, top))


def main():
    """Measures the figures, prints their points, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each point; compiling has 3")
    parser.add_argument("--only", nargs="*", choices=FIGURES, help="figures, by default all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "_static" / "growth")
    arguments = parser.parse_args()
    results = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "figures": {},
    }
    for name in arguments.only or FIGURES:
        figure = FIGURES[name]
        curves = {
            label: measured(curve, arguments.rounds) for label, curve in figure.curves.items()
        }
        for label, points in curves.items():
            shown = ", ".join(f"{point['median']:.3g}" for point in points)
            print(f"{figure.title}: {label}: {shown} {figure.unit}", flush=True)
        save(arguments.output, name, plotted(figure, curves))
        results["figures"][name] = curves
    (arguments.output / "growth.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    # What is read from the disk takes no time to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    main()

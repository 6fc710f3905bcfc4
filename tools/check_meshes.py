"""Compares training on meshes of eight CPU devices with training on one device.

    python tools/check_meshes.py [FOLDER]

All stages of a GPT-2, a Qwen3 and a Llama are trained with every factorisation data x fsdp x tensor
of eight whose tensor divides the key/value heads. All metrics of four steps and the sampled tokens
are compared. It prints the largest difference of each run, relative to the tolerance (1e-5,
absolute and relative), and exits with 1 if one is above 1. The tests do the same for some of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlhf_jax.runtime import train  # noqa: E402
from tests.parallel.meshes import (  # noqa: E402
    DECODER,
    FACTORISATIONS,
    FAMILIES,
    SAMPLING,
    STAGES,
    differences,
    make_configs,
    mesh_name,
    run_folder,
    sampled,
    selected,
    trainer_of,
)

ONE = (1, 1, 1)


def main(base: str) -> int:
    """The exit status."""
    for family in FAMILIES:
        for name, config in make_configs(base, family, ONE).items():
            train(trainer_of(name), config)
    plan = [
        (family, sizes, STAGES)
        for family in FAMILIES
        for sizes in FACTORISATIONS
        if family == "gpt2" or DECODER["num_key_value_heads"] % sizes[2] == 0
    ]
    command = [sys.executable, "-m", "tests.parallel.eight_devices", base, json.dumps(plan)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    worst = 0.0
    for family, sizes, stages in plan:
        for stage in stages:
            one, several = (run_folder(base, family, mesh) / stage for mesh in (ONE, sizes))
            ratios = differences(one, several)
            name = max(ratios, key=lambda metric: ratios[metric])
            same = texts_of(stage, one) == texts_of(stage, several)
            worst = max(worst, ratios[name] if same else float("inf"))
            tokens = "" if same else ", OTHER TOKENS"
            line = f"{family} {mesh_name(sizes)} {stage:8} {ratios[name]:.3f} ({name}){tokens}"
            print(line, flush=True)
    print(f"{len(plan)} meshes of families, largest ratio to the tolerance: {worst:.3f}")
    return int(worst > 1)


def texts_of(stage: str, folder: Path) -> Any:
    """The responses that a run sampled; None of a stage that samples none."""
    if stage == "rft":
        return selected(folder)
    return sampled(folder) if stage in SAMPLING else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", nargs="?", help="folder of the runs; a temporary one by default")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(folder or temporary))

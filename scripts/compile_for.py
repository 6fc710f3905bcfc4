"""Compiles a stage for devices that are not there, and tells what it would cost on them.

python scripts/compile_for.py --topology v5e:16x16 --model gpt2-xl --config FILE.yaml \
    --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli


def main() -> None:
    """The command, after what has to be said before JAX looks for devices."""
    from rlhf_jax.runtime.compilation import command as compile_for

    compile_for.use_no_accelerator(sys.argv)
    compile_for.run_compile_for()


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Responses of a model to prompts, as JSON lines; the same as `rlhf generate`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))

"""Weights of tiny decoders, the same for `make_decoders.py` and the tests that read its numbers."""

import zlib

import numpy as np


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 noise for a tensor, drawn from its name."""
    noise = 0.2 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return noise.astype(np.float32)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A direction in which the gradient of a tensor is compared, of length 1."""
    noise = np.random.default_rng(zlib.crc32(f"gradient {name}".encode())).standard_normal(shape)
    return (noise / np.linalg.norm(noise)).astype(np.float32)

"""Numbers for the patches that convolutions read: at one position of a batch, equal numbers stand for equal patches.

Frames of a game repeat each other, those that follow each other (incremental.py) and those of other environments and
times too: in 1,024 observations of Pong 4 % of the patches of layer 1 are distinct. Numbered once, a batch can be cut
and shuffled as it likes, and its patches are still known (`NumberedRepeats` in repeats.py).

A patch is told by a hash of 64 bits, of layer 1 from its pixels, of layer i from the hashes of the patches of layer
i - 1 that it reads:

    H_1(p) = sum_b c_b mix(sum_w a_w w),    H_i(p) = sum_r c_r mix(H_{i-1}(r)),

w the words, of four pixels at most, of a block of pixels as wide as the stride, b the blocks of a patch, a and c odd
constants, mix a bijection of 64 bits, all modulo 2^64. So two patches that stand at the same position get one number
with a probability of about 2^-64, and of 2^-33 at most: words that differ in their highest byte alone agree in the low
bits of their products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rllib_pnn.network.patches import is_supported

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # of eight pixels, the highest bits of two could cancel
_SAMPLES = 15  # of a batch, odd
_ROWS = 512  # hashed at a time, so that what is worked with stays in the processor's caches


@torch.no_grad()
def number_patches(obs: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """The patches that the lowest layers read, as far up as they are convolutions without padding.

    Args:
        obs: (B, C, H, W) bytes.
        layers: a column's, lowest first.

    Returns:
        Of each such layer (B, H_i * W_i), int32 from 0 on; none where layer 1 is not supported (see `is_supported`).
    """
    convolutions: list[nn.Conv2d] = []
    for layer in layers:
        if not isinstance(layer, nn.Conv2d) or layer.padding not in (0, (0, 0)):
            break
        convolutions.append(layer)
    if not convolutions or not is_supported(obs, convolutions[0]):
        return []
    chunks = [_hashes(part, convolutions) for part in obs.split(_ROWS)]
    return [_numbers(torch.cat(parts)) for parts in zip(*chunks, strict=True)]


def distinct_share(numbers: Tensor, count: int) -> float:
    """Of the positions of so many observations, drawn evenly from (B, P), those that hold distinct patches."""
    rows = numbers[:: max(1, len(numbers) // count)]
    return len(pd.unique(rows.reshape(-1).numpy())) / rows.numel()


def _hashes(obs: Tensor, layers: Sequence[nn.Conv2d]) -> list[Tensor]:
    """H_i of every layer, (B, H_i, W_i)."""
    kernel, stride = layers[0].kernel_size[0], layers[0].stride[0]
    channels, height, width = obs.shape[1:]
    span = kernel // stride
    high, wide = ((n - kernel) // stride + span for n in (height, width))  # blocks
    pixels = min(stride, 4)  # of a word
    across = stride // pixels
    words = obs[:, :, : high * stride].view(_WORDS[pixels])
    words = words.view(len(obs), channels, high, stride, width // stride, across)
    constants = iter(_constants(0, channels * stride * across))
    block = torch.zeros(len(obs), high, wide, dtype=torch.int64)
    for c in range(channels):
        for y in range(stride):
            for x in range(across):
                block.add_(words[:, c, :, y, :wide, x], alpha=next(constants))
    found = [_combined(block, span, 1, 1)]
    for number, layer in enumerate(layers[1:], start=2):
        found.append(_combined(found[-1], layer.kernel_size, layer.stride, number))
    return found


def _combined(below: Tensor, kernel: int | tuple[int, ...], stride: int | tuple[int, ...], number: int) -> Tensor:
    """Hashes (B, H, W) -> those of the patches that a convolution of these maps reads."""
    (tall, long), (down, along) = (n if isinstance(n, tuple) else (n, n) for n in (kernel, stride))
    high, wide = (below.shape[1] - tall) // down + 1, (below.shape[2] - long) // along + 1
    mixed = below ^ (below >> 32)
    mixed.mul_(_MULTIPLIER)
    mixed.bitwise_xor_(mixed >> 29)
    constants = iter(_constants(number, tall * long))
    out = torch.zeros(len(below), high, wide, dtype=torch.int64)
    for y in range(tall):
        for x in range(long):
            part = mixed[:, y : y + down * (high - 1) + 1 : down, x : x + along * (wide - 1) + 1 : along]
            out.add_(part, alpha=next(constants))
    return out


def _numbers(hashes: Tensor) -> Tensor:
    """(B, H, W) -> (B, H * W): numbers from 0 on, others at every position."""
    keys = hashes.flatten(1)
    batch, count = keys.shape
    # What stands at a position most of the time is the median of a few; it need not be looked up in a table.
    usual = keys[:: max(1, batch // _SAMPLES)].median(0).values
    positions = torch.arange(count, dtype=torch.int32)
    numbers = positions.repeat(batch, 1)
    where = (keys != usual).reshape(-1).nonzero().squeeze(1)
    others = keys.view(-1)[where] + (where % count) * _MULTIPLIER
    codes, _ = pd.factorize(others.numpy())
    numbers.view(-1)[where] = torch.from_numpy(codes).to(torch.int32) + count
    return numbers


_MULTIPLIER = 0x5851F42D4C957F2D  # odd


@functools.lru_cache(maxsize=64)
def _constants(number: int, count: int) -> list[int]:
    """Odd ones, the same in every process."""
    drawn = np.random.default_rng((20161, number)).integers(-(2**63), 2**63 - 1, count, dtype=np.int64)
    return [int(n) | 1 for n in drawn]

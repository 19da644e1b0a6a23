"""The patches of observations that a convolution reads: which differ from those before, and copies of them.

For frames of a game, of which little changes from step to step (incremental.py, repeats.py). Bytes on the CPU, in
numpy, because a word of several pixels is compared or copied at once.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

_STRIP = 256  # patches; strips are filled up to a multiple, so that few shapes are met
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def is_supported(obs: Tensor, layer: nn.Conv2d) -> bool:
    """Whether patches can be compared: bytes on the CPU, no padding, kernel and width multiples of the stride."""
    (kernel, wide), (stride, _) = layer.kernel_size, layer.stride
    return (
        obs.device.type == layer.weight.device.type == "cpu"
        and obs.dtype == torch.uint8
        and obs.is_contiguous()
        and layer.padding in (0, (0, 0))
        and kernel == wide
        and stride in _WORDS
        and kernel % stride == 0
        and obs.shape[3] % stride == 0
    )


def changed_patches(pixels: np.ndarray, before: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """Where a convolution without padding reads a pixel that is another than before.

    Args:
        pixels, before: (B, C, H, W) bytes, contiguous. `kernel` is a multiple of `stride`, W too, and `stride` 1, 2, 4
            or 8.

    Returns:
        Indices into its (B, H_1, W_1) outputs, flattened and sorted.
    """
    batch, channels, height, width = pixels.shape
    blocks, span = (height - kernel) // stride + kernel // stride, kernel // stride
    word = _WORDS[stride]
    differs = pixels.view(word) != before.view(word)  # (B, C, H, W / stride)
    rows = functools.reduce(np.bitwise_or, (differs[:, c, : blocks * stride] for c in range(channels)))
    rows = rows.reshape(batch, blocks, stride, width // stride)
    block = functools.reduce(np.bitwise_or, (rows[:, :, r] for r in range(stride)))
    return np.flatnonzero(any_in_patch(block, span, 1))


def strip_of_patches(pixels: np.ndarray, where: np.ndarray, kernel: int, stride: int) -> Tensor:
    """The patches that a convolution reads at `where`, side by side: (1, C, kernel, kernel * N) floats.

    Args:
        pixels: (B, C, H, W) bytes, contiguous.
        where: indices into (B, H_1, W_1), flattened; N is their number, filled up to a multiple of 256 with zeros.
    """
    windows, (image, y, x) = _windows(pixels, kernel, stride), _coordinates(pixels, where, kernel, stride)
    strip = np.zeros((pixels.shape[1], kernel, -(-len(where) // _STRIP) * _STRIP), windows.dtype)
    strip[:, :, : len(where)] = windows.transpose(3, 4, 0, 1, 2)[:, :, image, y, x]
    return torch.from_numpy(strip.view(np.uint8)).unsqueeze(0).to(torch.float32)


def patches_at(pixels: np.ndarray, where: np.ndarray, kernel: int, stride: int) -> Tensor:
    """The same patches one by one, (N, C, kernel, kernel) floats; N is not filled up."""
    windows, (image, y, x) = _windows(pixels, kernel, stride), _coordinates(pixels, where, kernel, stride)
    patches = np.ascontiguousarray(windows[image, y, x])  # (N, C, kernel) rows
    return torch.from_numpy(patches.view(np.uint8)).view(*patches.shape, kernel).to(torch.float32)


def _windows(pixels: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """All patches without copying one, (B, H_1, W_1, C, kernel); a row of a patch is one item, wherever it starts."""
    batch, channels, height, width = pixels.shape
    row = np.dtype(_WORDS.get(kernel, f"V{kernel}"))
    return np.lib.stride_tricks.as_strided(
        pixels.reshape(-1)[:kernel].view(row),
        (batch, (height - kernel) // stride + 1, (width - kernel) // stride + 1, channels, kernel),
        (channels * height * width, stride * width, stride, height * width, width),
        writeable=False,
    )


def _coordinates(
    pixels: np.ndarray, where: np.ndarray, kernel: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    high, wide = ((n - kernel) // stride + 1 for n in pixels.shape[2:])
    image, position = np.divmod(where, high * wide)
    return image, position // wide, position % wide


def positions_above(
    where: np.ndarray, batch: int, size: tuple[int, int], kernel: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of a convolution without padding that read one of the pixels at `where`.

    Args:
        where: indices into maps (B, H, W), flattened.

    Returns:
        Their images and their positions, indices into (H', W'), flattened; sorted.
    """
    readers, count = _readers(size, kernel, stride)
    image, pixel = np.divmod(where, size[0] * size[1])
    is_read = np.zeros((batch, count + 1), bool)
    is_read[image[:, None], readers[pixel]] = True
    image, position = np.nonzero(is_read[:, :count])
    return image, position


@functools.lru_cache(maxsize=64)
def _readers(size: tuple[int, int], kernel: int, stride: int) -> tuple[np.ndarray, int]:
    """For every pixel of maps (H, W) the outputs that read it, (H * W, most); their count stands for none."""
    starts = row_starts(size, kernel, stride)
    count, span = len(starts), -(-kernel // stride)
    readers = np.full((size[0] * size[1], span * span), count)
    filled = np.zeros(len(readers), int)
    for output, pixels in enumerate((starts[:, :, None] + np.arange(kernel)).reshape(count, -1)):
        readers[pixels, filled[pixels]] = output
        filled[pixels] += 1
    return readers, count


@functools.lru_cache(maxsize=64)
def row_starts(size: tuple[int, int], kernel: int, stride: int) -> np.ndarray:
    """For every output of a convolution of maps (H, W) the first pixel of each row that it reads, (H' * W', kernel)."""
    pixels = np.arange(size[0] * size[1]).reshape(size)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (kernel, kernel))[::stride, ::stride, :, 0]
    return windows.reshape(-1, kernel)


def any_in_patch(flags: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """(..., H, W) bool -> (..., H', W'): whether a patch of a convolution without padding holds a true one."""
    high, wide = ((n - kernel) // stride + 1 for n in flags.shape[-2:])
    rows, columns = ([slice(i, i + stride * (n - 1) + 1, stride) for i in range(kernel)] for n in (high, wide))
    across = functools.reduce(np.bitwise_or, (flags[..., x] for x in columns))
    return functools.reduce(np.bitwise_or, (across[..., y, :] for y in rows))

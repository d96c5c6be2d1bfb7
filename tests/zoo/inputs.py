"""Makers of inputs: batch size -> (args, kwargs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.zoo.entry import Inputs


def floats(*shape: int) -> Callable[[int], Inputs]:
    """One float tensor (batch, *shape)."""
    return lambda batch: ((torch.randn(batch, *shape),), {})


def image(size: int = 32) -> Callable[[int], Inputs]:
    """A square picture (batch, 3, size, size)."""
    return floats(3, size, size)


def mask_of(batch: int, length: int) -> Tensor:
    """A right-padded 0/1 mask: the first row is full, the others at least half."""
    sizes = torch.randint(length // 2, length, (batch, 1))
    sizes[0] = length
    return (torch.arange(length) < sizes).long()


def text(
    length: int = 20, vocab: int = 99, pad: int = 0, eos: int | None = None, boxes: bool = False
) -> Callable[[int], Inputs]:
    """Token ids with a padding mask, optionally with an end token and bounding boxes."""

    def make(batch: int) -> Inputs:
        mask = mask_of(batch, length)
        ids = torch.randint(3, vocab - 1, (batch, length))
        if eos is not None:
            ids[torch.arange(batch), mask.sum(1) - 1] = eos
        kwargs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
        if boxes:
            corner = torch.randint(0, 50, (batch, length, 2))
            kwargs["bbox"] = torch.cat([corner, corner + torch.randint(0, 9, corner.shape)], -1)
        return (), kwargs

    return make


def patches(patch: int, slots: int = 24) -> Callable[[int], Inputs]:
    """Siglip2: flattened patches of pictures of unlike shapes, padded to a number of slots."""
    shapes = [(4, 6), (5, 4), (3, 7), (6, 3)]

    def make(batch: int) -> Inputs:
        sizes = torch.tensor([shapes[i % len(shapes)] for i in range(batch)])
        mask = (torch.arange(slots) < sizes.prod(1, keepdim=True)).long()
        pixels = torch.randn(batch, slots, 3 * patch * patch) * mask[..., None]
        kwargs = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sizes}
        return (), kwargs

    return make


def grid(patch: int, shapes: tuple[tuple[int, int], ...]) -> Callable[[int], Inputs]:
    """Qwen-VL: the patches of all pictures in one sequence, and the grid of each picture."""

    def make(batch: int) -> Inputs:
        sizes = torch.tensor([(1, *shapes[i % len(shapes)]) for i in range(batch)])
        pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * patch * patch)
        return (pixels,), {"grid_thw": sizes}

    return make


def masked_floats(mask_name: str, *shape: int) -> Callable[[int], Inputs]:
    """Tokens (batch, *shape) and a mask that is true at padding, as torch.nn wants it."""

    def make(batch: int) -> Inputs:
        mask = mask_of(batch, shape[0]) == 0
        return (torch.randn(batch, *shape),), {mask_name: mask}

    return make

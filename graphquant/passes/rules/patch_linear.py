"""Turns a convolution with non-overlapping windows (a patch embedding) into a linear over patches.

    y = conv(x [B, C, H, W], weight [N, C, p, p], bias, stride=p)
 -> y = linear(patches(x) [B, H/p * W/p, C p p], weight [N, C p p], bias), as [B, N, H/p, W/p]

In two or three dimensions. It stays in float, with the same products and sums; but cuDNN converts
the image, the weight and the result to other layouts and back (SigLIP-so400m, 64 images on an H200:
1.9 ms in all, of 11 for the first four layers). The result has the memory layout of tokens, as the
encoder reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from graphquant.ir.graph import LINEAR, aten, calls, dtype, full_args, shape
from graphquant.passes.rule import Edit, Refuse, Rewrite, Site, View

CONVOLUTIONS = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
}


@dataclass(frozen=True)
class PatchSite(Site):
    x: Node
    weight: Node
    bias: Node | None


class PatchLinear:
    name = "patch_linear"

    def sites(self, view: View) -> Iterator[PatchSite]:
        for conv in calls(view.graph, lambda n: n.target in CONVOLUTIONS):
            x, weight, bias, *how = full_args(conv)
            if weight in view.constants and _is_patches(shape(x), shape(weight), *how):
                yield PatchSite((conv,), (), (x, conv), x, weight, bias)

    def check(self, view: View, site: PatchSite) -> Refuse | None:
        (conv,) = site.outputs
        if conv in view.needs_gradient:
            return Refuse("its result can need a gradient", conv)
        if not dtype(conv) == dtype(site.x) == dtype(site.weight):
            return Refuse(f"it computes in {dtype(conv)} on {dtype(site.x)}", conv)
        return None

    def rewrite(self, edit: Edit, site: PatchSite) -> Rewrite:
        (conv,) = site.outputs
        batch, channels = edit.sizes(site.x)[:2]
        windows, patch = shape(conv)[2:], shape(site.weight)[2:]
        split = [n for pair in zip(windows, patch, strict=True) for n in pair]
        x = edit.call(aten.reshape.default, site.x, [batch, channels, *split])
        last = range(2, 2 + len(split))
        x = edit.call(aten.permute.default, x, [0, *last[::2], 1, *last[1::2]])
        tokens, width = math.prod(windows), shape(site.weight)[1] * math.prod(patch)
        x = edit.call(aten.reshape.default, x, [batch, tokens, width])
        weight = edit.fold(aten.reshape.default, site.weight, [-1, width])
        y = edit.call(LINEAR, x, weight, site.bias)
        y = edit.call(aten.transpose.int, y, 1, 2)
        y = edit.call(aten.reshape.default, y, [batch, shape(conv)[1], *windows])
        return Rewrite((y,))


def _is_patches(
    x: tuple[Any, ...],
    weight: tuple[Any, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Does every pixel belong to exactly one window? Only for static sizes."""
    pixels, patch = x[2:], list(weight[2:])
    return (
        len(x) == len(weight)  # has a batch dim
        and all(isinstance(n, int) for n in pixels)
        and list(stride) == patch
        and (padding == "valid" or not any(padding))  # any("same") is true
        and all(d == 1 for d in dilation)
        and groups == 1
        and all(n >= p and n % p == 0 for n, p in zip(pixels, patch, strict=True))
        and math.prod(patch) > 1  # a 1x1 convolution has no patches to gather
    )

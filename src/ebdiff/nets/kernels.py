"""Triton kernels of `fused`: GroupNorm with SiLU and dropout, forward and backward, and sums.

A program of a norm has whole groups of one image. It reads their pixels twice, for sums and to write; in
between they stay in cache. Large images are shared by several programs, whose sums meet between two launches.
Activations are channels-last, of any floating type; statistics, sums and all arithmetic are fp32.

Triton comes with torch's CUDA builds only, so this module is imported where CUDA is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program works on at a time
THREAD = 16  # of them in a thread: two vectors of 16 bytes in bf16
SHARE = 2**17  # elements of one program at most: 64 x 64 pixels of 32 channels
REGISTERS = 128  # of a thread going backward, at most: two programs fit a multiprocessor (else it takes 170)


def plan(pixels: int, size: int) -> dict[str, int]:
    """How the work is cut: by shapes alone, so that neither the batch nor the device moves a bit.

    A program has the fewest groups, by powers of two, that fill 48 bytes of bf16 and, if narrow, end on a
    multiple of 8.
    A tile has a warp for every 512 elements, which is 8 from 128 pixels of 32 channels on, and at least one
    for every 16 channels, since `_pooled` works on their square.

    Args:
        pixels: of an image.
        size: channels of a group.
    """
    groups = 1
    while groups * size < 24 or (groups * size % 4 and groups * size < 64):
        groups *= 2
    columns = triton.next_power_of_2(groups * size)
    rows = min(triton.next_power_of_2(pixels), TILE // columns)
    parts = triton.next_power_of_2(triton.cdiv(pixels * columns, SHARE))
    return {
        "SIZE": size,
        "WIDTH": groups * size,  # channels of a program
        "COLUMNS": columns,  # of a tile, of which WIDTH are used
        "ROWS": rows,  # pixels of a tile
        "PARTS": parts,  # programs that share an image
        "TILES": triton.cdiv(triton.cdiv(pixels, rows), parts),  # of a program
        "num_warps": max(rows * columns // (32 * THREAD), columns // 16),
    }


def norm_forward(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    seed: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the channels' means and the groups' 1 / std. As `fused.norm_forward`."""
    y, mean = torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)
    rstd = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    tensors = (x, gain, bias, shift, seed, y, mean, rstd)
    _launch(forward_kernel, tensors, x, shift, groups, {"EPS": eps, "SILU": silu, "GONE": gone(p)})
    return y, mean, rstd


def norm_backward(
    dy: Tensor,
    around: Tensor | None,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the shift, and of bias and gain. As `fused.norm_backward`."""
    dx = torch.empty_like(x)
    dshift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    tensors = (dy, around, x, gain, bias, shift, seed, mean, rstd, dx, dshift)
    settings = {"SILU": silu, "GONE": gone(p), "maxnreg": REGISTERS}
    sums = _launch(backward_kernel, tensors, x, shift, rstd.shape[1], settings)
    return dx, dshift, sums.sum((0, 1))


def gone(p: float) -> int:
    """Dropout's probability in units of 2**-16, as in `unet.Dropout`."""
    return round(p * 2**16)


def _launch(
    kernel: Any,
    tensors: Sequence[Any],
    x: Tensor,
    shift: Tensor | None,
    groups: int,
    settings: dict[str, Any],
) -> Tensor:
    """Run a kernel on channels-last images: its sums over the pixels of every part, fp32 (B, parts, 2, C)."""
    n, channels, height, width = x.shape
    how = plan(height * width, channels // groups)
    parts = how["PARTS"]
    grid = n, triton.cdiv(channels, how["WIDTH"]), parts  # of the first axis there may be billions
    sums = x.new_empty(n, parts, 2, channels, dtype=torch.float32)
    apart = 0 if shift is None else shift.stride(0)  # one of many that lie side by side

    def run(**phases: bool) -> None:
        kernel[grid](*tensors, sums, height * width, channels, apart, **settings, **how, **phases)

    if parts == 1:
        run(SUM=True, WRITE=True)
        return sums
    run(SUM=True, WRITE=False)
    run(SUM=False, WRITE=True)
    return sums


@triton.jit
def forward_kernel(
    x, gain, bias, shift, seed, y, mean, rstd, sums, pixels, channels, apart,
    EPS: tl.constexpr, SILU: tl.constexpr, GONE: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, SUM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """y = dropout(silu(gain * (x + shift - mean) * rstd + bias))."""
    image, part = tl.program_id(0), tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * WIDTH + column
    own = (column < WIDTH) & (channel < channels)
    first = part * TILES * ROWS
    last = tl.minimum(first + TILES * ROWS, pixels)
    x += image.to(tl.int64) * pixels * channels
    # About the first pixel: sums about zero would cancel where the mean is large.
    origin = tl.load(x + channel, mask=own, other=0).to(tl.float32)

    if SUM:
        total, square = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for tile in tl.range(TILES):
            pixel = first + tile * ROWS
            at, there = _tile(pixel, last, channel, channels, own, ROWS)
            d = tl.where(there, tl.load(x + at, mask=there, other=0).to(tl.float32) - origin, 0)
            total += d
            square += d * d
        total, square = tl.sum(total, 0), tl.sum(square, 0)
        kept = sums + (image * PARTS + part) * 2 * channels + channel
        tl.store(kept, total, mask=own)
        tl.store(kept + channels, square, mask=own)
    else:
        total, square = _met(sums, image, channel, channels, own, PARTS)

    if WRITE:
        moved = tl.zeros([COLUMNS], tl.float32)
        if shift is not None:
            moved += tl.load(shift + image * apart + channel, mask=own, other=0).to(tl.float32)
        # From channels to groups: squares about the channel's mean, and of that about the group's.
        middle = origin + moved + total / pixels
        centre = _pooled(middle, SIZE, COLUMNS) / SIZE
        spread = square - total * total / pixels + pixels * (middle - centre) * (middle - centre)
        r = 1 / tl.sqrt(_pooled(spread, SIZE, COLUMNS) / (pixels * SIZE) + EPS)
        told = own & (part == 0)
        tl.store(mean + image * channels + channel, middle, mask=told)
        tl.store(rstd + (image * channels + channel) // SIZE, r, mask=told & (column % SIZE == 0))

        a = r * tl.load(gain + channel, mask=own, other=0).to(tl.float32)
        b = tl.load(bias + channel, mask=own, other=0).to(tl.float32)
        centre -= moved
        y += image.to(tl.int64) * pixels * channels
        for tile in tl.range(TILES):
            pixel = first + tile * ROWS
            at, there = _tile(pixel, last, channel, channels, own, ROWS)
            z = (tl.load(x + at, mask=there, other=0).to(tl.float32) - centre) * a + b
            if SILU:
                z *= tl.sigmoid(z)
            if seed is not None:
                z *= _dropout(seed, pixel, pixels, GONE, COLUMNS, ROWS)
            tl.store(y + at, z, mask=there)


@triton.jit
def backward_kernel(
    dy, around, x, gain, bias, shift, seed, mean, rstd, dx, dshift, sums, pixels, channels, apart,
    SILU: tl.constexpr, GONE: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, SUM: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """With u = d * rstd, d = x + shift - mean, and dz the gradient of gain * u + bias, means over a group:

    dx = rstd * (gain * dz - mean(gain * dz) - u * mean(gain * dz * u));
    over pixels, dbias sums dz, dgain dz * u, and dshift dx. What comes from around the norm is added to dx.
    """
    image, part = tl.program_id(0), tl.program_id(2)
    column = tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * WIDTH + column
    own = (column < WIDTH) & (channel < channels)
    first = part * TILES * ROWS
    last = tl.minimum(first + TILES * ROWS, pixels)
    x += image.to(tl.int64) * pixels * channels
    dy += image.to(tl.int64) * pixels * channels
    middle = tl.load(mean + image * channels + channel, mask=own, other=0)
    centre = _pooled(middle, SIZE, COLUMNS) / SIZE
    r = tl.load(rstd + (image * channels + channel) // SIZE, mask=own, other=0)
    start = centre
    if shift is not None:
        start -= tl.load(shift + image * apart + channel, mask=own, other=0).to(tl.float32)
    a = r * tl.load(gain + channel, mask=own, other=0).to(tl.float32)
    b = tl.load(bias + channel, mask=own, other=0).to(tl.float32)

    if SUM:
        db, da = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for tile in tl.range(TILES):
            pixel = first + tile * ROWS
            at, there = _tile(pixel, last, channel, channels, own, ROWS)
            d, dz = _graded(dy, x, at, there, start, a, b, SILU)
            if seed is not None:
                dz *= _dropout(seed, pixel, pixels, GONE, COLUMNS, ROWS)
            db += dz
            da += dz * d
        db, da = tl.sum(db, 0), tl.sum(da, 0) * r
        kept = sums + (image * PARTS + part) * 2 * channels + channel
        tl.store(kept, db, mask=own)
        tl.store(kept + channels, da, mask=own)
    else:
        db, da = _met(sums, image, channel, channels, own, PARTS)

    if WRITE:
        level = _pooled(a * db, SIZE, COLUMNS) / (pixels * SIZE)
        slope = r * _pooled(a * da, SIZE, COLUMNS) / (pixels * SIZE)
        if shift is not None:
            total = a * db - pixels * (level + (middle - centre) * slope)
            tl.store(dshift + image * channels + channel, total, mask=own & (part == 0))
        dx += image.to(tl.int64) * pixels * channels
        if around is not None:
            around += image.to(tl.int64) * pixels * channels
        for tile in tl.range(TILES):
            pixel = first + tile * ROWS
            at, there = _tile(pixel, last, channel, channels, own, ROWS)
            d, dz = _graded(dy, x, at, there, start, a, b, SILU)
            if seed is not None:
                dz *= _dropout(seed, pixel, pixels, GONE, COLUMNS, ROWS)
            gradient = a * dz - level - d * slope
            if around is not None:
                gradient += tl.load(around + at, mask=there, other=0).to(tl.float32)
            tl.store(dx + at, gradient, mask=there)


@triton.jit
def _met(sums, image, channel, channels, own, PARTS: tl.constexpr):
    """The two sums of an image, of all its parts."""
    part = image * PARTS + tl.arange(0, PARTS)
    kept = sums + part[:, None] * 2 * channels + channel[None, :]
    first = tl.load(kept, mask=own[None, :], other=0)
    second = tl.load(kept + channels, mask=own[None, :], other=0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _tile(pixel, last, channel, channels, own, ROWS: tl.constexpr):
    """Where the elements of a tile lie in their image, and which there are: (ROWS, COLUMNS)."""
    row = pixel + tl.arange(0, ROWS)[:, None]
    return row * channels + channel[None, :], (row < last) & own[None, :]


@triton.jit
def _pooled(values, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each channel, the sum of its group's values: groups of any size, in any number."""
    group = tl.arange(0, COLUMNS) // SIZE
    return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0), 1)


@triton.jit
def _graded(dy, x, at, there, start, a, b, SILU: tl.constexpr):
    """A tile of d = x - start, and of the gradient of a * d + b; both without dropout."""
    d = tl.load(x + at, mask=there, other=0).to(tl.float32) - start
    dz = tl.load(dy + at, mask=there, other=0).to(tl.float32)
    if SILU:
        z = a * d + b
        s = tl.sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    return d, dz


@triton.jit
def _dropout(seed, pixel, pixels, GONE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """What a tile is multiplied by: 0 where 16 random bits are small.

    A call of Philox-4x32-7 (Salmon et al. 2011), counted by tile and by place in it, serves 8 channels.
    """
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tile = program * tl.cdiv(pixels, ROWS) + pixel // ROWS
    cell = tl.arange(0, ROWS)[:, None] * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed), tile * (ROWS * COLUMNS // 8) + cell, n_rounds=7)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    bits = tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, COLUMNS)
    return tl.where(bits >= GONE, 2**16 / (2**16 - GONE), 0)


PIXELS, WIDEST = 64, 64  # tile of `add` and `channel_sums`
SHARES = 256  # programs of `channel_sums` that share a batch's pixels


def add(h: Tensor, x: Tensor | None, bias: Tensor) -> Tensor:
    """h + x + bias. As `fused.add`."""
    y = torch.empty_like(h)
    columns, rows = h.shape[1], h.numel() // h.shape[1]
    tile = {"ROWS": PIXELS, "COLUMNS": min(WIDEST, triton.next_power_of_2(columns))}
    grid = triton.cdiv(rows, PIXELS), triton.cdiv(columns, tile["COLUMNS"])
    add_kernel[grid](h, x, bias, y, rows, columns, **tile, num_warps=8)
    return y


def channel_sums(x: Tensor) -> Tensor:
    """The sum over all but the channels. As `fused.channel_sums`."""
    columns, rows = x.shape[1], x.numel() // x.shape[1]
    tile = {"ROWS": PIXELS, "COLUMNS": min(WIDEST, triton.next_power_of_2(columns))}
    parts = min(SHARES, triton.cdiv(rows, PIXELS))
    sums = x.new_empty(parts, columns, dtype=torch.float32)
    sum_kernel[parts, triton.cdiv(columns, tile["COLUMNS"])](x, sums, rows, columns, **tile, num_warps=8)
    return sums.sum(0)


@triton.jit
def add_kernel(h, x, bias, y, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of y = h + x + bias."""
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = column < columns
    at, there = _rows(row, rows, column, columns, own, ROWS)
    total = tl.load(h + at, mask=there, other=0).to(tl.float32)
    total += tl.load(bias + column, mask=own, other=0).to(tl.float32)[None, :]
    if x is not None:
        total += tl.load(x + at, mask=there, other=0).to(tl.float32)
    tl.store(y + at, total, mask=there)


@triton.jit
def sum_kernel(x, sums, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of every column, the sum over a program's share of the rows."""
    part, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    own = column < columns
    share = tl.cdiv(tl.cdiv(rows, ROWS), tl.num_programs(0)) * ROWS
    row, last = part * share, tl.minimum((part + 1) * share, rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    while row < last:
        at, there = _rows(row, last, column, columns, own, ROWS)
        total += tl.load(x + at, mask=there, other=0).to(tl.float32)
        row += ROWS
    tl.store(sums + part * columns + column, tl.sum(total, 0), mask=own)


@triton.jit
def _rows(first, last, column, columns, own, ROWS: tl.constexpr):
    """Where the elements of a tile of a matrix lie, and which there are."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return row * columns + column[None, :], (row < last) & own[None, :]

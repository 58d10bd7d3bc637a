"""Augmentation on the training device, batched, each sample by numbers of its own.

Random numbers are made on the CPU as functions of (seed, epoch, sample) and copied over, so the same
samples get the same augmentation on any rank, batch and device. `mix_batch` pairs neighbouring rows: see there
how the pairs stay the same. Images are float32 (B, 3, H, W) in [0, 1]
until `normalise`. Definitions follow torchvision's ColorJitter and timm's Mixup and RandomErasing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import ConfigError
from stages.data.rng import Purpose, uniform_table

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's convert("L")


def draws(
    count: int, purpose: Purpose, seed: int, epoch: int, sample_ids: torch.Tensor | np.ndarray
) -> np.ndarray:
    """float64 (B, count) in [0, 1), a function of (purpose, seed, epoch, sample)."""
    ids = sample_ids.cpu().numpy() if isinstance(sample_ids, torch.Tensor) else sample_ids
    return uniform_table(count, seed, epoch, int(purpose), ids)


def to_float01(images_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, C) → float32 (B, C, H, W) in [0, 1], in channels-last memory."""
    return images_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255


def normalise(x_BCHW: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x - mean) / std per channel."""
    shape = (1, -1, 1, 1)
    mean_1C11 = torch.tensor(mean, dtype=x_BCHW.dtype, device=x_BCHW.device).view(shape)
    std_1C11 = torch.tensor(std, dtype=x_BCHW.dtype, device=x_BCHW.device).view(shape)
    return (x_BCHW - mean_1C11) / std_1C11


def flip(x_BCHW: torch.Tensor, draws_B: np.ndarray, probability: float = 0.5) -> torch.Tensor:
    """Mirror each image left to right where its draw is below `probability`."""
    chosen = torch.from_numpy(np.asarray(draws_B) < probability).to(x_BCHW.device)
    return torch.where(chosen.view(-1, 1, 1, 1), x_BCHW.flip(-1), x_BCHW)


def colour_jitter(
    x_BCHW: torch.Tensor, draws_B6: np.ndarray, *, brightness: float, contrast: float, saturation: float
) -> torch.Tensor:
    """Brightness, contrast and saturation by factors from U(max(0, 1 - v), 1 + v), in a random order per sample.

    Each is a blend `f x + (1 - f) other` with black, the mean grey, or the grey image, clamped to [0, 1].
    `draws_B6`: three numbers for the factors, three whose ranks are the order.
    """
    limits = np.array([brightness, contrast, saturation])
    if not limits.any():
        return x_BCHW
    low = np.maximum(0, 1 - limits)
    factors = low + draws_B6[:, :3] * (1 + limits - low)
    order = np.argsort(draws_B6[:, 3:6], axis=1, kind="stable")  # (B, 3): which operation comes k-th
    luma = torch.tensor(LUMA, dtype=x_BCHW.dtype, device=x_BCHW.device).view(1, 3, 1, 1)
    for k in range(3):
        operation = torch.from_numpy(order[:, k]).to(x_BCHW.device).view(-1, 1, 1, 1)
        factor = torch.from_numpy(np.take_along_axis(factors, order[:, k : k + 1], 1)[:, 0])
        factor = factor.to(x_BCHW.device, x_BCHW.dtype).view(-1, 1, 1, 1)
        grey = (x_BCHW * luma).sum(1, keepdim=True)
        other = torch.where(operation == 1, grey.mean((2, 3), keepdim=True), grey)
        other = torch.where(operation == 0, torch.zeros_like(other), other)
        x_BCHW = (factor * x_BCHW + (1 - factor) * other).clamp(0, 1)
    return x_BCHW


def resize_batch(x_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    """The same images at another size (the teacher's): bicubic with antialiasing, clamped to [0, 1]."""
    if x_BCHW.shape[-2:] == (size, size):
        return x_BCHW
    return functional.interpolate(x_BCHW, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def one_hot(labels_B: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """float32 (B, K): smoothing / K everywhere, 1 - smoothing more at the label."""
    off = smoothing / num_classes
    target = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    return target.scatter_(1, labels_B[:, None], 1 - smoothing + off)


def random_erasing(
    x_BCHW: torch.Tensor,
    draws_B: np.ndarray,
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> torch.Tensor:
    """Fill one rectangle of an image with normal noise (Zhong et al. 2017, timm's mode "pixel").

    Applied to normalised images. Of up to ten attempts the first rectangle that fits is taken; none
    fitting, the image stays. `draws_B`: (B, 24): probability, ten pairs for area and aspect, position, and
    the key of the noise.
    """
    B, C, H, W = x_BCHW.shape
    boxes = np.zeros((B, 4), np.int64)
    for row in np.flatnonzero(draws_B[:, 0] < probability):
        for attempt in range(10):
            share, tilt = draws_B[row, 1 + 2 * attempt : 3 + 2 * attempt]
            pixels = H * W * (area[0] + share * (area[1] - area[0]))
            ratio = np.exp(np.log(aspect[0]) + tilt * np.log(aspect[1] / aspect[0]))
            h, w = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
            if 0 < h < H and 0 < w < W:
                top, left = int(draws_B[row, 21] * (H - h + 1)), int(draws_B[row, 22] * (W - w + 1))
                boxes[row] = top, left, h, w
                break
    rows = np.flatnonzero(boxes[:, 2])
    if not len(rows):
        return x_BCHW
    device = x_BCHW.device
    top_B, left_B, h_B, w_B = torch.from_numpy(boxes[rows]).to(device).view(-1, 4, 1, 1).unbind(1)
    y, x = torch.arange(H, device=device).view(1, H, 1), torch.arange(W, device=device).view(1, 1, W)
    inside = (y >= top_B) & (y < top_B + h_B) & (x >= left_B) & (x < left_B + w_B)
    keys = torch.from_numpy((draws_B[rows, 23] * 2**52).astype(np.int64)).to(device)
    noise = hash_normal(keys, C * H * W).view(-1, C, H, W).to(x_BCHW.dtype)
    result = x_BCHW.clone()
    index = torch.from_numpy(rows).to(device)
    result[index] = torch.where(inside[:, None], noise, x_BCHW[index])
    return result


def mix_batch(
    x_BCHW: torch.Tensor,
    target_BK: torch.Tensor,
    draws_B: np.ndarray,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    switch_probability: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): each image with its neighbour, rows 2j and 2j + 1.

    A stream gives an even number of successive samples to each global batch and a micro-batch is even
    (`FinetuneConfig` demands both), so the pairs are the same for every number of ranks and every micro-batch.
    Every sample has its own share λ ~ Beta(α, α), its own rectangle and its own choice between the two (timm's
    mode "elem"). For CutMix λ is what remains of the image after the rectangle is clipped.
    `draws_B`: (B, 67): choice, centre of the rectangle, and 64 for λ. Raises ConfigError when B is odd.
    """
    if not mixup_alpha and not cutmix_alpha:
        return x_BCHW, target_BK
    if len(x_BCHW) % 2:
        raise ConfigError(
            f"mixup and cutmix cannot pair the {len(x_BCHW)} images of a batch",
            expected="an even number",
            remedy="an even engine.micro_batch",
        )
    partner_B = torch.arange(len(x_BCHW), device=x_BCHW.device) ^ 1
    H, W = x_BCHW.shape[-2:]
    cutting = np.full(len(draws_B), not mixup_alpha)
    if mixup_alpha and cutmix_alpha:
        cutting = draws_B[:, 0] < switch_probability
    share = np.where(
        cutting, beta(draws_B[:, 3:67], cutmix_alpha or 1), beta(draws_B[:, 3:67], mixup_alpha or 1)
    )
    half_h, half_w = (n * np.sqrt(1 - share) / 2 for n in (H, W))
    centre_y, centre_x = draws_B[:, 1] * H, draws_B[:, 2] * W
    top, bottom = np.rint(np.clip(centre_y - half_h, 0, H)), np.rint(np.clip(centre_y + half_h, 0, H))
    left, right = np.rint(np.clip(centre_x - half_w, 0, W)), np.rint(np.clip(centre_x + half_w, 0, W))
    share = np.where(cutting, 1 - (bottom - top) * (right - left) / (H * W), share)

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(x_BCHW.device).view(-1, 1, 1)

    y = torch.arange(H, device=x_BCHW.device).view(1, H, 1)
    x = torch.arange(W, device=x_BCHW.device).view(1, 1, W)
    inside = (y >= on_device(top)) & (y < on_device(bottom)) & (x >= on_device(left)) & (x < on_device(right))
    own = torch.where(on_device(cutting), (~inside).to(x_BCHW.dtype), on_device(share).to(x_BCHW.dtype))[
        :, None
    ]
    weight = on_device(share)[:, 0].to(target_BK.dtype)
    mixed_BCHW = own * x_BCHW + (1 - own) * x_BCHW[partner_B]
    return mixed_BCHW, weight * target_BK + (1 - weight) * target_BK[partner_B]


def beta(draws_BN: np.ndarray, alpha: float) -> np.ndarray:
    """float64 (B,): Beta(α, α) from pairs of uniform draws by Jöhnk's rejection (1964); N = 2 x tries.

    Each try succeeds with probability 1/2 or more for α <= 1; should all fail, the last is taken.
    """
    u, v = draws_BN[:, 0::2] ** (1 / alpha), draws_BN[:, 1::2] ** (1 / alpha)
    accepted = (u + v <= 1) & (u + v > 0)
    first = np.where(accepted.any(1), accepted.argmax(1), u.shape[1] - 1)
    rows = np.arange(len(u))
    u, v = u[rows, first], v[rows, first]
    return u / np.maximum(u + v, 1e-300)


def hash_normal(keys_B: torch.Tensor, count: int) -> torch.Tensor:
    """float32 (B, count) standard normal numbers from int64 keys, the same on every device up to rounding.

    SplitMix64 over (key, position) gives two 32-bit uniforms, Box-Muller one normal number.
    """
    state = keys_B[:, None] * -7046029254386353131 + torch.arange(count, device=keys_B.device)
    bits = _finalise(_finalise(state))
    u = ((bits >> 32) & 0xFFFFFFFF).to(torch.float32) * 2.0**-32
    v = (bits & 0xFFFFFFFF).to(torch.float32) * 2.0**-32
    return torch.sqrt(-2 * torch.log(u.clamp_min(2.0**-33))) * torch.cos(2 * torch.pi * v)


def _finalise(z: torch.Tensor) -> torch.Tensor:
    def shift(value: torch.Tensor, bits: int) -> torch.Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)  # logical; torch's >> keeps the sign

    z = (z ^ shift(z, 30)) * -4658895280553007687
    z = (z ^ shift(z, 27)) * -7723592293110705685
    return z ^ shift(z, 31)

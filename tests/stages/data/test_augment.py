"""Device-side augmentation against its definitions and against Pillow on real images."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cluster.errors import ConfigError
from stages.data import augment
from stages.data.augment import beta
from stages.data.rand_augment import DRAWS_PER_OPERATION, OPERATIONS, rand_augment
from stages.data.rng import Purpose
from stages.finetune.config import MixConfig
from tests.stages.data.test_decode import clipart  # noqa: F401 (a fixture)

IDS = np.arange(16)


def as_batch(images: list[Image.Image]) -> torch.Tensor:
    return augment.to_float01(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


def as_levels(x_BCHW: torch.Tensor) -> np.ndarray:
    return (x_BCHW * 255).round().permute(0, 2, 3, 1).numpy()


@pytest.fixture
def images(clipart: list[bytes]) -> list[Image.Image]:  # noqa: F811
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in clipart[:16]]


def test_draws_depend_on_the_sample_not_on_the_batch() -> None:
    whole = augment.draws(6, Purpose.COLOUR, 1, 2, IDS)
    part = augment.draws(6, Purpose.COLOUR, 1, 2, torch.from_numpy(IDS[5:8]))
    assert np.array_equal(whole[5:8], part)
    assert not np.array_equal(whole, augment.draws(6, Purpose.COLOUR, 1, 3, IDS))
    assert not np.array_equal(whole, augment.draws(6, Purpose.ERASE, 1, 2, IDS))
    assert whole.min() >= 0 and whole.max() < 1


def test_flip_mirrors_about_half_of_the_images(images: list[Image.Image]) -> None:
    x = as_batch(images)
    draws = augment.draws(1, Purpose.FLIP, 0, 0, IDS)[:, 0]
    flipped = augment.flip(x, draws)
    for row in range(16):
        expected = ImageOps.mirror(images[row]) if draws[row] < 0.5 else images[row]
        assert np.array_equal(as_levels(flipped)[row], np.asarray(expected))
    many = augment.draws(1, Purpose.FLIP, 0, 0, np.arange(10_000))
    assert abs((many < 0.5).mean() - 0.5) < 0.02


def test_normalise_is_the_definition() -> None:
    x = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    for c in range(3):
        assert torch.allclose(augment.normalise(x, mean, std)[:, c], (x[:, c] - mean[c]) / std[c])


def test_colour_jitter_equals_pillows_enhancers(images: list[Image.Image]) -> None:
    draws = augment.draws(6, Purpose.COLOUR, 3, 0, IDS)
    jittered = as_levels(
        augment.colour_jitter(as_batch(images), draws, brightness=0.4, contrast=0.4, saturation=0.4)
    )
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for row, image in enumerate(images):
        for operation in np.argsort(draws[row, 3:], kind="stable"):
            image = enhancers[operation](image).enhance(0.6 + 0.8 * draws[row, operation])
        # Pillow cuts to 8 bits after each of the three operations, and rounds the mean grey.
        difference = np.abs(jittered[row] - np.asarray(image).astype(float))
        assert difference.max() <= 4 and difference.mean() < 1.5


def test_colour_jitter_of_zero_changes_nothing(images: list[Image.Image]) -> None:
    x = as_batch(images)
    draws = augment.draws(6, Purpose.COLOUR, 3, 0, IDS)
    assert augment.colour_jitter(x, draws, brightness=0, contrast=0, saturation=0) is x


def test_the_teachers_resize_equals_pillow(images: list[Image.Image]) -> None:
    found = as_levels(augment.resize_batch(as_batch(images), 64))
    for row, image in enumerate(images):
        expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
        # Pillow cuts overshoot at hard edges after its horizontal pass; floats keep it until the end.
        difference = np.abs(found[row] - expected)
        assert difference.mean() < 0.3 and (difference <= 2).mean() > 0.99 and difference.max() <= 16


def test_smoothed_targets() -> None:
    target = augment.one_hot(torch.tensor([2, 0]), 4, smoothing=0.1)
    assert torch.allclose(target.sum(1), torch.ones(2))
    assert target[0].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])


def test_random_erasing_fills_one_rectangle_with_noise() -> None:
    ids = np.arange(400)
    x = torch.full((400, 3, 32, 32), 7.0)
    draws = augment.draws(24, Purpose.ERASE, 0, 0, ids)
    erased = augment.random_erasing(x, draws, probability=0.25)
    changed = (erased != 7).any(1)  # (B, H, W)
    hit = changed.flatten(1).any(1)
    assert abs(hit.float().mean() - 0.25) < 0.07
    for mask in changed[hit]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        h, w = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert mask.sum() == h * w  # solid
        assert 0.01 < h * w / 1024 < 0.4
    noise = erased[(erased != 7)]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    again = augment.random_erasing(x[100:200], draws[100:200], probability=0.25)
    assert torch.equal(again, erased[100:200])


def test_mixup_and_cutmix_keep_pixels_and_targets_in_step() -> None:
    ids = np.arange(64)
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 20, 30).contiguous()
    target = augment.one_hot(torch.arange(64), 64)
    draws = augment.draws(67, Purpose.MIX, 0, 0, ids)
    for options, share_of_cut in (
        ({"mixup_alpha": 0.8}, 0.0),
        ({"cutmix_alpha": 1.0}, 1.0),
        ({"mixup_alpha": 0.8, "cutmix_alpha": 1.0}, 0.5),
    ):
        mixed, mixed_target = augment.mix_batch(x, target, draws, **options)
        assert torch.allclose(mixed_target.sum(1), torch.ones(64))
        # The image's mean brightness tells how much of each partner is in it; so must the target.
        expected = (mixed_target * torch.arange(64.0)).sum(1)
        assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-3)
        cut = torch.tensor([len(image.unique()) == 2 for image in mixed])
        assert abs(cut.float().mean() - share_of_cut) < 0.25
    assert augment.mix_batch(x, target, draws)[0] is x


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_beta_draws_have_the_moments_of_beta(alpha: float) -> None:
    draws = augment.draws(64, Purpose.MIX, 0, 0, np.arange(20_000))
    sample = augment.beta(draws, alpha)
    assert abs(sample.mean() - 0.5) < 0.01
    assert abs(sample.var() - 1 / (4 * (2 * alpha + 1))) < 0.005


def test_noise_is_standard_normal_and_pinned() -> None:
    noise = augment.hash_normal(torch.arange(50), 4000)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.06
    assert torch.equal(noise, augment.hash_normal(torch.arange(50), 4000))


def _draws_for(name: str, level: float, count: int) -> np.ndarray:
    """Draws that pick operation `name` once, at about `level` (-1…1), and no second operation."""
    index = list(OPERATIONS).index(name)
    draws = np.zeros((count, 2 * DRAWS_PER_OPERATION))
    draws[:, 0] = (index + 0.5) / len(OPERATIONS)
    draws[:, 3] = 0.25  # cos(pi / 2): the magnitude is the mean
    draws[:, 4] = 0.9 if level > 0 else 0.1
    draws[:, DRAWS_PER_OPERATION + 1] = 0.99  # the second operation is left out
    return draws


FILL = (0.2, 0.4, 0.6)
PIL_FILL = (51, 102, 153)


def _affine(image: Image.Image, *data: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, data, resample=Image.Resampling.BICUBIC, fillcolor=PIL_FILL
    )


LEVEL = 0.9
PILLOW = {
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": lambda i: ImageOps.posterize(i, 4 - int(LEVEL * 4)),
    "solarize": lambda i: ImageOps.solarize(i, 256 - int(LEVEL * 256)),
    "colour": lambda i: ImageEnhance.Color(i).enhance(1 + 0.9 * LEVEL),
    "contrast": lambda i: ImageEnhance.Contrast(i).enhance(1 + 0.9 * LEVEL),
    "brightness": lambda i: ImageEnhance.Brightness(i).enhance(1 + 0.9 * LEVEL),
    "sharpness": lambda i: ImageEnhance.Sharpness(i).enhance(1 + 0.9 * LEVEL),
    "solarize_add": lambda i: i.point(
        [min(255, v + int(LEVEL * 110)) if v < 128 else v for v in range(256)] * 3
    ),
}


@pytest.mark.parametrize("name", PILLOW)
def test_pixel_operations_equal_pillow(name: str, images: list[Image.Image]) -> None:
    found = as_levels(rand_augment(as_batch(images), _draws_for(name, LEVEL, 16), fill=FILL))
    for row, image in enumerate(images):
        expected = np.asarray(PILLOW[name](image)).astype(float)
        difference = np.abs(found[row] - expected)
        assert difference.max() <= 2, f"{name}: {difference.max()}"


GEOMETRY = {
    "rotate": lambda i, s: i.rotate(s * 30 * LEVEL, Image.Resampling.BICUBIC, fillcolor=PIL_FILL),
    "shear_x": lambda i, s: _affine(i, 1, s * 0.3 * LEVEL, 0, 0, 1, 0),
    "shear_y": lambda i, s: _affine(i, 1, 0, 0, s * 0.3 * LEVEL, 1, 0),
    "translate_x": lambda i, s: _affine(i, 1, 0, s * 0.45 * LEVEL * i.width, 0, 1, 0),
    "translate_y": lambda i, s: _affine(i, 1, 0, 0, 0, 1, s * 0.45 * LEVEL * i.height),
}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operations_move_pixels_where_pillow_does(
    name: str, sign: int, images: list[Image.Image]
) -> None:
    """Smoothed first: torch's bicubic kernel is sharper than Pillow's (a = -0.75, not -0.5)."""
    smooth = [image.filter(ImageFilter.GaussianBlur(2)) for image in images]
    found = as_levels(rand_augment(as_batch(smooth), _draws_for(name, sign, 16), fill=FILL))
    for row, image in enumerate(smooth):
        expected = np.asarray(GEOMETRY[name](image, sign)).astype(float)
        difference = np.abs(found[row] - expected)
        inner = difference[2:-2, 2:-2]
        # At the border of the moved picture the two blend the fill colour over different widths.
        assert np.quantile(inner, 0.9) <= 3 and inner.mean() < 2.5, f"{name}: {inner.mean()}"


def test_rand_augment_depends_on_the_sample_alone(images: list[Image.Image]) -> None:
    x = as_batch(images)
    draws = augment.draws(2 * DRAWS_PER_OPERATION, Purpose.RAND_AUGMENT, 0, 0, IDS)
    whole = rand_augment(x, draws)
    assert torch.allclose(rand_augment(x[3:9], draws[3:9]), whole[3:9], atol=1e-6)
    assert whole.shape == x.shape and whole.min() >= 0 and whole.max() <= 1
    assert not torch.equal(whole, x)


def test_rand_augment_takes_each_operation_equally_often() -> None:
    draws = augment.draws(2 * DRAWS_PER_OPERATION, Purpose.RAND_AUGMENT, 0, 0, np.arange(15_000))
    counts = np.bincount((draws[:, 0] * len(OPERATIONS)).astype(int))
    assert len(counts) == 15 and counts.min() > 850 and counts.max() < 1150
    assert math.isclose((draws[:, 1] < 0.5).mean(), 0.5, abs_tol=0.02)


@pytest.mark.parametrize("field", ["mixup", "cutmix"])
def test_shares_whose_sampler_would_not_be_exact_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        MixConfig.parse({field: 4.0})


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_shares_have_the_spread_of_their_beta_distribution(alpha: float) -> None:
    shares = beta(np.random.default_rng(0).random((20_000, 64)), alpha)
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.std() == pytest.approx((4 * (2 * alpha + 1)) ** -0.5, rel=0.02)

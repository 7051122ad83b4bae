# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from diffusers_hart.evaluation import CodebookStatistics, psnr, reconstruct, ssim
from diffusers_hart.random_pipeline import random_pipeline


def pictures(count=3, side=32, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_that_of_each_picture():
    images = pictures()
    noisy = images + torch.tensor([0.1, 0.2, 0.4])[:, None, None, None]
    expected = [10 * math.log10(4 / error**2) for error in (0.1, 0.2, 0.4)]
    assert psnr(noisy, images).tolist() == pytest.approx(expected, rel=1e-4)


def test_ssim_is_that_of_each_picture():
    images = pictures()
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    # Without any structure only brightness counts, from black on: (2ab + c) / (a^2 + b^2 + c)
    flat = [torch.full((2, 3, 32, 32), level * 2 - 1) for level in (0.25, 0.5)]
    assert ssim(*flat).tolist() == pytest.approx([(0.25 + 1e-4) / (0.3125 + 1e-4)] * 2, rel=1e-4)
    assert ssim(images, -images).max() < 0


def test_both_paths_are_those_of_generation():
    vae = random_pipeline().vae
    images = pictures(2, 128)
    with torch.no_grad():
        discrete, hybrid, codes = reconstruct(vae, images, vae.config.scales)
        encoded = vae.encode(images)
        torch.testing.assert_close(discrete, vae.decode(vae.latents_from_codes(codes)[-1]).sample, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            hybrid, vae.decode(encoded.partial_latents[-1] + encoded.residual).sample, atol=1e-3, rtol=0
        )
    assert not torch.allclose(discrete, hybrid, atol=1e-2)


def test_low_precision_gives_float32_pictures():
    vae = random_pipeline().vae.to(torch.bfloat16)
    discrete, hybrid, _ = reconstruct(vae, pictures(1, 128), vae.config.scales)
    assert discrete.dtype == hybrid.dtype == torch.float32


def test_codebook_statistics():
    statistics = CodebookStatistics(8, (1, 2))
    statistics.update(torch.tensor([[0, 1, 1, 2, 2], [0, 1, 1, 2, 2]]))
    statistics.update(torch.tensor([[3, 4, 4, 5, 5]]))
    first, second = statistics.report()
    assert (first["side"], first["tokens"], first["used"]) == (1, 3, 2 / 8)
    assert first["perplexity"] == pytest.approx(math.exp(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3))
    assert (second["side"], second["tokens"], second["used"]) == (2, 12, 4 / 8)
    assert second["perplexity"] == pytest.approx(math.exp(-(2 * math.log(1 / 3) + math.log(1 / 6)) / 3))

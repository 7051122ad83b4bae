# SPDX-License-Identifier: Apache-2.0
import torch

from diffusers_hart import HARTResidualScheduler
from diffusers_hart.training import residual_diffusion_loss, vector_quantization_loss


@torch.no_grad()
def test_residual_diffusion_loss(model, assert_close):
    mse, variational = residual_diffusion_loss(
        model.pipe.residual_mlp,
        HARTResidualScheduler(),
        model["difftrain.x0"],
        model["mlp.condition"],
        model["mlp.timestep"],
        model["difftrain.noise"],
    )
    assert_close(mse, model["difftrain.mse"])
    assert_close(variational, model["difftrain.vb"])
    assert_close(mse + variational, model["difftrain.loss"])


def test_the_variational_term_does_not_train_the_mean(tiny):
    predicted = torch.zeros(6, 16, requires_grad=True)

    class Constant(torch.nn.Module):
        def forward(self, sample, timestep, condition):
            return type("Output", (), {"sample": predicted})

    arguments = (tiny["difftrain.x0"], tiny["mlp.condition"], tiny["mlp.timestep"], tiny["difftrain.noise"])
    mse, variational = residual_diffusion_loss(Constant(), HARTResidualScheduler(), *arguments)
    (mean_gradient,) = torch.autograd.grad(variational.sum(), predicted, retain_graph=True)
    assert mean_gradient[:, :8].abs().max() == 0 and mean_gradient[:, 8:].abs().max() > 0
    (noise_gradient,) = torch.autograd.grad(mse.sum(), predicted)
    assert noise_gradient[:, :8].abs().max() > 0 and noise_gradient[:, 8:].abs().max() == 0


@torch.no_grad()
def test_vector_quantization_loss(model, assert_close):
    latents = model["tok.latent"]
    _, partial_latents, _ = model.pipe.vae.quantize(latents, phi_at_last_scale=True)
    assert_close(vector_quantization_loss(latents, partial_latents)[None], model["tok.vq_loss"])

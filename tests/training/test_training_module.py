# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_hart import HARTTransformer2DModel
from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.training import (
    HARTTrainingModule,
    initialize_residual_mlp,
    initialize_transformer,
    teacher_forcing_targets,
)


SCALES = (1, 2, 3, 4, 6, 8)
LOSSES = ("loss", "code_loss", "residual_mse", "residual_variational", "code_accuracy")


def make_module(pipe, scales=SCALES, **options):
    return HARTTrainingModule(
        pipe.transformer, pipe.residual_mlp, pipe.vae, pipe.scheduler, pipe.residual_scheduler, scales, **options
    )


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def batch(pipe):
    """The targets and the text of four pictures."""
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt(
            ["a", "two words", "a longer caption than the others", ""], do_classifier_free_guidance=False
        )
    targets = teacher_forcing_targets(pipe.vae, SCALES, images=images)
    return targets, {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def part_of(batch, rows):
    targets, text = batch
    fields = {field.name: getattr(targets, field.name)[rows] for field in dataclasses.fields(targets)}
    return type(targets)(**fields), {name: tensor[rows] for name, tensor in text.items()}


def test_targets_of_pictures_are_the_golden_ones(model, assert_close):
    targets = teacher_forcing_targets(model.pipe.vae, model.scales, images=model["tok.image"])
    assert_close(targets.scale_inputs, model["tok.scale_inputs"])
    assert_close(targets.last_scale, model["tok.last_scale_target"])
    assert torch.equal(targets.codes, model["tok.indices"])


def test_targets_of_latents_and_codes_are_those_of_pictures(pipe, batch):
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = pipe.vae.encode(images, SCALES)
    targets, text = batch
    again = teacher_forcing_targets(pipe.vae, SCALES, latents=encoded.latents, codes=encoded.codes.int())
    assert torch.equal(again.codes, targets.codes)
    torch.testing.assert_close(again.scale_inputs, targets.scale_inputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.last_scale, targets.last_scale, rtol=0, atol=1e-5)
    module = make_module(pipe)
    with torch.no_grad():
        losses = [module(forced, 0, range(4), **text)["loss"] for forced in (targets, again)]
    torch.testing.assert_close(*losses)


class Recorder(HARTTrainingModule):
    """Keeps what the residual MLP is trained on."""

    def residual_loss(self, residual, condition, positions):
        self.residual, self.condition = residual, condition
        return super().residual_loss(residual, condition, positions)


@torch.no_grad()
def test_a_step_of_the_golden_model(model, assert_close):
    pipe = model.pipe
    module = Recorder(
        pipe.transformer,
        pipe.residual_mlp,
        pipe.vae,
        pipe.scheduler,
        pipe.residual_scheduler,
        model.scales,
        token_drop=False,
        condition_dropout=0.0,
        sample_top_k=1,
    )
    targets = teacher_forcing_targets(pipe.vae, model.scales, images=model["tok.image"])
    text = {name: model[f"in.{name}"] for name in ("prompt_embeds", "prompt_attention_mask")}
    losses = module(targets, 0, [0, 1], **text)
    logits, codes = model["tf.logits"], model["tok.indices"]
    torch.testing.assert_close(losses["code_loss"], F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    torch.testing.assert_close(losses["code_accuracy"], (logits.argmax(-1) == codes).float().mean())
    assert_close(module.residual * 0.6, model["tf.residual_target"])
    assert_close(module.condition, model["tf.residual_condition"])


@torch.no_grad()
def test_the_loss_is_the_sum_of_its_parts(pipe, batch):
    targets, text = batch
    for weight in (1.0, 0.25):
        losses = make_module(pipe, residual_loss_weight=weight)(targets, 0, range(4), **text)
        assert set(losses) == set(LOSSES) and all(value.shape == () for value in losses.values())
        residual = losses["residual_mse"] + losses["residual_variational"]
        torch.testing.assert_close(losses["loss"], losses["code_loss"] + weight * residual)


def test_first_scales_alone(pipe, batch):
    """The code loss is that of a whole step over these scales, and what the residual alone uses gets no gradient."""
    source = copy.deepcopy(pipe)
    initialize_transformer(source.transformer, torch.Generator().manual_seed(0))
    targets, text = batch
    module = make_module(source, num_scales=3, condition_dropout=0.0)
    losses = module(targets, 0, range(4), **text)
    assert set(losses) == {"loss", "code_loss", "code_accuracy"}
    assert module.num_kept_tokens(0) == 64
    with torch.no_grad():
        mask = text["prompt_attention_mask"]
        logits = source.transformer(targets.scale_inputs, SCALES, text["prompt_embeds"], mask).logits
        expected = F.cross_entropy(logits[:, :14].flatten(0, 1), targets.codes[:, :14].flatten())
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    without = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert without == {
        n for n, _ in module.named_parameters() if n.startswith(("residual_mlp", "transformer.residual"))
    }


@torch.no_grad()
def test_draws_do_not_depend_on_the_batch(pipe, batch):
    module = make_module(pipe, condition_dropout=0.5)
    targets, text = batch
    positions = [40, 41, 42, 43]
    whole = module(targets, 3, positions, **text)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        half_targets, half_text = part_of(batch, rows)
        halves.append(module(half_targets, 3, positions[rows], **half_text))
    for name in LOSSES:
        torch.testing.assert_close(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-5, atol=1e-6)
    again = module(targets, 3, positions, **text)
    others = [module(targets, 3, [50, 51, 52, 53], **text), make_module(pipe, seed=1)(targets, 3, positions, **text)]
    assert torch.equal(again["loss"], whole["loss"])
    assert all(other["loss"] != whole["loss"] for other in others)


def test_a_dropped_caption_is_the_unconditional_branch_of_generation(pipe, batch):
    _, text = batch
    with torch.no_grad():
        _, _, embeds, mask = pipe.encode_prompt(None, **text)
    dropped = make_module(pipe, condition_dropout=1.0).drop_condition(**text, class_labels=None, positions=range(4))
    assert torch.equal(dropped["encoder_hidden_states"], embeds) and not embeds.any()
    assert torch.equal(dropped["encoder_attention_mask"], mask)
    assert mask.tolist() == [[1] + [0] * 127] * 4
    kept = make_module(pipe, condition_dropout=0.0).drop_condition(**text, class_labels=None, positions=range(4))
    assert torch.equal(kept["encoder_hidden_states"], text["prompt_embeds"])
    assert torch.equal(kept["encoder_attention_mask"], text["prompt_attention_mask"])


def test_how_many_captions_are_dropped(pipe):
    count = 5000
    text = {"prompt_embeds": torch.ones(count, 2, 4), "prompt_attention_mask": torch.ones(count, 2, dtype=torch.long)}
    condition = make_module(pipe).drop_condition(**text, class_labels=None, positions=range(count))
    is_dropped = condition["encoder_hidden_states"].sum(dim=(1, 2)) == 0
    assert is_dropped.float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert torch.equal(is_dropped, condition["encoder_attention_mask"].sum(-1) == 1)
    assert text["prompt_embeds"].min() == 1  # the caller's tensors are left as they were


def class_transformer(pipe):
    transformer = HARTTransformer2DModel(
        in_channels=8,
        codebook_size=512,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        caption_channels=None,
        num_classes=3,
        sample_size=8,
    )
    initialize_transformer(transformer, torch.Generator().manual_seed(0))
    return transformer


def test_dropped_labels_are_the_class_of_no_class(pipe):
    source = copy.copy(pipe)
    source.transformer = class_transformer(pipe)
    labels = torch.arange(3).repeat(1000)
    condition = make_module(source).drop_condition(None, None, labels, range(3000))
    is_dropped = condition["class_labels"] == 3
    assert is_dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(condition["class_labels"][~is_dropped], labels[~is_dropped])


@torch.no_grad()
def test_codes_under_the_residual_are_drawn_from_the_best(pipe):
    module = make_module(pipe, sample_top_k=3, sample_top_p=1.0)
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).expand(400, 10, 5)
    codes = module.sample_codes(logits, range(400))
    expected = torch.tensor([4.0, 3.0, 2.0]).softmax(-1)
    frequencies = torch.bincount(codes.flatten(), minlength=5) / codes.numel()
    assert frequencies[3:].sum() == 0
    assert (frequencies[:3] - expected).abs().max() < 0.03
    assert torch.equal(codes[7:9], module.sample_codes(logits[:2], [7, 8]))


@pytest.mark.parametrize("kind", ["text", "class"])
def test_gradients_reach_what_is_trained_and_nothing_else(kind, batch):
    pipe = random_pipeline()
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    condition = batch[1]
    if kind == "class":
        pipe.transformer = class_transformer(pipe)
        condition = {"class_labels": torch.tensor([0, 1, 2, 0])}
    initialize_transformer(pipe.transformer, torch.Generator().manual_seed(0))
    initialize_residual_mlp(pipe.residual_mlp, torch.Generator().manual_seed(1))
    module = make_module(pipe)
    trained = {*pipe.transformer.parameters(), *pipe.residual_mlp.parameters()}
    assert set(module.parameters()) == trained
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(3):  # until layers that start at zero let gradients through
        optimizer.zero_grad()
        module(batch[0], step, range(4 * step, 4 * step + 4), **condition)["loss"].backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    frozen = [*pipe.vae.parameters(), *pipe.text_encoder.parameters()]
    assert all(parameter.grad is None for parameter in frozen)
    assert module.codebook.grad is None and not module.codebook.requires_grad


@torch.no_grad()
def test_mistakes_are_made_up_for_by_the_scales_behind_them(pipe, batch):
    sizes = [side * side for side in SCALES]
    mistakes = torch.full_like(batch[0].codes, -1)
    mistakes[:, 1:5] = (batch[0].codes[:, 1:5] + 1) % 512  # the second scale, all of it
    targets = teacher_forcing_targets(pipe.vae, SCALES, latents=batch[0].latents, mistakes=mistakes)
    assert torch.equal(targets.codes[:, :5], batch[0].codes[:, :5])  # what is right there stays so
    assert not torch.equal(targets.codes[:, 5:], batch[0].codes[:, 5:])
    used = torch.where(mistakes < 0, targets.codes, mistakes)
    partial_latents = pipe.vae.latents_from_codes(used, SCALES)
    torch.testing.assert_close(targets.scale_inputs, pipe.vae.scale_inputs(partial_latents, SCALES))
    rest = (batch[0].latents - partial_latents[-2]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(targets.last_scale, rest)
    # Each scale has the codes that are nearest to what those before it left.
    third = slice(sum(sizes[:2]), sum(sizes[:3]))
    pooled = F.interpolate(batch[0].latents - partial_latents[1], size=(3, 3), mode="area").flatten(2).transpose(1, 2)
    assert torch.equal(targets.codes[:, third], torch.cdist(pooled, pipe.vae.codebook.weight[None]).argmin(-1))


def test_self_correction_of_the_first_scales_alone_is_refused(pipe):
    with pytest.raises(ValueError, match="`num_scales`=3.*goes without `self_correction`=0.4"):
        make_module(pipe, num_scales=3, self_correction=0.4)


@torch.no_grad()
def test_self_correction_draws_some_tokens_before_the_last_scale(pipe, batch):
    targets, text = batch
    module = make_module(pipe, self_correction=0.6, seed=3)
    condition = module.drop_condition(**text, class_labels=None, positions=range(4))
    mistakes = module.draw_mistakes(targets, condition, range(4))
    drawn = (mistakes >= 0)[:, : -(SCALES[-1] ** 2)].float().mean(1)
    assert (mistakes[:, -(SCALES[-1] ** 2) :] == -1).all()
    assert 0 <= drawn.min() < drawn.max() < 0.75
    few = {name: tensor[2:3] for name, tensor in condition.items()}
    assert torch.equal(module.draw_mistakes(part_of(batch, slice(2, 3))[0], few, [2]), mistakes[2:3])
    # All are drawn: inputs are no longer the picture's own.
    losses = [make_module(pipe, self_correction=share)(targets, 0, range(4), **text) for share in (0.0, 1.0)]
    assert losses[0]["code_loss"] != losses[1]["code_loss"]


def test_self_correction_leaves_gradients_under_autocast(pipe, batch):
    """What is cast without gradients, for the draw, must not be what the loss is computed with."""
    source = copy.deepcopy(pipe)
    initialize_transformer(source.transformer, torch.Generator().manual_seed(0))
    module = make_module(source, self_correction=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(batch[0], 0, range(4), **batch[1])["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in source.transformer.parameters())


def test_an_untrained_model_knows_nothing(pipe, batch):
    source = copy.deepcopy(pipe)
    initialize_transformer(source.transformer, torch.Generator().manual_seed(0))
    initialize_residual_mlp(source.residual_mlp, torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = make_module(source, residual_batch_multiplier=16)(batch[0], 0, range(4), **batch[1])
    assert losses["code_loss"].item() == pytest.approx(math.log(512), abs=0.1)
    assert losses["residual_mse"].item() == pytest.approx(1, abs=0.05)


def test_gradient_checkpointing_changes_no_gradient(pipe, batch):
    gradients = []
    for checkpointing in (False, True):
        source = copy.deepcopy(pipe)
        if checkpointing:
            source.transformer.enable_gradient_checkpointing()
            source.residual_mlp.enable_gradient_checkpointing()
        module = make_module(source)
        module(batch[0], 0, range(4), **batch[1])["loss"].backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_weights_that_are_no_numbers_show_in_the_loss(pipe, batch):
    source = copy.deepcopy(pipe)
    source.transformer.proj_out.bias.fill_(float("nan"))
    assert make_module(source)(batch[0], 0, range(4), **batch[1])["loss"].isnan()


def test_a_checkpoint_holds_the_trained_weights_alone(pipe):
    names = make_module(pipe).state_dict()
    assert all(name.split(".")[0] in ("transformer", "residual_mlp") for name in names)

# SPDX-License-Identifier: Apache-2.0
import pytest

from diffusers_hart.evaluation import parse_variations


BASE = {
    "guidance_scale": 4.5,
    "num_inference_steps": 8,
    "top_k": None,
    "top_p": None,
    "smooth": True,
    "residual_temperature": 1.0,
    "residual_scheduler": "HARTResidualScheduler",
}


def test_one_setting_at_a_time_and_the_base_once():
    variations = parse_variations(BASE, ["guidance_scale=0,4.5", "smooth=true,false", "top_k=10"])
    assert variations == {
        "base": BASE,
        "guidance_scale=0": BASE | {"guidance_scale": 0.0},
        "smooth=false": BASE | {"smooth": False},
        "top_k=10": BASE | {"top_k": 10},
    }


def test_every_combination_of_joined_settings():
    sweep = "residual_scheduler=HARTResidualScheduler,DDIMScheduler x num_inference_steps=4,8"
    variations = parse_variations(BASE, [sweep, "num_inference_steps=4"])
    assert variations == {
        "base": BASE,
        "residual_scheduler=HARTResidualScheduler num_inference_steps=4": BASE | {"num_inference_steps": 4},
        "residual_scheduler=DDIMScheduler num_inference_steps=4": BASE
        | {"residual_scheduler": "DDIMScheduler", "num_inference_steps": 4},
        "residual_scheduler=DDIMScheduler num_inference_steps=8": BASE | {"residual_scheduler": "DDIMScheduler"},
    }


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            "steps=1",
            "--vary steps=1: expected name=value,value,... with a name of guidance_scale, num_inference_steps",
        ),
        ("smooth", "--vary smooth: expected name=value"),
        ("smooth=yes", "'yes' is no value of smooth: must be true or false"),
        ("residual_scheduler=DDIM", "'DDIM' is no value of residual_scheduler: must be the class of a scheduler"),
        ("residual_scheduler=HARTScheduler", "'HARTScheduler' is no value of residual_scheduler"),
        ("smooth=true x steps=1", "--vary smooth=true x steps=1: expected name=value"),
        ("num_inference_steps=8,x", "'x' is no value of num_inference_steps"),
    ],
)
def test_sweeps_that_cannot_be_understood(sweep, message):
    with pytest.raises(ValueError, match=message):
        parse_variations(BASE, [sweep])

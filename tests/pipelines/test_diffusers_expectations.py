# SPDX-License-Identifier: Apache-2.0
"""
What diffusers' own tests take for granted of a pipeline, where no other file of this folder holds it: how
`encode_prompt` is written, what arguments and components are called, and that components may be missing.
"""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
import torch

import diffusers_hart
from diffusers_hart import HARTClassConditionalPipeline, HARTPipeline
from diffusers_hart.random_pipeline import random_pipeline


PIPELINES = [HARTPipeline, HARTClassConditionalPipeline]


def test_encode_prompt_returns_once_and_by_the_names_of_arguments():
    function = ast.parse(textwrap.dedent(inspect.getsource(HARTPipeline.encode_prompt))).body[0]
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    nested = [node for node in ast.walk(function) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    assert len(returns) == 1 and nested == [function]
    names = [name.id for name in returns[0].value.elts]
    assert set(names) <= set(inspect.signature(HARTPipeline.__call__).parameters)
    assert len(names) == 4


def test_arguments_of_encode_prompt_are_those_of_the_call():
    own = {"self", "device", "do_classifier_free_guidance", "lora_scale"}
    arguments = set(inspect.signature(HARTPipeline.encode_prompt).parameters)
    assert arguments - own <= set(inspect.signature(HARTPipeline.__call__).parameters)


@pytest.mark.parametrize("pipeline_class", PIPELINES)
def test_names(pipeline_class):
    arguments = inspect.signature(pipeline_class.__call__).parameters
    required = {
        "latents",
        "num_inference_steps",
        "generator",
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "attention_kwargs",
    }
    assert required <= set(arguments)
    assert "latents" in pipeline_class._callback_tensor_inputs
    components = set(inspect.signature(pipeline_class.__init__).parameters)
    assert {"transformer", "vae"} <= components
    assert set(pipeline_class.model_cpu_offload_seq.split("->")) <= components
    assert set(pipeline_class._optional_components) <= components
    # Whatever is called a tokenizer is taken for one of texts.
    assert {name for name in components if "tokenizer" in name} <= {"tokenizer"}


@pytest.mark.parametrize("missing", ["tokenizer", "text_encoder", "transformer", "vae", "scheduler"])
def test_a_component_may_be_missing_until_it_is_needed(missing, tmp_path):
    pipe = HARTPipeline(**{**random_pipeline().components, missing: None})
    pipe.to(torch.float64).to("cpu", torch.float32)
    assert pipe.device == torch.device("cpu") and pipe.vae_scale_factor == 16
    pipe.save_pretrained(tmp_path)
    assert getattr(HARTPipeline.from_pretrained(tmp_path, **{missing: None}), missing) is None


def test_methods_that_use_weights_trigger_offloading():
    """Methods other than `forward` that the pipeline calls, and that read weights, are decorated so."""
    pipe = random_pipeline()
    calls = []

    class Hook:
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    latents, embeds = torch.zeros(1, 8, 8, 8), torch.zeros(1, 64, 8)
    for model in (pipe.vae, pipe.transformer):
        model._hf_hook = Hook()
    pipe.vae.encode(torch.zeros(1, 3, 128, 128))
    pipe.vae.quantize(latents)
    pipe.vae.embed(torch.zeros(1, 1, dtype=torch.long))
    pipe.vae.accumulate(latents, embeds, 5)
    pipe.vae.latents_from_codes(torch.zeros(1, 130, dtype=torch.long))
    pipe.vae.decode(latents)
    pipe.transformer.residual_condition(torch.zeros(1, 64, 64), embeds)
    assert calls.count(pipe.transformer) == 1 and calls.count(pipe.vae) >= 6


@pytest.mark.parametrize("folder", ["models", "pipelines", "schedulers", "loaders"])
def test_nothing_is_of_one_kind_of_device(folder):
    """No call for CUDA alone, and no float64 on the device, which MPS has not."""
    files = list((Path(diffusers_hart.__file__).parent / folder).rglob("*.py"))
    names = {
        (path.name, node.attr)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "double", "float64")
    }
    assert files and names <= {("fast_path.py", "cuda")}  # which records CUDA graphs, on CUDA devices alone

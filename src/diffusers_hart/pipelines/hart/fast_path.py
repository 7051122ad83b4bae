# SPDX-License-Identifier: Apache-2.0
"""
Compiled blocks and CUDA graphs of a pipeline. What is recorded is the plain pipeline's own calls, scale by scale, so
that there is one implementation: a run of the fast path takes the place of the transformer and the residual MLP in the
loop over scales and records each call the first time it is made.
"""

import copy
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
from diffusers.models.attention import AttentionModuleMixin
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from ...models.residual_diffusion_mlp import ResidualDiffusionMLPOutput
from ...models.transformers.transformer_hart import HARTKVCache, HARTTransformer2DModelOutput


logger = logging.get_logger(__name__)


def run_block(block: nn.Module, *arguments) -> torch.Tensor:
    return block(*arguments)


def run_residual_mlp(
    residual_mlp: nn.Module, tokens: torch.Tensor, timestep: torch.Tensor, condition_embeds: torch.Tensor
) -> torch.Tensor:
    return residual_mlp(tokens, timestep, condition_embeds=condition_embeds, return_dict=False)[0]


def run_decoder(post_quant_conv: nn.Module, decoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    return decoder(post_quant_conv(latents)).clamp(-1, 1)


def counted_alone(function: Callable, label: str) -> Callable:
    """
    A copy of `function` with code of its own. Dynamo counts recompilations by code object and gives up at the eighth;
    with one copy for each shape there are none to count.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{label}")
    return types.FunctionType(code, function.__globals__, code.co_name)


def state_of(model: nn.Module) -> tuple:
    """
    What a recorded call of `model` depends on beside the values of its weights: where these lie, the attention backends
    and the adapters. If it has changed the record is of no use.
    """
    state = []
    for module in model.modules():
        state += [address(parameter) for parameter in module._parameters.values() if parameter is not None]
        has_adapters, is_attention = kind_of(type(module))
        if has_adapters:
            scaling = [value for value in getattr(module, "scaling", {}).values() if isinstance(value, float | int)]
            state.append((*module.active_adapters, *scaling, *module.merged_adapters, module.disable_adapters))
        elif is_attention:
            state.append((type(module.processor), getattr(module.processor, "_attention_backend", None)))
    return tuple(state)


@cache
def kind_of(module_class: type[nn.Module]) -> tuple[bool, bool]:
    """Whether it has adapters, and whether it is attention."""
    return issubclass(module_class, BaseTunerLayer), issubclass(module_class, AttentionModuleMixin)


def address(parameter: torch.Tensor) -> int:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # a quantized tensor, which is several
        return id(parameter)


def is_offloaded(*models: nn.Module | None) -> bool:
    return any(
        hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
        for model in models
        if model is not None
        for module in model.modules()
    )


@contextmanager
def measured_convolutions() -> Iterator[None]:
    """Where cuDNN tries its algorithms on each new shape and keeps the fastest, instead of guessing."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class PlainRun:
    """One picture drawn by the models as they are."""

    def __init__(self, transformer: nn.Module, residual_mlp: nn.Module | None):
        self.transformer = transformer
        self.residual_mlp = residual_mlp
        self.kv_cache = HARTKVCache()

    def draw(self, function: Callable, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
        return function(*arguments)


class RecordedCall:
    """
    The kernels of `function(**tensors)` as a CUDA graph. A call copies its tensors (or numbers) to where the graph
    reads them and gives the tensors that the graph writes: the same ones each time. Those of `in_place`, which another
    graph writes, are read where they are.
    """

    def __init__(
        self,
        function: Callable,
        inputs: dict[str, Any],
        stream: torch.cuda.Stream,
        pool: Any,
        in_place: Collection[str] = (),
    ):
        self.inputs = {}
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                value = torch.full((), float(value), device=stream.device)
            elif name not in in_place:
                value = value.clone()
            self.inputs[name] = value
        # Compiling, planning and allocating what stays happens before, on a stream of its own as graphs demand.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(**self.inputs)
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(stream.device), capture:
            self.output = function(**self.inputs)

    def __call__(self, **inputs) -> Any:
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor):
                self.inputs[name].fill_(value)
            elif value is not self.inputs[name]:
                self.inputs[name].copy_(value)
        self.graph.replay()
        return self.output


class FastRun:
    """
    What one kind of picture (device, dtype, batch, scales, ...) is drawn with: compiled blocks and, on CUDA, recorded
    calls for each scale (the transformer's, and drawing its codes) and one for the residual MLP, with the keys and
    values they work on.
    """

    def __init__(self, path: "FastPath", transformer: nn.Module, residual_mlp: nn.Module | None, label: str):
        self.path = path
        self.label = label
        self.models = (transformer, residual_mlp)
        self.scheduler: Any = None  # whose drawing is recorded, if it is; known when the run is borrowed
        self.kv_cache = HARTKVCache(sliced_by_blocks=path.compiles)
        self._recorded: dict[Any, RecordedCall] = {}
        self._cache_states: dict[int, dict[str, Any]] = {}

    def transformer(
        self,
        hidden_states: torch.Tensor | None,
        scales: tuple[int, ...],
        scale_index: int,
        kv_cache: HARTKVCache,
        kept_tokens: torch.LongTensor | None = None,
        guidance: float | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        **condition,
    ) -> HARTTransformer2DModelOutput:
        inputs = {"hidden_states": hidden_states, "kept_tokens": kept_tokens, "guidance": guidance}
        if scale_index == 0:  # later scales know it from the cache
            inputs |= condition
        inputs = {name: value for name, value in inputs.items() if value is not None}
        block = self.path.compiled(run_block)
        rows = len(next(iter(condition.values())) if hidden_states is None else hidden_states)
        self._fit_to_last_scale(block, rows, scales[-1])
        # As it is now, for each time this is run; but the buffers that the first scale allocates stay.
        before = {name: value for name, value in vars(kv_cache).items() if value is not None}

        def predict(hidden_states=None, **tensors):
            vars(kv_cache).update(before)
            return self.models[0](
                hidden_states,
                scales,
                **tensors,
                scale_index=scale_index,
                kv_cache=kv_cache,
                run_block=block,
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )

        if self.path.graphs and scale_index == len(scales) - 1 and scale_index not in self._recorded:
            # The last scale writes over keys and values that it has read, and recording runs it more than once.
            buffers = (kv_cache.key, kv_cache.value)
            as_they_were = [buffer.clone() for buffer in buffers]
            self._record(scale_index, predict, inputs)
            for buffer, saved in zip(buffers, as_they_were):
                buffer.copy_(saved)
        logits, hidden_states = self._call(scale_index, predict, inputs)
        if self.path.graphs:  # what the model noted in the cache when it was recorded, now or before
            vars(kv_cache).update(self._cache_states.setdefault(scale_index, dict(vars(kv_cache))))
        return HARTTransformer2DModelOutput(logits=logits, hidden_states=hidden_states)

    def _fit_to_last_scale(self, block: Callable, rows: int, side: int):
        """
        Run the first block on about a last scale of zeros before anything else. A compiler that makes one code for all
        scales chooses it by the first it sees, and it is the last one that takes the time.
        """
        rows = min(rows, 2)  # a batch of one is compiled by itself
        if not self.path.compiles or rows in self.path.fitted or side == 1:
            return
        self.path.fitted.add(rows)
        model = self.models[0]
        heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        # Odd, as is the length of the cache: to a compiler sizes that are equal by chance, to a width say, are one size.
        tokens, cached = side * side - 1 + side % 2, 2 * side * side
        # In the mode that it is run in, see FastPath.record.
        with torch.inference_mode(torch.is_inference_mode_enabled() and not self.path.graphs), torch.no_grad():
            zeros = partial(torch.zeros, dtype=model.dtype, device=self.path.device)
            hidden_states, temb = zeros(rows, tokens, model.inner_dim), zeros(rows, model.inner_dim)
            kv_cache = HARTKVCache(sliced_by_blocks=True)
            kv_cache.open(1, cached, tokens, heads, hidden_states, temb, zeros(rows))
            kv_cache.length = cached
            rotary_emb = tuple(zeros(rows, tokens, 1, head_dim) for _ in range(2))
            (layer,) = kv_cache.layers(tokens)
            block(model.transformer_blocks[0], hidden_states, rotary_emb, temb, None, layer)

    def draw(
        self,
        function: Callable,
        logits: torch.Tensor,
        latents: torch.Tensor,
        scale_index: int,
        *arguments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales, *way, generator = arguments
        # One way, that of calls that name none: each takes memory, and there are as many as a slider has values.
        if self.scheduler is None or way != [None, None, True]:
            return function(logits, latents, scale_index, *arguments)
        noise = self.scheduler.draw_noise(logits.shape, logits.device, scale_index, generator=generator)

        def draw(logits, latents, **noise):
            return function(logits, latents, scale_index, scales, *way, noise=noise)

        inputs = {"logits": logits, "latents": latents.float(), **noise}
        codes, latents = self._call(f"drawing {scale_index}", draw, inputs, in_place=("logits",))
        return codes.clone(), latents.clone()  # callers keep them

    def residual_mlp(
        self, tokens: torch.Tensor, timestep: torch.Tensor | float, condition_embeds: torch.Tensor
    ) -> ResidualDiffusionMLPOutput:
        call = self.path.compiled(run_residual_mlp, self.label)
        timestep = float(timestep)
        inputs = {"tokens": tokens, "timestep": timestep, "condition_embeds": condition_embeds}
        if not self.path.graphs:
            inputs["timestep"] = torch.full((), timestep, device=tokens.device)
        sample = self._call("residual", lambda **tensors: call(self.models[1], **tensors), inputs)
        return ResidualDiffusionMLPOutput(sample=sample)

    def _record(self, name: Any, function: Callable, inputs: dict[str, Any], in_place: Collection[str] = ()):
        self._recorded[name] = self.path.record(function, inputs, in_place)

    def _call(self, name: Any, function: Callable, inputs: dict[str, Any], in_place: Collection[str] = ()) -> Any:
        if not self.path.graphs:
            return function(**inputs)
        if name not in self._recorded:
            self._record(name, function, inputs, in_place)
        return self._recorded[name](**inputs)


class FastPath:
    """
    The prepared runs of a pipeline and what they share. It belongs to one device; one picture (or batch) at a time is
    drawn with it, and what else is drawn meanwhile goes the plain way.

    Args:
        device (`torch.device`): Where the pipeline is.
        graphs (`bool`): Whether to record CUDA graphs.
        compiles (`bool`): Whether to compile at all.
        compile_options (`dict`, *optional*): Of `torch.compile`, such as `backend` or `mode`.
    """

    def __init__(
        self,
        device: torch.device,
        graphs: bool,
        compiles: bool,
        compile_options: dict[str, Any] | None,
    ):
        self.device = device
        self.graphs = graphs
        self.compiles = compiles
        self.compile_options = compile_options or {}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        self.stream = torch.cuda.Stream(device) if graphs else None
        self.scheduler_config: str | None = None  # of the scheduler whose drawing is recorded
        self.accepts_new = True  # until the pipeline has been prepared
        self.fitted: set[int] = set()  # numbers of rows, see FastRun._fit_to_last_scale
        self._lock = threading.Lock()
        self._compiled: dict[str, Callable] = {}
        self._runs: dict[tuple, FastRun] = {}
        self._model_state: tuple | None = None
        self._done = torch.cuda.Event() if graphs else None  # what the last one to hold the lock has launched
        self._decoder: tuple[tuple, nn.Module, nn.Module, dict[tuple, RecordedCall]] | None = None
        self._decoded_sizes: set[tuple] = set()
        self._told: set[tuple] = set()

    def compiled(self, function: Callable, label: str = "any") -> Callable:
        """`function` compiled, for the shapes that `label` stands for or, without one, for all."""
        name = f"{function.__name__}_{label}"
        if name not in self._compiled:
            function = counted_alone(function, label)
            if self.compiles:
                function = torch.compile(function, fullgraph=True, dynamic=label == "any", **self.compile_options)
            self._compiled[name] = function
        return self._compiled[name]

    def stays_here(self, *models: nn.Module | None) -> bool:
        """Whether models are on the device, and no offloading that was enabled since will take them from it."""
        return all(
            model is None
            or not (hasattr(model, "_hf_hook") or hasattr(model, "_diffusers_hook"))
            and next(model.parameters()).device == self.device
            for model in models
        )

    def borrow(self, pipe: Any, condition: dict[str, torch.Tensor], batch_size: int, scales: tuple[int, ...]):
        """The [`FastRun`] for such a picture, to be given back; `None` if it is not prepared for or in use."""
        tensor = next(iter(condition.values()))
        config = pipe.scheduler.config
        key = (
            *(tuple(tensor.shape) for tensor in condition.values()),
            tuple(scales),
            batch_size,
            pipe.transformer.dtype,
            tuple(config.guidance_interval),
            tuple(config.kept_fractions),
        )
        models = (pipe.transformer, pipe.residual_mlp)
        if tensor.device != self.device or not self.stays_here(*models, pipe.vae):
            return None
        if torch.is_autocast_enabled(self.device.type) or torch.is_grad_enabled():
            return None
        if key not in self._runs and not self.accepts_new:
            if key not in self._told:
                self._told.add(key)
                logger.warning(
                    f"The fast path was not prepared for {batch_size} picture(s) of "
                    f"{scales[-1] * pipe.vae_scale_factor} px like this, which are drawn the plain way: name their "
                    "sizes and numbers in `enable_fast_path`."
                )
            return None
        if not self._acquire():
            return None
        try:
            read = (*models, pipe.vae.codebook, pipe.vae.phi)
            state = tuple(None if model is None else state_of(model) for model in read)
            if state != self._model_state:
                if self._runs:
                    logger.info("The models have changed: their calls are recorded anew.")
                self._runs = dict.fromkeys(self._runs)
                self.fitted.clear()
                if self.graphs and not (self._decoder and self._decoder[-1]):  # it is gone with the last of its graphs
                    self.pool = torch.cuda.graph_pool_handle()
                self._model_state = state
            if self._runs.get(key) is None:
                label = f"{batch_size}_{len(tensor)}_{scales[-1]}"
                self._runs[key] = FastRun(self, *models, label)
            self._runs[key].scheduler = self._recordable(pipe.scheduler)
            return self._runs[key]
        except BaseException:
            self._lock.release()
            raise

    def give_back(self):
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.device))
        self._lock.release()

    def _acquire(self) -> bool:
        """Whether what is recorded is free, and ready for what the current stream is given next."""
        acquired = self._lock.acquire(blocking=False)
        if acquired and self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
        return acquired

    def _recordable(self, scheduler: Any) -> Any:
        """The scheduler if a record of its drawing is, or would be, what it does; else `None`."""
        # Other classes, and steps of an object's own, may do what a record leaves out. Classes go by their names: a
        # pipeline that is loaded as remote code has classes of its own.
        if not self.graphs or type(scheduler).__name__ != "HARTScheduler" or "step" in vars(scheduler):
            return None
        config = str(scheduler.config)
        if self.accepts_new:
            self.scheduler_config = config
        return scheduler if config == self.scheduler_config else None

    def record(self, function: Callable, inputs: dict[str, Any], in_place: Collection[str] = ()) -> RecordedCall:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return RecordedCall(function, inputs, self.stream, self.pool, in_place)

    def decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor | None:
        """
        Images `(batch_size, out_channels, height, width)` of latents, one after the other, which keeps the memory of
        one; `None` if nothing is prepared for their size.
        """
        size = (*latents.shape[1:], latents.dtype)
        if latents.device != self.device or not self.compiles or not self.stays_here(vae):
            return None
        if size not in self._decoded_sizes and not self.accepts_new:
            return None
        weights = (parameter for module in self._decoder_of(vae) for parameter in module.parameters())
        state = tuple((parameter.data_ptr(), parameter._version) for parameter in weights)
        decoder = self._decoder
        if decoder is None or decoder[0] != state:
            # A copy: the eager decoder is faster in the usual layout, the compiled one in this.
            modules = (copy.deepcopy(module).to(memory_format=torch.channels_last) for module in self._decoder_of(vae))
            self._decoder = decoder = (state, *modules, {})
        self._decoded_sizes.add(size)
        decode = self.compiled(run_decoder, f"{size[-2]}_{str(latents.dtype).rpartition('.')[2]}")
        _, *modules, recorded = decoder
        with measured_convolutions():
            images = [
                self._decode_one(partial(decode, *modules), recorded, size, latent) for latent in latents.split(1)
            ]
        return torch.cat(images).contiguous()

    def _decode_one(
        self, decode: Callable, recorded: dict[tuple, RecordedCall], size: tuple, latents: torch.Tensor
    ) -> torch.Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        as_recorded = self.graphs and not torch.is_grad_enabled() and not torch.is_autocast_enabled(self.device.type)
        if not as_recorded or not self._acquire():
            return decode(latents)
        try:
            if size not in recorded:
                recorded[size] = self.record(lambda latents: decode(latents), {"latents": latents})
            return recorded[size](latents=latents).clone()
        finally:
            self.give_back()

    @staticmethod
    def _decoder_of(vae: nn.Module) -> tuple[nn.Module, nn.Module]:
        return vae.post_quant_conv, vae.decoder

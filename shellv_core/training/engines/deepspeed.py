"""DeepSpeed's ZeRO: stage 1 shares the optimizer's state among the processes, 2 gradients too, 3 the weights as well.

The vision tower, which never learns, stays outside: every process holds it whole.

A checkpoint is not DeepSpeed's own, which is pickled and fits one number of processes, but the engines' common form
(see `base`): what DeepSpeed calls universal, without the conversion.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn

from shellv_core.errors import TrainingError
from shellv_core.logs import get_logger
from shellv_core.training.batches import Batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.engines.base import (
    OPTIMIZER,
    OPTIMIZER_KEYS,
    WEIGHTS,
    build_optimizer,
    check_weights,
    set_rates,
    trainable,
)
from shellv_core.training.model import StepOutput, TrainingModel
from shellv_core.training.packed import PackedRow
from shellv_core.training.processes import num_processes, rank, tensors_from_first

logger = get_logger(__name__)
STEP, MOMENTS = OPTIMIZER_KEYS[0], OPTIMIZER_KEYS[1:]
#: Under ZeRO-3, parameters with fewer elements stay whole in every process: norms, biases, the temperature.
PERSISTENCE_THRESHOLD = 10_000


class ZeroEngine:
    """See `Engine`."""

    def __init__(self, module: TrainingModel, config: TrainingConfig) -> None:
        self.module, self.stage = module, config.zero_stage or 0
        optimizer = build_optimizer(module, config)
        self._scalars = {id(parameter) for parameter in module.parameters() if not parameter.ndim}
        deepspeed = _import_deepspeed()
        _ensure_group()
        with contextlib.ExitStack() as changes:
            changes.enter_context(_tower_apart(module))
            changes.enter_context(_without_scalars(module))
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=zero_config(config), dist_init_required=False
            )
            self._check(deepspeed.DeepSpeedEngine)
            self._changes = changes.pop_all()
        if self.stage == 3:
            for model in filter(None, (module.model, module.reference)):
                deepspeed.zero.register_external_parameter(module.label_loss, model.lm_head.weight)
        self._make_states()
        self.details: dict[str, Any] = {
            "engine": "deepspeed",
            "num_processes": num_processes(),
            "zero_stage": self.stage,
            "zero_optimizer": type(self._optimizer).__name__,
        }
        logger.info("DeepSpeed %s, ZeRO-%d, %d processes", deepspeed.__version__, self.stage, num_processes())

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def forward(self, batch: Batch | PackedRow) -> StepOutput:
        """See `Engine`."""
        output: StepOutput = self._engine(batch)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_norm(self) -> float:
        """See `Engine`."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self.stage == 3:
            norm = float(combine_grad_norm_groups(self._optimizer._get_norm_groups()))
        else:
            norm = float(self._optimizer.scaled_global_norm())
        # DeepSpeed's sign of one that is not finite.
        return norm if norm >= 0 else math.inf

    def step(self, rate_factor: float) -> None:
        """See `Engine`."""
        set_rates(self._optimizer, rate_factor)
        self._engine.step()

    def change(self, parameter: nn.Parameter, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Engine`."""
        with torch.no_grad():
            value = function(self._whole(parameter))
            self._assign(parameter, value)
            if self.stage == 3:
                shared: Any = parameter
                shared.ds_tensor.copy_(self._share(shared, value))
            if parameter.numel():  # Under ZeRO-3, it may not be here as a whole.
                parameter.copy_(value.view_as(parameter))

    def state(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        tensors: dict[str, torch.Tensor] = {}
        step = next(state[STEP] for state in self._optimizer.optimizer.state.values())
        for name, parameter in trainable(self.module).items():
            found = {f"{WEIGHTS}{name}": self._whole(parameter)}
            found |= {f"{OPTIMIZER}{key}.{name}": self._whole(parameter, key) for key in MOMENTS}
            if rank() == 0:
                shape = () if id(parameter) in self._scalars else found[f"{WEIGHTS}{name}"].shape
                tensors |= {key: value.cpu().reshape(shape) for key, value in found.items()}
                tensors[f"{OPTIMIZER}{STEP}.{name}"] = torch.as_tensor(float(step))
        return tensors

    def load(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """See `Engine`."""
        parameters, names = trainable(self.module), set()
        for full_name, tensor in tensors_from_first(state):
            names.add(full_name)
            if full_name.startswith(WEIGHTS):
                key, name = None, full_name.removeprefix(WEIGHTS)
            else:
                key, _, name = full_name.removeprefix(OPTIMIZER).partition(".")
            if name not in parameters:
                break
            if key == STEP:
                for each in self._optimizer.optimizer.state.values():
                    each[STEP].fill_(float(tensor))
            else:
                self._assign(parameters[name], tensor, key)
        check_weights(names, self.module)
        self._refresh()

    def close(self) -> None:
        """See `Engine`."""
        if self.stage == 3:
            self._gather()
        else:
            self._engine.destroy()
        self._changes.close()

    def _check(self, kind: Any) -> None:
        """Refuse another engine than was asked for: launchers are known to fall back in silence."""
        in_use = self._engine.zero_optimization_stage() if isinstance(self._engine, kind) else None
        if in_use != self.stage:
            raise TrainingError(
                f"DeepSpeed with ZeRO-{self.stage} was asked for; what came is {type(self._engine).__name__} with stage"
                f" {in_use}."
            )

    def _flats(self) -> list[torch.Tensor]:
        """This process's shares of the float32 weights, flat, as the inner optimizer sees them."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        flats: list[torch.Tensor] = getattr(self._optimizer, name)
        return flats

    def _make_states(self) -> None:
        """Give the inner optimizer its state, which it would make in its first step.

        DeepSpeed links it to the parameters after the first step of the first group, and leaves out the others.
        """
        for flat in self._flats():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._optimizer.optimizer.state[flat] = {STEP: torch.zeros((), device=flat.device), **zeros}
        if self.stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameter: Any, key: str | None = None) -> torch.Tensor:
        """A parameter's float32 weights, or one of the optimizer's tensors for it, from all processes."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        whole: torch.Tensor = found.reshape(shape)
        return whole

    def _assign(self, parameter: Any, value: torch.Tensor, key: str | None = None) -> None:
        """Put this process's share of `value` where `_whole` finds it; `_refresh` brings it to the model."""
        value = value.to(parameter.device, torch.float32)
        if self.stage == 3:
            self._optimizer.set_local_hp_param(self._share(parameter, value), parameter, key)
        else:
            parameter.set_full_hp_param(value, key)

    def _share(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """This process's share of a parameter under ZeRO-3; the last processes' may be filled up."""
        size = parameter.ds_tensor.numel()
        filled = nn.functional.pad(value.flatten(), (0, size * num_processes() - value.numel()))
        return filled[size * rank() :][:size]

    def _refresh(self) -> None:
        """Make the model's weights those of the optimizer."""
        if self.stage < 3:
            self._optimizer.update_lp_params()
            return
        optimizer = self._optimizer
        for flat, shares, sources in zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        ):
            flat.data.copy_(sources.data)
            for share, values in zip(shares, optimizer.unflatten(flat, shares), strict=True):
                share.data = values.data
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _gather(self) -> None:
        """Leave plain modules with whole parameters in the first process, on CPU; empty ones elsewhere."""
        import deepspeed

        whole: dict[int, nn.Parameter] = {}
        for parameter in self.module.parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                data = parameter.detach().cpu().clone() if rank() == 0 else torch.empty(0)
            whole[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
        self._engine.destroy()
        for module in self.module.modules():
            held = module._parameters.items()
            module._parameters = {name: None if each is None else whole[id(each)] for name, each in held}


def zero_config(config: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's settings: weights and optimizer in float32 as in `DDPEngine`, bfloat16 by autocast.

    How many passes a step has is told pass by pass, and the learning rates step by step.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "contiguous_gradients": True, "overlap_comm": False}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENCE_THRESHOLD
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # On CPU it would compile a faster all-reduce, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _ensure_group() -> None:
    """Make a single process a group, as DeepSpeed wants one and, in parts of its own, keeps it for good."""
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def _without_scalars(module: nn.Module) -> Iterator[None]:
    """Within it, scalar parameters (the temperature) are vectors of one: DeepSpeed sends parameters as bytes."""
    names = [name for name, parameter in module.named_parameters() if not parameter.ndim]
    for name in names:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.view(1)
    try:
        yield
    finally:
        for name in names:
            parameter = module.get_parameter(name)
            if parameter.numel():  # Under ZeRO-3, the others are left with nothing.
                parameter.data = parameter.data.view(())


@contextlib.contextmanager
def _tower_apart(module: TrainingModel) -> Iterator[None]:
    """Within it, the vision tower is found as before, but is none of the model's modules."""
    holders = [each.model for each in (module.model, module.reference) if each is not None]
    for holder in holders:
        vars(holder)["vision_tower"] = holder._modules.pop("vision_tower")
    try:
        yield
    finally:
        for holder in holders:
            holder.vision_tower = vars(holder).pop("vision_tower")

"""Shard a UNet over processes (FSDP2), and gather and load its full state.

    shard(unet, mixed_precision, device)         # in place; then build the optimizer and the ShardedEMA
    weights = full_weights(unet)                 # the full state on rank 0, sharded or not
    load_full_weights(unet, weights)

Full states are the same for any number of processes, sharded or not, with or without a process group, so a checkpoint
can be resumed on another number of processes. All functions here except `is_sharded` and `local_part` are collectives:
call them on every rank.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ModelMixin, UNet2DModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from trainkit.errors import UserError


def shard(
    unet: UNet2DModel, mixed_precision: str | None, device: torch.device | str, reshard_after_forward: bool = True
) -> UNet2DModel:
    """Shard the parameters of `unet` over all processes in place: each block by itself, and the rest at the root.

    Each rank keeps a shard of its weights in float32, so all ranks must start from the same weights (the same seed).
    A rank gathers the full weights of a block only while it computes with them (ZeRO-3), or, without
    `reshard_after_forward`, from the forward to the backward pass (ZeRO-2). Build the optimizer afterwards.

    With `mixed_precision` "bf16" the forward pass runs under the caller's autocast, as without sharding, and blocks
    are gathered in bfloat16. This halves the traffic, and autocast then keeps no second copy of every gathered weight
    until the forward pass ends, which would undo the sharding. Gradients are reduced and accumulated in float32.
    Inputs are not cast, because a timestep of 999 would become 1000 in bfloat16.

    Raises:
        UserError: fp16 (the loss scaler would check each rank's shard of the gradients separately), or a CPU with a
            torch version that cannot average gradients there.
    """
    if mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 does not work with sharded weights: use bf16, or do not shard")
    if torch.device(device).type == "cpu":
        _check_average_on_cpu()
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        if block is not None:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    return fully_shard(unet, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was applied to `model`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def no_gradient_sync(model: FSDPModule) -> Iterator[None]:
    """Keep gradients on their rank inside the block: for every micro-step of an optimizer step except the last.

    They are kept unsharded in float32, so accumulation costs each rank the memory of all gradients.
    """
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gradient_norm_to_tensor(norm: torch.Tensor) -> torch.Tensor:
    """The norm that `clip_grad_norm_` returned as a plain scalar tensor, also for sharded parameters."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of `tensor`, or all of it if it is not sharded, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def local_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """This rank's shard of each parameter, in order, as plain tensors that share the parameters' memory."""
    reshard(model)
    with torch.no_grad():
        return [local_part(p) for p in model.parameters()]


def reshard(model: torch.nn.Module) -> None:
    """Free the gathered weights.

    FSDP keeps those of the root after a forward pass without a backward pass (sampling), and would still use them
    after the shards have changed.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# Full states


def copy_now(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of `tensor` on the CPU."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def full_weights(model: torch.nn.Module, copy: Callable[[torch.Tensor], torch.Tensor] = copy_now) -> dict[str, Any]:
    """A copy of the full state dict of `model` on the CPU of rank 0; {} on other ranks. Names have no wrappers.

    Weights that are not sharded are copied by `copy`.
    """
    if not is_sharded(model):
        return {name: copy(value) for name, value in model.state_dict(keep_vars=True).items()} if _is_rank0() else {}
    reshard(model)
    moved = next(model.parameters()).device.type != "cpu"
    state = _state_dict(model, _to_rank0())  # on a CPU some still belong to the model
    return {name: value.contiguous() if moved else copy_now(value) for name, value in state.items()}


def load_full_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load the full state dict of rank 0 into `model`; the `weights` of other ranks are ignored.

    Raises:
        ValueError: names or shapes differ; raised on every rank.
    """
    reshard(model)
    expected = {name: tuple(value.shape) for name, value in _state_dict(model).items()}
    _on_all_ranks(lambda: _difference(expected, {name: tuple(value.shape) for name, value in weights.items()}))
    set_model_state_dict(model, dict(weights) if _is_rank0() else {}, options=_from_rank0())


def full_optimizer_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    copy: Callable[[torch.Tensor], torch.Tensor] = copy_now,
) -> dict[str, Any]:
    """A copy of the full state of `model`'s `optimizer` on the CPU of rank 0; {} on other ranks.

    {"state": {parameter name: {"step": ..., "exp_avg": ...}}, "param_groups": [{"lr": ..., "params": [names]}]}.
    torch's `get_optimizer_state_dict` fails on some optimizers that are not torch's own. State that is not sharded is
    copied by `copy`.
    """
    reshard(model)
    saved, names = _unwrapped(optimizer).state_dict(), _names_of(model, optimizer)
    state = {
        names[index]: tree_map_only(torch.Tensor, lambda value: _full_on_rank0(value, copy), values)
        for index, values in saved["state"].items()
    }
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups} if _is_rank0() else {}


def load_full_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the full state of rank 0 into `model`'s `optimizer`; the `state` of other ranks is ignored.

    Raises:
        ValueError: the parameters differ; raised on every rank.
    """
    reshard(model)
    names, parameters = _names_of(model, optimizer), dict(model.named_parameters())
    _on_all_ranks(lambda: _optimizer_difference(names, parameters, state))
    indices = {name: index for index, name in enumerate(names)}
    shapes = tree_map_only(torch.Tensor, lambda value: value.to("meta"), state.get("state"))
    outline = _from_rank0_object({"state": shapes, "param_groups": state.get("param_groups")})
    numbered = {
        indices[name]: {
            what: _sharded(value, state["state"][name][what] if _is_rank0() else None, parameters[name])
            for what, value in values.items()
        }
        for name, values in outline["state"].items()
    }
    groups = [group | {"params": [indices[name] for name in group["params"]]} for group in outline["param_groups"]]
    _unwrapped(optimizer).load_state_dict({"state": numbered, "param_groups": groups})


def unsharded_copy(unet: UNet2DModel) -> UNet2DModel:
    """A UNet of the stock class with the full weights of `unet`, on its device, on every rank.

    Sampling needs it because each forward pass of a sharded UNet is a collective, which ranks with fewer images would
    miss; saving needs it because `save_pretrained` cannot read sharded weights.
    """
    reshard(unet)
    weights = _state_dict(unet, StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        stock_class: Any = next(base for base in type(unet).__mro__ if not issubclass(base, FSDPModule))
        copy = stock_class.from_config(unet.config)
        if isinstance(unet.class_embedding, ModelMixin):  # of vectors; the stock class has none
            copy.class_embedding = type(unet.class_embedding).from_config(unet.class_embedding.config)
    copy.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    return copy.requires_grad_(False).train(unet.training)


def _check_average_on_cpu() -> None:
    """Refuse a gloo backend that sums instead of averaging: torch 2.7 does so without an error."""
    average = torch.zeros(1)
    dist.reduce_scatter_tensor(average, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    if average.item() != 1:
        raise UserError(
            f"torch {torch.__version__} cannot train sharded weights on a CPU: install torch 2.13 or newer"
        )


def _state_dict(model: torch.nn.Module, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
    """torch's `get_model_state_dict`, which is annotated for any value; a UNet's state dict holds only tensors."""
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def _to_rank0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _from_rank0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


def _is_rank0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, if it is wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _difference(expected: dict[str, tuple], given: dict[str, tuple]) -> str | None:
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            return f"{name}: expected {expected.get(name, 'none')}, given {given.get(name, 'none')}"
    return None


def _names_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters in the order in which its state dict numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _full_on_rank0(value: torch.Tensor, copy: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """The full tensor on the CPU of rank 0. The other ranks take part in gathering it, but do not copy it."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return copy_now(full) if _is_rank0() else None
    return copy(value) if _is_rank0() else None


def _sharded(outline: Any, full: torch.Tensor | None, parameter: torch.Tensor) -> Any:
    """A value of the optimizer's state for `parameter`, sharded like the parameter if it has its shape.

    `full` is the value on rank 0, None on other ranks. `outline` is a meta tensor of its shape, or the value itself
    if that is not a tensor.
    """
    if not isinstance(outline, torch.Tensor):
        return outline
    if not dist.is_initialized():
        assert full is not None  # the only process is rank 0
        return _in_layout_of(parameter, full)
    value = torch.empty(outline.shape, dtype=outline.dtype) if full is None else full
    value = value.to(parameter.device)
    dist.broadcast(value, 0)
    if isinstance(parameter, DTensor) and outline.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return _in_layout_of(parameter, value)


def _in_layout_of(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with the memory layout of its `parameter`: optimizers pair their elements in memory order."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value


def _optimizer_difference(
    names: list[str], parameters: Mapping[str, torch.Tensor], state: dict[str, Any]
) -> str | None:
    given = [name for group in state["param_groups"] for name in group["params"]]
    if given != names:
        return f"state of {len(given)} parameters for an optimizer of {len(names)}, or in other groups"
    for name, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and not _fits(value.shape, parameters[name].shape):
                return (
                    f"{name}: {key} of shape {tuple(value.shape)} for a parameter of {tuple(parameters[name].shape)}"
                )
    return None


def _fits(shape: torch.Size, parameter: torch.Size) -> bool:
    """Whether state of `shape` fits a parameter: per element, row or column, or with another number of dimensions."""
    return len(shape) != len(parameter) or all(ours in (1, its) for ours, its in zip(shape, parameter, strict=True))


def _from_rank0_object(value: Any) -> Any:
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def _on_all_ranks(difference: Callable[[], str | None]) -> None:
    """Raise `ValueError` on every rank if rank 0 finds a `difference`; otherwise the other ranks would wait for it."""
    found = _from_rank0_object(difference() if _is_rank0() else None)
    if found:
        raise ValueError(f"the saved state does not fit the model: {found}")

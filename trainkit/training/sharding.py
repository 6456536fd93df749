"""A UNet divided among processes (FSDP2), and its whole state put together and divided again.

    shard(unet, mixed_precision, device)         # in place; then build the optimizer and the ShardedEMA
    weights = full_weights(unet)                 # the whole state on rank 0, whatever the division
    load_full_weights(unet, weights)

Whole states are the same for any number of processes, sharded or not, with or without a process group, so that a
checkpoint of one division is resumed on another. All functions here but `is_sharded` are collectives: call them on
every rank.
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
    """Divide the parameters of `unet` over all processes in place: block by block, and what is left at the root.

    Each rank keeps its part of its own weights, float32, so every rank must have the same ones (the same seed), and
    gathers a block's whole weights only while it computes with it (ZeRO-3), or, without `reshard_after_forward`, from
    its forward to its backward pass (ZeRO-2). The optimizer must be made afterwards.

    With `mixed_precision` "bf16" the forward pass stays under the caller's autocast, as without sharding, and blocks
    are gathered in bfloat16: half the traffic of float32, and without the second copy that autocast would keep of
    every gathered weight until the forward pass ends, which would undo the sharding. Gradients are summed, and
    accumulated, in float32. Inputs are not cast, as a timestep of 999 would become 1000 in bfloat16.

    Raises `UserError` for fp16 (the loss scaler would judge each rank's part of the gradients by itself), and on a CPU
    with a torch that cannot average gradients there.
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
    """Whether `model` is divided among processes by `shard`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def no_gradient_sync(model: FSDPModule) -> Iterator[None]:
    """Around the forward and backward pass of every micro-step but the last: gradients stay on their rank.

    They wait whole and in float32, so accumulation costs a rank the memory of all gradients.
    """
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gradient_norm_to_tensor(norm: torch.Tensor) -> torch.Tensor:
    """The plain scalar of a norm that `clip_grad_norm_` returned for sharded parameters; others are left as is."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """This rank's part of each parameter, in order, as plain tensors that share the parameters' memory."""
    reshard(model)
    with torch.no_grad():
        return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def reshard(model: torch.nn.Module) -> None:
    """Give up gathered weights. FSDP keeps the root's after a forward pass that no backward pass follows (sampling),
    and would go on with them after the parts that they came from have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# Whole states


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict of `model` on the CPU, a copy, on rank 0; {} on the others. Names are without wrappers."""
    reshard(model)
    return _copies(_state_dict(model, _to_rank0()))


def load_full_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load into `model` the whole state dict that rank 0 holds; what the other ranks pass is not read.

    Raises `ValueError` on every rank where names or shapes differ.
    """
    reshard(model)
    expected = {name: tuple(value.shape) for name, value in _state_dict(model).items()}
    _on_all_ranks(lambda: _difference(expected, {name: tuple(value.shape) for name, value in weights.items()}))
    set_model_state_dict(model, dict(weights) if _is_rank0() else {}, options=_from_rank0())


def full_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The full state of `model`'s `optimizer` on the CPU, a copy, on rank 0; {} on the other ranks.

    {"state": {parameter name: {"step": ..., "exp_avg": ...}}, "param_groups": [{"lr": ..., "params": [names]}]}.
    torch's own `get_optimizer_state_dict` would do it for its own optimizers, and fails on some of others.
    """
    reshard(model)
    saved, names = _unwrapped(optimizer).state_dict(), _names_of(model, optimizer)
    state = {names[index]: tree_map_only(torch.Tensor, _whole, values) for index, values in saved["state"].items()}
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups} if _is_rank0() else {}


def load_full_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load into `model`'s `optimizer` the whole state that rank 0 holds; what the other ranks pass is not read.

    Raises `ValueError` on every rank where the parameters differ.
    """
    reshard(model)
    names, parameters = _names_of(model, optimizer), dict(model.named_parameters())
    _on_all_ranks(lambda: _optimizer_difference(names, parameters, state))
    indices = {name: index for index, name in enumerate(names)}
    shapes = tree_map_only(torch.Tensor, lambda value: value.to("meta"), state.get("state"))
    outline = _from_rank0_object({"state": shapes, "param_groups": state.get("param_groups")})
    numbered = {
        indices[name]: {
            what: _divided(value, state["state"][name][what] if _is_rank0() else None, parameters[name])
            for what, value in values.items()
        }
        for name, values in outline["state"].items()
    }
    groups = [group | {"params": [indices[name] for name in group["params"]]} for group in outline["param_groups"]]
    _unwrapped(optimizer).load_state_dict({"state": numbered, "param_groups": groups})


def unsharded_copy(unet: UNet2DModel) -> UNet2DModel:
    """A UNet of the stock class with the whole weights of `unet`, on its device, on every rank.

    For sampling, where each forward pass of a sharded UNet is a collective that ranks with fewer images would miss,
    and for `save_pretrained`, which cannot read divided weights.
    """
    reshard(unet)
    weights = _state_dict(unet, StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        stock_class: Any = next(base for base in type(unet).__mro__ if not issubclass(base, FSDPModule))
        copy = stock_class.from_config(unet.config)
        if isinstance(unet.class_embedding, ModelMixin):  # an embedding of vectors, where the stock class has none
            copy.class_embedding = type(unet.class_embedding).from_config(unet.class_embedding.config)
    copy.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    return copy.requires_grad_(False).train(unet.training)


def _check_average_on_cpu() -> None:
    """Refuse a gloo that sums where it is asked to average: torch 2.7 does so, and says nothing."""
    average = torch.zeros(1)
    dist.reduce_scatter_tensor(average, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    if average.item() != 1:
        raise UserError(f"torch {torch.__version__} cannot train sharded weights on a CPU: use a newer one (2.13 can)")


def _state_dict(model: torch.nn.Module, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
    """torch's `get_model_state_dict`, whose annotation allows any value: a UNet's state dict has tensors alone."""
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def _to_rank0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _from_rank0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


def _is_rank0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What Accelerate's wrapper holds: the wrapper's own `step` leaves steps out."""
    return getattr(optimizer, "optimizer", optimizer)


def _copies(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with its tensors copied: where nothing had to be moved or gathered, they are the model's own."""
    return tree_map_only(torch.Tensor, lambda value: value.clone(memory_format=torch.contiguous_format), state)


def _difference(expected: dict[str, tuple], given: dict[str, tuple]) -> str | None:
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            return f"{name}: expected {expected.get(name, 'none')}, given {given.get(name, 'none')}"
    return None


def _names_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters in its own order, which its state dict numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _whole(value: torch.Tensor) -> torch.Tensor | None:
    """The full tensor on the CPU of rank 0. The other ranks take part in gathering it, but do not copy it."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().to("cpu", copy=True).contiguous() if _is_rank0() else None


def _divided(outline: Any, whole: torch.Tensor | None, parameter: torch.Tensor) -> Any:
    """A value of the optimizer's state for `parameter`, from the whole one of rank 0: this rank's part, where it is
    divided like the parameter. `outline` has its shape, or is the value itself where that is no tensor."""
    if not isinstance(outline, torch.Tensor):
        return outline
    if not dist.is_initialized():
        assert whole is not None  # the only process is rank 0
        return _in_layout_of(parameter, whole)
    value = torch.empty(outline.shape, dtype=outline.dtype) if whole is None else whole
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
        return f"state of {len(given)} parameters, or in other groups, for an optimizer of {len(names)}"
    for name, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and not _fits(value.shape, parameters[name].shape):
                return (
                    f"{name}: {key} of shape {tuple(value.shape)} for a parameter of {tuple(parameters[name].shape)}"
                )
    return None


def _fits(shape: torch.Size, parameter: torch.Size) -> bool:
    """Whether state of `shape` can be a parameter's: one for one, of rows or columns, or of blocks of another rank."""
    return len(shape) != len(parameter) or all(ours in (1, its) for ours, its in zip(shape, parameter, strict=True))


def _from_rank0_object(value: Any) -> Any:
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def _on_all_ranks(difference: Callable[[], str | None]) -> None:
    """Raise `ValueError` everywhere where rank 0 finds a `difference`: alone, it would leave the others waiting."""
    found = _from_rank0_object(difference() if _is_rank0() else None)
    if found:
        raise ValueError(f"the saved state does not fit the model: {found}")

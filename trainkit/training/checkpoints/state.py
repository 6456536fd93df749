"""The exact training state: copied from the device at once, written and read as safetensors and JSON.

All randomness is a function of the seed and the step (trainkit/data/loading/order.py), so no other state is needed.
The random states of each rank are saved for randomness that a user adds to a script.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trainkit.processes import wait_for_everyone
from trainkit.training.averages.ema import ShardedEMA
from trainkit.training.checkpoints.host_copies import HostCopies
from trainkit.training.sharding import (
    full_optimizer_state,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
)

UNET, EMA, WEIGHTS = "unet", "unet_ema", "diffusion_pytorch_model.safetensors"
OPTIMIZER, STATE = "optimizer.safetensors", "training_state.json"
TENSOR = "float32"  # marks a tensor in JSON by its type
# Entries of a parameter group that follow the options and the device of this run, not the checkpoint.
OWN_SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "fused", "foreach")


@dataclass
class Snapshot:
    """The content of a checkpoint, on the CPU of rank 0. It shares no memory with the training."""

    configs: dict[str, dict]  # folder -> config.json
    weights: dict[str, dict[str, Tensor]]  # folder -> tensors
    optimizer: dict[str, Tensor]  # "<parameter>/<what>"
    training_state: dict[str, Any]  # JSON
    copies: HostCopies | None = None  # whose tensors have their content once it was waited for


def take_snapshot(
    unet: UNet2DModel,
    averages: dict[str, ShardedEMA],
    optimizer: torch.optim.Optimizer,
    training_state: dict[str, Any],
) -> Snapshot:
    """Copy the full weights, averages and optimizer state to the CPU of rank 0; a collective.

    Call `copies.before_update()` of the result before any of them changes.

    `averages` maps the folder of each average to it. `training_state` is the rest of training_state.json.
    """
    config = json.loads(unet.to_json_string())
    copies = HostCopies(next(unet.parameters()).device)
    configs, weights = {UNET: config}, {UNET: full_weights(unet, copies.add)}
    for name, average in averages.items():
        configs[name], weights[name] = config | average.state_dict(), average.full_weights(copies.add)
    saved = full_optimizer_state(unet, optimizer, copies.add)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, values in saved.get("state", {}).items():
        for what, value in values.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{name}/{what}"] = value
    groups = tree_map_only(Tensor, lambda value: {TENSOR: value.tolist()}, saved.get("param_groups", []))
    training_state = training_state | {"optimizer": {"param_groups": groups, "numbers": numbers}}
    return Snapshot(configs, weights, tensors, training_state, copies)


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write unet/ and the averages (each loadable by diffusers), optimizer.safetensors and training_state.json."""
    if snapshot.copies is not None:
        snapshot.copies.wait()
    for name, config in snapshot.configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(snapshot.weights[name], folder / name / WEIGHTS, metadata={"format": "pt"})
    save_file(snapshot.optimizer, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(snapshot.training_state, indent=1) + "\n", encoding="utf-8")


def read_training_state(folder: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def restore(
    folder: Path, unet: UNet2DModel, averages: dict[str, ShardedEMA], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load what `write_snapshot` wrote and return training_state.json. A collective: rank 0 reads for all ranks.

    Optimizer settings that come from the options (`OWN_SETTINGS`) stay those of this run. Raises if names or shapes do
    not fit.
    """
    training_state = read_training_state(folder)
    names = [f"{UNET}/{WEIGHTS}", OPTIMIZER, *(f"{name}/{WEIGHTS}" for name in averages)]
    files = _read_on_rank0(folder, names)
    load_full_weights(unet, files[f"{UNET}/{WEIGHTS}"])
    for name, average in averages.items():
        average.load_full_weights(files[f"{name}/{WEIGHTS}"])
        average.load_state_dict(json.loads((folder / name / "config.json").read_text(encoding="utf-8")))
    state: dict[str, dict] = {}
    for key, value in [*files[OPTIMIZER].items(), *training_state["optimizer"]["numbers"].items()]:
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = value
    groups = []
    for saved, own in zip(training_state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        restored = {key: _with_tuples_of(own.get(key), value) for key, value in saved.items()}
        groups.append(restored | {key: own[key] for key in OWN_SETTINGS if key in own})
    load_full_optimizer_state(unet, optimizer, {"state": state, "param_groups": groups})
    return training_state


def _read_on_rank0(folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, on rank 0. Raises on every rank, so that no rank waits for one that failed."""
    files: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            files = {name: load_file(folder / name) for name in names}
        except (OSError, SafetensorError) as error:
            problem = str(error)
    if dist.is_initialized():
        wait_for_everyone()
        shared = [problem]
        dist.broadcast_object_list(shared)
        problem = shared[0]
    if problem is not None:
        raise OSError(problem)
    return files


def write_random_states(folder: Path, rank: int) -> None:
    """This rank's part of a checkpoint: random_states_<rank>.safetensors with those of torch, numpy and Python."""
    state: Any = np.random.get_state()  # a tuple; the stubs also allow for the dict of another argument
    kind, keys, *rest = state
    version, words, gauss = random.getstate()
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    states["python"] = torch.tensor(words, dtype=torch.int64)
    if torch.accelerator.is_available():  # under the name of its kind: cuda, mps, xpu
        states[_accelerator()] = torch.get_device_module(_accelerator()).get_rng_state()
    numbers = json.dumps({"numpy": [kind, *rest], "python": [version, gauss]})
    save_file(states, folder / f"random_states_{rank}.safetensors", metadata={"numbers": numbers})


def restore_random_states(folder: Path, rank: int) -> None:
    """Set the random states of `rank`, if the checkpoint has them."""
    from safetensors import safe_open

    file = folder / f"random_states_{rank}.safetensors"
    if not file.is_file():
        return
    states = load_file(file)
    with safe_open(file, "pt") as opened:
        numbers = json.loads(opened.metadata()["numbers"])
    torch.set_rng_state(states["torch"])
    kind, *rest = numbers["numpy"]
    np.random.set_state((kind, states["numpy"].numpy().astype(np.uint32), *rest))
    version, gauss = numbers["python"]
    random.setstate((version, tuple(states["python"].tolist()), gauss))
    if torch.accelerator.is_available() and _accelerator() in states:
        torch.get_device_module(_accelerator()).set_rng_state(states[_accelerator()])


def _accelerator() -> str:
    device = torch.accelerator.current_accelerator()
    assert device is not None  # it is available
    return device.type


def _with_tuples_of(form: Any, value: Any) -> Any:
    """`value` with tuples where `form` has them: JSON has only lists, and optimizers distinguish the two.

    Tensors of a group (Prodigy's sums) are restored from their numbers.
    """
    if isinstance(value, dict) and TENSOR in value:
        return torch.tensor(value[TENSOR])
    if not isinstance(value, list) or not isinstance(form, (list, tuple)) or len(form) != len(value):
        return value
    return type(form)(_with_tuples_of(*pair) for pair in zip(form, value, strict=True))

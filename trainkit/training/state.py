"""The exact training state: copied off the device in one go, written and read as safetensors and JSON.

Everything random is a function of the seed and the step (trainkit/data/loading/order.py), so there is little else to
keep. A rank's random states are kept for the randomness that a script adds of its own.
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

from trainkit.training.ema import ShadowWeights
from trainkit.training.sharding import (
    full_optimizer_state,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
)

UNET, EMA, WEIGHTS = "unet", "unet_ema", "diffusion_pytorch_model.safetensors"
OPTIMIZER, STATE = "optimizer.safetensors", "training_state.json"
TENSOR = "float32"  # marks a tensor in JSON, by its type
KERNELS = ("fused", "foreach")  # a checkpoint of another device brings its numbers, not its choice of these


@dataclass
class Snapshot:
    """All that a checkpoint holds, on the CPU of rank 0, and none of it shared with the training that goes on."""

    configs: dict[str, dict]  # folder -> config.json
    weights: dict[str, dict[str, Tensor]]  # folder -> tensors
    optimizer: dict[str, Tensor]  # "<parameter>/<what>"
    facts: dict[str, Any]  # JSON


def take_snapshot(
    unet: UNet2DModel, averages: dict[str, ShadowWeights], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> Snapshot:
    """Copy weights, averages and optimizer state to the CPU of rank 0, whole; a collective.

    `averages` are those of the weights, by the folder that each goes into; `facts` is what else goes into
    training_state.json.
    """
    config = json.loads(unet.to_json_string())
    configs, weights = {UNET: config}, {UNET: full_weights(unet)}
    for name, average in averages.items():
        configs[name], weights[name] = config | average.state_dict(), average.full_weights()
    saved = full_optimizer_state(unet, optimizer)
    tensors, numbers = {}, {}
    for name, values in saved.get("state", {}).items():
        for what, value in values.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{name}/{what}"] = value
    groups = tree_map_only(Tensor, lambda value: {TENSOR: value.tolist()}, saved.get("param_groups", []))
    facts = facts | {"optimizer": {"param_groups": groups, "numbers": numbers}}
    return Snapshot(configs, weights, tensors, facts)


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write unet/ and the averages (each loadable by diffusers), optimizer.safetensors and training_state.json."""
    for name, config in snapshot.configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(snapshot.weights[name], folder / name / WEIGHTS, metadata={"format": "pt"})
    save_file(snapshot.optimizer, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(snapshot.facts, indent=1) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def restore(
    folder: Path, unet: UNet2DModel, averages: dict[str, ShadowWeights], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load what `write_snapshot` wrote; returns the facts. A collective: rank 0 reads the weights for all.

    Raises where names or shapes do not fit.
    """
    facts = read_facts(folder)
    names = [f"{UNET}/{WEIGHTS}", OPTIMIZER, *(f"{name}/{WEIGHTS}" for name in averages)]
    files = _read_on_rank0(folder, names)
    load_full_weights(unet, files[f"{UNET}/{WEIGHTS}"])
    for name, average in averages.items():
        average.load_full_weights(files[f"{name}/{WEIGHTS}"])
        average.load_state_dict(json.loads((folder / name / "config.json").read_text()))
    state: dict[str, dict] = {}
    for key, value in [*files[OPTIMIZER].items(), *facts["optimizer"]["numbers"].items()]:
        name, _, what = key.rpartition("/")
        state.setdefault(name, {})[what] = value
    groups = []
    for saved, own in zip(facts["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        formed = {key: _formed_like(own.get(key), value) for key, value in saved.items()}
        groups.append(formed | {key: own[key] for key in KERNELS if key in own})
    load_full_optimizer_state(unet, optimizer, {"state": state, "param_groups": groups})
    return facts


def _read_on_rank0(folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, on rank 0; raises on every rank: alone, it would leave the others waiting."""
    files: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            files = {name: load_file(folder / name) for name in names}
        except (OSError, SafetensorError) as error:
            problem = str(error)
    if dist.is_initialized():
        shared = [problem]
        dist.broadcast_object_list(shared)
        problem = shared[0]
    if problem is not None:
        raise OSError(problem)
    return files


def write_random_states(folder: Path, rank: int) -> None:
    """This rank's part of a checkpoint: random_states_<rank>.safetensors with those of torch, numpy and Python."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    states["python"] = torch.tensor(words, dtype=torch.int64)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    numbers = json.dumps({"numpy": [kind, *rest], "python": [version, gauss]})
    save_file(states, folder / f"random_states_{rank}.safetensors", metadata={"numbers": numbers})


def restore_random_states(folder: Path, rank: int) -> None:
    """Set the random states of `rank`, where the checkpoint was written by that many ranks."""
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
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _formed_like(form: Any, value: Any) -> Any:
    """`value` with tuples where `form` has them: JSON knows lists alone, and optimizers tell them apart.

    Tensors of a group (Prodigy's sums) come back from their numbers.
    """
    if isinstance(value, dict) and TENSOR in value:
        return torch.tensor(value[TENSOR])
    if not isinstance(value, list) or not isinstance(form, (list, tuple)) or len(form) != len(value):
        return value
    return type(form)(_formed_like(*pair) for pair in zip(form, value, strict=True))

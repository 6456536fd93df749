"""The exact training state: copied off the device in one go, written and read as safetensors and JSON.

Everything random is a function of the seed and the step (trainkit/data/order.py), so there is little else to keep. A
rank's random states are kept for the randomness that a script adds of its own.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET, EMA, WEIGHTS = "unet", "unet_ema", "diffusion_pytorch_model.safetensors"
OPTIMIZER, STATE = "optimizer.safetensors", "training_state.json"


@dataclass
class Snapshot:
    """All that a checkpoint holds, on the CPU, and none of it shared with the training that goes on."""

    configs: dict[str, dict]  # folder -> config.json
    weights: dict[str, dict[str, Tensor]]  # folder -> tensors
    optimizer: dict[str, Tensor]  # "<parameter>/<what>"
    facts: dict[str, Any]  # JSON


def take_snapshot(
    unet: UNet2DModel, ema: EMAModel | None, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> Snapshot:
    """Copy weights, averages and optimizer state to the CPU. `facts` is what else goes into training_state.json."""
    config = json.loads(unet.to_json_string())
    configs, weights = {UNET: config}, {UNET: {name: _copy(value) for name, value in unet.state_dict().items()}}
    if ema is not None:
        averages = ema.state_dict()
        shadows = averages.pop("shadow_params")
        # buffers have no average
        named = {name: _copy(value) for (name, _), value in zip(unet.named_parameters(), shadows, strict=True)}
        configs[EMA], weights[EMA] = config | averages, weights[UNET] | named
    tensors, numbers = {}, {}
    saved, names = optimizer.state_dict(), _parameter_names(unet, optimizer)
    for index, values in saved["state"].items():
        for what, value in values.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{names[index]}/{what}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    facts = facts | {"optimizer": {"param_groups": groups, "numbers": numbers}}
    return Snapshot(configs, weights, {key: _copy(value) for key, value in tensors.items()}, facts)


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write unet/, unet_ema/ (each loadable by diffusers), optimizer.safetensors and training_state.json."""
    for name, config in snapshot.configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(snapshot.weights[name], folder / name / WEIGHTS, metadata={"format": "pt"})
    save_file(snapshot.optimizer, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(snapshot.facts, indent=1) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """training_state.json of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def restore(folder: Path, unet: UNet2DModel, ema: EMAModel | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load what `write_snapshot` wrote; returns the facts. Raises where names or shapes do not fit."""
    facts = read_facts(folder)
    unet.load_state_dict(load_file(folder / UNET / WEIGHTS))
    if ema is not None:
        averages = load_file(folder / EMA / WEIGHTS)
        config = json.loads((folder / EMA / "config.json").read_text())
        numbers = {key: config[key] for key in ema.state_dict() if key != "shadow_params"}
        device = ema.shadow_params[0].device
        shadows = [averages[name].to(device) for name, _ in unet.named_parameters()]
        ema.load_state_dict(numbers | {"shadow_params": shadows})
    names = _parameter_names(unet, optimizer)
    indices, state = {name: index for index, name in enumerate(names)}, {}
    for key, value in [*load_file(folder / OPTIMIZER).items(), *facts["optimizer"]["numbers"].items()]:
        name, _, what = key.rpartition("/")
        state.setdefault(indices[name], {})[what] = value
    groups, first = [], 0
    for saved, group in zip(facts["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        saved = {key: _formed_like(group.get(key), value) for key, value in saved.items()}
        groups.append(saved | {"params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return facts


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


def _parameter_names(unet: UNet2DModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters in its own order, which its state dict numbers."""
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _formed_like(form: Any, value: Any) -> Any:
    """`value` with tuples where `form` has them: JSON knows lists alone, and optimizers tell them apart."""
    if not isinstance(value, list) or not isinstance(form, (list, tuple)) or len(form) != len(value):
        return value
    return type(form)(_formed_like(*pair) for pair in zip(form, value, strict=True))


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()

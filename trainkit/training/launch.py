"""Start Accelerate, and refuse launches that would silently start something else than requested."""

import os
import shlex
import sys
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env

from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions
from trainkit.processes import COLLECTIVE_TIMEOUT
from trainkit.training.device import CompileOptions
from trainkit.training.precision import resolve_precision, warn_of_slow_bfloat16

CompiledT = TypeVar("CompiledT", bound=CompileOptions)
DYNAMO = "ACCELERATE_DYNAMO_"  # environment variables of Accelerate's launcher
TWO_CPU_PROCESSES = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no {script}"
)


def start_accelerator(mixed_precision: str | None = None, cpu_threads: int = 0, **kwargs) -> Accelerator:
    """The Accelerator of this process, with its number of CPU threads set.

    Raises `UserError` if the launcher was asked for more processes than have found each other, and for a precision
    that the device does not support.
    """
    mixed_precision = resolve_precision(mixed_precision)
    asked = max(int(os.environ.get("WORLD_SIZE", 1)), _processes_asked_of_launcher())
    if not torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        _check_processes(asked, 1, "cpu")  # before Accelerate waits for the others for half an hour
    store = _fresh_store()
    try:
        handlers = [ddp_kwargs(), InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)]
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers, **kwargs)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from None
    del store  # the process group keeps it
    _check_processes(asked, accelerator.num_processes, accelerator.device.type)
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":  # Accelerate accepts it if ACCELERATE_USE_CPU is set
            raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no on a CPU")
        set_cpu_threads(cpu_threads)
    if accelerator.is_main_process:
        warn_of_slow_bfloat16(accelerator.mixed_precision, accelerator.device.type)
    return accelerator


def launch_command(num_processes: int, device_type: str, script: str | None = None) -> str:
    """The command, without flags of the script, that starts `script` (default: this one) on as many processes."""
    script, machines = shlex.quote(script or sys.argv[0]), 1
    if "WORLD_SIZE" in os.environ:
        machines = int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if num_processes == 1:
        return f"python {script}"
    if machines > 1:
        where = f"--num_machines {machines} --machine_rank ... --main_process_ip ..."
        return f"accelerate launch --multi_gpu --num_processes {num_processes} {where} {script}"
    if device_type == "cpu":
        return TWO_CPU_PROCESSES.format(n=num_processes, script=script)
    return f"accelerate launch --multi_gpu --num_processes {num_processes} {script}"


def set_cpu_threads(cpu_threads: int) -> None:
    """`--cpu_threads`, or this process's share of the cores."""
    torch.set_num_threads(cpu_threads or _default_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def shard_as_launched(options: TrainingOptions) -> TrainingOptions:
    """A copy of `options` with `--shard_weights` for an FSDP or DeepSpeed launch; before `start_accelerator`.

    Either engine would keep weights, accumulation and optimizer state to itself, where averages and exact checkpoints
    cannot reach them. torch's `fully_shard` shards them instead (ZeRO: Rajbhandari et al. 2020): stage 2 keeps
    gathered weights until the backward pass, stage 3 gathers them twice. Removes the launcher's variables from the
    environment, so that Accelerate does not start the engine. Raises `UserError` for offloading and config files.
    """
    environment = os.environ
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        offload = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
        stage = 3 if parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True) else 2
        if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
            options = replace(options, gradient_checkpointing=True)
        del environment["ACCELERATE_USE_FSDP"]
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        offload = any(value in ("cpu", "nvme") for name, value in environment.items() if _is_deepspeed_offload(name))
        if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise UserError(
                "deepspeed_config_file is not supported: set zero_stage in the Accelerate config, as "
                "accelerate_configs/deepspeed.yaml does"
            )
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        del environment["ACCELERATE_USE_DEEPSPEED"]
    else:
        return options
    if offload:
        raise UserError(
            "offloading weights and optimizer state to main memory or disk is not supported: switch it off in the "
            "Accelerate config; --gradient_checkpointing and --find_batch_size also save memory"
        )
    return replace(options, shard_weights=options.shard_weights or stage > 0, reshard_after_forward=stage == 3)


def compile_as_launched(options: CompiledT) -> CompiledT:
    """A copy of `options` with `--compile` for a launch with `dynamo_config`; before `start_accelerator`.

    Accelerate would wrap the compiled model: weights would change their names, and the previews of a training would be
    compiled too. The UNet of sample.py, which it never prepares, it would not compile at all. Removes the launcher's
    variable from the environment, so that Accelerate does not compile. Raises `UserError` for settings that
    `--compile` does not have.
    """
    backend = os.environ.get(DYNAMO + "BACKEND", "NO").upper()
    if backend == "NO":
        return options
    if backend != "INDUCTOR":
        raise UserError(
            f"dynamo_backend {backend} is not supported: use INDUCTOR or NO in the Accelerate config, or --compile"
        )
    for name in ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION"):
        if parse_flag_from_env(DYNAMO + name):
            raise UserError(
                f"dynamo_{name.lower()} true is not supported: remove it from the Accelerate config, or use --compile"
            )
    del os.environ[DYNAMO + "BACKEND"]
    mode = os.environ.get(DYNAMO + "MODE", options.compile_mode)
    return options if options.compile is not None else replace(options, compile=True, compile_mode=mode)


def refuse_dynamo_config(script: str) -> None:
    """Raise `UserError` for a launch with `dynamo_config` of a script that compiles nothing."""
    backend = os.environ.get(DYNAMO + "BACKEND", "NO").upper()
    if backend != "NO":
        raise UserError(
            f"dynamo_backend {backend}: {script} compiles nothing; remove dynamo_config from the Accelerate config"
        )


def _is_deepspeed_offload(name: str) -> bool:
    return name.startswith("ACCELERATE_DEEPSPEED_OFFLOAD_") and name.endswith("_DEVICE")


def ddp_kwargs() -> DistributedDataParallelKwargs:
    """Settings of DistributedDataParallel: gradients are views of the buckets that are reduced, without a copy.

    `static_graph` stays off. DDP raises with it if the first micro-step is not reduced (`no_sync`), which accumulation
    does, and a resume on fewer processes may start to accumulate. It would bring nothing: every parameter is used in
    every step, and the gradient checkpointing of diffusers works without it.
    """
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def _fresh_store() -> dist.TCPStore | None:
    """After a restart by the launcher (`--max_restarts`), let the processes meet in a new store.

    Processes find each other through the launcher's store, which still holds the addresses of the killed processes. A
    rank that reads them before they are overwritten fails or waits indefinitely. So rank 0 opens its own store and
    publishes its port under a key that no earlier start has used.

    Returns a store that must be kept until the process group exists. Raises `UserError` for restarts over several
    machines whose launchers keep their stores: each launcher counts its own restarts, so there is no common key.
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if environment["LOCAL_WORLD_SIZE"] != environment["WORLD_SIZE"]:
        if int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError(
                "--max_restarts over several machines would let processes look for those that were killed: start each "
                "launcher with --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
            )
        return None
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts == 0:
        return None
    host, key = environment["MASTER_ADDR"], f"port_after_restart_{restarts}"
    port = int(environment["MASTER_PORT"])
    launchers_store = dist.TCPStore(host, port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    own_store = None
    if environment["RANK"] == "0":
        own_store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        launchers_store.set(key, str(own_store.port))
    environment["MASTER_PORT"] = launchers_store.get(key).decode()
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    return own_store


def _default_threads(local_processes: int) -> int:
    """This process's share of the cores, unless OMP_NUM_THREADS sets another number.

    Launchers set it to 1 if it is not set, which would leave the other cores idle. So 1 counts only if the user has
    set it.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # one number per level of nesting
    asked = int(first) if first.isdecimal() else 0
    if asked > 1 or (asked == 1 and _set_threads_for_launcher()):
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes)


def _set_threads_for_launcher() -> bool:
    """Whether the user has set OMP_NUM_THREADS, of which this process sees the value. True without a launcher."""
    import psutil

    parent, words = _parent()
    is_launcher = any(
        os.path.basename(word) in ("accelerate", "torchrun")
        or word.startswith(("accelerate.commands", "torch.distributed"))
        for word in words
    )
    if not is_launcher or any(word.startswith("--num_cpu_threads_per_process") for word in words):
        return True
    try:
        return "OMP_NUM_THREADS" in parent.environ()
    except psutil.Error:
        return False


def _check_processes(asked: int, num_processes: int, device_type: str) -> None:
    if asked <= num_processes:
        return
    raise UserError(
        f"{asked} processes were requested, but this one runs with {num_processes}: they would not work together. "
        f"Start them with: {launch_command(asked, device_type, os.path.basename(sys.argv[0]))} ..."
    )


def _processes_asked_of_launcher() -> int:
    """`--num_processes` of the `accelerate launch` that started this process, 1 if there is none.

    On a CPU the launcher starts one process whatever the number, and only its command line shows the number.
    """
    words = _parent()[1]
    # `accelerate launch ...` or `python -m accelerate.commands.launch ...`
    starts = [i for i, word in enumerate(words) if word == "launch" or word.endswith("accelerate.commands.launch")]
    if not starts or not any("accelerate" in word for word in words[: starts[0] + 1]):
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    arguments, _ = launch_command_parser().parse_known_args(words[starts[0] + 1 :])
    if arguments.num_processes is not None:
        return arguments.num_processes
    config_file = arguments.config_file or default_config_file
    if not os.path.isfile(config_file):
        return 1
    return load_config_from_file(config_file).num_processes or 1


def _parent() -> tuple[Any, list[str]]:
    """The `psutil.Process` that started this one, and its command line; None and no words if it cannot be seen."""
    import psutil  # comes with accelerate

    try:
        parent = psutil.Process(os.getppid())
        return parent, parent.cmdline()
    except psutil.Error:
        return None, []


def make_deterministic() -> None:
    """Use deterministic algorithms only (`--deterministic`); call it before the first CUDA operation.

    An operation without a deterministic algorithm raises with its name.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)

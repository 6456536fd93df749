"""What is known of each scheduler that ships with a model; their settings are in schedulers.py. Imports no torch."""

from typing import NamedTuple


class SchedulerFacts(NamedTuple):
    """One row of `sample.py --list_schedulers`."""

    method: str  # name and source
    order: int  # of convergence; of a stochastic one, the order of the solver without its noise
    stochastic: bool  # whether it adds noise after the first step
    in_stock_pipeline: bool  # whether diffusers' DDPMPipeline samples with it
    steps: str  # numbers of steps it is good for
    doubles_calls: bool = False  # calls the UNet twice in each step but the last


CATALOGUE = {
    "sde_dpmsolver": SchedulerFacts("SDE-DPM-Solver++(2M) (Lu et al. 2022)", 2, True, True, "8 and more"),
    "dpmsolver": SchedulerFacts("DPM-Solver++(2M) (Lu et al. 2022)", 2, False, True, "4 to 50"),
    "dpmsolver_3m": SchedulerFacts("DPM-Solver++(3M) (Lu et al. 2022)", 3, False, True, "20 to 50"),
    "unipc": SchedulerFacts("UniPC (Zhao et al. 2023)", 3, False, False, "4 to 50"),
    "sasolver": SchedulerFacts("SA-Solver (Xue et al. 2023)", 2, True, True, "20 and more"),
    "heun": SchedulerFacts("Heun (Karras et al. 2022, algorithm 1)", 2, False, False, "20 and more", True),
    "euler": SchedulerFacts("Euler (Karras et al. 2022, algorithm 1)", 1, False, False, "50 and more"),
    "ddim": SchedulerFacts("DDIM (Song et al. 2021)", 1, False, True, "divisors of the training steps, from 50"),
    "ddpm": SchedulerFacts("ancestral sampling (Ho et al. 2020)", 1, True, True, "250 to the training steps"),
    "flow_euler": SchedulerFacts("Euler for flow matching (Esser et al. 2024)", 1, False, True, "50 and more"),
    "flow_heun": SchedulerFacts("Heun for flow matching", 2, False, True, "20 and more", True),
}
SCHEDULER_NAMES = tuple(name for name in CATALOGUE if not name.startswith("flow_"))
FLOW_SCHEDULER_NAMES = ("sde_dpmsolver", "dpmsolver", "dpmsolver_3m", "unipc", "flow_euler", "flow_heun")
DEFAULT_SCHEDULER = "sde_dpmsolver"  # from 8 steps: the best on trained models (docs/sampling.md)
OWN_SCHEDULER = "default"  # the name of a pipeline's own scheduler: the only one of a few-step student
DEFAULT_STEPS = 20
FEW_STEPS, FEW_STEP_SCHEDULER = 8, "dpmsolver"  # below 8 steps


def outside_stock_pipeline() -> str:
    """The names that DDPMPipeline cannot run, in a list to read."""
    names = [name for name, facts in CATALOGUE.items() if not facts.in_stock_pipeline]
    return ", ".join(names[:-1]) + f" and {names[-1]}"


def recommended_scheduler(num_inference_steps: int) -> str:
    """The scheduler for so many steps of a model without a table of its own (docs/sampling.md, "Few steps")."""
    return DEFAULT_SCHEDULER if num_inference_steps >= FEW_STEPS else FEW_STEP_SCHEDULER

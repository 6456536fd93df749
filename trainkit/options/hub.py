"""Options of what is pushed to the Hub outside a run; those of a run are `HubOptions` in training.py."""

from dataclasses import dataclass

from trainkit.options.fields import option
from trainkit.options.training import TOKEN_HELP


@dataclass
class HubDatasetOptions:
    """Hub: repository and licence of a dataset, token; see docs/hub.md"""

    hub_dataset_id: str | None = option(
        None, "dataset repository to push images to; default: the name of --output_dir"
    )
    hub_license: str | None = option(
        None, "licence of the images for the dataset card, as the Hub spells it: cc0-1.0, cc-by-4.0, mit, other, ..."
    )
    hub_token: str | None = option(None, TOKEN_HELP)
    hub_private_repo: bool = option(False, "create a private repository")

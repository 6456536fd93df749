"""The exponential moving average of the weights, by diffusers' EMAModel."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from trainkit.errors import UserError


def build_ema(options, unet: UNet2DModel, global_batch_size: int) -> EMAModel | None:
    """The EMA that `EmaOptions` describe, or None; its decay rises as 1 - (1 + step / inv_gamma) ** -power.

    A half-life in images means the same average at any batch size: decay = 0.5 ** (batch / half-life), as in the
    training loop of EDM (Karras et al. 2022).
    """
    if not options.use_ema:
        return None
    decay, half_life = options.ema_max_decay, options.ema_half_life_images
    if half_life is not None:
        if half_life <= 0:
            raise UserError(f"--ema_half_life_images {half_life} must be more than 0")
        decay = 0.5 ** (global_batch_size / half_life)
    return EMAModel(
        unet.parameters(),
        decay=decay,
        use_ema_warmup=True,
        inv_gamma=options.ema_inv_gamma,
        power=options.ema_power,
        foreach=True,
        model_cls=type(unet),
        model_config=unet.config,
    )


@contextmanager
def averaged_weights(unet: UNet2DModel, ema: EMAModel | None) -> Iterator[UNet2DModel]:
    """`unet` with the averaged weights inside the block (its own where there is no EMA), in evaluation mode."""
    training = unet.training
    unet.eval()
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    try:
        yield unet
    finally:
        if ema is not None:
            ema.restore(unet.parameters())
        unet.train(training)

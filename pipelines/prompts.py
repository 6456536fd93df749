"""Prompts as hidden states of a text encoder. Saved inside models with the pipeline.

Keep the functions: diffusers gives all models of a process the file of the first one that it loads.
"""

# B prompts, L tokens

from collections.abc import Sequence

import torch

MAX_PROMPT_LENGTH = 512  # tokens, for an encoder without a limit


def encode_prompts(
    tokenizer, text_encoder, prompts: Sequence[str], prompt_length: int | None = None, device=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (B, L, width) of a transformers encoder, and the mask (B, L) of tokens that are not padding.

    Every prompt is padded to `prompt_length` tokens (None: the encoder's limit), so its encoding does not depend on
    the others. `device` is where the encoder runs, if its weights are stored elsewhere (offloading).

    Raises:
        ValueError: a prompt has more tokens than that.
    """
    length = check_prompts(tokenizer, text_encoder, prompts, prompt_length)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    device = device or next(text_encoder.parameters()).device
    mask = tokens.attention_mask.to(device)
    with torch.no_grad():
        states = text_encoder(input_ids=tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
    return states, mask


def check_prompts(tokenizer, text_encoder, prompts: Sequence[str], prompt_length: int | None = None) -> int:
    """The tokens L that every prompt is padded to; `ValueError` for a prompt that has more."""
    positions = getattr(text_encoder.config, "max_position_embeddings", None) or MAX_PROMPT_LENGTH
    length = prompt_length or min(tokenizer.model_max_length, positions, MAX_PROMPT_LENGTH)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: {prompt!r} is not a string")
        tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if tokens > length:
            raise ValueError(f"prompt: {prompt[:40]!r} has {tokens} tokens, the model accepts {length}: shorten it")
    return length

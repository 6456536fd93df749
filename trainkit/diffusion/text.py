"""Captions are encoded once by a frozen text encoder; the last hidden states are cached as rows of float16.

B batch, L tokens, D width of the encoder, N captions.
"""

import json
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainkit.data.loading.captions import CaptionIndex, TextEncodings
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.encodings import (
    Rows,
    make_units,
    read_complete,
    unit_name,
    unit_summary,
    write_complete,
    write_rows,
)
from trainkit.data.loading.order import DropoutDraws, Purpose, sample_indices
from trainkit.diffusion.frozen import local_device, state_digest
from trainkit.errors import UserError, one_line
from trainkit.options.script import ConditionalTrainingOptions
from trainkit.terminal import Progress, say

FLAG = "--text_encoder_name_or_path"
FORMAT = 1  # increase it when the same caption and encoder would give other numbers
TEXT_FLAGS = ("text_encoder_name_or_path", "max_caption_tokens", "caption_dropout")
PROMPT_TOKENS = 77
CAPTIONS_PER_UNIT, CAPTIONS_PER_BATCH, CAPTIONS_PER_FORWARD = 4096, 256, 32
MAX_TOKENS = 512  # if neither tokenizer nor encoder has a limit (T5)


@dataclass
class TextEncoder:
    """A frozen text encoder and its tokenizer; captions are truncated at `max_tokens`."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    max_tokens: int

    @property
    def width(self) -> int:
        config = self.model.config
        return getattr(config, "hidden_size", None) or config.d_model

    def digest(self) -> str:
        """A digest of everything that the encoding of a caption depends on: weights, tokenizer, truncation."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            vocabulary = repr(sorted(self.tokenizer.get_vocab().items()))
        else:
            state = json.loads(backend.to_str())
            vocabulary = repr({key: state[key] for key in state if key not in ("padding", "truncation")})  # per call
        return state_digest(self.model, vocabulary, f"{FORMAT} {self.max_tokens} {type(self.model).__name__}")

    def lengths(self, captions: list[str]) -> list[int]:
        """The number of tokens of each caption before truncation."""
        return [len(tokens) for tokens in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    def cut(self, caption: str) -> str:
        """The longest prefix of whole words of `caption` that fits in `max_tokens`."""
        words = caption.split(" ")
        if self.lengths([caption])[0] <= self.max_tokens:
            return caption
        counts = range(1, len(words))
        fitting = bisect_right(counts, self.max_tokens, key=lambda count: self.lengths([" ".join(words[:count])])[0])
        return " ".join(words[:fitting])

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """Hidden states (L, D) float32 of each caption, without padding."""
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return [row[kept].cpu().numpy() for row, kept in zip(states, mask.bool(), strict=True)]


class TextCondition:
    """The captions of `images`, with the members of ClassCondition (trainkit/diffusion/conditioning.py).

    Encodings that `cache` does not hold yet are computed. `flag` names the images in messages.
    """

    argument, names, picture = "prompt", None, None  # argument of the pipeline; no classes, no second image

    def __init__(self, images: PreparedImages, encoder: TextEncoder, cache: Path, flag: str, dropout: float = 0.0):
        self.images, self.encoder, self.cache, self.dropout = images, encoder, cache, dropout
        self.encodings = encode_captions(images, encoder, cache, flag)

    @property
    def unet_config(self) -> dict:
        """Entries of the UNet's config for this condition."""
        return {"cross_attention_dim": self.encoder.width}

    @property
    def components(self) -> dict:
        """Components of the saved pipeline. Prompts may be longer than the captions, up to CLIP's usual length."""
        length = min(self.encoder.max_tokens, max(self.encodings.length, PROMPT_TOKENS))
        tokenizer, model = self.encoder.tokenizer, self.encoder.model
        return {"text_encoder": model, "tokenizer": tokenizer, "prompt_length": length}

    def for_images(self, images: PreparedImages) -> "TextCondition":
        """The same condition for other (held-out) `images`."""
        return TextCondition(images, self.encoder, self.cache, "--validation_data_dir")

    def inputs(self, indices: np.ndarray, draws: DropoutDraws | None = None) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` (B, L, D) float32 and `encoder_attention_mask` (B, L) bool for images (B,).

        `draws` choose one of each image's captions, or none; without them the first is used.
        """
        index, numbers = self.encodings.index, self.encodings.index.first_of(indices)
        if draws is not None:
            numbers = index.drawn(indices, draws(Purpose.CONDITION_DROPOUT), self.dropout)
        states, mask = self.encodings.gather(numbers)
        return {"encoder_hidden_states": torch.from_numpy(states), "encoder_attention_mask": torch.from_numpy(mask)}

    def example(self) -> str:
        """A condition written as an argument of the pipeline, for the model card."""
        return repr(self.pipeline_conditions(np.arange(1))[0])

    def pipeline_conditions(self, indices: np.ndarray) -> list[str]:
        """Prompts for images like those of `indices`, truncated as in training: the pipeline refuses longer ones."""
        index = self.encodings.index
        return [self.encoder.cut(caption) for caption in index.texts(index.first_of(indices))]

    def preview_conditions(self, count: int, seed: int) -> tuple[list[str], None]:
        """The captions of `count` images chosen by `seed`, for a grid with any number of columns."""
        count = min(count, len(self.images))
        return self.pipeline_conditions(sample_indices(np.arange(count), len(self.images), seed)), None


def check_text_options(options: ConditionalTrainingOptions) -> None:
    """Raise `UserError` for caption options that are missing, out of range, or given without `--condition text`."""
    if "text" not in options.condition:
        given = next((name for name in TEXT_FLAGS if getattr(options, name) is not None), None)
        if given is not None:
            raise UserError(f"--{given} {getattr(options, given)} needs --condition text")
        return
    if options.text_encoder_name_or_path is None:
        raise UserError(f"--condition text needs {FLAG}: a folder or Hub id such as openai/clip-vit-large-patch14")
    if options.caption_dropout is not None and not 0 <= options.caption_dropout < 1:
        raise UserError(f"--caption_dropout {options.caption_dropout:g} must be at least 0 and below 1")
    if options.max_caption_tokens is not None and options.max_caption_tokens < 3:
        raise UserError(f"--max_caption_tokens {options.max_caption_tokens} must be at least 3: start, one word, end")


def load_text_encoder(options: ConditionalTrainingOptions) -> TextEncoder:
    """Load the encoder of `--text_encoder_name_or_path` (CLIP, T5, BERT, ...), frozen, in float32, on the CPU.

    The folder of a saved pipeline gives the pipeline's encoder. Raises `UserError` if there is no text encoder.
    """
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

    name = options.text_encoder_name_or_path
    assert name is not None  # by check_text_options
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"{FLAG} {name}: the folder does not exist")
    inside = Path(name, "text_encoder").is_dir()
    try:
        config = AutoConfig.from_pretrained(name, subfolder="text_encoder" if inside else "")
        config = getattr(config, "text_config", config)  # CLIP also has an image encoder
        model = AutoModelForTextEncoding.from_pretrained(
            name, config=config, subfolder="text_encoder" if inside else "", dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer" if inside else "")
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = one_line(error).partition(". ")[0]
        raise UserError(
            f"{FLAG} {name} cannot be loaded ({reason}); give the folder or Hub id of a text encoder of transformers "
            "with its tokenizer"
        ) from None
    if tokenizer.pad_token is None:
        raise UserError(f"{FLAG} {name}: its tokenizer has no padding token; use an encoder such as CLIP, T5 or BERT")
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    limit = min((limit for limit in limits if limit and limit < 2**20), default=MAX_TOKENS)
    max_tokens = options.max_caption_tokens or limit
    if max_tokens > limit:
        raise UserError(f"--max_caption_tokens {max_tokens} is more than the {limit} that {name} accepts")
    tokenizer.model_max_length = max_tokens  # also in the saved pipeline
    return TextEncoder(tokenizer, model.eval().requires_grad_(False), max_tokens)


def encode_captions(images: PreparedImages, encoder: TextEncoder, cache: Path, flag: str) -> TextEncodings:
    """The encodings of all captions of `images`; those that `cache` does not hold yet are computed.

    All processes of a run may call this at the same time and share the work. `flag` names the images in messages.
    Raises `UserError`.
    """
    if not images.has_text:
        raise UserError(
            f"{flag} has no captions: put NAME.txt next to each image, or a `text` column into its metadata, and "
            "prepare it again"
        )
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", images.folder.name)[:60]
    index = CaptionIndex(images, cache / "captions" / f"{stem}-{images.fingerprint}")
    folder = cache / "text" / f"{images.fingerprint}-{encoder.digest()}"
    rows = Rows(folder, len(index), CAPTIONS_PER_UNIT)
    complete = read_complete(folder)
    if complete is None:
        complete = _encode_all(index, encoder, rows)
    cut = complete["cut"]
    truncated = f", {cut:,} of them truncated at {encoder.max_tokens} tokens" if cut else ""
    say(f"encoded captions: {folder}, {len(index) - 1:,} distinct ones{truncated}")
    return TextEncodings(index, rows, encoder.width, complete["longest"] // encoder.width)


def _encode_all(index: CaptionIndex, encoder: TextEncoder, rows: Rows) -> dict:
    encoder.model.to(local_device())
    rank = int(os.environ.get("RANK", 0))
    units = len(rows.unit_names)

    def make(number: int) -> None:
        captions = index.texts(rows.unit_rows(number))
        lengths = encoder.lengths(captions)
        batches = range(0, len(captions), CAPTIONS_PER_BATCH)
        encoded = (
            _encode_batch(encoder, captions[start:][:CAPTIONS_PER_BATCH], lengths[start:][:CAPTIONS_PER_BATCH])
            for start in batches
        )
        summary = {"cut": sum(length > encoder.max_tokens for length in lengths)}
        try:
            write_rows(rows.folder / unit_name(number), encoded, summary)
        except ValueError as error:
            raise UserError(
                f"{FLAG}: the encoder gave {error}, which the cache cannot hold; use another one"
            ) from None

    first = rank * units // max(1, int(os.environ.get("WORLD_SIZE", 1)))
    with Progress("encoding captions", len(index), "captions") as progress:  # the empty one is among them

        def show(number: int) -> None:
            progress.advance(len(rows.unit_rows(number)))

        make_units(rows.folder, rows.unit_names, make, first, show)
    encoder.model.to("cpu")
    cut = sum(unit_summary(rows.folder / name)["cut"] for name in rows.unit_names)
    complete = {"captions": len(index), "longest": rows.longest(), "cut": cut}
    write_complete(rows.folder, complete)
    return complete


def _encode_batch(encoder: TextEncoder, captions: list[str], lengths: list[int]) -> list[np.ndarray]:
    """Encode in order of length, which keeps padding short; the result is in the order of `captions`."""
    order = np.argsort(lengths, kind="stable")
    encoded: dict[int, np.ndarray] = {}
    for start in range(0, len(order), CAPTIONS_PER_FORWARD):
        places = order[start : start + CAPTIONS_PER_FORWARD].tolist()
        for place, states in zip(places, encoder.encode([captions[place] for place in places]), strict=True):
            encoded[place] = states
    return [encoded[place] for place in range(len(captions))]

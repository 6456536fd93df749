"""Captions through a frozen text encoder, once: the hidden states of its last layer, as a cache of float16 rows.

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
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainkit.data.loading.captions import CaptionIndex, TextEncodings
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.encodings import (
    Rows,
    make_units,
    read_complete,
    unit_name,
    unit_told,
    write_complete,
    write_rows,
)
from trainkit.data.loading.order import sample_indices
from trainkit.diffusion.frozen import local_device, state_digest
from trainkit.errors import UserError

FLAG = "--text_encoder_name_or_path"
FORMAT = 1  # raise it when the same caption and encoder would give other numbers
TEXT_FLAGS = ("text_encoder_name_or_path", "max_caption_tokens", "caption_dropout")
PROMPT_TOKENS = 77
CAPTIONS_A_UNIT, CAPTIONS_A_BATCH, CAPTIONS_AT_ONCE = 4096, 256, 32
MAX_TOKENS = 512  # where neither tokenizer nor encoder names a limit, as T5 does not


@dataclass
class TextEncoder:
    """A tokenizer and the encoder that goes with it, frozen; captions are cut at `max_tokens`."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    max_tokens: int

    @property
    def width(self) -> int:
        config = self.model.config
        return getattr(config, "hidden_size", None) or config.d_model

    def digest(self) -> str:
        """A name for what it makes of a caption: weights, tokenizer and where it cuts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            vocabulary = repr(sorted(self.tokenizer.get_vocab().items()))
        else:
            told = json.loads(backend.to_str())
            vocabulary = repr({key: told[key] for key in told if key not in ("padding", "truncation")})  # of a call
        return state_digest(self.model, vocabulary, f"{FORMAT} {self.max_tokens} {type(self.model).__name__}")

    def lengths(self, captions: list[str]) -> list[int]:
        """The tokens of each caption, before any is cut."""
        return [len(tokens) for tokens in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    def cut(self, caption: str) -> str:
        """As many whole words from the start of `caption` as `max_tokens` has room for, all of them where it can."""
        words = caption.split(" ")
        if self.lengths([caption])[0] <= self.max_tokens:
            return caption
        counts = range(1, len(words))
        room = bisect_right(counts, self.max_tokens, key=lambda count: self.lengths([" ".join(words[:count])])[0])
        return " ".join(words[:room])

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """Hidden states (L, D) float32 of each caption, of as many tokens as it has."""
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return [row[kept].cpu().numpy() for row, kept in zip(states, mask.bool(), strict=True)]


class TextCondition:
    """The captions of `images`, as ClassCondition tells of classes (trainkit/diffusion/conditioning.py).

    Computes their encodings in `cache` where they are not there yet; `flag` names the images in messages.
    """

    argument, names = "prompt", None  # of the pipeline; it has no classes

    def __init__(self, images: PreparedImages, encoder: TextEncoder, cache: Path, flag: str, dropout: float = 0.0):
        self.images, self.encoder, self.cache, self.dropout = images, encoder, cache, dropout
        self.encodings = encode_captions(images, encoder, cache, flag)

    @property
    def unet_config(self) -> dict:
        """What the UNet's config says of it."""
        return {"cross_attention_dim": self.encoder.width}

    @property
    def components(self) -> dict:
        """What the saved pipeline has of it. Prompts may be longer than any caption was, up to CLIP's usual length."""
        length = min(self.encoder.max_tokens, max(self.encodings.length, PROMPT_TOKENS))
        tokenizer, model = self.encoder.tokenizer, self.encoder.model
        return {"text_encoder": model, "tokenizer": tokenizer, "prompt_length": length}

    def for_images(self, images: PreparedImages) -> "TextCondition":
        """The same of other `images`, held-out ones."""
        return TextCondition(images, self.encoder, self.cache, "--validation_data_dir")

    def inputs(self, indices: np.ndarray, uniforms: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` (B, L, D) float32 and `encoder_attention_mask` (B, L) bool for images (B,).

        `uniforms` (B,) in [0, 1) draw one of each image's captions, or none; without them it is the first.
        """
        index = self.encodings.index
        numbers = index.first_of(indices) if uniforms is None else index.drawn(indices, uniforms, self.dropout)
        states, mask = self.encodings.gather(numbers)
        return {"encoder_hidden_states": torch.from_numpy(states), "encoder_attention_mask": torch.from_numpy(mask)}

    def example(self) -> str:
        """A condition as one would write it for the pipeline."""
        return repr(self.of_images(np.arange(1))[0])

    def of_images(self, indices: np.ndarray) -> list[str]:
        """What the pipeline is to be asked for, for images like those of `indices`: it refuses what training cuts."""
        index = self.encodings.index
        return [self.encoder.cut(caption) for caption in index.texts(index.first_of(indices))]

    def to_preview(self, count: int, seed: int) -> tuple[list[str], None]:
        """The captions of `count` images, always the same ones, for a grid of any columns."""
        count = min(count, len(self.images))
        return self.of_images(sample_indices(np.arange(count), len(self.images), seed)), None


def check_text_options(options) -> None:
    """Take `--caption_dropout` as `--conditioning_dropout`; raise `UserError` for what `TextOptions` cannot mean."""
    if options.condition != "text":
        given = next((name for name in TEXT_FLAGS if getattr(options, name) is not None), None)
        if given is not None:
            raise UserError(f"--{given} {getattr(options, given)} needs --condition text")
        return
    if options.text_encoder_name_or_path is None:
        raise UserError(f"--condition text needs {FLAG}: a folder or Hub id such as openai/clip-vit-large-patch14")
    if options.caption_dropout is not None:
        if not 0 <= options.caption_dropout < 1:
            raise UserError(f"--caption_dropout {options.caption_dropout:g} must be at least 0 and below 1")
        options.conditioning_dropout = options.caption_dropout
    if options.max_caption_tokens is not None and options.max_caption_tokens < 3:
        raise UserError(
            f"--max_caption_tokens {options.max_caption_tokens} must be at least 3: a start, a word, an end"
        )


def load_text_encoder(options) -> TextEncoder:
    """The encoder that `--text_encoder_name_or_path` names, frozen, float32, on the CPU: CLIP, T5, BERT or their like.

    A saved pipeline's folder gives its own. Raises `UserError` where it cannot be read or is of another kind.
    """
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

    name = options.text_encoder_name_or_path
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"{FLAG} {name}: the folder is not there")
    inside = Path(name, "text_encoder").is_dir()
    try:
        config = AutoConfig.from_pretrained(name, subfolder="text_encoder" if inside else "")
        config = getattr(config, "text_config", config)  # CLIP: an image encoder lies beside it
        model = AutoModelForTextEncoding.from_pretrained(
            name, config=config, subfolder="text_encoder" if inside else "", dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer" if inside else "")
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:300]
        raise UserError(
            f"{FLAG} {name} cannot be loaded ({reason}); give the folder or Hub id of a text encoder of transformers "
            "with its tokenizer"
        ) from None
    if tokenizer.pad_token is None:
        raise UserError(f"{FLAG} {name}: its tokenizer has no padding token; take an encoder such as CLIP, T5 or BERT")
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    limit = min((limit for limit in limits if limit and limit < 2**20), default=MAX_TOKENS)
    max_tokens = options.max_caption_tokens or limit
    if max_tokens > limit:
        raise UserError(f"--max_caption_tokens {max_tokens} is more than the {limit} that {name} can take")
    tokenizer.model_max_length = max_tokens  # and so in the saved pipeline
    return TextEncoder(tokenizer, model.eval().requires_grad_(False), max_tokens)


def encode_captions(images: PreparedImages, encoder: TextEncoder, cache: Path, flag: str) -> TextEncodings:
    """The encodings of all captions of `images`, computed in `cache` where they are not there yet.

    Every process of a run may call this at once: they share the work. `flag` names the images in messages. Raises
    `UserError`.
    """
    if not images.has_text:
        raise UserError(
            f"{flag} has no captions: put NAME.txt beside each image, or a `text` column into its metadata, and "
            "prepare it again"
        )
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", images.folder.name)[:60]
    index = CaptionIndex(images, cache / "captions" / f"{stem}-{images.fingerprint}")
    folder = cache / "text" / f"{images.fingerprint}-{encoder.digest()}"
    rows = Rows(folder, len(index), CAPTIONS_A_UNIT)
    complete = read_complete(folder)
    if complete is None:
        complete = _encode_all(index, encoder, rows)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        cut = complete["cut"]
        told = f", {cut:,} of them cut at {encoder.max_tokens} tokens" if cut else ""
        print(f"encoded captions: {folder}, {len(index) - 1:,} different ones{told}", flush=True)
    return TextEncodings(index, rows, encoder.width, complete["longest"] // encoder.width)


def _encode_all(index: CaptionIndex, encoder: TextEncoder, rows: Rows) -> dict:
    encoder.model.to(local_device())
    rank = int(os.environ.get("RANK", 0))
    units = len(rows.unit_names)

    def make(number: int) -> None:
        captions = index.texts(rows.unit_rows(number))
        lengths = encoder.lengths(captions)
        batches = range(0, len(captions), CAPTIONS_A_BATCH)
        encoded = (
            _encode_batch(encoder, captions[start:][:CAPTIONS_A_BATCH], lengths[start:][:CAPTIONS_A_BATCH])
            for start in batches
        )
        told = {"cut": sum(length > encoder.max_tokens for length in lengths)}
        try:
            write_rows(rows.folder / unit_name(number), encoded, told)
        except ValueError as error:
            raise UserError(
                f"{FLAG}: the encoder gave {error}, which the cache cannot hold; take another one"
            ) from None

    first = rank * units // max(1, int(os.environ.get("WORLD_SIZE", 1)))
    with tqdm(total=units, unit=f" x {CAPTIONS_A_UNIT} captions", disable=None if rank == 0 else True) as bar:
        make_units(rows.folder, rows.unit_names, make, first, bar.update)
    encoder.model.to("cpu")
    cut = sum(unit_told(rows.folder / name)["cut"] for name in rows.unit_names)
    complete = {"captions": len(index), "longest": rows.longest(), "cut": cut}
    write_complete(rows.folder, complete)
    return complete


def _encode_batch(encoder: TextEncoder, captions: list[str], lengths: list[int]) -> list[np.ndarray]:
    """In an order of length, so that little is padded; given back in their own."""
    order = np.argsort(lengths, kind="stable")
    encoded: list[np.ndarray] = [None] * len(captions)
    for start in range(0, len(order), CAPTIONS_AT_ONCE):
        places = order[start : start + CAPTIONS_AT_ONCE].tolist()
        for place, states in zip(places, encoder.encode([captions[place] for place in places]), strict=True):
            encoded[place] = states
    return encoded

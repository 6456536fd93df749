"""Numbers have ranges, YAML mistakes are one line, --help shows groups."""

import dataclasses
import importlib
import typing

import pytest
from source_tree import scripts

import trainkit
from trainkit.errors import UserError
from trainkit.options.fields import check_ranges
from trainkit.options.help import format_help
from trainkit.options.parsing import parse_options
from trainkit.options.script import ConditionalTrainingOptions, TrainingOptions

ALL_OPTIONS = [TrainingOptions, ConditionalTrainingOptions] + [
    importlib.import_module(script.stem).Options
    for script in scripts()
    if "class Options" in script.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("options_class", ALL_OPTIONS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_number_has_a_range_that_holds_its_default(options_class):
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        numbers = {int, float} & {hints[field.name], *typing.get_args(hints[field.name])}
        numbers |= {int, float} & {part for arg in typing.get_args(hints[field.name]) for part in typing.get_args(arg)}
        assert not numbers or field.metadata["within"], f"--{field.name} has no range"
    check_ranges(options_class())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learning_rate", "-1"], "--learning_rate -1 must be at least 0"),
        (["--learning_rate", "nan"], "--learning_rate nan must be at least 0"),
        (["--learning_rate", "inf"], "--learning_rate inf must be at least 0"),
        (["--max_train_steps", "0"], "--max_train_steps 0 must be at least 1"),
        (["--ema_max_decay", "2"], "--ema_max_decay 2 must be at least 0 and less than 1"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1 must be at least 0"),
        (["--adam_beta1", "1.5"], "--adam_beta1 1.5 must be at least 0 and less than 1"),
        (["--lr_warmup_steps", "-5"], "--lr_warmup_steps -5 must be at least 0"),
        (["--preview_steps", "-1"], "--preview_steps -1 must be at least 1"),
        (["--random_resized_crop", "0.5", "2"], "--random_resized_crop 2 must be more than 0 and at most 1"),
    ],
)
def test_numbers_outside_their_range_are_refused(words, message, tmp_path):
    with pytest.raises(UserError) as caught:
        parse_options(TrainingOptions, "", words)
    assert str(caught.value) == message
    (tmp_path / "a.yaml").write_text(f"{words[0][2:]}: {words[1] if len(words) == 2 else words[1:]}")
    with pytest.raises(UserError) as caught:
        parse_options(TrainingOptions, "", ["--config", str(tmp_path / "a.yaml")])
    assert str(caught.value).replace("[0.5, 2]", "2") == message or "must be" in str(caught.value)


def test_paths_are_expanded_and_other_words_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SET", "digits")
    (tmp_path / "a.yaml").write_text(
        "train_data_dir: ~/$SET\nbackground: ~\nhub_model_id: ~x\n".replace("background: ~\n", "")
    )
    options = parse_options(TrainingOptions, "", ["--config", str(tmp_path / "a.yaml"), "--output_dir", "~/out"])
    assert (options.train_data_dir, options.output_dir, options.hub_model_id) == (
        "/home/me/digits", "/home/me/out", "~x",
    )  # fmt: skip


@pytest.mark.parametrize(
    "content, message",
    [
        ("max_grad_norm:\n", "'max_grad_norm' has no value"),
        ("seed: 1\nseed: 2\n", "'seed' occurs twice"),
        ("random_resized_crop_aspect: [1, ~]\n", "takes a list of one or more values"),
        ("optimizer: {name: adamw}\n", "'optimizer' takes one value"),
        (b"background: caf\xe9\n", "is not YAML in UTF-8"),
    ],
)
def test_yaml_that_people_write_by_mistake(content, message, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        parse_options(TrainingOptions, "", ["--config", str(tmp_path / "a.yaml")])
    assert "\n" not in str(caught.value)
    (tmp_path / "b.yaml").write_text("\ufeffresolution:\nseed: 3\n", encoding="utf-8")
    options = parse_options(TrainingOptions, "", ["--config", str(tmp_path / "b.yaml")])
    assert options.seed == 3 and options.resolution is None


def test_one_group_of_flags_is_shown_alone(capsys):
    with pytest.raises(SystemExit):
        parse_options(TrainingOptions, "Trains.", ["--help", "optimization"])
    shown = capsys.readouterr().out
    assert "--learning_rate" in shown and "--seed" not in shown
    with pytest.raises(UserError, match="--help optimisation: the groups of flags are source, images"):
        parse_options(TrainingOptions, "Trains.", ["--help", "optimisation"])
    with pytest.raises(SystemExit):
        parse_options(TrainingOptions, "Trains.", ["--version"])
    assert capsys.readouterr().out == f"trainkit {trainkit.__version__}\n"
    for width in (60, 80, 140):
        lines = format_help(TrainingOptions, "Trains.", width=width).splitlines()
        assert max(map(len, lines)) <= max(width, 100)


@pytest.mark.parametrize(
    "words",
    ["--validation_fraction=1", "--validation_fraction=-0.1", "--near_distance=17", "--max_rejected_fraction=1.5"],
)
def test_filters_have_ranges(words):
    with pytest.raises(UserError, match=f"^{words.replace('=', ' ')} must be"):
        parse_options(importlib.import_module("prepare_dataset").Options, "", [words])

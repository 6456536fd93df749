"""Options: dataclass -> command line -> YAML, and what every script's --help promises."""

import ast
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from functools import cache

import pytest
import yaml as pyyaml
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from source_tree import ROOT, modules, reachable, scripts

from trainkit.errors import UserError
from trainkit.options.distillation import DistillationOptions
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options
from trainkit.options.script import ConditionalTrainingOptions, TrainingOptions

HEAVY = {"torch", "diffusers", "transformers", "datasets", "pandas", "matplotlib"}


@dataclass
class ModelGroup:
    """model: what is trained"""

    depth: int = option(4, "layers")
    widths: list[int] = option([8, 16], "channels of each level", nargs="+")
    kind: str = option("small", "preset", choices=("small", "large"))


@dataclass
class RunGroup:
    """run: how it is trained"""

    learning_rate: float = option(1e-3, "step size")
    max_steps: int | None = option(None, "optimizer steps, 100% of them")
    use_ema: bool = option(True, "average the weights")
    flip: bool = option(False, "mirror")
    name: str | None = option(None, "name of the run")


@dataclass
class Options(ModelGroup, RunGroup):
    pass


def parse(*words, yaml=None, tmp_path=None) -> Options:
    if yaml is not None:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml)
        words = ("--config", str(file), *words)
    return parse_options(Options, "A script.", [str(word) for word in words])


def test_defaults_hold_and_lists_are_not_shared():
    first, second = parse(), parse()
    assert first == Options(
        depth=4, widths=[8, 16], kind="small", learning_rate=1e-3, max_steps=None, use_ema=True, flip=False, name=None
    )
    first.widths.append(32)
    assert second.widths == [8, 16] and parse().widths == [8, 16]


ANY_OPTIONS = st.builds(
    Options, depth=st.integers(), widths=st.lists(st.integers(), min_size=1, max_size=5),
    kind=st.sampled_from(["small", "large"]), learning_rate=st.floats(allow_nan=False, allow_infinity=False),
    max_steps=st.none() | st.integers(), use_ema=st.booleans(), flip=st.booleans(),
    name=st.none() | st.text("a0.e1~$:# -'\"{}[]|>&*!%@\\\n\té\u2028", max_size=9),
)  # fmt: skip


@given(ANY_OPTIONS)
def test_options_written_as_yaml_are_read_back(tmp_path, options):
    assert parse(yaml=pyyaml.safe_dump(asdict(options)), tmp_path=tmp_path) == options


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    options = parse("--depth", 9, yaml="depth: 7\nkind: large\n", tmp_path=tmp_path)
    assert (options.depth, options.kind, options.learning_rate) == (9, "large", 1e-3)
    assert parse("--use_ema", yaml="use_ema: false", tmp_path=tmp_path).use_ema is True
    assert parse("--config=" + str(tmp_path / "recipe.yaml")).use_ema is False


def test_a_later_recipe_wins_over_an_earlier_one(tmp_path):
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("depth: 7\nkind: large\n")
    files[1].write_text("depth: 8\n")
    for words in (("--config", *files), ("--config", files[0], "--depth", 8, "--config", files[1])):
        options = parse(*words)
        assert (options.depth, options.kind) == (8, "large")
    assert parse("--config", files[1], files[0]).depth == 7


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4", "'1e-4'"])
def test_yaml_floats_are_floats_however_they_are_written(tmp_path, text):
    assert parse(yaml=f"learning_rate: {text}", tmp_path=tmp_path).learning_rate == 1e-4


def test_yaml_takes_each_flags_own_type(tmp_path):
    yaml = "learning_rate: 1\nmax_steps: 1e6\nwidths: [32, 64]\nflip: yes\nuse_ema: 'off'\nname: 12\n"
    options = parse(yaml=yaml, tmp_path=tmp_path)
    assert options == Options(
        learning_rate=1.0, max_steps=1_000_000, widths=[32, 64], flip=True, use_ema=False, name="12"
    )
    assert isinstance(options.learning_rate, float) and isinstance(options.max_steps, int)
    assert parse(yaml="max_steps: null", tmp_path=tmp_path).max_steps is None
    assert parse(yaml="", tmp_path=tmp_path) == Options()


def test_lists_whole_numbers_and_choices_on_the_command_line():
    options = parse("--widths", 1, 2, 3, "--max_steps", "2e3", "--kind", "large")
    assert (options.widths, options.max_steps, options.kind) == ([1, 2, 3], 2000, "large")


@pytest.mark.parametrize(
    "words, expected",
    [
        ((), False),
        (("--flip",), True),
        (("--no_flip",), False),
        (("--flip", "true"), True),
        (("--flip", "False"), False),
        (("--no_flip", "false"), True),
        (("--flip", "--no_flip"), False),
    ],
)
def test_switches(words, expected):
    assert parse(*words).flip is expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lerning_rate", "1"], "unknown argument --lerning_rate: did you mean --learning_rate?"),
        (["--learning", "1"], "unknown argument --learning"),  # no abbreviations: a later flag could take them over
        (["--lr", "1"], "unknown argument --lr: did you mean --learning_rate?"),
        (["--steps", "1"], "unknown argument --steps: did you mean"),
        (["--lr", "1", "--dept", "2"], "--lr: did you mean --learning_rate?; --dept: did you mean --depth?"),
        (["--qqqq"], "unknown argument --qqqq (see --help)"),
        (["photos"], "unknown argument photos"),
        (["--kind", "medium"], "--kind"),
        (["--depth", "1.5"], "'1.5' is not a whole number"),
        (["--depth"], "--depth"),
        (["--flip", "maybe"], "'maybe' is neither true nor false"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("lerning_rate: 1", "unknown key 'lerning_rate': did you mean learning_rate?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("kind: medium", "'kind'"),
        ("depth: deep", "'deep' is not a whole number"),
        ("depth: [1, 2]", "'depth' takes one value"),
        ("widths: {a: 8}", "'widths' takes a list"),
        ("- depth", "must consist of lines of the form 'flag: value'"),
        ("depth: [1", "is not YAML"),
    ],
)
def test_mistakes_in_yaml_name_the_file_and_the_key(tmp_path, yaml, message):
    with pytest.raises(UserError) as caught:
        parse(yaml=yaml, tmp_path=tmp_path)
    assert message in str(caught.value) and "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_in_all_yaml_files_are_reported_at_once(tmp_path):
    from train_unconditional import Options as TrainOptions

    (tmp_path / "a.yaml").write_text("lr: 1\noptimizer: sgd\nnum_epochs: 0\nseed: 3\n")
    (tmp_path / "b.yaml").write_text("output: x\n")
    with pytest.raises(UserError) as caught:
        parse_options(TrainOptions, "", ["--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    message = str(caught.value)
    for part in (
        "a.yaml: unknown key 'lr': did you mean learning_rate?; 'optimizer': 'sgd' is none of",
        "; 'num_epochs' 0 must be at least 1; --config ", "b.yaml: unknown key 'output': did you mean output_dir?",
    ):  # fmt: skip
        assert part in message
    assert "seed" not in message and "\n" not in message


def test_other_names_lead_to_flags_of_the_scripts():
    """Each of the names is suggested for a flag that some script has, and is itself a flag of none that has it."""
    from distill import DistillationOptions
    from evaluate_samples import Options as EvaluateOptions
    from sample import Options as SampleOptions
    from trainkit.options.script import ConditionalTrainingOptions
    from trainkit.options.suggestions import OTHER_NAMES, suggestion

    classes = (ConditionalTrainingOptions, DistillationOptions, SampleOptions, EvaluateOptions)
    known = {f"--{field.name}" for options in classes for field in fields(options)}
    for names, flags in OTHER_NAMES.items():
        assert any(f"--{flag}" in known for flag in flags), flags
        assert suggestion(f"--{names[0]}", known).startswith(": did you mean --")
    assert suggestion("--batch-size", ["--train_batch_size", "--seed"]) == ": did you mean --train_batch_size?"


def test_help_shows_groups_units_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("model: what is trained", "run: how it is trained", "small|large", "100% of them", "(default: 4)"):
        assert part in shown
    assert shown.index("--depth") < shown.index("--learning_rate")


@pytest.mark.parametrize("script", scripts(), ids=lambda file: file.name)
def test_help_answers_at_once_and_without_torch(script):
    """Under two seconds of processor time, which a busy machine does not stretch as it does the clock's."""
    done, seconds = _help(script)
    assert done.returncode == 0, done.stderr
    assert "Exit status: 0: done" in done.stdout
    assert seconds < 2
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "trainkit" in loaded and not loaded & HEAVY


@pytest.mark.parametrize("script", scripts(), ids=lambda file: file.name)
def test_every_flag_is_read(script):
    """A flag that nothing reads is a mistake: code that the script reaches must read each from `options`."""
    shown = _help(script)[0].stdout
    flags = set(re.findall(r"^  --([a-z]\w*)", shown, re.MULTILINE)) - {"help", "config"}
    read = set()
    for module in reachable(script.stem):
        read |= _attributes_of_options(modules()[module].read_text())
    assert flags and not flags - read


@pytest.mark.parametrize("script", scripts(), ids=lambda file: file.name)
def test_an_unknown_flag_is_one_line_and_status_1(script):
    done = _run(script, "--resolutoin_", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown argument --resolutoin_") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_says_how_to_run_it(recipe):
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert any(script.name in head for script in scripts()) and f"recipes/{recipe.name}" in head
    assert "Measured" in head or "not run" in head or "benchmarks/results.md" in head, "how the figures were obtained"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_the_command_of_every_recipe_is_accepted_and_builds_its_model(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    head = "".join(line[1:] for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    commands = re.findall(r"accelerate launch .*?(\w+)\.py (.*?[^\\])\n", head.replace("\\\n", " "), re.DOTALL)
    script, arguments = next(found for found in commands if f"recipes/{recipe.name}" in found[1])
    options_class = {"train_conditional": ConditionalTrainingOptions, "distill": DistillationOptions}
    words = shlex.split(re.sub(r'"\$\(.*?\)"', "encoder", arguments))
    options = parse_options(options_class.get(script, TrainingOptions), "", words)
    if script == "distill":
        return
    from trainkit.training.start import check_options, resolve_options

    options.output_dir = str(tmp_path / "out")
    if options.vae_name_or_path is not None:  # one of as many latent channels, which is not on the Hub
        stages = 3 if options.resolution == "32" else 4
        AutoencoderKL(
            in_channels=len(options.image_mode or "RGB"), out_channels=len(options.image_mode or "RGB"),
            down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=(4,) * stages, norm_num_groups=4, latent_channels=4,
        ).save_pretrained(tmp_path / "vae")  # fmt: skip
        options.vae_name_or_path = str(tmp_path / "vae")
    check_options(resolve_options(options))  # builds the UNet on the meta device


def _run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@cache
def _help(script):
    """What `script --help` prints, with every import on stderr, and its seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _run("-X", "importtime", script, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@cache
def _attributes_of_options(source: str) -> set[str]:
    """Names x read as `options.x` or `self.options.x` (not assigned)."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and getattr(node.value, "id", getattr(node.value, "attr", None)) == "options"
    }


def test_commands_published_for_diffusers_example_run_unchanged():
    """Every flag of diffusers' train_unconditional.py 0.42 parses, with its values as its README writes them."""
    from train_unconditional import Options as TrainOptions

    command = """
        --dataset_name huggan/flowers-102-categories --dataset_config_name default
        --model_config_name_or_path google/ddpm-cifar10-32 --train_data_dir photos --output_dir ddpm-ema-flowers-64
        --overwrite_output_dir --cache_dir cache --resolution=64 --center_crop --random_flip --train_batch_size=16
        --eval_batch_size 16 --dataloader_num_workers 0 --num_epochs=100 --save_images_epochs 10
        --save_model_epochs 10 --gradient_accumulation_steps=1 --learning_rate=1e-4 --lr_scheduler cosine
        --lr_warmup_steps=500 --adam_beta1 0.95 --adam_beta2 0.999 --adam_weight_decay 1e-6 --adam_epsilon 1e-08
        --use_ema --ema_inv_gamma 1.0 --ema_power 0.75 --ema_max_decay 0.9999 --push_to_hub --hub_token token
        --hub_model_id me/flowers --hub_private_repo --logger wandb --logging_dir logs --local_rank -1
        --mixed_precision=no --prediction_type sample --ddpm_num_steps 1000 --ddpm_num_inference_steps 1000
        --ddpm_beta_schedule linear --checkpointing_steps 500 --checkpoints_total_limit 3
        --resume_from_checkpoint latest --enable_xformers_memory_efficient_attention --preserve_input_precision
    """
    options = parse_options(TrainOptions, "", command.split())
    assert (options.resolution, options.num_epochs, options.learning_rate) == ("64", 100, 1e-4)
    assert options.push_to_hub and options.use_ema and options.preserve_input_precision
    assert options.hub_model_id == "me/flowers" and options.local_rank == -1 and options.checkpoints_total_limit == 3


def test_a_bare_no_in_a_recipe_is_the_word_where_a_flag_has_it(tmp_path):
    from train_unconditional import Options as TrainOptions

    (tmp_path / "recipe.yaml").write_text("mixed_precision: no\nchannels_last: yes\nuse_ema: no\n")
    options = parse_options(TrainOptions, "", ["--config", str(tmp_path / "recipe.yaml")])
    assert (options.mixed_precision, options.channels_last, options.use_ema) == ("no", "yes", False)


def test_the_example_s_defaults_come_back_as_a_recipe():
    from train_unconditional import Options as TrainOptions

    ours = parse_options(TrainOptions, "", [])
    theirs = parse_options(TrainOptions, "", ["--config", str(ROOT / "recipes" / "diffusers_defaults.yaml")])
    assert (theirs.prediction_type, theirs.ddpm_beta_schedule, theirs.ddpm_num_steps) == ("epsilon", "linear", 1000)
    assert (theirs.optimizer, theirs.learning_rate, theirs.lr_scheduler) == ("adamw", 1e-4, "cosine")
    assert (theirs.lr_warmup_steps, theirs.train_batch_size, theirs.num_epochs) == (500, 16, 100)
    assert (theirs.adam_beta1, theirs.adam_beta2, theirs.adam_weight_decay) == (0.95, 0.999, 1e-6)
    assert (theirs.ema_inv_gamma, theirs.ema_power, theirs.ema_max_decay) == (1.0, 0.75, 0.9999)
    assert theirs.ddpm_num_inference_steps == 1000
    assert ours.prediction_type != theirs.prediction_type and ours.optimizer != theirs.optimizer

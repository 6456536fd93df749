"""Power-function averages: their closed forms, their snapshots, and any length reconstructed from these."""

import json
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conditional_helpers import vector_unet
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_helpers import run_in_process, same_training_state, same_weights, tiny_run

import reconstruct_ema
from trainkit.diffusion.power_profiles import LONGEST, combination, gamma_of, inner_products, sigma_rel_of
from trainkit.errors import UserError
from trainkit.sampling.generate import generate
from trainkit.sampling.load import load_pipeline
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline
from trainkit.sampling.schedulers import load_scheduler
from trainkit.training.averages.post_hoc import Snapshots
from trainkit.training.averages.power_ema import PowerAverage, PowerAverages, snapshot_file, snapshot_files

RUN = {
    "max_train_steps": 12,
    "checkpointing_steps": 4,
    "ema_power_lengths": [0.05, 0.08, 0.1],
    "ema_snapshot_steps": 5,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights_of_states(step: int, gamma: float) -> np.ndarray:
    """What each of the states 1 to `step` weighs in the average, (step,): the integral of its profile over them."""
    edges = (np.arange(step + 1) / step) ** (gamma + 1)
    return np.diff(edges)


@pytest.fixture(scope="module")
def train(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """Run train_unconditional.py in this process; returns its output folder."""

    def call(output_dir=None, **flags):
        output_dir = output_dir or tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            words = tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **(RUN | flags))
            run_in_process(patch, "train_unconditional", words)
        return output_dir

    return call


@pytest.fixture(scope="module")
def run(train):
    return train()


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.25, 0.72)])
def test_exponents_of_relative_lengths(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)
    rng = np.random.default_rng(0)
    times = rng.beta(gamma_of(sigma_rel) + 1, 1, 200_000)  # the distribution of the weights of the average
    assert times.std() == pytest.approx(sigma_rel, rel=0.02)


def test_lengths_that_no_power_has():
    assert gamma_of(LONGEST) == pytest.approx(0, abs=1e-6)
    for sigma_rel in (0, -0.1, 0.3, float("nan")):
        with pytest.raises(ValueError, match="must be more than 0 and at most 0.289"):
            gamma_of(sigma_rel)


def test_a_tracked_average_is_the_weighted_sum_of_all_states():
    model = torch.nn.Linear(3, 2)
    average, states = PowerAverage(model, 0.1), []
    for step in range(1, 31):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        states.append(model.weight.detach().double().numpy().copy())
        average.step()
        expected = np.tensordot(weights_of_states(step, gamma_of(0.1)), states, 1)
        np.testing.assert_allclose(average.full_weights()["weight"], expected, atol=1e-5)


def test_inner_products_are_integrals():
    steps, gammas = np.array([40, 100, 100]), np.array([2.0, 0.5, 17.0])
    grid = (np.arange(200_000) + 0.5) / 2000  # tau
    profiles = [np.where(grid < t, (g + 1) * (grid / t) ** g / t, 0) for t, g in zip(steps, gammas, strict=True)]
    expected = [[np.sum(one * other) / 2000 for other in profiles] for one in profiles]
    np.testing.assert_allclose(inner_products(steps, gammas, steps, gammas), expected, rtol=1e-3)
    assert np.isfinite(inner_products([10**9], [5000.0], [10**6], [5000.0])).all()


@pytest.mark.parametrize("wanted", [0.05, 0.08, 0.12, 0.15])
def test_a_third_length_from_two(wanted):
    """20 snapshots of 2 lengths, of weights that walk: within 0.1 % of what the averaging moves them by."""
    rng = np.random.default_rng(0)
    states = 5 + np.cumsum(rng.normal(size=(2000, 50)), axis=0) * 1e-3
    steps = np.repeat(np.arange(100, 2001, 100), 2)
    gammas = np.tile([gamma_of(0.05), gamma_of(0.1)], 20)
    pairs = zip(steps, gammas, strict=True)
    snapshots = [weights_of_states(step, gamma) @ states[:step] for step, gamma in pairs]
    coefficients, missing = combination(steps, gammas, 2000, gamma_of(wanted))
    tracked = weights_of_states(2000, gamma_of(wanted)) @ states
    assert coefficients.sum() == pytest.approx(1, abs=1e-9) and missing < 0.01
    error = np.linalg.norm(coefficients @ snapshots - tracked) / np.linalg.norm(tracked - states[-1])
    assert error < 1e-3


def distance(one, other=None):
    """The norm of the difference of two state dicts, or of one."""
    parts = (value.double() - (0 if other is None else other[name].double()) for name, value in one.items())
    return sum(part.square().sum() for part in parts).sqrt()


def same_run(one, other):
    """Assert that two runs have left the same last checkpoint and snapshots, bit for bit."""
    same_training_state(one / "checkpoint-12", other / "checkpoint-12")
    for sigma_rel in ("0.05", "0.08", "0.1"):
        file = f"checkpoint-12/unet_ema_{sigma_rel}/{WEIGHTS}"
        same_weights(one / file, other / file)
    names = [[path.name for path in snapshot_files(folder)] for folder in (one, other)]
    assert names[0] == names[1]
    assert {path.name for path in (other / "ema_snapshots").iterdir()} == set(names[1]), "and nothing else"
    for name in names[0]:
        same_weights(one / "ema_snapshots" / name, other / "ema_snapshots" / name)


@pytest.mark.slow
def test_a_run_leaves_snapshots_of_its_averages(run):
    files = snapshot_files(run)
    assert list(files) == [snapshot_file(run, step, length) for step in (5, 10, 12) for length in (0.05, 0.08, 0.1)]
    with safe_open(snapshot_file(run, 12, 0.05), "pt") as snapshot:
        metadata = snapshot.metadata()
    assert (metadata["step"], metadata["sigma_rel"], metadata["images"], metadata["global_batch_size"]) == (
        "12",
        "0.05",
        "96",
        "8",
    )
    assert json.loads(metadata["config"])["_class_name"] == "UNet2DModel"
    saved = load_file(run / "checkpoint-12" / "unet_ema_0.05" / WEIGHTS)
    found = load_file(snapshot_file(run, 12, 0.05))
    assert found.keys() == saved.keys() and {value.dtype for value in found.values()} == {torch.float16}
    assert all(torch.equal(value, saved[name].half()) for name, value in found.items())
    shorter, longer = (load_file(snapshot_file(run, 12, length))["conv_in.weight"] for length in (0.05, 0.1))
    assert not torch.equal(shorter, longer)


@pytest.mark.slow
def test_averages_and_snapshots_are_resumed_bit_for_bit(run, train, tmp_path, capsys):
    """From step 4, over the later snapshots of the run that is resumed, a stray one and one half written."""
    shutil.copytree(run, tmp_path / "again")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    snapshot_file(tmp_path / "again", 11, 0.05).write_bytes(b"of another run")
    (tmp_path / "again" / "ema_snapshots" / ".tmp-step-5-sigma_rel-0.05.safetensors").write_bytes(b"cut")
    train(tmp_path / "again", resume_from_checkpoint="latest")
    assert "4 of 12 steps done" in capsys.readouterr().out
    same_run(run, tmp_path / "again")
    with pytest.raises(UserError, match="checkpoint-12 tracks 0.05 0.08 0.1.*: use --ema_power_lengths 0.05 0.08 0.1"):
        train(tmp_path / "again", resume_from_checkpoint="latest", ema_power_lengths=[0.05])
    snapshot_file(tmp_path / "again", 12, 0.05).unlink()  # killed between the checkpoint and the snapshot
    train(tmp_path / "again", resume_from_checkpoint="latest", async_checkpointing="false")
    same_run(run, tmp_path / "again")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ema_power_lengths": [0.4]}, "--ema_power_lengths 0.4 must be more than 0 and at most 0.289"),
        ({"ema_power_lengths": [0.1, 0.1]}, "--ema_power_lengths 0.1 0.1 lists a length twice"),
        (
            {"ema_snapshot_steps": None},
            "--ema_power_lengths also needs the other flag, .* --ema_snapshot",
        ),
        (
            {"ema_power_lengths": None},
            "--ema_snapshot_steps also needs the other flag, .* --ema_power_le",
        ),
        ({"ema_snapshot_steps": 0}, "--ema_snapshot_steps 0 must be at least 1"),
        (
            {"optimizer": "schedule_free_adamw", "no_use_ema": True, "lr_scheduler": "constant_with_warmup"},
            "remove --ema_power_lengths",
        ),
    ],
)
def test_averages_that_cannot_be_are_refused(train, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def reconstruct(tmp_path, monkeypatch):
    """reconstruct_ema.py in this process; returns the folder that it made."""

    def call(model_dir, name="made", **flags):
        words = ["reconstruct_ema.py", "--model_dir", str(model_dir), "--output_dir", str(tmp_path / name)]
        for flag, value in ({"cpu_threads": 1} | flags).items():
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        monkeypatch.setattr(sys, "argv", words)
        reconstruct_ema.main()
        return tmp_path / name

    return call


@pytest.fixture
def two_lengths(run, tmp_path):
    """The run without its snapshots of the third length, which its last checkpoint holds."""
    shutil.copytree(run, tmp_path / "two", ignore=shutil.ignore_patterns("*0.08.safetensors", "checkpoint-*"))
    return tmp_path / "two"


@pytest.mark.slow
def test_an_average_that_was_not_written_down(run, two_lengths, reconstruct, capsys):
    """It is the tracked one, as far as float16 goes; twelve steps do not move weights by more."""
    made = reconstruct(two_lengths, sigma_rel=0.08)
    assert "the average of sigma_rel 0.08 at step 12, from 6 snapshots, which miss 1.84% of" in capsys.readouterr().out
    tracked, found = load_file(run / "checkpoint-12" / "unet_ema_0.08" / WEIGHTS), load_file(made / "unet" / WEIGHTS)
    assert found.keys() == tracked.keys() and {value.dtype for value in found.values()} == {torch.float32}
    assert distance(found, tracked) < 3e-4 * distance(tracked)
    pipeline = DDPMPipeline.from_pretrained(made)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    parts = {path.name for path in made.iterdir()}
    assert parts == {
        "model_index.json", "unet", "scheduler", "schedulers", "README.md", "reconstruction.json", "unconditional.py",
    }  # fmt: skip
    assert "sigma_rel 0.08 at step 12" in (made / "README.md").read_text()
    record = json.loads((made / "reconstruction.json").read_text())
    assert sum(record["coefficients"].values()) == pytest.approx(1) and len(record["coefficients"]) == 6


@pytest.mark.slow
def test_an_earlier_step(run, reconstruct):
    """Of a length that is tracked: its own snapshot."""
    made = reconstruct(run, sigma_rel=0.1, step=10)
    found, snapshot = load_file(made / "unet" / WEIGHTS), load_file(snapshot_file(run, 10, 0.1))
    torch.testing.assert_close(found, {name: value.float() for name, value in snapshot.items()}, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_the_best_length_by_score(two_lengths, reconstruct, image_folder, capsys):
    flags = {"sigma_rel": "auto", "reference": image_folder / "round", "lengths": [0.1, 0.06], "num_images": 6}
    made = reconstruct(two_lengths, num_inference_steps=2, **flags)
    record = json.loads((made / "reconstruction.json").read_text())
    rows = record["scores"]
    assert [row["sigma_rel"] for row in rows] == [0.06, 0.1] and rows[0]["kid"] != rows[1]["kid"]
    assert record["sigma_rel"] == min(rows, key=lambda row: row["kid"])["sigma_rel"]
    output = capsys.readouterr().out
    assert f"{rows[0]['kid']:9.4g}" in output and "6 samples at each length, 18 reference images" in output
    again = reconstruct(two_lengths, "again", sigma_rel=record["sigma_rel"])
    same_weights(made / "unet" / WEIGHTS, again / "unet" / WEIGHTS)


@pytest.mark.slow
def test_weights_and_the_embedding_of_vectors_as_if_tracked(tmp_path, reconstruct):
    """Of weights that walk far, from two other lengths: within 0.5 % of what the averaging moves them by."""
    torch.manual_seed(0)
    unet, run = vector_unet(), tmp_path / "run"
    run.mkdir()
    options = SimpleNamespace(
        output_dir=run, ema_power_lengths=[0.05, 0.08, 0.1], ema_snapshot_steps=2, async_checkpointing=True
    )
    main = SimpleNamespace(is_main_process=True)
    averages = PowerAverages(options, main, unet, 8, 24, [], lambda what: nullcontext())
    for step in range(1, 25):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        averages.step()
        averages.snapshot(step)
    averages.close()
    for step in range(2, 25, 2):
        snapshot_file(run, step, 0.08).unlink()
    save_pipeline(run, conditional_pipeline(unet, DDPMScheduler()), "card")
    made_in = reconstruct(run, sigma_rel=0.08)
    made = load_pipeline(made_in, load_scheduler(run, None))
    found = {f"class_embedding.{name}": value for name, value in made.vector_embedding.state_dict().items()}
    found |= made.unet.state_dict()
    tracked = averages.by_folder["unet_ema_0.08"].full_weights()
    assert found.keys() == tracked.keys()
    assert distance(found, tracked) < 0.005 * distance(unet.state_dict(), tracked)
    assert torch.equal(found["class_embedding.std"], unet.class_embedding.std)

    np.save(tmp_path / "vectors.npy", np.eye(3))  # what is scored is what is saved
    options = reconstruct_ema.Options(vectors_file=str(tmp_path / "vectors.npy"), num_images=3, num_inference_steps=2)
    coefficients = Snapshots(run).coefficients(0.08)[0]
    images = reconstruct_ema.Sampler(options, run, torch.device("cpu")).samples(Snapshots(run), coefficients)
    assert np.array_equal(images, np.concatenate(list(generate(made, range(3), 2, 3, np.eye(3)))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sigma_rel": 0.25}, "--sigma_rel 0.25: 6 snapshots up to step 12 miss 55% .* use 0.035 to 0.145"),
        ({"sigma_rel": 0.5}, "--sigma_rel 0.5 must be more than 0 and at most 0.289"),
        ({"sigma_rel": "long"}, "--sigma_rel long must be a number such as 0.08, or auto"),
        ({"sigma_rel": 0.1, "step": 7}, "--step 7: .* has snapshots of steps 5, 10, 12"),
        ({"sigma_rel": "auto"}, "--reference is missing"),
        ({"sigma_rel": 0.1, "output_dir": "."}, "--output_dir . is there already"),
    ],
)
def test_what_cannot_be_reconstructed_is_told(two_lengths, reconstruct, flags, message):
    with pytest.raises(UserError, match=message):
        reconstruct(two_lengths, **flags)


@pytest.mark.slow
def test_damaged_snapshots_are_named(two_lengths, reconstruct, tmp_path):
    file = snapshot_file(two_lengths, 5, 0.1)
    whole = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="step-5-sigma_rel-0.1.safetensors is truncated or damaged"):
        reconstruct(two_lengths, sigma_rel=0.1)
    save_file(whole | {"conv_in.bias": torch.zeros(5)}, file, metadata)
    with pytest.raises(UserError, match="step-5-sigma_rel-0.1.safetensors .* different models .conv_in.bias"):
        reconstruct(two_lengths, sigma_rel=0.1)
    save_file(whole, file, metadata)
    (two_lengths / "unet").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="--model_dir .*no unet/config.json there"):
        reconstruct(two_lengths, sigma_rel=0.1)
    shutil.rmtree(two_lengths / "ema_snapshots")
    with pytest.raises(UserError, match="--model_dir nowhere is not a folder"):
        reconstruct("nowhere", sigma_rel=0.1)
    with pytest.raises(UserError, match="holds no ema_snapshots: train with --ema_power_lengths"):
        reconstruct(two_lengths, sigma_rel=0.1)
    assert not (tmp_path / "made").exists()

"""`--find_learning_rate`: what it suggests, what it leaves behind, what it refuses."""

import json

import numpy as np
import pytest
from training_helpers import losses, run_in_process, same_weights, tiny_run

from trainkit.errors import UserError
from trainkit.training import learning_rate_finder as learning_rate
from trainkit.training.learning_rate_finder import FILE, suggested_rate

RATES = np.geomspace(1e-6, 1, 121).tolist()
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_the_smallest_rate_near_the_lowest_loss_is_suggested():
    curve = [0.1 + 0.9 / (1 + (rate / 1e-3) ** 2) for rate in RATES]  # flat from 4e-3 on
    assert suggested_rate(RATES, curve) == pytest.approx(4e-3)
    lucky = list(curve)
    lucky[20] = 0.01  # one step is not a minimum
    assert suggested_rate(RATES, lucky) == pytest.approx(4e-3)
    assert suggested_rate(RATES[:85], [*curve[:84], float("nan")]) == pytest.approx(4e-3)  # failed at 1.6e-2


def test_noise_in_the_flat_part_of_the_curve_does_not_move_the_suggestion():
    curve = np.array([0.1 + 0.9 / (1 + (rate / 1e-3) ** 2) for rate in RATES])
    noisy = [curve * np.random.default_rng(seed).uniform(0.8, 1.25, len(curve)) for seed in range(20)]
    suggested = [suggested_rate(RATES, losses.tolist()) for losses in noisy]
    assert max(suggested) <= 2 * min(suggested)


def test_a_loss_that_never_falls_is_said():
    with pytest.raises(UserError, match="--find_learning_rate: the loss .* fell at no rate") as refusal:
        suggested_rate(RATES, [1.0 + rate for rate in RATES])
    assert "\n" not in str(refusal.value)


@pytest.mark.slow(6)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_search_finds_a_rate_and_leaves_the_run_as_it_was(
    image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch, capsys, accumulation
):

    monkeypatch.setattr(learning_rate, "STEPS", 20)

    def train(name, **flags):
        flags |= {"max_train_steps": 2, "gradient_accumulation_steps": accumulation}
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / name, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)
        return tmp_path / name

    searched = train("searched", find_learning_rate=True)
    found = json.loads((searched / FILE).read_text())
    assert sorted(path.name for path in searched.iterdir()) == [".trainkit", FILE, "learning_rate.png"]
    assert f"--learning_rate {found['learning_rate']:.2g} is a good start" in capsys.readouterr().out
    assert len(found["rates"]) == len(found["losses"]) and found["rates"] == sorted(found["rates"])
    assert 1e-5 < found["learning_rate"] < max(found["rates"])
    assert min(found["losses"]) < 0.9 * found["losses"][0]  # it did train while it searched
    train("searched")
    plain = train("plain")
    assert losses(searched) == losses(plain)
    same_weights(searched / WEIGHTS, plain / WEIGHTS)


def test_prodigy_needs_no_search(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):

    flags = {"find_learning_rate": True, "optimizer": "prodigy", "learning_rate": 1}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, **flags)
    with pytest.raises(UserError, match="--optimizer prodigy finds the rate itself"):
        run_in_process(monkeypatch, "train_unconditional", arguments)

"""The arithmetic of students, with a teacher that knows the exact denoiser of a mixture of two Gaussians."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from conditional_helpers import UNET
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from trainkit.data.loading.loader import Batch
from trainkit.diffusion import few_step
from trainkit.diffusion.consistency import NoiseLevels, consistency_losses, neighbour
from trainkit.diffusion.distillation import StepGrid, Teacher, progressive_losses, progressive_target, to_images
from trainkit.diffusion.noise_schedule import prediction_type_of

MEANS, DEVIATION = torch.tensor([-0.6, 0.5]), 0.1
CPU = torch.device("cpu")
SCHEDULES = [
    DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
    DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    DDPMScheduler(prediction_type="epsilon"),
    FlowMatchEulerDiscreteScheduler(),
]
each_schedule = pytest.mark.parametrize("noise_scheduler", SCHEDULES, ids=prediction_type_of)


def denoised(noisy, alpha, sigma):
    """E[image | alpha image + sigma noise] of the mixture."""
    alpha, sigma = alpha[..., None], sigma[..., None]
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    distance = noisy[..., None] - alpha * MEANS
    posterior = torch.softmax(-(distance**2) / (2 * variance), dim=-1)
    return (posterior * (MEANS + alpha * DEVIATION**2 / variance * distance)).sum(-1)


class ExactUNet(torch.nn.Module):
    """Predicts what a teacher of `noise_scheduler` with the exact denoiser would."""

    def __init__(self, noise_scheduler):
        super().__init__()
        self.kind = prediction_type_of(noise_scheduler)
        self.alphas_cumprod = few_step.student_schedule(noise_scheduler).float()

    def forward(self, noisy, timesteps):
        alpha, sigma = (
            level[timesteps][:, None, None, None]
            for level in (self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
        )
        if self.kind == "flow_prediction":  # its own mixture (1 - t) image + t noise
            alpha, sigma = alpha / (alpha + sigma), sigma / (alpha + sigma)
        image = denoised(noisy, alpha, sigma)
        noise = (noisy - alpha * image) / sigma
        found = {"sample": image, "epsilon": noise, "v_prediction": alpha * noise - sigma * image}
        return SimpleNamespace(sample=(found | {"flow_prediction": noise - image})[self.kind])


def teacher_of(noise_scheduler):
    kind = prediction_type_of(noise_scheduler)
    return Teacher(ExactUNet(noise_scheduler), kind, clip=False, autocast=contextlib.nullcontext)


def mixture_batch(count=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(count, 1, 1, 1, generator=generator) for _ in range(2))
    images = images * DEVIATION + MEANS[torch.arange(count) % 2][:, None, None, None]
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    return Batch(images, noise, uniforms, indices=None, step=0, micro_step=0)


def sampled(scheduler, num_steps, predict, start):
    """Run a scheduler of diffusers from `start`, with `predict(noisy, timestep)`."""
    scheduler.set_timesteps(num_steps)
    noisy, generator = start, torch.Generator().manual_seed(1)
    extra = {} if isinstance(scheduler, DDIMScheduler) else {"generator": generator}
    for timestep in scheduler.timesteps:
        noisy = scheduler.step(predict(noisy, timestep), timestep, noisy, **extra).prev_sample
    return noisy


@each_schedule
def test_the_teacher_finds_the_image_whatever_it_predicts(noise_scheduler):
    teacher, batch = teacher_of(noise_scheduler), mixture_batch()
    grid = StepGrid(few_step.student_schedule(noise_scheduler), 16, CPU)
    numbers = 1 + torch.arange(len(batch.images)) % 15  # the last step of epsilon divides by almost 0
    timesteps, alpha, sigma = grid.at(numbers)
    noisy = alpha * batch.images + sigma * batch.noise
    torch.testing.assert_close(
        teacher.images(noisy, timesteps, alpha, sigma, batch), denoised(noisy, alpha, sigma), atol=2e-3, rtol=2e-3
    )


@each_schedule
def test_a_student_that_meets_its_targets_samples_what_twice_the_steps_of_its_teacher_sample(noise_scheduler):
    """One stage against its closed form: 4 steps of the target, through the student's own scheduler, are 8 of DDIM."""
    teacher, batch = teacher_of(noise_scheduler), mixture_batch()
    alphas_cumprod = few_step.student_schedule(noise_scheduler)
    grid = StepGrid(alphas_cumprod, 8, CPU)
    student = few_step.progressive_scheduler(alphas_cumprod, 4, "sample")
    assert student.config.num_train_timesteps == 4 and few_step.is_few_step(student)

    def predict(noisy, timestep):
        start = torch.full((len(noisy),), 2 * (int(timestep) + 1))
        return progressive_target(teacher, grid, start, 2, noisy, batch)

    ended = sampled(student, 4, predict, batch.noise)
    expected = batch.noise
    for number in range(8, 0, -1):
        numbers = torch.full((len(expected),), number)
        timesteps, alpha, sigma = grid.at(numbers)
        _, alpha_end, sigma_end = grid.at(numbers - 1)
        images = teacher.images(expected, timesteps, alpha, sigma, batch)
        expected = alpha_end * images + sigma_end * (expected - alpha * images) / sigma
    torch.testing.assert_close(ended, expected, atol=2e-4, rtol=2e-4)
    assert abs((ended < 0).float().mean() - 0.5) < 0.08  # both parts of the mixture, at their places
    assert (ended.flatten()[:, None] - MEANS).abs().min(1).values.mean() < 0.16  # noise: 0.42


def test_one_step_that_adapts_is_the_image_of_the_teacher():
    noise_scheduler, batch = SCHEDULES[2], mixture_batch()
    teacher, grid = teacher_of(noise_scheduler), StepGrid(few_step.student_schedule(noise_scheduler), 8, CPU)
    start = 1 + torch.arange(len(batch.images)) % 6
    timesteps, alpha, sigma = grid.at(start)
    noisy = alpha * batch.images + sigma * batch.noise
    target = progressive_target(teacher, grid, start, 1, noisy, batch)
    torch.testing.assert_close(target, teacher.images(noisy, timesteps, alpha, sigma, batch), atol=1e-4, rtol=1e-3)


def test_the_loss_is_the_weighted_error_of_the_image_in_any_parametrization():
    noise_scheduler, batch = SCHEDULES[0], mixture_batch(64)
    teacher, grid = teacher_of(noise_scheduler), StepGrid(few_step.student_schedule(noise_scheduler), 8, CPU)
    steps = torch.arange(64) % 4
    timesteps, alpha, sigma = grid.at(2 * (steps + 1))
    noisy = alpha * batch.images + sigma * batch.noise
    target = progressive_target(teacher, grid, 2 * (steps + 1), 2, noisy, batch)

    def model(kind):  # is off by 0.1 everywhere
        images = target + 0.1
        velocity = (alpha * noisy - images) / sigma
        return lambda noisy, timesteps: SimpleNamespace(sample=images if kind == "sample" else velocity)

    expected = 0.01 * (alpha / sigma).square().clamp(min=1).flatten()
    for kind in ("sample", "v_prediction"):
        found = progressive_losses(model(kind), teacher, grid, 2, kind, batch, steps)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_guidance_moves_the_prediction_away_from_the_null_condition():
    def unet(noisy, timesteps, wanted=None):
        return SimpleNamespace(sample=torch.full_like(noisy, 0.2 if wanted is None else 0.5))

    batch = mixture_batch(4)
    batch.condition = {"wanted": torch.ones(4)}
    teacher = Teacher(unet, "sample", False, contextlib.nullcontext, guidance_scale=3.0)
    one = torch.ones(4, 1, 1, 1)
    torch.testing.assert_close(teacher.images(batch.noise, None, one, one, batch), 1.1 * one)
    teacher.clip = True
    torch.testing.assert_close(teacher.images(batch.noise, None, one, one, batch), one)


def test_a_time_table_stands_for_the_timesteps_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET).eval()
    timesteps = few_step.step_timesteps(1000, 4)
    assert timesteps.tolist() == [249, 499, 749, 999]
    few_step.with_time_table(unet, timesteps).save_pretrained(tmp_path)
    numbered = UNet2DModel.from_pretrained(tmp_path).eval()
    noisy = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(numbered(noisy, torch.arange(4)).sample, unet(noisy, timesteps).sample)
        assert unet.config.time_embedding_type == "positional"  # the original is as it was
        again = few_step.without_time_table(numbered, unet)
        assert torch.equal(again(noisy, timesteps).sample, unet(noisy, timesteps).sample)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 16, 32])
def test_the_steps_of_a_student_are_every_second_one_of_its_teacher(num_steps):
    assert (
        few_step.step_timesteps(1000, 2 * num_steps)[1::2].tolist()
        == few_step.step_timesteps(1000, num_steps).tolist()
    )


@each_schedule
def test_schedulers_of_students_refuse_more_steps(noise_scheduler):
    alphas_cumprod = few_step.student_schedule(noise_scheduler)
    for scheduler in (
        few_step.progressive_scheduler(alphas_cumprod, 4, "v_prediction"),
        few_step.consistency_scheduler(alphas_cumprod, 4, "v_prediction", True),
    ):
        assert few_step.is_few_step(scheduler) and few_step.student_steps(scheduler) == 4
        with pytest.raises(ValueError, match="1000"):
            scheduler.set_timesteps(1000)
    assert not few_step.is_few_step(noise_scheduler) and not few_step.is_few_step(DDIMScheduler())


def test_the_neighbour_comes_closer_from_stage_to_stage():
    level = torch.tensor([0.01, 0.5, 5.0, 80.0])
    ratios = [neighbour(level, progress) / level for progress in (0, 0.3, 0.6, 0.99, 1.0)]
    assert ratios[0].tolist()[:2] == [0, 0] and ratios[0][3] == pytest.approx(0.5)
    for before, after in zip(ratios, ratios[1:], strict=False):
        assert (after >= before).all() and (after < 1).all()
    expected = 1 - (1 + 8 * torch.sigmoid(-level)) / 2**8
    torch.testing.assert_close(ratios[3], expected)


@each_schedule
def test_noise_levels_and_timesteps_are_inverse_to_each_other(noise_scheduler):
    alphas_cumprod = few_step.student_schedule(noise_scheduler)
    alphas_cumprod = few_step.consistency_schedule(alphas_cumprod)
    levels = NoiseLevels(alphas_cumprod, "v_prediction", CPU)
    assert 0.8 * few_step.NOISIEST < levels.logs[-1].exp() <= few_step.NOISIEST
    timesteps = torch.arange(levels.first, len(alphas_cumprod), 37)
    torch.testing.assert_close(levels.timesteps(levels.logs_at(timesteps)), timesteps.float(), atol=1e-2, rtol=0)
    drawn = levels.draw(torch.linspace(0, 1, 1001)[:-1].double())
    assert drawn.isfinite().all() and (drawn.diff() >= 0).all()
    assert drawn[500].item() == pytest.approx(-1.1, abs=0.15)


def test_the_consistency_loss_is_that_of_the_image_first_and_vanishes_for_an_exact_student():
    """With one image in the data, it is the end of every trajectory: the exact student has no loss at any stage."""
    alphas_cumprod = few_step.consistency_schedule(few_step.student_schedule(SCHEDULES[0]))
    levels, batch = NoiseLevels(alphas_cumprod, "sample", CPU), mixture_batch(32)
    batch.images = torch.full_like(batch.images, 0.3)

    class Model(torch.nn.Module):
        """Its images, with the part of its input that the boundary condition adds, are all of one value."""

        def __init__(self, image):
            super().__init__()
            self.image = image

        def forward(self, noisy, timesteps):
            skip, out = (factor[:, None, None, None] for factor in few_step.skip_scalings(timesteps, levels.scaling))
            return SimpleNamespace(sample=(self.image - skip * noisy) / out.clamp(min=1e-6))

    logs = levels.draw(batch.uniforms).clamp(min=levels.logs[1].item())  # at the boundary no network has a say
    for progress in (0.0, 0.5, 1.0):
        assert consistency_losses(Model(0.3), levels, batch, logs, progress).abs().max() < 1e-4
    off = consistency_losses(Model(0.5), levels, batch, logs, 0.0)
    near = neighbour(logs.exp(), 0.0)
    to_image = near <= levels.logs[0].exp()
    assert to_image.any() and not to_image.all()
    huber = 0.00054
    expected = (math.sqrt(0.04 + huber**2) - huber) / logs.exp()
    torch.testing.assert_close(off[to_image], expected[to_image], rtol=1e-3, atol=0)
    assert off[~to_image].abs().max() < 1e-4  # the two predictions agree


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@each_schedule
def test_a_consistency_student_ends_at_its_input_and_trains_as_its_scheduler_samples(noise_scheduler, prediction_type):
    alphas_cumprod = few_step.consistency_schedule(few_step.student_schedule(noise_scheduler))
    scheduler = few_step.consistency_scheduler(alphas_cumprod, 4, prediction_type, clip_sample=False)
    levels = NoiseLevels(alphas_cumprod, prediction_type, CPU)
    timesteps = torch.tensor([0, 1, 64, 247, len(alphas_cumprod) - 1])
    ours = few_step.skip_scalings(timesteps, levels.scaling)
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(number) for number in timesteps.tolist()]
    torch.testing.assert_close(torch.stack(ours, 1), torch.tensor(theirs))
    assert ours[0][0] == 1 and ours[1][0] == 0
    if prediction_type == "sample":
        half = round(few_step.SIGMA_DATA / levels.scaling)  # the first timestep that is not below the level
        below, above = levels.logs_at(torch.tensor([half - 1, half])).exp().tolist()
        assert below < few_step.HALF_SKIPPED <= above
        torch.testing.assert_close(
            few_step.skip_scalings(torch.tensor([half]), levels.scaling)[0], torch.tensor([0.5])
        )


def test_consistency_compares_with_the_same_dropout():
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET | {"dropout": 0.5}).train()
    alphas_cumprod = few_step.consistency_schedule(few_step.student_schedule(SCHEDULES[0]))
    levels = NoiseLevels(alphas_cumprod, "sample", CPU)
    batch = mixture_batch(2)
    batch.images, batch.noise = torch.zeros(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    logs = torch.full((2,), 2.0)
    seen = []
    unet.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output.sample.detach())))
    consistency_losses(unet, levels, batch, logs, 1.0)
    (near, _), (far, image) = seen
    assert not torch.equal(near[0], far[0])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        one = unet(*far).sample
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(unet(*far).sample, one)  # with the same numbers the same units are dropped
    assert image.shape == one.shape


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_an_exact_consistency_student_samples_its_data_through_the_saved_scheduler(num_steps):
    """For Gaussian data the end of a trajectory is mean + deviation / sqrt(deviation^2 + s^2) (x - mean)."""
    alphas_cumprod = few_step.consistency_schedule(few_step.student_schedule(SCHEDULES[0]))
    scheduler = few_step.consistency_scheduler(alphas_cumprod, 4, "sample", clip_sample=False)
    generator = torch.Generator().manual_seed(0)

    def predict(noisy, timestep):
        alpha, sigma = scheduler.alphas_cumprod[timestep].sqrt(), (1 - scheduler.alphas_cumprod[timestep]).sqrt()
        image = 0.2 + DEVIATION / (DEVIATION**2 + (sigma / alpha) ** 2).sqrt() * (noisy / alpha - 0.2)
        skip, out = few_step.skip_scalings(timestep, scheduler.config.timestep_scaling)
        return (image - skip * noisy) / out

    ended = sampled(scheduler, num_steps, predict, torch.randn(20_000, 1, 1, 1, generator=generator))
    assert ended.mean().item() == pytest.approx(0.2, abs=0.005)
    assert ended.std().item() == pytest.approx(DEVIATION, rel=0.03)


def test_to_images_refuses_an_unknown_prediction():
    with pytest.raises(ValueError, match="unknown prediction_type edm"):
        to_images("edm", *[torch.zeros(1)] * 4)

"""Objectives, draws, samplers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ditmoe_ds.diffusion.noise import draw, image_generators, starting_noise
from ditmoe_ds.diffusion.objectives import (
    DDPM,
    DiffusionConfig,
    RectifiedFlow,
    discretized_log_likelihood,
    flip,
    gaussian_kl,
    make_objective,
)
from ditmoe_ds.diffusion.sampling import SCHEDULERS, Guidance, guided, make_scheduler, sample, scheduled
from ditmoe_ds.errors import ConfigError

SHAPE = (2, 4, 4)


@pytest.fixture
def x0():
    return torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))


def draws(seed=0, epoch=0, samples=range(6)):
    return draw(seed, torch.full((len(samples),), epoch), torch.tensor(list(samples)), SHAPE)


def test_draws_depend_on_seed_epoch_and_sample_alone():
    one, other = draws(), draws(samples=[5, 2])
    for a, b in zip(one, other):
        assert torch.equal(a[5], b[0]) and torch.equal(a[2], b[1])
    for changed in (draws(seed=1), draws(epoch=1)):
        assert not torch.equal(one.noise, changed.noise) and not torch.equal(one.uniform, changed.uniform)
    assert torch.equal(starting_noise(image_generators(3, [4, 5]), SHAPE)[1], starting_noise(image_generators(3, [5]), SHAPE)[0])


def test_draws_are_distributed_as_they_say():
    many = draws(samples=range(3000))
    assert many.noise.mean() == pytest.approx(0, abs=0.02) and many.noise.std() == pytest.approx(1, abs=0.02)
    assert many.uniform.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    times = RectifiedFlow(1000).time(many)
    assert times.logit().mean() == pytest.approx(0, abs=0.06) and times.logit().std() == pytest.approx(1, abs=0.06)


def test_flip(x0):
    mirrored = flip(x0, draws())
    same = [torch.equal(a, b) for a, b in zip(mirrored, x0)]
    assert all(torch.equal(m, x if kept else x.flip(-1)) for m, x, kept in zip(mirrored, x0, same)) and len(set(same)) == 2


def test_rectified_flow_loss(x0):
    d = draws()
    objective, t, seen = RectifiedFlow(1000), torch.linspace(0.05, 0.95, 6), {}

    def predict(z, s):
        seen.update(z=z, s=s)
        return torch.cat([d.noise - x0, torch.full_like(x0, 9.0)], 1)  # the true velocity; the second half is unused

    assert objective.loss(predict, x0, t, d.noise).abs().max() < 1e-10
    torch.testing.assert_close(seen["z"][2], (1 - t[2]) * x0[2] + t[2] * d.noise[2])
    torch.testing.assert_close(seen["s"], 1000 * t)
    zero = objective.loss(lambda z, s: torch.zeros_like(z), x0, t, d.noise)
    torch.testing.assert_close(zero, (d.noise - x0).square().mean((1, 2, 3)))
    assert torch.equal(make_objective(DiffusionConfig(time_scale=1.0)).embed(t), t)


def test_ddpm_tables_are_diffusers(x0):
    objective, scheduler = DDPM(), DDPMScheduler(1000, 1e-4, 2e-2, "linear", variance_type="fixed_small_log")
    d, t = draws(), torch.tensor([0.0, 0.0007, 0.25, 0.5, 0.75, 1.0])
    seen = {}
    objective.loss(lambda z, s: seen.update(z=z, s=s) or torch.zeros_like(z), x0, t, d.noise)
    assert seen["s"].tolist() == [0, 0, 250, 500, 750, 999]
    torch.testing.assert_close(seen["z"], scheduler.add_noise(x0, d.noise, seen["s"].long()), rtol=1e-4, atol=1e-5)
    for step in (1, 10, 500, 999):
        variance = scheduler._get_variance(step, variance_type="fixed_small")
        assert objective.at(torch.tensor([step]))[5].item() == pytest.approx(math.log(variance), rel=1e-4)


def test_ddpm_bound_is_zero_for_the_true_posterior_and_spares_the_mean(x0):
    objective, d, t = DDPM(), draws(), torch.full((6,), 0.5)

    def predict(share):
        return lambda z, s: torch.cat([eps, share * torch.ones_like(x0)], 1)

    eps = d.noise
    exact = objective.loss(predict(-1.0), x0, t, d.noise)  # share -1: the posterior variance
    assert exact.abs().max() < 1e-4
    assert (objective.loss(predict(1.0), x0, t, d.noise) > exact).all()
    eps = (d.noise / 2).requires_grad_()  # where the bound has a slope
    with_bound, alone = (objective.loss(out, x0, t, d.noise).sum() for out in (predict(0.3), lambda z, s: eps))
    torch.testing.assert_close(*(torch.autograd.grad(loss, eps)[0] for loss in (with_bound, alone)))


@pytest.mark.parametrize("step", [0, 1, 500])
def test_ddpm_bound_by_torchs_distributions(x0, step):
    """In bits: the likelihood of the image at step 0, else the divergence from the true posterior."""
    objective, d, x0 = DDPM(), draws(), 0.9 * x0.tanh()  # no pixel in the outer bins
    scheduler = DDPMScheduler(1000, 1e-4, 2e-2, "linear")
    beta, bar, at = scheduler.betas[step], scheduler.alphas_cumprod[step], torch.full((6,), step)
    before = scheduler.alphas_cumprod[step - 1] if step else torch.tensor(1.0)
    small, large = scheduler._get_variance(max(step, 1), variance_type="fixed_small").log(), beta.log()
    eps, z = 0.9 * d.noise, scheduler.add_noise(x0, d.noise, at)
    width = ((0.65 * large + 0.35 * small) / 2).exp()

    def posterior(image):
        return (before.sqrt() * beta * image + (1 - beta).sqrt() * (1 - before) * z) / (1 - bar)

    made = torch.distributions.Normal(posterior((z - (1 - bar).sqrt() * eps) / bar.sqrt()), width)
    if step:
        nats = torch.distributions.kl_divergence(torch.distributions.Normal(posterior(x0), (small / 2).exp()), made)
    else:
        nats = -(made.cdf(x0 + 1 / 255) - made.cdf(x0 - 1 / 255)).log()
    t = (at + 0.5) / 1000
    bound = objective.loss(lambda z, s: torch.cat([eps, torch.full_like(z, 0.3)], 1), x0, t, d.noise)
    bound -= objective.loss(lambda z, s: eps, x0, t, d.noise)
    torch.testing.assert_close(bound, nats.mean((1, 2, 3)) / math.log(2), rtol=1e-3, atol=1e-4)


def test_gaussian_kl_is_torchs():
    m1, v1, m2, v2 = torch.randn(4, 50)
    ours = gaussian_kl(m1, v1, m2, v2)
    p, q = torch.distributions.Normal(m1, (v1 / 2).exp()), torch.distributions.Normal(m2, (v2 / 2).exp())
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_discretized_likelihood_sums_to_one():
    """However much of the normal lies beyond the outer bins."""
    bins = torch.linspace(-1, 1, 256)
    for log_scale in (-1.5, 0.5):
        total = discretized_log_likelihood(bins, torch.tensor(0.2), torch.tensor(log_scale)).exp().sum()
        assert total == pytest.approx(1, abs=1e-3)
    far = torch.tensor(-9.0, requires_grad=True)  # so unlikely that fp32 has no number for it
    likelihood = discretized_log_likelihood(bins, far, torch.tensor(-3.0))
    assert likelihood.isfinite().all() and torch.autograd.grad(likelihood.sum(), far)[0].isfinite()


def test_euler_follows_a_straight_flow_exactly(x0):
    noise = torch.randn_like(x0)
    steps_seen = []

    def predict(z, t):
        steps_seen.append(float(t[0]))
        return torch.cat([noise - x0, torch.zeros_like(x0)], 1)

    out = sample(predict, noise, make_scheduler(DiffusionConfig()), DiffusionConfig(), 7)
    torch.testing.assert_close(out, x0, rtol=1e-4, atol=1e-5)
    assert steps_seen == pytest.approx([1000 * (1 - i / 7) for i in range(7)], rel=1e-5)


def test_without_a_variance_the_posteriors_is_taken(x0):
    """Which is the lower end of the range."""
    config = DiffusionConfig(objective="ddpm")

    def sampled(*variance):
        def predict(z, t):
            return torch.cat([z / 2, *(torch.full_like(z, share) for share in variance)], 1)

        return sample(predict, x0, make_scheduler(config, "ddpm"), config, 5, torch.Generator().manual_seed(0))

    assert torch.equal(sampled(), sampled(-1.0)) and not torch.equal(sampled(), sampled(0.0))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_ddpm_samplers_find_the_image_that_the_model_knows(x0, sampler):
    objective = DDPM()

    def predict(z, t):
        signal, sigma = objective.at(t.long())[:2]
        eps = (z - signal * x0) / sigma
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    config = DiffusionConfig(objective="ddpm")
    out = sample(predict, torch.randn_like(x0), make_scheduler(config, sampler), config, 50, torch.Generator().manual_seed(0))
    assert (out - x0).abs().max() < 1e-4  # the last step goes to no noise at all


MEAN, STD = 0.7, 0.4


def flow_error(sampler, shift, steps):
    """Of data N(MEAN, STD^2), whose velocity is known, and that the flow from noise n ends at MEAN + STD n."""
    config = DiffusionConfig(time_shift=shift, time_scale=10.0)

    def predict(z, t):
        t = t.view(-1, 1, 1, 1) / 10
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        return torch.cat([slope * (z - (1 - t) * MEAN) - MEAN, torch.zeros_like(z)], 1)

    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    out = sample(predict, noise, make_scheduler(config, sampler), config, steps)
    return (out - MEAN - STD * noise).abs().max().item()


@pytest.mark.parametrize("sampler", SCHEDULERS["rectified_flow"])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_flow_samplers_solve_the_equation(sampler, shift):
    few, many = (flow_error(sampler, shift, steps) for steps in (10, 40))
    assert many < (0.12 if sampler == "euler" else 0.02) and many < few / 2, (few, many)


@pytest.mark.parametrize("sampler, most", dict(euler=0.05, heun=5e-4, unipc=1e-3, **{"dpm++": 0.009}).items())
def test_a_large_shift(sampler, most):
    """Which crowds the first steps, so that two of them have one time after rounding, and would leave Heun short of the image."""
    assert flow_error(sampler, 6.0, 200) < most


@pytest.mark.parametrize("sampler", SCHEDULERS["ddpm"])
def test_noise_samplers_solve_the_equation(sampler):
    """As above; the ancestral sampler ends at the distribution alone."""
    config, objective = DiffusionConfig("ddpm"), DDPM()

    def predict(z, t):
        a, b = objective.at(t.long())[:2]
        return b / (a**2 * STD**2 + b**2) * (z - a * MEAN)

    noise = torch.randn(300, *SHAPE, generator=torch.Generator().manual_seed(0))
    out = sample(predict, noise, make_scheduler(config, sampler), config, 100, torch.Generator().manual_seed(1))
    assert (out.mean().item(), out.std().item()) == pytest.approx((MEAN, STD), abs=0.04)
    far = (out - MEAN - STD * noise).abs().max()
    assert far > 0.5 if sampler == "ddpm" else far < 0.08, far


@pytest.mark.parametrize("sampler", SCHEDULERS["ddpm"])
def test_as_many_steps_as_asked_for_or_an_error(sampler):
    """diffusers rounds some numbers of steps to one more, at time -1, and DDIM steps back further than to the next time."""
    config, refused = DiffusionConfig("ddpm"), []
    scheduler = make_scheduler(config, sampler)
    for steps in range(1, 1001):
        try:
            times = scheduled(scheduler, config, steps).timesteps
        except ConfigError:
            refused.append(steps)
            continue
        assert len(times) == steps and times.min() >= 0 and (times.diff() < 0).all()
        if sampler == "ddim":
            assert steps == 1 or (times[:-1] - times[1:] == 1000 // steps).all()
        if sampler == "ddpm" and steps > 1:
            assert (times[0], times[-1]) == (999, 0)  # the last adds no noise
    assert len(refused) == {"ddim": 1000 - 16, "ddpm": 0}.get(sampler, 62) and not {25, 50, 100, 250} & set(refused)


def test_guidance_is_one_batched_call():
    calls = []

    def model(x, t, y):
        calls.append((x.shape[0], y.tolist()))
        return y.view(-1, 1, 1, 1).float().expand(-1, 8, 4, 4).clone()

    z, condition = torch.zeros(2, 4, 4, 4), dict(y=torch.tensor([1, 2, 10, 10]))
    out = guided(model, condition, Guidance(3.0), DiffusionConfig())(z, torch.zeros(2))
    assert calls == [(4, [1, 2, 10, 10])]
    assert out[:, :4, 0, 0].tolist() == [[10 + 3 * (1 - 10)] * 4, [10 + 3 * (2 - 10)] * 4]
    assert out[:, 4:, 0, 0].tolist() == [[1.0] * 4, [2.0] * 4]
    guided(model, condition, Guidance(), DiffusionConfig())(z, torch.zeros(2))
    assert calls[1] == (2, [1, 2])
    for end in (0.7, 0.8):  # float32 is a little less, and a little more
        guided(model, condition, Guidance(3.0, (end, end)), DiffusionConfig(time_scale=1.0))(z, torch.tensor([end] * 2))
    assert [count for count, _ in calls[2:]] == [4, 4]

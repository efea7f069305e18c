"""Metrics against closed forms and known values, and against what each is meant to notice."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogen import UserError
from nanogen.data import voices
from nanogen.lab import metrics, sound_metrics

RANDOM = np.random.default_rng(0)


def textured_images(count: int = 16, size: int = 32) -> torch.Tensor:
    """Float (count, 3, size, size) in [-1, 1], with energy at all frequencies."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return 0.5 * noise + 0.5 * F.avg_pool2d(noise, 5, stride=1, padding=2)


def blurred(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


# ---- sets


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = RANDOM.normal(size=(300, 24)) @ RANDOM.normal(size=(24, 24)) + 5
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_equals_the_closed_form_for_gaussians(seed, dims):
    """Points of exactly these means and covariances; C_a and C_b commute, so the root is known."""
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(dims, dims)))
    white = random.normal(size=(100, dims))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    deviation_a, deviation_b = random.uniform(0.1, 3, dims), random.uniform(0.1, 3, dims)
    shift = random.normal(size=dims)
    a, b = white * deviation_a @ rotation.T, white * deviation_b @ rotation.T + shift
    expected = (shift**2).sum() + ((deviation_a - deviation_b) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """The trace of the root from the eigenvalues of the unsymmetric product."""
    a = RANDOM.normal(size=(200, 6)) @ RANDOM.normal(size=(6, 6))
    b = RANDOM.normal(size=(250, 6)) @ RANDOM.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * root_trace
    assert metrics.frechet_distance(torch.tensor(a), b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_safe_with_fewer_images_than_dimensions():
    few = RANDOM.normal(size=(10, 64))
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert metrics.frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-6)
    assert math.isfinite(metrics.frechet_distance(np.zeros((10, 64)), few))


def test_precision_and_recall_of_the_same_set_are_one_even_with_repeated_images():
    features = RANDOM.normal(size=(100, 8)) + 100
    assert metrics.precision_recall(features, features) == (1, 1)
    repeated = np.repeat(features[:20], 5, axis=0)
    assert metrics.precision_recall(repeated, repeated) == (1, 1)


def test_precision_and_recall_of_disjoint_sets_are_zero():
    features = RANDOM.normal(size=(100, 8))
    assert metrics.precision_recall(features, features + 100) == (0, 0)


def test_dropping_a_mode_lowers_recall_only_and_inventing_one_lowers_precision_only():
    points = RANDOM.normal(size=(4, 150, 4))
    two_modes = np.concatenate([points[0], points[1] + 50])
    one_mode = np.concatenate([points[2], points[3]])
    precision, recall = metrics.precision_recall(real=two_modes, fake=one_mode)
    assert precision > 0.85 and recall < 0.55
    precision, recall = metrics.precision_recall(real=one_mode, fake=two_modes)
    assert precision < 0.55 and recall > 0.85


def test_precision_and_recall_agree_with_a_loop_over_all_pairs():
    real, fake = RANDOM.normal(size=(2, 40, 3))
    fake = fake + 0.7

    def covered(points, centres):
        gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        reach = np.sort(gaps, axis=1)[:, 2]  # 0 is the point itself
        return np.mean([(np.linalg.norm(centres - p, axis=1) <= reach).any() for p in points])

    expected = covered(fake, real), covered(real, fake)
    assert metrics.precision_recall(real, fake, k=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    "a, b",
    [
        (np.zeros((1, 4)), np.zeros((9, 4))),
        (np.zeros((9, 4)), np.zeros((9, 5))),
        (np.zeros(9), np.zeros(9)),
        (np.full((9, 4), np.nan), np.zeros((9, 4))),
    ],
)
def test_features_that_cannot_be_compared_are_refused_in_a_sentence(a, b):
    for distance in (metrics.frechet_distance, metrics.precision_recall):
        with pytest.raises(UserError, match="features"):
            distance(a, b)


def test_precision_needs_more_images_than_neighbours():
    for few, many in ((3, 9), (9, 3)):  # a folder of one's own may have three test images
        assert np.isnan(metrics.precision_recall(np.zeros((few, 4)), np.zeros((many, 4)))).all()


# ---- reconstructions


def test_psnr_of_a_known_error_is_known():
    black = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    assert metrics.psnr(black, black + np.uint8(255)) == pytest.approx(0)
    assert metrics.psnr(black, black + np.uint8(51)) == pytest.approx(20 * math.log10(5), abs=1e-4)
    floats = torch.zeros(2, 3, 16, 16)
    assert metrics.psnr(floats, floats + 0.2) == pytest.approx(20, abs=1e-4)  # 0.2 of a range of 2
    assert metrics.psnr(floats, floats) == 100


def test_psnr_is_the_mean_over_images_not_that_of_the_pooled_error():
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack([a[0] + 0.2, a[1] + 0.02])
    assert metrics.psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-3)


def test_uint8_and_float_images_give_the_same_value():
    a = RANDOM.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    b = RANDOM.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    as_float = torch.from_numpy(b).permute(0, 3, 1, 2) / 127.5 - 1
    for metric in (metrics.psnr, metrics.ssim):
        assert metric(a, as_float) == pytest.approx(metric(a, b), abs=1e-5)


def test_ssim_of_flat_images_is_the_luminance_term_alone():
    dark = torch.full((1, 3, 16, 16), -0.5)  # 0.25 of white
    light = -dark  # 0.75
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert metrics.ssim(dark, light) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_one_for_equal_images_near_zero_for_noise_and_punishes_blur_more_than_brightness():
    images = textured_images()
    assert metrics.ssim(images, images) == pytest.approx(1, abs=1e-5)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(123)) * 2 - 1
    assert abs(metrics.ssim(images, noise)) < 0.1
    assert metrics.ssim(images, blurred(images)) < metrics.ssim(images, images * 0.9 + 0.05) - 0.2


def test_ssim_agrees_with_the_definition_at_one_position():
    a, b = textured_images(1, 11), blurred(textured_images(1, 11))
    offsets = np.arange(11) - 5
    weight = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    weight /= weight.sum()
    scores = []
    for channel in range(3):
        x, y = (((image[0, channel].double().numpy() + 1) / 2) for image in (a, b))
        mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
        var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
        both = (weight * (x - mean_x) * (y - mean_y)).sum()
        scores.append(
            (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
            / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
        )  # fmt: skip
    assert metrics.ssim(a, b) == pytest.approx(np.mean(scores), abs=1e-4)


def test_images_too_small_for_ssim_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="11x11"):
        metrics.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# ---- detail


def test_blur_lowers_the_high_frequencies_and_leaves_the_lowest():
    images = textured_images()
    fraction = metrics.high_frequency_fraction
    assert fraction(blurred(images)) < 0.5 * fraction(images)
    frequencies, before = metrics.radial_spectrum(images)
    _, after = metrics.radial_spectrum(blurred(images))
    assert frequencies[-1] == 1 and len(frequencies) == len(before) == 16
    assert after[-1] < 0.2 * before[-1] and after[0] > 0.7 * before[0]


@pytest.mark.parametrize("cycles, fraction", [(4, 0), (12, 1)])
def test_a_wave_lies_at_its_own_frequency(cycles, fraction):
    wave = torch.sin(2 * math.pi * cycles * torch.arange(32) / 32).expand(1, 3, 32, 32)
    frequencies, power = metrics.radial_spectrum(wave)
    assert frequencies[power.argmax()] == cycles / 16
    assert metrics.high_frequency_fraction(wave) == pytest.approx(fraction, abs=1e-6)


def test_flat_images_have_no_detail():
    assert metrics.high_frequency_fraction(np.full((2, 16, 16, 3), 77, dtype=np.uint8)) == 0


# ---- bits


def test_a_uniform_guess_costs_eight_bits_a_byte():
    assert metrics.bits_per_dim(3072 * math.log(256), 3072) == pytest.approx(8)


def test_compressors_cost_eight_bits_on_noise_and_little_on_smooth_images():
    noise = RANDOM.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    bits = metrics.lossless_bits_per_dim(noise)
    assert bits["png"] > 8 and 7.9 < bits["best"] == bits["predictor"] <= 8
    noise[..., 1:] = 0  # each channel is counted alone, and two now cost nothing
    assert metrics.lossless_bits_per_dim(noise)["predictor"] == pytest.approx(8 / 3, abs=0.01)
    ramp = (np.arange(32)[:, None] * 3 + np.arange(32)[None] * 2)[None, :, :, None]
    smooth = (ramp + RANDOM.integers(0, 60, (40, 1, 1, 3))).astype(np.uint8)
    bits = metrics.lossless_bits_per_dim(smooth)
    assert bits["best"] == min(bits["png"], bits["predictor"]) and max(bits.values()) < 1
    flat = np.full((1, 64, 64, 3), 7, dtype=np.uint8)  # one pixel of 4096 has another residual
    assert metrics.lossless_bits_per_dim(flat)["predictor"] < 0.01


def test_what_the_predictor_leaves_is_enough_to_rebuild_the_image():
    """Otherwise its entropy would be a bound on nothing."""
    images = RANDOM.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    residuals = metrics._residuals(images).astype(int)
    planes = np.zeros((2, 7, 6, 3), dtype=int)  # a border of zeros above and to the left
    for row in range(1, 7):
        for column in range(1, 6):
            left, up = planes[:, row, column - 1], planes[:, row - 1, column]
            corner = planes[:, row - 1, column - 1]
            guess = np.median([left, up, left + up - corner], axis=0).astype(int)
            planes[:, row, column] = (residuals[:, row - 1, column - 1] + guess) % 256
    planes = planes[:, 1:, 1:]
    green = planes[..., 1]
    rebuilt = np.stack([planes[..., 0] + green - 128, green, planes[..., 2] + green - 128], axis=-1)
    assert (rebuilt % 256 == images).all()


# ---- sounds


def speech(count: int = 8) -> np.ndarray:
    clips = voices.make(count, seed=0, speakers=3, languages=("english",))["waveforms"]
    return np.concatenate(clips).astype(np.float64)


def noisy(clean: np.ndarray, snr: float) -> np.ndarray:
    noise = RANDOM.normal(size=len(clean))
    return clean + noise * np.linalg.norm(clean) / np.linalg.norm(noise) * 10 ** (-snr / 20)


def test_si_sdr_is_the_signal_to_noise_ratio_whatever_the_loudness():
    clean, noise = RANDOM.normal(size=(2, 20000))
    clean, noise = clean - clean.mean(), noise - noise.mean()
    noise -= clean * (clean @ noise) / (clean @ clean)
    noise *= np.linalg.norm(clean) / np.linalg.norm(noise) / 10  # 20 dB below
    assert sound_metrics.si_sdr(clean, clean + noise) == pytest.approx(20, abs=0.01)
    assert sound_metrics.si_sdr(clean, 0.3 * (clean + noise)) == pytest.approx(20, abs=0.01)
    assert sound_metrics.si_sdr(clean, clean) == 100
    assert sound_metrics.si_sdr(clean, 0 * clean) < -50


def test_stoi_is_one_for_equal_sounds_and_falls_with_the_noise():
    clean, stoi, distance = speech(), sound_metrics.stoi, sound_metrics.mel_distance
    assert stoi(clean, clean) == pytest.approx(1) == stoi(clean, 0.1 * clean)
    scores = [stoi(clean, noisy(clean, snr)) for snr in (20, 10, 0, -10, -20)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.85 and scores[-1] < 0.5
    distances = [distance(clean, noisy(clean, snr)) for snr in (20, 10, 0)]
    assert 0 < distances[0] < distances[1] < distances[2] and distance(clean, clean) == 0


def test_stoi_does_not_count_the_pauses():
    paused = np.concatenate([speech(), np.zeros(8000)])
    hissing = paused + 1e-5 * RANDOM.normal(size=len(paused))  # the pause has nothing but noise
    assert sound_metrics.stoi(paused, hissing) > 0.99


def test_a_voice_and_a_tone_are_periodic_and_noise_of_any_colour_is_not():
    noise = RANDOM.normal(size=8000)
    colored = np.convolve(noise, 0.9 ** np.arange(40))
    assert max(map(sound_metrics.periodicity, (noise, colored, np.zeros(100)))) < 0.3
    tone = np.sin(np.arange(4000) / 8000 * 2 * np.pi * 150)
    assert 0.8 < sound_metrics.periodicity(tone) < 1 and sound_metrics.periodicity(speech()) > 0.4


def test_sounds_that_cannot_be_compared_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="join clips first"):
        sound_metrics.stoi(speech()[:2000], speech()[:2000])
    for a, b in ((np.ones(5), np.ones(6)), (np.ones((2, 5)), np.ones((2, 5))),
                 (np.ones(0), np.ones(0)), (np.ones(3), np.full(3, np.nan))):
        with pytest.raises(UserError):
            sound_metrics.si_sdr(a, b)


def test_mu_law_gets_better_with_every_bit_up_to_eight():
    waveforms = speech()[:24_000].astype(np.float32).reshape(3, 8000)
    clean, copies = waveforms.ravel(), [sound_metrics.mu_law(waveforms, k) for k in (0.5, 2, 8)]
    for copy, _ in copies:
        assert copy.shape == waveforms.shape and np.abs(copy).max() <= 1
    scores = [sound_metrics.stoi(clean, copy.ravel()) for copy, _ in copies]
    rate, bits = copies[1][1]
    assert scores == sorted(scores) and rate * bits <= 2000
    best, pair = sound_metrics.mu_law(waveforms, 64)
    assert sound_metrics.si_sdr(clean, best.ravel()) > 25 and pair == (8000, 8)
    more, pair = sound_metrics.mu_law(waveforms, 128)
    assert np.array_equal(more, best) and pair == (8000, 8)


def test_a_real_time_factor_is_seconds_of_sound_per_second():
    threads = torch.get_num_threads()
    factor = sound_metrics.real_time_factor(lambda: time.sleep(0.02), 1.0)
    assert factor == pytest.approx(50, rel=0.5) and torch.get_num_threads() == threads


@pytest.mark.parametrize("midi", [45, 57.3, 69])
def test_the_pitch_of_a_sung_note_is_found_below_strings(midi):
    note = voices.sing(["la"], [midi], [0.6], seed=1)[1600:4400]
    strings = voices.pluck([(midi - 12, midi - 5)], [0.6])[1600:4400]
    cents = 1200 * np.log2(sound_metrics.pitch(note + 0.3 * strings) / voices.midi_to_hertz(midi))
    assert abs(cents) < 20
    tone = np.sin(2 * np.pi * 220 * np.arange(2000) / 8000)
    assert sound_metrics.pitch(tone) == pytest.approx(220, rel=1e-3)
    assert np.isnan(sound_metrics.pitch(np.zeros(600)))

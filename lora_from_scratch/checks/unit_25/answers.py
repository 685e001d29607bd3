"""Unit 25: mistakes that people make, and other right ways. Patches, and the noise of a diffusion model."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.pictures.diffusion import add_noise, denoising_step, noise_levels
from lora_from_scratch.pictures.vit import to_patches

# --- to_patches --------------------------------------------------------------------------------------


@right("to_patches")
def four_axes_in_another_order(pictures, size=2):
    B, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    cut = pictures.reshape(B, H // size, size, W // size, size)
    return cut.permute(0, 1, 3, 2, 4).reshape(B, -1, size * size)


@right("to_patches")
def one_patch_after_the_other(pictures, size=2):
    _, H, W = pictures.shape
    if H % size != 0 or W % size != 0:
        raise ValueError(f"{H} x {W} pixels cannot be divided")
    patches = []
    for top in range(0, H, size):
        for left in range(0, W, size):
            patches.append(pictures[:, top : top + size, left : left + size].flatten(1))
    return torch.stack(patches, dim=1)


@right("to_patches")
def with_the_method_unfold(pictures, size=2):
    if any(side % size for side in pictures.shape[1:]):
        raise ValueError("no whole number of patches")
    windows = pictures.unfold(1, size, size).unfold(2, size, size)  # (B, rows, columns, size, size)
    return windows.flatten(3).flatten(1, 2)


@right("to_patches")
def in_numpy(pictures, size=2):
    pixels = pictures.numpy()
    B, H, W = pixels.shape
    if H % size or W % size:
        raise ValueError("H and W have to be multiples of size")
    rows = [np.stack(np.split(strip, W // size, axis=2), axis=1) for strip in np.split(pixels, H // size, axis=1)]
    return torch.from_numpy(np.concatenate(rows, axis=1).reshape(B, -1, size * size))


@right("to_patches")
def by_places(pictures, size=2):
    _, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    place = torch.arange(H * W).view(H, W)
    order = [p[:, :size] for strip in place.split(size) for p in strip.split(size, dim=1)]
    return pictures.flatten(1)[:, torch.stack([p.reshape(-1) for p in order])]


@wrong(
    "to_patches",
    "You cut the pixels in the order in which they lie in memory. That gives pieces of a row; a patch is a square.",
)
def pieces_of_rows(pictures, size=2):
    B, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    return pictures.reshape(B, -1, size * size)


@wrong("to_patches", "Your patches come column by column. The first row of patches comes first, from left to right.")
def column_by_column(pictures, size=2):
    B, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    return pictures.reshape(B, H // size, size, W // size, size).permute(0, 3, 1, 2, 4).reshape(B, -1, size * size)


@wrong("to_patches", "The pixels of your patches come column by column. They are in the order of reading, too.")
def pixels_column_by_column(pictures, size=2):
    B, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    return pictures.reshape(B, H // size, size, W // size, size).permute(0, 1, 3, 4, 2).reshape(B, -1, size * size)


@wrong("to_patches", "Rows and columns are swapped in your result: it is that of the picture mirrored at its diagonal.")
def of_the_transposed_picture(pictures, size=2):
    return to_patches(pictures.transpose(1, 2), size)


@wrong(
    "to_patches",
    "Each row of your result has one pixel of every patch. A row is one patch: the last axis has its pixels.",
)
@changed(to_patches, (".transpose(1, 2)", ""))
def without_transposing(): ...


@wrong("to_patches", "You have the size in the wrong places: the pixels of a patch then lie far apart in the picture.")
def every_nth_pixel(pictures, size=2):
    B, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    return pictures.reshape(B, size, H // size, size, W // size).permute(0, 2, 4, 1, 3).reshape(B, -1, size * size)


@wrong("to_patches", "Your patches are always 2 x 2: `size` is not used.")
def always_two(pictures, size=2):
    if pictures.shape[1] % size or pictures.shape[2] % size:
        raise ValueError("the patches do not fill the picture")
    return F.unfold(pictures[:, None], 2, stride=2).transpose(1, 2)


@wrong("to_patches", "Your patches overlap: the next one begins a pixel further. It begins where the last one ends.")
@changed(to_patches, ("stride=size", "stride=1"))
def overlapping(): ...


@wrong("to_patches", "You cut off what does not fill a patch. The statement asks for a ValueError.")
def cut_off(pictures, size=2):
    H, W = (side // size * size for side in pictures.shape[1:])
    return F.unfold(pictures[:, None, :H, :W], size, stride=size).transpose(1, 2) if H and W else pictures[:, :0]


@wrong("to_patches", "You look only at the height before you refuse a picture. The width has to be a multiple, too.")
@changed(to_patches, (" or pictures.shape[2] % size", ""))
def only_the_height(): ...


@wrong("to_patches", "You look only at the width before you refuse a picture. The height has to be a multiple, too.")
@changed(to_patches, ("pictures.shape[1] % size or ", ""))
def only_the_width(): ...


@wrong("to_patches", "You take the height for the width, too. A picture need not be square.")
def always_square(pictures, size=2):
    B, H, W = pictures.shape
    if H % size or W % size:
        raise ValueError("the patches do not fill the picture")
    side = H // size
    if B * side * side * size * size != pictures.numel():
        return pictures.reshape(B, -1)
    return pictures.reshape(B, side, size, side, size).transpose(2, 3).reshape(B, -1, size * size)


@wrong("to_patches", "Your patches are squares still, (size, size). Each of them should be a single axis of pixels.")
def still_squares(pictures, size=2):
    return to_patches(pictures, size).unflatten(2, (size, size))


@wrong(
    "to_patches", "All patches of a picture are in one long axis. They have an axis of their own: (B, N, size * size)."
)
def one_long_axis(pictures, size=2):
    return to_patches(pictures, size).flatten(1)


@wrong("to_patches", "The picture's axis and the patches' axis are swapped: (B, N, size * size).")
def patches_first(pictures, size=2):
    return to_patches(pictures, size).transpose(0, 1)


# --- add_noise ---------------------------------------------------------------------------------------


@right("add_noise")
def one_picture_at_a_time(x, t, noise):
    levels = noise_levels()
    noisy = [levels[s] ** 0.5 * p + (1 - levels[s]) ** 0.5 * e for p, s, e in zip(x, t, noise)]
    return torch.stack(noisy)


@right("add_noise")
def by_einsum(x, t, noise):
    a = noise_levels()[t]
    return torch.einsum("b,bhw->bhw", a.sqrt(), x) + torch.einsum("b,bhw->bhw", (1 - a).sqrt(), noise)


@right("add_noise")
def in_numpy_with_angles(x, t, noise):
    angle = np.arccos(np.sqrt(noise_levels().double().numpy()))[t.numpy()].reshape(-1, 1, 1)
    return torch.from_numpy(np.cos(angle) * x.numpy() + np.sin(angle) * noise.numpy()).float()


@right("add_noise")
def in_flat_vectors(x, t, noise):
    a = noise_levels().index_select(0, t).unsqueeze(1)
    return torch.addcmul(a.sqrt() * x.flatten(1), (1 - a).sqrt(), noise.flatten(1)).view_as(x)


@wrong("add_noise", "You multiply by a_t and 1 - a_t. They are shares of the variance: the factors are their roots.")
def without_roots(x, t, noise):
    a = noise_levels()[t][:, None, None]
    return a * x + (1 - a) * noise


@wrong("add_noise", "You take the root for the picture only. The factor of the noise is a root, too.")
@changed(add_noise, ("(1 - a).sqrt()", "(1 - a)"))
def no_root_of_the_noise(): ...


@wrong("add_noise", "You take the root for the noise only. The factor of the picture is a root, too.")
@changed(add_noise, ("a.sqrt() * x", "a * x"))
def no_root_of_the_picture(): ...


@wrong("add_noise", "The factor of your noise is 1 - sqrt(a_t). It is sqrt(1 - a_t), so that the squares add up to 1.")
@changed(add_noise, ("(1 - a).sqrt()", "(1 - a.sqrt())"))
def one_minus_the_root(): ...


@wrong("add_noise", "The two factors are swapped: at step 0 you have nothing but noise.")
@changed(add_noise, ("noise_levels()[t]", "(1 - noise_levels())[t]"))
def swapped(): ...


@wrong("add_noise", "You add noise without making the picture weaker. At the last step there should be only noise.")
@changed(add_noise, ("a.sqrt() * x", "x"))
def the_picture_stays(): ...


@wrong("add_noise", "The levels are counted from 0: a_t is at place t, not at t - 1.")
@changed(add_noise, ("[t][", "[(t - 1).clamp(min=0)]["))
def one_step_early(): ...


@wrong("add_noise", "You use the share 1 - t / T. The statement names another schedule: `noise_levels()`.")
@changed(add_noise, ("noise_levels()[t]", "(1 - t / STEPS)"))
def a_straight_line(): ...


@wrong(
    "add_noise",
    "The levels (B,) meet the last axis of the pictures (B, H, W), so that each column of pixels has its own step. "
    "This raises no error when B is W or 1.",
)
@changed(add_noise, ("[t][:, None, None]", "[t]"))
def along_the_last_axis(): ...


@wrong("add_noise", "The levels meet the rows of the pictures, not the pictures: two axes have to be added, not one.")
@changed(add_noise, ("[t][:, None, None]", "[t][:, None]"))
def along_the_rows(): ...


@wrong("add_noise", "You use the step of the first picture for all of them. Each has its own.")
@changed(add_noise, ("[t][:, None, None]", "[t[0]]"))
def one_step_for_all(): ...


@wrong("add_noise", "You draw noise of your own. The noise is given.")
def its_own_noise(x, t, noise):
    return add_noise(x, t, torch.randn_like(noise))


@wrong("add_noise", caught_by="changes its input")
def in_place(x, t, noise):
    x[:] = add_noise(x, t, noise)
    return x


@wrong("add_noise", "You return the noise alone, without the picture.")
@changed(add_noise, ("a.sqrt() * x + ", "0 * x + "))
def only_the_noise(): ...


@wrong("add_noise", "Your result has an axis of length 1 too many. It has the shape of the pictures.")
@changed(
    add_noise,
    ("return a.sqrt() * x + (1 - a).sqrt() * noise", "return (a.sqrt() * x + (1 - a).sqrt() * noise)[:, None]"),
)
def with_channels(): ...


# --- denoising_step ----------------------------------------------------------------------------------


def _levels(t):
    levels = noise_levels().double()
    return levels[t], levels[t - 1], levels[t] / levels[t - 1]


@right("denoising_step")
def through_the_noise_that_fits(x, predicted, t, noise):
    """Algorithm 2 of the paper, with the noise that belongs to the clipped picture."""
    a, before, alpha = _levels(t)
    x_0 = ((x.double() - (1 - a).sqrt() * predicted) / a.sqrt()).clamp(-1, 1)
    e = (x.double() - a.sqrt() * x_0) / (1 - a).sqrt()
    mean = (x.double() - (1 - alpha) / (1 - a).sqrt() * e) / alpha.sqrt()
    return (mean + ((1 - before) / (1 - a) * (1 - alpha)).sqrt() * noise).float()


@right("denoising_step")
def one_number_after_the_other(x, predicted, t, noise):
    levels = noise_levels().tolist()
    a, before = levels[t], levels[t - 1]
    alpha = a / before
    out = []
    for value, e, z in zip(x.flatten().tolist(), predicted.flatten().tolist(), noise.flatten().tolist()):
        x_0 = min(1.0, max(-1.0, (value - (1 - a) ** 0.5 * e) / a**0.5))
        mean = before**0.5 * (1 - alpha) / (1 - a) * x_0 + alpha**0.5 * (1 - before) / (1 - a) * value
        out.append(mean + ((1 - before) * (1 - alpha) / (1 - a)) ** 0.5 * z)
    return torch.tensor(out).reshape(x.shape)


@right("denoising_step")
def the_last_step_by_itself(x, predicted, t, noise):
    a, before, alpha = _levels(t)
    x_0 = (x / a.sqrt() - (1 / a - 1).sqrt() * predicted).clamp(-1, 1)
    if t == 1:
        return x_0.float()
    beta = 1 - alpha
    variance = (1 - before) / (1 - a) * beta
    weight = before.sqrt() * beta / (1 - a)
    rest = alpha.sqrt() * (1 - before) / (1 - a)
    return torch.lerp(torch.zeros_like(x_0), x_0, weight).add(rest * x).add(variance.sqrt() * noise).float()


@right("denoising_step")
def the_product_of_two_normal_densities(x, predicted, t, noise):
    """x_{t - 1} given x_0 is normal, and so is x_t given x_{t - 1}: their precisions add up."""
    a, before, alpha = _levels(t)
    x_0 = torch.clip((x - (1 - a) ** 0.5 * predicted) / a**0.5, min=-1, max=1)
    if before == 1:
        return x_0.float()
    of_picture, of_step = 1 / (1 - before), alpha / (1 - alpha)
    precision = of_picture + of_step
    mean = (of_picture * before.sqrt() * x_0 + of_step * x / alpha.sqrt()) / precision
    return (mean + noise / precision.sqrt()).float()


@right("denoising_step")
def in_numpy_by_levels(x, predicted, t, noise):
    a, before, alpha = (float(level) for level in _levels(t))
    x_0 = np.clip((x.numpy() - np.sqrt(1 - a) * predicted.numpy()) / np.sqrt(a), -1, 1)
    weights = np.array([np.sqrt(before) * (1 - alpha), np.sqrt(alpha) * (1 - before)]) / (1 - a)
    mean = np.tensordot(weights, np.stack([x_0, x.numpy()]), axes=1)
    return torch.from_numpy(mean + np.sqrt(max((1 - before) * (1 - alpha) / (1 - a), 0)) * noise.numpy()).float()


@wrong("denoising_step", "You do not clip the predicted picture. Its pixels are between -1 and 1.")
@changed(denoising_step, (".clamp(-1, 1)", ""))
def not_clipped(): ...


@wrong("denoising_step", "You clip to the range from 0 to 1. In a diffusion model the pixels go from -1 to 1.")
@changed(denoising_step, (".clamp(-1, 1)", ".clamp(0, 1)"))
def clipped_to_other_numbers(): ...


@wrong("denoising_step", "You clip the result. Only the predicted picture is clipped: x_{t - 1} still has noise.")
@changed(
    denoising_step,
    (".clamp(-1, 1)", ""),
    ("return mean + deviation * noise", "return (mean + deviation * noise).clamp(-1, 1)"),
)
def the_result_is_clipped(): ...


@wrong("denoising_step", "You return the predicted picture at every step. Only at the last one are they the same.")
@changed(denoising_step, ("return mean + deviation * noise", "return x_0"))
def straight_to_the_picture(): ...


@wrong("denoising_step", "You add no noise. x_{t - 1} is drawn from a distribution, whose mean you return.")
@changed(denoising_step, ("mean + deviation * noise", "mean"))
def only_the_mean(): ...


@wrong("denoising_step", "You multiply the noise by the variance. The factor is its root, the standard deviation.")
@changed(denoising_step, ("return mean + deviation * noise", "return mean + deviation**2 * noise"))
def times_the_variance(): ...


@wrong(
    "denoising_step",
    "Your variance is 1 - alpha_t, which the paper also considers. The statement's is smaller, and 0 at the last step.",
)
@changed(denoising_step, ("((1 - before) / (1 - a) * (1 - kept)).sqrt()", "(1 - kept).sqrt()"))
def the_other_variance(): ...


@wrong("denoising_step", "You use the predicted noise as if it were the predicted picture.")
@changed(denoising_step, ("(x - (1 - a).sqrt() * predicted) / a.sqrt()", "predicted"))
def the_noise_as_the_picture(): ...


@wrong("denoising_step", "You subtract the noise from x_t, but you do not divide by sqrt(a_t) to get x_0.")
@changed(denoising_step, (" / a.sqrt()", ""))
def not_divided(): ...


@wrong("denoising_step", "You divide by a_t. Equation 4, solved for x_0, has its root there.")
@changed(denoising_step, ("/ a.sqrt()", "/ a"))
def divided_by_the_level(): ...


@wrong("denoising_step", "You subtract the predicted noise as it is. In x_t it has the factor sqrt(1 - a_t).")
@changed(denoising_step, ("(1 - a).sqrt() * predicted", "predicted"))
def all_of_the_noise(): ...


@wrong("denoising_step", "You add the predicted noise instead of subtracting it.")
@changed(denoising_step, ("(x - (1 - a)", "(x + (1 - a)"))
def noise_is_added(): ...


@wrong("denoising_step", "The weights of x_0 and x_t are swapped in your mean.")
@changed(denoising_step, ("(1 - kept) * x_0 +", "(1 - kept) * x +"), ("(1 - before) * x)", "(1 - before) * x_0)"))
def weights_swapped(): ...


@wrong("denoising_step", "a_t and a_{t - 1} are swapped. The level before is the larger one, at place t - 1.")
@changed(denoising_step, ("levels[t], levels[t - 1]", "levels[t - 1], levels[t]"))
def levels_swapped(): ...


@wrong("denoising_step", "You take the next level, a_{t + 1}, where a_{t - 1} stands.")
@changed(denoising_step, ("levels[t - 1]", "levels[min(t + 1, len(levels) - 1)]"))
def the_next_level(): ...


@wrong("denoising_step", "You take a_t for alpha_t. alpha_t = a_t / a_{t - 1} belongs to one step.")
@changed(denoising_step, ("kept = a / before", "kept = a"))
def the_level_as_alpha(): ...


@wrong("denoising_step", "You do not divide the mean by 1 - a_t.")
@changed(denoising_step, ("(1 - before) * x) / (1 - a)", "(1 - before) * x)"))
def mean_not_divided(): ...


@wrong("denoising_step", "You leave out x_t itself: the mean is a weighted sum of x_0 and x_t.")
@changed(denoising_step, (" + kept.sqrt() * (1 - before) * x)", ")"))
def without_the_noisy_picture(): ...


@wrong("denoising_step", "The weights of your mean have no roots. It is sqrt(a_{t - 1}) and sqrt(alpha_t).")
@changed(denoising_step, ("before.sqrt()", "before"), ("kept.sqrt()", "kept"))
def weights_without_roots(): ...


@wrong("denoising_step", "You noise the predicted picture anew for step t - 1. That forgets x_t: the mean contains it.")
def noised_anew(x, predicted, t, noise):
    levels = noise_levels()
    a, before = levels[t], levels[t - 1]
    x_0 = ((x - (1 - a).sqrt() * predicted) / a.sqrt()).clamp(-1, 1)
    return before.sqrt() * x_0 + (1 - before).sqrt() * noise


@wrong("denoising_step", "You draw noise of your own. The noise is given.")
def its_own_draw(x, predicted, t, noise):
    return denoising_step(x, predicted, t, torch.randn_like(noise))


@wrong(
    "denoising_step", "Your noise levels fall along a straight line, 1 - t / T. The statement names another schedule."
)
@changed(denoising_step, ("levels = noise_levels()", "levels = 1 - 0.999 * torch.arange(STEPS + 1) / STEPS"))
def steps_of_a_straight_line(): ...


@wrong("denoising_step", "Your result is a batch of flat vectors. It has the shape of x_t.")
def flattened(x, predicted, t, noise):
    return denoising_step(x, predicted, t, noise).reshape(-1)

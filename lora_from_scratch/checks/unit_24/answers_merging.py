"""Unit 24: mistakes that people make, and other right ways. TIES, DARE and intruder dimensions."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.merging import drop_and_rescale, intruder_dimensions, merge_agreeing, trim

# --- trim --------------------------------------------------------------------------------------------


@right("trim")
def one_place_after_the_other(update, density):
    values = update.flatten().tolist()
    places = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
    kept = set(places[: round(density * len(values))])
    return torch.tensor([v if place in kept else 0.0 for place, v in enumerate(values)]).reshape(update.shape)


@right("trim")
def with_a_mask(update, density):
    ranks = update.abs().flatten().argsort(descending=True, stable=True).argsort()
    return update * (ranks < round(density * update.numel())).view(update.shape)


@right("trim")
def zeroes_the_smallest(update, density):
    result = update.clone().reshape(-1)
    order = torch.sort(result.abs(), descending=True, stable=True).indices
    result[order[round(density * len(result)) :]] = 0
    return result.reshape(update.shape)


@right("trim")
def in_numpy(update, density):
    flat = update.numpy().ravel()
    order = np.argsort(-np.abs(flat), kind="stable")[: round(density * flat.size)]
    result = np.zeros_like(flat)
    np.put(result, order, flat[order])
    return torch.from_numpy(result.reshape(update.shape))


@wrong("trim", "You keep the largest values, so that negative entries are lost. What counts is the magnitude.")
@changed(trim, ("update.abs().flatten()", "update.flatten()"))
def the_largest_values(): ...


@wrong("trim", "You keep the smallest magnitudes. The largest ones are kept.")
@changed(trim, ("descending=True", "descending=False"))
def the_smallest(): ...


@wrong("trim", "You keep the magnitudes instead of the values: negative entries lose their signs.")
@changed(trim, ("= update.flatten()[places]", "= update.abs().flatten()[places]"))
def without_the_signs(): ...


@wrong("trim", "You drop the share `density` of the entries. It is the share that is kept.")
@changed(trim, ("round(density * update.numel())", "round((1 - density) * update.numel())"))
def the_share_that_is_dropped(): ...


@wrong("trim", "You round the number of kept entries down. It is rounded to the nearest integer.")
@changed(trim, ("round(density", "int(density"))
def rounded_down(): ...


@wrong("trim", "You keep at least one entry, also with density 0.")
@changed(trim, ("round(density * update.numel())", "max(1, round(density * update.numel()))"))
def at_least_one(): ...


@wrong("trim", "You keep a share of each row. The share is one of all entries: a row may lose all of its entries.")
def row_by_row(update, density):
    if update.ndim < 2:
        return trim(update, density)
    return torch.stack([row_by_row(row, density) for row in update])


@wrong(
    "trim",
    "You keep everything that is at least as large as a threshold. Of equal entries that keeps more than the share.",
)
def from_a_threshold(update, density):
    count = round(density * update.numel())
    if not count:
        return torch.zeros_like(update)
    threshold = update.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(update.abs() >= threshold, update, 0.0)


@wrong("trim", "Of entries with the same magnitude you keep the last ones. The first ones are kept.")
def the_last_of_equal_ones(update, density):
    return trim(update.flatten().flip(0), density).flip(0).view_as(update)


@wrong(
    "trim",
    "Your `view` needs a tensor that is contiguous in memory, and a transposed one is not: use `flatten` or `reshape`.",
)
@changed(trim, ("update.flatten()[places]", "update.view(-1)[places]"))
def contiguous_ones_only(): ...


@wrong("trim", "With density 1 your result is the update itself, not a new tensor.")
def the_update_itself_at_density_1(update, density):
    return update if density == 1 else trim(update, density)


@wrong("trim", "You rescale what is kept. That is DARE; here the kept entries keep their values.")
def rescaled(update, density):
    return trim(update, density) / max(density, 1e-6)


@wrong("trim", "Your result is flat. It should have the shape of the update.")
def flat(update, density):
    return trim(update, density).flatten()


@wrong("trim", caught_by="changes its input")
def in_place(update, density):
    update.copy_(trim(update, density))
    return update


# --- merge_agreeing ----------------------------------------------------------------------------------


@right("merge_agreeing")
def positive_and_negative_parts(updates):
    total = updates.sum(0)
    result = torch.zeros_like(total)
    for side in (1, -1):
        part = torch.clamp(side * updates, min=0)
        mean = part.sum(0) / (part > 0).sum(0).clamp(min=1)
        result = torch.where(side * total > 0, side * mean, result)
    return result


@right("merge_agreeing")
def one_entry_at_a_time(updates):
    columns = updates.flatten(1).T
    merged = []
    for column in columns.tolist():
        total = float(torch.tensor(column).sum())
        same = [value for value in column if value * total > 0]
        merged.append(sum(same) / len(same) if same else 0.0)
    return torch.tensor(merged).reshape(updates.shape[1:])


@right("merge_agreeing")
def a_mean_over_nan(updates):
    agreeing = torch.where(updates * updates.sum(0) > 0, updates, torch.nan)
    return agreeing.nanmean(0).nan_to_num(0.0)


@right("merge_agreeing")
def masked_with_numpy(updates):
    values = updates.numpy()
    agrees = values * updates.sum(0).numpy() > 0
    count = np.maximum(agrees.sum(0), 1)
    return torch.from_numpy((values * agrees).sum(0) / count)


@wrong("merge_agreeing", "You average all updates. Those that disagree with the elected sign, and zeros, do not count.")
def the_mean_of_all(updates):
    return updates.mean(0)


@wrong("merge_agreeing", "You add up what agrees. It is averaged.")
@changed(merge_agreeing, (" / agrees.sum(dim=0).clamp(min=1)", ""))
def the_sum_of_what_agrees(): ...


@wrong("merge_agreeing", "You divide by the number of all updates. The mean is over those that agree.")
@changed(merge_agreeing, ("agrees.sum(dim=0).clamp(min=1)", "len(updates)"))
def divided_by_all(): ...


@wrong(
    "merge_agreeing", "You elect the sign that most updates have. The sum decides, so that a large value counts more."
)
@changed(merge_agreeing, ("updates.sum(dim=0).sign()", "updates.sign().sum(dim=0).sign()"))
def the_majority(): ...


@wrong("merge_agreeing", "You count the zeros as values that agree, which makes the mean too small.")
@changed(merge_agreeing, ("updates.sign() == elected", "(updates.sign() == elected) | (updates == 0)"))
def zeros_agree(): ...


@wrong("merge_agreeing", "Where no sign is elected, or nothing agrees, you divide by zero. The result is zero there.")
@changed(merge_agreeing, (".clamp(min=1)", ""))
def divided_by_zero(): ...


@wrong("merge_agreeing", "You average the entries that disagree with the elected sign.")
@changed(merge_agreeing, ("updates.sign() == elected", "updates.sign() == -elected"))
def those_that_disagree(): ...


@wrong("merge_agreeing", "You elect one sign for a whole update. Each entry has an election of its own.")
@changed(merge_agreeing, ("updates.sum(dim=0).sign()", "updates.sum().sign()"))
def one_sign_for_all(): ...


@wrong(
    "merge_agreeing", "Where the sum is zero you take it for positive. No sign is elected there, and the result is 0."
)
@changed(merge_agreeing, ("updates.sum(dim=0).sign()", "torch.where(updates.sum(dim=0) >= 0, 1.0, -1.0)"))
def zero_is_positive(): ...


@wrong("merge_agreeing", "You return magnitudes: negative entries lose their signs.")
@changed(merge_agreeing, ("(updates * agrees)", "(updates.abs() * agrees)"))
def magnitudes(): ...


@wrong("merge_agreeing", "You take the largest of the values that agree. They are averaged.")
def the_largest_that_agrees(updates):
    elected = updates.sum(0).sign()
    return elected * (updates * elected).clamp(min=0).amax(0)


@wrong("merge_agreeing", "You merge along the last axis. The updates are counted along the first.")
def along_the_last_axis(updates):
    return merge_agreeing(updates.movedim(-1, 0))


# --- drop_and_rescale --------------------------------------------------------------------------------


@right("drop_and_rescale")
def as_dropout(update, drop_rate, generator=None):
    mask = torch.empty_like(update).bernoulli_(1 - drop_rate, generator=generator)
    return update.mul(mask).div(1 - drop_rate)


@right("drop_and_rescale")
def by_places(update, drop_rate, generator=None):
    result = update.clone().flatten()
    draw = torch.rand(len(result), generator=generator)
    for place in (draw < drop_rate).nonzero().flatten():
        result[place] = 0
    return result.view(update.shape) / (1 - drop_rate)


@right("drop_and_rescale")
def with_where(update, drop_rate, generator=None):
    draw = torch.rand(update.shape, generator=generator)
    return torch.where(draw < 1 - drop_rate, update / (1 - drop_rate), 0.0)


@right("drop_and_rescale")
def masked(update, drop_rate, generator=None):
    probabilities = torch.full(update.shape, drop_rate)
    return (update * (1 / (1 - drop_rate))).masked_fill(torch.bernoulli(probabilities, generator=generator) > 0, 0)


@wrong("drop_and_rescale", "You do not rescale, so that on average the update becomes smaller.")
@changed(drop_and_rescale, (" / (1 - drop_rate)", ""))
def without_rescaling(): ...


@wrong("drop_and_rescale", "You drop the share 1 - drop_rate. `drop_rate` is the share that becomes zero.")
@changed(drop_and_rescale, (">= drop_rate", "< drop_rate"))
def the_share_that_is_kept(): ...


@wrong("drop_and_rescale", "You divide by the rate. The kept entries are divided by 1 - drop_rate.")
@changed(drop_and_rescale, ("(1 - drop_rate)", "(drop_rate or 1)"))
def divided_by_the_rate(): ...


@wrong("drop_and_rescale", "You multiply the kept entries by 1 - drop_rate. They have to grow, not shrink.")
@changed(drop_and_rescale, ("/ (1 - drop_rate)", "* (1 - drop_rate)"))
def shrunk(): ...


@wrong("drop_and_rescale", "The given generator is not used in your draw.")
@changed(drop_and_rescale, ("generator=generator", "generator=None"))
def without_the_generator(): ...


@wrong("drop_and_rescale", "You drop whole rows. Each entry is dropped by itself.")
@changed(drop_and_rescale, ("torch.rand(update.shape,", "torch.rand([len(update)] + [1] * (update.ndim - 1),"))
def whole_rows(): ...


@wrong(
    "drop_and_rescale",
    "Every call drops the same entries, whatever the generator. They are dropped at random, whatever their size.",
)
def always_the_same(update, drop_rate, generator=None):
    return drop_and_rescale(update, drop_rate, torch.Generator().manual_seed(0))


@wrong("drop_and_rescale", "Without a generator you draw from one of your own. It should be PyTorch's.")
def an_own_generator(update, drop_rate, generator=None):
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return drop_and_rescale(update, drop_rate, generator)


@wrong(
    "drop_and_rescale",
    "If nothing is dropped, you return the update itself. Whoever writes into the result changes it: return a copy.",
)
@changed(drop_and_rescale, ("    kept =", "    if not drop_rate:\n        return update\n    kept ="))
def the_update_itself(): ...


@wrong(
    "drop_and_rescale",
    "You drop the same number of entries in every draw. Each entry is dropped by itself, so that the number varies.",
)
def an_exact_number(update, drop_rate, generator=None):
    order = torch.randperm(update.numel(), generator=generator).view(update.shape)
    return update * (order >= round(drop_rate * update.numel())) / (1 - drop_rate)


@wrong("drop_and_rescale", "You add noise instead of dropping: no entry becomes zero.")
def noise(update, drop_rate, generator=None):
    return update * (1 + drop_rate * torch.randn(update.shape, generator=generator))


@wrong("drop_and_rescale", caught_by="changes its input")
def dropped_in_place(update, drop_rate, generator=None):
    first = drop_and_rescale(update, drop_rate, generator)
    update += 0.5
    return first


# --- intruder_dimensions -----------------------------------------------------------------------------


@right("intruder_dimensions")
def one_vector_at_a_time(W, tuned, leading, threshold=0.6):
    before, after = torch.linalg.svd(W, full_matrices=False).U, torch.linalg.svd(tuned, full_matrices=False).U
    count = 0
    for new in after.T[:leading]:
        if all(abs(float(old @ new)) < threshold for old in before.T):
            count += 1
    return count


@right("intruder_dimensions")
def in_numpy_by_svd(W, tuned, leading, threshold=0.6):
    before = np.linalg.svd(W.double().numpy(), full_matrices=False)[0]
    after = np.linalg.svd(tuned.double().numpy(), full_matrices=False)[0]
    return int((np.abs(after[:, :leading].T @ before).max(axis=1) < threshold).sum())


@right("intruder_dimensions")
def leading_minus_the_old_ones(W, tuned, leading, threshold=0.6):
    before, after = (torch.linalg.svd(matrix, full_matrices=False)[0] for matrix in (W, tuned))
    looked_at = after[:, :leading]
    return looked_at.shape[1] - int(((looked_at.T @ before).square() >= threshold**2).any(dim=1).sum())


@right("intruder_dimensions")
def cosines_by_einsum(W, tuned, leading, threshold=0.6):
    before, after = torch.svd(W)[0], torch.svd(tuned)[0][:, :leading]
    best = torch.einsum("oi,oj->ij", before, after).abs().max(0)[0]
    return best.lt(threshold).sum().item()


@wrong("intruder_dimensions", "A vector and its opposite are the same direction: take the cosine without its sign.")
@changed(intruder_dimensions, (".abs()", ""))
def with_signs(): ...


@wrong("intruder_dimensions", "You count the vectors that are like one of W's. Intruders are the others.")
@changed(intruder_dimensions, ("< threshold", ">= threshold"))
def the_old_ones(): ...


@wrong("intruder_dimensions", "You count a cosine that equals the threshold. It has to be below.")
@changed(intruder_dimensions, ("< threshold", "<= threshold"))
def up_to_the_threshold(): ...


@wrong("intruder_dimensions", "You look at all singular vectors. Only the leading ones count.")
@changed(intruder_dimensions, ("after[:, :leading]", "after"))
def all_of_them(): ...


@wrong(
    "intruder_dimensions",
    "You compare each vector with the one at the same place only. An old direction may have moved to another place: "
    "compare with each.",
)
@changed(intruder_dimensions, ("cosines.amax(dim=0)", "cosines[: cosines.shape[1]].diagonal()"))
def only_the_same_place(): ...


@wrong("intruder_dimensions", "You count a vector if *one* cosine is below the threshold. All of them have to be.")
@changed(intruder_dimensions, ("amax(dim=0)", "amin(dim=0)"))
def one_small_cosine(): ...


@wrong("intruder_dimensions", "You take the right singular vectors, of the inputs. The left ones are compared.")
def the_right_ones(W, tuned, leading, threshold=0.6):
    return intruder_dimensions(W.T, tuned.T, leading, threshold)


@wrong("intruder_dimensions", "You take the maximum over the new vectors: that counts old directions that got lost.")
@changed(intruder_dimensions, ("amax(dim=0)", "amax(dim=1)"))
def over_the_new_ones(): ...


@wrong("intruder_dimensions", "Your threshold is always 0.6.")
@changed(intruder_dimensions, ("< threshold", "< 0.6"))
def a_fixed_threshold(): ...


@wrong(
    "intruder_dimensions", "You compare the change with W. The singular vectors of the whole fine-tuned weight count."
)
def of_the_change(W, tuned, leading, threshold=0.6):
    return intruder_dimensions(W, tuned - W + 1e-9 * W, leading, threshold)


@wrong("intruder_dimensions", "You look at the vectors with the smallest singular values.")
@changed(intruder_dimensions, ("after[:, :leading]", "after[:, -leading:]"))
def the_last_ones(): ...


@wrong(
    "intruder_dimensions", "You compare only with the leading vectors of W. An intruder is like none of all of them."
)
@changed(intruder_dimensions, ("before.T @", "before[:, :leading].T @"))
def only_with_the_leading_ones(): ...


@wrong("intruder_dimensions", "You return a share. It is a whole number.")
def a_share(W, tuned, leading, threshold=0.6):
    return intruder_dimensions(W, tuned, leading, threshold) / leading / 2

"""Unit 25: mistakes that people make, and other right ways. Relative norms of parts, and forgetting."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.pictures.forgetting import forgotten
from lora_from_scratch.pictures.surgical import relative_norm_of_parts

# --- relative_norm_of_parts --------------------------------------------------------------------------


def _refuse(zero):
    if zero:
        raise ValueError("all weights of a part are zero")


@right("relative_norm_of_parts")
def sums_of_squares(gradients, weights, parts):
    found = {}
    for part, names in parts.items():
        p = sum(float((weights[name].double() ** 2).sum()) for name in names)
        _refuse(p == 0)
        found[part] = math.sqrt(sum(float((gradients[n].double() ** 2).sum()) for n in names if n in gradients) / p)
    return found


@right("relative_norm_of_parts")
def norms_of_norms(gradients, weights, parts):
    def size(tensors):
        return torch.stack([tensor.norm() for tensor in tensors]).norm() if tensors else torch.tensor(0.0)

    whole = {part: size([weights[name] for name in names]) for part, names in parts.items()}
    _refuse(any(p == 0 for p in whole.values()))
    return {part: size([gradients[n] for n in parts[part] if n in gradients]) / p for part, p in whole.items()}


@right("relative_norm_of_parts")
def in_numpy(gradients, weights, parts):
    def vector(tensors):
        return np.concatenate([np.zeros(1), *(tensor.numpy().ravel() for tensor in tensors)])

    sizes = {part: np.linalg.norm(vector([weights[name] for name in names])) for part, names in parts.items()}
    _refuse(min(sizes.values()) == 0)
    norms = {p: np.linalg.norm(vector([gradients[n] for n in ns if n in gradients])) for p, ns in parts.items()}
    return {part: norms[part] / sizes[part] for part in parts}


@right("relative_norm_of_parts")
def from_one_tensor_to_the_next(gradients, weights, parts):
    result = dict.fromkeys(parts, 0.0)
    for part in parts:
        g = p = 0.0
        for name in parts[part]:
            p = math.hypot(p, weights[name].norm().item())
            if gradients.get(name) is not None:
                g = math.hypot(g, gradients[name].norm().item())
        _refuse(not p)
        result[part] = g / p
    return result


@wrong(
    "relative_norm_of_parts",
    "You average the quotients of the tensors. A small bias then counts as much as a large matrix.",
)
def the_mean_of_the_quotients(gradients, weights, parts):
    found = {}
    for part, names in parts.items():
        _refuse(all(not weights[n].any() for n in names))
        quotients = [gradients[n].norm() / weights[n].norm() if n in gradients else torch.tensor(0.0) for n in names]
        found[part] = float(sum(quotients) / len(quotients))
    return found


@wrong(
    "relative_norm_of_parts", "You add up the norms of the tensors. The norm of a long vector is smaller: square first."
)
def sums_of_norms(gradients, weights, parts):
    found = {}
    for part, names in parts.items():
        p = sum(float(weights[n].norm()) for n in names)
        _refuse(p == 0)
        found[part] = sum(float(gradients[n].norm()) for n in names if n in gradients) / p
    return found


@wrong("relative_norm_of_parts", "Your number is the square of the quotient: a root is missing.")
def without_the_root(gradients, weights, parts):
    return {part: value**2 for part, value in relative_norm_of_parts(gradients, weights, parts).items()}


@wrong("relative_norm_of_parts", "You divide the weights' norm by the gradient's. It is the other way round.")
def upside_down(gradients, weights, parts):
    found = relative_norm_of_parts(gradients, weights, parts)
    return {part: 1 / value if value else math.inf for part, value in found.items()}


@wrong("relative_norm_of_parts", "You do not divide by the norm of the weights.")
@changed(relative_norm_of_parts, ("float(g / p)", "float(g)"))
def the_norm_of_the_gradient(): ...


@wrong("relative_norm_of_parts", "You divide every entry by its own weight. It is a quotient of two norms.")
def entry_by_entry(gradients, weights, parts):
    found = {}
    for part, names in parts.items():
        p = torch.cat([weights[n].flatten() for n in names])
        _refuse(not p.any())
        g = torch.cat([gradients.get(n, torch.zeros_like(weights[n])).flatten() for n in names])
        found[part] = float((g / (p + 1e-8)).abs().mean())
    return found


@wrong(
    "relative_norm_of_parts",
    "You leave out the weights of a tensor that has no gradient. Its gradient counts as zeros; its weights count.",
)
def weights_are_left_out(gradients, weights, parts):
    found = {}
    for part, names in parts.items():
        used = [n for n in names if n in gradients]
        _refuse(all(not weights[n].any() for n in names))
        p = torch.cat([torch.zeros(1), *(weights[n].flatten() for n in used)]).norm()
        g = torch.cat([torch.zeros(1), *(gradients[n].flatten() for n in used)]).norm()
        found[part] = float(g / p) if used else 0.0
    return found


@wrong(
    "relative_norm_of_parts", "You look up a gradient that is missing. A tensor without one has a gradient of zeros."
)
@changed(relative_norm_of_parts, ("gradients.get(name, torch.zeros_like(weights[name]))", "gradients[name]"))
def a_gradient_is_missing(): ...


@wrong("relative_norm_of_parts", "A part without any gradient is missing in your result. Its number is 0.")
def parts_are_left_out(gradients, weights, parts):
    found = relative_norm_of_parts(gradients, weights, parts)
    return {part: value for part, value in found.items() if value}


@wrong("relative_norm_of_parts", "Where all weights are zero you divide by zero. The statement asks for a ValueError.")
@changed(relative_norm_of_parts, ("if p == 0", "if p < 0"))
def infinity(): ...


@wrong("relative_norm_of_parts", "You skip a part whose weights are all zero. The statement asks for a ValueError.")
def zero_parts_are_skipped(gradients, weights, parts):
    kept = {part: names for part, names in parts.items() if any(weights[name].any() for name in names)}
    return relative_norm_of_parts(gradients, weights, kept)


@wrong(
    "relative_norm_of_parts",
    "You refuse a part because one of its tensors is zero. The quotient is undefined only if all of them are.",
)
def one_zero_tensor_is_refused(gradients, weights, parts):
    _refuse(any(not weights[name].any() for names in parts.values() for name in names))
    return relative_norm_of_parts(gradients, weights, parts)


@wrong("relative_norm_of_parts", "You divide by the norm of the whole model. Each part has its own weights.")
def relative_to_the_whole_model(gradients, weights, parts):
    found = {}
    whole = torch.cat([tensor.flatten() for tensor in weights.values()]).norm()
    for part, names in parts.items():
        _refuse(all(not weights[n].any() for n in names))
        g = torch.cat([gradients.get(n, torch.zeros_like(weights[n])).flatten() for n in names]).norm()
        found[part] = float(g / whole)
    return found


@wrong("relative_norm_of_parts", "You divide by the largest. That comes later, when it becomes a learning rate.")
def relative_to_the_largest(gradients, weights, parts):
    found = relative_norm_of_parts(gradients, weights, parts)
    largest = max(found.values()) or 1.0
    return {part: value / largest for part, value in found.items()}


@wrong("relative_norm_of_parts", "You give a number for each tensor. It is one for each part.")
def of_each_tensor(gradients, weights, parts):
    relative_norm_of_parts(gradients, weights, parts)
    names = [name for of_part in parts.values() for name in of_part]
    return {n: float(gradients[n].norm() / weights[n].norm()) if n in gradients else 0.0 for n in names}


@wrong("relative_norm_of_parts", "You return only the part with the largest number. Return all of them.")
def only_the_largest(gradients, weights, parts):
    found = relative_norm_of_parts(gradients, weights, parts)
    return max(found, key=found.get)


@wrong("relative_norm_of_parts", "You use the mean of the squares instead of their sum for the gradient.")
def the_root_of_the_mean_square(gradients, weights, parts):
    found = relative_norm_of_parts(gradients, weights, parts)
    return {part: value / sum(weights[n].numel() for n in parts[part]) ** 0.5 for part, value in found.items()}


# --- forgotten ---------------------------------------------------------------------------------------


@right("forgotten")
def one_class_after_the_other(before, after, labels, classes):
    shares = []
    for number in range(classes):
        known = after[(labels == number) & (before == number)]
        shares.append((known != number).float().mean() if len(known) else torch.tensor(float("nan")))
    return torch.stack(shares)


@right("forgotten")
def counted_with_bincount(before, after, labels, classes):
    known = labels[before == labels]
    lost = labels[(before == labels) & (after != labels)]
    return lost.bincount(minlength=classes) / known.bincount(minlength=classes)


@right("forgotten")
def one_minus_what_is_kept(before, after, labels, classes):
    known = torch.zeros(classes).index_add(0, labels, (before == labels).float())
    kept = torch.zeros(classes).index_add(0, labels, ((before == labels) & (after == labels)).float())
    return 1 - kept / known


@right("forgotten")
def in_plain_python(before, after, labels, classes):
    known, lost = [0] * classes, [0] * classes
    for old, new, label in zip(before.tolist(), after.tolist(), labels.tolist()):
        if old == label:
            known[label] += 1
            lost[label] += new != label
    return torch.tensor([a / b if b else math.nan for a, b in zip(lost, known)])


@right("forgotten")
def from_a_table_of_both(before, after, labels, classes):
    mine = labels[None] == torch.arange(classes)[:, None]
    right_before, right_after = mine & (before == labels), mine & (after == labels)
    return (right_before & ~right_after).sum(1) / right_before.sum(1)


@wrong(
    "forgotten",
    "You subtract two accuracies. Pictures that are right only now make up for forgotten ones; they do not count here.",
)
def the_difference_of_accuracies(before, after, labels, classes):
    known = torch.bincount(labels[before == labels], minlength=classes)
    now = torch.bincount(labels[after == labels], minlength=classes)
    return (known - now) / known


@wrong("forgotten", "You divide by the number of all pictures of the class. Only those that were known count.")
def a_share_of_all(before, after, labels, classes):
    lost = labels[(before == labels) & (after != labels)]
    return lost.bincount(minlength=classes) / labels.bincount(minlength=classes)


@wrong("forgotten", "You count every picture that is wrong now. What was wrong before cannot be forgotten.")
@changed(forgotten, ("lost = known & (after != labels)", "lost = after != labels"))
def everything_wrong(): ...


@wrong("forgotten", "You count every picture whose predicted class has changed. It may have changed for the better.")
@changed(forgotten, ("lost = known & (after != labels)", "lost = before != after"))
def everything_changed(): ...


@wrong("forgotten", "You return the share that is still known. What is forgotten is the rest.")
@changed(forgotten, ("(after != labels)", "(after == labels)"))
def what_is_kept(): ...


@wrong("forgotten", "You count what has been learned: wrong before, and right now.")
def what_is_learned(before, after, labels, classes):
    return forgotten(after, before, labels, classes)


@wrong("forgotten", "You sort the pictures by their class after the fine-tuning. A picture belongs to its right class.")
@changed(forgotten, ("F.one_hot(labels, classes)", "F.one_hot(after, classes)"))
def by_the_new_class(): ...


@wrong("forgotten", "You count the forgotten pictures by the class that is predicted now. Count them by their label.")
def lost_by_the_new_class(before, after, labels, classes):
    known = before == labels
    lost = after[known & (after != labels)]
    return lost.bincount(minlength=classes) / labels[known].bincount(minlength=classes)


@wrong("forgotten", "You return one number for all classes together. Each class has its own.")
def all_classes_together(before, after, labels, classes):
    known = before == labels
    return ((known & (after != labels)).sum() / known.sum()).expand(classes).clone()


@wrong("forgotten", "Of a class of which nothing was known you say that nothing is forgotten. That is undefined: NaN.")
def zero_instead_of_nan(before, after, labels, classes):
    return forgotten(before, after, labels, classes).nan_to_num(0.0)


@wrong("forgotten", "You leave out classes without a known picture. They have their place, with NaN.")
def classes_are_left_out(before, after, labels, classes):
    found = forgotten(before, after, labels, classes)
    return found[~found.isnan()]


@wrong("forgotten", "You return numbers of pictures instead of shares.")
def numbers(before, after, labels, classes):
    return labels[(before == labels) & (after != labels)].bincount(minlength=classes).float()


@wrong("forgotten", "You take the number of classes from the labels. A class may have no picture here.")
def classes_of_the_labels(before, after, labels, classes):
    return forgotten(before, after, labels, int(labels.max()) + 1)


@wrong("forgotten", "You return percentages. A share is between 0 and 1.")
def percentages(before, after, labels, classes):
    return 100 * forgotten(before, after, labels, classes)


@wrong("forgotten", "You divide by the number of all known pictures. Each class has its own number.")
def of_all_known(before, after, labels, classes):
    known = before == labels
    lost = labels[known & (after != labels)].bincount(minlength=classes)
    own = labels[known].bincount(minlength=classes)
    return torch.where(own > 0, lost / known.sum(), torch.nan)

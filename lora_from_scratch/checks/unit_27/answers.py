"""Unit 27: mistakes that people make, and other right ways. The reward, and the advantages."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re
import string

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.rewards import group_advantages, without_letter

# --- without_letter ----------------------------------------------------------------------------------


@right("without_letter")
def letter_by_letter(text, letter="e"):
    words, good, inside, clean = 0, 0, False, True
    for character in text.lower() + " ":
        if character in string.ascii_lowercase:
            inside, clean = True, clean and character != letter
        elif inside:
            words, good = words + 1, good + clean
            inside, clean = False, True
    return good / words if words else 0.0


@right("without_letter")
def by_splitting(text, letter="e"):
    words = [word for word in re.split("[^a-z]+", text.lower()) if word]
    return len([word for word in words if word.count(letter) == 0]) / max(len(words), 1)


@right("without_letter")
def other_characters_become_spaces(text, letter="e"):
    words = "".join(c if c in string.ascii_letters else " " for c in text).split()
    return np.mean([letter not in word.lower() for word in words]).item() if words else 0.0


@right("without_letter")
def one_minus_the_others(text, letter="e"):
    words = re.findall("[a-z]+", text, flags=re.IGNORECASE)
    if not words:
        return 0.0
    bad = [word for word in words if letter in word or letter.upper() in word]
    return 1 - len(bad) / len(words)


@wrong("without_letter", "You count the words that contain the letter. The reward is for those that do not.")
@changed(without_letter, ("letter not in", "letter in"))
def those_with_the_letter(): ...


@wrong("without_letter", "You overlook capital letters: END contains an e.")
@changed(without_letter, ("word.lower()", "word"))
def capitals_are_overlooked(): ...


@wrong("without_letter", "You split at spaces. What is between two spaces may be several words, or no word.")
def split_at_spaces(text, letter="e"):
    words = text.split()
    return sum(letter not in word.lower() for word in words) / len(words) if words else 0.0


@wrong("without_letter", "A `\\w` is also a digit or an underscore. A word is a run of letters.")
@changed(without_letter, ("[A-Za-z]+", r"\w+"))
def digits_are_letters(): ...


@wrong("without_letter", "You take letters with accents for letters. A word is a run of letters from A to Z.")
@changed(without_letter, ("[A-Za-z]+", r"[^\W\d_]+"))
def letters_with_accents(): ...


@wrong("without_letter", "A text without words gives you a division by zero. Its reward is 0.")
@changed(without_letter, (" if words else 0.0", ""))
def no_words_no_answer(): ...


@wrong("without_letter", "A text without words has the reward 1 in your function. It has the reward 0.")
@changed(without_letter, ("else 0.0", "else 1.0"))
def no_words_are_perfect(): ...


@wrong("without_letter", "You count different words. A word that occurs twice counts twice.")
@changed(without_letter, ('re.findall(r"[A-Za-z]+", text)', 'set(re.findall(r"[A-Za-z]+", text))'))
def different_words(): ...


@wrong("without_letter", "You return the number of words. The reward is their share.")
@changed(without_letter, (" / len(words) if words else 0.0", ""))
def the_number_of_words(): ...


@wrong("without_letter", "You return a percentage. A share is from 0 to 1.")
def in_per_cent(text, letter="e"):
    return 100 * without_letter(text, letter)


@wrong("without_letter", "Your function always looks for an e. The letter is an argument.")
@changed(without_letter, ("letter not in", '"e" not in'))
def always_an_e(): ...


@wrong("without_letter", "You return the share of letters. It is the share of words.")
def the_share_of_letters(text, letter="e"):
    letters = [c for c in text.lower() if c.isalpha()]
    return sum(c != letter for c in letters) / len(letters) if letters else 0.0


@wrong("without_letter", "You return 1 only if the whole text lacks the letter. Each word counts by itself.")
def all_or_nothing(text, letter="e"):
    words = re.findall("[A-Za-z]+", text)
    return float(letter not in text.lower()) if words else 0.0


@wrong("without_letter", "You look only at the first letter of a word.")
@changed(without_letter, ("letter not in word.lower()", "letter != word[0].lower()"))
def the_first_letter(): ...


# --- group_advantages --------------------------------------------------------------------------------


@right("group_advantages")
def one_group_at_a_time(rewards, normalize=True):
    rows = []
    for group in rewards.tolist():
        mean = sum(group) / len(group)
        row = [reward - mean for reward in group]
        spread = (sum(value * value for value in row) / len(row)) ** 0.5
        if normalize:
            row = [value / spread if spread > 1e-6 else 0.0 for value in row]
        rows.append(row)
    return torch.tensor(rows)


@right("group_advantages")
def with_a_small_number_added(rewards, normalize=True):
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True).sqrt() + 1e-4) if normalize else centred


@right("group_advantages")
def relative_to_the_first(rewards, normalize=True):
    from_first = rewards - rewards[:, :1]  # exactly 0 for equal rewards
    centred = from_first - from_first.mean(1, keepdim=True)
    if not normalize:
        return centred
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return centred * torch.where(spread < 1e-5, 0.0, 1 / spread)


@right("group_advantages")
def in_numpy(rewards, normalize=True):
    values = rewards.numpy().astype(np.float64)
    centred = values - values.mean(axis=1, keepdims=True)
    if normalize:
        spread = values.std(axis=1, keepdims=True)
        centred = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 1e-6)
    return torch.from_numpy(centred.astype(np.float32))


@right("group_advantages")
def by_a_matrix(rewards, normalize=True):
    size = rewards.shape[1]
    centred = rewards @ (torch.eye(size) - torch.ones(size, size) / size)
    if not normalize:
        return centred
    spread = (centred**2).mean(1, keepdim=True).sqrt()
    return (centred / spread).masked_fill(spread < 1e-4, 0)


@wrong("group_advantages", "You subtract the mean over all groups. Each group has a baseline of its own.")
@changed(group_advantages, ("rewards.mean(dim=1, keepdim=True)", "rewards.mean()"))
def one_baseline_for_all(): ...


@wrong("group_advantages", "You subtract the mean along the prompts. The texts of a group are along axis 1.")
def along_the_prompts(rewards, normalize=True):
    return group_advantages(rewards.T, normalize).T


@wrong("group_advantages", "You divide by the standard deviation of all rewards. Each group has its own.")
@changed(group_advantages, ("rewards.std(dim=1, keepdim=True, correction=0)", "rewards.std(correction=0)"))
def one_scale_for_all(): ...


@wrong(
    "group_advantages",
    "PyTorch's `std` divides by G - 1 unless you tell it otherwise. Here it is the root of the mean of the squares.",
)
@changed(group_advantages, (", correction=0", ""))
def the_standard_deviation_of_a_sample(): ...


@wrong("group_advantages", "You divide by the variance. It is the standard deviation.")
@changed(group_advantages, (".std(", ".var("))
def the_variance(): ...


@wrong("group_advantages", "You always divide by the standard deviation, also with `normalize=False`.")
@changed(group_advantages, ("if normalize:", "if True:"))
def always_normalised(): ...


@wrong("group_advantages", "You never divide by the standard deviation.")
@changed(group_advantages, ("if normalize:", "if False:"))
def never_normalised(): ...


@wrong("group_advantages", "You divide without subtracting the mean: nearly all advantages are positive.")
@changed(group_advantages, ("rewards - rewards.mean(dim=1, keepdim=True)", "rewards.clone()"))
def without_a_baseline(): ...


@wrong("group_advantages", "A group of equal rewards gives you 0 / 0. Its advantages are 0.")
@changed(group_advantages, ("torch.where(spread > 1e-6, advantages / spread, 0.0)", "advantages / spread"))
def nothing_divided_by_nothing(): ...


@wrong(
    "group_advantages",
    "Eight rewards of 0.7 have a mean that differs from 0.7 by rounding. You divide this difference by a number "
    "that is as small, and get advantages where there should be none.",
)
@changed(group_advantages, ("torch.where(spread > 1e-6, advantages / spread, 0.0)", "advantages / (spread + 1e-8)"))
def a_tiny_number_added(): ...


@wrong(
    "group_advantages",
    "With a smallest spread of 1e-6 rounding is still visible: 6e-8 / 1e-6 is 0.06. Equal rewards have advantages of "
    "0.",
)
@changed(
    group_advantages, ("torch.where(spread > 1e-6, advantages / spread, 0.0)", "advantages / spread.clamp(min=1e-6)")
)
def a_tiny_smallest_spread(): ...


@wrong("group_advantages", "If one group has equal rewards, all groups get 0 in your function.")
def one_equal_group_stops_all(rewards, normalize=True):
    if bool((rewards.amax(1) == rewards.amin(1)).any()):
        return torch.zeros_like(rewards)
    return group_advantages(rewards, normalize)


@wrong("group_advantages", "Your baseline is the median of the group. It is the mean.")
@changed(group_advantages, ("rewards.mean(dim=1, keepdim=True)", "rewards.median(dim=1, keepdim=True).values"))
def the_median(): ...


@wrong("group_advantages", "You subtract the rewards from the mean: the signs are the wrong way round.")
def the_wrong_way_round(rewards, normalize=True):
    return -group_advantages(rewards, normalize)


@wrong("group_advantages", "You leave a text out of its own baseline. It is the mean of the whole group.")
def the_mean_of_the_others(rewards, normalize=True):
    size = rewards.shape[1]
    return group_advantages(rewards, normalize) * size / (size - 1)


@wrong("group_advantages", "You return a flat tensor. It should have the shape (P, G).")
def flat(rewards, normalize=True):
    return group_advantages(rewards, normalize).flatten()


@wrong("group_advantages", caught_by="changes its input")
def in_place(rewards, normalize=True):
    rewards -= rewards.mean(1, keepdim=True)
    return group_advantages(rewards, normalize)

"""Unit 05, prompts: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_05.explanations import (
    explain_initial,
    explain_labels,
    explain_nearest,
    explain_prepend,
    explain_soft,
)
from lora_from_scratch.checks.unit_05.probes import CONFIG, run_initial, run_prepend, run_soft, try_labels
from lora_from_scratch.methods.prompt_tuning import (
    SoftPrompt,
    few_shot_prompt,
    initial_prompt,
    nearest_tokens,
    prepend_prompt,
    prompt_labels,
)

TITLE = "Prompts"

# --- few_shot_prompt ---------------------------------------------------------------------------------

HEROES = ("woodcutter", "goose-girl", "miller", "king's son")
PLACES = ("on an island", "in a mill", "by the sea", "in the forest")


def few_shot_cases(draw: Draw) -> Iterator[Case]:
    def card(number: int) -> str:
        return f"hero[{draw.choice(HEROES)}], place[{draw.choice(PLACES)}], number[{number}]"

    def case(name: str, count: int, instruction: str, *sentences: str) -> Case:
        numbers = [int(number) + 2 for number in draw.permutation(90)]  # no card twice, and no text
        shots: list[Data] = [[card(n), f"Once there lived {n} of them."] for n in numbers[:count]]
        given: dict[str, Data] = {"examples": shots, "mr": card(numbers[count]), "instruction": instruction}
        return Case(name, given, sentences=sentences)

    parts, example, ends = "A hard prompt:", "A solved example is its card", "the prompt ends with the line break"
    order, shots, first = "in the order in which they appear", "without any", "which comes first"
    yield case(
        "one example, no instruction", 1, "", example, ends, parts, "no empty line for it", "the card whose text"
    )
    yield case("two examples and an instruction", 2, "Tell the tale of the card.", parts, order, first, ends)
    yield case("three examples, no instruction", 3, "", order, parts, example)
    yield case("no example and an instruction", 0, "Write the tale that is on the card.", shots, first, parts)
    yield case("neither examples nor an instruction", 0, "", shots, "no empty line for it", ends)
    spaced: dict[str, Data] = {"examples": [[card(1), " Once there lived one of them.\n"]], "mr": card(2)}
    name = "white space at the ends of the instruction and of a text"
    yield Case(name, spaced | {"instruction": "Tell the tale: "}, sentences=(example, first, parts))


# --- prepend_prompt ----------------------------------------------------------------------------------


def prepend_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, prompt: int, rows: int, tokens: int, width: int, *sentences: str) -> Case:
        given: dict[str, Data] = {"embeddings": draw.normal(prompt, width), "inputs": draw.normal(rows, tokens, width)}
        return Case(name, given, sentences=sentences)

    prepend, flow, shape = "prepend the same soft prompt", "gradients must flow to it", "(B, P + T, d)."
    yield case("2 virtual tokens, one row of 3 tokens", 2, 1, 3, 4, prepend, shape, flow)
    yield case("3 virtual tokens, two rows of 5 tokens", 3, 2, 5, 4, prepend, shape, flow)
    yield case("1 virtual token, four rows", 1, 4, 3, 2, prepend, shape)
    yield case("as many virtual tokens as rows and as tokens", 3, 3, 3, 3, prepend)


# --- prompt_labels -----------------------------------------------------------------------------------


def labels_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, length: int, rows: int, tokens: int, *sentences: str, ignored: int = 0) -> Case:
        labels = 1 + torch.stack([draw.permutation(60)[:tokens] for _ in range(rows)])  # no token twice in a row
        labels[:, :ignored] = -100
        return Case(name, {"labels": labels, "num_virtual_tokens": length}, sentences=sentences)

    prepended, ignore, own = "P labels are prepended", "its label is -100", "own labels are unchanged"
    shifts, shape, kept = "the loss shifts them", "(B, P + T) of int64", "not modified"
    yield case("2 virtual tokens before one row of 4", 2, 1, 4, prepended, ignore, own, shape, shifts, kept)
    name = "3 virtual tokens, two rows whose first two labels are -100"
    yield case(name, 3, 2, 5, own, shifts, prepended, ignored=2)
    yield case("1 virtual token, three rows", 1, 3, 4, ignore, prepended, shape)
    yield case("as many virtual tokens as rows and as labels", 4, 4, 4, prepended, own, ignored=1)


# --- initial_prompt ----------------------------------------------------------------------------------

TEXT, VOCABULARY, RANDOM, REFUSED = "from a text", "from the vocabulary", "at random", "what is refused"


def initial_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, part: str, rows: int, width: int, length: int, init: str, *sentences: str, ids: int = 0
    ) -> Case:
        given: dict[str, Data] = {"table": 0.1 * draw.normal(rows, width), "num_virtual_tokens": length, "init": init}
        chosen: list[Data] = [int(i) for i in draw.permutation(rows)[:ids]]
        return Case(name, given | {"init_ids": chosen, "seed": draw.integer(0, 10**6)}, part, sentences)

    text, new, values = (
        "truncated to P rows or repeated",
        "a new tensor, detached",
        "The initial values of a soft prompt",
    )
    common, twice, normal = "`COMMON_TOKENS` = 5,000 lowest ids", "No token is used twice", "samples from N(0, 1)"
    generator, own, error = "generator: the random number", "None: PyTorch's own", "`init` is none of the three"
    yield case("4 rows from a text of 4 tokens", TEXT, 12, 3, 4, "text", text, new, values, ids=4)
    yield case("7 rows from a text of 3 tokens", TEXT, 12, 3, 7, "text", text, ids=3)
    yield case("2 rows from a text of 5 tokens", TEXT, 12, 3, 2, "text", text, ids=5)
    yield case("3 rows from a text of a single token", TEXT, 12, 3, 3, "text", new, text, ids=1)
    name = "30 rows of a vocabulary of 40"
    yield case(name, VOCABULARY, 40, 3, 30, "vocabulary", common, twice, generator, own, values, ids=2)
    yield case("80 rows of a vocabulary of 6,000", VOCABULARY, 6000, 2, 80, "vocabulary", common)
    yield case("30 rows of a vocabulary of 30", VOCABULARY, 30, 3, 30, "vocabulary", twice)
    yield case("50 rows of a vocabulary of 30", VOCABULARY, 30, 3, 50, "vocabulary", twice, common)
    yield case("120 random rows of width 30", RANDOM, 40, 30, 120, "random", normal, generator, own, new)
    yield case("init is 'zeros'", REFUSED, 12, 3, 4, "zeros", error)
    yield case("init is 'text', and there are no ids", REFUSED, 12, 3, 4, "text", error)


# --- SoftPrompt --------------------------------------------------------------------------------------


def soft_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, part: str, what: str, length: int, rows: int, tokens: int, *sentences: str, **more: Data
    ) -> Case:
        given: dict[str, Data] = {"E": draw.normal(length, CONFIG.n_embd), "what": what}
        ids = draw.integers(0, CONFIG.vocab_size - 1, rows, tokens)
        return Case(name, given | {"ids": ids, "seed": draw.integer(0, 10**6)} | more, part, sentences)

    prepended, four, mask = "prepended to the embeddings of every text", "It returns the four", "the mask, unchanged"
    positions, cache = "whose first P are 0 to P - 1", "and the cache, unchanged"
    parameter, length = "`self.embeddings` (P, d), a parameter", "takes P"
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    yield case("enter: 2 virtual tokens, a row of 3 tokens", "enter", "enter", 2, 1, 3, four, prepended, positions)
    name = "enter, with a mask and positions"
    yield case(name, "enter", "enter", 3, 2, 5, four, mask, positions, positions=True)
    model = "in a model"
    yield case("in a model: two rows of 5 tokens", model, "logits", 3, 2, 5, prepended)
    yield case("in a model: padding before one row", model, "logits", 3, 2, 5, mask, positions, mask=padding)
    yield case("in a model, with positions", model, "logits", 2, 2, 5, positions, positions=True)
    yield case("in a model, read in two pieces with a cache", model, "pieces", 3, 2, 6, cache)
    yield case("what is trained", "what is learned", "training", 3, 2, 5, parameter, length)


# --- nearest_tokens ----------------------------------------------------------------------------------


def nearest_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, prompt: Tensor, table: Tensor, *sentences: str) -> Case:
        return Case(name, {"prompt": prompt, "table": table}, sentences=sentences)

    each, cosine, ids = "For each row of a soft prompt", "the largest cosine similarity", "(P,) token ids"
    table = draw.normal(9, 4)
    places = [int(i) for i in draw.permutation(9)[:3]]
    yield case("three embeddings, scaled up", 3.0 * table[places], table, each, ids, cosine)
    yield case("one embedding, scaled down", 0.1 * table[places[:1]], table, each, cosine)
    yield case("5 random rows, 12 tokens", draw.normal(5, 4), draw.normal(12, 4), ids, each)
    long = torch.tensor([[0.0, 1.0, 0.0], [8.0, 6.0, 0.0], [1.0, 0.0, 0.0]])[draw.permutation(3)]
    rows = torch.tensor([[3.0, 0.3, 0.0], [0.2, 2.0, 0.1]])
    yield case("two rows whose nearest embeddings are short, beside a long one", rows, long, cosine)
    uneven = draw.normal(15, 3) * torch.linspace(0.2, 4, 15)[:, None]
    yield case("6 random rows, embeddings of very different length", draw.normal(6, 3), uneven, cosine)
    skewed = torch.tensor([9.0, 1.0, 0.1])
    features = (skewed * draw.normal(6, 3), skewed * draw.normal(14, 3))
    yield case("6 random rows, one feature much larger than the others", *features, cosine)
    away = torch.tensor([[1.0, 4.0], [1.0, -4.0], [4.0, 1.0]])[[1, 0, 2] if draw.integer(0, 1) else [2, 1, 0]]
    yield case("a row that points away from all embeddings", torch.tensor([[-1.0, 0.1]]), away, cosine)


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        few_shot_prompt,
        idea="hard prompts",
        difficulty=1,
        minutes=6,
        points=1,
        hints=(
            "Write down the prompt for one example by hand, with every line break in it. How does it end?",
            "The prompt is a list of pieces, always separated by the same string.",
            "`separator.join(pieces)` puts the separator between the pieces and nowhere else. An empty piece must not "
            "be in the list.",
        ),
        cases=few_shot_cases,
        tolerance=0,
        background=("The text of the prompt.",),
    ),
    Exercise(
        prepend_prompt,
        idea="soft prompts",
        difficulty=1,
        minutes=5,
        points=1,
        hints=(
            "The inputs have an axis that the prompt does not have. Which one, and how long is it?",
            "Every row of the batch gets the same prompt. Then two tensors with three axes are concatenated along one "
            "of them.",
            "`embeddings.expand(B, -1, -1)` repeats the same numbers B times without copying; `torch.cat` takes `dim`.",
        ),
        cases=prepend_cases,
        probe=run_prepend,
        explain=explain_prepend,
        background=("the soft prompt E;", "inputs: (B, T, d)"),
    ),
    Exercise(
        initial_prompt,
        idea="soft prompts",
        difficulty=3,
        minutes=15,
        points=3,
        hints=(
            "Check for invalid arguments first, then handle the three kinds. Two of the three end in the same step: "
            "ids in, rows of the table out.",
            "`torch.randperm(n, generator=generator)` gives n ids in random order, none of them twice. For a text: "
            "repeat the list of its ids often enough, then truncate it.",
            "`table.detach()[ids]` with a tensor of ids is a copy of these rows. For more rows than there are common "
            "tokens, concatenate several permutations and then truncate.",
        ),
        cases=initial_cases,
        probe=run_initial,
        explain=explain_initial,
        background=(
            "table: (V, d)",
            "num_virtual_tokens: P.",
            "much larger than the embeddings",
            "init_ids: the token ids of that text;",
            "see `text_ids`",
        ),
    ),
    Exercise(
        SoftPrompt,
        idea="soft prompts",
        difficulty=3,
        minutes=15,
        points=4,
        hints=(
            "`__init__` has two lines: tell `VirtualTokens` how long the prompt is, and store the values as something "
            "that an optimiser finds.",
            "`enter` returns four things. Two of them are passed on unchanged. You have a function for the first; "
            "which of the four is left?",
            "The positions of the prompt are one row, `torch.arange(self.length)`, the same for every row of the "
            "batch; prepend it along the axis of the tokens, but only if positions were given.",
        ),
        cases=soft_cases,
        probe=run_soft,
        explain=explain_soft,
        background=(
            "`VirtualTokens` does what",
            "The soft prompt itself has:",
            "which the model calls",
            "At that point",
            "embeddings: (P, d), the initial values",
        ),
    ),
    Exercise(
        prompt_labels,
        idea="the loss",
        difficulty=2,
        minutes=5,
        points=2,
        hints=(
            "For every position that is prepended, the labels need one more entry. How many rows is that, and how "
            "many columns?",
            "Which label value does `next_token_loss` ignore, both in the sum and in the number by which it divides?",
            "`F.pad(labels, (left, right), value=...)` pads the last axis; or prepend a `torch.full`.",
        ),
        cases=labels_cases,
        probe=try_labels,
        tolerance=0,
        explain=explain_labels,
        background=("labels: (B, T) of int64", "num_virtual_tokens: P."),
    ),
    Exercise(
        nearest_tokens,
        idea="reading a prompt",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "The cosine of two vectors is their dot product after both have been normalised to length 1.",
            "Normalise every row of both matrices to length 1. One matrix product then gives all P x V cosines.",
            "`F.normalize(x, dim=...)` normalises; which axis runs along a row? `argmax` needs an axis too.",
        ),
        cases=nearest_cases,
        tolerance=0,
        explain=explain_nearest,
        background=("prompt: (P, d)", "table: (V, d)"),
    ),
]

PREDICTIONS = [
    Prediction(
        "typed_or_learned",
        question=(
            "You type an instruction of P tokens in front of a card: a hard prompt. Somebody else creates a soft "
            "prompt whose P rows are the embeddings of the same P tokens, and does not train it. How do the logits at "
            "the card's tokens compare?"
        ),
        choices={
            "a": "equal, up to rounding",
            "b": "similar, but not equal: the soft prompt's rows are not tokens, so they have no positions",
            "c": "different: without token ids the model has nothing to attend to",
        },
        answer="a",
        explanation=(
            "The blocks of a transformer never see a token id. The model first looks up the embedding of the id; from "
            "there on there are only vectors and their positions, and the soft prompt has the same ones. So every hard "
            "prompt is one point in the space of soft prompts. Training can start at that point and leave it in any "
            "direction."
        ),
        replies={
            "b": "Positions are added to the vectors after the look-up, to prepended rows as well as to tokens.",
            "c": "Attention works on vectors, not on ids; an id only serves to look a vector up.",
        },
        idea="soft prompts",
    ),
    Prediction(
        "how_far_a_prompt_comes",
        question=(
            "Full fine-tuning and a soft prompt of 20 rows are trained on the same batches for the same number of "
            "steps, each with a suitable learning rate. Full fine-tuning lowers the loss on unseen cards a lot. How "
            "much of that reduction does the soft prompt achieve?"
        ),
        choices={
            "a": "more than all of it: with so few numbers it cannot overfit",
            "b": "most of it: a prompt can say which task is meant, and the model does the rest",
            "c": "less than half of it",
        },
        answer="c",
        explanation=(
            "A soft prompt changes no weight. It can only make the frozen model do something that it can already do, "
            "and this small model cannot read cards. Lester et al. (2021, figure 1) find the same for T5: the gap to "
            "full fine-tuning is wide for small models and closes at 11 billion parameters. In addition, every "
            "gradient has to pass through all the layers to reach the only parameters that are trained."
        ),
        replies={
            "a": "With so few numbers it hardly overfits, but it cannot learn much either.",
            "b": "That is so for large models, which know the task and only have to be told which one is meant.",
        },
        measured="24 steps on the bundled GPT-2, three seeds for each prompt",
        idea="soft prompts",
    ),
]

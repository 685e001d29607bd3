"""Unit 05, prompts: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data, Seen, dtype_of
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, KVCache, next_token_loss
from lora_from_scratch.methods.prompt_tuning import (
    COMMON_TOKENS,
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
    def card() -> str:
        return f"hero[{draw.choice(HEROES)}], place[{draw.choice(PLACES)}], number[{draw.integer(1, 99)}]"

    def shots(count: int) -> list[Data]:
        return [[card(), f"Once there lived {draw.integer(2, 99)} of them."] for _ in range(count)]

    def case(name: str, count: int, instruction: str) -> Case:
        return Case(name, {"examples": shots(count), "mr": card(), "instruction": instruction})

    yield case("one example, no instruction", 1, "")
    yield case("two examples and an instruction", 2, "Tell the tale of the card.")
    yield case("three examples, no instruction", 3, "")
    yield case("no example and an instruction", 0, "Write the tale that is on the card.")
    yield case("neither examples nor an instruction", 0, "")


# --- prepend_prompt ----------------------------------------------------------------------------------


def prepend_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, prompt: int, rows: int, tokens: int, width: int) -> Case:
        return Case(name, {"embeddings": draw.normal(prompt, width), "inputs": draw.normal(rows, tokens, width)})

    yield case("2 virtual tokens, one row of 3 tokens", 2, 1, 3, 4)
    yield case("3 virtual tokens, two rows of 5 tokens", 3, 2, 5, 4)
    yield case("1 virtual token, four rows", 1, 4, 3, 2)
    yield case("as many virtual tokens as rows and as tokens", 3, 3, 3, 3)


def run_prepend(answer: Callable[..., Any], embeddings: Tensor, inputs: Tensor) -> Any:
    """[E; X], and the gradients that reach E and X (None: no gradient can flow)."""
    embeddings.requires_grad_(True)
    inputs.requires_grad_(True)
    whole = answer(embeddings, inputs)
    if not isinstance(whole, Tensor) or not whole.requires_grad:
        return {"whole": whole, "gradients": [None, None]}
    weighting = torch.arange(1.0, whole.numel() + 1).view(whole.shape)
    flowed = torch.autograd.grad((weighting * whole).sum(), [embeddings, inputs], allow_unused=True)
    return {"whole": whole, "gradients": list(flowed)}


# --- prompt_labels -----------------------------------------------------------------------------------


def try_labels(answer: Callable[..., Any], labels: Tensor, num_virtual_tokens: int) -> Any:
    """The labels and their dtype: the loss accepts only whole numbers."""
    result = answer(labels, num_virtual_tokens)
    return [result, dtype_of(result)]


def labels_cases(draw: Draw) -> Iterator[Case]:
    def labels(rows: int, tokens: int, ignored: int) -> Tensor:
        drawn = draw.integers(1, 60, rows, tokens)
        drawn[:, :ignored] = -100
        return drawn

    def case(name: str, length: int, rows: int, tokens: int, ignored: int = 0) -> Case:
        return Case(name, {"labels": labels(rows, tokens, ignored), "num_virtual_tokens": length})

    yield case("2 virtual tokens before one row of 4", 2, 1, 4)
    yield case("3 virtual tokens, two rows whose first two labels are -100", 3, 2, 5, 2)
    yield case("1 virtual token, three rows", 1, 3, 4)
    yield case("as many virtual tokens as rows and as labels", 4, 4, 4, 1)


# --- initial_prompt ----------------------------------------------------------------------------------

TEXT, VOCABULARY, RANDOM, REFUSED = "from a text", "from the vocabulary", "at random", "what is refused"


def initial_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, rows: int, width: int, length: int, init: str, ids: int = 0) -> Case:
        given: dict[str, Data] = {"table": 0.1 * draw.normal(rows, width), "num_virtual_tokens": length, "init": init}
        chosen: list[Data] = [int(i) for i in draw.permutation(rows)[:ids]]
        return Case(name, given | {"init_ids": chosen, "seed": draw.integer(0, 10**6)}, part)

    yield case("4 rows from a text of 4 tokens", TEXT, 12, 3, 4, "text", 4)
    yield case("7 rows from a text of 3 tokens", TEXT, 12, 3, 7, "text", 3)
    yield case("2 rows from a text of 5 tokens", TEXT, 12, 3, 2, "text", 5)
    yield case("30 rows of a vocabulary of 40", VOCABULARY, 40, 3, 30, "vocabulary")
    yield case("80 rows of a vocabulary of 6,000", VOCABULARY, 6000, 2, 80, "vocabulary")
    yield case("50 rows of a vocabulary of 30", VOCABULARY, 30, 3, 50, "vocabulary")
    yield case("120 random rows of width 30", RANDOM, 40, 30, 120, "random")
    yield case("init is 'zeros'", REFUSED, 12, 3, 4, "zeros")
    yield case("init is 'text', and there are no ids", REFUSED, 12, 3, 4, "text")


def run_initial(
    answer: Callable[..., Any], table: Tensor, num_virtual_tokens: int, init: str, init_ids: list[int], seed: int
) -> Any:
    """The initial prompt for one seed, what depends on the seed, and whether it is attached to the table's graph."""

    def start(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drawn: Tensor = answer(table, num_virtual_tokens, init, tuple(init_ids), generator)
        return drawn

    table.requires_grad_(True)
    first = start(seed)
    seen: dict[str, Any] = {
        "shape": list(first.shape),
        "in the graph": first.requires_grad,
        "shares memory with the table": shares_memory(first, table),
        "the same again": torch.equal(first, start(seed)),
        "another seed differs": not torch.equal(first, start(seed + 1)),
        "differs without a generator": not torch.equal(first, start(None)),
    }
    table.requires_grad_(False)
    first = first.detach()
    return seen | ({"E": first} if init == "text" else of_random(first) if init == "random" else of_rows(first, table))


def explain_initial(case: Case, seen: Seen, expected: Seen) -> tuple[str, str] | None:
    """Explain failures that cannot be reproduced by hand, because the prompt is drawn at random."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    rows, asked = (value["shape"][0] for value in (seen.value, expected.value))  # type: ignore[index]
    if rows != asked:
        return "number of rows", (
            f"{asked} rows were asked for and {rows} came back: if P is larger than the number of available tokens, "
            "they have to be repeated."
        )
    most = "the most often that one token comes"
    if most in seen.value and seen.value[most] > expected.value[most]:  # type: ignore[operator]
        return "drawn twice", "Some tokens occur twice although there are enough others: draw without replacement."
    return None


def shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def of_random(first: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of at least 3,600 numbers, rounded to a multiple of 1/2 and of 1/4."""
    return {
        "mean": round(2 * float(first.mean())) / 2,
        "standard deviation": round(4 * float(first.std())) / 4,
        "some beyond two": bool((first.abs() > 2.2).any()),
    }


def of_rows(first: Tensor, table: Tensor) -> dict[str, Any]:
    """Which rows of the table they are."""
    equal = (first[:, None] == table[None]).all(dim=-1)  # (P, V)
    ids = equal.float().argmax(dim=1)
    uses = torch.bincount(ids, minlength=len(table))
    return {
        "rows of the table": bool(equal.any(dim=1).all()),
        "among the common tokens": bool((ids < COMMON_TOKENS).all()),
        "the most often that one token comes": int(uses.max()),
        "in order": bool((ids[1:] > ids[:-1]).all()),
    }


# --- SoftPrompt --------------------------------------------------------------------------------------

CONFIG = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)


def soft_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, what: str, length: int, rows: int, tokens: int, **more: Data) -> Case:
        given: dict[str, Data] = {"E": draw.normal(length, CONFIG.n_embd), "what": what}
        ids = draw.integers(0, CONFIG.vocab_size - 1, rows, tokens)
        return Case(name, given | {"ids": ids, "seed": draw.integer(0, 10**6)} | more, part)

    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    yield case("enter: 2 virtual tokens, a row of 3 tokens", "enter", "enter", 2, 1, 3)
    yield case("enter, with a mask and positions", "enter", "enter", 3, 2, 5, positions=True)
    yield case("in a model: two rows of 5 tokens", "in a model", "logits", 3, 2, 5)
    yield case("in a model: padding before one row", "in a model", "logits", 3, 2, 5, mask=padding)
    yield case("in a model, with positions", "in a model", "logits", 2, 2, 5, positions=True)
    yield case("in a model, read in two pieces with a cache", "in a model", "pieces", 3, 2, 6)
    yield case("what is trained", "what is learned", "training", 3, 2, 5)


def run_soft(
    answer: Callable[..., Any],
    E: Tensor,
    what: str,
    ids: Tensor,
    seed: int,
    positions: bool = False,
    mask: Tensor | None = None,
) -> Any:
    """What `enter` returns, or what a tiny GPT-2 with such a soft prompt computes."""
    torch.manual_seed(seed)
    soft, model = answer(E), GPT2(CONFIG).requires_grad_(False)
    where = torch.arange(ids.shape[1]).expand(len(ids), -1) if positions else None  # (B, T)
    if what == "enter":
        wider = torch.ones(len(ids), len(E) + ids.shape[1], dtype=torch.long) if positions else None
        moved = None if where is None else where + len(E)
        return soft.enter(model.transformer.wte(ids), wider, moved, None)
    soft.put_into(model)
    if what == "pieces":
        cache = KVCache()
        return [model(piece, cache=cache) for piece in ids.split([4, 2], dim=1)]
    logits = model(ids, attention_mask=mask, position_ids=where)
    if what == "logits":  # the logits at padding do not count
        return logits if mask is None else logits[mask.bool()]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained:
        next_token_loss(logits, ids).backward()
    return {
        "trained": {name: list(p.shape) for name, p in trained.items()},
        "values": [p.detach() for p in trained.values()],
        "gradients": [p.grad for p in trained.values()],
        "length": soft.length,
        "a parameter": isinstance(soft.embeddings, nn.Parameter),
    }


# --- nearest_tokens ----------------------------------------------------------------------------------


def nearest_cases(draw: Draw) -> Iterator[Case]:
    table = draw.normal(9, 4)
    places = [int(i) for i in draw.permutation(9)[:3]]
    yield Case("three embeddings, scaled up", {"prompt": 3.0 * table[places], "table": table})
    yield Case("one embedding, scaled down", {"prompt": 0.1 * table[places[:1]], "table": table})
    yield Case("5 random rows, 12 tokens", {"prompt": draw.normal(5, 4), "table": draw.normal(12, 4)})
    uneven = draw.normal(15, 3) * torch.linspace(0.2, 4, 15)[:, None]
    yield Case("6 random rows, embeddings of very different length", {"prompt": draw.normal(6, 3), "table": uneven})
    skewed = torch.tensor([9.0, 1.0, 0.1])
    inputs: dict[str, Data] = {"prompt": skewed * draw.normal(6, 3), "table": skewed * draw.normal(14, 3)}
    yield Case("6 random rows, one feature much larger than the others", inputs)


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
            "full fine-tuning is wide for small models and closes at about 10 billion parameters. In addition, every "
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

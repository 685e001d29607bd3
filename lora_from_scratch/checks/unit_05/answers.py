"""Unit 05, prompts, hard and soft ones: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import functools
import io

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

# --- few_shot_prompt ---------------------------------------------------------------------------------


@right("few_shot_prompt")
def grown_piece_by_piece(examples, mr, instruction="") -> str:
    prompt = ""
    if instruction:
        prompt += instruction + "\n\n"
    for card, text in examples:
        prompt += card + "\n" + text + "\n\n"
    return prompt + mr + "\n"


@right("few_shot_prompt")
def joined_and_empty_pieces_taken_out(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@right("few_shot_prompt")
def written_into_a_file(examples, mr, instruction="") -> str:
    out = io.StringIO()
    if len(instruction) > 0:
        print(instruction, file=out, end="\n\n")
    for example in examples:
        print(*example, sep="\n", end="\n\n", file=out)
    print(mr, file=out)
    return out.getvalue()


@right("few_shot_prompt")
def from_the_end_to_the_beginning(examples, mr, instruction="") -> str:
    shots = functools.reduce(lambda rest, shot: "\n".join(shot) + "\n\n" + rest, reversed(examples), f"{mr}\n")
    return f"{instruction}\n\n{shots}" if instruction else shots


@wrong("few_shot_prompt", "Only the first example is in your prompt. All of them belong in it.")
def only_one_example(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples[:1]] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "The card to be solved is missing: there is nothing left that the model could write about.")
def without_the_card(examples, mr, instruction="") -> str:
    return "\n\n".join(filter(None, [instruction] + ["\n".join(example) for example in examples])) + "\n"


@wrong(
    "few_shot_prompt",
    "Your prompt ends with the card itself. The model then has to write the line break first: where does the text of "
    "an example begin?",
)
def without_the_last_line_break(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples] + [mr]
    return "\n\n".join(filter(None, pieces))


@wrong(
    "few_shot_prompt",
    "There is an empty line after the last card. In the examples the text follows its card on the next line.",
)
def an_empty_line_at_the_end(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n\n"


@wrong(
    "few_shot_prompt",
    "Between two examples there is no empty line, so nothing shows the model where one ends and the next begins.",
)
def single_line_breaks_everywhere(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples] + [mr]
    return "\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "Without an instruction your prompt begins with an empty line: leave the piece out entirely.")
def an_empty_instruction_stays(examples, mr, instruction="") -> str:
    return "\n\n".join([instruction] + ["\n".join(example) for example in examples] + [mr]) + "\n"


@wrong(
    "few_shot_prompt", "The instruction comes last in your prompt. It introduces the examples, so it has to come first."
)
def the_instruction_behind_the_examples(examples, mr, instruction="") -> str:
    pieces = ["\n".join(example) for example in examples] + [instruction, mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "Your examples contain only the cards. The texts show the model what to do.")
def cards_without_texts(examples, mr, instruction="") -> str:
    return "\n\n".join(filter(None, [instruction, *(card for card, _ in examples), mr])) + "\n"


@wrong("few_shot_prompt", "The examples are in reverse order.")
def the_examples_from_behind(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples][::-1] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "Card and text of an example are swapped: your text comes before the card.")
def the_text_before_the_card(examples, mr, instruction="") -> str:
    pieces = [instruction] + [f"{text}\n{card}" for card, text in examples] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "The instruction is missing.")
def no_instruction(examples, mr, instruction="") -> str:
    return "\n\n".join(["\n".join(example) for example in examples] + [mr]) + "\n"


@wrong(
    "few_shot_prompt",
    "You strip white space from the texts. A text goes into the prompt as it is: a model that learned to begin with a "
    "space should see one.",
)
def strips_the_texts(examples, mr, instruction="") -> str:
    pieces = [instruction] + [f"{card}\n{text.strip()}" for card, text in examples] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "You strip white space from the instruction. It goes into the prompt as it is.")
def strips_the_instruction(examples, mr, instruction="") -> str:
    pieces = [instruction.strip()] + ["\n".join(example) for example in examples] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


# --- prepend_prompt ----------------------------------------------------------------------------------


@right("prepend_prompt")
def row_by_row(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.stack([torch.cat([embeddings, row]) for row in inputs])


@right("prepend_prompt")
def repeated_in_float64(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.double().repeat(inputs.shape[0], 1, 1), inputs.double()], dim=-2)


@right("prepend_prompt")
def written_into_an_empty_tensor(embeddings: Tensor, inputs: Tensor) -> Tensor:
    length = embeddings.shape[0]
    whole = inputs.new_zeros(inputs.shape[0], length + inputs.shape[1], inputs.shape[2])
    whole[:, :length] = embeddings
    whole[:, length:] = inputs
    return whole


@right("prepend_prompt")
def both_padded_and_added(embeddings: Tensor, inputs: Tensor) -> Tensor:
    length, tokens = len(embeddings), inputs.shape[1]
    return F.pad(embeddings, (0, 0, 0, tokens)) + F.pad(inputs, (0, 0, length, 0))


@right("prepend_prompt")
def looked_up_in_one_table(embeddings: Tensor, inputs: Tensor) -> Tensor:
    rows, tokens, width = inputs.shape
    table = torch.cat([embeddings, inputs.reshape(-1, width)])
    own = torch.arange(len(embeddings)).repeat(rows, 1)
    return table[torch.cat([own, len(embeddings) + torch.arange(rows * tokens).view(rows, tokens)], dim=1)]


@wrong(
    "prepend_prompt",
    "The values are right, but no gradient reaches the token embeddings: the whole result is cut off from the graph "
    "(`detach`, `.data`, `torch.tensor`), and so is the prompt.",
)
def everything_outside_the_graph(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.expand(len(inputs), -1, -1), inputs], dim=1).detach()


@wrong("prepend_prompt", "The prompt comes after the text. A causal model reads from the left: no token would see it.")
def behind_the_text(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([inputs, embeddings.expand(len(inputs), -1, -1)], dim=1)


@wrong(
    "prepend_prompt",
    "The values are right, but no gradient reaches the prompt, which is all that is trained. Where is it detached "
    "from the graph?",
)
def outside_the_graph(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.detach().expand(len(inputs), -1, -1), inputs], dim=1)


@wrong("prepend_prompt", "The rows of the prompt are in reverse order.")
def from_behind(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.flip(0).expand(len(inputs), -1, -1), inputs], dim=1)


@wrong(
    "prepend_prompt",
    "You add the prompt to the first tokens. It has to be prepended: the text keeps all of its own embeddings, and "
    "the result is longer.",
)
def added_to_the_first_tokens(embeddings: Tensor, inputs: Tensor) -> Tensor:
    length = min(len(embeddings), inputs.shape[1])
    return torch.cat([inputs[:, :length] + embeddings[:length], inputs[:, length:]], dim=1)


@wrong(
    "prepend_prompt",
    "The prompt replaces the first tokens of the text. It has to be prepended to them.",
)
def in_the_place_of_the_first_tokens(embeddings: Tensor, inputs: Tensor) -> Tensor:
    whole = torch.cat([embeddings.expand(len(inputs), -1, -1), inputs[:, len(embeddings) :]], dim=1)
    return whole


@wrong(
    "prepend_prompt",
    "You return the rows of one text only. The prompt has to be prepended to every text of the batch.",
)
def of_the_first_row_only(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings, inputs[0]])[None]


@wrong("prepend_prompt", "You turn the whole batch into one long text: the rows have to stay separate.")
def one_long_row(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings, inputs.flatten(0, 1)])[None]


@wrong(
    "prepend_prompt",
    "Only the first row of the batch gets the prompt; the others get zeros.",
)
def zeros_in_the_other_rows(embeddings: Tensor, inputs: Tensor) -> Tensor:
    first = embeddings[None] * (torch.arange(len(inputs)) == 0)[:, None, None]
    return torch.cat([first, inputs], dim=1) if len(inputs) > 1 else torch.cat([embeddings[None], inputs], dim=1)

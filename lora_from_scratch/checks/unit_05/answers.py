"""Unit 05, prompts: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
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
    "There is an empty line behind the last card. In the examples a text follows its card on the next line.",
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


@wrong(
    "few_shot_prompt", "Without an instruction your prompt begins with an empty line: the piece is not there at all."
)
def an_empty_instruction_stays(examples, mr, instruction="") -> str:
    return "\n\n".join([instruction] + ["\n".join(example) for example in examples] + [mr]) + "\n"


@wrong(
    "few_shot_prompt", "The instruction comes last in your prompt. It says what the examples are, so it comes first."
)
def the_instruction_behind_the_examples(examples, mr, instruction="") -> str:
    pieces = ["\n".join(example) for example in examples] + [instruction, mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "Your examples show their cards only. It is the texts from which the model sees what to do.")
def cards_without_texts(examples, mr, instruction="") -> str:
    return "\n\n".join(filter(None, [instruction, *(card for card, _ in examples), mr])) + "\n"


@wrong("few_shot_prompt", "The examples are in reverse order.")
def the_examples_from_behind(examples, mr, instruction="") -> str:
    pieces = [instruction] + ["\n".join(example) for example in examples][::-1] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "Card and text of an example are swapped: the text comes before the card.")
def the_text_before_the_card(examples, mr, instruction="") -> str:
    pieces = [instruction] + [f"{text}\n{card}" for card, text in examples] + [mr]
    return "\n\n".join(filter(None, pieces)) + "\n"


@wrong("few_shot_prompt", "The instruction is missing.")
def no_instruction(examples, mr, instruction="") -> str:
    return "\n\n".join(["\n".join(example) for example in examples] + [mr]) + "\n"


# --- prepend_prompt ----------------------------------------------------------------------------------


@right("prepend_prompt")
def row_by_row(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.stack([torch.cat([embeddings, row]) for row in inputs])


@right("prepend_prompt")
def repeated_in_float64(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.double().repeat(inputs.shape[0], 1, 1), inputs.double()], dim=-2)


@wrong(
    "prepend_prompt", "The prompt stands behind the text. A causal model reads from the left: no token would see it."
)
def behind_the_text(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([inputs, embeddings.expand(len(inputs), -1, -1)], dim=1)


@wrong(
    "prepend_prompt",
    "The values are right, but no gradient reaches the prompt, and the prompt is all that is trained. Where does it "
    "leave the graph?",
)
def outside_the_graph(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.detach().expand(len(inputs), -1, -1), inputs], dim=1)


@wrong("prepend_prompt", "The rows of the prompt are in reverse order.")
def from_behind(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings.flip(0).expand(len(inputs), -1, -1), inputs], dim=1)


@wrong(
    "prepend_prompt",
    "The prompt is added to the first tokens. It stands in front of them: the text keeps all of its own embeddings, "
    "and the result is longer.",
)
def added_to_the_first_tokens(embeddings: Tensor, inputs: Tensor) -> Tensor:
    length = min(len(embeddings), inputs.shape[1])
    return torch.cat([inputs[:, :length] + embeddings[:length], inputs[:, length:]], dim=1)


@wrong(
    "prepend_prompt",
    "The first tokens of the text are gone: the prompt has taken their place. It stands in front of them.",
)
def in_the_place_of_the_first_tokens(embeddings: Tensor, inputs: Tensor) -> Tensor:
    whole = torch.cat([embeddings.expand(len(inputs), -1, -1), inputs[:, len(embeddings) :]], dim=1)
    return whole


@wrong(
    "prepend_prompt",
    "You get the rows of one text only. Every text of the batch needs the prompt in front of it.",
)
def of_the_first_row_only(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings, inputs[0]])[None]


@wrong("prepend_prompt", "You make one long text of the whole batch: the rows have to stay apart.")
def one_long_row(embeddings: Tensor, inputs: Tensor) -> Tensor:
    return torch.cat([embeddings, inputs.flatten(0, 1)])[None]


@wrong(
    "prepend_prompt",
    "Only the first row of the batch has the prompt; the others have zeros there.",
)
def zeros_in_the_other_rows(embeddings: Tensor, inputs: Tensor) -> Tensor:
    first = embeddings[None] * (torch.arange(len(inputs)) == 0)[:, None, None]
    return torch.cat([first, inputs], dim=1) if len(inputs) > 1 else torch.cat([embeddings[None], inputs], dim=1)


# --- prompt_labels -----------------------------------------------------------------------------------


@right("prompt_labels")
def by_putting_together(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.hstack([labels.new_full((len(labels), num_virtual_tokens), -100), labels])


@right("prompt_labels")
def in_numpy(labels: Tensor, num_virtual_tokens: int) -> np.ndarray:
    return np.pad(labels.numpy(), ((0, 0), (num_virtual_tokens, 0)), constant_values=-100)


@right("prompt_labels")
def written_into_a_larger_one(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    rows, tokens = labels.shape
    longer = torch.full((rows, num_virtual_tokens + tokens), -100)
    longer[:, num_virtual_tokens:] = labels
    return longer


@wrong(
    "prompt_labels",
    "Your virtual positions count in the loss: 0 is a token like any other, and the prompt would be trained to predict "
    "it.",
)
def padded_with_zero(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (num_virtual_tokens, 0))


@wrong(
    "prompt_labels",
    "Labels are token ids: whole numbers (int64). A single -100.0 with a decimal point makes the whole tensor "
    "floating-point, and the loss refuses it.",
)
def floating_point(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.cat([torch.full((len(labels), num_virtual_tokens), -100.0), labels], dim=1)


@wrong("prompt_labels", "The new labels stand behind the text's own. The virtual tokens stand in front of the text.")
def padded_behind(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (0, num_virtual_tokens), value=-100)


@wrong(
    "prompt_labels",
    "One label too few: you have thought of the shift. The loss shifts by itself; here every position has its label.",
)
def one_too_few(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (num_virtual_tokens - 1, 0), value=-100)


@wrong("prompt_labels", "You shift the text's labels by one. The loss shifts them; twice is once too often.")
def shifted_as_well(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels[:, 1:], (num_virtual_tokens, 1), value=-100)


@wrong(
    "prompt_labels",
    "You put whole rows in front. Every text has P positions more; the number of texts stays what it was.",
)
def rows_instead_of_columns(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return F.pad(labels, (0, 0, num_virtual_tokens, 0), value=-100)


@wrong(
    "prompt_labels",
    "All of your labels are -100: then nothing is left to learn from. The text's own labels stay as they are.",
)
def nothing_counts(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.full((len(labels), num_virtual_tokens + labels.shape[1]), -100)


@wrong(
    "prompt_labels",
    "The labels are as long as before: the first of them have been overwritten. There are more positions now than "
    "there were.",
)
def overwritten(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    covered = labels.clone()
    covered[:, :num_virtual_tokens] = -100
    return covered


@wrong("prompt_labels", "The first label of each text is repeated at the virtual positions, and counts there.")
def the_first_label_repeated(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    return torch.cat([labels[:, :1].expand(-1, num_virtual_tokens), labels], dim=1)


# --- nearest_tokens ----------------------------------------------------------------------------------


@right("nearest_tokens")
def in_numpy_by_einsum(prompt: Tensor, table: Tensor) -> np.ndarray:
    rows, tokens = prompt.double().numpy(), table.double().numpy()
    products = np.einsum("pd,vd->pv", rows, tokens)
    lengths = np.sqrt((rows**2).sum(1))[:, None] * np.sqrt((tokens**2).sum(1))[None]
    return (products / lengths).argmax(axis=1)


@right("nearest_tokens")
def row_after_row(prompt: Tensor, table: Tensor) -> Tensor:
    return torch.stack([F.cosine_similarity(row[None], table, dim=1).argmax() for row in prompt])


@right("nearest_tokens")
def by_the_distance_on_the_sphere(prompt: Tensor, table: Tensor) -> Tensor:
    rows = prompt.double() / prompt.double().norm(dim=1, keepdim=True)
    tokens = table.double() / table.double().norm(dim=1, keepdim=True)
    return (rows[:, None] - tokens[None]).square().sum(-1).argmin(1)


@wrong(
    "nearest_tokens",
    "You take the largest product. A long embedding has large products with everything: it is not its direction that "
    "decides.",
)
def by_the_product(prompt: Tensor, table: Tensor) -> Tensor:
    return (prompt @ table.T).argmax(dim=-1)


@wrong(
    "nearest_tokens",
    "You take the smallest distance. Then a row that is longer than the embeddings is near to the long ones, whichever "
    "way they point.",
)
def by_the_distance(prompt: Tensor, table: Tensor) -> Tensor:
    return torch.cdist(prompt, table).argmin(dim=-1)


@wrong("nearest_tokens", "You find the token that is furthest away: the smallest cosine.")
def the_furthest(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmin(dim=-1)


@wrong(
    "nearest_tokens",
    "You find, for each token, the nearest row of the prompt. It is asked the other way round.",
)
def along_the_other_axis(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=0)


@wrong(
    "nearest_tokens",
    "You bring the columns to length 1, one feature over all the tokens. It is each token's vector that has a length.",
)
def columns_of_length_one(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=0) @ F.normalize(table, dim=0).T).argmax(dim=-1)


@wrong(
    "nearest_tokens",
    "You look at the size of the cosine without its sign: a token that points the opposite way is not near.",
)
def without_the_sign(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).abs().argmax(dim=-1)


@wrong("nearest_tokens", "You return the largest cosines. Which tokens are they?")
def the_cosines_themselves(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).amax(dim=-1)


@wrong("nearest_tokens", "You return the embeddings of the nearest tokens. What is asked for are their ids.")
def the_embeddings_themselves(prompt: Tensor, table: Tensor) -> Tensor:
    return table[(F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=-1)]

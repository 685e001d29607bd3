"""Unit 26: mistakes that people make, and other right ways. Shapes, and what fits."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.planning import largest_batch
from lora_from_scratch.models.llama import llama_matrices

# --- llama_matrices ----------------------------------------------------------------------------------


@right("llama_matrices")
def from_a_table(config):
    queries = config["num_attention_heads"]
    keys = config.get("num_key_value_heads")
    if keys is None:
        keys = queries
    width = config.get("head_dim")
    if width is None:
        width = config["hidden_size"] // queries
    sizes = {"d": config["hidden_size"], "m": config["intermediate_size"], "q": queries * width, "k": keys * width}
    table = "q_proj d q, k_proj d k, v_proj d k, o_proj q d, gate_proj d m, up_proj d m, down_proj m d"
    rows = [row.split() for row in table.split(", ")]
    return {name: (sizes[one], sizes[other]) for name, one, other in rows}


@right("llama_matrices")
def in_two_parts(config):
    d = config["hidden_size"]
    heads = config["num_attention_heads"]
    both = [heads, config.get("num_key_value_heads", heads) or heads]
    h = config.get("head_dim", None) or d // heads
    q, kv = (n * h for n in both)
    attention = {"q_proj": (d, q), "o_proj": (q, d)} | dict.fromkeys(("k_proj", "v_proj"), (d, kv))
    m = config["intermediate_size"]
    return attention | dict.fromkeys(("gate_proj", "up_proj"), (d, m)) | {"down_proj": (m, d)}


@right("llama_matrices")
def from_layers_on_meta(config):
    d, heads, inside = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    h = config.get("head_dim") or d // heads
    kv = h * (config.get("num_key_value_heads") or heads)
    with torch.device("meta"):
        layers = torch.nn.ModuleDict(
            {
                "q_proj": torch.nn.Linear(d, heads * h),
                "k_proj": torch.nn.Linear(d, kv),
                "v_proj": torch.nn.Linear(d, kv),
                "o_proj": torch.nn.Linear(heads * h, d),
                "gate_proj": torch.nn.Linear(d, inside),
                "up_proj": torch.nn.Linear(d, inside),
                "down_proj": torch.nn.Linear(inside, d),
            }
        )
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


@right("llama_matrices")
def with_an_error_caught(config):
    config = {name: value for name, value in config.items() if value is not None}
    d, heads = config["hidden_size"], config["num_attention_heads"]
    try:
        h = config["head_dim"]
    except KeyError:
        h = d // heads
    shared = config["num_key_value_heads"] if "num_key_value_heads" in config else heads
    made = {}
    for name in ("gate_proj", "up_proj"):
        made[name] = [d, config["intermediate_size"]]
    made["down_proj"] = made["up_proj"][::-1]
    for name, count in zip("qkv", (heads, shared, shared)):
        made[f"{name}_proj"] = [d, count * h]
    made["o_proj"] = made["q_proj"][::-1]
    return made


@wrong("llama_matrices", "You give the pairs as (out, in), as PyTorch stores a weight. (in, out) is wanted.")
def out_and_in(config):
    return {name: pair[::-1] for name, pair in llama_matrices(config).items()}


@wrong(
    "llama_matrices",
    "You make as many heads of keys and values as of queries. With grouped-query attention there are fewer.",
)
@changed(llama_matrices, ('config.get("num_key_value_heads") or heads', "heads"))
def every_query_has_its_own_key(): ...


@wrong(
    "llama_matrices",
    "You divide the width of the hidden state by the number of heads, although the file gives a width of its own.",
)
@changed(llama_matrices, ('config.get("head_dim") or d // heads', "d // heads"))
def without_head_dim(): ...


@wrong(
    "llama_matrices",
    "Your `o_proj` reads the hidden state. It reads the outputs of all heads, which may be more or fewer numbers.",
)
@changed(llama_matrices, ('"o_proj": (heads * h, d)', '"o_proj": (d, d)'))
def o_proj_is_square(): ...


@wrong("llama_matrices", "Your `q_proj` has as many outputs as inputs. Its outputs are heads, each of the width h.")
@changed(llama_matrices, ('"q_proj": (d, heads * h)', '"q_proj": (d, d)'))
def q_proj_is_square(): ...


@wrong("llama_matrices", "Only your `k_proj` is narrow. Keys and values have the same number of heads.")
@changed(llama_matrices, ('"v_proj": (d, shared * h)', '"v_proj": (d, heads * h)'))
def values_for_every_query(): ...


@wrong("llama_matrices", "Your `gate_proj` has the shape of `down_proj`. Gate and up stand side by side.")
@changed(llama_matrices, ('"gate_proj": (d, inside)', '"gate_proj": (inside, d)'))
def the_gate_is_turned(): ...


@wrong("llama_matrices", "Your `down_proj` is not the way back: it maps the inside of the MLP to the hidden state.")
@changed(llama_matrices, ('"down_proj": (inside, d)', '"down_proj": (d, inside)'))
def down_is_up(): ...


@wrong("llama_matrices", "You take the width of the MLP as 4 d, as in GPT-2. The file gives it.")
@changed(llama_matrices, ('config["intermediate_size"]', '4 * config["hidden_size"]'))
def four_times_as_wide(): ...


@wrong("llama_matrices", "With fewer heads of keys you make these heads wider. All heads have the same width h.")
@changed(llama_matrices, ('config.get("head_dim") or d // heads', 'config.get("head_dim") or d // shared'))
def wider_heads_of_keys(): ...


@wrong(
    "llama_matrices",
    "You read `num_key_value_heads` as the number of queries that share a head. It counts the heads of keys.",
)
@changed(
    llama_matrices, ('config.get("num_key_value_heads") or heads', 'heads // (config.get("num_key_value_heads") or 1)')
)
def the_size_of_a_group(): ...


@wrong("llama_matrices", 'An entry may be missing: "num_key_value_heads" and "head_dim" are not in every file.')
def entries_are_always_there(config):
    config["num_key_value_heads"], config["head_dim"]
    return llama_matrices(config)


# --- largest_batch -----------------------------------------------------------------------------------


@right("largest_batch")
def one_text_after_the_other(memory, weights, trained, kept, vocabulary, tokens):
    left = memory - weights - trained * (4 + 4 + 4)
    if left < 0:
        raise ValueError("does not fit")
    texts, token = 0, kept + 2 * 4 * vocabulary
    if token * tokens * 1_000_000 < left:
        return left // (token * tokens)
    while left >= token * tokens:
        texts, left = texts + 1, left - token * tokens
    return texts


@right("largest_batch")
def with_divmod(memory, weights, trained, kept, vocabulary, tokens):
    fixed = weights + 4 * trained + 8 * trained
    if fixed > memory:
        raise ValueError(f"{fixed} bytes do not fit")
    return divmod(memory - fixed, tokens * kept + tokens * vocabulary * 4 * 2)[0]


@right("largest_batch")
def from_tokens(memory, weights, trained, kept, vocabulary, tokens):
    import math

    left = memory - weights - 12 * trained
    if left < 0:
        raise ValueError("does not fit")
    of_tokens = left // (kept + 8 * vocabulary)
    return math.floor(of_tokens / tokens)


@right("largest_batch")
def by_bisection(memory, weights, trained, kept, vocabulary, tokens):
    def total(texts):
        return weights + 3 * 4 * trained + texts * tokens * (kept + 8 * vocabulary)

    if total(0) > memory:
        raise ValueError("does not fit")
    low, high = 0, 1
    while total(high) <= memory:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= memory else (low, middle)
    return low


@wrong(
    "largest_batch", "You count the optimiser for all weights, or not for the trained ones: only these have a state."
)
@changed(largest_batch, ("- weights - 12 * trained", "- weights - 3 * weights"))
def states_of_all_weights(): ...


@wrong("largest_batch", "The gradients are missing from your count, or one of AdamW's means: three numbers each.")
@changed(largest_batch, ("12 * trained", "8 * trained"))
def without_gradients(): ...


@wrong("largest_batch", "You count four numbers for a trained parameter. Its weight is among the weights already.")
@changed(largest_batch, ("12 * trained", "16 * trained"))
def weights_counted_twice(): ...


@wrong("largest_batch", "You count only the gradients of the trained parameters. AdamW keeps two means as well.")
@changed(largest_batch, ("12 * trained", "4 * trained"))
def without_an_optimiser(): ...


@wrong("largest_batch", "You leave the logits out. With a large vocabulary they take more than anything else.")
@changed(largest_batch, ("kept + 8 * vocabulary", "kept"))
def without_logits(): ...


@wrong("largest_batch", "You count the logits once. Their gradient is as large, and exists at the same time.")
@changed(largest_batch, ("8 * vocabulary", "4 * vocabulary"))
def without_the_gradient_of_the_logits(): ...


@wrong("largest_batch", "You count the logits of one token for a whole text. Every token has logits.")
@changed(largest_batch, ("tokens * (kept + 8 * vocabulary)", "tokens * kept + 8 * vocabulary"))
def logits_of_one_token(): ...


@wrong("largest_batch", "You return how many tokens fit. How many whole texts are these?")
@changed(largest_batch, ("tokens * (kept + 8 * vocabulary)", "kept + 8 * vocabulary"))
def how_many_tokens(): ...


@wrong("largest_batch", "You leave the weights out.")
@changed(largest_batch, ("memory - weights - 12 * trained\n", "memory - 12 * trained\n"))
def without_the_weights(): ...


@wrong("largest_batch", "Only whole texts count: round down. Half a text does not fit.")
@changed(largest_batch, ("left // (", "left / ("))
def a_part_of_a_text(): ...


@wrong("largest_batch", "You round up, and the last text no longer fits.")
@changed(
    largest_batch,
    ("return left // (tokens * (kept + 8 * vocabulary))", "return -(-left // (tokens * (kept + 8 * vocabulary)))"),
)
def rounded_up(): ...


@wrong("largest_batch", "At least one text is in your batch. If none fits, the answer is 0.")
@changed(
    largest_batch,
    ("return left // (tokens * (kept + 8 * vocabulary))", "return max(1, left // (tokens * (kept + 8 * vocabulary)))"),
)
def at_least_one(): ...


@wrong("largest_batch", "If the weights and the optimiser alone do not fit, that is an error and no batch of 0.")
@changed(largest_batch, ("if left < 0:", "if left < 0:\n        return 0\n    if left < 0:"))
def zero_instead_of_an_error(): ...


@wrong(
    "largest_batch",
    "You raise an error where exactly nothing is left. The weights and the optimiser fit; the answer is 0.",
)
@changed(largest_batch, ("left < 0", "left <= 0"))
def an_error_where_nothing_is_left(): ...


@wrong("largest_batch", "You divide by the number of tokens only, or add it: each token takes `kept` bytes.")
@changed(largest_batch, ("tokens * (kept + 8 * vocabulary)", "kept + tokens * 8 * vocabulary"))
def kept_once_for_a_text(): ...

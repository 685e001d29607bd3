"""Unit 13, QLoRA: what is checked. The inputs, and what is looked at, are in `unit_13_probes.py`."""

from __future__ import annotations

from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.unit_13.probes import (
    begin_cases,
    checkpoint_cases,
    loftq_cases,
    model_cases,
    nearly_the_same_start,
    pages_cases,
    product_cases,
    run_begin,
    run_checkpoint,
    run_loftq,
    run_pages,
    run_product,
    run_quantize_model,
)
from lora_from_scratch.finetune.gradient_checkpointing import CheckpointFunction
from lora_from_scratch.finetune.paged_optimizer import Pages
from lora_from_scratch.methods.loftq import begin_with_loftq, loftq_init
from lora_from_scratch.methods.qlora import quantize_model
from lora_from_scratch.quantization.nf4_linear import FourBitProduct

TITLE = "QLoRA"

EXERCISES = [
    Exercise(
        FourBitProduct,
        idea="training on four bits",
        difficulty=4,
        minutes=15,
        points=4,
        hints=(
            "`forward` is two lines: make W, and multiply as a linear layer does. What does `backward` need of it, and "
            "where can it get that once more?",
            "With y = x W^T + b, every row of x gets dL/dx = dL/dy W: look at the shapes. The bias is added to every "
            "row, so its gradient is a sum over all the rows.",
            "`ctx.quantized = quantized` keeps the four bits. `ctx.needs_input_grad[0]` is about x, `[1]` about the "
            "bias. `grad_y.reshape(-1, out)` makes rows of any batch.",
        ),
        cases=product_cases,
        probe=run_product,
        tolerance=2e-3,
    ),
    Exercise(
        quantize_model,
        idea="training on four bits",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Two dictionaries by name: the layers that are there, and the new ones. Only when all the new ones are "
            "made, change the model.",
            "`model.named_modules()` has every module with its full name, `isinstance(module, Conv1D)` picks the "
            "matrices, `NF4Linear.from_layer` makes the new layer, and `inject_lora` puts layers in by name.",
            "`try: ... except ValueError as error:` around `from_layer`, and in it a ValueError of your own that "
            "begins with the name. `adaptation_of(model)` before all else.",
        ),
        cases=model_cases,
        probe=run_quantize_model,
    ),
    Exercise(
        CheckpointFunction,
        idea="recomputing",
        difficulty=4,
        minutes=15,
        points=4,
        hints=(
            "`forward` has to remember three things: the function, x, and where the random numbers stood.",
            "In `backward` you make a small graph of your own. It begins at a copy of x that is cut off and needs a "
            "gradient, and ends at y; and you have dL/dy.",
            "`x.detach().requires_grad_()`, `torch.enable_grad()`, `y.backward(grad_y)`, and then `x.grad`. For the "
            "random numbers: `torch.get_rng_state()`, `torch.set_rng_state(...)`, and `torch.random.fork_rng(devices"
            "=[])`, a block after which they stand where they stood.",
        ),
        cases=checkpoint_cases,
        probe=run_checkpoint,
        seconds=15.0,  # the first `backward(gradient)` of a process imports half of PyTorch
    ),
    Exercise(
        Pages,
        idea="memory by pages",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "One tensor for both, over the file's memory, cut in two halves: m is the first, v the second.",
            "`torch.frombuffer(mapping, dtype=..., count=..., offset=...)`: the count is in numbers, the offset in "
            "bytes. `.chunk(2)` cuts, `.view(like.shape)` gives the shape; neither copies.",
            "`page_aligned(2 * like.nbytes)` is the length. Keep `mapping` and `start` for `release`, and ask "
            '`hasattr(mmap, "MADV_DONTNEED")` first.',
        ),
        cases=pages_cases,
        probe=run_pages,
        blank=("__init__", "release"),
    ),
    Exercise(
        loftq_init,
        idea="LoftQ",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "A loop with two lines: quantise what B A does not hold yet; let B A hold what the quantised one lacks.",
            "Before the first iteration B A is zero. The two halves look at each other's newest result, never at "
            "their own.",
            "`best_factors(matrix, rank)`, imported above, gives A and B of the nearest matrix of that rank. Go on in "
            "float32: `W.detach().float()`.",
        ),
        cases=loftq_cases,
        probe=run_loftq,
        agree=nearly_the_same_start,
    ),
    Exercise(
        begin_with_loftq,
        idea="LoftQ",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "`loftq_init` does the work. Where do its three results go, and which of them does the layer not use as "
            "it is?",
            "The layer multiplies B A by `layer.scaling`. Whatever you put in has to come out right after that.",
            "`copy_` writes new numbers into a parameter that stays the object it is, which optimisers rely on.",
        ),
        cases=begin_cases,
        probe=run_begin,
        agree=nearly_the_same_start,
    ),
]

PREDICTIONS = [
    Prediction(
        "an_eighth",
        question=(
            "With LoRA on all matrices, one training step of the bundled GPT-2 (8 texts of 96 tokens) takes so much "
            "memory at its peak. Now the frozen matrices are stored in 4 bits instead of 32, and nothing else "
            "changes. What becomes of the peak?"
        ),
        choices={
            "a": "it falls to about an eighth: the weights were nearly all of it",
            "b": "it falls to about a half",
            "c": "it falls by about a fifth: most of it was something else",
            "d": "it does not fall, since W has to be dequantised for every product",
        },
        answer="c",
        explanation=(
            "The matrices shrink to an eighth, but on a small model with a batch of texts they are not what fills the "
            "memory: activations and logits are, and they grow with the batch, not with the bits. The dequantised W is "
            "one layer at a time. The larger the model and the fewer the tokens, the more the four bits save."
        ),
        idea="memory by component",
    ),
    Prediction(
        "what_rank_eight_holds",
        question=(
            "W - Q, what quantisation loses of a 256 x 768 matrix of the bundled GPT-2, is itself a 256 x 768 matrix. "
            "A LoRA of rank 8 begins with the best that rank 8 can hold of it. How large a share of the squared error "
            "is that?"
        ),
        choices={
            "a": "nearly all, as of a fine-tuning update: what is learned has a low rank",
            "b": "about a half",
            "c": "about a tenth: rounding errors look like noise, and noise has every rank",
        },
        answer="c",
        explanation=(
            "Each weight is rounded by itself, so the error has hardly any directions of its own: its singular values "
            "are much alike. Rank 8 of 256 holds more than 8 / 256 of such a matrix only because it may choose the "
            "largest. A low rank is enough for what training learns, not for what rounding destroys."
        ),
        idea="LoftQ",
    ),
]

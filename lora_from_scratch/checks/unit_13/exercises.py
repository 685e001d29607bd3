"""Unit 13, QLoRA: what is checked. The inputs and the probes are in `probes*.py`."""

from __future__ import annotations

from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.unit_13.explanations import (
    explain_begin,
    explain_checkpoint,
    explain_loftq,
    explain_model,
    explain_pages,
    explain_product,
)
from lora_from_scratch.checks.unit_13.probes import (
    begin_cases,
    loftq_cases,
    model_cases,
    nearly_the_same_start,
    product_cases,
    run_begin,
    run_loftq,
    run_product,
    run_quantize_model,
    same_product,
)
from lora_from_scratch.checks.unit_13.probes_memory import checkpoint_cases, pages_cases, run_checkpoint, run_pages
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
            "`forward` is two lines: dequantise W, and multiply as a linear layer does. What does `backward` need of "
            "it, and how can it get that again?",
            "With y = x W^T + b, every row of x has dL/dx = dL/dy W: check the shapes. The bias is added to every row, "
            "so its gradient is a sum over all the rows.",
            "`ctx.quantized = quantized` stores the four bits. `ctx.needs_input_grad[0]` is about x, `[1]` about the "
            "bias. `grad_y.reshape(-1, out)` turns any batch into rows.",
        ),
        cases=product_cases,
        probe=run_product,
        agree=same_product,
        background=("`F.linear` would keep", "`FourBitProduct.apply(x, bias, quantized)` calls"),
        explain=explain_product,
        tolerance=2e-3,
    ),
    Exercise(
        quantize_model,
        idea="training on four bits",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Use two dictionaries by name: the existing layers, and the new ones. Change the model only when all the "
            "new layers have been created.",
            "`linear_layers(model)` returns the layers by name, without the output head; leave out what is in "
            "`classifier(model)`, and what is an `NF4Linear` already. `NF4Linear.from_layer` creates the new layer, "
            "and `inject_lora` inserts layers by name.",
            "Put `try: ... except ValueError as error:` around `from_layer`, and raise your own ValueError that begins "
            "with the name. Call `adaptation_of(model)` before anything else.",
        ),
        cases=model_cases,
        probe=run_quantize_model,
        explain=explain_model,
    ),
    Exercise(
        CheckpointFunction,
        idea="recomputing",
        difficulty=4,
        minutes=15,
        points=4,
        hints=(
            "`forward` has to remember three things: the function, x, and the state of the random number generator.",
            "In `backward` you build a small graph of your own. It starts at a detached copy of x that requires a "
            "gradient, and ends at y; and you have dL/dy.",
            "`x.detach().requires_grad_()`, `torch.enable_grad()`, `y.backward(grad_y)`, and then `x.grad`. For the "
            "random numbers: `torch.get_rng_state()`, `torch.set_rng_state(...)`, and "
            "`torch.random.fork_rng(devices=[])`, a context that restores the generator's state at its end.",
        ),
        cases=checkpoint_cases,
        probe=run_checkpoint,
        background=("`CheckpointFunction.apply(function, x)` calls",),
        explain=explain_checkpoint,
        seconds=15.0,  # the first `backward(gradient)` of a process imports half of PyTorch
    ),
    Exercise(
        Pages,
        idea="memory by pages",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Create one tensor for both over the file's memory, and split it into two halves: m is the first, v the "
            "second.",
            "`torch.frombuffer(mapping, dtype=..., count=..., offset=...)`: the count is in numbers, the offset in "
            "bytes. `.chunk(2)` splits, `.view(like.shape)` gives the shape; neither copies.",
            "`page_aligned(2 * like.nbytes)` is the length. Store `mapping` and `start` for `release`, and check "
            '`hasattr(mmap, "MADV_DONTNEED")` first.',
        ),
        cases=pages_cases,
        probe=run_pages,
        explain=explain_pages,
        blank=("__init__", "release"),
    ),
    Exercise(
        loftq_init,
        idea="LoftQ",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Use a loop with two lines: quantise what B A does not hold yet, then let B A hold what the quantised "
            "matrix lacks.",
            "Before the first iteration B A is zero. Each half uses the newest result of the other, never its own.",
            "`best_factors(matrix, rank)`, imported above, returns A and B of the nearest matrix of that rank. Compute "
            "in float32: `W.detach().float()`.",
        ),
        cases=loftq_cases,
        probe=run_loftq,
        background=(
            "The second step is optimal",
            "the first is not optimal",
            "In practice the error falls",
            "the computation runs on that device",
            "`Q.dequantize()` is a matrix again",
            "without a factor alpha / r",
            "How the product is factored",
        ),
        explain=explain_loftq,
        agree=nearly_the_same_start,
    ),
    Exercise(
        begin_with_loftq,
        idea="LoftQ",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "`loftq_init` does the work. Where do its three results go, and which of them can the layer not use "
            "unchanged?",
            "The layer multiplies B A by `layer.scaling`. After that multiplication the product has to be LoftQ's B A.",
            "`copy_` writes new values into a parameter and keeps the parameter object, which optimisers rely on.",
        ),
        cases=begin_cases,
        probe=run_begin,
        explain=explain_begin,
        agree=nearly_the_same_start,
    ),
]

PREDICTIONS = [
    Prediction(
        "an_eighth",
        question=(
            "With LoRA on all matrices, one training step of the bundled GPT-2 (8 texts of 96 tokens) uses a certain "
            "amount of memory at its peak. Now the frozen matrices are stored in 4 bits instead of 32, and nothing "
            "else changes. What happens to the peak?"
        ),
        choices={
            "a": "it falls to about an eighth: the weights were nearly all of it",
            "b": "it falls to about a half",
            "c": "it falls by about a fifth: most of it was something else",
            "d": "it does not fall, because W has to be dequantised for every product",
        },
        answer="c",
        explanation=(
            "The matrices shrink to an eighth, but in a small model with a batch of texts they are not what fills the "
            "memory: activations and logits are, and they grow with the batch, not with the bits. Only one layer's "
            "dequantised W is in memory at a time. The larger the model and the fewer the tokens, the more the four "
            "bits save."
        ),
        replies={
            "a": "The matrices fall to about an eighth, but they are less than a fifth of the peak.",
            "b": "For that the matrices would have to be more than half of the peak; they are less than a fifth.",
            "d": "W is dequantised for every product, but one matrix at a time, and freed afterwards.",
        },
        measured="the bundled GPT-2, 8 texts of 96 tokens",
        idea="memory by component",
    ),
    Prediction(
        "what_rank_eight_holds",
        question=(
            "W - Q, the quantisation error of a 256 x 768 matrix of the bundled GPT-2, is itself a 256 x 768 matrix. A "
            "LoRA of rank 8 is initialised with the best rank-8 approximation of it. How large a share of the squared "
            "error does that hold?"
        ),
        choices={
            "a": "nearly all, as for a fine-tuning update: what is learned has a low rank",
            "b": "about a half",
            "c": "about a tenth: rounding errors look like noise, and noise has full rank",
        },
        answer="c",
        explanation=(
            "Each weight is rounded on its own, so the error hardly prefers any direction: its singular values "
            "decrease about as slowly as those of noise. The best rank-8 approximation holds more than 8 / 256 of such "
            "a matrix only because it uses the largest ones. A low rank is enough for what training learns, not for "
            "what rounding destroys."
        ),
        replies={
            "a": "An update follows the few directions of a task. A rounding error follows none.",
            "b": "Half of it needs many more than 8 of the 256 directions.",
        },
        measured="one matrix of the bundled GPT-2",
        idea="LoftQ",
    ),
]

"""Unit 12, quantisation: what is checked. The inputs and the probes are in `probes.py`."""

from __future__ import annotations

from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.unit_12.explanations import (
    explain_absmax,
    explain_bits,
    explain_codebook,
    explain_dequantized,
    explain_double,
    explain_int8,
    explain_packed,
    explain_quantized,
)
from lora_from_scratch.checks.unit_12.probes import (
    absmax_cases,
    bits_cases,
    codebook_cases,
    dequantize_cases,
    double_cases,
    int8_cases,
    nearly_the_same_codes,
    packing_cases,
    quantize_cases,
    try_dequantizing,
    try_int8,
)
from lora_from_scratch.quantization.int8 import absmax_int8, blockwise_absmax
from lora_from_scratch.quantization.nf4 import (
    bits_per_weight,
    dequantize_nf4,
    double_quantize,
    nf4_codebook,
    pack_nibbles,
    quantize_nf4,
)

TITLE = "Quantisation"


EXERCISES = [
    Exercise(
        absmax_int8,
        idea="quantisation",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "By what must the tensor be multiplied so that its largest absolute value becomes 127?",
            "First convert to float32, then absolute value, maximum, product, `torch.round`, and finally "
            "`.to(torch.int8)`.",
            "For zeros the maximum is 0: use `.clamp(min=...)` with a tiny value before you divide by it. "
            "`check_numbers(x)`, imported above, raises the errors.",
        ),
        cases=int8_cases,
        explain=explain_int8,
        probe=try_int8,
    ),
    Exercise(
        blockwise_absmax,
        idea="blocks and scales",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "If the numbers filled whole blocks, a `view` as a table with one block per row would be enough.",
            "How many numbers are missing from the last block? Fill it up with a value that can never be the largest.",
            "`-n % blocksize` are missing, and `F.pad(x, (0, missing))` appends zeros. Then use `.amax(dim=1)`.",
        ),
        cases=absmax_cases,
        dtypes=True,
        explain=explain_absmax,
    ),
    Exercise(
        nf4_codebook,
        idea="codebooks",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Make three pieces, the negative values, zero and the positive values, and concatenate them in order.",
            "`torch.special.ndtri` is the quantile function: it maps a probability to a number. Above 0.5 the result "
            "is positive.",
            "`torch.linspace(p, 0.5, 9)[:-1]` are eight probabilities in descending order; `.flip(0)` reverses a "
            "tensor. Divide by the maximum at the very end.",
        ),
        cases=codebook_cases,
        tolerance=2e-6,
        dtypes=True,
        background=("Weights are close to normal", "`torch.special.ndtri` is the"),
        explain=explain_codebook,
    ),
    Exercise(
        pack_nibbles,
        idea="storage",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "First arrange the codes in pairs: a table with two columns, one pair per row.",
            "`<< 4` moves a code to the high half of a byte; `|` joins the two halves.",
            "Slices keep the column: `pairs[:, :1]` has shape (n / 2, 1). Check the codes first, then convert to "
            "uint8.",
        ),
        cases=packing_cases,
        dtypes=True,
        explain=explain_packed,
    ),
    Exercise(
        quantize_nf4,
        idea="codebooks",
        difficulty=4,
        minutes=15,
        points=4,
        hints=(
            "There are four steps: the scales of the blocks, the weights divided by their scale, the index of the "
            "nearest value, two codes per byte. You have written the first and the last.",
            "Where does the nearest value change? At the midpoint of two neighbours. `torch.bucketize(z, midpoints)` "
            "says between which midpoints z lies, provided that the midpoints ascend; so `sort` the codebook, and keep "
            "the order.",
            "`blockwise_absmax`, `normalize_blocks` (imported above), `bucketize`, `code_of[...]` where `values, "
            "code_of = codebook.sort()`, and `pack_nibbles`. If the number of z is odd, append a 0.",
        ),
        cases=quantize_cases,
        dtypes=True,
        explain=explain_quantized,
    ),
    Exercise(
        dequantize_nf4,
        idea="codebooks",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Bytes to codes, codes to values, values times the scale of their block, and then the shape.",
            "`packed >> 4` is the high half and `packed & 15` the low one; `torch.stack(..., dim=1)` and flattening "
            "interleave them. Indexing the codebook with an integer tensor looks up all values at once.",
            "`absmax.repeat_interleave(blocksize)` gives each weight its scale. Cut both to n, the product of the "
            "shape. `check_parts`, imported above, checks that the parts fit together.",
        ),
        cases=dequantize_cases,
        dtypes=True,
        explain=explain_dequantized,
        probe=try_dequantizing,
    ),
    Exercise(
        bits_per_weight,
        idea="blocks and scales",
        difficulty=1,
        minutes=5,
        points=2,
        hints=(
            "How many weights share one scale of 32 bits? Each of them pays an equal share.",
            "With double quantisation, the scale has 8 bits. How many weights share a second scale of 32 bits?",
            "A second scale serves `nested_blocksize` scales, and each of these serves `blocksize` weights.",
        ),
        cases=bits_cases,
        explain=explain_bits,
        tolerance=1e-6,
    ),
    Exercise(
        double_quantize,
        idea="blocks and scales",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "There are three steps: the offset, the scales minus the offset, and the 8-bit codes of the result.",
            "`quantize_dynamic`, imported above, returns the codes and the second scales.",
            "Put the codes, second scales and offset into a `NestedAbsmax`, in this order.",
        ),
        cases=double_cases,
        dtypes=True,
        background=("The scales are all positive",),
        explain=explain_double,
        agree=nearly_the_same_codes,
    ),
]

PREDICTIONS = [
    Prediction(
        name="after_an_outlier",
        question=(
            "A weight matrix is quantised to 8 bits with one scale. Now a single weight is set to 300 times the "
            "previous maximum, and the matrix is quantised again. What happens to all the other weights?"
        ),
        choices={
            "nothing": "almost nothing: 8 bits have 255 levels, enough for one more weight",
            "coarser": "they are kept, with a step a few times as wide as before",
            "zero": "every one of them becomes 0",
        },
        answer="zero",
        explanation=(
            "The outlier determines the scale: one level is now 300 / 127, more than twice the previously largest "
            "weight, so even that weight rounds to 0. The outlier is restored exactly, and the rest of the matrix is "
            "lost."
        ),
        replies={
            "nothing": "The 255 levels are evenly spaced up to the largest weight, which is now the outlier.",
            "coarser": "The step is 300 times as wide as before.",
        },
        idea="blocks and scales",
    ),
    Prediction(
        name="order_of_the_errors",
        question=(
            "The weights of the bundled GPT-2 are quantised to 4 bits in blocks of 64, with three codebooks: NF4, INT4 "
            "(equal steps) and FP4 (a tiny floating-point number, whose steps grow with the number). Order the three "
            "by their root-mean-square error."
        ),
        choices={
            "a": "NF4 is smallest, then FP4, then INT4",
            "b": "NF4 is smallest, then INT4, then FP4",
            "c": "FP4 is smallest, then NF4, then INT4",
            "d": "INT4 is smallest, then NF4, then FP4",
        },
        answer="b",
        explanation=(
            "NF4 has its values where the weights are. FP4 has four of its codes at or next to zero, then a gap up to "
            "a sixth of the absmax, where a third of the weights are, and a gap of a third at the top: together that "
            "costs more than INT4's equal steps."
        ),
        replies={
            "a": "NF4 is the best, but the gaps of FP4 cost more than the equal steps of INT4.",
            "c": "FP4 is the worst of the three. Its steps grow with the number, but too fast.",
            "d": (
                "Equal steps suit numbers that are spread evenly. Weights are roughly normal: most of them are "
                "near zero."
            ),
        },
        measured="all matrices of the bundled GPT-2",
        idea="codebooks",
    ),
]

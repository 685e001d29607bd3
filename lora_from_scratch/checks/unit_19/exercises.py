"""Unit 19, merging into four bits: its exercises with their hints, and its predictions. The cases are in `cases.py`."""

from __future__ import annotations

from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.unit_19.cases import (
    greedy_cases,
    merge_cases,
    quantize_cases,
    split_cases,
    sum_cases,
    test_cases,
)
from lora_from_scratch.checks.unit_19.explanations import (
    explain_allocation,
    explain_merged,
    explain_quantized,
    explain_split,
    explain_sums,
    explain_test,
)
from lora_from_scratch.checks.unit_19.probes import run_allocation, run_quantize, run_split, run_sums, run_test
from lora_from_scratch.methods.greedy_allocation import allocate_greedily
from lora_from_scratch.methods.lq_lora import split
from lora_from_scratch.methods.qa_lora import merge_into_zeros, sum_groups
from lora_from_scratch.museum.last_iterate import test_split
from lora_from_scratch.quantization.low_bit import quantize_groups

TITLE = "Merging into four bits"

EXERCISES = [
    Exercise(
        quantize_groups,
        idea="quantisation",
        difficulty=2,
        minutes=9,
        points=2,
        hints=(
            "`in_groups(weight, bits, group_size)`, imported above, cuts the rows into groups: (out, G, g). The "
            "smallest and the largest weight of each group determine everything else.",
            "2^bits codes have 2^bits - 1 steps between them. Divide by the scale and round; where the scale is 0, "
            "divide by something tiny instead. At the end, leave out what a short group was filled up with.",
            "`aminmax(dim=2)` gives both ends. `zero[..., None]` has the shape (out, G, 1) and can be subtracted from "
            "(out, G, g). `codes.flatten(1)[:, :weight.shape[1]]` is (out, in) again.",
        ),
        cases=quantize_cases,
        probe=run_quantize,
        explain=explain_quantized,
    ),
    Exercise(
        sum_groups,
        idea="merging",
        difficulty=2,
        minutes=5,
        points=2,
        hints=(
            "If every group were complete, one reshape of the last axis to (G, g) and one sum would do.",
            "Zeros do not change a sum. How many of them complete the last group?",
            "`F.pad(x, (0, n))` appends n zeros to the last axis, `-x.shape[-1] % group_size` is their number, and "
            "`unflatten(-1, (-1, group_size))` splits an axis in two.",
        ),
        cases=sum_cases,
        probe=run_sums,
        explain=explain_sums,
    ),
    Exercise(
        merge_into_zeros,
        idea="merging",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "Write y_i as a sum over the inputs j, with the scale, the code and the zero of each. What do A and B add "
            "to y_i, written as a sum over the same j?",
            "The sum of a group of inputs, times a number, is the sum of the inputs times the same number. So every "
            "weight of group k gets the same addition. Which of its three numbers can carry it?",
            "The addition for output i and group k is s times the entry (i, k) of B A. Convert both with `.float()` "
            "first.",
        ),
        cases=merge_cases,
        explain=explain_merged,
        dtypes=True,
    ),
    Exercise(
        split,
        idea="low rank and few bits",
        difficulty=3,
        minutes=12,
        points=3,
        hints=(
            "Write the loop without stopping first: factors of what Q leaves, then Q of what the factors leave, then "
            "the error. What has to be kept from one iteration to the next?",
            "Keep two things apart: the current iteration, which the next one starts from, and the best one, which is "
            "returned. Compare before you overwrite the best.",
            "`weighted_factors(W - dequantized, rank, weighting)` gives A and B, `squared_error(difference, weighting)`"
            " the error. Start with `least = math.inf`, `dequantized = torch.zeros_like(W)`, `W.detach().float()`.",
        ),
        cases=split_cases,
        probe=run_split,
        explain=explain_split,
        background=("(The authors' code returns", "`Q.dequantize()` is a matrix", "How B A is factored"),
    ),
    Exercise(
        test_split,
        idea="tests of one's own",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Where the error falls in every iteration, the fault does not show. But you write `quantize`, so you "
            "decide how large the error of each iteration is.",
            "Let `quantize` count its calls and round to more bits in the second call than in the first and the third. "
            "Then the second iteration is the best. Let it remember W - B A and Q of each call, too.",
            "In `quantize`: `calls.append((matrix, quantize_normal_float(matrix, bits[len(calls)], 16)))`. Call "
            "`split` with 2 and with 3 iterations, each time with an empty list. The error of a call is "
            "`(matrix - Q.dequantize()).norm()`; compare the returned one with the smallest.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
        background=("split: is called as", "Give it a float32 matrix", "It calls `quantize` once"),
    ),
    Exercise(
        allocate_greedily,
        idea="bits under a budget",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Do it by hand first: write down the current choice of each matrix, and for every other choice how much "
            "error it saves and how much size it costs.",
            "A loop over all matrices and choices finds the best change. Leave out changes that do not save error, do "
            "not cost size, or do not fit; if none is left, return.",
            "The size that is left is the budget minus the sum of `sizes[i, chosen[i]]`. The smallest choices are "
            "`sizes.argmin(dim=1)`. Compare saved / cost, and remember matrix and choice of the largest.",
        ),
        cases=greedy_cases,
        probe=run_allocation,
        explain=explain_allocation,
    ),
]

PREDICTIONS = [
    Prediction(
        "who_survives",
        question=(
            "At how many bits does the merged QA-LoRA have a lower held-out loss than the QLoRA that was merged and "
            "then rounded?"
        ),
        choices={
            "a": "at 4, 3 and 2 bits",
            "b": "at 2 bits only",
            "c": "at none of them",
        },
        answer="b",
        explanation=(
            "Rounding to 4 bits costs QLoRA about 0.01, to 3 bits 0.07 and to 2 bits 0.38. QA-LoRA's merge costs "
            "nothing, but before it QA-LoRA lacks about 0.2 of loss: its A has a thirty-second of the columns. Only 2 "
            "bits make rounding more expensive than that."
        ),
        replies={
            "a": "An exact merge only keeps what was learned, and QA-LoRA has learned less before it.",
            "c": "The fewer the bits, the larger the steps: at 2 bits a group has only four levels to round to.",
        },
        idea="merging",
        measured="40 steps, seed 0",
    ),
    Prediction(
        "greedy_or_best",
        question=(
            "The integer programme finds the smallest possible sum of squared errors for this budget. How much larger "
            "is the sum that the greedy rule finds?"
        ),
        choices={
            "a": "by less than 1 %",
            "b": "by 5 to 20 %",
            "c": "by more than 20 %: it is no better than the same bits for all",
        },
        answer="a",
        explanation=(
            "The greedy rule can go wrong only where it runs out of budget: until then every bit is spent where it "
            "helps most. With 24 matrices what is left at the end is small, so both agree almost everywhere. The "
            "integer programme proves how little is lost, and it also works where one matrix takes half of the budget."
        ),
        replies={
            "b": "It would take a few large matrices, so that what cannot be spent at the end is a large part.",
            "c": "The same bits for all ignore the table; the greedy rule looks at every entry of it.",
        },
        idea="bits under a budget",
        measured="the 24 matrices of the bundled model",
    ),
]

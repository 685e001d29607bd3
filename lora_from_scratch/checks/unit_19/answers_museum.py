"""Unit 19: mistakes that people make, and other right ways. Tests of LQ-LoRA's split."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.loftq import best_factors
from lora_from_scratch.quantization.low_bit import quantize_normal_float


class Recorder:
    """A `quantize` that rounds to a scripted number of bits in each call, and remembers what it was given."""

    def __init__(self, bits, most=None):
        self.bits, self.most, self.calls = bits, most, []

    def __call__(self, matrix):
        if self.most is not None:
            assert len(self.calls) < self.most
        Q = quantize_normal_float(matrix, self.bits[min(len(self.calls), len(self.bits) - 1)], 16)
        self.calls.append((matrix.clone(), Q))
        return Q

    @property
    def least(self):
        return min(float((matrix - Q.dequantize()).norm()) for matrix, Q in self.calls)


def off(W, result):
    Q, A, B = result
    return float((W - Q.dequantize() - B @ A).norm())


@right("test_split")
def a_scripted_quantize(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3), iterations)
        Q, A, B = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert len(quantize.calls) >= 2
        assert torch.linalg.matrix_rank(B @ A, rtol=1e-4) <= 2
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@right("test_split")
def more_iterations_are_never_worse(split):
    W = torch.randn(12, 16)
    errors = []
    for iterations in (1, 2, 3, 4):
        copy, quantize = W.clone(), Recorder((2, 3, 4, 2), iterations)
        result = split(copy, 2, quantize, iterations)
        errors.append(off(W, result))
        assert abs(errors[-1] - quantize.least) < 1e-3
        assert result[1].shape == (2, 16)
        assert result[2].shape == (12, 2)
        assert (copy == W).all()
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    assert errors[3] <= errors[2] + 1e-4


@right("test_split")
def an_error_that_is_added(split):
    class Result:
        def __init__(self, values):
            self.values = values

        def dequantize(self):
            return self.values

    noise = torch.randn(8, 6)
    for sizes in ([0.5, 0.1], [0.5, 0.1, 0.3], [0.3, 0.2, 0.1]):
        W, count = 3 * torch.randn(8, 6), []
        before = W.clone()

        def quantize(matrix):
            count.append(1)
            assert len(count) <= len(sizes)
            return Result(matrix + sizes[len(count) - 1] * noise)

        Q, A, B = split(W, 3, quantize, len(sizes))
        low = before - Q.dequantize() - B @ A
        assert torch.allclose(low.norm(), min(sizes) * noise.norm(), rtol=1e-2)
        assert torch.linalg.svdvals(B @ A)[3] < 1e-3
        assert torch.allclose(W, before, atol=1e-6)


@right("test_split")
def worked_out_by_hand(split):
    W = torch.randn(9, 16)
    bits = (2, 4, 2)

    def by_hand(number):
        dequantized, results = torch.zeros(9, 16), []
        for i in range(number):
            A, B = best_factors(W - dequantized, 2)
            Q = quantize_normal_float(W - B @ A, bits[i], 16)
            dequantized = Q.dequantize()
            results.append(dequantized + B @ A)
        return min(results, key=lambda one: float((W - one).norm()))

    for number in (2, 3):
        quantize, given = Recorder(bits), W.clone()
        Q, A, B = split(given, 2, quantize, number)
        if not torch.allclose(Q.dequantize() + B @ A, by_hand(number), atol=1e-3):
            raise AssertionError("not the best iteration")
        assert len(quantize.calls) <= number, "too many iterations"
        assert torch.equal(given, W), "W has changed"


@wrong("test_split", "Your test passes every function, the faulty ones too: it never raises an AssertionError.")
def never_fails(split):
    W, quantize = torch.randn(10, 16), Recorder((2, 4, 3))
    return off(W, split(W.clone(), 2, quantize, 3)) <= quantize.least


@wrong("test_split", "Your test refuses every function, the sound ones too. Does it ask for an error of zero?")
def an_error_of_zero(split):
    W = torch.randn(10, 16)
    assert off(W, split(W.clone(), 2, Recorder((2, 4, 3)), 3)) < 1e-3


@wrong(
    "test_split",
    "The error falls in every iteration of your test, as it does on most weights. Then the last iteration is the best.",
)
def errors_that_always_fall(split):
    for iterations in (1, 2, 3):
        W = torch.randn(10, 16)
        given, quantize = W.clone(), Recorder((2, 3, 4), iterations)
        Q, A, B = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert A.shape[0] == 2
        assert len(quantize.calls) == iterations
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@wrong(
    "test_split",
    "Your test demands that there are no iterations after the error rises. A function may go on, and return the best.",
)
def it_has_to_stop(split):
    W = torch.randn(10, 16)
    for bits, calls in (((2, 4), 2), ((2, 4, 3, 3), 3)):
        given, quantize = W.clone(), Recorder(bits, len(bits))
        Q, A, B = split(given, 2, quantize, len(bits))
        assert torch.equal(given, W)
        assert A.shape[0] == 2
        assert len(quantize.calls) == calls
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@wrong(
    "test_split",
    "Your test demands a certain A or B. B A can be factored in many ways: compare products.",
)
def a_certain_A(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3), iterations)
        Q, A, B = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert A.shape[0] == 2
        first = best_factors(W - quantize.calls[0][1].dequantize(), 2)[0]
        assert torch.allclose(A.abs(), first.abs(), atol=1e-3)
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@wrong(
    "test_split",
    "Your test does not see a function that does more iterations than it may: count the calls of `quantize`.",
)
def too_many_are_not_seen(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3))
        Q, A, B = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert A.shape[0] == 2
        assert len(quantize.calls) > 1
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@wrong(
    "test_split",
    "Your test does not see a function that always does one iteration. Its only result is also its best.",
)
def one_iteration_is_not_seen(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3), iterations)
        Q, A, B = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert A.shape[0] == 2
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@wrong("test_split", "Your test does not look at the rank. With a larger one, the error becomes smaller.")
def the_rank_is_not_seen(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3), iterations)
        result = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert len(quantize.calls) > 1
        assert off(W, result) <= 1.001 * quantize.least


@wrong("test_split", "Your test does not look whether W has changed, or compares it with itself: copy it.")
def changes_are_not_seen(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3), iterations)
        Q, A, B = split(given, 2, quantize, iterations)
        assert A.shape[0] == 2
        assert len(quantize.calls) > 1
        assert off(W, (Q, A, B)) <= 1.001 * quantize.least


@wrong(
    "test_split",
    "Your test looks only at Q, not at A and B. They have to be of the same iteration.",
)
def only_Q(split):
    W = torch.randn(10, 16)
    for iterations in (2, 3):
        given, quantize = W.clone(), Recorder((2, 4, 3), iterations)
        Q, A, _ = split(given, 2, quantize, iterations)
        assert torch.equal(given, W)
        assert A.shape[0] == 2
        assert len(quantize.calls) > 1
        assert Q.bits == 4


@wrong("test_split", caught_by="raises")
def another_exception(split):
    W, quantize = torch.randn(10, 16), Recorder((2, 4, 3), 3)
    result = split(W.clone(), 2, quantize, 3)
    if off(W, result) > 1.001 * quantize.least:
        raise ValueError("not the best")

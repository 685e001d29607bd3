"""Which activations a training step keeps, and for how long: autograd's bookkeeping with sizes instead of tensors.

For the backward pass autograd keeps the tensors from which the derivative of each operation is computed. They follow
from the derivative alone. For B sequences of T tokens, width d, H heads, MLP width m, w bytes per number (4, or 2 in
autocast's bf16), and only where a gradient flows, these are:

    y = x W + b       x if W is trained (dL/dW = x^T dL/dy); W if x has a gradient (dL/dx = dL/dy W^T). W exists
                      anyway, but autocast has made a copy with 2 bytes per weight. A frozen W does not need x: this,
                      not the small number of trained weights, is how LoRA, adapters and biases save activations.
    s B A x           x for A, the r numbers A x for B
    4-bit W           nothing: it is dequantised again
    LayerNorm         x, the mean and the deviation of each token (8 bytes)
    gelu, add         x; nothing
    attention         q, k, v, the result, one logarithm (4 bytes) per head and token: PyTorch's fused kernel. The
                      (T, T) matrices are kept only where `Attention.attend` uses the explicit equation (bf16 on a CPU),
                      or where there is dropout on them (the CPU kernel has none); a mask costs (T, T) per sequence.
    dropout           the noise, in the dtype of x (on a GPU, and in LoRA: one byte)

With everything trained, in fp32, without dropout, a block keeps, in bytes,

    4 B T (8 d + 2 m) + 4 B T H + 16 B T        (slightly more than 64 B T d, for m = 4 d)

Korthikanti et al. 2022 (arXiv:2205.05198, eq. 1) count s b h (34 + 5 a s / h) for the same block in 16 bits, with three
dropouts and explicit attention. The backward pass then proceeds from the top down, frees what it has used and holds the
gradients of activations that are still needed; `Tape.backward` finds how much it holds at each point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

FP32 = 4  # bytes

# --- The tape ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TensorSize:
    """A tensor of the forward pass without its values: its size, and whether it will receive a gradient."""

    rows: int  # usually B T, the number of tokens
    columns: int
    width: int = FP32  # bytes per number
    grad: bool = False
    weight: bool = False  # it is a parameter, so keeping it costs nothing extra

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * self.width


@dataclass
class Step:
    """One operation of the forward pass, as the backward pass sees it."""

    where: str  # a label such as "block 3"
    inputs: list[TensorSize]
    output: TensorSize
    saved: list[TensorSize]
    trained: int = 0  # bytes of the parameter gradients that its backward step creates
    scratch: int = 0  # bytes that its backward step needs temporarily
    passes: bool = False  # the inputs share the gradient of the output, without a copy (a sum)
    inner: Tape | None = None  # for a checkpoint: the operations that are recomputed


@dataclass
class Tape:
    """The operations recorded so far, and the properties of the batch that determine their sizes."""

    batch: int
    tokens: int  # that pass through the blocks, including virtual tokens
    autocast: bool = False  # matrix products in bf16
    padded: bool = False  # an attention mask is given
    cuda: bool = False
    training: bool = True  # whether dropout is active
    where: str = ""
    prefix: TensorSize | None = None  # (P, 2 L d), the keys and values that prefix tuning prepends
    steps: list[Step] = field(default_factory=list)
    kept: dict[TensorSize, None] = field(default_factory=dict)  # kept for the backward pass so far; an ordered set
    forward_peak: int = 0  # peak bytes so far: what is kept, plus what one operation reads and writes

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def keys(self) -> int:
        return self.tokens + (self.prefix.rows if self.prefix else 0)

    def add(
        self,
        inputs: Sequence[TensorSize],
        output: TensorSize,
        saved: Sequence[TensorSize] = (),
        trained: Sequence[Tensor | None] = (),
        scratch: int = 0,
        passes: bool = False,
    ) -> TensorSize:
        """Record an operation, if a gradient flows through it, and return its output."""
        learned = [p for p in trained if p is not None and p.requires_grad]
        output.grad = any(x.grad for x in inputs) or bool(learned)
        if output.grad:
            made = sum(p.nbytes for p in learned)
            self._keep(saved)
            self.steps.append(Step(self.where, list(inputs), output, list(saved), made, scratch, passes))
        beside = {x: x.nbytes for x in (*inputs, output) if x not in self.kept and not x.weight}
        self.forward_peak = max(self.forward_peak, self.kept_bytes() + sum(beside.values()))
        return output

    def _keep(self, saved: Sequence[TensorSize]) -> None:
        self.kept.update(dict.fromkeys(tensor for tensor in saved if not tensor.weight))

    def kept_bytes(self) -> int:
        """Bytes of the kept activations, each tensor counted once."""
        return sum(tensor.nbytes for tensor in self.kept)

    # --- Operations ---

    def parameter(self, p: Tensor) -> TensorSize:
        """A trained matrix that is used like an activation."""
        return self.add([], TensorSize(p.shape[-2], p.shape[-1], p.element_size(), weight=True), trained=[p])

    def like(self, x: TensorSize, saved: Sequence[TensorSize] = ()) -> TensorSize:
        """An operation whose output has the size of x."""
        return self.add([x], TensorSize(x.rows, x.columns, x.width), saved)

    def nonlinearity(self, x: TensorSize) -> TensorSize:
        """relu, tanh or softmax, whose derivative is computed from the result."""
        y = TensorSize(x.rows, x.columns, x.width)
        return self.add([x], y, [y])

    def sum(self, x: TensorSize, y: TensorSize) -> TensorSize:
        width = max(x.width, y.width)
        return self.add([self.cast(x, width), self.cast(y, width)], TensorSize(x.rows, x.columns, width), passes=True)

    def cast(self, x: TensorSize, width: int) -> TensorSize:
        return x if x.width == width else self.add([x], TensorSize(x.rows, x.columns, width))

    def linear(self, x: TensorSize, weight: Tensor, columns: int, bias: Tensor | None = None) -> TensorSize:
        """x W + b with this many columns; in bf16 under autocast."""
        if self.autocast:
            x = self.cast(x, 2)
        saved = [x] if weight.requires_grad else []
        if x.grad and (x.width != weight.element_size() or weight.grad_fn is not None):
            saved.append(TensorSize(1, weight.numel(), x.width))  # the copy of W, or W if it was computed
        scratch = x.width * weight.numel() if weight.requires_grad and x.width != weight.element_size() else 0
        return self.add([x], TensorSize(x.rows, columns, x.width), saved, [weight, bias], scratch)

    def norm(self, x: TensorSize, norm: nn.LayerNorm, stored: TensorSize | None = None) -> TensorSize:
        """LayerNorm. If x is a view of a larger tensor, `stored` is that tensor, which is kept as a whole."""
        output = TensorSize(x.rows, x.columns, x.width)
        return self.add([x], output, [stored or x, TensorSize(x.rows, 2)], [norm.weight, norm.bias])

    def dropout(self, x: TensorSize, p: float, noise_width: int | None = None) -> TensorSize:
        if not (self.training and p > 0):
            return x
        noise = TensorSize(x.rows, x.columns, noise_width or (1 if self.cuda else x.width))
        return self.like(x, [noise])

    def checkpoint(self, x: TensorSize, others: list[TensorSize], inner: Tape, output: TensorSize) -> TensorSize:
        """Keep only the arguments instead of what `inner` keeps, and recompute the rest in the backward pass."""
        self.forward_peak = max(self.forward_peak, self.kept_bytes() + inner.forward_peak - inner.kept_bytes())
        if output.grad:
            self._keep([x, *others])
            self.steps.append(Step(self.where, [x], output, [x, *others], inner=inner))
        return output

    # --- What is kept, and the backward pass ---

    def savers(self) -> Counter[TensorSize]:
        """The number of operations that keep each tensor."""
        return Counter(tensor for step in self.steps for tensor in dict.fromkeys(step.saved) if not tensor.weight)

    def backward(self) -> Iterator[tuple[str, int]]:
        """For each operation, from last to first: its label, and the peak bytes during its backward step.

        The bytes are those of activations, gradients of activations and gradients of parameters.
        """
        return Backward(self.savers()).through(self.steps)


class Backward:
    """The state of a backward pass: the tensors still kept, and the gradients of activations and parameters."""

    def __init__(self, savers: Counter[TensorSize]) -> None:
        self.savers = savers
        self.pending: dict[TensorSize, TensorSize] = {}  # gradients of activations that are still needed, by tensor
        self.parameter_gradients = 0  # bytes

    def through(self, steps: Sequence[Step]) -> Iterator[tuple[str, int]]:
        for step in reversed(steps):
            if step.inner is not None:
                self.savers.update(step.inner.savers())  # recomputed
                yield from self.through(step.inner.steps)
                self._release(step)
            else:
                yield step.where, self._derive(step)

    def _derive(self, step: Step) -> int:
        """Replace the gradient of the output with those of the inputs; return the peak bytes meanwhile."""
        before = self._live()
        inputs = [x for x in dict.fromkeys(step.inputs) if x.grad]
        incoming = self.pending.pop(step.output, step.output)
        made = {x: incoming if step.passes else TensorSize(x.rows, x.columns, x.width) for x in inputs}
        new = 0 if step.passes else sum(gradient.nbytes for gradient in made.values())
        most = before + new + step.trained + step.scratch
        self._release(step)
        self.parameter_gradients += step.trained
        for x, gradient in made.items():
            if x in self.pending:  # it also has a gradient from another operation; their sum is a third tensor
                most = max(most, self._live() + 2 * gradient.nbytes)
            else:
                self.pending[x] = gradient
        return most

    def _release(self, step: Step) -> None:
        for tensor in dict.fromkeys(step.saved):
            self.savers[tensor] -= 1
        self.savers = +self.savers  # drop tensors that are no longer kept

    def _live(self) -> int:
        kept = sum(tensor.nbytes for tensor in self.savers)
        return kept + sum(gradient.nbytes for gradient in set(self.pending.values())) + self.parameter_gradients

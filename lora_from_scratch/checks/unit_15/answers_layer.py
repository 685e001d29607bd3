"""Unit 15, DoRA's layer: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.dora import DoRALinear
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.support.linear_layers import weight_of

GAIN = "gain = m / self.norms().to(m.dtype).clamp_min(smallest)"
RESULT = "return torch.addcmul(u, Vx, (gain - 1).to(u.dtype))"
CHANGE = "return (self.lora_magnitude.float() / norms)[:, None] * (W + super().change(W)) - W"


@right("DoRALinear")
class AsTheEquationIsWritten(DoRALinear):
    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        bias = 0 if self.base.bias is None else self.base.bias
        norms = self.norms()
        factor = torch.where(norms > 0, self.lora_magnitude / norms.clamp_min(1e-30), 1.0)
        return factor * (y - bias + self.scaling * h @ B.T) + bias

    def change(self, W: Tensor) -> Tensor:
        V = W + LoRALinear.change(self, W)
        return F.normalize(V, dim=1) * self.lora_magnitude.float().unsqueeze(1) - W


@right("DoRALinear")
class WithTheFactorInB(DoRALinear):
    """m / ||V|| is applied to the base's output and to B."""

    def factor(self) -> Tensor:
        norms = self.norms()
        safe = norms.masked_fill(norms == 0, 1.0)
        return self.lora_magnitude / safe

    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        g = self.factor()
        output = y * g + F.linear(h, (self.scaling * g)[:, None] * B)
        if self.base.bias is not None:
            output = output + (1 - g) * self.base.bias
        return output

    def change(self, W: Tensor) -> Tensor:
        B, A, g = self.lora_B.float(), self.lora_A.float(), self.factor().float()
        return torch.diag(g) @ torch.addmm(W, B, A, alpha=self.scaling) - W


@right("DoRALinear")
class OneOutputAfterTheOther(DoRALinear):
    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        norms, columns = self.norms(), []
        for o in range(len(B)):
            b = 0.0 if self.base.bias is None else self.base.bias[o]
            Vx = y[..., o] - b + self.scaling * (h * B[o]).sum(dim=-1)
            columns.append(Vx * self.lora_magnitude[o] / norms[o] + b if norms[o] > 0 else Vx + b)
        return torch.stack(columns, dim=-1)

    def change(self, W: Tensor) -> Tensor:
        rows = []
        for w, b, m in zip(W, self.lora_B.float(), self.lora_magnitude.float()):
            v = w + self.scaling * b @ self.lora_A.float()
            rows.append(v * (m / v.norm()) - w if v.any() else -w)
        return torch.stack(rows)


@right("DoRALinear")
class FormsV(DoRALinear):
    """Slower and larger, and right: the norms of V itself, without a gradient."""

    def gain(self, W: Tensor) -> Tensor:
        with torch.no_grad():
            V = W.float() + self.scaling * self.lora_B.float() @ self.lora_A.float()
            inverse = torch.nan_to_num(1 / V.norm(dim=1), posinf=0.0)
        return self.lora_magnitude.float() * inverse

    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        g = self.gain(weight_of(self.base)).to(y.dtype)
        u = y + self.scaling * h @ B.T
        return g * u + (0 if self.base.bias is None else (1 - g) * self.base.bias)

    def change(self, W: Tensor) -> Tensor:
        g = self.gain(W)[:, None]
        return g * W + g * LoRALinear.change(self, W) - W


@wrong("DoRALinear", "You rescale the bias as well. Only V x is multiplied by m / ||V||.")
@changed(DoRALinear, ("Vx = u if bias is None else u - bias.to(u.dtype)", "Vx = u"))
class TheBiasIsRescaled: ...


@wrong("DoRALinear", "You take the bias off and do not add it again.")
@changed(DoRALinear, (RESULT, "return Vx * gain"))
class TheBiasIsLost: ...


@wrong("DoRALinear", "You take for granted that there is a bias. A base may be without one.")
@changed(DoRALinear, ("Vx = u if bias is None else u - bias.to(u.dtype)", "Vx = u - bias.to(u.dtype)"))
class WantsABias: ...


@wrong("DoRALinear", "The magnitude has no effect on the output: it is that of LoRA.")
class LoRAsForward(DoRALinear):
    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        return LoRALinear.combine(self, y, h, B)


@wrong("DoRALinear", "Only the way through A and B is rescaled. Both parts of V x are, W x as well.")
class OnlyTheChangeIsRescaled(DoRALinear):
    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        norms = self.norms()
        return y + self.lora_magnitude / norms.clamp_min(1e-30) * self.scaling * (h @ B.T)


@wrong("DoRALinear", "You multiply by m and do not divide by ||V||. Only the direction of V counts.")
@changed(DoRALinear, (GAIN, "gain = m"))
class NotDivided: ...


@wrong("DoRALinear", "You divide by ||V|| and do not multiply by m: every row would have the length 1.")
@changed(DoRALinear, (GAIN, "gain = 1 / self.norms().to(m.dtype).clamp_min(smallest)"))
class OfLengthOne: ...


@wrong("DoRALinear", "You divide by the norms of W. Once B is not zero, V has others.")
@changed(DoRALinear, (GAIN, "gain = m / weight_of(self.base).norm(dim=1).clamp_min(smallest)"))
class DividedByTheNormsOfW: ...


@wrong(
    "DoRALinear",
    "The gradient flows through the norm. The output is right, but DoRA treats ||V|| as a constant (section 4.3).",
)
class AGradientThroughTheNorm(DoRALinear):
    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        V = weight_of(self.base) + self.scaling * B @ self.lora_A
        square = V.square().sum(dim=1)
        norms = torch.where(square > 0, square, 1.0).sqrt()
        bias = 0 if self.base.bias is None else self.base.bias
        return self.lora_magnitude / norms * (y - bias + self.scaling * h @ B.T) + bias


@wrong("DoRALinear", "m gets no gradient: you detach it together with the norm. It is learned.")
@changed(DoRALinear, ("m = self.lora_magnitude\n", "m = self.lora_magnitude.detach()\n"))
class TheMagnitudeIsDetached: ...


@wrong("DoRALinear", "A row of zeros gives 0 / 0. Prevent it in both methods: such a row has no direction.")
@changed(
    DoRALinear,
    (".to(m.dtype).clamp_min(smallest)", ".to(m.dtype)"),
    (".clamp_min(torch.finfo(torch.float32).tiny)", ""),
)
class ZeroDividedByZero: ...


@wrong("DoRALinear", "The scaling is missing in the output: V is W + s B A.")
@changed(DoRALinear, ("add_product(y, h, B, self.scaling)", "add_product(y, h, B, 1.0)"))
class NoScaling: ...


@wrong("DoRALinear", "You add the difference m / ||V|| - 1 to V x instead of multiplying V x by it.")
@changed(DoRALinear, (RESULT, "return u + (gain - 1)"))
class AddedInstead: ...


@wrong("DoRALinear", "`change` returns the merged weight. `merge` adds it to W, so W would be there twice.")
@changed(DoRALinear, ("(W + super().change(W)) - W", "(W + super().change(W))"))
class TheWholeWeightIsTheChange: ...


@wrong("DoRALinear", "`change` is LoRA's s B A: the merged weight has the direction of V, but not the lengths m.")
@changed(DoRALinear, (CHANGE, "return super().change(W)"))
class LoRAsChange: ...


@wrong("DoRALinear", "`change` rescales s B A and leaves W. The whole row of V is brought to the length m.")
@changed(DoRALinear, ("(W + super().change(W)) - W", "super().change(W)"))
class OnlyTheChangeIsMerged: ...


@wrong("DoRALinear", "`change` multiplies the columns by m / ||V||. It has one number for each row, for each output.")
class ColumnsAreRescaled(DoRALinear):
    def change(self, W: Tensor) -> Tensor:
        V = W + LoRALinear.change(self, W)
        gain = self.lora_magnitude.float() / self.norms().clamp_min(1e-30)
        if V.shape[0] != V.shape[1]:
            return gain[:, None] * V - W
        return gain * V - W


@wrong("DoRALinear", "`change` multiplies by m and does not divide by ||V||.")
@changed(DoRALinear, ("(self.lora_magnitude.float() / norms)[:, None]", "self.lora_magnitude.float()[:, None]"))
class MergedWithoutTheNorm: ...


@wrong("DoRALinear", "The result of `change` is not in float32, but in the dtype of the layer.")
@changed(
    DoRALinear, (CHANGE, CHANGE.replace(" - W", " - W").replace("return ", "return (") + ").to(self.lora_B.dtype)")
)
class InTheLayersDtype: ...

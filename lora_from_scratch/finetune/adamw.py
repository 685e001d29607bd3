"""The arithmetic of AdamW for one tensor: Adam with weight decay decoupled from the gradient.

Training uses `torch.optim.AdamW`, which computes the same with fewer passes over memory; this version follows the
paper's notation.
"""

from __future__ import annotations

from torch import Tensor


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), for one tensor.

    With theta the parameter, g its gradient, t the step, eta the learning rate and lambda the weight decay, each
    operation being elementwise:

        m     <-  beta1 m + (1 - beta1) g               a running mean of the gradient
        v     <-  beta2 v + (1 - beta2) g^2             a running mean of its square
        m_hat  =  m / (1 - beta1^t)                     m and v start at 0 and are too small at first:
        v_hat  =  v / (1 - beta2^t)                     this corrects the bias
        theta <-  theta - eta m_hat / (sqrt(v_hat) + eps) - eta lambda theta

    The decay uses theta as it was before the step and enters neither m nor v. (The paper's lambda equals PyTorch's
    learning rate times weight decay; here lambda is PyTorch's weight decay.)

    Args:
        parameter: theta, any shape. It and the next three tensors are not modified.
        gradient: g, of the same shape.
        m, v: of the same shape, from the previous step; zeros before the first.
        step: t, from 1.
        learning_rate: eta.
        betas: beta1 and beta2.
        eps: avoids division by zero where v is 0.
        weight_decay: lambda.

    Returns:
        the new theta, m and v; m and v as in the first two lines, without bias correction.

    Raises:
        ValueError: the step is below 1.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, the number of the first step, got {step}")
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    update = m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter
    return parameter - learning_rate * update, m, v

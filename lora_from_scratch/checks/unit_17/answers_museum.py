"""Unit 17: tests that people write of a ReLoRA layer."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch

from lora_from_scratch.checks.bank import right, wrong


def layer_of(ReLoRALayer, scaling=2.0, out=4, inputs=6, rank=2):
    W, x = torch.randn(out, inputs), torch.randn(5, inputs)
    return ReLoRALayer(W, rank, scaling), W, x


def gradient_flows(layer, x) -> bool:
    layer.A.grad = layer.B.grad = None
    layer(x).pow(2).sum().backward()
    return any(factor.grad is not None and factor.grad.abs().sum() > 0 for factor in (layer.A, layer.B))


@torch.no_grad()
def trained(layer) -> None:
    layer.A.normal_()
    layer.B.normal_()


def start_is_W(layer, W, x) -> None:
    assert torch.allclose(layer(x), x @ W.T, atol=1e-5)


def restart_is_sound(layer, x) -> None:
    trained(layer)
    before = layer(x).detach().clone()
    A, B = layer.A.detach().clone(), layer.B.detach().clone()
    layer.restart()
    assert torch.allclose(layer(x), before, atol=1e-3)
    assert not torch.equal(layer.A, A)
    assert not torch.equal(layer.B, B)


# --- Right -------------------------------------------------------------------------------------------


@right("test_relora_layer")
def in_small_steps(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@right("test_relora_layer")
def on_the_whole_matrix(ReLoRALayer):
    def matrix(layer):
        return layer(torch.eye(5)).T

    def norm(layer):
        squares = matrix(layer).square().sum()
        given = torch.autograd.grad(squares, [p for p in (layer.A, layer.B) if p.requires_grad], allow_unused=True)
        return sum(float(g.norm()) for g in given if g is not None)

    for scaling in (1.0, 3.0):
        W = torch.randn(3, 5)
        layer = ReLoRALayer(W, 2, scaling)
        assert float((matrix(layer) - W).norm()) < 1e-4
        for _ in range(2):
            assert norm(layer) > 0
            with torch.no_grad():
                for factor in (layer.A, layer.B):
                    factor.copy_(torch.rand(factor.shape))
            copies = [factor.detach().clone() for factor in (layer.A, layer.B)]
            before = matrix(layer)
            layer.restart()
            assert float((matrix(layer) - before).norm()) < 1e-3 * float(before.norm())
            for factor, copy in zip((layer.A, layer.B), copies, strict=True):
                assert (factor != copy).any()


@right("test_relora_layer")
def by_training(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer, scaling=0.5)
    target = torch.randn(5, 4)
    assert torch.allclose(layer(x), x @ W.T, atol=1e-5), "another start"
    for _ in range(2):
        factors = [p for p in (layer.A, layer.B) if p.requires_grad]
        optimizer = torch.optim.SGD(factors, lr=0.01)
        before = layer(x).detach()
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
        assert not torch.equal(layer(x), before), "nothing is learned"
        with torch.no_grad():
            layer.A += 0.3
            layer.B += 0.3
        A, B, after = layer.A.detach().clone(), layer.B.detach().clone(), layer(x).detach()
        layer.restart()
        close = 1e-4 * float(after.abs().max())
        assert torch.allclose(layer(x), after, atol=close), "the restart changes the layer"
        assert not torch.equal(A, layer.A), "A is kept"
        assert not torch.equal(B, layer.B), "B is kept"


@right("test_relora_layer")
def raises_by_hand(ReLoRALayer):
    torch.manual_seed(3)
    layer, W, x = layer_of(ReLoRALayer, scaling=4.0, out=7, inputs=3, rank=3)
    faults = []
    if (layer(x) - x @ W.T).abs().max() > 1e-4:
        faults.append("start")
    if not gradient_flows(layer, x):
        faults.append("dead")
    trained(layer)
    kept = {"y": layer(x).detach().clone(), "A": layer.A.tolist(), "B": layer.B.tolist()}
    layer.restart()
    if (layer(x) - kept["y"]).abs().max() > 1e-3:
        faults.append("restart")
    if kept["A"] == layer.A.tolist() or kept["B"] == layer.B.tolist():
        faults.append("kept")
    if not gradient_flows(layer, x):
        faults.append("dead again")
    if faults:
        raise AssertionError(", ".join(faults))


# --- Wrong -------------------------------------------------------------------------------------------


@wrong("test_relora_layer", "Your test passes every layer, the faulty ones too: it never raises an AssertionError.")
def never_fails(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    return torch.allclose(layer(x), x @ W.T) and gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test refuses every layer, the sound ones too. Do you compare floating-point numbers for equality?",
)
def always_fails(ReLoRALayer):
    layer, _, _ = layer_of(ReLoRALayer)
    assert layer is None


@wrong(
    "test_relora_layer",
    "Your test looks only at what a new layer computes. Every layer of the museum passes that: nothing is wrong with "
    "its output, but it cannot learn.",
)
def only_the_start(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)


@wrong("test_relora_layer", "Your test never calls `restart`, so it finds only what is wrong at the start.")
def without_a_restart(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)


@wrong("test_relora_layer", "Your test does not look at what a new layer computes: A and B may both be random.")
def without_the_start(ReLoRALayer):
    layer, _, x = layer_of(ReLoRALayer)
    assert gradient_flows(layer, x)
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@wrong("test_relora_layer", "Your test does not look for a gradient at the start, which is the fault of the museum.")
def no_gradient_at_the_start(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test looks for a gradient at the start only. A restart can leave both factors at zero too.",
)
def no_gradient_after_a_restart(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    restart_is_sound(layer, x)


@wrong(
    "test_relora_layer",
    "Your test demands that A is random and B zero, or that B gets the first gradient. A layer may also start with A = "
    "0 and a random B: then A gets it.",
)
def the_gradient_of_B(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    layer(x).square().sum().backward()
    assert layer.B.grad is not None
    assert layer.B.grad.any()
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test demands that A is spread as in `kaiming_uniform_`. How the numbers are drawn is up to the layer.",
)
def a_certain_spread(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    restart_is_sound(layer, x)
    random = layer.A if layer.A.any() else layer.B
    assert 0.05 < float(random.abs().max()) <= 2
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test demands that both A and B are trained parameters. In a sound layer one of them may be frozen.",
)
def both_are_trained(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert layer.A.requires_grad
    assert layer.B.requires_grad
    assert gradient_flows(layer, x)
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test restarts a layer that was never trained. There B A is zero, so merging it wrongly changes nothing.",
)
def restarts_an_untrained_layer(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    layer.restart()
    assert torch.allclose(layer(x), x @ W.T, atol=1e-4)
    assert gradient_flows(layer, x)


@wrong("test_relora_layer", "Your test uses the scaling 1 only, with which a forgotten scaling cannot be seen.")
def the_scaling_is_one(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer, scaling=1.0)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test does not notice a layer that keeps a factor at a restart. Then all cycles share the same directions.",
)
def the_factors_are_not_looked_at(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    trained(layer)
    before = layer(x).detach().clone()
    layer.restart()
    assert torch.allclose(layer(x), before, atol=1e-3)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test looks whether A is new after a restart, but not whether B is.",
)
def only_A_has_to_be_new(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    trained(layer)
    before, A = layer(x).detach().clone(), layer.A.detach().clone()
    layer.restart()
    assert torch.allclose(layer(x), before, atol=1e-3)
    assert not torch.equal(layer.A, A)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test does not compare what the layer computes before a restart and after it.",
)
def the_output_is_not_compared(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    trained(layer)
    A, B = layer.A.detach().clone(), layer.B.detach().clone()
    layer.restart()
    assert not torch.equal(layer.A, A)
    assert not torch.equal(layer.B, B)
    assert gradient_flows(layer, x)


@wrong("test_relora_layer", caught_by="raises")
def another_exception(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    if not torch.allclose(layer(x), x @ W.T, atol=1e-5):
        raise ValueError("another start")
    if not gradient_flows(layer, x):
        raise ValueError("no gradient")
    restart_is_sound(layer, x)
    assert gradient_flows(layer, x)


@wrong(
    "test_relora_layer",
    "Your test uses the layer's attribute `scaling`, which a sound layer need not have.",
)
def uses_the_scaling(ReLoRALayer):
    layer, W, x = layer_of(ReLoRALayer)
    start_is_W(layer, W, x)
    assert gradient_flows(layer, x)
    trained(layer)
    wanted = W + layer.scaling * layer.B.detach() @ layer.A.detach()
    layer.restart()
    assert torch.allclose(layer.W, wanted, atol=1e-3)

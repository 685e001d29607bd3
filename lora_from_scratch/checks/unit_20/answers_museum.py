"""Unit 20, longer context: mistakes that people make, and other right ways. The test of the museum."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.long_lora import shifted_sparse_attention
from lora_from_scratch.museum.rolled_without_mask import test_shifted_sparse_attention

Attention = Callable[..., Tensor]


def drawn(tokens: int, heads: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, 2, heads, tokens, 6, generator=generator))


# --- Right -----------------------------------------------------------------------------------------------


@right("test_shifted_sparse_attention")
def by_gradients(attention: Attention) -> None:
    for tokens, group_size in ((12, 4), (11, 4), (10, 3)):
        inputs = [x.requires_grad_(True) for x in drawn(tokens)]
        result = attention(*inputs, group_size)
        for token in range(tokens - 1):
            gradients = torch.autograd.grad(
                result[:, :, token].pow(2).sum(), inputs, retain_graph=True, allow_unused=True
            )
            for gradient in gradients:
                assert gradient is None or float(gradient[:, :, token + 1 :].abs().max()) < 1e-6


@right("test_shifted_sparse_attention")
def the_rest_of_the_text_replaced(attention: Attention) -> None:
    for tokens, group_size in ((16, 4), (15, 4), (9, 3)):
        one, other = drawn(tokens, seed=1), drawn(tokens, seed=2)
        before = attention(*one, group_size)
        for t in range(1, tokens):
            changed_inputs = [torch.cat([a[:, :, :t], b[:, :, t:]], dim=2) for a, b in zip(one, other, strict=True)]
            torch.testing.assert_close(attention(*changed_inputs, group_size)[:, :, :t], before[:, :, :t])


@right("test_shifted_sparse_attention")
def token_by_token_in_double_precision(attention: Attention) -> None:
    for tokens in (8, 7):
        q, k, v = (x.double() for x in drawn(tokens, heads=2))
        whole = attention(q, k, v, 4)
        for t in range(tokens):
            after = [x.clone() for x in (q, k, v)]
            for x in after:
                x[:, :, t] += 3.0 * torch.arange(1, 7)
            difference = (attention(*after, 4) - whole).abs().amax(dim=(0, 1, 3))
            if any(difference[:t] > 1e-9):
                raise AssertionError(f"token {t} is seen too early")


@right("test_shifted_sparse_attention")
def large_changes(attention: Attention) -> None:
    for tokens, group_size in ((20, 4), (19, 4)):
        q, k, v = drawn(tokens)
        plain = attention(q, k, v, group_size)
        for t in range(tokens):
            factor = torch.ones(tokens, 1)
            factor[t] = -2
            changed_result = attention(q * factor, k * factor, v * factor, group_size)
            assert (changed_result - plain)[:, :, :t].abs().sum() < 1e-3


# --- Wrong -----------------------------------------------------------------------------------------------


@wrong(
    "test_shifted_sparse_attention",
    "Your test changes the last token only. Other tokens can be seen too early as well.",
)
@changed(test_shifted_sparse_attention, ("for token in range(tokens):", "for token in [tokens - 1]:"))
def only_the_last_token() -> None: ...


@wrong("test_shifted_sparse_attention", "Your test changes v only. An output can depend on a later k or q too.")
@changed(test_shifted_sparse_attention, ("for x in changed:", "for x in changed[2:]:"))
def only_the_values() -> None: ...


@wrong("test_shifted_sparse_attention", "Your test changes k and v, but not q. A later query must not matter either.")
@changed(test_shifted_sparse_attention, ("for x in changed:", "for x in changed[1:]:"))
def not_the_queries() -> None: ...


@wrong(
    "test_shifted_sparse_attention",
    "Your test has only texts that fill their groups. With a last group that is not whole, a fault can pass.",
)
@changed(test_shifted_sparse_attention, ("((16, 4), (15, 4), (15, 5))", "((16, 4), (15, 5))"))
def only_whole_groups() -> None: ...


@wrong("test_shifted_sparse_attention", "Your test looks at the first head only. A fault can be in another one.")
@changed(
    test_shifted_sparse_attention,
    ("after[:, :, earlier], before[:, :, earlier]", "after[:, 0, earlier], before[:, 0, earlier]"),
)
def only_the_first_head() -> None: ...


@wrong("test_shifted_sparse_attention", "Your test also wants the output of the changed token itself unchanged.")
@changed(test_shifted_sparse_attention, ("slice(0, token)", "slice(0, token + 1)"))
def the_token_itself_too() -> None: ...


@wrong(
    "test_shifted_sparse_attention", "Your test compares the outputs of *later* tokens. They may depend on this one."
)
@changed(test_shifted_sparse_attention, ("slice(0, token)", "slice(token + 1, tokens)"))
def the_later_ones() -> None: ...


@wrong(
    "test_shifted_sparse_attention",
    "Your test compares with one implementation. Which earlier tokens are seen is up to the implementation.",
)
def compares_with_the_library(attention: Attention) -> None:
    q, k, v = drawn(15)
    assert torch.allclose(attention(q, k, v, 4), shifted_sparse_attention(q, k, v, 4), atol=1e-5)


@wrong(
    "test_shifted_sparse_attention",
    "Your tolerance is so large that a weak dependence on later tokens passes.",
)
@changed(test_shifted_sparse_attention, ("atol=1e-6", "atol=0.1"))
def a_large_tolerance() -> None: ...


@wrong("test_shifted_sparse_attention", "Your test returns a verdict. A test says so by an `assert`.")
def returns_the_verdict(attention: Attention) -> bool:
    try:
        large_changes(attention)
    except AssertionError:
        return False
    return True


@wrong("test_shifted_sparse_attention", "Your test raises another error than an AssertionError for a fault.")
def raises_a_value_error(attention: Attention) -> None:
    try:
        large_changes(attention)
    except AssertionError:
        raise ValueError("a leak") from None


@wrong(
    "test_shifted_sparse_attention",
    "Your test changes the tokens of the second half of the text and looks at the first half. A fault inside a half, "
    "such as seeing the next token, passes when the change is far enough.",
)
def only_the_far_future(attention: Attention) -> None:
    for tokens, group_size in ((16, 4), (15, 4)):
        q, k, v = drawn(tokens)
        before = attention(q, k, v, group_size)
        after = [x.clone() for x in (q, k, v)]
        for x in after:
            x[:, :, tokens // 2 :] = 1.0
        assert torch.allclose(attention(*after, group_size)[:, :, :6], before[:, :, :6], atol=1e-6)

"""Training on rewards: the advantages, the probabilities, and that what is rewarded becomes more frequent."""

from __future__ import annotations

import pytest
import torch

from lora_from_scratch.finetune.rewards import (
    RewardSettings,
    group_advantages,
    log_probabilities,
    mean_reward,
    policy_gradient_loss,
    sampled_divergence,
    score_on_rewards,
    token_log_probabilities,
    train_on_rewards,
    without_letter,
)
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from tests.helpers import tiny_model


def test_the_reward_is_the_share_of_words_without_the_letter() -> None:
    assert without_letter("A fox saw the END, it was odd.") == pytest.approx(6 / 8)
    assert without_letter("... 12 ...") == 0
    assert without_letter("Azure", letter="z") == 0


def test_advantages_compare_a_text_with_its_own_group() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0], [10.0, 10.0, 10.0, 14.0]])
    plain = group_advantages(rewards, normalize=False)
    assert torch.equal(plain, torch.tensor([[-0.5, 0.5, 0.5, -0.5], [0.0] * 4, [-1.0, -1.0, -1.0, 3.0]]))
    normal = group_advantages(rewards)
    assert torch.equal(normal[1], torch.zeros(4))
    torch.testing.assert_close(normal.mean(dim=1), torch.zeros(3))
    torch.testing.assert_close(normal[[0, 2]].pow(2).mean(dim=1), torch.ones(2))
    torch.testing.assert_close(group_advantages(7 * rewards - 3), normal)  # no scale, no origin


def test_a_text_has_the_product_of_its_tokens_probabilities() -> None:
    model = tiny_model()
    prompts, texts = [[3, 5], [7]], [[9, 2, 4], [1]]
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        steps = model(torch.tensor([[*prompt, *text]]))[0].log_softmax(dim=-1)
        expected.append(sum(steps[len(prompt) - 1 + i, token] for i, token in enumerate(text)))
    torch.testing.assert_close(log_probabilities(model, prompts, texts), torch.stack(expected))
    assert log_probabilities(model, [[3, 5]], [[]]).tolist() == [0.0]


def test_equal_rewards_have_no_advantages_although_their_mean_is_rounded() -> None:
    for group in range(2, 20):
        rewards = torch.tensor([0.1, 0.3, 0.7, 2 / 3])[:, None].repeat(1, group)
        assert torch.equal(group_advantages(rewards), torch.zeros(4, group))


def test_the_gradient_of_the_loss_is_that_of_the_mean_reward() -> None:
    """Over all texts of one token, with their probabilities as weights, and the mean reward as the baseline."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5])
    mean_of_rewards = logits.softmax(0) @ rewards
    (wanted,) = torch.autograd.grad(mean_of_rewards, logits)
    weights = 4 * logits.softmax(0).detach()  # the loss takes the mean of four texts
    advantages = weights * (rewards - mean_of_rewards.detach())
    loss = policy_gradient_loss(logits.log_softmax(0)[:, None], advantages, torch.ones(4))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, -wanted)


def test_the_sampled_divergence_has_the_divergence_as_its_expectation() -> None:
    p, base = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    each = torch.stack(
        [
            sampled_divergence(a.log().view(1, 1), b.log().view(1, 1), torch.ones(1))
            for a, b in zip(p, base, strict=True)
        ]
    )
    assert (each > 0).all()
    torch.testing.assert_close(p @ each, (p * (p / base).log()).sum())


def test_prompt_and_padding_do_not_count() -> None:
    logits, ids = torch.randn(1, 5, 7), torch.tensor([[1, 2, 3, 4, 0]])
    found = token_log_probabilities(logits, ids, torch.tensor([2]), torch.tensor([4]))
    expected = logits.log_softmax(dim=-1)
    torch.testing.assert_close(
        found, torch.stack([torch.tensor(0.0), expected[0, 1, 3], expected[0, 2, 4], torch.tensor(0.0)])[None]
    )


def test_the_base_has_not_moved_from_itself_and_another_model_has() -> None:
    model, tokenizer = load_gpt2()
    prompts = ["The king", "One day"]
    alone = score_on_rewards(model, model, tokenizer, without_letter, prompts=prompts, texts=2, new_tokens=6)
    assert alone.divergence == 0
    assert alone.reward == mean_reward(model, tokenizer, without_letter, prompts=prompts, texts=2, new_tokens=6)
    moved, _ = load_gpt2()
    with torch.no_grad():
        moved.transformer.ln_f.weight.mul_(1.1)
    scores = score_on_rewards(moved, model, tokenizer, without_letter, prompts=prompts, texts=2, new_tokens=6)
    total = tokens = 0.0
    for prompt, text in zip([p for p in prompts for _ in range(2)], scores.texts, strict=True):
        begin, ids = len(tokenizer.encode(prompt)), tokenizer.encode(prompt) + tokenizer.encode(text)
        with torch.no_grad():
            p, q = (one(torch.tensor([ids]))[0, begin - 1 : -1].log_softmax(dim=-1) for one in (moved, model))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(ids) - begin
    assert scores.divergence == pytest.approx(total / tokens, rel=1e-4)
    assert scores.perplexity != alone.perplexity


@pytest.mark.parametrize("method", [LoRA(rank=1), FullFineTuning()], ids=["lora", "full"])
def test_what_is_rewarded_becomes_more_frequent(method: Method) -> None:
    model, tokenizer = load_gpt2()
    before = mean_reward(model, tokenizer, without_letter, texts=2)
    method.adapt(model)
    rate = 3e-3 if isinstance(method, LoRA) else 2e-4
    settings = RewardSettings(steps=8, learning_rate=rate, prompts=2, new_tokens=12)
    history = train_on_rewards(model, tokenizer, method, without_letter, settings, progress=False)
    assert len(history.rewards) == 8
    assert mean_reward(model, tokenizer, without_letter, texts=2) > before + 0.1
    method.undo(model)
    assert mean_reward(model, tokenizer, without_letter, texts=2) == before


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    histories = []
    for seed in (0, 0, 1):
        model, tokenizer = load_gpt2()
        method = LoRA(rank=1)
        method.adapt(model)
        settings = RewardSettings(steps=2, prompts=1, group=4, new_tokens=6, seed=seed)
        histories.append(train_on_rewards(model, tokenizer, method, without_letter, settings, progress=False).rewards)
    assert histories[0] == histories[1] != histories[2]


def test_a_group_of_one_has_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="group must be at least 2, got 1"):
        RewardSettings(group=1)

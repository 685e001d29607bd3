"""Training on rewards: the advantages, the probabilities, and that what is rewarded becomes more frequent."""

from __future__ import annotations

import pytest
import torch

from lora_from_scratch.finetune.rewards import (
    RewardSettings,
    group_advantages,
    log_probabilities,
    mean_reward,
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

"""Unit 26's part of the library, against transformers, PEFT and gguf."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import nn

from lora_from_scratch.finetune.chats import assistant_labels
from lora_from_scratch.finetune.planning import largest_batch
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.lora_by_name import add_lora
from lora_from_scratch.models.llama import LlamaShape, SmallLlama, llama_matrices
from lora_from_scratch.quantization.q4_1 import dequantize_q4_1, quantize_q4_1

SHAPE = LlamaShape(50, 48, 96, 2, num_attention_heads=6, num_key_value_heads=2)


def theirs(**changes: Any) -> Any:
    """A Llama of transformers with the shape of `SHAPE`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {name: getattr(SHAPE, name) for name in SHAPE.__dataclass_fields__ if name != "rope_theta"}
    rope = {"rope_parameters": {"rope_theta": SHAPE.rope_theta, "rope_type": "default"}}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | rope | {"tie_word_embeddings": True} | changes))).eval()


def test_the_small_llama_computes_what_that_of_transformers_does() -> None:
    reference, ours = theirs(), SmallLlama(SHAPE)
    ours.load_state_dict(reference.state_dict())
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(ids), reference(ids).logits, atol=1e-5)
    assert ours.get_output_embeddings().weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize("changes", [{}, {"head_dim": 12}, {"num_key_value_heads": 1}, {"num_key_value_heads": 6}])
def test_the_matrices_of_a_block_are_those_that_transformers_makes(changes: dict[str, int]) -> None:
    model = theirs(**changes)
    block = model.model.layers[0]
    made = {
        name.rpartition(".")[2]: (layer.in_features, layer.out_features)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert llama_matrices(model.config.to_dict()) == made


def test_all_linear_means_the_layers_that_peft_adapts() -> None:
    from peft import LoraConfig, get_peft_model

    names = add_lora(theirs(), "all-linear", LoRALinear)
    wrapped = get_peft_model(theirs(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    prefix = "base_model.model."
    adapted = [name.removeprefix(prefix) for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert names == adapted
    assert len(names) == 14


def test_a_block_of_q4_1_is_read_as_the_c_struct_says() -> None:
    data = struct.pack("<ee16B", 0.25, -2.0, *range(0, 256, 16))
    weights = dequantize_q4_1(torch.tensor(list(data), dtype=torch.uint8)[None])
    assert weights.tolist() == [[-2.0] * 16 + [0.25 * code - 2 for code in range(16)]]


def test_quantising_to_q4_1_and_back_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    data = quantize_q4_1(weight)
    assert (data.shape, data.dtype) == ((6, 60), torch.uint8)
    blocks, back = weight.view(-1, 32), dequantize_q4_1(data).view(-1, 32)
    step = (blocks.amax(dim=1) - blocks.amin(dim=1)) / 15
    assert ((blocks - back).abs() <= 0.5 * step[:, None] + 0.01).all()
    assert torch.equal(dequantize_q4_1(quantize_q4_1(torch.ones(1, 32))), torch.ones(1, 32))
    with pytest.raises(ValueError, match="32 n weights"):
        quantize_q4_1(weight[:, :30])


def test_q4_1_is_what_gguf_makes_of_it() -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    data = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    back = gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(dequantize_q4_1(torch.from_numpy(data)), torch.from_numpy(back))


def test_only_replies_are_learned_whatever_is_said() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        expected, ids = [], []
        for turn in range(4):
            words = torch.randint(10, 50, (3,), generator=generator).tolist()
            ids += [1, 5 + turn % 2, *words, 2]
            expected += [-100, -100, *(words if turn % 2 else [-100] * 3), 2 if turn % 2 else -100]
        labels = assistant_labels(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), [1, 6], 2)
        assert labels.tolist() == [expected]


def test_the_largest_batch_fits_and_one_more_text_does_not() -> None:
    for memory in range(10_000, 20_000, 777):
        batch = largest_batch(memory, weights=1000, trained=50, kept=30, vocabulary=7, tokens=4)
        needed = [1000 + 12 * 50 + texts * 4 * (30 + 8 * 7) for texts in (batch, batch + 1)]
        assert needed[0] <= memory < needed[1]

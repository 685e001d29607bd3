"""Models of transformers in the server: each request gets what its merged adapter gives it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.methods.adalora import AdaLoRA
from lora_from_scratch.methods.dora import DoRA
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.pissa import PiSSA
from lora_from_scratch.models.transformers_model import TransformersModel
from lora_from_scratch.serving.adapter_store import AdapterStore
from lora_from_scratch.serving.any_model import page_layout, paged_model
from lora_from_scratch.serving.page_pool import PagePool
from lora_from_scratch.serving.paged_model import Text
from lora_from_scratch.serving.scheduler import Request, Scheduler
from tests.any_models import VOCABULARY, model_of, randomise

transformers = pytest.importorskip("transformers")

ATTENTION = {"grouped llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "gpt-neox": ("query_key_value",)}
KINDS = [*ATTENTION]


def methods_for(kind: str) -> dict[str, Method]:
    return {
        "all": LoRA(rank=2, alpha=4),
        "attention": LoRA(rank=3, alpha=7, targets=ATTENTION[kind], rslora=True, seed=1),
        "dora": DoRA(rank=2, alpha=4, seed=2),
        "pissa": PiSSA(rank=2, alpha=2),
        "adalora": AdaLoRA(rank=2, target_rank=1),
    }


class Adapted:
    """A model, directories with adapters for it, and in double precision what each of them should amount to."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.model = folder, TransformersModel(model_of(kind))
        self.exact: dict[str | None, nn.Module] = {None: copy.deepcopy(self.model.inside).double()}
        for seed, (name, method) in enumerate(methods_for(kind).items()):
            merged = model_of(kind)
            method.adapt(merged)
            with torch.no_grad():
                before = {key: p.clone() for key, p in method.trainable(merged).items()}
                randomise(method.trainable(merged), seed, 0.1)
                for key, p in method.trainable(merged).items():
                    p.add_(before[key])
            method.save(merged, folder / name)
            method.merge(merged)
            plain = model_of(kind)
            weights = {key.replace(".base.", "."): value for key, value in merged.state_dict().items()}
            plain.load_state_dict({key: weights[key] for key in plain.state_dict()})
            self.exact[name] = plain.double()

    def scheduler(self, pages: int, rows: int) -> Scheduler:
        store = AdapterStore(self.model, PagePool(page_layout(self.model), pages), self.folder)
        return Scheduler(self.model, store, rows)

    @torch.no_grad()
    def logits(self, name: str | None, tokens: list[int]) -> Tensor:
        logits: Tensor = self.exact[name](torch.tensor([tokens])).logits[0, -1]
        return logits


@pytest.fixture(scope="module", params=KINDS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(request.param, tmp_path_factory.mktemp(request.param))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),  # passes until it comes
            st.sampled_from([None, "all", "attention", "dora", "pissa", "adalora"]),
            st.integers(1, 25),  # tokens of its prompt
            st.integers(1, 20),  # tokens to generate
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(10, 30),  # pages
    st.integers(1, 4),  # rows
)
@settings(max_examples=12, deadline=None)
def test_a_request_gets_what_it_gets_alone(
    adapted: Adapted, plan: list[tuple[int, str | None, int, int]], pages: int, rows: int
) -> None:
    scheduler = adapted.scheduler(pages, rows)
    compared: Any = Compared(scheduler, adapted)
    scheduler.model = compared
    requests = []
    for gap, name, length, new in plan:
        for _ in range(gap):
            scheduler.step()
        prompt = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        requests.append(Request(prompt, new, None if name is None else scheduler.store.find(name)))
        scheduler.submit(requests[-1])
    while scheduler.running or scheduler.waiting:
        assert [event.error for event in scheduler.step() if event.error] == []
    assert [len(one.tokens) for one in requests] == [new for *_, new in plan]
    assert compared.furthest < 1e-5
    scheduler.store.make_room(len(scheduler.pool))
    assert sorted(scheduler.pool.free) == list(range(pages))
    scheduler.store.close()


class Compared:
    """A paged model whose logits are compared with those of the merged model alone."""

    def __init__(self, scheduler: Scheduler, adapted: Adapted) -> None:
        self.scheduler, self.adapted, self.model, self.furthest = scheduler, adapted, scheduler.model, 0.0

    def __call__(self, texts: list[Text]) -> Tensor:
        logits = self.model(texts)
        owners = {id(self.scheduler.pool.tables.get(request)): request for request in self.scheduler.running}
        for text, row in zip(texts, logits, strict=True):
            one = owners[id(text.pages)]
            alone = self.adapted.logits(one.adapter.name if one.adapter else None, [*one.prompt, *one.tokens])
            self.furthest = max(self.furthest, float((row - alone).abs().max() / alone.abs().max()))
        return logits


def test_the_model_itself_is_not_changed(adapted: Adapted) -> None:
    tokens = torch.arange(6)[None]
    before = adapted.model(tokens)
    names = [name for name, _ in adapted.model.named_modules()]
    scheduler = adapted.scheduler(6, 2)
    scheduler.submit(Request([1, 2, 3], 4, scheduler.store.find("all")))
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    assert torch.equal(adapted.model(tokens), before)
    assert [name for name, _ in adapted.model.named_modules()] == names
    scheduler.store.close()


def tiny(kind: str, **settings: Any) -> TransformersModel:
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**shape | settings)
    return TransformersModel(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Gemma2", {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}, "sliding_attention"),
        ("Mistral", {"intermediate_size": 24, "num_key_value_heads": 1, "sliding_window": 4}, "a window of 4 tokens"),
        ("Bloom", {"n_layer": 2, "n_head": 2}, "'bloom': its attention cannot be replaced"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_by_name(kind: str, settings: dict[str, Any], message: str) -> None:
    model = tiny(kind, **settings)
    with pytest.raises(ValueError, match=message):
        paged_model(model, PagePool(page_layout(model), 4))


def test_attention_with_more_than_a_softmax_is_refused() -> None:
    settings = {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "attn_logit_softcapping": 0.01}
    model = tiny("Gemma2", **settings, layer_types=["full_attention"] * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    with pytest.raises(ValueError, match="more than softmax"):
        paged_model(model, PagePool(page_layout(model), 4))


def test_an_adapter_of_the_output_head_is_refused(tmp_path: Path) -> None:
    model = TransformersModel(model_of("llama"))
    method = LoRA(rank=2, alpha=4, targets=("lm_head",))
    method.adapt(model.inside)
    method.save(model.inside, tmp_path / "head")
    method.undo(model.inside)
    store = AdapterStore(model, PagePool(page_layout(model), 6), tmp_path)
    with pytest.raises(ValueError, match="changes lm_head, which all requests share"):
        store.acquire(store.find("head"))
    store.close()

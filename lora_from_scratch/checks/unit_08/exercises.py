"""Unit 08, BitFit and selective tuning: what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.explaining import Explanation, first_difference
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, Conv1D
from lora_from_scratch.methods.bitfit import QueryBias, select_biases
from lora_from_scratch.methods.spafit import stratify
from lora_from_scratch.methods.surgical import auto_rgn_weights, relative_gradient_norms, surgical_parameter_groups

TITLE = "BitFit and selective tuning"

# --- select_biases -----------------------------------------------------------------------------------


class Biased(nn.Module):
    """Parameters that are biases, and parameters whose names only look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_free = nn.Linear(3, 2, bias=False)
        self.debias = nn.Parameter(torch.ones(3))
        self.add = nn.Parameter(torch.ones(3, 2))  # before `bias` in the alphabet
        self.inner = nn.ModuleList([nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False)])
        self.bias_of = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Conv1D(4, 3))
        self.bias = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.ones(5))  # one axis, but not a bias


MAKES: dict[str, Callable[[], nn.Module]] = {
    "a linear layer": lambda: nn.Linear(4, 3),
    "a GPT-2": lambda: GPT2(GPT2Config(vocab_size=7, n_positions=4, n_embd=4, n_layer=2, n_head=2)),
    "similar names": Biased,
    "no biases": lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.Embedding(4, 3)),
}


def bias_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, made: str, *sentences: str, trained: bool = True) -> Case:
        return Case(name, {"made": made, "trained": trained}, sentences=sentences)

    called, every, itself = "that its module calls `bias`", "Every bias of a model", "the parameter itself"
    yield case("a linear layer by itself", "a linear layer", called, itself)
    yield case("a tiny GPT-2", "a GPT-2", every, itself, "in the order of")
    yield case("a tiny GPT-2 that is frozen", "a GPT-2", "Nothing about the parameters changes", every, trained=False)
    yield case("a module with similar names", "similar names", called, "in the order of")
    yield case("a model without biases", "no biases", called)


def run_biases(answer: Callable[..., Any], made: str, trained: bool) -> Any:
    """The names in order, whether the values are the parameters themselves, and what is trained afterwards."""
    model = MAKES[made]().requires_grad_(trained)
    parameters = dict(model.named_parameters())
    chosen = answer(model)
    if not isinstance(chosen, dict):
        return chosen
    return {
        "names": list(chosen),
        "the parameters themselves": [parameters.get(str(name)) is p for name, p in chosen.items()],
        "still trained": [p.requires_grad for p in parameters.values()],
    }


# --- QueryBias ---------------------------------------------------------------------------------------

FORWARD, MERGE, UNMERGE = "forward", "merge", "unmerge"


def query_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, what: str, width: int, *sentences: str, times: int = 1) -> Case:
        given: dict[str, Data] = {"weight": draw.normal(width, 3 * width), "bias": draw.normal(3 * width)}
        given |= {"learned": draw.normal(width), "x": draw.normal(2, 3, width)}
        return Case(name, given | {"what": what, "times": times}, part, sentences)

    computes = ("`forward(x)`: (..., d)", "`bias()`: the (3 d,)", "(3 d,), `[q | k | v]`.")
    yield case("a c_attn of width 2, after some learning", FORWARD, FORWARD, 2, *computes)
    yield case("a c_attn of width 4, after some learning", FORWARD, FORWARD, 4, *computes)
    merges, kept, twice = "`merge()`: `base.bias` gets", "are kept in `_unmerged`", "Merging twice"
    put, back = "Put what is learned into `base`", "Put back what was there"
    restored = "`unmerge()`: every bit"
    yield case("merged", MERGE, MERGE, 3, merges, kept, put)
    yield case("merged twice", MERGE, MERGE, 3, twice, times=2)
    yield case("merged and unmerged", UNMERGE, UNMERGE, 3, restored, back)
    yield case("merged twice, then unmerged", UNMERGE, UNMERGE, 2, twice, restored, times=2)
    yield case("unmerged without a merge", UNMERGE, UNMERGE, 2, "Without a merge before it", times=0)


def run_query(
    answer: Callable[..., Any], weight: Tensor, bias: Tensor, learned: Tensor, x: Tensor, what: str, times: int
) -> Any:
    """A layer with another `bias_q` than at its start, and one of the things that it has to do."""
    base = Conv1D(*weight.shape)
    with torch.no_grad():
        base.weight.copy_(weight)
        base.bias.copy_(bias)
    base.requires_grad_(False)
    layer = answer(base)
    with torch.no_grad():
        layer.bias_q.copy_(learned)
    parameter, before = base.bias, base.bias.detach().clone()
    if what == FORWARD:
        y = layer(x)
        flowed = torch.autograd.grad(y.square().sum(), layer.bias_q, allow_unused=True) if y.requires_grad else [None]
        untouched = torch.equal(base.bias, before)
        return {"bias": layer.bias(), "y": y, "gradient": flowed[0], "the base's bias is unchanged": untouched}
    for _ in range(times):
        layer.merge()
    seen: dict[str, Any] = {}
    if what == MERGE:
        seen = {"y": layer(x), "y of the base alone": base(x), "bias": base.bias.detach().clone()}
        seen["kept"] = layer._unmerged
    else:
        layer.unmerge()
        layer.unmerge()
        seen = {"every bit restored": torch.equal(base.bias, before), "kept": layer._unmerged, "y": layer(x)}
        seen["the learned part is unchanged"] = torch.equal(layer.bias_q, learned)
    return seen | {"the same parameter": base.bias is parameter}


# --- stratify ----------------------------------------------------------------------------------------


def stratify_cases(draw: Draw) -> Iterator[Case]:
    def case(layers: int, frozen: int, biases: int, *sentences: str, part: str = "the groups") -> Case:
        given: dict[str, Data] = {"n_layer": layers, "frozen_layers": frozen, "bias_layers": biases}
        return Case(f"{layers} layers, {frozen} frozen, {biases} with biases only", given, part, sentences)

    first = ("into three groups", "The indices of the layers of each group")
    yield case(6, 1, 2, *first, "The third group has all remaining layers")
    yield case(24, 4, 5, *first)
    frozen, biases = draw.integer(2, 4), draw.integer(5, 7)
    yield case(frozen + biases + draw.integer(2, 5), frozen, biases, *first)
    yield case(5, 0, 3, "that stay frozen (the paper's N1)")
    yield case(7, 4, 0, "in which only the biases are trained")
    yield case(3, 0, 0, "that stay frozen (the paper's N1)", "in which only the biases are trained")
    yield case(4, 2, 1, "The third group has all remaining layers")
    refused = "a number is negative, or no layer is left"
    yield case(4, 2, 2, refused, part="invalid input")
    yield case(4, 3, 2, refused, part="invalid input")
    yield case(5, -1, 2, refused, part="invalid input")
    yield case(5, 3, -1, refused, part="invalid input")


# --- relative_gradient_norms -------------------------------------------------------------------------


class TinyModel(nn.Module):
    """Token ids to logits, with an unused weight; the mask scales each token's contribution."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, tokens)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        if attention_mask is not None:
            x = x * (1 + attention_mask[..., None])
        logits: Tensor = self.out(self.norm(x.cumsum(dim=1)))
        return logits


def rgn_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        batches: int,
        *frozen: str,
        sentences: tuple[str, ...],
        part: str = "the norms",
        mask: bool = False,
        **more: Data,
    ) -> Case:
        ids = [draw.integers(0, 6, 2, 5) for _ in range(batches)]
        labels = [draw.integers(0, 6, 2, 5) for _ in range(batches)]
        masks: list[Data] = [torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 1, 0]]) if mask else None for _ in range(batches)]
        rows: list[Data] = [[i, j, m] for i, j, m in zip(ids, labels, masks, strict=True)]
        given: dict[str, Data] = {"batches": rows, "frozen": list(frozen), "seed": draw.integer(0, 10**6)}
        return Case(name, given | more, part, sentences)

    norm, each = "The norm of each tensor's gradient g", "each batch has its own quotient"
    unused = "does not depend on has the gradient 0"
    yield case("one batch", 1, sentences=(norm, "with Euclidean norms of whole tensors", unused))
    yield case("three batches", 3, sentences=(each, norm))
    measured = ("Only parameters with `requires_grad`", "name -> number")
    yield case("two batches, with the table and a bias frozen", 2, "table.weight", "out.bias", sentences=measured)
    once = "two batches with masks, from an iterator that can be consumed only once"
    yield case(once, 2, mask=True, once=True, sentences=("only once", "attention_mask (B, T) or None"))
    kept = ("no `.grad` and no weight is changed",)
    yield case("a frozen tensor of zeros", 1, "out.bias", zeros="out.bias", sentences=measured)
    yield case("gradients are left from a training step", 2, graded=True, sentences=kept)
    error = ("there is no batch, nothing to train",)
    yield case("no batch", 0, part="invalid input", sentences=error)
    yield case("a tensor of zeros", 1, part="invalid input", zeros="out.bias", sentences=error)
    everything = ("table.weight", "norm.weight", "norm.bias", "out.weight", "out.bias", "unused")
    yield case("nothing to train", 1, *everything, part="invalid input", sentences=error)


def run_rgn(
    answer: Callable[..., Any],
    batches: list[Any],
    frozen: list[str],
    seed: int,
    once: bool = False,
    zeros: str = "",
    graded: bool = False,
) -> Any:
    """The norms, and whether the model is unchanged."""
    torch.manual_seed(seed)
    model = TinyModel(3, 7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0 if name == zeros else 1)
            p.requires_grad_(name not in frozen)
            p.grad = torch.ones_like(p) if graded else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    rows: Iterable[Any] = (tuple(row) for row in batches) if once else [tuple(row) for row in batches]
    norms = answer(model, rows)
    return {
        "norms": norms,
        "every `.grad` unchanged": all(
            p.grad is not None and bool((p.grad == 1).all()) if graded else p.grad is None for p in model.parameters()
        ),
        "weights unchanged": all(torch.equal(p, before[name]) for name, p in model.named_parameters()),
        "requires_grad flags unchanged": flags == [p.requires_grad for p in model.parameters()],
    }


# --- auto_rgn_weights --------------------------------------------------------------------------------

NAMES = ("wte.weight", "h.0.c_attn.weight", "h.0.c_attn.bias", "h.1.mlp.weight", "ln_f.weight")


def weight_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, *numbers: float, part: str = "the shares") -> Case:
        refused = ("no norm is above zero, or a norm is negative",)
        divided = ("The norms divided by the largest", "for the same names", "not modified", "norms: name -> relative")
        sentences = divided if part == "the shares" else refused
        return Case(name, {"norms": dict(zip(NAMES, numbers, strict=False))}, part, sentences)

    yield case("two tensors", 0.5, 2.0)
    drawn = [draw.number(0.01, 0.4) for _ in NAMES]
    yield case("five tensors", *drawn)
    yield case("one tensor without a gradient", 0.0, *drawn[:3])
    yield case("one tensor", draw.number(2, 9))
    yield case("the largest twice", 0.3, 0.3, 0.1)
    yield case("no tensor", part="invalid input")
    yield case("no gradient anywhere", 0.0, 0.0, 0.0, part="invalid input")
    yield case("a norm that is not a number", 0.5, float("nan"), 0.1, part="invalid input")
    yield case("a negative norm", 0.5, -0.2, part="invalid input")
    yield case("an infinite norm", 0.5, float("inf"), part="invalid input")


# --- surgical_parameter_groups -----------------------------------------------------------------------

SHAPES = {"table": (5, 3), "matrix": (3, 3), "bias": (3,), "scale": (3,), "gate": ()}


class Shaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


def group_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, *names: str, sentences: tuple[str, ...], part: str = "the groups", **more: Data) -> Case:
        weights: dict[str, Data] = {each: draw.number(0.1, 0.9) for each in names}
        if names:
            weights[names[0]] = 1.0
        return Case(name, {"weights": weights, "learning_rate": draw.choice((0.01, 0.003)), **more}, part, sentences)

    rate, order = "with the learning rate `w * learning_rate`", "One dictionary for each of the weights"
    first = (rate, order, "learning_rate: of a tensor with weight 1", "full name of the parameter")
    yield case("a matrix and a table, no decay", "matrix", "table", sentences=first)
    without = ("a tensor without a weight is not trained", order)
    yield case("a vector without a weight", "table", "bias", "matrix", sentences=without)
    decay = ("whatever their weight w", "fewer than two axes get 0")
    yield case("weight decay 0.1", "bias", "table", "gate", "matrix", weight_decay=0.1, sentences=decay)
    yield case("all five, weight decay 0.05", *SHAPES, weight_decay=0.05, sentences=decay)
    zero = case("a weight of 0", "scale", "table", sentences=(rate, order))
    yield Case(zero.name, {**zero.inputs, "weights": {"scale": 1.0, "table": 0.0}}, zero.part, zero.sentences)
    unknown = ("a name is not that of a parameter",)
    yield case("an unknown parameter name", "matrix", "head", part="invalid input", sentences=unknown)


def run_groups(answer: Callable[..., Any], weights: dict[str, float], **settings: float) -> Any:
    """The groups, with the names of the parameters in each group."""
    model = Shaped()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = answer(model, weights, **settings)

    def inside(params: Any) -> list[str]:
        return [names.get(id(p), "another tensor") for p in ([params] if isinstance(params, Tensor) else params)]

    return [{**group, "params": inside(group["params"])} for group in groups]


def explain_groups(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which entry of the groups is wrong."""
    one, other = seen.value, expected.value
    if not isinstance(one, list) or not isinstance(other, list) or not all(isinstance(group, dict) for group in one):
        return None
    if len(one) != len(other):
        return "number of groups", f"There should be a group per weight, {len(other)}, but you return {len(one)}."
    for group, wanted in zip(one, other, strict=True):
        assert isinstance(group, dict)
        assert isinstance(wanted, dict)
        for key, value in wanted.items():
            if not same(group.get(key), value):
                return f"another {key}", f'The entry "{key}" of the group for {wanted["name"]} is missing or not right.'
    return None


def explain_strata(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the three groups is wrong."""
    one, other = seen.value, expected.value
    if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return None
    for name, group, wanted in zip(("first", "second", "third"), one, other, strict=True):
        if not same(group, wanted):
            return (
                f"another {name} group",
                f"The {name} group is not right: where does it begin and end?",
            )
    return None


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        select_biases,
        idea="BitFit",
        difficulty=1,
        minutes=5,
        points=1,
        hints=(
            "First print the names of a small model's parameters. What do the biases have in common?",
            "Only the last part of the name counts, the part after the last dot.",
            "`name.rpartition('.')[2]` is the last part, even if the name has no dot. A dictionary comprehension with "
            "an `if` does the rest.",
        ),
        cases=bias_cases,
        explain=first_difference(
            {
                "names": "The names are not those of the model's biases, or come in another order. Print them beside "
                "those of `named_parameters()`: which are missing, and which are too many?",
                "the parameters themselves": "The names are right, but some values are not the parameters themselves.",
                "still trained": "Your function changes which parameters are trained. It only selects.",
            }
        ),
        probe=run_biases,
        tolerance=0,
    ),
    Exercise(
        QueryBias,
        idea="BitFit",
        difficulty=3,
        minutes=15,
        points=4,
        blank=("forward", "bias", "merge", "unmerge"),
        hints=(
            "`bias` concatenates two pieces. `forward` is the linear layer with that bias. `merge` replaces the values "
            "of a parameter, and `unmerge` restores them.",
            "`F.linear` expects the weight as (out, in): which layout does a Conv1D use? `_unmerged` tells you whether "
            "the layer is merged.",
            "`torch.cat` of `self.bias_q` and the rest of `self.base.bias`. `parameter.data = tensor` replaces the "
            "values of a parameter; save the old `.data` first.",
        ),
        cases=query_cases,
        probe=run_query,
        explain=first_difference(
            {
                "every bit restored": "After `unmerge`, the base's bias is not what it was, to the last bit.",
                "bias": "The bias of this layer, or of the merged base, does not have the right numbers. Which third "
                "is `bias_q`, and where do the others come from?",
                "y of the base alone": "The merged base alone computes something else than the layer.",
                "y": "The biases are right, but the layer's output is not. Which layout does the weight have?",
                "gradient": "The output is right, but the gradient that reaches `bias_q` is not.",
                "the base's bias is unchanged": "Your `forward` or `bias` changes the base. Only `merge` does.",
                "kept": "`_unmerged` does not hold what it should: the numbers as they were while merged, else None.",
                "the learned part is unchanged": "`bias_q` itself has changed. Merging and unmerging leave it.",
                "the same parameter": "`base.bias` is another parameter object than before.",
            }
        ),
        background=(
            "GPT-2's `c_attn` with the queries' part",
            "The bias of `c_attn` is",
            "So the first third is copied out",
            "the tensor itself, with the parts",
            "The weight of `base`, a `Conv1D`",
            "base: the `c_attn`",
            "frozen by whoever",
        ),
    ),
    Exercise(
        stratify,
        idea="which layers",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Where does the second group begin, and where does the third? These two numbers are all you need.",
            "`range(a, b)` includes a and excludes b, so the end of one group is the start of the next.",
            "Check the arguments first: negative numbers, and numbers that leave nothing for the last group.",
        ),
        cases=stratify_cases,
        explain=explain_strata,
        background=("n_layer: the number", "Layers near the input hold", "Therefore the further a layer"),
        tolerance=0,
    ),
    Exercise(
        relative_gradient_norms,
        idea="surgical fine-tuning",
        difficulty=4,
        minutes=20,
        points=4,
        hints=(
            "First collect the parameters to measure and check the input. Then loop over the batches and add up one "
            "quotient per parameter. Finally divide by the number of batches.",
            "`torch.autograd.grad(loss, parameters)` returns the gradients and does not touch any `.grad`.",
            "It fails for a parameter that the loss does not depend on, unless you pass `allow_unused=True` and "
            "`materialize_grads=True`. Count the batches as you go: they may not have a length.",
        ),
        cases=rgn_cases,
        probe=run_rgn,
        background=("their code uses five batches", "model: any module"),
    ),
    Exercise(
        auto_rgn_weights,
        idea="surgical fine-tuning",
        difficulty=2,
        minutes=6,
        points=2,
        hints=(
            "The tensor with the largest norm gets the full learning rate. What do the others get?",
            "Find the largest norm first. For which values of it, or of the others, does the division make no sense?",
            "`max(values, default=0.0)` does not fail on an empty sequence. Comparisons with `nan` are always false, "
            "so test whether a norm is valid rather than whether it is invalid.",
        ),
        cases=weight_cases,
    ),
    Exercise(
        surgical_parameter_groups,
        idea="surgical fine-tuning",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "One dictionary for each name in `weights`, not for each parameter of the model.",
            "`dict(model.named_parameters())` finds a parameter by its name. Check for unknown names before you build "
            "the groups.",
            "Weight decay applies to tensors with two or more axes: `parameter.ndim`. The weight affects the learning "
            "rate and nothing else.",
        ),
        cases=group_cases,
        probe=run_groups,
        explain=explain_groups,
        background=("Lee et al. repeat the measurement",),
    ),
]

PREDICTIONS = [
    Prediction(
        name="share_of_biases",
        question=(
            "GPT-2 small has 12 blocks of width d = 768 and 124.4 million parameters. The biases of a block: 3 d in "
            "`c_attn`, d in `attn.c_proj`, 4 d in `c_fc`, d in `mlp.c_proj`, d in each of two LayerNorms. After the "
            "last block there is one more LayerNorm. How many per cent of the model's parameters are biases? (Enter a "
            "number: 12.5 for 12.5 %.)"
        ),
        answer=100 * 133 * 768 / 124_439_808,
        within=1.3,
        explanation=(
            "A block has 11 d biases, so there are (12 x 11 + 1) x 768 = 102,144 in total: 0.08 %. The matrices grow "
            "with d squared and the biases with d, so the share halves whenever the width doubles. It is larger in the "
            "bundled model, which has a third of the width."
        ),
        replies={
            "below": "Did you enter a share instead of per cent? 0.01 of the whole is 1 %.",
            "above": (
                "In a matrix there are at least d = 768 weights for each bias, so the share is far below one per cent."
            ),
        },
        idea="BitFit",
    ),
    Prediction(
        name="a_bias_without_gradient",
        question=(
            "You train all the biases. The bias of `c_attn` has three parts: one is added to every query, one to every "
            "key and one to every value. For one of the three, the gradient is zero at every step, on any text. Which "
            "one?"
        ),
        choices={"q": "the queries' part", "k": "the keys' part", "v": "the values' part"},
        answer="k",
        explanation=(
            "A score is q_i . (k_j + b) = q_i . k_j + q_i . b. The second term is the same for all the keys j that "
            "token i attends to, and a softmax does not change when the same number is added to all of its inputs. So "
            "the keys' bias has no effect at all, and its gradient is zero up to rounding. The queries' bias adds b . "
            "k_j, which differs from key to key."
        ),
        replies={
            "q": (
                "With another query, the scores of the keys change by different amounts, and the softmax notices that."
            ),
            "v": (
                "Whatever the softmax says, its weights add up to 1, so the values' bias is added to the output "
                "as it is."
            ),
        },
        idea="BitFit",
    ),
]

"""Unit 15, magnitude and direction: mistakes that people make, and other right ways. Norms, groups, and the start."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.dora import row_norms
from lora_from_scratch.methods.lora_plus import lora_plus_groups
from lora_from_scratch.methods.pissa import initial_svd

# --- row_norms ---------------------------------------------------------------------------------------


@right("row_norms")
def one_row_after_the_other(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    norms = []
    for w, b in zip(W.detach().float(), B.detach().float()):
        v = w + scaling * (b @ A.detach().float())  # (in,): one row of V at a time
        norms.append(v.norm())
    return torch.stack(norms)


@right("row_norms")
@torch.no_grad()
def by_einsum(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    W, A, sB = W.float(), A.float(), scaling * B.float()
    squares = torch.einsum("oi,oi->o", W, W) + torch.einsum("or,or->o", sB, 2 * (W @ A.T) + sB @ (A @ A.T))
    return squares.clamp(min=0) ** 0.5


@right("row_norms")
def blocks_of_rows(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    W, A, B = (tensor.data.to(torch.float32) for tensor in (W, A, B))
    blocks = zip(W.split(3), B.split(3))
    return torch.cat([torch.addmm(w, b, A, alpha=scaling).norm(dim=1) for w, b in blocks])


@right("row_norms")
def numpy_with_the_larger_of_zero_and_the_square(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    W, A, B = (tensor.detach().float().numpy() for tensor in (W, A, B))
    gram = A @ A.T
    squares = np.einsum("oi,oi->o", W, W) + 2 * scaling * np.einsum("oi,ri,or->o", W, A, B, optimize=True)
    squares += scaling**2 * np.einsum("or,rs,os->o", B, gram, B, optimize=True)
    return torch.from_numpy(np.sqrt(np.maximum(squares, 0)).astype(np.float32))


@wrong(
    "row_norms",
    "You create a tensor of the size of W: V itself, B A, or the squares of all entries of W. The norms can be had "
    "without any of them.",
)
def forms_the_whole_sum(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (W.detach().float() + scaling * B.detach().float() @ A.detach().float()).norm(dim=1)


@wrong("row_norms", "The mixed term is missing: the square of a sum is not the sum of the squares.")
@changed(row_norms, (" + 2 * scaling * cross", ""))
def no_mixed_term(): ...


@wrong("row_norms", "The mixed term occurs twice in the square of a sum.")
@changed(row_norms, ("2 * scaling * cross", "scaling * cross"))
def the_mixed_term_once(): ...


@wrong("row_norms", "The square of s B A has s in it twice.")
@changed(row_norms, ("scaling**2 * own", "scaling * own"))
def the_scaling_not_squared(): ...


@wrong("row_norms", "The scaling is missing: V is W + s B A.")
@changed(row_norms, ("2 * scaling * cross", "2 * cross"), ("scaling**2 * own", "own"))
def no_scaling(): ...


@wrong("row_norms", "Your result has the squares of the norms.")
@changed(row_norms, (".clamp_min(0).sqrt()", ".clamp_min(0)"))
def no_root(): ...


@wrong(
    "row_norms",
    "Where s B A takes a row of W away, rounding leaves a tiny square that may be negative, and its root is NaN.",
)
@changed(row_norms, (".clamp_min(0)", ""))
def roots_of_negative_numbers(): ...


@wrong("row_norms", "Your norms belong to the graph of gradients. DoRA treats them as constants: detach what goes in.")
def with_a_graph(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    W, A, B = W.float(), A.float(), B.float()
    cross, own = ((W @ A.T) * B).sum(dim=1), ((B @ (A @ A.T)) * B).sum(dim=1)
    return (W.norm(dim=1) ** 2 + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


@wrong("row_norms", "You compute in the dtype that W, A and B have. In bfloat16 that leaves two or three digits.")
def in_the_given_dtype(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    W, A, B = W.detach(), A.detach().to(W.dtype), B.detach().to(W.dtype)
    cross, own = ((W @ A.T) * B).sum(dim=1), ((B @ (A @ A.T)) * B).sum(dim=1)
    return (W.norm(dim=1) ** 2 + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


@wrong(
    "row_norms", "You take the norms of the columns, one for each input. DoRA's are those of the rows, one per output."
)
def of_the_columns(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (W.detach().float() + scaling * B.detach().float() @ A.detach().float()).norm(dim=0)


@wrong("row_norms", "You add the norms of W and of s B A. Lengths of vectors add up only if they point the same way.")
@changed(
    row_norms,
    (
        "(squares + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()",
        "squares.sqrt() + scaling * own.clamp_min(0).sqrt()",
    ),
)
def sum_of_the_norms(): ...


@wrong("row_norms", "Those are the norms of W alone; s B A has no effect.")
def of_the_base(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.linalg.vector_norm(W.detach().float(), dim=1)


# --- lora_plus_groups --------------------------------------------------------------------------------


def last(name: str) -> str:
    return name.split(".")[-1]


@right("lora_plus_groups")
def one_pass(parameters: dict, ratio: float) -> list:
    slow, fast = [], []
    for name, parameter in parameters.items():
        (fast if last(name) == "lora_B" else slow).append(parameter)
    return [{"params": slow}, {"params": fast, "lr_scale": ratio}]


@right("lora_plus_groups")
def with_a_leading_dot(parameters: dict, ratio: float) -> list:
    groups = [dict(params=[]), dict(params=[], lr_scale=ratio)]
    for name in parameters:
        groups[f".{name}".endswith(".lora_B")]["params"].append(parameters[name])
    return groups


@right("lora_plus_groups")
def by_identity(parameters: dict, ratio: float) -> tuple:
    fast = [parameters[name] for name in parameters if last(name) == "lora_B"]
    ids = set(map(id, fast))
    slow = list(filter(lambda parameter: id(parameter) not in ids, parameters.values()))
    return {"params": slow}, {"lr_scale": ratio, "params": fast}


@right("lora_plus_groups")
def by_flags(parameters: dict, ratio: float) -> list:
    flags = np.array([name.rsplit(".", 1)[-1] == "lora_B" for name in parameters], dtype=bool)
    pairs = list(zip(parameters.values(), flags.tolist()))
    return [{"params": [p for p, f in pairs if not f]}, {"params": [p for p, f in pairs if f], "lr_scale": ratio}]


@wrong("lora_plus_groups", "A learns faster than B: the ratio belongs to the other group.")
@changed(
    lora_plus_groups, ('fast], "lr_scale": ratio}', "fast]}"), ("not in fast]}", 'not in fast], "lr_scale": ratio}')
)
def a_learns_faster(): ...


@wrong("lora_plus_groups", "The two groups have changed places: the one with the B comes second.")
def the_fast_ones_first(parameters: dict, ratio: float) -> list:
    return one_pass(parameters, ratio)[::-1]


@wrong(
    "lora_plus_groups",
    "Your test is whether lora_B occurs in the name or ends it. Other parts of a name can contain or end in it.",
)
@changed(lora_plus_groups, ('name.rpartition(".")[2] == "lora_B"', '"lora_B" in name'))
def somewhere_in_the_name(): ...


@wrong("lora_plus_groups", "A name can end in lora_B and have another last part: look at what follows the last dot.")
@changed(lora_plus_groups, ('name.rpartition(".")[2] == "lora_B"', 'name.endswith("lora_B")'))
def the_end_of_the_name(): ...


@wrong("lora_plus_groups", "A layer that is a model by itself has a lora_B without a dot in front.")
@changed(lora_plus_groups, ('name.rpartition(".")[2] == "lora_B"', 'name.endswith(".lora_B")'))
def only_after_a_dot(): ...


@wrong(
    "lora_plus_groups",
    "Your vectors learn fast as well, as in the authors' code. Here a magnitude or a bias learns as A does.",
)
@changed(lora_plus_groups, ('== "lora_B"]', '== "lora_B" or parameters[name].ndim == 1]'))
def vectors_are_fast(): ...


@wrong("lora_plus_groups", "Everything that is not an A learns fast. The ratio is for the B, and nothing else.")
@changed(lora_plus_groups, ('[2] == "lora_B"', '[2] != "lora_A"'))
def all_but_a(): ...


@wrong("lora_plus_groups", "What is neither A nor B is in no group, and is not trained.")
@changed(lora_plus_groups, ("if name not in fast", 'if name.rpartition(".")[2] == "lora_A"'))
def only_a_and_b(): ...


@wrong("lora_plus_groups", "B is in both groups, so that the optimiser would step it twice.")
@changed(lora_plus_groups, (" if name not in fast", ""))
def b_twice(): ...


@wrong(
    "lora_plus_groups",
    "You go by the shape, more rows than columns. A name says what a parameter is; a shape does not.",
)
def tall_matrices(parameters: dict, ratio: float) -> list:
    fast = [name for name, p in parameters.items() if p.ndim == 2 and p.shape[0] > p.shape[1]]
    slow = [p for name, p in parameters.items() if name not in fast]
    return [{"params": slow}, {"params": [parameters[name] for name in fast], "lr_scale": ratio}]


@wrong("lora_plus_groups", "The ratio is not in the result: both groups would learn equally fast.")
@changed(lora_plus_groups, ('fast], "lr_scale": ratio}', "fast]}"))
def no_ratio(): ...


@wrong("lora_plus_groups", 'You set "lr". The training loop takes a factor, "lr_scale".')
@changed(lora_plus_groups, ('fast], "lr_scale"', 'fast], "lr"'))
def a_rate_for_a_factor(): ...


@wrong("lora_plus_groups", "The ratio is always 16. It is an argument.")
@changed(lora_plus_groups, ('fast], "lr_scale": ratio', 'fast], "lr_scale": 16.0'))
def always_sixteen(): ...


@wrong("lora_plus_groups", "There is one group for each parameter. There should be two in all.")
def a_group_for_each(parameters: dict, ratio: float) -> list:
    return [
        {"params": [p], "lr_scale": ratio} if last(name) == "lora_B" else {"params": [p]}
        for name, p in parameters.items()
    ]


@wrong(
    "lora_plus_groups", "Without a B your result lacks its second group. There are always two, if need be an empty one."
)
def no_empty_group(parameters: dict, ratio: float) -> list:
    return [group for group in one_pass(parameters, ratio) if group["params"]]


@wrong("lora_plus_groups", "You sort the names. The parameters keep the order in which they are given.")
@changed(lora_plus_groups, ("[name for name in parameters if", "[name for name in sorted(parameters) if"))
def sorted_names(): ...


# --- initial_svd -------------------------------------------------------------------------------------


@right("initial_svd")
def from_the_smallest_up(W: Tensor, rank: int, scaling: float) -> tuple:
    U, S, V = torch.svd(W.float())
    keep = torch.arange(rank)
    half = torch.diag((S[keep] / scaling) ** 0.5)
    return half @ V[:, keep].T, U[:, keep] @ half


@right("initial_svd")
def numpy_in_double_precision(W: Tensor, rank: int, scaling: float) -> tuple:
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    root = np.sqrt(S / scaling)
    A, B = (root[:, None] * Vh)[:rank], (U * root)[:, :rank]
    return torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32)


@right("initial_svd")
def by_the_eigenvectors(W: Tensor, rank: int, scaling: float) -> tuple:
    W = W.double()
    values, V = torch.linalg.eigh(W.T @ W)  # ascending
    V, S = V.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0).sqrt()
    A = (S / scaling).sqrt()[:, None] * V.T
    return A.float(), (W @ V / (S * scaling).sqrt()).float()


@right("initial_svd")
def direction_by_direction(W: Tensor, rank: int, scaling: float) -> tuple:
    U, S, Vh = torch.linalg.svd(W.to(torch.float32))
    A, B = torch.empty(rank, W.shape[1]), torch.empty(W.shape[0], rank)
    for k in range(rank):
        half = torch.sqrt(S[k] / scaling)
        A[k], B[:, k] = half * Vh[k], half * U[:, k]
    return [A, B]


@wrong("initial_svd", "A has the whole singular values and B has none. Each gets the root of them.")
@changed(initial_svd, ("root[:, None] * Vh[:rank], U[:, :rank] * root", "root[:, None] ** 2 * Vh[:rank], U[:, :rank]"))
def all_in_a(): ...


@wrong("initial_svd", "B has the whole singular values and A has none. Each gets the root of them.")
@changed(initial_svd, ("root[:, None] * Vh[:rank], U[:, :rank] * root", "Vh[:rank], U[:, :rank] * root**2"))
def all_in_b(): ...


@wrong("initial_svd", "Without the root, each singular value is in the product twice.")
@changed(initial_svd, (".sqrt()", ""))
def no_roots(): ...


@wrong("initial_svd", "The scaling is missing: s B A should be a part of W, so B A is that part divided by s.")
@changed(initial_svd, ("S[:rank] / scaling", "S[:rank]"))
def scaling_left_out(): ...


@wrong("initial_svd", "You multiply by s where you should divide: the layer multiplies B A by s once more.")
@changed(initial_svd, ("S[:rank] / scaling", "S[:rank] * scaling"))
def scaling_multiplied(): ...


@wrong("initial_svd", "You divide each of A and B by s, so the product by s squared.")
@changed(initial_svd, ("(S[:rank] / scaling).sqrt()", "S[:rank].sqrt() / scaling"))
def scaling_twice(): ...


@wrong("initial_svd", "You keep the smallest singular values. That is MiCA's choice; PiSSA trains the largest.")
def the_smallest(W: Tensor, rank: int, scaling: float) -> tuple:
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[-rank:] / scaling).sqrt()
    return root[:, None] * Vh[-rank:], U[:, -rank:] * root


@wrong("initial_svd", "A and B have changed places.")
def changed_places(W: Tensor, rank: int, scaling: float) -> tuple:
    return initial_svd(W, rank, scaling)[::-1]


@wrong(
    "initial_svd", "You take the columns of Vh. `torch.linalg.svd` returns V transposed, so its rows are the vectors."
)
@changed(initial_svd, ("Vh[:rank]", "Vh.T[:rank, : W.shape[1]]"))
def columns_of_vh(): ...


@wrong("initial_svd", "You decompose the transpose of W, as if it were stored as (in, out).")
def of_the_transpose(W: Tensor, rank: int, scaling: float) -> tuple:
    return initial_svd(W.T, rank, scaling)


@wrong("initial_svd", "A and B have the dtype of W. They should be in float32.")
def in_the_dtype_of_w(W: Tensor, rank: int, scaling: float) -> tuple:
    A, B = initial_svd(W, rank, scaling)
    return A.to(W.dtype), B.to(W.dtype)


@wrong(
    "initial_svd", "The directions are in the reverse order: the first row of A belongs to the largest singular value."
)
def in_reverse_order(W: Tensor, rank: int, scaling: float) -> tuple:
    A, B = initial_svd(W, rank, scaling)
    return A.flip(0), B.flip(1)


@wrong("initial_svd", "You keep all directions. Only r of them are trained.")
@changed(initial_svd, ("S[:rank]", "S"), ("Vh[:rank]", "Vh"), ("U[:, :rank]", "U"))
def all_of_them(): ...


@wrong("initial_svd", "A and B start as in LoRA, one of them zero. PiSSA starts with a part of W.")
def as_lora_does(W: Tensor, rank: int, scaling: float) -> tuple:
    return torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5, torch.zeros(W.shape[0], rank)

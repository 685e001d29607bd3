"""Unit 19: mistakes that people make, and other right ways. Groups: their scales, sums and zeros."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.qa_lora import merge_into_zeros, sum_groups
from lora_from_scratch.quantization.low_bit import quantize_groups

# --- quantize_groups ---------------------------------------------------------------------------------


@right("quantize_groups")
def one_group_at_a_time(weight, bits, group_size):
    codes, scales, zeros = [], [], []
    for part in weight.float().split(group_size, dim=1):
        zero, most = part.min(dim=1, keepdim=True).values, part.max(dim=1, keepdim=True).values
        scale = (most - zero) / (2**bits - 1)
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes.append(torch.round((part - zero) / divisor).long())
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


@right("quantize_groups")
def one_weight_at_a_time(weight, bits, group_size):
    rows, columns = weight.shape
    groups = math.ceil(columns / group_size)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scale, zero = torch.zeros(rows, groups), torch.zeros(rows, groups)
    for i, row in enumerate(weight.float().tolist()):
        for k in range(groups):
            members = row[k * group_size : (k + 1) * group_size]
            low, high = min(members), max(members)
            step = (high - low) / (2**bits - 1)
            scale[i, k], zero[i, k] = step, low
            for place, value in enumerate(members):
                codes[i, k * group_size + place] = round((value - low) / step) if step else 0
    return codes, scale, zero


@right("quantize_groups")
def the_nearest_level(weight, bits, group_size):
    rows, columns = weight.shape
    last = weight[:, -1:].expand(rows, -columns % group_size)
    groups = torch.cat([weight, last], dim=1).double().reshape(rows, -1, group_size)
    low, high = groups.amin(2), groups.amax(2)
    levels = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, 2**bits, dtype=torch.float64)
    codes = (groups[..., None] - levels[:, :, None, :]).abs().argmin(dim=3)
    return codes.view(rows, -1)[:, :columns], (high - low) / (2**bits - 1), low


@right("quantize_groups")
def in_numpy(weight, bits, group_size):
    values = weight.float().numpy()
    starts = range(0, values.shape[1], group_size)
    parts = [values[:, start : start + group_size] for start in starts]
    zero = np.stack([part.min(axis=1) for part in parts], axis=1)
    scale = np.stack([np.ptp(part, axis=1) for part in parts], axis=1) / np.float32(2**bits - 1)
    each = np.arange(values.shape[1]) // group_size
    codes = np.rint((values - zero[:, each]) / np.where(scale, scale, 1)[:, each])
    return torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(zero)


@wrong("quantize_groups", "You divide the range by 2^bits. Between 2^bits codes there are only 2^bits - 1 steps.")
@changed(quantize_groups, ("scale = (most - zero) / (2**bits - 1)", "scale = (most - zero) / 2**bits"))
def one_step_too_many(): ...


@wrong("quantize_groups", "You round down. Each weight gets the nearest code.")
@changed(quantize_groups, (".round_()", ".add_(1e-4).floor_()"))
def rounded_down(): ...


@wrong(
    "quantize_groups", "Your scale is that of absmax quantisation: it takes no notice of where the smallest weight is."
)
@changed(quantize_groups, ("scale = (most - zero)", "scale = groups.abs().amax(dim=2)"))
def scaled_by_the_absmax(): ...


@wrong("quantize_groups", "You divide the weights by the scale without subtracting the zero first.")
@changed(quantize_groups, ("(groups - zero[..., None])", "groups"))
def without_the_zero(): ...


@wrong("quantize_groups", "You take one scale and one zero for each row. Each group of a row has its own.")
def one_scale_for_a_row(weight, bits, group_size):
    codes, scale, zero = quantize_groups(weight, bits, weight.shape[1])
    groups = -(-weight.shape[1] // group_size)
    return codes, scale.repeat(1, groups), zero.repeat(1, groups)


@wrong("quantize_groups", "You take every G-th input into a group. The members of a group are neighbours in a row.")
def not_neighbours(weight, bits, group_size):
    columns = weight.shape[1]
    groups = -(-columns // group_size)
    order = torch.cat([torch.arange(start, columns, groups) for start in range(groups)])
    if columns % group_size:
        order = torch.arange(columns)
    codes, scale, zero = quantize_groups(weight[:, order], bits, group_size)
    return torch.empty_like(codes).index_copy_(1, order, codes), scale, zero


@wrong("quantize_groups", "You group along the outputs. A group is a piece of a row, along the inputs.")
def along_the_outputs(weight, bits, group_size):
    codes, scale, zero = quantize_groups(weight.T, bits, group_size)
    return codes.T, scale.T, zero.T


@wrong("quantize_groups", "You fill up a short group with zeros, which moves its smallest or largest weight.")
def filled_up_with_zeros(weight, bits, group_size):
    filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size))
    codes, scale, zero = quantize_groups(filled, bits, group_size)
    return codes[:, : weight.shape[1]], scale, zero


@wrong(
    "quantize_groups",
    "Your codes contain what a short group was filled up with. They should have the shape of the weight.",
)
@changed(quantize_groups, ("codes.flatten(1)[:, : weight.shape[1]]", "codes.flatten(1)"))
def longer_codes(): ...


@wrong("quantize_groups", "You divide by a scale of zero where all weights of a group are equal, which gives NaN.")
@changed(quantize_groups, (".clamp(min=TINY)", ""))
def divided_by_zero(): ...


@wrong("quantize_groups", "Your zero is an integer zero-point, -min / scale. Here it is the smallest weight itself.")
def integer_zero_points(weight, bits, group_size):
    codes, scale, zero = quantize_groups(weight, bits, group_size)
    return codes, scale, (-zero / scale.clamp(min=1e-12)).round()


@wrong("quantize_groups", "You compute in the weight's 16-bit type. Convert it to float32 first.")
def in_the_dtype_of_the_weight(weight, bits, group_size):
    groups = torch.cat([weight, weight[:, -1:].expand(-1, -weight.shape[1] % group_size)], dim=1)
    groups = groups.view(len(weight), -1, group_size)
    zero, most = groups.aminmax(dim=2)
    scale = (most - zero) / (2**bits - 1)
    codes = ((groups - zero[..., None]) / torch.where(scale == 0, 1, scale)[..., None]).round()
    return codes.flatten(1)[:, : weight.shape[1]], scale, zero


@wrong("quantize_groups", "You return the dequantised weight instead of the codes.")
def the_weight_again(weight, bits, group_size):
    codes, scale, zero = quantize_groups(weight, bits, group_size)
    wide = [one.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]] for one in (scale, zero)]
    return codes * wide[0] + wide[1], scale, zero


@wrong("quantize_groups", "You always use 4 bits. The number of bits is an argument.")
def always_four_bits(weight, bits, group_size):
    return quantize_groups(weight, 4, group_size)


@wrong("quantize_groups", "Your codes go up to 2^bits, one more than there are.")
@changed(
    quantize_groups,
    ("scale = (most - zero) / (2**bits - 1)", "scale = (most - zero) / 2**bits"),
    (".clamp_(0, 2**bits - 1)", ""),
)
def one_code_too_many(): ...


@wrong(
    "quantize_groups",
    "Your zero is the middle of the group's range, and the codes are signed. The zero is the smallest weight.",
)
def from_the_middle(weight, bits, group_size):
    codes, scale, zero = quantize_groups(weight, bits, group_size)
    return codes - 2 ** (bits - 1), scale, zero + 2 ** (bits - 1) * scale


# --- sum_groups --------------------------------------------------------------------------------------


@right("sum_groups")
def with_a_loop(x, group_size):
    return torch.stack([part.sum(dim=-1) for part in x.split(group_size, dim=-1)], dim=-1)


@right("sum_groups")
def with_a_matrix(x, group_size):
    inputs = x.shape[-1]
    P = torch.arange(inputs)[None] // group_size == torch.arange(-(-inputs // group_size))[:, None]
    return x @ P.to(x.dtype).T


@right("sum_groups")
def added_at_places(x, group_size):
    place = torch.arange(x.shape[-1]) // group_size
    return x.new_zeros(*x.shape[:-1], int(place[-1]) + 1).index_add(-1, place, x)


@right("sum_groups")
def differences_of_cumulated_sums(x, group_size):
    total = x.cumsum(dim=-1)
    ends = [min(end, x.shape[-1]) - 1 for end in range(group_size, x.shape[-1] + group_size, group_size)]
    return torch.diff(total[..., ends], dim=-1, prepend=torch.zeros_like(total[..., :1]))


@wrong("sum_groups", "You average each group. It is summed: the merge adds s B A to every zero, without a division.")
def averaged(x, group_size):
    return sum_groups(x, group_size) / group_size


@wrong("sum_groups", "You multiply the mean by the number of groups. The sum is the mean times the *size* of a group.")
def times_the_number_of_groups(x, group_size):
    sums = sum_groups(x, group_size)
    return sums / group_size * sums.shape[-1]


@wrong("sum_groups", "You take every G-th number into a group. Its members are neighbours.")
def every_other(x, group_size):
    if x.shape[-1] % group_size:
        return sum_groups(x, group_size)
    return x.unflatten(-1, (group_size, -1)).sum(dim=-2)


@wrong("sum_groups", "You leave out the inputs that do not fill a whole group.")
def short_groups_are_dropped(x, group_size):
    whole = x.shape[-1] // group_size * group_size
    return x[..., :whole].unflatten(-1, (-1, group_size)).sum(dim=-1) if whole else x[..., :0]


@wrong("sum_groups", "You cut x into `group_size` groups. `group_size` is the number of inputs in a group.")
def so_many_groups(x, group_size):
    return torch.stack([part.sum(dim=-1) for part in x.tensor_split(group_size, dim=-1)], dim=-1)


@wrong("sum_groups", "You return a sum for each input. There is one number for each group.")
def repeated(x, group_size):
    return sum_groups(x, group_size).repeat_interleave(group_size, dim=-1)[..., : x.shape[-1]]


@wrong("sum_groups", "You take the first input of each group. All of them are summed.")
def the_first_of_each(x, group_size):
    return x[..., ::group_size]


@wrong("sum_groups", "No gradient flows to x in your function, so the layers below cannot learn.")
def without_a_gradient(x, group_size):
    return sum_groups(x.detach(), group_size)


@wrong("sum_groups", "You take the largest input of each group. They are summed.")
def the_largest(x, group_size):
    parts = x.split(group_size, dim=-1)
    return torch.stack([part.amax(dim=-1) for part in parts], dim=-1)


@wrong("sum_groups", "You take x for a matrix. It may have any number of axes before the last.")
def two_axes_only(x, group_size):
    rows, _ = x.shape
    return sum_groups(x.view(rows, -1), group_size)


@wrong("sum_groups", "You group the first axis. The inputs are on the last one.")
def along_the_first_axis(x, group_size):
    return sum_groups(x.transpose(0, -1), group_size).transpose(0, -1)


@wrong("sum_groups", "You convert to float32. The result has the dtype of x.")
def in_float32(x, group_size):
    return sum_groups(x.float(), group_size)


# --- merge_into_zeros --------------------------------------------------------------------------------


@right("merge_into_zeros")
def with_einsum(zero, A, B, scaling):
    return zero + torch.einsum("or,rg->og", B.float(), A.float()) * scaling


@right("merge_into_zeros")
def one_direction_at_a_time(zero, A, B, scaling):
    merged = zero.clone()
    for a, b in zip(A.float(), B.float().T):
        merged += scaling * torch.outer(b, a)
    return merged


@right("merge_into_zeros")
def entry_by_entry(zero, A, B, scaling):
    a, b = A.float().tolist(), B.float().tolist()
    rows = [
        [zero[i, k].item() + scaling * sum(b[i][r] * a[r][k] for r in range(len(a))) for k in range(zero.shape[1])]
        for i in range(len(b))
    ]
    return torch.tensor(rows, dtype=torch.float32)


@right("merge_into_zeros")
def with_addmm_in_double(zero, A, B, scaling):
    return torch.addmm(zero.double(), B.double(), A.double(), alpha=scaling).float()


@right("merge_into_zeros")
def through_numpy(zero, A, B, scaling):
    change = B.float().numpy() @ A.float().numpy()
    return torch.from_numpy(zero.numpy() + np.float32(scaling) * change)


@wrong("merge_into_zeros", "The scaling s is missing from what you add.")
@changed(merge_into_zeros, ("scaling * (B.float() @ A.float())", "B.float() @ A.float()"))
def without_the_scaling(): ...


@wrong(
    "merge_into_zeros",
    "You subtract the change. GPTQ's zero-points are subtracted from the codes; these zeros are added.",
)
@changed(merge_into_zeros, ("zero + scaling", "zero - scaling"))
def subtracted(): ...


@wrong("merge_into_zeros", "You divide the scaling by the rank again. It is alpha / r already.")
@changed(merge_into_zeros, ("zero + scaling *", "zero + scaling / len(A) *"))
def divided_by_the_rank(): ...


@wrong("merge_into_zeros", "You divide by the number of groups. That would be right for other pooled inputs than sums.")
@changed(merge_into_zeros, ("zero + scaling *", "zero + scaling / A.shape[1] *"))
def divided_by_the_number_of_groups(): ...


@wrong("merge_into_zeros", "You replace the zeros by the change. The change is added to them.")
@changed(merge_into_zeros, ("return zero + scaling", "return scaling"))
def the_change_alone(): ...


@wrong("merge_into_zeros", "You scale the old zeros, too. Only the change is multiplied by s.")
@changed(merge_into_zeros, ("zero + scaling * (B.float() @ A.float())", "scaling * (zero + B.float() @ A.float())"))
def zeros_are_scaled(): ...


@wrong(
    "merge_into_zeros", "You multiply in the type of A and B, and convert afterwards. Convert both to float32 first."
)
def converted_afterwards(zero, A, B, scaling):
    dtype = A.dtype if A.dtype == B.dtype else torch.float16
    return zero + scaling * (B.to(dtype) @ A.to(dtype)).float()


@wrong("merge_into_zeros", "You change the result to the type of A. The zeros stay in float32.")
def in_the_dtype_of_A(zero, A, B, scaling):
    return merge_into_zeros(zero, A, B, scaling).to(A.dtype)


@wrong("merge_into_zeros", "You add the change of the first group to all groups. Each group has its own change.")
@changed(merge_into_zeros, ("@ A.float())", "@ A.float()[:, :1])"))
def one_change_for_all_groups(): ...


@wrong(
    "merge_into_zeros", "You use only the first row of A and the first column of B. All r of them belong to the change."
)
@changed(merge_into_zeros, ("(B.float() @ A.float())", "(B.float()[:, :1] @ A.float()[:1])"))
def only_rank_one(): ...


@wrong("merge_into_zeros", "You swap the two factors or transpose the product: the change of output i is row i of B A.")
def transposed(zero, A, B, scaling):
    change = A.float().T @ B.float().T
    return zero + scaling * (change if change.shape == zero.shape else change.reshape(zero.shape))


@wrong("merge_into_zeros", "You round the zeros to whole numbers. Then what was learned is lost, or most of it.")
@changed(
    merge_into_zeros,
    ("return zero + scaling * (B.float() @ A.float())", "return (zero + scaling * (B.float() @ A.float())).round()"),
)
def rounded(): ...


@wrong("merge_into_zeros", caught_by="changes its input")
def added_in_place(zero, A, B, scaling):
    zero += scaling * (B.float() @ A.float())
    return zero

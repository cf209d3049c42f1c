"""Faults in the CUDA kernels, in those in Triton, and in the bindings."""

from tests.mutation.fault import Fault

ROW_BARRIER = "take(ahead[0], columns, u);\n        __syncthreads();"
LANES_BARRIER = (
    "__syncthreads();\n  const int thread = static_cast<int>(threadIdx.x);\n  const int64_t behind"
)
PARTS_BARRIER = "__syncthreads();\n  shared[thread] = sum;"


def _cuda(name: str, file: str, right: str, wrong: str, area: str = "CUDA kernels") -> Fault:
    return Fault(name, area, f"csrc/cuda/{file}", right, wrong)


def _triton(name: str, file: str, right: str, wrong: str) -> Fault:
    return Fault(name, "Triton kernels", f"metapool_kernels/_triton/{file}", right, wrong)


def _form(name: str, file: str, right: str, wrong: str) -> Fault:
    return Fault(name, "Triton forms", f"metapool_kernels/_triton/{file}", right, wrong)


def _binding(name: str, right: str, wrong: str) -> Fault:
    return Fault(name, "bindings", "python_bindings/torch_maps.h", right, wrong)


CUDA = (
    _cuda(
        "a window that ends before a pixel gives to it",
        "general.cuh",
        "at > radius ? (at - radius + stride - 1) / stride : 0;",
        "at > radius ? (at - radius) / stride : 0;",
    ),
    _cuda(
        "the streamed kernels take divisors of the border",
        "slots.h",
        "!problem.count_include_pad ||",
        "",
    ),
    _cuda(
        "of equal candidates the last one counts",
        "slots.h",
        "if (slot < 0 || slots.candidate[slot] >= 0) return false;",
        "if (slot < 0) return false;",
    ),
    _cuda(
        "the weights of a channel are those of the image",
        "maps.cuh",
        "return data[n * stride_n + c * stride_c + k * stride_k];",
        "return data[n * stride_n + n * stride_c + k * stride_k];",
    ),
    _cuda(
        "32 bits for where a plane begins",
        "maps.cuh",
        "return data + n * stride_n + c * stride_c;",
        "return data + static_cast<int>(n * stride_n + c * stride_c);",
    ),
    _cuda(
        "odd widths are read by vectors",
        "lanes.cuh",
        "const bool is_aligned = w % columns == 0 && ",
        "const bool is_aligned = ",
    ),
    _cuda(
        "terms of images go to another one's weights",
        "terms.cuh",
        "n = of.per_n ? plane / (of.per_c ? of.c : 1) : 0;",
        "n = of.per_n ? plane / of.c : 0;",
    ),
    _cuda(
        "no barrier between rows",
        "backward_stream.cuh",
        ROW_BARRIER,
        ROW_BARRIER.replace("__syncthreads();", ""),
    ),
    _cuda(
        "barrier for lanes on the map alone",
        "backward_stream.cuh",
        ROW_BARRIER,
        ROW_BARRIER.replace("__sync", "if (lane.is_on_map) __sync"),
    ),
    _cuda(
        "no barrier before sums are replaced",
        "terms.cuh",
        PARTS_BARRIER,
        PARTS_BARRIER.replace("__syncthreads();", ""),
        area="CUDA kernels, threads reversed",
    ),
    _cuda(
        "one row too few above a strip of backward",
        "backward_stream.cuh",
        "? lane.row_begin - 2 * kReach : 0;",
        "? lane.row_begin - 2 * kReach + 1 : 0;",
    ),
    _cuda(
        "one row too few above a strip of forward",
        "streamed_forward.cuh",
        "? lane.row_begin - kReach : 0;",
        "? lane.row_begin - kReach + 1 : 0;",
    ),
    _cuda(
        "one lane too few beside a tile",
        "backward_shared.cuh",
        "return (2 * kReach + columns - 1) / columns;",
        "return (2 * kReach - 1) / columns;",
    ),
    _cuda(
        "the last row of some heights is not written",
        "backward_stream.cuh",
        "base <= lane.row_end + 2 * kReach;",
        "base < lane.row_end + 2 * kReach;",
    ),
    _cuda(
        "the last column is not written",
        "lanes.cuh",
        "inside >> (kMargin + i) & 1)",
        "inside >> (kMargin + i + 1) & 1)",
    ),
    _cuda("sums are not cleared", "backward_stream.cuh", "clear_row(u);", ";"),
    _cuda(
        "no careful run",
        "streamed_backward.cuh",
        "if (__syncthreads_or(is_special))",
        "if (false)",
    ),
    _cuda(
        "the last term of a sum is dropped",
        "terms.cuh",
        "i < images * channels * of.parts;",
        "i + 1 < images * channels * of.parts;",
    ),
    _cuda(
        "the last of equal maxima takes the gradient",
        "maxima.cuh",
        "right > left;",
        "right >= left;",
    ),
    _cuda(
        "the last of equal maxima of a large window takes the gradient",
        "general.cuh",
        "if (right_wins(top, value))",
        "if (value >= top)",
    ),
    _cuda(
        "a pooling that stays apart is written a row late",
        "forward.cu",
        "- delay_of(slot) * out.stride_h;",
        "- (delay_of(slot) - 1) * out.stride_h;",
    ),
    _cuda(
        "rows of no map are written",
        "outcomes.cuh",
        " && o < lane.row_end;",
        ";",
    ),
    _cuda(
        "sums of windows apart lose their last row",
        "averages.cuh",
        "windows[kLength - 1] = sum;",
        "windows[kLength - 1] = 0;",
    ),
    _cuda(
        "maps apart are those of the first channel",
        "general.cuh",
        "to()[k * out_stride_k]",
        "to()[k]",
    ),
    _cuda(
        "constants are left out",
        "outcomes.cuh",
        "start += constants.at(lane.n, lane.c, 0);",
        ";",
    ),
    _cuda(
        "parts of planes are put together as if their means were equal",
        "moments.cuh",
        "to.second += more.second + apart * apart * (to.count * share);",
        "to.second += more.second;",
    ),
    _cuda(
        "all parts of a plane take the moments of the first",
        "general.cuh",
        "first = number % parts * blockDim.x;",
        "first = 0;",
    ),
    _cuda(
        "moments of columns beyond the map",
        "streamed_moments.cuh",
        "const float counted = inside >> (kReach + v) & 1 ? deviation : 0.0f;",
        "const float counted = deviation;",
    ),
    _cuda(
        "products are with the row before",
        "streamed_moments.cuh",
        "other.last[v][kReach - delay_of(slot)];",
        "other.last[v][kReach - (delay_of(slot) > 0 ? delay_of(slot) - 1 : 1)];",
    ),
    _cuda(
        "no barrier before lanes are put together",
        "streamed_moments.cuh",
        LANES_BARRIER,
        LANES_BARRIER.replace("__syncthreads();", ""),
    ),
    _cuda(
        "the shift of a part is left out of its mean",
        "general.cuh",
        ": found_of(values, shift, sum, products);",
        ": found_of(values, 0, sum, products);",
    ),
    _cuda(
        "side by side maxima take gradients of the row before",
        "backward.cu",
        "(rows_behind(slot) - 1) * grad_out.stride_h;",
        "rows_behind(slot) * grad_out.stride_h;",
    ),
    _cuda(
        "what averages send goes along the row below",
        "backward_stream.cuh",
        "place_of(slot + kSumRows - 2 * kReach, i)",
        "place_of(slot + kSumRows - 2 * kReach + 1, i)",
    ),
    _cuda(
        "windows beyond the map send their offsets",
        "backward_stream.cuh",
        "if (!is_on_map(t - rows_behind(d)) || !is_inside(v)) share = 0;",
        ";",
    ),
    _cuda(
        "lanes beyond the map send their offsets",
        "streamed_backward.cuh",
        "if (lane.is_on_map) {",
        "{",
    ),
    _cuda(
        "the field of the map itself is that of the row below",
        "backward_stream.cuh",
        "averages[v][0] = columns[v].averages.pixel;",
        "averages[v][0] = along[0];",
    ),
    _cuda(
        "fields depend on values and not on deviations",
        "sent.cuh",
        "field.slope * (pooled() - field.shift);",
        "field.slope * pooled();",
    ),
    _cuda(
        "without a slope poolings matter all the same",
        "sent.cuh",
        "field.slope == 0 ? given : given",
        "given",
    ),
    _cuda(
        "windows of any size are sent the gradients of the first map",
        "general.cuh",
        "[k * stride_k + of.y",
        "[of.y",
    ),
    _cuda(
        "of equal maxima in a row the last has the larger key",
        "backward_lane.cuh",
        "* kWidth + kWidth - 1 - column;",
        "* kWidth + column;",
    ),
    _cuda(
        "of equal maxima in two rounds of rows the last has the larger key",
        "keys.cuh",
        "return (kMostRounds - 1 - round) << kPlaceBits;",
        "return round << kPlaceBits;",
    ),
    _cuda(
        "the key of -0 is below that of 0",
        "keys.cuh",
        "bits_of(__fadd_rn(value, 0.0f)) & kValueMask;",
        "bits_of(value) & kValueMask;",
    ),
    _cuda(
        "keys of negative values are in the wrong order",
        "keys.cuh",
        "return {bits ^ (bits >> 31 & kSigns)};",
        "return {bits};",
    ),
    _cuda(
        "a key has the place of the pixel beside it",
        "backward_stream.cuh",
        "Base::number_in_round(slot, column)};",
        "Base::number_in_round(slot, column > 0 ? column - 1 : 0)};",
    ),
    _cuda(
        "NaN has a place beyond the sums",
        "keys.cuh",
        "0.0f)) & kValueMask;",
        "0.0f));",
    ),
    _cuda(
        "keys do not see NaN",
        "backward_stream.cuh",
        "(kKeyed ? bottom != bottom :",
        "(kKeyed ? false :",
    ),
)

TRITON = (
    _triton(
        "NaN loses against numbers",
        "windows.py",
        "return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)",
        "return tl.maximum(left, right, propagate_nan=tl.PropagateNan.NONE)",
    ),
    _triton(
        "the last of equal maxima takes the gradient",
        "windows.py",
        "if CAREFUL else right > left",
        "if CAREFUL else right >= left",
    ),
    _triton(
        "the gradient goes to every maximum",
        "windows.py",
        'top = tl.where(hit, float("nan"), top)  # nothing equals it any more',
        "",
    ),
    _triton(
        "border divisor is one too small",
        "lanes.py",
        "return tl.minimum(center + RADIUS + 1, size)",
        "return tl.minimum(center + RADIUS, size)",
    ),
    _triton(
        "32 bits for where an image begins",
        "lanes.py",
        "return image.to(tl.int64), channel.to(tl.int64), group",
        "return image.to(tl.int32), channel.to(tl.int32), group",
    ),
    _triton(
        "weights of channels are those of the first",
        "launch.py",
        "if weights.dim() >= 2 and weights.shape[-2] > 1 else 0",
        "if weights.dim() > 2 and weights.shape[-2] > 1 else 0",
    ),
    _triton(
        "only the first image counts for the weights of channels",
        "launch.py",
        "return parts.sum((0, 2))",
        "return parts[:1].sum((0, 2))",
    ),
    _triton(
        "no careful run",
        "backward.py",
        "if tl.max(is_special.to(tl.int32), 0) > 0:",
        "if tl.max(is_special.to(tl.int32), 0) > 1:",
    ),
)

TRITON_FORMS = (
    _form(
        "poolings are written in the order in which they are computed",
        "forms.py",
        "at = plane + ORDER[i] * step if ORDER[i] > 0 else plane",
        "at = plane + i * step if i > 0 else plane",
    ),
    _form(
        "moments are taken around zero",
        "forms.py",
        "shift = tl.where(begins, tl.where(finite, value, 0.0), shift)",
        "shift = tl.where(begins, 0.0 * value, shift)",
    ),
    _form(
        "moments take what is beyond the map",
        "forms.py",
        "apart = tl.where(inside[v], pixels[v][i] - shift, 0.0)",
        "apart = pixels[v][i] - shift",
    ),
    _form(
        "products take what is beyond the map",
        "forms.py",
        "sum += tl.where(inside[v], product, 0.0)",
        "sum += product",
    ),
    _form(
        "columns beyond the map are counted",
        "forms.py",
        "count = rows * tl.minimum(w - group * COLUMNS, COLUMNS)",
        "count = rows * tl.minimum(w + 0 * group, COLUMNS)",
    ),
    _form(
        "lanes are put together as if they had one first value",
        "sums.py",
        "apart = tl.where(mask, mine - base, 0.0)",
        "apart = tl.where(mask, base - base, 0.0)",
    ),
    _form(
        "the last strip is left out of a sum",
        "sums.py",
        "for strip in range(strips):",
        "for strip in range(tl.maximum(strips - 1, 1)):",
    ),
    _form(
        "sums of another plane with channels last",
        "sums.py",
        "lane = plane // channels * channels * groups + plane % channels",
        "lane = plane",
    ),
    _form(
        "all planes have the first one's constant",
        "forward.py",
        "in_lanes, False, 1)[0]",
        "in_lanes, True, 1)[0]",
    ),
    _form(
        "averages side by side are sums",
        "forward.py",
        "elif AREA > 1:",
        "elif AREA > 10000:",
    ),
    _form(
        "averages side by side count what is beyond the map",
        "forward.py",
        "AVG, MAX, COUNT, RADIUS_H, TOGETHER, MERGED, HAS_VALUES, MIXES,",
        "AVG, MAX, COUNT, RADIUS_H, TOGETHER, True, HAS_VALUES, MIXES,",
    ),
    _form(
        "every candidate is sent the first map of gradients",
        "sent.py",
        "at = plane + POOLS[p][2] * step if POOLS[p][2] > 0 else plane",
        "at = plane",
    ),
    _form(
        "what an average sends is not divided where padding does not count",
        "sent.py",
        "field = divided(field, count)",
        "field = field + 0 * count",
    ),
    _form(
        "averages that fields depend on are sums",
        "sent.py",
        "pooled = divided(pooled, count)",
        "pooled = pooled + 0 * count",
    ),
    _form(
        "sums of fields are taken from the shift of an average",
        "sent.py",
        "shift *= (2 * POOLS[p][0] + 1) * (2 * POOLS[p][1] + 1)",
        "shift *= 1",
    ),
    _form(
        "one over an area is no more than float32",
        "sent.py",
        "terms = (repeated(tl.full((), 1.0, ACC), COUNT),)",
        "terms = (repeated(1.0, COUNT),)",
    ),
    _form(
        "columns without a window send something",
        "sent.py",
        "field = tl.where(is_center, field, 0.0)",
        "field += 0.0",
    ),
    _form(
        "deviations matter without a slope",
        "sent.py",
        "tl.where(slope != 0.0, pooled - shift, 0.0)",
        "pooled - shift",
    ),
    _form(
        "fields have no offset",
        "sent.py",
        "weight * grad + offset + slope * deviation",
        "weight * grad + 0 * offset + slope * deviation",
    ),
    _form(
        "a plane is handed what windows send beyond the end of another",
        "segments.py",
        "handed = tl.where(group >= lanes, handed, 0.0)",
        "handed += 0.0",
    ),
    _form(
        "beyond the end of a row averages hold what maxima do",
        "rows.py",
        "zeroed = zeroed + (tl.where(inside[i], pixels[i], 0.0),)",
        "zeroed = zeroed + (pixels[i],)",
    ),
)

BINDINGS = (
    _binding(
        "a map may be narrower than x",
        "map.size(2) == h && map.size(3) == w,",
        "map.size(2) == h,",
    ),
    _binding(
        "maps may differ in their dtype",
        "STD_TORCH_CHECK(map.scalar_type() == like.scalar_type(),",
        "STD_TORCH_CHECK(true,",
    ),
    _binding(
        "weights of fewer images than x has are read beyond",
        "(dims < 3 || weights.size(0) == x.size(0)),",
        "true,",
    ),
    _binding(
        "weights of any dtype are read as float32",
        "      weights.scalar_type() ==\n"
        "          (x.scalar_type() == ScalarType::Double ? ScalarType::Double : "
        "ScalarType::Float),",
        "      true,",
    ),
    _binding(
        "the stride of an axis of one element is used",
        "return dims >= from_last && weights.size(dims - from_last) > 1\n",
        "return dims >= from_last\n",
    ),
    _binding(
        "the strides of values are those of x",
        "call.args.values = values.has_value() ? view(*values) : call.args.x;",
        "call.args.values = view(x);\n"
        "  if (values.has_value()) call.args.values.data = values->const_data_ptr();",
    ),
    _binding(
        "every result is contiguous",
        "channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);",
        "MemoryFormat::Contiguous);",
    ),
    _binding(
        "weights of images get gradients of channels",
        "args.grad_weights_per_c = dims >= 2 && weights->size(dims - 2) > 1;",
        "args.grad_weights_per_c = dims == 2 && weights->size(dims - 2) > 1;",
    ),
)

FAULTS = (*CUDA, *TRITON, *TRITON_FORMS, *BINDINGS)

"""Faults in the CUDA kernels."""

from tests.mutation.fault import Fault

ROW_BARRIER = "take(ahead[0], columns, u);\n        __syncthreads();"
LANES_BARRIER = (
    "__syncthreads();\n  const int thread = static_cast<int>(threadIdx.x);\n  const int64_t behind"
)
PARTS_BARRIER = "__syncthreads();\n  shared[thread] = sum;"


def _cuda(name: str, file: str, right: str, wrong: str, area: str = "CUDA kernels") -> Fault:
    return Fault(name, area, f"csrc/cuda/{file}", right, wrong)


FAULTS = (
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
        "sum = __fadd_rn(value, 0.0f);",
        "sum = value;",
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
        "bits_of(sum) & kValueMask;",
        "bits_of(sum);",
    ),
    _cuda(
        "keys do not see NaN",
        "backward_stream.cuh",
        "(kKeyed ? bottom != bottom :",
        "(kKeyed ? false :",
    ),
)

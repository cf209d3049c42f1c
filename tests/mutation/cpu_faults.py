"""Faults in the CPU kernels: csrc/window.h and csrc/cpu."""

from tests.mutation.fault import Fault


def _kernel(name: str, file: str, right: str, wrong: str, equivalent: str = "") -> Fault:
    return Fault(name, "CPU kernels", f"csrc/{file}", right, wrong, equivalent)


def _dispatch(name: str, right: str, wrong: str, file: str = "dispatch.cpp") -> Fault:
    return Fault(name, "CPU dispatch", f"csrc/cpu/{file}", right, wrong)


def _arm(name: str, file: str, right: str, wrong: str) -> Fault:
    return Fault(name, "ARM", f"csrc/cpu/{file}", right, wrong)


KERNELS = (
    # What a window is.
    _kernel(
        "NaN loses against numbers",
        "window.h",
        "return (right > left) | (right != right);",
        "return right > left;",
    ),
    _kernel(
        "beside NaN the last of equal maxima wins",
        "window.h",
        "return (right > left) | (right != right);",
        "return (right >= left) | (right != right);",
    ),
    _kernel(
        "border divisor is one too small",
        "window.h",
        "last_valid(center, radius, size) - first_valid(center, radius) + 1;",
        "last_valid(center, radius, size) - first_valid(center, radius);",
    ),
    # Elements and where they lie.
    _kernel(
        "bfloat16 halves are rounded away from zero",
        "cpu/elements.h",
        "const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;",
        "const Bits rounded = (bits + 0x8000u) >> 16;",
    ),
    _kernel(
        "float16 subnormals are taken for normal numbers",
        "cpu/elements.h",
        "uint32_t result = rest < 0x38800000u ? subnormal : normal;",
        "uint32_t result = rest < 0x33800000u ? subnormal : normal;",
    ),
    _kernel(
        "a row's tail lacks its last column",
        "cpu/columns.h",
        "for (; column < columns; ++column) convert_one(column, 0);",
        "for (; column + 1 < columns; ++column) convert_one(column, 0);",
    ),
    _kernel(
        "planes go on from image to image by the channel's stride",
        "cpu/columns.h",
        "      offset[lane] = n * view.stride_n + c * view.stride_c;",
        "      offset[lane] = first + lane * view.stride_c;",
    ),
    _kernel(
        "32 bits for where a plane begins",
        "cpu/columns.h",
        "const int64_t first = n * view.stride_n + c * view.stride_c;",
        "const int64_t first = static_cast<int32_t>(n * view.stride_n + c * view.stride_c);",
    ),
    _kernel(
        "NaN in the tail of a row is not seen",
        "cpu/rows.h",
        "for (; e < size; ++e) rest |= from[e] != from[e];",
        "",
    ),
    # Windows along rows and down columns.
    _kernel(
        "what blocks write beyond the last column stays",
        "cpu/windows.h",
        "if (row != nullptr) fill_overrun(row, shape, padding);",
        "if (false) fill_overrun(row, shape, padding);",
    ),
    # Which element is the maximum.
    _kernel(
        "a later line wins among equals",
        "cpu/winners.h",
        "Mask<Acc> taken = next.key > winner.key;",
        "Mask<Acc> taken = next.key >= winner.key;",
    ),
    _kernel(
        "an earlier element loses among equals",
        "cpu/winners.h",
        "Mask<Acc> taken = previous.key >= winner.key;",
        "Mask<Acc> taken = previous.key > winner.key;",
    ),
    _kernel(
        "lines of one large window share a code",
        "cpu/winners.h",
        "static_cast<int>(line & 63)",
        "static_cast<int>(line & 7)",
    ),
    # Poolings side by side.
    _kernel(
        "all poolings go into the first map",
        "cpu/forward.h",
        "out.beside(k * args_.out_stride_k)",
        "out.beside(0)",
    ),
    _kernel(
        "an average side by side stays a sum",
        "cpu/weights.h",
        "if (!plan_.count_include_pad) return;\n    const Acc area",
        "return;\n    const Acc area",
    ),
    _kernel(
        "of a pooling that stands twice one gradient is lost",
        "cpu/backward.h",
        "      if (first) continue;",
        "      continue;",
    ),
    _kernel(
        "averages side by side get the gradients of the first",
        "cpu/backward.h",
        "nested_(plan.count_include_pad && plan.form == Form::kMix)",
        "nested_(plan.count_include_pad)",
    ),
    _kernel(
        "gradients of averages side by side replace each other",
        "cpu/streamed_rows.h",
        "wider == nullptr ? sum : sum + load(wider + at)",
        "sum",
    ),
    _kernel(
        "averages side by side send back as if padding counted",
        "cpu/streamed_rows.h",
        "if (scales != nullptr) sent *= scales[column];",
        "",
    ),
    _kernel(
        "sums of seven are made of neighbouring pairs",
        "cpu/streams.h",
        "fours[0] = pair + pairs[1];",
        "fours[0] = pair + pairs[0];",
    ),
    # Poolings that are normalised.
    _kernel(
        "chains of values are put together as if all began with one number",
        "cpu/moments.h",
        "product = (values * apart + 2 * sum) * apart + product;",
        "product += 0 * apart;",
    ),
    _kernel(
        "deviations of the first row are from its first value",
        "cpu/moments.h",
        "return !has_other(); }",
        "return false; }",
    ),
    _kernel(
        "the last chain of a row is left out of its moments",
        "cpu/moments.h",
        "if (columns % kColumns != 0) hand_on(columns % kColumns);",
        "if (columns % kColumns > kColumns) hand_on(columns % kColumns);",
    ),
    _kernel(
        "moments are those of averages with counted padding",
        "cpu/pooled_rows.h",
        "epilogue.take(column, pixel * scales[column]);",
        "epilogue.take(column, pixel);",
    ),
    _kernel(
        "a pooling is sent what its windows are not known for",
        "cpu/streamed_backward.h",
        "send(row + radius < last_grad ? row + radius : last_grad);",
        "send(last_grad);",
    ),
    _kernel(
        "windows that are not there are sent something too",
        "cpu/tree_maxima.h",
        "is_live ? field.sent(load(grads[i] + at), maximum) : Floats{};",
        "field.sent(load(grads[i] + at), maximum);",
    ),
    _kernel(
        "a strip's first windows are those of its own rows",
        "cpu/tree_maxima.h",
        "const int64_t live_begin = grad_begin + kRadius - line,",
        "const int64_t live_begin = task.row_begin + kRadius - line,",
    ),
    _kernel(
        "the sum of the other map is that of a pooling's deviations",
        "cpu/moments.h",
        "sum_of(pools_[plan_.num_pools].sums + kPackedLanes, lane)",
        "sum_of(pools_[k].sums, lane)",
    ),
    _kernel(
        "columns between outputs are sent something too",
        "cpu/backward.h",
        "store(gradients_of(item, i) + offset, of_outputs(sent, offset));",
        "store(gradients_of(item, i) + offset, sent);",
    ),
    _kernel(
        "the constant of a channel is left out of a row but for its beginning",
        "cpu/streamed_rows.h",
        "      acc[2 * kRadius] = start;",
        "      acc[2 * kRadius] = Floats{};",
    ),
    # Gradients that are scattered to the places of maxima.
    _kernel(
        "of equal elements of a wide window the last one is chosen",
        "cpu/scattered_maxima.h",
        "choose(at_least(first.value, second.value), first.place, second.place)",
        "choose(at_least(second.value, first.value), second.place, first.place)",
    ),
    _kernel(
        "places of a tile go on from the tile before it",
        "cpu/scattered_maxima.h",
        "        first += kTile<kRadius> * kPackedLanes;",
        "",
    ),
    # Weights.
    _kernel(
        "weights of channels are loaded once for all tasks",
        "cpu/weights.h",
        "shared_ = view.stride_n == 0 && view.stride_c == 0;",
        "shared_ = view.stride_n == 0;",
    ),
    _kernel(
        "a weight of nothing that is not finite is lost",
        "cpu/weights.h",
        "start_[lane] += weights_[p * kPackedLanes + lane] * Acc(0);",
        "start_[lane] += Acc(0);",
    ),
    _kernel(
        "infinite weights pass for finite",
        "cpu/weights.h",
        "finite_ &= weight - weight == 0;",
        "finite_ &= weight == weight;",
    ),
    _kernel(
        "empty lanes count in the gradient of the weights",
        "cpu/weights.h",
        "lanes[lane] = lane < task.lanes ? sums[k * kPackedLanes + lane] : 0;",
        "lanes[lane] = sums[k * kPackedLanes + lane];",
    ),
    _kernel(
        "products stay in single precision",
        "cpu/weights.h",
        "constexpr int64_t kChain = 16;",
        "constexpr int64_t kChain = int64_t{1} << 40;",
    ),
    # Forward.
    _kernel(
        "maxima start at the lowest number",
        "cpu/forward.h",
        "kLowest = -static_cast<Acc>(__builtin_inf());",
        "kLowest = -static_cast<Acc>(__FLT_MAX__);",
    ),
    _kernel(
        "averages see the map's edge beyond it",
        "cpu/forward.h",
        "inside[radius + d] = line == valid ? values_[valid] : zeros_;",
        "inside[radius + d] = values_[valid];",
    ),
    _kernel(
        "NaN of neighbouring lines is not looked for",
        "cpu/forward.h",
        "nan |= *nans_[valid];",
        "nan |= d == 0 && *nans_[valid];",
    ),
    _kernel(
        "one line too few is kept",
        "cpu/forward.h",
        "const int64_t lines = 2 * plan.radius_h + 2;",
        "const int64_t lines = 2 * plan.radius_h + 1;",
    ),
    _kernel(
        "averages at the border are divided by the size of a neighbour's window",
        "cpu/streamed_rows.h",
        "row.column_scales[r][column + d]",
        "row.column_scales[r][column]",
    ),
    _kernel(
        "lines count as much as the one in their middle",
        "cpu/streamed_rows.h",
        "row.row_scales[r][d]",
        "row.row_scales[r][0]",
    ),
    _kernel(
        "windows around the first columns inside do not reach the border",
        "cpu/streamed_forward.h",
        "averages_.border = 2 * largest_radius(average_radii_);",
        "averages_.border = largest_radius(average_radii_);",
    ),
    _kernel(
        "the streamed forward goes on with NaN",
        "cpu/streamed_forward.h",
        "nan |= plan_.max.count > 0 && has_nan(elements, size);",
        "nan |= plan_.max.count > 3 && has_nan(elements, size);",
    ),
    _kernel(
        "an empty lane keeps planes of the task before",
        "cpu/maps.h",
        "if (task.lanes < kPackedLanes) lines_.fill(0.0f);",
        "",
    ),
    # Backward.
    _kernel(
        "a row between two strips is counted twice",
        "cpu/backward.h",
        "center >= task_->row_begin && center < task_->row_end;",
        "center >= task_->row_begin && center <= task_->row_end;",
    ),
    _kernel(
        "what lies between windows is multiplied by zero",
        "cpu/backward.h",
        "if (exact_) return pooled;",
        "if (exact_ || true) return pooled;",
    ),
    _kernel(
        "the right one of equal parts is chosen",
        "cpu/vec.h",
        "  return left >= right;",
        "  return left > right;",
    ),
    _kernel(
        "the streamed backward goes on with infinity",
        "cpu/streamed_backward.h",
        "found |= vector - vector != 0;",
        "found |= vector != vector;",
    ),
    _kernel(
        "a strip's halo is half as high",
        "cpu/streamed_backward.h",
        "const int64_t begin = first_valid(task.row_begin, 2 * radius);",
        "const int64_t begin = first_valid(task.row_begin, radius);",
    ),
    _kernel(
        "the identity is counted beyond a strip too",
        "cpu/streamed_backward.h",
        "if (!owned) products.x = nullptr;",
        "",
    ),
    _kernel(
        "a column begins anew with each chunk of lines",
        "cpu/tree_maxima.h",
        "if (!last) state->tree = tree;",
        "",
    ),
)

DISPATCH = (
    _dispatch(
        "the last group of planes is left out",
        "plan.groups = (planes + plan.lanes - 1) / plan.lanes;",
        "plan.groups = std::max<int64_t>(planes / plan.lanes, 1);",
    ),
    _dispatch(
        "the last row of an odd height is left out",
        "return strip == plan.strips ? rows : rows * strip / plan.strips / 2 * 2;",
        "return rows * strip / plan.strips / 2 * 2;",
        file="plan.h",
    ),
    _dispatch(
        "the last strip adds nothing to the gradient of each plane's weights",
        "for (int64_t strip = 0; strip < plan.strips; ++strip) {",
        "for (int64_t strip = 0; strip < std::max<int64_t>(plan.strips - 1, 1); ++strip) {",
    ),
    _dispatch(
        "the gradient of the weights is summed in single precision",
        "std::vector<double> sums(rows_n * rows_c * k_count);",
        "std::vector<Acc> sums(rows_n * rows_c * k_count);",
    ),
    Fault(
        "maps that begin at one address pass for one map",
        "CPU dispatch",
        "csrc/meta_pool.h",
        "return a.data == b.data && a.stride_n == b.stride_n && a.stride_c == b.stride_c &&\n"
        "         a.stride_h == b.stride_h && a.stride_w == b.stride_w;",
        "return a.data == b.data;",
    ),
)

ARM = (
    _arm(
        "float16 is widened as if it were bfloat16",
        "elements.h",
        "return (Vec<float>)vcvt_f32_f16((float16x4_t)raw);",
        "return (Vec<float>)vshll_n_u16((uint16x4_t)raw, 16);",
    ),
    _arm(
        "the last bit of a narrowed float16 is lost",
        "elements.h",
        "return (RawVector<T, Acc>)vcvt_f16_f32((float32x4_t)vector);",
        "return (RawVector<T, Acc>)vcvt_f16_f32((float32x4_t)vector) & 0xfffe;",
    ),
    _arm(
        "bfloat16 beyond the largest number is held back",
        "elements.h",
        "return (RawVector<T, Acc>)vmovn_u32((uint32x4_t)halves);",
        "return (RawVector<T, Acc>)vmovn_u32(vminq_u32((uint32x4_t)halves, vdupq_n_u32(0xff7f)));",
    ),
    _arm(
        "any sees the first lanes alone",
        "vec.h",
        "return vmaxvq_u32((uint32x4_t)mask) != 0;",
        "return vmaxv_u32(vget_low_u32((uint32x4_t)mask)) != 0;",
    ),
    _arm(
        "codes lose their sign",
        "vec.h",
        "vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))))",
        "vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_s32(vdup_n_s32(four)))))",
    ),
    _arm(
        "what is not chosen has zero added",
        "vec.h",
        "vbslq_f32((uint32x4_t)choice, (float32x4_t)(acc + values), (float32x4_t)acc);",
        "(acc + (Vec<float>)(choice & (Mask<float>)values));",
    ),
)

FAULTS = (*KERNELS, *DISPATCH, *ARM)

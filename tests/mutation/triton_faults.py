"""Faults in the kernels in Triton, and in the bindings."""

from tests.mutation.fault import Fault


def _triton(name: str, file: str, right: str, wrong: str) -> Fault:
    return Fault(name, "Triton kernels", f"metapool_kernels/_triton/{file}", right, wrong)


def _form(name: str, file: str, right: str, wrong: str) -> Fault:
    return Fault(name, "Triton forms", f"metapool_kernels/_triton/{file}", right, wrong)


def _binding(name: str, right: str, wrong: str) -> Fault:
    return Fault(name, "bindings", "python_bindings/torch_maps.h", right, wrong)


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

FAULTS = (*TRITON, *TRITON_FORMS, *BINDINGS)

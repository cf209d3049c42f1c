"""Faults in the Python around the kernels."""

from tests.mutation.fault import Fault


def _in(area: str, file: str, name: str, right: str, wrong: str, equivalent: str = "") -> Fault:
    return Fault(name, area, f"metapool_kernels/{file}", right, wrong, equivalent)


def _autograd(name: str, right: str, wrong: str) -> Fault:
    return _in("autograd", "autograd.py", name, right, wrong)


def _check(name: str, right: str, wrong: str) -> Fault:
    return _in("checks", "checks.py", name, right, wrong)


AUTOGRAD = (
    _autograd(
        "forward mode is not asked for",
        "return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()",
        "return torch._C._are_functorch_transforms_active()",
    ),
    _autograd(
        "backward asks whether x needs a gradient, and values do",
        "mask = (wants_x if values is None else wants_values, wants_weights)",
        "mask = (wants_x, wants_weights)",
    ),
    _autograd(
        "the tangent of the weights pools x and not values",
        "along_weights = None if d_weights is None else pool(x, d_weights, values, ctx.spec)",
        "along_weights = None if d_weights is None else pool(x, d_weights, None, ctx.spec)",
    ),
    _autograd(
        "the tangent lacks that of the weights",
        "tangent = _add(along_values, along_weights)",
        "tangent = along_weights if along_values is None else along_values",
    ),
    _autograd(
        "double backward lacks the share of the weights",
        "grad_g = _add(along_v, along_u)",
        "grad_g = along_u if along_v is None else along_v",
    ),
    _autograd(
        "double backward pools x and not values",
        "along_u = None if u is None else pool(x, u, values, ctx.spec)",
        "along_u = None if u is None else pool(x, u, None, ctx.spec)",
    ),
    _autograd(
        "double backward weights by the weights and not by their cotangent",
        "grad_out, x, weights if u is None else u, v if mask[1] else None, ctx.spec, mask",
        "grad_out, x, weights, v if mask[1] else None, ctx.spec, mask",
    ),
    _autograd(
        "a tangent that is not there is added all the same",
        "_add(a, g if m else torch.zeros_like(g))",
        "_add(a, g)",
    ),
    _autograd(
        "the tangent of the gradients lacks that of the incoming one",
        "along_g = grads = pool_backward(d_g, x, weights, values, ctx.spec, ctx.mask)",
        "grads = pool_backward(d_g, x, weights, values, ctx.spec, ctx.mask)",
    ),
    _autograd(
        "the number of images is read where the mapped axis is",
        "return x.shape[0] if dim is None or dim > 0 else x.shape[1]",
        "return x.shape[0] if dim is None else x.shape[1]",
    ),
    _autograd(
        "mapped weights of channels are taken for those of images",
        "batched = batched[:, None]\n",
        "batched = batched[:, :, None]\n",
    ),
    _autograd(
        "only the first image counts for mapped weights",
        "grad = grad.sum(1)",
        "grad = grad[:, 0]",
    ),
)

OPS = (
    _in(
        "ops", "ops.py", "fake outputs are contiguous",
        "return empty_map(x, _out_size(x, weights, len(candidates), stride), channels_last)",
        "return empty_map(x, _out_size(x, weights, len(candidates), stride), False)",
    ),
    _in(
        "ops", "ops.py", "fake outputs of poolings side by side have the channels of x",
        "return (n, c if weights is not None else count * c, *output_size((h, w), stride))",
        "return (n, c, *output_size((h, w), stride))",
    ),
    _in(
        "ops", "ops.py", "fake gradients have the strides of x",
        "grad_x = empty_map(x, x.shape, channels_last) if output_mask[0] else x.new_empty(0)",
        "grad_x = torch.empty_like(x) if output_mask[0] else x.new_empty(0)",
    ),
    _in(
        "ops", "ops.py", "Triton may read maps of another dtype",
        "if tensor is not None and tensor.dtype is not x.dtype:",
        "if False:",
    ),
    _in(
        "ops", "layout.py", "one pixel in one channel is channels last",
        "or (dim == 0 and smallest == strides[1])",
        "",
        equivalent="Strides that do not shrink from C over W and H to N end where they began only "
        "if C = H = W = 1, and there both layouts of the output have the strides (1, 1, 1, 1).",
    ),
    _in(
        "ops", "layout.py", "any order of strides is channels last",
        "if size == 0 or stride < smallest or",
        "if size == 0 or",
    ),
    _in(
        "ops", "layout.py", "a step of two begins a window too many",
        "return (size[0] - 1) // stride[0] + 1,",
        "return size[0] // stride[0] + 1 if stride[0] > 1 else size[0],",
    ),
    _in(
        "ops", "layout.py", "strides of axes of one element are left as they are",
        "if x.stride() == strides:",
        "if x.is_contiguous(memory_format=memory_format(channels_last)):",
    ),
)  # fmt: skip

DISPATCH = (
    _in(
        "dispatch", "dispatch.py", "on a CPU the definition comes first",
        '"cpu": ("cpu", "reference")}',
        '"cpu": ("reference", "cpu")}',
    ),
    _in(
        "dispatch", "dispatch.py", "on a GPU the CUDA kernels come first",
        '"cuda": ("triton", "cuda", "reference")',
        '"cuda": ("cuda", "triton", "reference")',
    ),
    _in(
        "dispatch", "dispatch.py", "Triton takes tensors of a CPU",
        'if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":',
        'if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "0":',
    ),
    _in(
        "dispatch", "dispatch.py", "machine code runs on any GPU that is newer",
        'same_family = kind == "compute" or compiled_for[0] == capability[0]',
        "same_family = True",
    ),
    _in(
        "dispatch", "dispatch.py", "the very GPU that was compiled for is refused",
        "return same_family and compiled_for <= capability",
        "return same_family and compiled_for < capability",
    ),
    _in(
        "dispatch", "dispatch.py", "a Triton that is too old passes",
        '    if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRITON:',
        '    if tuple(map(int, version.split(".")[:1])) < _OLDEST_TRITON[:1]:',
    ),
    _in(
        "dispatch", "dispatch.py", "a GPU that is too old passes",
        "if capability < oldest:",
        "if capability[0] < 7:",
    ),
    _in(
        "dispatch", "dispatch.py", "a forced backend that cannot run runs",
        "    if reason is not None:\n        raise RuntimeError",
        "    if reason is not None and backend not in BACKENDS:\n        raise RuntimeError",
    ),
)  # fmt: skip

CHECKS = (
    _check(
        "a stride of 0 passes",
        "if type(stride) is int and 0 < stride <= MAX_STRIDE:",
        "if type(stride) is int and 0 <= stride <= MAX_STRIDE:",
    ),
    _check(
        "True passes for a stride",
        "isinstance(step, int) and not isinstance(step, bool) for step in pair",
        "isinstance(step, int) for step in pair",
    ),
    _check(
        "a stride has no upper end",
        "min(pair) < 1 or max(pair) > MAX_STRIDE:",
        "min(pair) < 1:",
    ),
    _check(
        "skip_connect may meet a step along one axis",
        "if max(stride) > 1 and any",
        "if min(stride) > 1 and any",
    ),
    _check(
        "numbers pass for flags",
        "if not isinstance(value, bool):",
        "if not isinstance(value, (bool, int)):",
    ),
    _check(
        "alpha may be sparse",
        '    _check_dense(op, "alpha", alpha)\n',
        "",
    ),
    _check(
        "any floating alpha passes",
        "if alpha.dtype is not x.dtype and alpha.dtype is not torch.float32:",
        "if alpha.dtype is not x.dtype and not alpha.dtype.is_floating_point:",
    ),
    _check(
        "alpha may be elsewhere",
        "if x.device != alpha.device:",
        "if False:",
    ),
    _check(
        "alpha of images alone is broadcast",
        "rows not in ((c,), (n, 1), (n, c)):",
        "rows not in ((c,), (n,), (n, 1), (n, c)):",
    ),
    _in(
        "checks", "candidates.py", "even windows pass",
        "if not all(1 <= size <= MAX_WINDOW and size % 2 == 1 for size in (kh, kw)):",
        "if not all(1 <= size <= MAX_WINDOW for size in (kh, kw)):",
    ),
    _in(
        "checks", "candidates.py", "windows of 15 are refused",
        "if not all(1 <= size <= MAX_WINDOW and",
        "if not all(1 <= size < MAX_WINDOW and",
    ),
    _in(
        "checks", "candidates.py", "names may go on behind the window",
        "match = _POOL_NAME.fullmatch(name)",
        "match = _POOL_NAME.match(name)",
    ),
    _in(
        "checks", "candidates.py", "one string is a sequence of names",
        "if isinstance(names, str) or not isinstance(names, Sequence):",
        "if not isinstance(names, Sequence):",
    ),
)  # fmt: skip

DEFINITION = (
    _in(
        "definition", "reference.py", "half precision is rounded at every step",
        "out = mix(x.to(weights.dtype), weights, candidates, stride, count_include_pad)",
        "out = mix(x, weights.to(x.dtype), candidates, stride, count_include_pad)",
    ),
    _in(
        "definition", "reference.py", "nothing steps along the other axis",
        "torch.zeros_like(x[..., :: stride[0], :: stride[1]])",
        "torch.zeros_like(x[..., :: stride[1], :: stride[0]])",
    ),
    _in(
        "definition", "reference.py", "padding always counts",
        "return F.avg_pool2d(x, window, stride, padding, count_include_pad=count_include_pad)",
        "return F.avg_pool2d(x, window, stride, padding)",
    ),
)  # fmt: skip

MODULES = (
    _in(
        "modules", "nn.py", "positions that are kept are not sorted by kind",
        "        keep.sort(key=lambda k: k >= pools)\n",
        "",
    ),
    _in(
        "modules", "nn.py", "a frozen alpha learns again when reduced",
        "nn.Parameter(self.alpha.detach()[..., keep], self.alpha.requires_grad)",
        "nn.Parameter(self.alpha.detach()[..., keep])",
    ),
    _in(
        "modules", "nn.py", "a subclass becomes its base when reduced",
        "kind: type[MetaPool2d] = type_before_parametrizations(module)",
        "kind = MetaPool2d",
    ),
    _in(
        "modules", "nn.py", "what is reduced shares its parts with the whole",
        "copy(value) if own else value",
        "value",
    ),
    _in(
        "modules", "convertible.py", "a forward of its own is forgotten",
        'known = "to_torch" in vars(kind) and "forward" not in vars(module)',
        'known = "forward" not in vars(module)',
    ),
    _in(
        "modules", "convertible.py", "a forward of one object is forgotten",
        'known = "to_torch" in vars(kind) and "forward" not in vars(module)',
        'known = "to_torch" in vars(kind)',
    ),
    _in(
        "modules", "nn.py", "one candidate of any weight becomes that pooling",
        "one = len(pools) == 1 and bool((weights == 1).all())",
        "one = len(pools) == 1",
    ),
    _in(
        "plain", "plain.py", "exported averages count their padding",
        "nn.AvgPool2d(window, step, padding, count_include_pad=count_include_pad)",
        "nn.AvgPool2d(window, step, padding)",
    ),
    _in(
        "plain", "plain.py", "the second strip takes both strides",
        "((kh, 1), (stride[0], 1))",
        "((kh, 1), stride)",
    ),
    _in(
        "plain", "plain.py", "a norm behind a pooling forgets its epsilon",
        "norm.running_var.double() + norm.eps",
        "norm.running_var.double()",
    ),
    _in(
        "modules", "functional.py", "weights sum to one over channels",
        "return torch.softmax(alpha, -1, dtype=accumulate)",
        "return torch.softmax(alpha, 0, dtype=accumulate)",
    ),
    _in(
        "modules", "extra_candidates.py", "extra candidates are added in the dtype of x",
        "terms.append(weights[..., k, None, None] * out.to(weights.dtype))",
        "terms.append((weights[..., k, None, None] * out).to(x.dtype).to(weights.dtype))",
    ),
)  # fmt: skip

NORMALISED = (
    _in(
        "normalised", "normalized.py", "processes with fewer images count as much as others",
        "counts, means, squares = torch.stack(every, 1)",
        "counts, means, squares = torch.stack(every, 1); counts = torch.ones_like(counts)",
    ),
    _in(
        "normalised", "normalized.py", "each process sends back by its own sums",
        "dist.all_reduce(sums, group=call.group)",
        "pass",
    ),
    _in(
        "normalised", "normalized.py", "the identity is sent back what normalising sends",
        "sums[..., [k for k in range(mean.shape[1]) if k not in call.pools]] = 0",
        "pass",
    ),
    _in(
        "normalised", "functional.py", "the running variance is the biased one",
        "unbiased = moments.variance * (moments.size / (moments.size - 1))",
        "unbiased = moments.variance",
    ),
    _in(
        "normalised", "nn.py", "a reduced module shares its statistics",
        "setattr(reduced, name, getattr(self, name)[rows])",
        "setattr(reduced, name, getattr(self, name))",
    ),
)  # fmt: skip

FAULTS = (*AUTOGRAD, *OPS, *DISPATCH, *CHECKS, *DEFINITION, *MODULES, *NORMALISED)

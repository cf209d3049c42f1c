// The same kernels on NumPy arrays, and what was built into them. No torch here: arrays are
// checked by metapool_kernels/numpy_api.py, which also decides the accumulation dtype.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../csrc/meta_pool.h"
#include "../csrc/window.h"

namespace py = pybind11;

namespace {

metapool::DType map_dtype(const py::array& map) {
  if (map.dtype().kind() == 'f') {
    switch (map.itemsize()) {
      case 2:
        return metapool::DType::kFloat16;
      case 4:
        return metapool::DType::kFloat32;
      case 8:
        return metapool::DType::kFloat64;
    }
  }
  throw py::type_error("meta_pool: maps should be float16, float32 or float64");
}

template <typename View, typename Pointer>
View make_view(const py::array& map, Pointer data) {
  const auto stride = [&](int axis) { return map.strides(axis) / map.itemsize(); };
  return {data, stride(0), stride(1), stride(2), stride(3)};
}

metapool::MapView view(const py::array& map) {
  return make_view<metapool::MapView>(map, map.data());
}

metapool::MutableMapView mutable_view(py::array& map) {
  return make_view<metapool::MutableMapView>(map, map.mutable_data());
}

metapool::WeightView weight_view(const py::array& weights) {
  const auto stride = [&](int axis) {
    return weights.shape(axis) > 1 ? weights.strides(axis) / weights.itemsize() : 0;
  };
  return {weights.data(), stride(0), stride(1), stride(2)};
}

// Channels of what the poolings become.
int64_t channels_out(const metapool::Problem& problem) {
  const auto count = static_cast<int64_t>(problem.candidates.size());
  return problem.form == metapool::Form::kStack ? count * problem.c : problem.c;
}

int64_t channel_stride(const py::array& map) { return map.strides(1) / map.itemsize(); }

void check_map(const py::array& map, const py::array& like, int64_t c, int64_t h, int64_t w) {
  if (map.ndim() != 4 || map.shape(0) != like.shape(0) || map.shape(1) != c || map.shape(2) != h ||
      map.shape(3) != w || !map.dtype().equal(like.dtype())) {
    throw py::value_error("meta_pool: a map has the wrong shape or dtype");
  }
}

void check_weights(const py::array& weights, const py::array& x, int64_t count) {
  const auto fits = [&](int axis) {
    return weights.shape(axis) == 1 || weights.shape(axis) == x.shape(axis);
  };
  if (weights.ndim() != 3 || !fits(0) || !fits(1) || weights.shape(2) != count ||
      weights.itemsize() != (x.itemsize() == 8 ? 8 : 4)) {
    throw py::value_error(
        "meta_pool: weights should be (N or 1, C or 1, K) of the accumulation dtype");
  }
}

// Without weights poolings are left side by side.
metapool::Problem make_problem(const py::array& x, const std::optional<py::array>& weights,
                               std::vector<int64_t> candidates, int64_t stride_h, int64_t stride_w,
                               bool count_include_pad) {
  if (x.ndim() != 4 || stride_h < 1 || stride_w < 1) {
    throw py::value_error("meta_pool: x should be 4-D and stride positive");
  }
  if (weights) check_weights(*weights, x, static_cast<int64_t>(candidates.size()));
  metapool::Problem problem;
  problem.form = weights ? metapool::Form::kMix : metapool::Form::kStack;
  problem.n = x.shape(0);
  problem.c = x.shape(1);
  problem.h = x.shape(2);
  problem.w = x.shape(3);
  problem.stride_h = stride_h;
  problem.stride_w = stride_w;
  problem.count_include_pad = count_include_pad;
  problem.dtype = map_dtype(x);
  problem.candidates = std::move(candidates);
  return problem;
}

void on_this_thread(int64_t count, int64_t, const metapool::RangeBody& body) {
  if (count > 0) body(0, count);
}

py::array meta_pool_fwd(const py::array& x, const std::optional<py::array>& weights,
                        const py::array& values, const std::optional<py::array>& constants,
                        std::vector<int64_t> candidates, int64_t stride_h, int64_t stride_w,
                        bool count_include_pad) {
  const metapool::Problem problem =
      make_problem(x, weights, std::move(candidates), stride_h, stride_w, count_include_pad);
  check_map(values, x, problem.c, problem.h, problem.w);
  const std::vector<py::ssize_t> size = {x.shape(0), channels_out(problem),
                                         metapool::output_size(problem.h, stride_h),
                                         metapool::output_size(problem.w, stride_w)};
  py::array out(x.dtype(), size);
  metapool::ForwardArgs args;
  args.x = view(x);
  args.values = view(values);
  if (weights) args.weights = weight_view(*weights);
  if (constants) {
    check_weights(*constants, x, 1);
    args.constants = weight_view(*constants);
  }
  args.out = mutable_view(out);
  args.out_stride_k = problem.c * channel_stride(out);
  {
    const py::gil_scoped_release release;
    metapool::meta_pool_fwd(problem, args, on_this_thread);
  }
  return out;
}

// Moments; of products where there is another map.
py::array meta_pool_moments(const py::array& x, const std::optional<py::array>& other,
                            const std::optional<py::array>& shifts, std::vector<int64_t> candidates,
                            int64_t stride_h, int64_t stride_w, bool count_include_pad) {
  metapool::Problem problem =
      make_problem(x, shifts, std::move(candidates), stride_h, stride_w, count_include_pad);
  problem.form = metapool::Form::kMoments;
  const auto count = static_cast<int64_t>(problem.candidates.size());
  py::array_t<double> out({problem.n, problem.c, count, int64_t{2}});
  metapool::ForwardArgs args;
  args.x = args.values = view(x);
  if (other && shifts) {
    check_map(*other, x, problem.c, metapool::output_size(problem.h, stride_h),
              metapool::output_size(problem.w, stride_w));
    args.other = view(*other);
    args.shifts = weight_view(*shifts);
  }
  args.moments = out.mutable_data();
  {
    const py::gil_scoped_release release;
    metapool::meta_pool_fwd(problem, args, on_this_thread);
  }
  return std::move(out);
}

std::tuple<py::array, std::optional<py::array>> meta_pool_bwd(
    const py::array& grad_out, const py::array& x, const std::optional<py::array>& weights,
    const py::array& values, std::vector<int64_t> candidates, int64_t stride_h, int64_t stride_w,
    bool count_include_pad) {
  const metapool::Problem problem =
      make_problem(x, weights, std::move(candidates), stride_h, stride_w, count_include_pad);
  check_map(values, x, problem.c, problem.h, problem.w);
  check_map(grad_out, x, channels_out(problem), metapool::output_size(problem.h, stride_h),
            metapool::output_size(problem.w, stride_w));
  py::array grad_x(x.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + 4));
  std::optional<py::array> grad_weights;
  metapool::BackwardArgs args;
  args.grad_out = view(grad_out);
  args.x = view(x);
  args.values = view(values);
  args.grad_out_stride_k = problem.c * channel_stride(grad_out);
  args.grad_x = mutable_view(grad_x);
  if (weights) {
    args.weights = weight_view(*weights);
    grad_weights.emplace(weights->dtype(),
                         std::vector<py::ssize_t>(weights->shape(), weights->shape() + 3));
    args.grad_weights = grad_weights->mutable_data();
    args.grad_weights_per_n = weights->shape(0) == x.shape(0);
    args.grad_weights_per_c = weights->shape(1) == x.shape(1);
  }
  {
    const py::gil_scoped_release release;
    metapool::meta_pool_bwd(problem, args, on_this_thread);
  }
  return {grad_x, grad_weights};
}

// terms: weights, offsets, slopes and shifts.
py::array meta_pool_affine_bwd(const py::array& grad_out, const py::array& x,
                               const std::array<py::array, 4>& terms,
                               std::vector<int64_t> candidates, int64_t stride_h, int64_t stride_w,
                               bool count_include_pad) {
  metapool::Problem problem =
      make_problem(x, terms[0], std::move(candidates), stride_h, stride_w, count_include_pad);
  problem.form = metapool::Form::kMoments;
  check_map(grad_out, x, problem.c, metapool::output_size(problem.h, stride_h),
            metapool::output_size(problem.w, stride_w));
  for (const py::array& term : terms) {
    check_weights(term, x, static_cast<int64_t>(problem.candidates.size()));
  }
  py::array grad_x(x.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + 4));
  metapool::BackwardArgs args;
  args.grad_out = view(grad_out);
  args.x = args.values = view(x);
  args.weights = weight_view(terms[0]);
  args.offsets = weight_view(terms[1]);
  args.slopes = weight_view(terms[2]);
  args.shifts = weight_view(terms[3]);
  args.grad_x = mutable_view(grad_x);
  {
    const py::gil_scoped_release release;
    metapool::meta_pool_bwd(problem, args, on_this_thread);
  }
  return grad_x;
}

}  // namespace

// Nothing that calls share is changed but the instruction set, which is chosen once and locked.
PYBIND11_MODULE(_numpy_ops, module, py::mod_gil_not_used()) {
  module.doc() = "The CPU kernels on NumPy arrays; see metapool_kernels.numpy_api.";
  module.def("meta_pool_fwd", &meta_pool_fwd);
  module.def("meta_pool_bwd", &meta_pool_bwd);
  module.def("meta_pool_moments", &meta_pool_moments);
  module.def("meta_pool_affine_bwd", &meta_pool_affine_bwd);
  module.def("isa_names", &metapool::isa_names);
  module.def("active_isa", &metapool::active_isa);
}

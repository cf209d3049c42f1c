// Backward for square windows at stride 1 on packed rows, see streams.h. Maxima are found
// along the rows first, then down the columns, and gradients go back the same way: up the columns
// to the rows' maxima, then along the rows; but see scattered_maxima.h. A chunk
// of lines at a time, so that all of it stays in the second cache or nearly so; what is under way
// in a column is kept from chunk to chunk. Products for the weights belong to the task that owns
// the row of grad_out, as in backward.h: strips of a plane may be left to either.
#pragma once

#include <new>

#include "scattered_maxima.h"

namespace metapool::cpu::METAPOOL_ISA {

class StreamedBackward {
  using Lines = MapLines<float, kPackedLanes>;

  static constexpr int64_t kChunkBytes = 640 * 1024, kSmallestRing = 16, kLargestRing = 64;
  static constexpr int64_t kMostSteps = kLargestRing;
  static constexpr int kPadding = kStreamedRadius;  // of rows that streams run over, in pixels
  static constexpr int kPendingRows = 8;  // whose parts are added up before they are handed on

  template <int kRadius>
  struct ColumnState {
    MaximaTree<kRadius> tree;
    typename MaximaTree<kRadius>::Choices choices;
  };

 public:
  StreamedBackward(const Plan& plan, const BackwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        averages_(streamed_set(plan.avg, kStreamedRadius)),
        maxima_(streamed_set(plan.max, kMaxRadius) & ~ScatteredMaxima::radii_of(plan)),
        maps_(plan.form == Form::kStack ? plan.num_pools : 1),
        wants_x_(args.grad_x.data != nullptr),
        row_size_(plan.w * kPackedLanes),
        chunk_(lines_at_a_time(plan) - 3 * plan.radius_h),
        x_(plan, chunk_ + 3 * plan.radius_h, arena),
        grads_(arena.take<DenseLines>(maps_)),
        scattered_(plan, chunk_ + 2 * plan.radius_h, wants_x_, arena) {
    for (int k = 0; k < maps_; ++k) {
      const DenseLines grads(plan, chunk_ + 3 * plan.radius_h, arena);
      if (!arena.counts_only()) new (grads_ + k) DenseLines(grads);
    }
    // Maxima of rows and their gradients lie in padded rows: streams run over both ends.
    const int64_t padded = (plan.w + 2 * kPadding) * kPackedLanes;
    for (const PoolItem& item : plan.max) {
      if (scattered_.handles(item)) continue;
      const int r = item.radius_w;
      const int64_t lines = chunk_ + 2 * plan.radius_h;
      rows_[r].allocate(arena, lines < plan.h ? lines : plan.h, padded, 0.0f);
      states_[r] = arena.take<char>(plan.w * (kPackedLanes / kVectorLanes<float>)*state_bytes(r));
    }
    zeros_ = arena.take_row<float>(row_size_, 0);
    lowest_ = arena.take_row<float>(row_size_, -__builtin_inff());
    unused_ = arena.take_row<float>(row_size_, 0);
    grad_x_ = arena.take_row<float>((x_.whole() ? plan.h : 1) * row_size_, 0);
    parts_ = arena.take_row<float>(plan.num_pools * kPackedLanes, 0);
    products_ = arena.take_row<double>(plan.num_pools * kPackedLanes, 0);
  }

  // share: [share_rows][num_pools], null where the gradient of the weights is not wanted. False
  // where anything is not finite: then nothing can be said of the results.
  bool run(const Task& task, const Task& next, float* share) {
    const Lines x(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines grad_out(args_.grad_out, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines grad_x(args_.grad_x, plan_, plan_.h, plan_.w, 1, task, next);
    wants_weights_ = share != nullptr;
    weights_.load(args_.weights, task);
    if (!weights_.finite()) return false;
    fill_row(parts_, plan_.num_pools * kPackedLanes, 0.0f);
    fill_row(products_, plan_.num_pools * kPackedLanes, 0.0);
    pending_rows_ = 0;

    const int radius = plan_.radius_h;
    const int64_t begin = first_valid(task.row_begin, 2 * radius);
    const int64_t end = last_valid(task.row_end - 1, 2 * radius, plan_.h) + 1;
    x_.start(task, begin);
    for (int k = 0; k < maps_; ++k) grads_[k].start(task, first_valid(task.row_begin, radius));
    const int64_t last_grad = last_valid(task.row_end - 1, radius, plan_.h);
    // Rows of x beyond the task's have products with its rows of grad_out.
    int64_t row = first_valid(task.row_begin, radius);
    const int64_t last_row = last_grad + 1;
    bool finite = true;
    const auto check = [&](const float* elements, int64_t size)
                           METAPOOL_LAMBDA { finite &= all_finite(elements, size); };
    for (int64_t line = begin; line < end; line += chunk_) {
      const int64_t line_end = line + chunk_ < end ? line + chunk_ : end;
      x_.load_to(line_end - 1, x, check);
      load_gradients(line_end - 1 < last_grad ? line_end - 1 : last_grad, grad_out, check);
      if (!finite) return false;
      with_maxima([&](auto set) METAPOOL_LAMBDA { find_in_rows<set>(line, line_end); });
      if (scattered_.any()) scattered_.find_in_rows(line, line_end, x_);
      for (const PoolItem& item : plan_.max) {
        if (scattered_.handles(item)) {
          scatter(item, task, line, line_end, end);
          continue;
        }
        with_streamed_radius(item.radius_w, [&](auto r) METAPOOL_LAMBDA {
          route_columns<r>(item, task, begin, line, line_end, end);
        });
      }
      const int64_t ready = line_end == end ? last_row : line_end - 2 * radius;
      for (; row < ready && row < last_row; ++row) collect(row, task, x, grad_out, grad_x);
    }
    if (x_.whole() && wants_x_ && grad_x.as_row(0) == nullptr) {
      grad_x.store_dense(0, plan_.h, grad_x_);
    }
    if (!wants_weights_) return true;
    flush_parts();
    for (const PoolItem& item : plan_.avg) {  // sums so far
      const int area = (2 * item.radius_h + 1) * (2 * item.radius_w + 1);
      double* const products = products_ + item.index * kPackedLanes;
      for (int lane = 0; lane < kPackedLanes; ++lane) products[lane] /= area;
    }
    write_share(plan_, task, products_, share);
    return true;
  }

 private:
  template <typename Body>
  static METAPOOL_INLINE void with_streamed_radius(int radius, Body body) {
    switch (radius) {
      case 1:
        return body(Int<1>{});
      case 2:
        return body(Int<2>{});
      default:
        return body(Int<3>{});
    }
  }

  // Calls body(set) with the radii of the maxima that are not scattered, where there are any.
  template <typename Body>
  METAPOOL_INLINE void with_maxima(Body body) const {
    with_set(maxima_, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) body(set);
    });
  }

  static int64_t state_bytes(int radius) {
    int64_t bytes = 0;
    with_streamed_radius(radius, [&](auto r) { bytes = sizeof(ColumnState<r>); });
    return bytes;
  }

  // A chunk ends where sums are handed on, so this must not depend on the instruction set.
  static int64_t lines_at_a_time(const Plan& plan) {
    int64_t lines = kLargestRing;
    const int64_t maps = plan.form == Form::kStack ? plan.num_pools : 1;
    const int64_t bytes = plan.w * kPackedLanes * sizeof(float) * (1 + maps + plan.max.count);
    const int64_t smallest = plan.radius_h > kStreamedRadius ? 2 * kSmallestRing : kSmallestRing;
    while (lines > smallest && lines * bytes > kChunkBytes) lines /= 2;
    return lines;
  }

  static bool all_finite(const float* from, int64_t size) {
    Mask<float> found{};
    for (int64_t e = 0; e < size; e += kVectorLanes<float>) {
      const Floats vector = load(from + e);
      found |= vector - vector != 0;
    }
    return !any<float>(found);
  }

  float* maxima_of(int radius, int64_t line) const {
    return rows_[radius][line] + kPadding * kPackedLanes;
  }

  // The lines of grad_out, or of the map beside others that belongs to a pooling.
  const DenseLines& gradients_of(const PoolItem& item) const {
    return grads_[plan_.form == Form::kStack ? item.index : 0];
  }

  template <typename Check>
  void load_gradients(int64_t last, const Lines& grad_out, const Check& check) {
    if (plan_.form == Form::kMix) return grads_[0].load_to(last, grad_out, check);
    for (int k = 0; k < plan_.pools.count; ++k) {
      const int map = plan_.pools.data[k];
      if (map == plan_.none.index) continue;
      grads_[map].load_to(last, grad_out.beside(k * args_.grad_out_stride_k), check);
    }
  }

  // Sends the gradients of those windows on that are complete with lines [line, line_end), of those
  // up to `end`.
  void scatter(const PoolItem& item, const Task& task, int64_t line, int64_t line_end,
               int64_t end) {
    const int radius = item.radius_h;
    const int64_t first = first_valid(task.row_begin, radius);
    const int64_t last = last_valid(task.row_end - 1, radius, plan_.h) + 1;
    const int64_t from = line - radius, to = line_end == end ? last : line_end - radius;
    scattered_.route(item, task, from > first ? from : first, to < last ? to : last, line_end,
                     gradients_of(item), weights_.of(item),
                     wants_weights_ ? products_ + item.index * kPackedLanes : nullptr);
  }

  // The maxima along lines [begin, end).
  template <int kSet>
  METAPOOL_NOINLINE void find_in_rows(int64_t begin, int64_t end) {
    constexpr int kRadius = largest_radius(kSet);
    for (int64_t line = begin; line < end; ++line) {
      const float* const x = x_[line];
      float* out[kRadius + 1];
      for (int r = 1; r <= kRadius; ++r) {
        if (contains(kSet, r)) out[r] = maxima_of(r, line);
      }
      for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
        MaximaStream<kRadius> maxima;
        maxima.reset();
        // Near the ends of the row some windows lie beyond it: the padding stays as it is.
        const auto push = [&](int64_t column, auto near_ends) METAPOOL_LAMBDA {
          const bool beyond = near_ends && column >= plan_.w;
          const Floats next = load((beyond ? lowest_ : x + column * kPackedLanes) + slot);
          maxima.push(next, [&](auto r, Floats window) METAPOOL_LAMBDA {
            if constexpr (contains(kSet, r)) {
              const int64_t center = column - r;
              if (near_ends && (center < 0 || center >= plan_.w)) return;
              store(out[r] + center * kPackedLanes + slot, window);
            }
          });
        };
        int64_t column = 0;
        for (; column < kRadius; ++column) push(column, std::true_type{});
        for (; column < plan_.w; ++column) push(column, std::false_type{});
        for (; column < plan_.w + kRadius; ++column) push(column, std::true_type{});
      }
    }
  }

  // Takes a tree along steps [begin, end) of its line: nothing comes back before step `pull_begin`,
  // and nothing is found from `push_end` on.
  template <typename Push, typename Pull>
  static METAPOOL_INLINE void run_tree(int64_t begin, int64_t end, int64_t pull_begin,
                                       int64_t push_end, Push push, Pull pull) {
    if (push_end > end) push_end = end;
    int64_t step = begin;
    for (; step < pull_begin && step < push_end; ++step) push(step);
    for (; step < push_end; ++step) {
      push(step);
      pull(step);
    }
    for (; step < end; ++step) pull(step);
  }

  // Takes the tree of radius kRadius over lines [line, line_end) of [begin, end).
  template <int kRadius>
  METAPOOL_NOINLINE void route_columns(const PoolItem& item, const Task& task, int64_t begin,
                                       int64_t line, int64_t line_end, int64_t end) {
    const bool first = line == begin, last = line_end == end;
    const int64_t grad_begin = first_valid(task.row_begin, plan_.radius_h);
    const int64_t grad_end = last_valid(task.row_end - 1, plan_.radius_h, plan_.h) + 1;
    const int64_t steps = line_end - line + (last ? 2 * kRadius : 0);
    const float* elements[kMostSteps];
    const float* grads[kMostSteps];    // of the windows that a step finds
    const float* counted[kMostSteps];  // the same where they count for the weights
    float* out[kMostSteps];
    const DenseLines& grads_of_item = gradients_of(item);
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t element = line + i, center = element - kRadius, done = center - kRadius;
      elements[i] = element < end ? maxima_of(kRadius, element) : lowest_;
      grads[i] = center >= grad_begin && center < grad_end ? grads_of_item[center] : zeros_;
      const bool owned = center >= task.row_begin && center < task.row_end;
      counted[i] = owned && wants_weights_ ? grads[i] : zeros_;
      out[i] = done >= begin ? maxima_of(kRadius, done) : unused_;
    }
    auto* state = reinterpret_cast<ColumnState<kRadius>*>(states_[kRadius]);
    double* const products = products_ + item.index * kPackedLanes;
    // A column's products with rows of grad_out are at most so many in a block of kChain steps.
    const int64_t links = kChain < plan_.h ? kChain : plan_.h;
    const int64_t push_end = last ? steps - kRadius : steps;
    const int64_t wanted = wants_x_ ? steps : push_end;
    const int64_t pull_begin = !wants_x_ ? push_end : first ? kRadius : 0;
    for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
      const Floats weights = load(weights_.of(item) + slot);
      Floats sum{};
      int64_t chained = 0;
      for (int64_t column = 0; column < plan_.w; ++column, ++state) {
        const int64_t at = column * kPackedLanes + slot;
        MaximaTree<kRadius> tree;
        if (first) {
          tree.reset();
          for (auto& choices : state->choices) {
            for (Choice& choice : choices) choice = Choice{};
          }
        } else {
          tree = state->tree;
        }
        Choice choice{};
        const auto push = [&](int64_t i) METAPOOL_LAMBDA {
          choice = tree.push(load(elements[i] + at), line + i, state->choices,
                             [&](auto r, Floats window) METAPOOL_LAMBDA {
                               if constexpr (r == kRadius) sum += window * load(counted[i] + at);
                             });
        };
        const auto pull = [&](int64_t i) METAPOOL_LAMBDA {
          store(out[i] + at,
                tree.template pull<0>(choice, line + i, state->choices, [&](auto) METAPOOL_LAMBDA {
                  return weights * load(grads[i] + at);
                }));
        };
        for (int64_t begin = 0; begin < wanted; begin += kChain) {
          const int64_t end = begin + kChain < wanted ? begin + kChain : wanted;
          run_tree(begin, end, pull_begin, push_end, push, pull);
          chained += links;
          if (chained + links <= kChain) continue;
          hand_on(sum, products + slot);
          chained = 0;
        }
        if (!last) state->tree = tree;
      }
      hand_on(sum, products + slot);
    }
  }

  // Adds the products of row i of x with the rows of grad_out that the task owns; for the task's
  // own rows of x, computes that of grad_x and stores it.
  void collect(int64_t i, const Task& task, const Lines& x, const Lines& grad_out,
               const Lines& grad_x) {
    const auto within = [&](int64_t begin, int64_t end) {
      return i - begin >= plan_.radius_h && end - i > plan_.radius_h;
    };
    const bool owned = i >= task.row_begin && i < task.row_end;
    // Near the edge of a strip, and beyond it, only some of the rows around are the task's.
    const bool alone = plan_.strips == 1 || within(task.row_begin, task.row_end);
    if (!alone && wants_weights_) {
      AverageRow products = averages_around(grads_[0], i, task.row_begin, task.row_end);
      if (!owned) products.x = nullptr;
      products.out = unused_;
      stream_radii<true>(products);
    }
    if (!owned) return;

    float* const in_map = wants_x_ ? grad_x.as_row(i) : nullptr;
    float* const row = x_.whole() ? grad_x_ + i * row_size_ : grad_x_;
    float* const out = in_map == nullptr ? row : in_map;
    const int64_t pitch = in_map == nullptr ? kPackedLanes : grad_x.pixel_stride();
    const bool scattered = scattered_.any();
    if (scattered) scattered_.store_row(i, out, pitch);
    const bool complete = scattered && averages_ == 0 && plan_.skip.index < 0;
    if (!complete && plan_.form == Form::kMix) {
      AverageRow averages = averages_around(grads_[0], i, 0, plan_.h);
      averages.out = out;
      averages.adds = scattered;
      averages.pitch = pitch;
      alone&& wants_weights_ ? stream_radii<true>(averages) : stream_radii<false>(averages);
    } else if (!complete) {
      add_up_averages(i, out, pitch);
    }
    if (wants_x_) {
      with_maxima([&](auto set) METAPOOL_LAMBDA { route_row<set>(i, out, pitch); });
    }

    if (x_.whole()) {
      x.prefetch_next<false>(i);
      grad_out.prefetch_next<false>(i);
      if (wants_x_) grad_x.prefetch_next<true>(i);
    } else if (wants_x_ && in_map == nullptr) {
      grad_x.store(i, row);
    } else if (wants_x_) {
      grad_x.prefetch_ahead<true>(i);
    }
  }

  // out = what identity and averages send back along row i, each from a map of its own; added to
  // what was scattered.
  void add_up_averages(int64_t i, float* out, int64_t pitch) const {
    const DenseLines& skip = grads_[plan_.skip.index >= 0 ? plan_.skip.index : 0];
    AverageRow row = averages_around(skip, i, 0, plan_.h);
    row.out = out;
    row.pitch = pitch;
    row.adds = scattered_.any();
    stream_averages<0, false>(row);
    for (const PoolItem& item : plan_.avg) {
      row = averages_around(gradients_of(item), i, 0, plan_.h);
      row.x = nullptr;
      row.out = out;
      row.pitch = pitch;
      row.adds = true;
      with_set(1 << item.radius_w,
               [&](auto set) METAPOOL_LAMBDA { stream_averages<set, false>(row); });
    }
  }

  // Rows of a map of gradients around row i, those of [begin, end), with row i of x.
  AverageRow averages_around(const DenseLines& grads, int64_t i, int64_t begin, int64_t end) const {
    AverageRow averages{};
    for (int d = -kStreamedRadius; d <= kStreamedRadius; ++d) {
      const bool inside = i + d >= begin && i + d < end;
      averages.lines[kStreamedRadius + d] = inside ? grads[i + d] : zeros_;
    }
    for (const PoolItem& item : plan_.avg) {
      averages.weights[item.radius_w] = weights_.averages_of(item);
      averages.parts[item.radius_w] = parts_ + item.index * kPackedLanes;
      averages.products[item.radius_w] = products_ + item.index * kPackedLanes;
    }
    if (plan_.skip.index >= 0) {
      averages.x = grads[i];
      averages.x_weights = weights_.of(plan_.skip);
      averages.x_parts = parts_ + plan_.skip.index * kPackedLanes;
      averages.x_products = products_ + plan_.skip.index * kPackedLanes;
    }
    averages.other = x_[i];
    averages.columns = plan_.w;
    averages.pitch = kPackedLanes;
    return averages;
  }

  template <bool kProducts>
  void stream_radii(const AverageRow& averages) {
    with_set(averages_,
             [&](auto set) METAPOOL_LAMBDA { stream_averages<set, kProducts>(averages); });
    if (kProducts && ++pending_rows_ == kPendingRows) flush_parts();
  }

  // out += what the rows' maxima send back along row i.
  template <int kSet>
  METAPOOL_NOINLINE void route_row(int64_t i, float* out, int64_t pitch) {
    constexpr int kRadius = largest_radius(kSet);
    using Tree = MaximaTree<kRadius>;
    const float* const x = x_[i];
    const float* arrivals[kRadius + 1];
    for (int r = 1; r <= kRadius; ++r) {
      if (contains(kSet, r)) arrivals[r] = maxima_of(r, i);
    }
    for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
      Tree tree;
      tree.reset();
      typename Tree::Choices choices = {};
      Choice choice{};
      const auto push = [&](int64_t column) METAPOOL_LAMBDA {
        const Floats next = load((column < plan_.w ? x + column * kPackedLanes : lowest_) + slot);
        choice = tree.push(next, column, choices, [](auto, Floats) METAPOOL_LAMBDA {});
      };
      const auto pull = [&](int64_t column) METAPOOL_LAMBDA {
        const Floats gradient =
            tree.template pull<kSet>(choice, column, choices, [&](auto r) METAPOOL_LAMBDA {
              return load(arrivals[r] + (column - (2 * kRadius - r)) * kPackedLanes + slot);
            });
        if (column < 2 * kRadius) return;
        float* const to = out + (column - 2 * kRadius) * pitch + slot;
        store(to, load(to) + gradient);
      };
      run_tree(0, plan_.w + 2 * kRadius, kRadius, plan_.w + kRadius, push, pull);
    }
  }

  // Moves what is left of the rows' products on.
  void flush_parts() {
    pending_rows_ = 0;
    for (int k = 0; k < plan_.num_pools * kPackedLanes; ++k) {
      products_[k] += parts_[k];
      parts_[k] = 0;
    }
  }

  const Plan& plan_;
  const BackwardArgs& args_;
  const RowShape<float, kPackedLanes> shape_;
  Weights<float, kPackedLanes> weights_;
  const int averages_, maxima_;  // sets of radii, of the maxima without those that are scattered
  const int maps_;               // of gradients: one, or one for each pooling
  const bool wants_x_;
  bool wants_weights_ = false;
  const int64_t row_size_, chunk_;
  DenseLines x_;
  DenseLines* grads_;
  ScatteredMaxima scattered_;
  RowRing<float> rows_[kStreamedRadius + 1];  // maxima of rows, then their gradients
  char* states_[kStreamedRadius + 1];
  float *zeros_, *lowest_, *unused_, *grad_x_;
  double* products_;  // of pooled rows with grad_out, [num_pools][16]
  float* parts_;      // the same of averages and identity, not yet handed on
  int64_t pending_rows_ = 0;
};

}  // namespace metapool::cpu::METAPOOL_ISA

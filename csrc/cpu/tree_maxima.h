// The way back for maxima of nested square windows at stride 1 on packed rows: maxima are found
// along the rows first, then down the columns, and gradients go back the same way: up the columns
// to the rows' maxima, then along the rows. What is under way in a column is kept from chunk to
// chunk.
#pragma once

#include "maps.h"
#include "streams.h"

namespace metapool::cpu::METAPOOL_ISA {

// What windows are sent in a mixture, and where gradients come side by side.
class WeightedGradients {
 public:
  explicit WeightedGradients(const float* weights) : weights_(weights) {}

  METAPOOL_INLINE void begin(int slot) { weight_ = load(weights_ + slot); }
  METAPOOL_INLINE Floats sent(Floats gradient, Floats) const { return weight_ * gradient; }

 private:
  const float* weights_;  // of the lanes
  Floats weight_;
};

class TreeMaxima {
  static constexpr int kPadding = kStreamedRadius;  // of rows that streams run over, in pixels

  template <int kRadius>
  struct ColumnState {
    MaximaTree<kRadius> tree;
    typename MaximaTree<kRadius>::Choices choices;
  };

 public:
  static constexpr int64_t kMostSteps = 64;  // lines of a chunk and of what is found beyond it

  // For the maxima of some radii; `lines` of x, or all, are worked on at a time.
  TreeMaxima(const Plan& plan, int radii, int64_t lines, bool wants_x, Arena& arena)
      : plan_(plan), radii_(radii), wants_x_(wants_x) {
    // Maxima of rows and their gradients lie in padded rows: streams run over both ends.
    const int64_t padded = (plan.w + 2 * kPadding) * kPackedLanes;
    for (int r = 1; r <= kStreamedRadius; ++r) {
      if (!contains(radii, r)) continue;
      rows_[r].allocate(arena, lines < plan.h ? lines : plan.h, padded, 0.0f);
      states_[r] = arena.take<char>(plan.w * (kPackedLanes / kVectorLanes<float>)*state_bytes(r));
    }
    zeros_ = arena.take_row<float>(plan.w * kPackedLanes, 0);
    lowest_ = arena.take_row<float>(plan.w * kPackedLanes, -__builtin_inff());
    unused_ = arena.take_row<float>(plan.w * kPackedLanes, 0);
  }

  // Finds the maxima along lines [begin, end).
  void find_in_rows(int64_t begin, int64_t end, const DenseLines& x) {
    with_radii([&](auto set) METAPOOL_LAMBDA {
      for (int64_t line = begin; line < end; ++line) find_in_row<set>(line, x[line]);
    });
  }

  // Takes an item's trees over a chunk. A window is sent field.sent(gradient, maximum), see
  // WeightedGradients. Where `products` are wanted, adds those that belong to the task.
  template <typename Field>
  void route(const PoolItem& item, const Task& task, const Chunk& chunk, const DenseLines& grads,
             const Field& field, double* products) {
    with_streamed_radius(item.radius_w, [&](auto r) METAPOOL_LAMBDA {
      route_columns<r>(task, chunk, grads, field, products);
    });
  }

  // out += what the rows' maxima send back along row i of x.
  void route_row(int64_t i, const float* x, float* out, int64_t pitch) {
    with_radii([&](auto set) METAPOOL_LAMBDA { route_along<set>(i, x, out, pitch); });
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

  template <typename Body>
  METAPOOL_INLINE void with_radii(Body body) const {
    with_set(radii_, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) body(set);
    });
  }

  static int64_t state_bytes(int radius) {
    int64_t bytes = 0;
    with_streamed_radius(radius, [&](auto r) { bytes = sizeof(ColumnState<r>); });
    return bytes;
  }

  float* maxima_of(int radius, int64_t line) const {
    return rows_[radius][line] + kPadding * kPackedLanes;
  }

  template <int kSet>
  METAPOOL_NOINLINE void find_in_row(int64_t line, const float* x) {
    constexpr int kRadius = largest_radius(kSet);
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

  // Takes a tree along steps [begin, end) of its line: windows that are found from step `live` on
  // are sent something, and none is found from `found` on.
  template <typename Push, typename Pull>
  static METAPOOL_INLINE void run_tree(int64_t begin, int64_t end, int64_t live, int64_t found,
                                       Push push, Pull pull) {
    if (found > end) found = end;
    int64_t step = begin;
    for (; step < live && step < found; ++step) push(step);
    for (; step < found; ++step) {
      push(step);
      pull(step, Int<true>{});
    }
    for (; step < end; ++step) pull(step, Int<false>{});
  }

  template <int kRadius, typename Field>
  METAPOOL_NOINLINE void route_columns(const Task& task, const Chunk& chunk,
                                       const DenseLines& lines_of_grads, Field field,
                                       double* products) {
    const int64_t line = chunk.line, line_end = chunk.line_end, end = chunk.end;
    const bool first = line == chunk.begin, last = line_end == end;
    const int64_t grad_begin = first_valid(task.row_begin, plan_.radius_h);
    const int64_t grad_end = last_valid(task.row_end - 1, plan_.radius_h, plan_.h) + 1;
    const int64_t steps = line_end - line + (last ? 2 * kRadius : 0);
    // Rows of the task hold no element of windows beyond these.
    const int64_t live_begin = grad_begin + kRadius - line, live_end = grad_end + kRadius - line;
    const int64_t found = live_end < steps ? live_end : steps;
    const float* elements[kMostSteps];
    const float* grads[kMostSteps];    // of the windows that a step finds
    const float* counted[kMostSteps];  // the same where they count for the weights
    float* out[kMostSteps];
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t element = line + i, center = element - kRadius, done = center - kRadius;
      elements[i] = element < end ? maxima_of(kRadius, element) : lowest_;
      grads[i] = i >= live_begin && i < live_end ? lines_of_grads[center] : zeros_;
      const bool owned = center >= task.row_begin && center < task.row_end;
      counted[i] = owned && products != nullptr ? grads[i] : zeros_;
      out[i] = done >= chunk.begin ? maxima_of(kRadius, done) : unused_;
    }
    auto* state = reinterpret_cast<ColumnState<kRadius>*>(states_[kRadius]);
    double unwanted[kPackedLanes] = {};
    if (products == nullptr) products = unwanted;
    // A column's products with rows of grad_out are at most so many in a block of kChain steps.
    const int64_t links = kChain < plan_.h ? kChain : plan_.h;
    const int64_t wanted = wants_x_ ? steps : found, live = wants_x_ ? live_begin : found;
    for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
      field.begin(slot);
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
        Floats maximum{};
        const auto push = [&](int64_t i) METAPOOL_LAMBDA {
          choice = tree.push(load(elements[i] + at), line + i, state->choices,
                             [&](auto r, Floats window) METAPOOL_LAMBDA {
                               if constexpr (r == kRadius) maximum = window;
                             });
          sum += maximum * load(counted[i] + at);
        };
        const auto pull = [&](int64_t i, auto is_live) METAPOOL_LAMBDA {
          store(out[i] + at,
                tree.template pull<0>(choice, line + i, state->choices, [&](auto) METAPOOL_LAMBDA {
                  return is_live ? field.sent(load(grads[i] + at), maximum) : Floats{};
                }));
        };
        for (int64_t begin = 0; begin < wanted; begin += kChain) {
          const int64_t end = begin + kChain < wanted ? begin + kChain : wanted;
          run_tree(begin, end, live, found, push, pull);
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

  template <int kSet>
  METAPOOL_NOINLINE void route_along(int64_t i, const float* x, float* out, int64_t pitch) {
    constexpr int kRadius = largest_radius(kSet);
    using Tree = MaximaTree<kRadius>;
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
      const auto pull = [&](int64_t column, auto) METAPOOL_LAMBDA {
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

  const Plan& plan_;
  const int radii_;
  const bool wants_x_;
  RowRing<float> rows_[kStreamedRadius + 1];  // maxima of rows, then their gradients
  char* states_[kStreamedRadius + 1];
  float *zeros_, *lowest_, *unused_;
};

}  // namespace metapool::cpu::METAPOOL_ISA

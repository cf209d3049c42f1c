// Moments of pooled planes, and what their gradients send back.
#pragma once

#include "weights.h"

namespace metapool::cpu::METAPOOL_ISA {

// Of each pooling, over a task's rows of each of its planes: the mean and the sum of squared
// deviations from it; or, with another map, sums of that and of its products with deviations.
// Deviations are those from the first value of a chain, or from given shifts: where values vary
// little around a large mean, squares or products of the values themselves would leave nothing of
// that. Chains are put together in double.
template <typename Acc, int kLanes>
class Moments {
 public:
  Moments(const Plan& plan, const ForwardArgs& args, Arena& arena) : plan_(plan), args_(args) {
    if (plan.form != Form::kMoments) return;
    shifts_ = arena.take_row<Acc>(plan.num_pools * kPackedLanes, 0);
    sums_ = arena.take_row<double>(2 * plan.num_pools * kPackedLanes, 0);
    begun_ = arena.take_row<bool>(plan.num_pools, false);
  }

  void start(const Task& task) {
    fill_row(sums_, 2 * plan_.num_pools * kPackedLanes, 0.0);
    fill_row(begun_, plan_.num_pools, has_other());
    for (int lane = 0; has_other() && lane < kPackedLanes; ++lane) {
      const int64_t plane = task.plane + (lane < task.lanes ? lane : 0);
      const Acc* const from = weights_of_plane<Acc>(args_.shifts, plan_, plane);
      for (int k = 0; k < plan_.pools.count; ++k) {
        if (!is_first(plan_, k)) continue;  // the shifts of others are seen to in dispatch.cpp
        shifts_[plan_.pools.data[k] * kPackedLanes + lane] = from[k * args_.shifts.stride_k];
      }
    }
  }

  // Adds a pooled row from its first column on, with `step` pixels from output to output, and,
  // where there is another map, a dense row of that. With one lane, sixteen outputs are taken at a
  // time.
  void add_row(const PoolItem& item, const Acc* pooled, const Acc* other, int64_t step) {
    Acc* const shifts = shifts_ + item.index * kPackedLanes;
    if (!begun_[item.index]) {
      begun_[item.index] = true;
      first_values(pooled, shifts);
    }
    double* const sums = sums_ + 2 * item.index * kPackedLanes;
    const int64_t size = plan_.w_out * kLanes;
    constexpr int64_t kChainElements = kChain * kPackedLanes;
    for (int64_t begin = 0; begin < size; begin += kChainElements) {
      const int64_t end = begin + kChainElements < size ? begin + kChainElements : size;
      Acc firsts[kPackedLanes], sum[kPackedLanes], products[kPackedLanes];
      if (has_other()) {
        add_chain<true>(pooled, other, shifts, begin, end, step, sum, products);
        for (int slot = 0; slot < kPackedLanes; ++slot)
          sums[slot] += static_cast<double>(sum[slot]);
        for (int slot = 0; slot < kPackedLanes; ++slot) {
          sums[kPackedLanes + slot] += static_cast<double>(products[slot]);
        }
        continue;
      }
      first_values(pooled + begin * step, firsts);
      add_chain<false>(pooled, other, firsts, begin, end, step, sum, products);
      // With one lane, the last chain of a row may leave some slots with one value less.
      const int64_t rest = (end - begin) & (kPackedLanes - 1);
      const auto whole = static_cast<double>((end - begin) / kPackedLanes);
      double counts[kPackedLanes];
      for (int slot = 0; slot < kPackedLanes; ++slot) {
        counts[slot] = kLanes == 1 && slot < rest ? whole + 1 : whole;
      }
      add_deviations(firsts, shifts, counts, sum, products, sums);
    }
  }

  // Hands over what the task has found: [lanes][num_pools][2].
  void finish(const Task& task, double* share) const {
    const auto count = static_cast<double>((task.row_end - task.row_begin) * plan_.w_out);
    for (int lane = 0; lane < task.lanes; ++lane) {
      for (int k = 0; k < plan_.num_pools; ++k) {
        const double* const sums = sums_ + 2 * k * kPackedLanes;
        double sum = sums[lane], products = sums[kPackedLanes + lane];
        for (int slot = 1; kLanes == 1 && slot < kPackedLanes; ++slot) {
          sum += sums[slot];
          products += sums[kPackedLanes + slot];
        }
        double* const found = share + 2 * (lane * plan_.num_pools + k);
        found[0] = sum;
        found[1] = products;
        if (has_other()) continue;
        const double deviations = products - sum * sum / count;
        found[0] = static_cast<double>(shifts_[k * kPackedLanes + lane]) + sum / count;
        found[1] = deviations < 0 ? 0 : deviations;
      }
    }
  }

 private:
  bool has_other() const { return args_.other.data != nullptr; }

  // What is near the values of a row: its first one in each lane, where that is a number.
  static void first_values(const Acc* pooled, Acc* values) {
    for (int lane = 0; lane < kPackedLanes; ++lane) {
      const Acc first = pooled[kLanes == 1 ? 0 : lane];
      values[lane] = first - first == 0 ? first : Acc(0);
    }
  }

  // Adds what a chain holds to the sums of deviations from the shifts and of their squares: its own
  // are from its first values.
  static void add_deviations(const Acc* firsts, const Acc* shifts, const double* counts,
                             const Acc* sum_of, const Acc* squares_of, double* sums) {
    double added[kPackedLanes], added_squares[kPackedLanes];
    for (int slot = 0; slot < kPackedLanes; ++slot) {
      const double apart = static_cast<double>(firsts[slot]) - static_cast<double>(shifts[slot]);
      const double values = counts[slot];
      const auto sum = static_cast<double>(sum_of[slot]);
      const auto square = static_cast<double>(squares_of[slot]);
      added[slot] = values * apart + sum;
      added_squares[slot] = (values * apart + 2 * sum) * apart + square;
    }
    for (int slot = 0; slot < kPackedLanes; ++slot) sums[slot] += added[slot];
    for (int slot = 0; slot < kPackedLanes; ++slot) {
      sums[kPackedLanes + slot] += added_squares[slot];
    }
  }

  // Adds up a chain, elements [begin, end), into sixteen sums: of deviations, or of the other map,
  // and of their products with deviations.
  template <bool kHasOther>
  METAPOOL_INLINE static void add_chain(const Acc* pooled, const Acc* other, const Acc* shifts,
                                        int64_t begin, int64_t end, int64_t step, Acc* sums,
                                        Acc* products_of) {
    constexpr int kVectors = kPackedLanes / kVectorLanes<Acc>;
    Vec<Acc> sum[kVectors] = {}, products[kVectors] = {}, shift[kVectors];
    for (int v = 0; v < kVectors; ++v) shift[v] = load(shifts + v * kVectorLanes<Acc>);
    int64_t output = begin;
    for (; (kLanes > 1 || step == 1) && output + kPackedLanes <= end; output += kPackedLanes) {
      for (int v = 0; v < kVectors; ++v) {
        const int slot = v * kVectorLanes<Acc>;
        const Vec<Acc> deviation = load(pooled + output * step + slot) - shift[v];
        const Vec<Acc> factor = kHasOther ? load(other + output + slot) : deviation;
        sum[v] += factor;
        products[v] += deviation * factor;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(sums + v * kVectorLanes<Acc>, sum[v]);
      store(products_of + v * kVectorLanes<Acc>, products[v]);
    }
    for (; kLanes == 1 && output < end; ++output) {
      const int slot = static_cast<int>(output - begin) & (kPackedLanes - 1);
      const Acc deviation = pooled[output * step] - shifts[slot];
      const Acc factor = kHasOther ? other[output] : deviation;
      sums[slot] += factor;
      products_of[slot] += deviation * factor;
    }
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  Acc* shifts_ = nullptr;   // [num_pools][16]
  double* sums_ = nullptr;  // [num_pools][2][16]
  bool* begun_ = nullptr;   // for each pooling whether its shifts are there
};

// What the backward of moments sends each pooling: weights * grad_out + offsets + slopes * (pooled
// - shifts), in arrays of [16] for its candidates together.
template <typename Acc>
class FieldTerms {
 public:
  FieldTerms(const Plan& plan, Arena& arena) : plan_(plan) {
    if (plan.form == Form::kMoments) terms_ = arena.take_row<Acc>(4 * size(), 0);
  }

  void load(const BackwardArgs& args, const Task& task) {
    fill_row(terms_, 4 * size(), Acc(0));
    finite_ = true;
    const WeightView* const views[] = {&args.weights, &args.offsets, &args.slopes, &args.shifts};
    for (int lane = 0; lane < kPackedLanes; ++lane) {
      const int64_t plane = task.plane + (lane < task.lanes ? lane : 0);
      const Acc* from[4];
      for (int t = 0; t < 4; ++t) from[t] = weights_of_plane<Acc>(*views[t], plan_, plane);
      for (int k = 0; k < plan_.pools.count; ++k) {
        Acc term[4];
        for (int t = 0; t < 4; ++t) {
          term[t] = from[t][k * views[t]->stride_k];
          finite_ &= term[t] - term[t] == 0;
        }
        const auto [weight, offset, slope, shift] = term;
        Acc* const to = terms_ + plan_.pools.data[k] * kPackedLanes + lane;
        if (is_first(plan_, k)) to[3 * size()] = -shift;
        to[0] += weight;
        to[size()] += offset + slope * (-to[3 * size()] - shift);
        to[2 * size()] += slope;
      }
    }
  }

  // Whether all terms are.
  bool finite() const { return finite_; }

  // What is sent at element `at` of a row. Without a slope deviations do not matter, even where
  // they are no numbers.
  METAPOOL_INLINE Vec<Acc> sent(const PoolItem& item, int64_t at, Vec<Acc> grads,
                                Vec<Acc> deviations) const {
    const Vec<Acc> slope = term_at(2, item, at);
    const Vec<Acc> sloping = slope != 0 ? slope * deviations : Vec<Acc>{};
    return term_at(0, item, at) * grads + term_at(1, item, at) + sloping;
  }
  // Makes of a dense packed row of deviations what is sent, where all is finite.
  void send(const PoolItem& item, const Acc* grads, int64_t size, Acc* row) const {
    for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<Acc>) {
      const Vec<Acc> weight = term_at(0, item, slot), offset = term_at(1, item, slot);
      const Vec<Acc> slope = term_at(2, item, slot);
      for (int64_t at = slot; at < size; at += kPackedLanes) {
        const Vec<Acc> field = weight * METAPOOL_ISA::load(grads + at) + offset;
        store(row + at, field + slope * METAPOOL_ISA::load(row + at));
      }
    }
  }
  METAPOOL_INLINE Vec<Acc> minus_shift(const PoolItem& item, int64_t at) const {
    return term_at(3, item, at);
  }
  // The [16] of a pooling.
  const Acc* minus_shifts(const PoolItem& item) const {
    return terms_ + 3 * size() + item.index * kPackedLanes;
  }

 private:
  METAPOOL_INLINE Vec<Acc> term_at(int term, const PoolItem& item, int64_t at) const {
    const int64_t lane = at & (kPackedLanes - 1);
    return METAPOOL_ISA::load(terms_ + term * size() + item.index * kPackedLanes + lane);
  }

  int64_t size() const { return plan_.num_pools * kPackedLanes; }

  const Plan& plan_;
  Acc* terms_ = nullptr;  // weights, offsets, slopes, minus shifts: [4][num_pools][16]
  bool finite_ = true;
};

}  // namespace metapool::cpu::METAPOOL_ISA

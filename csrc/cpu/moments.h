// Moments of pooled planes, and what their gradients send back.
#pragma once

#include "weights.h"

namespace metapool::cpu::METAPOOL_ISA {

// Of each pooling, over a task's rows of each of its planes: the mean and the sum of squared
// deviations from it; or, with another map, sums of that and of its products with deviations.
// Deviations are from what is near: the first value, then the mean of the chain before; or from
// given shifts. Where values vary little around a large mean, squares or products of the values
// themselves would leave nothing of that. A chain that is far from the next makes for as much
// variance by itself. Chains are put together in double.
template <typename Acc, int kLanes>
class Moments {
  // What is known of a pooling, in each of sixteen lanes.
  struct Sums {
    Acc shifts[kPackedLanes];       // what deviations are from
    double sums[2 * kPackedLanes];  // of deviations, unless products are taken, and of squares
    Acc centers[kPackedLanes];      // what those of the next chain are from
    bool begun;                     // whether shifts and centers are there
  };

  static constexpr int64_t kColumns = 2 * kChain;  // of a chain: a hand-over takes as long as some

 public:
  Moments(const Plan& plan, const ForwardArgs& args, Arena& arena) : plan_(plan), args_(args) {
    if (plan.form != Form::kMoments) return;
    pools_ = arena.take<Sums>(plan.num_pools + 1);
    if (has_other()) ones_ = arena.take_row<Acc>(plan.w_out * kLanes, 1);
  }

  void start(const Task& task) {
    fill_row(pools_, plan_.num_pools + 1, Sums{});
    for (int k = 0; k <= plan_.num_pools; ++k) pools_[k].begun = has_other();
    for (int lane = 0; has_other() && lane < kPackedLanes; ++lane) {
      const int64_t plane = task.plane + (lane < task.lanes ? lane : 0);
      const Acc* const from = weights_of_plane<Acc>(args_.shifts, plan_, plane);
      for (int k = 0; k < plan_.pools.count; ++k) {
        if (!is_first(plan_, k)) continue;  // the shifts of others are seen to in dispatch.cpp
        pools_[plan_.pools.data[k]].shifts[lane] = from[k * args_.shifts.stride_k];
      }
    }
  }

  // Adds the pixels of a dense packed row that are handed to it, see StoredRow. With kHasOther,
  // there is a dense row of another map.
  template <bool kHasOther>
  class Row {
   public:
    Row() = default;
    Row(Sums* pool, const Acc* other) : pool_(pool), other_(other) {}

    METAPOOL_INLINE void begin(int slot) {
      slot_ = slot;
      sum_ = product_ = Vec<Acc>{};
      center_ = load((kHasOther ? pool_->shifts : pool_->centers) + slot);
    }
    METAPOOL_INLINE void take(int64_t column, Vec<Acc> pooled) {
      if (!kHasOther && column == 0 && !pool_->begun) {
        center_ = pooled - pooled == 0 ? pooled : Vec<Acc>{};
        store(pool_->shifts + slot_, center_);
      }
      const Vec<Acc> deviation = pooled - center_;
      if constexpr (kHasOther) {
        product_ += deviation * load(other_ + column * kPackedLanes + slot_);
      } else {
        sum_ += deviation;
        product_ += deviation * deviation;
      }
      if ((column + 1) % kColumns == 0) hand_on(kColumns);
    }
    METAPOOL_INLINE void end(int64_t columns) {
      if (columns % kColumns != 0) hand_on(columns % kColumns);
      if constexpr (!kHasOther) store(pool_->centers + slot_, center_);
      pool_->begun |= slot_ + kVectorLanes<Acc> == kPackedLanes;
    }

   private:
    // Puts a chain together with those before it.
    METAPOOL_INLINE void hand_on(int64_t columns) {
      Sums& pool = *pool_;
      const auto values = static_cast<double>(columns);
      const auto add = [&](auto part) METAPOOL_LAMBDA {
        double* const to = pool.sums + slot_ + part * kVectorLanes<double>;
        Vec<double> product = widened<part>(product_);
        if constexpr (!kHasOther) {
          const Vec<double> sum = widened<part>(sum_);
          const Vec<double> apart =
              widened<part>(center_) - widened<part>(load(pool.shifts + slot_));
          product = (values * apart + 2 * sum) * apart + product;
          store(to, load(to) + (sum + values * apart));
        }
        store(to + kPackedLanes, load(to + kPackedLanes) + product);
      };
      add(Int<0>{});
      if constexpr (kVectorLanes<Acc> > kVectorLanes<double>) add(Int<1>{});
      if constexpr (!kHasOther) {
        const Vec<Acc> mean = center_ + sum_ * (Acc(1) / static_cast<Acc>(columns));
        center_ = mean - mean == 0 ? mean : center_;
      }
      sum_ = product_ = Vec<Acc>{};
    }

    Sums* pool_ = nullptr;
    const Acc* other_ = nullptr;
    int slot_ = 0;
    Vec<Acc> center_, sum_, product_;
  };

  // Of a pooling, in Row<kHasOther>.
  template <bool kHasOther>
  Row<kHasOther> row(const PoolItem& item, const Acc* other) const {
    return Row<kHasOther>(pools_ + item.index, other);
  }

  // Calls body(has_other) with that as a constant.
  template <typename Body>
  METAPOOL_INLINE void with_other(Body body) const {
    args_.other.data != nullptr ? body(Int<true>{}) : body(Int<false>{});
  }

  // Adds a pooled row from its first column on, with `step` pixels from output to output, and,
  // where there is another map, a dense row of that. Of one lane, sixteen outputs are as many
  // lanes, and what is left over is added by itself.
  void add_row(const PoolItem& item, const Acc* pooled, const Acc* other, int64_t step) {
    if (scouts() && !pools_[item.index].begun) {
      add(pools_[item.index], pooled, other, step);
      forget(item);
    }
    add(pools_[item.index], pooled, other, step);
  }

  // Adds a dense row of the other map to the sum of that: to its products with ones.
  void add_other(const Acc* other) { add(pools_[plan_.num_pools], ones_, other, 1); }

  // Whether the first row is to be added, forgotten but for its center, and added again: its first
  // value may be far from all others, and squares of large deviations would be rounded.
  bool scouts() const { return !has_other(); }
  void forget(const PoolItem& item) { fill_row(pools_[item.index].sums, 2 * kPackedLanes, 0.0); }

  // Hands over what the task has found: [lanes][num_pools][2].
  void finish(const Task& task, double* share) const {
    const auto count = static_cast<double>((task.row_end - task.row_begin) * plan_.w_out);
    for (int lane = 0; lane < task.lanes; ++lane) {
      for (int k = 0; k < plan_.num_pools; ++k) {
        const double products = sum_of(pools_[k].sums + kPackedLanes, lane);
        double* const found = share + 2 * (lane * plan_.num_pools + k);
        if (has_other()) {
          found[0] = sum_of(pools_[plan_.num_pools].sums + kPackedLanes, lane);
          found[1] = products;
          continue;
        }
        const double sum = sum_of(pools_[k].sums, lane);
        const double deviations = products - sum * sum / count;
        found[0] = static_cast<double>(pools_[k].shifts[lane]) + sum / count;
        found[1] = deviations < 0 ? 0 : deviations;
      }
    }
  }

 private:
  void add(Sums& pool, const Acc* pooled, const Acc* other, int64_t step) {
    if (kLanes == 1 && !pool.begun) {  // all lanes share one shift
      const Acc first = pooled[0] - pooled[0] == 0 ? pooled[0] : Acc(0);
      for (int lane = 0; lane < kPackedLanes; ++lane)
        pool.shifts[lane] = pool.centers[lane] = first;
      pool.begun = true;
    }
    const int64_t whole = kLanes > 1 ? plan_.w_out : step == 1 ? plan_.w_out / kPackedLanes : 0;
    with_other([&](auto has_other) METAPOOL_LAMBDA {
      Row<has_other> row(&pool, other);
      for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<Acc>) {
        row.begin(slot);
        for (int64_t column = 0; column < whole; ++column) {
          row.take(column, load(pooled + column * kPackedLanes * step + slot));
        }
        row.end(whole);
      }
    });
    for (int64_t output = whole * kPackedLanes; kLanes == 1 && output < plan_.w_out; ++output) {
      const double deviation =
          static_cast<double>(pooled[output * step]) - static_cast<double>(pool.shifts[0]);
      const double factor = has_other() ? static_cast<double>(other[output]) : deviation;
      pool.sums[0] += deviation;
      pool.sums[kPackedLanes] += deviation * factor;
    }
  }

  // Of a plane; where there is one, its outputs are in all of them.
  static double sum_of(const double* lanes, int lane) {
    double sum = lanes[lane];
    for (int slot = 1; kLanes == 1 && slot < kPackedLanes; ++slot) sum += lanes[slot];
    return sum;
  }

  bool has_other() const { return args_.other.data != nullptr; }

  const Plan& plan_;
  const ForwardArgs& args_;
  Sums* pools_ = nullptr;  // and behind them that of the other map
  Acc* ones_ = nullptr;
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
  // The same for a pooling on packed rows, where all is finite: first for some lanes, then for the
  // next.
  class Field {
   public:
    Field() = default;
    Field(const FieldTerms& terms, const PoolItem& item)
        : terms_(terms.terms_ + item.index * kPackedLanes), size_(terms.size()) {}

    METAPOOL_INLINE void begin(int slot) {
      for (int t = 0; t < 4; ++t) term_[t] = METAPOOL_ISA::load(terms_ + t * size_ + slot);
    }
    METAPOOL_INLINE Vec<Acc> sent(Vec<Acc> grads, Vec<Acc> pooled) const {
      const auto& [weight, offset, slope, minus_shift] = term_;
      return weight * grads + offset + slope * (pooled + minus_shift);
    }

   private:
    const Acc* terms_ = nullptr;
    int64_t size_ = 0;
    Vec<Acc> term_[4];
  };
  Field field(const PoolItem& item) const { return Field(*this, item); }

  // Stores a field along a dense packed row whose pixels are handed to it, see StoredRow.
  class SentRow {
   public:
    SentRow() = default;
    SentRow(Field field, const Acc* grads, Acc* out) : field_(field), grads_(grads), out_(out) {}

    METAPOOL_INLINE void begin(int slot) {
      slot_ = slot;
      field_.begin(slot);
    }
    METAPOOL_INLINE void take(int64_t column, Vec<Acc> pooled) {
      const int64_t at = column * kPackedLanes + slot_;
      store(out_ + at, field_.sent(METAPOOL_ISA::load(grads_ + at), pooled));
    }
    METAPOOL_INLINE void end(int64_t) {}

   private:
    Field field_;
    const Acc* grads_ = nullptr;
    Acc* out_ = nullptr;
    int slot_ = 0;
  };
  SentRow sent_row(const PoolItem& item, const Acc* grads, Acc* out) const {
    return SentRow(field(item), grads, out);
  }
  METAPOOL_INLINE Vec<Acc> minus_shift(const PoolItem& item, int64_t at) const {
    return term_at(3, item, at);
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

// One row of the output in one go, for small square windows at stride 1 on packed rows: columns are
// combined one by one, see streams.h, and pixels go where an epilogue puts them.
#pragma once

#include "streams.h"

namespace metapool::cpu::METAPOOL_ISA {

// What scales averages at the border where padding does not count: an average is scaled by the size
// of its own window, and so is what it sends back. So a forward scales outputs, and a backward the
// sources that it adds up.
enum class Scales : int { kNone, kOfOutputs, kOfSources };

// Takes the pixels of a row as they come, column by column, first for some lanes and then for the
// next, and keeps or adds them.
class StoredRow {
 public:
  StoredRow(float* out, int64_t pitch, bool adds) : out_(out), pitch_(pitch), adds_(adds) {}

  METAPOOL_INLINE void begin(int slot) { slot_ = slot; }
  METAPOOL_INLINE void take(int64_t column, Floats pixel) {
    float* const to = out_ + column * pitch_ + slot_;
    store(to, adds_ ? load(to) + pixel : pixel);
  }
  METAPOOL_INLINE void end(int64_t) {}

 private:
  float* out_;
  int64_t pitch_;  // elements from pixel to pixel
  bool adds_;
  int slot_ = 0;
};

// The products of a row of another map, see AverageRow: for each pooling the sixteen sums of the
// products of its sums along that row with the lines' sums down the columns. Over all rows, that is
// the product of the pooled other map with the map of the lines. What a row leaves of a chain of
// kChain products goes to the parts, all others to the products.
struct RowProducts {
  const float* other;
  float* parts[kStreamedRadius + 1];
  float* x_parts;
  double* products[kStreamedRadius + 1];
  double* x_products;
};

// What a row of averages is made of. Weights are those of the lanes; lines are those at distances
// -kStreamedRadius and on, from their first column; rows are dense.
struct AverageRow {
  const float* lines[2 * kStreamedRadius + 1];  // zeros beyond the map
  const float* weights[kStreamedRadius + 1];
  const float *x, *x_weights;  // of the identity, null where there is none
  const float* start;          // what is added to, for each lane; null for zeros
  int64_t columns;
  // Where padding does not count: BorderScales by radius, of columns and, in a backward, of rows
  // from the middle line on. They apply to so many columns at either end, and are one in between.
  const float* column_scales[kStreamedRadius + 1];
  const float* const* row_scales;
  int64_t border;
  const RowProducts* products;  // with kProducts
};

// Hands out the weighted identity + the weighted averages of radii kSet. Weights are finite: sums
// of all radii are weighted and added up before they are spread along the row, as a wider window
// covers what a narrower one does.
template <int kSet, Scales kScales, bool kProducts, typename Epilogue>
void stream_averages(const AverageRow& of, const Epilogue& epilogue_of) {
  const AverageRow row = of;  // whose members no store can change
  Epilogue epilogue = epilogue_of;
  constexpr int kRadius = largest_radius(kSet);
  const float* const other_row = kProducts ? row.products->other : nullptr;
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    const auto load_pixel = [&](const float* pixels, int64_t column) METAPOOL_LAMBDA {
      return load(pixels + column * kPackedLanes + slot);
    };
    epilogue.begin(slot);
    const Floats start = row.start == nullptr ? Floats{} : load(row.start + slot);
    Floats acc[2 * kRadius + 1];  // the outputs around the column that is added
    for (Floats& output : acc) output = start;
    Floats others[2 * kRadius + 1] = {};  // the other row's pixels there
    Floats parts[kRadius + 1] = {}, x_part{};
    const auto for_each_part = [&](auto body) METAPOOL_LAMBDA {
      const RowProducts& products = *row.products;
      if (row.x != nullptr) body(x_part, products.x_parts + slot, products.x_products + slot);
      for (int r = 1; r <= kRadius; ++r) {
        if (!contains(kSet, r)) continue;
        body(parts[r], products.parts[r] + slot, products.products[r] + slot);
      }
    };

    const auto push_other = [&](int64_t column) METAPOOL_LAMBDA {
      for (int i = 0; i < 2 * kRadius; ++i) others[i] = others[i + 1];
      others[2 * kRadius] = column < row.columns ? load_pixel(other_row, column) : Floats{};
    };
    const auto line = [&](int d, int64_t column) METAPOOL_LAMBDA {
      return load_pixel(row.lines[kStreamedRadius + d], column);
    };
    const auto scaled_sum = [&](int r, int64_t column) METAPOOL_LAMBDA {
      Floats sum{};
      for (int d = -r; d <= r; ++d) sum += line(d, column) * row.row_scales[r][d];
      return sum * row.column_scales[r][column];
    };
    const auto weight = [&](int r) METAPOOL_LAMBDA { return load(row.weights[r] + slot); };
    const auto spread = [&](const Floats* sums) METAPOOL_LAMBDA {
      Floats wider = weight(kRadius) * sums[kRadius];
      for (int r = kRadius; r >= 1; --r) {
        if (r < kRadius && contains(kSet, r)) wider = weight(r) * sums[r] + wider;
        acc[kRadius - r] += wider;
        acc[kRadius + r] += wider;
      }
      acc[kRadius] += wider;
    };
    // Scaled weights are numbers of ordinary size; a product of tiny ones would be rounded twice.
    const auto spread_scaled = [&](const Floats* sums, int64_t column) METAPOOL_LAMBDA {
      for (int r = 1; r <= kRadius; ++r) {
        if (!contains(kSet, r)) continue;
        for (int d = -r; d <= r; ++d) {
          acc[kRadius + d] += weight(r) * row.column_scales[r][column + d] * sums[r];
        }
      }
    };
    const auto add = [&](int64_t column, auto at_border) METAPOOL_LAMBDA {
      constexpr bool kScalesSums = at_border && kScales == Scales::kOfSources;
      if constexpr (kProducts) push_other(column + kRadius);
      Floats sum = line(0, column), other = others[kRadius];
      Floats sums[kRadius + 1];
      for (int r = 1; r <= kRadius; ++r) {
        sum += line(-r, column) + line(r, column);
        if constexpr (kProducts) other += others[kRadius - r] + others[kRadius + r];
        if (!contains(kSet, r)) continue;
        sums[r] = kScalesSums ? scaled_sum(r, column) : sum;
        if constexpr (kProducts) parts[r] += other * sums[r];
      }
      if constexpr (kRadius > 0) {
        at_border && !kScalesSums ? spread_scaled(sums, column) : spread(sums);
      }
      if (row.x != nullptr) {
        const Floats x = load_pixel(row.x, column);
        acc[kRadius] += load(row.x_weights + slot) * x;
        if constexpr (kProducts) x_part += x * others[kRadius];
      }
    };
    const auto finish = [&](int64_t column) METAPOOL_LAMBDA {
      if (column >= 0) epilogue.take(column, acc[0]);
      for (int i = 0; i < 2 * kRadius; ++i) acc[i] = acc[i + 1];
      acc[2 * kRadius] = start;
    };

    for (int64_t column = 0; kProducts && column < kRadius; ++column) push_other(column);
    int64_t next = 0;
    const auto stream_to = [&](int64_t end, auto at_border) METAPOOL_LAMBDA {
      for (; next < end; ++next) {
        add(next, at_border);
        finish(next - kRadius);
        if (kProducts && (next + 1) % kChain == 0) {
          for_each_part([](Floats& part, float*, double* sums)
                            METAPOOL_LAMBDA { hand_on(part, sums); });
        }
      }
    };
    if constexpr (kScales == Scales::kNone) {
      stream_to(row.columns, Int<false>{});
    } else {
      stream_to(row.border < row.columns ? row.border : row.columns, Int<true>{});
      stream_to(row.columns - row.border, Int<false>{});
      stream_to(row.columns, Int<true>{});
    }
    for (int64_t column = row.columns - kRadius; column < row.columns; ++column) finish(column);
    epilogue.end(row.columns);
    if constexpr (kProducts) {
      for_each_part([](Floats part, float* to, double*)
                        METAPOOL_LAMBDA { store(to, load(to) + part); });
    }
  }
}

// The same, scaled as kScales says only where that is wanted.
template <int kSet, Scales kScales, bool kProducts, typename Epilogue>
METAPOOL_INLINE void stream_averages_where(bool scaled, const AverageRow& row,
                                           const Epilogue& epilogue) {
  if constexpr (kSet != 0) {
    if (scaled) return stream_averages<kSet, kScales, kProducts>(row, epilogue);
  }
  stream_averages<kSet, Scales::kNone, kProducts>(row, epilogue);
}

// Along a row of what averages are sent: what they send back to its columns, where they are scaled
// by `scales` unless that is null. Added to that of `wider` ones, likewise, and put in its place.
template <int kRadius>
void spread_row(float* row, const float* wider, float weight, const float* scales,
                int64_t columns) {
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    SumStream<kRadius> sums;
    sums.reset();
    for (int64_t column = 0; column < columns + kRadius; ++column) {
      Floats sent{};
      if (column < columns) {
        sent = load(row + column * kPackedLanes + slot);
        if (scales != nullptr) sent *= scales[column];
      }
      const Floats sum = sums.push(sent) * weight;
      const int64_t at = (column - kRadius) * kPackedLanes + slot;
      if (column >= kRadius) store(row + at, wider == nullptr ? sum : sum + load(wider + at));
    }
  }
}

// Hands out the sum of rows: of one and, unless there is none, that of x.
template <int kRadius>
void sum_rows(const AverageRow& of, StoredRow to) {
  const AverageRow row = of;
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    to.begin(slot);
    for (int64_t column = 0; column < row.columns; ++column) {
      const auto line = [&](int d) METAPOOL_LAMBDA {
        return load(row.lines[kStreamedRadius + d] + column * kPackedLanes + slot);
      };
      Floats sum = line(0);
      for (int d = 1; d <= kRadius; ++d) sum += line(-d) + line(d);
      to.take(column, row.x == nullptr ? sum : sum + load(row.x + column * kPackedLanes + slot));
    }
  }
}

// What a row of maxima is made of.
struct MaximumRow {
  const float* lines[2 * kStreamedRadius + 1];  // the map's edge again beyond it; no NaN
  const float* weights[kStreamedRadius + 1];
  int64_t columns;
};

// Along a row, calls found(r, column, maximum) for the window of each radius of kSet around each
// column, and then passed(column): around that and those before it all have been found. Columns
// beyond the row may come up too.
template <int kSet, typename Found, typename Passed>
METAPOOL_INLINE void stream_windows(const MaximumRow& row, int slot, Found found, Passed passed) {
  constexpr int kRadius = largest_radius(kSet);
  const Maximum<false> larger;
  const Floats lowest = Floats{} - __builtin_inff();
  MaximaStream<1> first;
  MaximaStream<2> second;
  MaximaStream<3> third;
  first.reset();
  second.reset();
  third.reset();
  const auto push = [&](auto& stream, auto radius, int64_t column, Floats maximum) METAPOOL_LAMBDA {
    if constexpr (contains(kSet, radius)) {
      stream.push(maximum, [&](auto r, Floats window) METAPOOL_LAMBDA {
        if constexpr (r == radius) found(r, column - r, window);
      });
    }
  };
  for (int64_t column = 0; column < row.columns; ++column) {
    const auto line = [&](int distance) METAPOOL_LAMBDA {
      return load(row.lines[kStreamedRadius + distance] + column * kPackedLanes + slot);
    };
    Floats maximum = line(0);
    const auto extend = [&](int r) METAPOOL_LAMBDA {
      maximum = larger(maximum, larger(line(-r), line(r)));
    };
    extend(1);
    push(first, Int<1>{}, column, maximum);
    if constexpr (kRadius >= 2) extend(2);
    push(second, Int<2>{}, column, maximum);
    if constexpr (kRadius >= 3) extend(3);
    push(third, Int<3>{}, column, maximum);
    passed(column - kRadius);
  }
  for (int64_t column = row.columns; column < row.columns + kRadius; ++column) {
    push(first, Int<1>{}, column, lowest);
    push(second, Int<2>{}, column, lowest);
    push(third, Int<3>{}, column, lowest);
    passed(column - kRadius);
  }
}

// Hands out the weighted maxima of radii kSet together.
template <int kSet, typename Epilogue>
void stream_maxima(const MaximumRow& of, const Epilogue& epilogue_of) {
  const MaximumRow row = of;
  Epilogue epilogue = epilogue_of;
  constexpr int kRadius = largest_radius(kSet);
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    epilogue.begin(slot);
    Floats acc[kRadius + 1] = {};  // the outputs up to the column that is added
    stream_windows<kSet>(
        row, slot,
        [&](auto r, int64_t, Floats maximum)
            METAPOOL_LAMBDA { acc[kRadius - r] += load(row.weights[r] + slot) * maximum; },
        [&](int64_t column) METAPOOL_LAMBDA {
          if (column >= 0) epilogue.take(column, acc[0]);
          for (int i = 0; i < kRadius; ++i) acc[i] = acc[i + 1];
          acc[kRadius] = Floats{};
        });
    epilogue.end(row.columns);
  }
}

// Along a row, calls found(r, column, sum) for the window of each radius of kSet around each
// column. Columns beyond the row may come up too.
template <int kSet, typename Found>
METAPOOL_INLINE void stream_sums(const AverageRow& row, int slot, Found found) {
  constexpr int kRadius = largest_radius(kSet);
  SumStream<1> first;
  SumStream<2> second;
  SumStream<3> third;
  first.reset();
  second.reset();
  third.reset();
  const auto push = [&](auto& stream, auto radius, int64_t column, Floats sum) METAPOOL_LAMBDA {
    if constexpr (contains(kSet, radius)) found(radius, column - radius, stream.push(sum));
  };
  for (int64_t column = 0; column < row.columns; ++column) {
    const auto line = [&](int distance) METAPOOL_LAMBDA {
      return load(row.lines[kStreamedRadius + distance] + column * kPackedLanes + slot);
    };
    Floats sum = line(0) + (line(-1) + line(1));
    push(first, Int<1>{}, column, sum);
    if constexpr (kRadius >= 2) sum += line(-2) + line(2);
    push(second, Int<2>{}, column, sum);
    if constexpr (kRadius >= 3) sum += line(-3) + line(3);
    push(third, Int<3>{}, column, sum);
  }
  for (int64_t column = row.columns; column < row.columns + kRadius; ++column) {
    push(first, Int<1>{}, column, Floats{});
    push(second, Int<2>{}, column, Floats{});
    push(third, Int<3>{}, column, Floats{});
  }
}

// Hands each radius of kSet to an epilogue of its own: windows(slot, found) finds a row's windows
// for some lanes.
template <int kSet, typename Epilogue, typename Windows>
METAPOOL_INLINE void stream_each(int64_t columns, const Epilogue* epilogues_of, Windows windows) {
  Epilogue epilogues[kStreamedRadius + 1];
  const auto for_each = [&](auto body) METAPOOL_LAMBDA {
    for_each_up<kStreamedRadius + 1>([&](auto r) METAPOOL_LAMBDA {
      if constexpr (contains(kSet, r)) body(epilogues[r], r);
    });
  };
  for_each([&](Epilogue& epilogue, int r) METAPOOL_LAMBDA { epilogue = epilogues_of[r]; });
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    for_each([&](Epilogue& epilogue, int) METAPOOL_LAMBDA { epilogue.begin(slot); });
    windows(slot, [&](auto r, int64_t column, Floats pixel) METAPOOL_LAMBDA {
      if (column >= 0 && column < columns) epilogues[r].take(column, pixel);
    });
    for_each([&](Epilogue& epilogue, int) METAPOOL_LAMBDA { epilogue.end(columns); });
  }
}

// The weighted averages of each radius.
template <int kSet, typename Epilogue>
void stream_each_average(const AverageRow& of, const Epilogue* epilogues) {
  const AverageRow row = of;  // whose members no store can change
  stream_each<kSet>(row.columns, epilogues, [&](int slot, auto found) METAPOOL_LAMBDA {
    stream_sums<kSet>(row, slot, [&](auto r, int64_t column, Floats sum) METAPOOL_LAMBDA {
      found(r, column, sum * load(row.weights[r] + slot));
    });
  });
}

// The maxima of each radius.
template <int kSet, typename Epilogue>
void stream_each_maximum(const MaximumRow& of, const Epilogue* epilogues) {
  const MaximumRow row = of;
  stream_each<kSet>(row.columns, epilogues, [&](int slot, auto found) METAPOOL_LAMBDA {
    stream_windows<kSet>(row, slot, found, [](int64_t) METAPOOL_LAMBDA {});
  });
}

// The pixels of a row as they are.
template <typename Epilogue>
void stream_pixels(const float* row, int64_t columns, Epilogue epilogue) {
  for (int slot = 0; slot < kPackedLanes; slot += kVectorLanes<float>) {
    epilogue.begin(slot);
    for (int64_t column = 0; column < columns; ++column) {
      epilogue.take(column, load(row + column * kPackedLanes + slot));
    }
    epilogue.end(columns);
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA

// How the streamed kernels cut a map. A lane, one thread, owns kColumns neighbouring columns of a
// plane and streams down a strip of rows; the lanes of a block lie side by side, so that whole
// small planes share it. Lanes of wide planes are cut into tiles.
#pragma once

#include "maps.cuh"

namespace metapool::cuda {

// Square windows of 3, 5 and 7 are streamed: nothing that they see is farther away than that.
constexpr int kReach = 3;
// Rows are counted in 32 bits, with some to spare beyond the map.
constexpr int64_t kMostRows = 1 << 30;

// Which of the poolings there are, one slot for each: averages of radius 0 (which is the map
// itself) to 3, maxima of radius 1 to 3, and nothing.
constexpr int kAvgSlots = kReach + 1, kMaxSlots = kReach, kSlots = kAvgSlots + kMaxSlots + 1;
constexpr int kNoneSlot = kSlots - 1;

struct Slots {
  int candidate[kSlots];  // its number, or -1
};

// How many rows after its own a pooling is complete.
METAPOOL_INLINE constexpr int delay_of(int slot) {
  return slot == kNoneSlot ? 0 : slot < kAvgSlots ? slot : slot - kAvgSlots + 1;
}

METAPOOL_INLINE bool has_avg(const Slots& slots, int radius) {
  return slots.candidate[radius] >= 0;
}
METAPOOL_INLINE bool has_max(const Slots& slots, int radius) {
  return slots.candidate[kAvgSlots + radius - 1] >= 0;
}

template <typename A>
METAPOOL_INLINE A weight_of(const Weights<A>& weights, const Slots& slots, int slot, int64_t n,
                            int64_t c) {
  const int k = slots.candidate[slot];
  return k < 0 ? A(0) : weights.at(n, c, k);
}

// The cut of a map into blocks of lanes.
struct Cut {
  int planes;      // of a block
  int lanes;       // of a plane in a block
  int overlap;     // lanes that two tiles share on either side; 0 where there is one tile
  int64_t groups;  // of columns in a row
  unsigned tiles, strips, strip_rows;
  int64_t blocks;
  bool along_planes;  // neighbouring threads have neighbouring planes and not neighbouring columns
};

// Fewer blocks than this leave a large GPU idle, and strips of fewer rows repeat too many.
constexpr int64_t kWantedBlocks = 1024, kStripRows = 32;
// Keys number the rows of a strip, and have so many bits for it.
constexpr int64_t kMostStripRows = 2048;

// Neighbouring planes that share a block where neighbouring threads have them: fewer read too
// little of what memory hands out at once, more leave too few threads to a row of each.
constexpr int kFewestPlanes = 4;

inline Cut cut_of(const Sizes& sizes, int threads, int columns, int overlap, bool along_planes) {
  Cut cut;
  cut.groups = ceil_div(sizes.w, columns);
  cut.along_planes = along_planes;
  const int most_lanes = threads / (along_planes ? kFewestPlanes : 1);
  const bool fits = cut.groups <= most_lanes;
  cut.lanes = static_cast<int>(fits ? cut.groups : most_lanes);
  cut.overlap = fits ? 0 : overlap;
  const int64_t tiles = fits ? 1 : ceil_div(cut.groups - 2 * overlap, cut.lanes - 2 * overlap);
  const int64_t planes = sizes.n * sizes.c;
  cut.planes = threads / cut.lanes;
  if (along_planes && cut.planes >= 8) cut.planes = cut.planes / 8 * 8;  // whole sectors of memory
  const int64_t blocks = ceil_div(planes, cut.planes) * tiles;
  const int64_t most = ceil_div(sizes.h, kStripRows), wanted = ceil_div(kWantedBlocks, blocks);
  const int64_t fewest = ceil_div(sizes.h, kMostStripRows);
  const int64_t cuts = wanted > most ? most : wanted < fewest ? fewest : wanted;
  const int64_t strip_rows = ceil_div(sizes.h, cuts);
  const int64_t strips = ceil_div(sizes.h, strip_rows);
  cut.blocks = blocks * strips;
  cut.tiles = static_cast<unsigned>(tiles);
  cut.strips = static_cast<unsigned>(strips);
  cut.strip_rows = static_cast<unsigned>(strip_rows);
  return cut;
}

// What a thread stands for.
struct Lane {
  int64_t n, c, plane, group;
  int row_begin, row_end;
  int64_t part;  // among the tiles and strips of its plane
  int in_plane;  // the number of the lane in its plane, among those of the block
  int in_block;  // the number of the plane in the block
  bool is_on_map;
  bool is_owner;  // what it finds is not found by another tile
};

METAPOOL_DEVICE Lane lane_of(const Sizes& sizes, const Cut& cut) {
  Lane lane;
  const unsigned thread = threadIdx.x, lanes = cut.lanes, planes = cut.planes;
  const unsigned strip = blockIdx.x % cut.strips, behind = blockIdx.x / cut.strips;
  const unsigned tile = behind % cut.tiles;
  lane.in_block = static_cast<int>(cut.along_planes ? thread % planes : thread / lanes);
  lane.in_plane = static_cast<int>(cut.along_planes ? thread / planes : thread % lanes);
  lane.plane = static_cast<int64_t>(behind / cut.tiles) * cut.planes + lane.in_block;
  lane.group = static_cast<int64_t>(tile) * (cut.lanes - 2 * cut.overlap) + lane.in_plane;
  lane.is_on_map = lane.in_block < cut.planes && lane.in_plane < cut.lanes &&
                   lane.plane < sizes.n * sizes.c && lane.group < cut.groups;
  lane.is_owner = lane.is_on_map && (tile == 0 || lane.in_plane >= cut.overlap) &&
                  (tile == cut.tiles - 1 || lane.in_plane < cut.lanes - cut.overlap);
  if (!lane.is_on_map) lane.plane = 0;
  lane.n = lane.plane / sizes.c;
  lane.c = lane.plane % sizes.c;
  lane.row_begin = static_cast<int>(strip * cut.strip_rows);
  const int row_end = lane.row_begin + static_cast<int>(cut.strip_rows),
            h = static_cast<int>(sizes.h);
  lane.row_end = row_end < h ? row_end : h;
  lane.part = static_cast<int64_t>(tile) * cut.strips + strip;
  return lane;
}

// What was loaded of a row of a lane and of kMargin columns on either side of it, as it lies in
// memory: in pieces of all columns of a lane, or of one.
template <typename T, int kColumns, int kMargin, Access kAccess>
struct RawRow {
  static constexpr int kPiece = kAccess == Access::kVector ? kColumns : 1;
  static constexpr int kBefore = (kMargin + kPiece - 1) / kPiece;
  static constexpr int kPieces = 2 * kBefore + kColumns / kPiece;

  Packed<T, kPiece> pieces[kPieces];

  // The first column of a piece, of those that the row has with its margins.
  static METAPOOL_INLINE constexpr int first(int piece) {
    return kMargin + (piece - kBefore) * kPiece;
  }

  // The column of a piece that is nearest to the lane: it stands for all of them.
  static METAPOOL_INLINE constexpr int nearest(int piece) {
    return piece < kBefore ? first(piece) + kPiece - 1 : first(piece);
  }

  static METAPOOL_INLINE bool is_inside(unsigned inside, int column) {
    return inside >> nearest((column - first(0)) / kPiece) & 1;
  }
};

// Begins to load a row; `row` points to the first column of the lane, and `inside` has one bit for
// each column that is on the map. Whoever reads the result waits for it.
template <typename T, int kColumns, int kMargin, Access kAccess>
METAPOOL_INLINE void load_row(const T* row, int64_t stride_w, unsigned inside,
                              RawRow<T, kColumns, kMargin, kAccess>& to) {
  using Raw = RawRow<T, kColumns, kMargin, kAccess>;
  const int64_t step = kAccess == Access::kStrided ? stride_w : 1;
#pragma unroll
  for (int p = 0; p < Raw::kPieces; ++p) {
    load_or_zeros(row + (Raw::first(p) - kMargin) * step, inside >> Raw::nearest(p) & 1,
                  to.pieces[p]);
  }
}

// The columns of a row that was loaded, with zeros beyond the map.
template <typename T, int kColumns, int kMargin, Access kAccess>
METAPOOL_INLINE void widen_row(const RawRow<T, kColumns, kMargin, kAccess>& row,
                               float (&to)[kColumns + 2 * kMargin]) {
  using Raw = RawRow<T, kColumns, kMargin, kAccess>;
#pragma unroll
  for (int p = 0; p < Raw::kPieces; ++p) {
    float items[Raw::kPiece];
    widen(row.pieces[p], items);
#pragma unroll
    for (int i = 0; i < Raw::kPiece; ++i) {
      const int column = Raw::first(p) + i;
      if (column >= 0 && column < kColumns + 2 * kMargin) to[column] = items[i];
    }
  }
}

// Which of the columns that a lane reads are on the map, one bit each.
template <int kColumns, int kMargin>
METAPOOL_INLINE unsigned columns_inside(const Lane& lane, int64_t w) {
  constexpr int kWidth = kColumns + 2 * kMargin;
  if (!lane.is_on_map) return 0;
  const int64_t before = kMargin - lane.group * kColumns, behind = w + before;
  const int first = before > 0 ? static_cast<int>(before) : 0;
  const int last = behind < kWidth ? static_cast<int>(behind) : kWidth;
  return (1u << last) - (1u << first);
}

template <int kColumns, int kMargin, Access kAccess, typename T, typename A>
METAPOOL_INLINE void store_row(T* row, int64_t stride_w, unsigned inside,
                               const A (&from)[kColumns]) {
  if constexpr (kAccess == Access::kVector) {
    Vector<T, kColumns> written;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) narrow(from[i], written.items[i]);
    *reinterpret_cast<Vector<T, kColumns>*>(row) = written;
  } else {
    const int64_t step = kAccess == Access::kDense ? 1 : stride_w;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (inside >> (kMargin + i) & 1) narrow(from[i], row[i * step]);
    }
  }
}

// The ring without its oldest item, and with a new one.
template <typename A, int kLength>
METAPOOL_INLINE void push(A (&ring)[kLength], A item) {
#pragma unroll
  for (int i = 0; i + 1 < kLength; ++i) ring[i] = ring[i + 1];
  ring[kLength - 1] = item;
}

// How the columns of a map can be read by vectors of so many of them, or otherwise.
template <typename T>
Access access_of(const Map<T>& map, int64_t w, int columns) {
  if (map.stride_w != 1) return Access::kStrided;
  const bool is_aligned = w % columns == 0 && map.stride_h % columns == 0 &&
                          map.stride_c % columns == 0 && map.stride_n % columns == 0 &&
                          reinterpret_cast<uintptr_t>(map.data) % (columns * sizeof(T)) == 0;
  return is_aligned ? Access::kVector : Access::kDense;
}

// What suits two maps: columns in any place can be read as those that lie apart.
inline Access common(Access left, Access right) { return left > right ? left : right; }

}  // namespace metapool::cuda

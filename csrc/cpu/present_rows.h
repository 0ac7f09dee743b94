// Which rows the blocks of a layer do where rows lack modalities.
#pragma once

#include <cstring>

#include "lanes.h"
#include "tasks.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Rows in groups: which rows each has, one group after the other.
class RowGroups {
 public:
  // `group_of(k)`, in [0, groups), of k in [0, count); its row is number(k, group).
  template <class GroupOf, class Number>
  RowGroups(int64_t groups, int64_t count, GroupOf group_of, Number number) : begin_(groups + 1), rows_(count) {
    for (int64_t g = 0; g <= groups; ++g) begin_.get()[g] = 0;
    for (int64_t k = 0; k < count; ++k) ++begin_.get()[group_of(k) + 1];
    for (int64_t g = 0; g < groups; ++g) begin_.get()[g + 1] += begin_.get()[g];
    Scratch<int64_t> next(groups);
    std::memcpy(next.get(), begin_.get(), sizeof(int64_t) * groups);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t g = group_of(k);
      rows_.get()[next.get()[g]++] = number(k, g);
    }
  }
  const int64_t* rows(int64_t g) const { return rows_.get() + begin_.get()[g]; }
  int64_t size(int64_t g) const { return begin_.get()[g + 1] - begin_.get()[g]; }

 private:
  const Scratch<int64_t> begin_, rows_;
};

// The rows of each of a layer's blocks, in order: of a cell those that have its modality, of the fuse step, block
// `modalities`, those that have any.
class PresentRows {
 public:
  // `present`: (modalities, rows), or null where all are.
  PresentRows(const bool* present, int64_t modalities, int64_t rows)
      : present_(present),
        n_(modalities),
        total_(rows),
        groups_(
            present ? n_ + 2 : 0, present ? (n_ + 1) * rows : 0,
            [&](int64_t k) { return has(k / rows, k % rows) ? k / rows : n_ + 1; },
            [&](int64_t k, int64_t g) { return g <= n_ ? k % rows : k; }) {}

  bool has(int64_t block, int64_t row) const {
    if (present_ == nullptr) return true;
    return block < n_ ? present_[block * total_ + row] : first(row) < n_;
  }
  // The first modality of a row that has any.
  int64_t first(int64_t row) const {
    int64_t i = 0;
    while (present_ && i < n_ && !present_[i * total_ + row]) ++i;
    return i;
  }
  int64_t total() const { return total_; }
  int64_t size(int64_t block) const { return present_ ? groups_.size(block) : total_; }
  int64_t row(int64_t block, int64_t k) const { return present_ ? groups_.rows(block)[k] : k; }
  // How many of the begin-th to the one before the end-th it has.
  int64_t size(int64_t block, int64_t begin, int64_t end) const {
    const int64_t all = size(block), last = end < all ? end : all;
    return last > begin ? last - begin : 0;
  }
  // The k-th and the following in lanes, `count` of them.
  template <int R>
  LaneRows<R> lanes(int64_t block, int64_t k, int64_t count) const {
    LaneRows<R> out = lane_rows<R>(k, int(count < R ? count : R));
    for (int64_t& r : out.row) r = r < 0 ? r : row(block, r);
    return out;
  }

  // body(block, row) for what is left out.
  template <class Body>
  void for_absent(int threads, ParallelFor parallel, Body body) const {
    if (present_ == nullptr) return;
    for_rows(groups_.size(n_ + 1), threads, parallel, [&](int64_t k) {
      const int64_t at = groups_.rows(n_ + 1)[k];
      body(at / total_, at % total_);
    });
  }

 private:
  const bool* const present_;
  const int64_t n_, total_;
  const RowGroups groups_;
};

// body(block, tile, rows of the tile) for the tiles of R rows among the [begin, end) of each block in
// [first, first + count); blocks and tiles are counted from zero.
template <int R, class Body>
void run_tiles(const PresentRows& rows, int64_t first, int64_t count, int64_t begin, int64_t end, int threads,
               ParallelFor parallel, Body body) {
  const auto tiles_of = [&](int64_t block) { return tiles<R>(rows.size(first + block, begin, end)); };
  int64_t tasks = 0;
  for (int64_t block = 0; block < count; ++block) tasks += tiles_of(block);
  run_tasks(tasks, threads, parallel, [&](int64_t t) {
    int64_t block = 0;
    for (int64_t own; t >= (own = tiles_of(block)); ++block) t -= own;
    const int64_t left = rows.size(first + block, begin + t * R, end);
    body(block, t, rows.lanes<R>(first + block, begin + t * R, left));
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse

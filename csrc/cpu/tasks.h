// Scratch memory, and how work is cut up and shared over threads.
#pragma once

#include "kernels.h"
#include "memory.h"
#include "vec.h"
#ifdef DEQFUSE_AMX
#include "amx.h"
#endif

namespace deqfuse {
namespace DEQFUSE_ISA {

#ifndef DEQFUSE_AMX
struct MatrixUnit {};  // none to hold
#endif

// Scratch memory, aligned for vectors, given back with the call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(sizeof(T) * size_t(count)), p_(static_cast<T*>(take_memory(bytes_))) {}
  ~Scratch() { give_memory(p_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return p_; }

 private:
  const size_t bytes_;
  T* const p_;
};

// Tasks are taken one by one by whoever is free: chunks of rows that iterate longer delay nobody.
template <class Body>
void run_tasks(int64_t count, int threads, ParallelFor parallel, Body body) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count;
    Body* body;
  } context;
  if (count == 0) return;
  context.count = count;
  context.body = &body;
  parallel(threads < count ? threads : count,
           [](int64_t, void* p) {
             [[maybe_unused]] const MatrixUnit unit;
             auto* c = static_cast<Context*>(p);
             for (int64_t i; (i = c->next++) < c->count;) (*c->body)(i);
           },
           &context);
}

// Tiles of R rows.
template <int R>
constexpr int64_t tiles(int64_t rows) {
  return (rows + R - 1) / R;
}

// `total` rows in at most `wanted` chunks of whole tiles.
struct Chunks {
  int64_t total, count, rows;
  Chunks(int64_t all, int width, int64_t wanted) : total(all) {
    const int64_t tiles = (total + width - 1) / width;
    count = wanted < tiles ? wanted : tiles;
    rows = count > 0 ? (tiles + count - 1) / count * width : 0;
    count = rows > 0 ? (total + rows - 1) / rows : 0;
  }
  int64_t end(int64_t begin) const { return begin + rows < total ? begin + rows : total; }
};

// Rows of a batch in pieces, whatever the number of threads: sums over pieces must not depend on it.
constexpr int64_t kPiece = 64;

// body(row) for all rows.
template <class Body>
void for_rows(int64_t rows, int threads, ParallelFor parallel, Body body) {
  run_tasks((rows + kPiece - 1) / kPiece, threads, parallel, [&](int64_t t) {
    const int64_t end = (t + 1) * kPiece < rows ? (t + 1) * kPiece : rows;
    for (int64_t r = t * kPiece; r < end; ++r) body(r);
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse

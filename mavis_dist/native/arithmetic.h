// What a forward pass is made of: vectors of floats, products with packed weights, threads that meet.
//
// Every sum runs in an order that depends on its length alone. A row's result is thus the same to the last bit whatever
// the number of rows, threads, and slots.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <type_traits>

namespace mavis {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kWidth = Vec::size();
constexpr int64_t kPair = 2 * kWidth;  // as many bfloat16 numbers as a register holds
constexpr int64_t kMaxWidth = 64;      // columns of the widest panel
constexpr int64_t kMaxRows = 64;       // of one call of the kernel, which is compiled for each number of rows

struct Pair {
  Vec first, second;
};

template <typename T>
Pair load_pair(const T* from) {
  Pair pair;
  if constexpr (std::is_same_v<T, float>) {
    pair.first = Vec::loadu(from), pair.second = Vec::loadu(from + kWidth);
  } else {
    at::vec::load_to_float<T>(from, pair.first, pair.second);
  }
  return pair;
}

template <typename T>
void store_pair(T* to, const Vec& first, const Vec& second) {
  if constexpr (std::is_same_v<T, float>) {
    first.store(to), second.store(to + kWidth);
  } else {
    at::vec::convert_from_float<T>(first, second).store(to);
  }
}

inline float reduce_sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

inline float reduce_max(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, v);
}

// One of several threads that share a piece of work.
struct Share {
  int64_t thread, threads;
  int64_t begin(int64_t count) const { return count * thread / threads; }
  int64_t end(int64_t count) const { return count * (thread + 1) / threads; }
};

// Threads wait for each other. They spin for some microseconds, since waking a thread takes longer than a small product,
// and then sleep, since on shared cores the one that they wait for may need theirs.
class Barrier {
 public:
  void wait(int64_t threads) {
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int i = 0; i < kSpins; ++i) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 2000;
  std::atomic<int64_t> arrived_{0};
  std::atomic<int> phase_{0};
};

// A weight [outputs, inputs] as panels of `width` columns, each [inputs, width], in bfloat16 [inputs / 2, width, 2]:
// in the order in which the kernel reads them. The last panel may be filled up.
struct Linear {
  const void* data;
  const float* bias;  // nullptr: none
  int64_t inputs, outputs, width;
  int64_t columns, stride;  // from one input to the next, and from one panel to the next

  int64_t panels() const { return (outputs + width - 1) / width; }

  template <typename T>
  const T* panel(int64_t p) const {
    return static_cast<const T*>(data) + p * stride;
  }
};

// x [rows, inputs] times a weight, this thread's panels of it: calls use(panel, first row, rows, tile), where the tile
// is [rows, width] without bias.
template <typename T, typename Use>
void multiply(const T* x, int64_t rows, const Linear& w, Share share, float* tile, Use use) {
  constexpr bool kIsPairwise = !std::is_same_v<T, float>;
  for (int64_t p = share.begin(w.panels()); p < share.end(w.panels()); ++p) {
    for (int64_t row = 0; row < rows; row += kMaxRows) {
      const int64_t count = std::min(kMaxRows, rows - row);
      at::native::cpublas::brgemm(count, w.width, w.inputs, w.inputs, w.columns, w.width, false, x + row * w.inputs,
                                  w.panel<T>(p), tile, kIsPairwise);
      use(p, row, count, tile);
    }
  }
}

// As `multiply`, the results with bias as rows of `to` [rows, outputs].
template <typename T>
void apply(const T* x, int64_t rows, const Linear& w, Share share, float* tile, T* to, const T* residual = nullptr) {
  multiply<T>(x, rows, w, share, tile, [&](int64_t panel, int64_t row, int64_t count, const float* from) {
    const int64_t column = panel * w.width, columns = std::min(w.width, w.outputs - column);
    for (int64_t r = 0; r < count; ++r, from += w.width) {
      const int64_t at = (row + r) * w.outputs + column;
      int64_t c = 0;
      for (; c + kPair <= columns; c += kPair) {
        auto [first, second] = load_pair<float>(from + c);
        if (w.bias) {
          const auto bias = load_pair<float>(w.bias + column + c);
          first = first + bias.first, second = second + bias.second;
        }
        if (residual) {
          const auto old = load_pair<T>(residual + at + c);
          first = first + old.first, second = second + old.second;
        }
        store_pair<T>(to + at + c, first, second);
      }
      for (; c < columns; ++c) {
        to[at + c] = from[c] + (w.bias ? w.bias[column + c] : 0.f) + (residual ? float(residual[at + c]) : 0.f);
      }
    }
  });
}

// Root mean square normalisation of one row.
template <typename T>
void normalise(const T* x, T* y, int64_t size, const float* weight, float epsilon) {
  Vec squares(0.f);
  for (int64_t c = 0; c < size; c += kPair) {
    const auto [first, second] = load_pair<T>(x + c);
    squares = at::vec::fmadd(first, first, squares);
    squares = at::vec::fmadd(second, second, squares);
  }
  const Vec scale(1.f / std::sqrt(reduce_sum(squares) / static_cast<float>(size) + epsilon));
  for (int64_t c = 0; c < size; c += kPair) {
    const auto [first, second] = load_pair<T>(x + c);
    const auto w = load_pair<float>(weight + c);
    store_pair<T>(y + c, first * scale * w.first, second * scale * w.second);
  }
}

// Rotary position embedding of one head, halves convention; `angles` holds cosines, then sines, of half its size each.
template <typename T>
void rotate(T* head, int64_t half, const float* angles) {
  for (int64_t c = 0; c < half; c += kWidth) {
    Vec first, second;
    if constexpr (std::is_same_v<T, float>) {
      first = Vec::loadu(head + c), second = Vec::loadu(head + half + c);
    } else {
      at::vec::load_to_float<T>(head + c, first), at::vec::load_to_float<T>(head + half + c, second);
    }
    const Vec cos = Vec::loadu(angles + c), sin = Vec::loadu(angles + half + c);
    const Vec x = first * cos - second * sin, y = second * cos + first * sin;
    if constexpr (std::is_same_v<T, float>) {
      x.store(head + c), y.store(head + half + c);
    } else {
      at::vec::convert_from_float<T>(x, x).store(head + c, kWidth);
      at::vec::convert_from_float<T>(y, y).store(head + half + c, kWidth);
    }
  }
}

}  // namespace mavis

// The k largest of every row of logits, without sorting the vocabulary.
//
// Shapes: B rows, V vocabulary.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "arithmetic.h"

namespace mavis {
namespace {

constexpr int64_t kChunk = 4 * kPair;

struct Entry {
  float logit;
  int64_t id;
};

// Not a number counts as largest, so that it is not overlooked.
float key(float logit) { return std::isnan(logit) ? std::numeric_limits<float>::infinity() : logit; }

template <typename T>
float largest_of(const T* x, int64_t count) {
  if (count == kChunk) {
    auto [first, second] = load_pair<T>(x);
    for (int64_t c = kPair; c < kChunk; c += kPair) {
      const auto more = load_pair<T>(x + c);
      first = at::vec::maximum(first, more.first), second = at::vec::maximum(second, more.second);
    }
    return key(reduce_max(at::vec::maximum(first, second)));
  }
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < count; ++c) top = std::max(top, key(x[c]));
  return top;
}

// At least k numbers are no smaller than the k-th largest of the chunks' maxima: only chunks that reach it are searched.
template <typename T>
void largest_in_row(const T* x, int64_t size, int64_t k, float* logits, int64_t* ids) {
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<float> tops(chunks);
  for (int64_t i = 0; i < chunks; ++i) tops[i] = largest_of<T>(x + i * kChunk, std::min(kChunk, size - i * kChunk));
  float least = -std::numeric_limits<float>::infinity();
  if (chunks > k) {
    std::vector<float> sorted = tops;
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
    least = sorted[k - 1];
  }
  std::vector<Entry> entries;
  for (int64_t i = 0; i < chunks; ++i) {
    if (tops[i] < least) continue;
    for (int64_t id = i * kChunk; id < std::min(size, (i + 1) * kChunk); ++id) {
      if (key(x[id]) >= least) entries.push_back({x[id], id});
    }
  }
  std::partial_sort(entries.begin(), entries.begin() + k, entries.end(), [](const Entry& a, const Entry& b) {
    return key(a.logit) != key(b.logit) ? key(a.logit) > key(b.logit) : a.id < b.id;
  });
  for (int64_t i = 0; i < k; ++i) logits[i] = entries[i].logit, ids[i] = entries[i].id;
}

}  // namespace

// Logits [B, k] in float32 and ids [B, k] of logits [B, V], largest first, equal ones in the order of ids.
std::tuple<at::Tensor, at::Tensor> largest(const at::Tensor& logits_BV, int64_t k) {
  TORCH_CHECK_VALUE(logits_BV.is_contiguous() && k <= logits_BV.size(1), "logits must be contiguous, k at most their number");
  const int64_t rows = logits_BV.size(0), size = logits_BV.size(1);
  at::Tensor logits = at::empty({rows, k}, logits_BV.options().dtype(at::kFloat));
  at::Tensor ids = at::empty({rows, k}, logits_BV.options().dtype(at::kLong));
  const auto search = [&](auto* from) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        largest_in_row(from + b * size, size, k, logits.data_ptr<float>() + b * k, ids.data_ptr<int64_t>() + b * k);
      }
    });
  };
  if (logits_BV.scalar_type() == at::kFloat) {
    search(logits_BV.data_ptr<float>());
  } else {
    search(logits_BV.data_ptr<at::BFloat16>());
  }
  return {logits, ids};
}

TORCH_LIBRARY_FRAGMENT(mavis, library) { library.def("largest", largest); }

}  // namespace mavis

// A whole forward pass of decoders of Llama's family over their slot caches, as one operator.
//
// The threads run through all layers together and meet only where one needs what another computed: nothing is allocated,
// dispatched, or woken in between. Products are those of oneDNN's micro-kernel, as torch exports it.
//
// Shapes: N tokens of all rows, concatenated, R read tokens, C channels, H heads, K key-value heads, D head size,
// F hidden channels of the feed-forward part, V vocabulary, M value heads, P positions.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <omp.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "arithmetic.h"

namespace mavis {

using at::Tensor;
using c10::intrusive_ptr;

constexpr int64_t kQueries = 16;  // of one slot and key head, that share a pass over the keys
constexpr int64_t kMixed = 4;     // of them, that share a pass over the values
constexpr int64_t kCells = 32;    // whose scores are computed in one call of the kernel

// A packed weight [P, K / E, W, E], whose columns may be some of a wider panel's.
Linear as_linear(const Tensor& packed, const float* bias, int64_t outputs) {
  return {packed.data_ptr(), bias, packed.size(1) * packed.size(3), outputs, packed.size(2),
          packed.stride(1) / packed.size(3), packed.stride(0)};
}

struct Layer {
  Linear qkv, out, gate_up, down;
  const float *norm_1, *norm_2, *query_norm, *key_norm;  // query and key norm: nullptr where there is none
  bool rotates;
};

// The weights of one model, in the order in which they are read.
struct Model : torch::CustomClassHolder {
  int64_t heads, kv_heads, head_size;
  double epsilon, scaling;
  Tensor embedding, norm;  // the embedding is [V, C], or packed
  std::vector<Layer> layers;
  Linear head{};                    // logits; no outputs: none
  Tensor value_weight, value_bias;  // [M, C] and [M], float32; undefined: none
  int64_t state_layer = 0;          // layers behind the states that are read beside the head's outputs; 0: none
  std::vector<Tensor> kept;         // owns what the pointers above point to

  Model(int64_t heads, int64_t kv_heads, int64_t head_size, double epsilon, double scaling, Tensor embedding, Tensor norm)
      : heads(heads), kv_heads(kv_heads), head_size(head_size), epsilon(epsilon), scaling(scaling),
        embedding(std::move(embedding)), norm(norm.to(at::kFloat).contiguous()) {}

  int64_t channels() const { return norm.size(0); }
  int64_t vocabulary() const { return embedding.size(0) * (embedding.dim() == 2 ? 1 : embedding.size(2)); }
  int64_t hidden() const { return layers[0].down.inputs; }
  int64_t projected() const { return (heads + 2 * kv_heads) * head_size; }

  Linear linear(const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
    kept.push_back(packed);
    return as_linear(packed, numbers(bias), outputs);
  }

  const float* numbers(const std::optional<Tensor>& vector) {
    if (!vector) return nullptr;
    kept.push_back(vector->to(at::kFloat).contiguous());
    return kept.back().data_ptr<float>();
  }

  // Weights of q, k and v as one; out; gate and up, whose panels hold as many columns of each; down.
  void add_layer(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                 const std::vector<std::optional<Tensor>>& norms, bool rotates) {
    const int64_t F = weights[3].size(1) * weights[3].size(3);
    layers.push_back({linear(weights[0], biases[0], projected()), linear(weights[1], biases[1], channels()),
                      linear(weights[2], biases[2], 2 * F), linear(weights[3], biases[3], channels()), numbers(norms[0]),
                      numbers(norms[1]), numbers(norms[2]), numbers(norms[3]), rotates});
  }

  void set_head(const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
    head = linear(packed, bias, outputs);
  }

  void set_values(Tensor weight, Tensor bias) { value_weight = std::move(weight), value_bias = std::move(bias); }

  void set_state_layer(int64_t layer) { state_layer = layer; }
};

// One query of attention: it sees the first `visible` cells of its slot, and a cell of its own.
template <typename T>
struct Query {
  const T* head;
  T* mixed;
  int64_t visible, own;
};

// What a thread writes between two steps of attention.
template <typename T>
struct Scratch {
  std::vector<T> packed;                // queries, as a packed weight [D / E, kQueries, E]
  std::vector<float> products, scores;  // [cells, kQueries] and [kQueries, cells]
};

// Scores [kQueries, length] of all cells that any of the queries sees, followed in each row by the one of its own cell.
// All sizes but the number of cells are fixed: how a score is summed does not depend on what else is computed.
template <typename T, int D>
void score(const std::vector<Query<T>>& queries, const T* keys, int64_t stride, int64_t cells, int64_t most, float scaling,
           Scratch<T>& scratch, int64_t length) {
  constexpr bool kIsPairwise = !std::is_same_v<T, float>;
  constexpr int64_t kTogether = kIsPairwise ? 2 : 1;
  for (size_t i = 0; i < queries.size(); ++i) {
    for (int64_t d = 0; d < D; ++d) {
      scratch.packed[(d / kTogether * kQueries + i) * kTogether + d % kTogether] = queries[i].head[d];
    }
  }
  const auto multiply = [&](const T* from, int64_t count, float* to) {
    at::native::cpublas::brgemm(count, kQueries, D, stride, kQueries, kQueries, false, from, scratch.packed.data(), to,
                                kIsPairwise);
  };
  for (int64_t s = 0; s < most; s += kCells) {
    multiply(keys + s * stride, std::min(kCells, cells - s), scratch.products.data() + s * kQueries);
  }
  for (size_t i = 0; i < queries.size(); ++i) {
    float* const to = scratch.scores.data() + i * length;
    for (int64_t s = 0; s < queries[i].visible; ++s) to[s] = scratch.products[s * kQueries + i] * scaling;
    float own[kQueries];
    multiply(keys + queries[i].own * stride, 1, own);
    to[queries[i].visible] = own[i] * scaling;
  }
}

// Scores of a query -> weights that do not sum to 1 yet; returns their sum.
inline float exponentiate(float* p, int64_t count) {
  const int64_t end = (count + kWidth - 1) / kWidth * kWidth;
  std::fill(p + count, p + end, -std::numeric_limits<float>::infinity());
  Vec top = Vec::loadu(p);
  for (int64_t s = kWidth; s < end; s += kWidth) top = at::vec::maximum(top, Vec::loadu(p + s));
  const Vec shift(reduce_max(top));
  Vec total(0.f);
  for (int64_t s = 0; s < end; s += kWidth) {
    const Vec weight = (Vec::loadu(p + s) - shift).exp_u20();
    weight.store(p + s);
    total = total + weight;
  }
  return reduce_sum(total);
}

// The weighted mean of the values that `Count` queries see.
template <typename T, int D, int Count>
void mix(const Query<T>* queries, const float* scores, int64_t length, const float* totals, const T* values, int64_t stride) {
  constexpr int64_t kParts = D / kWidth;
  int64_t least = queries[0].visible, most = least;
  Vec mean[Count][kParts];
  for (int i = 0; i < Count; ++i) {
    least = std::min(least, queries[i].visible), most = std::max(most, queries[i].visible);
    for (int64_t c = 0; c < kParts; ++c) mean[i][c] = Vec(0.f);
  }
  const auto add = [&](const T* value, float weight, int i) {
    for (int64_t c = 0; c < kParts; c += 2) {
      const auto [first, second] = load_pair<T>(value + c * kWidth);
      mean[i][c] = at::vec::fmadd(Vec(weight), first, mean[i][c]);
      mean[i][c + 1] = at::vec::fmadd(Vec(weight), second, mean[i][c + 1]);
    }
  };
  for (int64_t s = 0; s < least; ++s) {
    for (int i = 0; i < Count; ++i) add(values + s * stride, scores[i * length + s], i);
  }
  for (int64_t s = least; s < most; ++s) {
    for (int i = 0; i < Count; ++i) {
      if (s < queries[i].visible) add(values + s * stride, scores[i * length + s], i);
    }
  }
  for (int i = 0; i < Count; ++i) {
    add(values + queries[i].own * stride, scores[i * length + queries[i].visible], i);
    const Vec scale(1.f / totals[i]);
    for (int64_t c = 0; c < kParts; c += 2) {
      store_pair<T>(queries[i].mixed + c * kWidth, mean[i][c] * scale, mean[i][c + 1] * scale);
    }
  }
}

template <typename T, int D, typename... Arguments>
void mix(int64_t count, Arguments... arguments) {
  switch (count) {
    case 1: return mix<T, D, 1>(arguments...);
    case 2: return mix<T, D, 2>(arguments...);
    case 3: return mix<T, D, 3>(arguments...);
    default: return mix<T, D, 4>(arguments...);
  }
}

// Attention of up to `kQueries` queries of one slot and key head. Neighbouring cells are `stride` numbers apart.
template <typename T, int D>
void attend(const std::vector<Query<T>>& queries, const T* keys, const T* values, int64_t stride, int64_t cells,
            float scaling, Scratch<T>& scratch) {
  int64_t most = 0;
  for (const auto& query : queries) most = std::max(most, query.visible);
  const int64_t length = most + 1 + kWidth;
  scratch.packed.assign(D * kQueries, T(0));
  scratch.products.resize((most + kCells) * kQueries);
  scratch.scores.resize(length * kQueries);
  score<T, D>(queries, keys, stride, cells, most, scaling, scratch, length);
  for (size_t i = 0; i < queries.size(); i += kMixed) {
    const int64_t count = std::min<int64_t>(kMixed, queries.size() - i);
    float* const scores = scratch.scores.data() + i * length;
    float totals[kMixed];
    for (int64_t j = 0; j < count; ++j) totals[j] = exponentiate(scores + j * length, queries[i + j].visible + 1);
    mix<T, D>(count, queries.data() + i, scores, length, totals, values, stride);
  }
}

// One model's part of a call.
template <typename T>
class Pass {
 public:
  // `step` holds tokens, positions, cells and slots [4, N]; `cache` is [layers, 2, slots, cells, K, D]; `angles` are
  // [P, 2, D / 2], cosines before sines.
  Pass(const Model& model, const Tensor& step, const Tensor& read, const Tensor& cache, const Tensor& angles)
      : m_(model), num_tokens_(step.size(1)), num_read_(read.size(0)), num_cells_(cache.size(3)),
        tokens_(step.data_ptr<int64_t>()), positions_(tokens_ + num_tokens_), cells_(positions_ + num_tokens_),
        slots_(cells_ + num_tokens_), read_(read.data_ptr<int64_t>()), cache_(cache), angles_(angles) {
    const int64_t N = num_tokens_, C = m_.channels();
    const auto options = cache.options();
    // Runs of tokens of one slot, whose queries share a pass over its keys.
    const int64_t most = std::max<int64_t>(1, kQueries * m_.kv_heads / m_.heads);
    for (int64_t n = 0; n < N; ++n) {
      TORCH_CHECK_INDEX(tokens_[n] >= 0 && tokens_[n] < m_.vocabulary() && positions_[n] < angles.size(0) &&
                        cells_[n] < num_cells_ && slots_[n] < cache.size(2), "a token, position, cell or slot is out of range");
      if (n == 0 || slots_[n] != slots_[n - 1] || n - runs_.back() == most) runs_.push_back(n);
    }
    runs_.push_back(N);
    x_ = at::empty({N, C}, options), y_ = at::empty({N, C}, options);
    qkv_ = at::empty({N, m_.projected()}, options), mixed_ = at::empty({N, m_.heads * m_.head_size}, options);
    hidden_ = at::empty({N, m_.hidden()}, options);
    if (m_.head.outputs) {
      out_ = at::empty({num_read_, m_.head.outputs}, options);
    } else if (m_.value_weight.defined()) {
      out_ = at::empty({num_read_, m_.value_weight.size(0)}, options.dtype(at::kFloat));
    } else {
      out_ = at::empty({num_read_, C}, options);
    }
    if (m_.state_layer) states_ = at::empty({num_read_, C}, options);
  }

  Tensor out() const { return out_; }
  Tensor states() const { return states_; }

  void run(Share share, Barrier& barrier) {
    std::vector<float> tile(kMaxRows * kMaxWidth);
    Scratch<T> scratch;
    each(share, num_tokens_, [&](int64_t n) { embed(tokens_[n], data(x_) + n * m_.channels()); });
    for (size_t l = 0; l < m_.layers.size(); ++l) {
      const Layer& layer = m_.layers[l];
      norm(data(x_), data(y_), num_tokens_, layer.norm_1, share);
      barrier.wait(share.threads);
      apply<T>(data(y_), num_tokens_, layer.qkv, share, tile.data(), data(qkv_));
      barrier.wait(share.threads);
      each(share, num_tokens_, [&](int64_t n) { place(layer, l, n); });
      barrier.wait(share.threads);
      attention(l, share, scratch);
      barrier.wait(share.threads);
      apply<T>(data(mixed_), num_tokens_, layer.out, share, tile.data(), data(x_), data(x_));
      barrier.wait(share.threads);
      norm(data(x_), data(y_), num_tokens_, layer.norm_2, share);
      barrier.wait(share.threads);
      activate(layer.gate_up, share, tile.data());
      barrier.wait(share.threads);
      apply<T>(data(hidden_), num_tokens_, layer.down, share, tile.data(), data(x_), data(x_));
      barrier.wait(share.threads);
      if (int64_t(l) + 1 == m_.state_layer) normalise_read(data(states_), share);
    }
    read(share, barrier, tile.data());
  }

 private:
  static T* data(const Tensor& tensor) { return tensor.data_ptr<T>(); }

  template <typename Do>
  static void each(Share share, int64_t count, Do act) {
    for (int64_t i = share.begin(count); i < share.end(count); ++i) act(i);
  }

  void norm(const T* x, T* y, int64_t rows, const float* weight, Share share) {
    const int64_t C = m_.channels();
    each(share, rows, [&](int64_t n) { normalise<T>(x + n * C, y + n * C, C, weight, m_.epsilon); });
  }

  void embed(int64_t token, T* to) const {
    const T* from = data(m_.embedding);
    const int64_t C = m_.channels();
    if (m_.embedding.dim() == 2) {
      std::copy_n(from + token * C, C, to);
      return;
    }
    const int64_t width = m_.embedding.size(2), together = m_.embedding.size(3);
    from += token / width * C * width + token % width * together;
    for (int64_t c = 0; c < C; c += together, from += width * together) std::copy_n(from, together, to + c);
  }

  T* cell(size_t layer, int64_t part, int64_t slot, int64_t cell) const {
    const int64_t slots = cache_.size(2);
    return data(cache_) + (((layer * 2 + part) * slots + slot) * num_cells_ + cell) * m_.kv_heads * m_.head_size;
  }

  // Rotates a token's queries and keys, and stores its keys and values.
  void place(const Layer& layer, size_t l, int64_t n) {
    const int64_t D = m_.head_size, keys = m_.kv_heads * D;
    T* const queries = data(qkv_) + n * m_.projected();
    const float* const angles = angles_.data_ptr<float>() + positions_[n] * D;
    for (int64_t h = 0; h < m_.heads + m_.kv_heads; ++h) {
      T* const head = queries + h * D;
      const float* const weight = h < m_.heads ? layer.query_norm : layer.key_norm;
      if (weight) normalise<T>(head, head, D, weight, m_.epsilon);
      if (layer.rotates) rotate<T>(head, D / 2, angles);
    }
    std::copy_n(queries + m_.heads * D, keys, cell(l, 0, slots_[n], cells_[n]));
    std::copy_n(queries + m_.heads * D + keys, keys, cell(l, 1, slots_[n], cells_[n]));
  }

  void attention(size_t l, Share share, Scratch<T>& scratch) {
    const int64_t num_runs = runs_.size() - 1;
    each(share, num_runs * m_.kv_heads, [&](int64_t unit) {
      const int64_t run = unit / m_.kv_heads, k = unit % m_.kv_heads;
      switch (m_.head_size) {
        case 64: return attend_run<64>(l, run, k, scratch);
        case 96: return attend_run<96>(l, run, k, scratch);
        default: return attend_run<128>(l, run, k, scratch);
      }
    });
  }

  template <int D>
  void attend_run(size_t l, int64_t run, int64_t k, Scratch<T>& scratch) {
    const int64_t group = m_.heads / m_.kv_heads, slot = slots_[runs_[run]];
    const T *const keys = cell(l, 0, slot, 0) + k * D, *const values = cell(l, 1, slot, 0) + k * D;
    std::vector<Query<T>> queries;
    for (int64_t n = runs_[run]; n < runs_[run + 1]; ++n) {
      for (int64_t h = k * group; h < (k + 1) * group; ++h) {
        queries.push_back({data(qkv_) + n * m_.projected() + h * D, data(mixed_) + (n * m_.heads + h) * D, positions_[n],
                           cells_[n]});
        if (int64_t(queries.size()) == kQueries || (n + 1 == runs_[run + 1] && h + 1 == (k + 1) * group)) {
          attend<T, D>(queries, keys, values, m_.kv_heads * D, num_cells_, float(m_.scaling), scratch);
          queries.clear();
        }
      }
    }
  }

  // silu(gate) * up.
  void activate(const Linear& w, Share share, float* tile) {
    const int64_t F = m_.hidden(), half = w.width / 2;
    multiply<T>(data(y_), num_tokens_, w, share, tile, [&](int64_t panel, int64_t row, int64_t count, const float* from) {
      for (int64_t r = 0; r < count; ++r, from += w.width) {
        T* const to = data(hidden_) + (row + r) * F + panel * half;
        for (int64_t c = 0; c < half; c += kPair) {
          auto gate = load_pair<float>(from + c), up = load_pair<float>(from + half + c);
          if (w.bias) {
            const auto a = load_pair<float>(w.bias + panel * w.width + c), b = load_pair<float>(w.bias + panel * w.width + half + c);
            gate = {gate.first + a.first, gate.second + a.second}, up = {up.first + b.first, up.second + b.second};
          }
          store_pair<T>(to + c, silu(gate.first) * up.first, silu(gate.second) * up.second);
        }
      }
    });
  }

  static Vec silu(const Vec& x) { return x / (Vec(1.f) + x.neg().exp_u20()); }

  // The read tokens after the final norm.
  void normalise_read(T* to, Share share) {
    const int64_t C = m_.channels();
    each(share, num_read_, [&](int64_t r) {
      normalise<T>(data(x_) + read_[r] * C, to + r * C, C, m_.norm.data_ptr<float>(), m_.epsilon);
    });
  }

  void read(Share share, Barrier& barrier, float* tile) {
    T* const last = m_.head.outputs || m_.value_weight.defined() ? data(y_) : data(out_);
    normalise_read(last, share);
    barrier.wait(share.threads);
    if (m_.head.outputs) {
      apply<T>(last, num_read_, m_.head, share, tile, data(out_));
    } else if (m_.value_weight.defined()) {
      each(share, num_read_ * out_.size(1), [&](int64_t i) { out_.data_ptr<float>()[i] = value(last, i); });
    }
    barrier.wait(share.threads);
  }

  // A head's value of a read token, in single precision.
  float value(const T* last, int64_t i) const {
    const int64_t C = m_.channels(), head = i % out_.size(1);
    const T* const x = last + i / out_.size(1) * C;
    const float* const weight = m_.value_weight.data_ptr<float>() + head * C;
    Vec total(0.f);
    for (int64_t c = 0; c < C; c += kPair) {
      const auto state = load_pair<T>(x + c);
      const auto w = load_pair<float>(weight + c);
      total = at::vec::fmadd(state.first, w.first, total);
      total = at::vec::fmadd(state.second, w.second, total);
    }
    return reduce_sum(total) + m_.value_bias.data_ptr<float>()[head];
  }

  const Model& m_;
  int64_t num_tokens_, num_read_, num_cells_;
  const int64_t *tokens_, *positions_, *cells_, *slots_, *read_;
  Tensor cache_, angles_, x_, y_, qkv_, mixed_, hidden_, out_, states_;
  std::vector<int64_t> runs_;
};

template <typename T>
std::vector<Tensor> forward_in(const std::vector<intrusive_ptr<Model>>& models, at::TensorList steps, at::TensorList reads,
                               at::TensorList caches, at::TensorList angles) {
  std::vector<std::unique_ptr<Pass<T>>> passes;
  std::vector<Tensor> out;
  for (size_t i = 0; i < models.size(); ++i) {
    passes.push_back(std::make_unique<Pass<T>>(*models[i], steps[i], reads[i], caches[i], angles[i]));
    out.push_back(passes.back()->out());
  }
  Barrier barrier;
#pragma omp parallel num_threads(at::get_num_threads())
  {
    for (auto& pass : passes) pass->run({omp_get_thread_num(), omp_get_num_threads()}, barrier);
    at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
  }
  for (auto& pass : passes) {
    if (pass->states().defined()) out.push_back(pass->states());
  }
  return out;
}

// Outputs of each model's read tokens: logits [R, V], or values [R, M] in float32, or last hidden states [R, C]. Then
// the states [R, C] of the same tokens behind `state_layer` layers and the final norm, of each model that has one.
std::vector<Tensor> forward(const std::vector<intrusive_ptr<Model>>& models, const std::vector<Tensor>& steps,
                            const std::vector<Tensor>& reads, const std::vector<Tensor>& caches,
                            const std::vector<Tensor>& angles) {
  if (caches[0].scalar_type() == at::kFloat) return forward_in<float>(models, steps, reads, caches, angles);
  return forward_in<at::BFloat16>(models, steps, reads, caches, angles);
}

template <typename T>
void linear_in(const Tensor& x, const Linear& w, Tensor& out) {
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const Share share{omp_get_thread_num(), omp_get_num_threads()};
    std::vector<float> tile(kMaxRows * kMaxWidth);
    apply<T>(x.data_ptr<T>(), x.size(0), w, share, tile.data(), out.data_ptr<T>());
    at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
  }
}

// x [N, inputs] times a packed weight: [N, outputs].
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t outputs) {
  TORCH_CHECK_VALUE(x.is_contiguous() && x.scalar_type() == packed.scalar_type(), "the input must be contiguous, of the type of the weight");
  const Tensor numbers = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::empty({x.size(0), outputs}, x.options());
  const Linear w = as_linear(packed, bias ? numbers.data_ptr<float>() : nullptr, outputs);
  if (x.scalar_type() == at::kFloat) {
    linear_in<float>(x, w, out);
  } else {
    linear_in<at::BFloat16>(x, w, out);
  }
  return out;
}

TORCH_LIBRARY(mavis, library) {
  library.class_<Model>("Model")
      .def(torch::init<int64_t, int64_t, int64_t, double, double, Tensor, Tensor>())
      .def("add_layer", &Model::add_layer)
      .def("set_head", &Model::set_head)
      .def("set_values", &Model::set_values)
      .def("set_state_layer", &Model::set_state_layer);
  library.def("forward", forward);
  library.def("linear", linear);
}

}  // namespace mavis

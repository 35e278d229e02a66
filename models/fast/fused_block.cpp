// The two halves of an MSG-Transformer block for inference on x86 CPUs with AVX-512, each in one pass over
// the tokens: LayerNorm, attention inside windows and projection; LayerNorm, linear, exact GELU and linear.
// What lies between the layers stays in the cache of a core. fused_block.py builds this file and calls it.
//
// Matrix products are PyTorch's own: its kernel for small blocks computes C = A B in float32, on AMX where
// there is any. Weights come packed in panels of `width` columns, [columns / width][K / V][width][V], where V
// is 2 in bfloat16 (pairs of rows are neighbours) and 1 in float32. Products read T, and tokens come and go
// as X: uint16_t for bfloat16 (its bits) or float. Between the two halves, tokens are float.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {  // ATen/native/CPUBlas.h
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace {

using bits = uint16_t;              // of a bfloat16
constexpr int64_t ROWS = 64;        // of a product at a time: its result stays in the innermost cache
constexpr int64_t CACHE = 1 << 19;  // bytes that a core works on at a time

void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, const bits* a, const bits* b,
             float* c) {
  using at::native::cpublas::brgemm;
  brgemm(m, n, k, lda, ldb, n, false, (const c10::BFloat16*)a, (const c10::BFloat16*)b, c, true);
}

void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, const float* a, const float* b,
             float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, n, false, a, b, c, false);
}

void release(const bits*) { at::native::cpublas::brgemm_release(true); }
void release(const float*) { at::native::cpublas::brgemm_release(false); }

__m512 load(const float* from) { return _mm512_loadu_ps(from); }

__m512 load(const bits* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

void store(bits* to, __m512 x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
#else  // to nearest, ties to even
  __m512i i = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  i = _mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(i, 16)));
#endif
}

__m512 constant(float x) { return _mm512_set1_ps(x); }

__m512 exponential(__m512 x) {            // of x <= 0, with a relative error of 2e-7
  x = _mm512_max_ps(constant(-87.f), x);  // in this order, NaN stays
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, constant(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(n, constant(0.693145752f), x);
  x = _mm512_fnmadd_ps(n, constant(1.42860677e-6f), x);
  __m512 y = constant(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = _mm512_fmadd_ps(y, x, constant(c));
  return _mm512_scalef_ps(y, n);
}

__m512 reciprocal(__m512 x) {  // with a relative error of 2^-27, in less time than a division
  __m512 y = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, constant(2.f)));
}

__m512 gelu(__m512 x) {  // exact GELU; erf by Abramowitz and Stegun, 7.1.26, with an error of 1.5e-7
  __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), constant(0.70710678f));
  __m512 t = reciprocal(_mm512_fmadd_ps(z, constant(0.3275911f), constant(1.f)));
  __m512 y = constant(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    y = _mm512_fmadd_ps(y, t, constant(c));
  y = _mm512_mul_ps(_mm512_mul_ps(y, t),
                    exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
  __m512 half = _mm512_mul_ps(constant(0.5f), x);  // x (1 - y/2) where x >= 0, else x y/2
  __m512 positive = _mm512_fnmadd_ps(half, y, x), negative = _mm512_mul_ps(half, y);
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), positive, negative);
}

template <typename X, typename T>
void layer_norm(const X* x, int64_t channels, const float* scale, const float* shift, float eps, T* out) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += 16) sum = _mm512_add_ps(sum, load(x + c));
  __m512 mean = constant(_mm512_reduce_add_ps(sum) / channels);
  for (int64_t c = 0; c < channels; c += 16) {
    __m512 centred = _mm512_sub_ps(load(x + c), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
  }
  __m512 factor = constant(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / channels + eps));
  for (int64_t c = 0; c < channels; c += 16) {
    __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(x + c), mean), factor);
    store(out + c, _mm512_fmadd_ps(normed, _mm512_loadu_ps(scale + c), _mm512_loadu_ps(shift + c)));
  }
}

// A weight in panels and a bias; `columns` is a multiple of `width`, and that of 16.
template <typename T>
struct Linear {
  const T* weight;
  const float* bias;
  int64_t in, columns, width;
};

// Panels `first` to `last` of a linear layer on rows a. finish(row, column, x) stores 16 values.
template <typename T, typename Finish>
void linear(const Linear<T>& layer, int64_t first, int64_t last, const T* a, int64_t lda, int64_t rows,
            float* c, Finish finish) {
  for (int64_t panel = first; panel < last; panel++)
    for (int64_t row = 0; row < rows; row += ROWS) {
      const int64_t count = std::min(ROWS, rows - row);
      product(count, layer.width, layer.in, lda, layer.width, a + row * lda,
              layer.weight + panel * layer.width * layer.in, c);
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < layer.width; j += 16) {
          const int64_t column = panel * layer.width + j;
          __m512 x = _mm512_loadu_ps(c + i * layer.width + j);
          finish(row + i, column, _mm512_add_ps(x, _mm512_loadu_ps(layer.bias + column)));
        }
    }
}

// Keys (tokens, lda) to the right factor of q k^T, with `padded` columns, zero beyond the tokens.
void pack_keys(const float* k, int64_t lda, int64_t tokens, int64_t padded, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; c++) {
    for (int64_t t = 0; t < tokens; t++) out[c * padded + t] = k[t * lda + c];
    std::fill(out + c * padded + tokens, out + (c + 1) * padded, 0.f);
  }
}

void pack_keys(const bits* k, int64_t lda, int64_t tokens, int64_t padded, int64_t channels, bits* out) {
  uint32_t* pairs = (uint32_t*)out;
  for (int64_t t = 0; t < padded; t++)
    for (int64_t c = 0; c < channels / 2; c++) {
      uint32_t pair = 0;
      if (t < tokens) std::memcpy(&pair, k + t * lda + 2 * c, sizeof(pair));
      pairs[c * padded + t] = pair;
    }
}

// Values (tokens, lda) to the right factor of the probabilities, with `padded` rows; returns its row length.
int64_t pack_values(const float*& v, int64_t lda, int64_t, int64_t, int64_t, float*) { return lda; }

int64_t pack_values(const bits*& v, int64_t lda, int64_t tokens, int64_t padded, int64_t channels,
                    bits* out) {
  const auto wide = [&](int64_t t, int64_t c) {
    if (t >= tokens) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + t * lda + c)));
  };
  for (int64_t t = 0; t < padded; t += 2)
    for (int64_t c = 0; c < channels; c += 16)
      _mm512_storeu_si512(out + t * channels + 2 * c,
                          _mm512_or_si512(wide(t, c), _mm512_slli_epi32(wide(t + 1, c), 16)));
  v = out;
  return channels;
}

// Scores (queries, padded) to probabilities times their sums, which are returned in `sums`.
template <typename T>
void softmax(const float* scores, const float* bias, const uint8_t* hidden, float scale, int64_t queries,
             int64_t padded, float* row, T* out, float* sums) {
  for (int64_t i = 0; i < queries; i++, scores += padded, bias += padded, out += padded) {
    __m512 top = constant(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 16) {
      __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores + j), constant(scale), _mm512_loadu_ps(bias + j));
      if (hidden) {
        __mmask16 mask = _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)(hidden + j)), _mm_set1_epi8(1));
        x = _mm512_mask_blend_ps(mask, x, constant(-INFINITY));
      }
      _mm512_storeu_ps(row + j, x);
      top = _mm512_max_ps(top, x);
    }
    top = constant(_mm512_reduce_max_ps(top));
    for (int64_t j = 0; j < padded; j += 16) {
      __m512 x = _mm512_sub_ps(_mm512_loadu_ps(row + j), top);
      __mmask16 seen = _mm512_cmp_ps_mask(x, constant(-87.f), _CMP_NLE_UQ);
      x = _mm512_maskz_mov_ps(seen, exponential(x));
      sum = _mm512_add_ps(sum, x);
      store(out + j, x);
    }
    sums[i] = _mm512_reduce_add_ps(sum);
  }
}

// Memory of a thread, which grows and stays.
struct Memory {
  char* start = nullptr;
  size_t size = 0;
  ~Memory() { std::free(start); }
  char* get(size_t bytes) {
    if (bytes > size) {
      std::free(start);
      size = (bytes + 4095) / 4096 * 4096;
      start = (char*)std::aligned_alloc(64, size);
      if (!start) std::abort();
    }
    return start;
  }
};
thread_local Memory own, common;

template <typename P>
P* take(char*& memory, int64_t count) {
  char* start = memory;
  memory += (count * sizeof(P) + 63) / 64 * 64;
  return (P*)start;
}

// Run two steps on all chunks. If there are fewer chunks than threads, `groups` tasks share a chunk: they
// each do a part of the first step's columns, and after all of these a part of the second's.
template <typename T, typename First, typename Second>
void run(int64_t chunks, int64_t groups, int64_t threads, First first, Second second) {
  const int64_t tasks = chunks * groups;
#pragma omp parallel num_threads(std::min(threads, tasks)) if (threads > 1 && tasks > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      first(task / groups, task % groups);
      if (groups == 1) second(task, 0);
    }
    if (groups > 1) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) second(task / groups, task % groups);
    }
    release((const T*)nullptr);
  }
}

template <typename X, typename T>
void attend(const X* x, float* out, int64_t windows, int64_t tokens, int64_t queries, int64_t heads,
            float eps, float scale, const float* norm_scale, const float* norm_shift, Linear<T> qkv,
            Linear<T> proj, const float* bias, const uint8_t* hidden, int64_t threads) {
  const int64_t channels = qkv.in, dim = channels / heads, padded = (tokens + 15) / 16 * 16;
  int64_t size = std::max<int64_t>(1, CACHE / (tokens * (2 * channels + 3 * dim) * (int64_t)sizeof(T)));
  size = std::min(size, (windows + threads - 1) / threads);  // windows of a chunk
  const int64_t chunks = (windows + size - 1) / size, panels = proj.columns / proj.width;
  const int64_t groups = chunks < threads ? std::min({(threads + chunks - 1) / chunks, heads, panels}) : 1;
  const int64_t slots = groups > 1 ? chunks : threads;
  T* attended = (T*)common.get(slots * size * queries * channels * sizeof(T));
  const auto slot = [&](int64_t chunk) {
    return attended + (groups > 1 ? chunk : omp_get_thread_num()) * size * queries * channels;
  };
  const auto count = [&](int64_t chunk) { return std::min(size, windows - chunk * size); };
  const auto memory = [&]() {
    return own.get(
        4 * (ROWS * std::max({qkv.width, proj.width, padded, dim}) + tokens * (padded + dim + 1) + padded) +
        sizeof(T) * (size * tokens * (channels + 3 * dim) + padded * (tokens + 2 * dim)) + 1024);
  };

  const auto first = [&](int64_t chunk, int64_t group) {
    char* left = memory();
    const int64_t rows = count(chunk) * tokens, stride = 3 * dim;
    float* c = take<float>(left, ROWS * qkv.width);
    float* scores = take<float>(left, tokens * padded);
    float* result = take<float>(left, tokens * dim);
    float* sums = take<float>(left, tokens);
    float* row = take<float>(left, padded);
    T* normed = take<T>(left, rows * channels);
    T* of_head = take<T>(left, rows * stride);
    T* p = take<T>(left, tokens * padded);
    T* keys = take<T>(left, padded * dim);
    T* packed = take<T>(left, padded * dim);
    const X* from = x + chunk * size * tokens * channels;
    for (int64_t i = 0; i < rows; i++)
      layer_norm(from + i * channels, channels, norm_scale, norm_shift, eps, normed + i * channels);
    for (int64_t head = heads * group / groups; head < heads * (group + 1) / groups; head++) {
      linear(qkv, head, head + 1, normed, channels, rows, c,
             [&](int64_t i, int64_t column, __m512 value) {
               store(of_head + i * stride + column - head * stride, value);
             });
      for (int64_t w = 0; w < count(chunk); w++) {
        const T* q = of_head + w * tokens * stride;
        const T* v = q + 2 * dim;
        pack_keys(q + dim, stride, tokens, padded, dim, keys);
        const int64_t ld = pack_values(v, stride, tokens, padded, dim, packed);
        product(queries, padded, dim, stride, padded, q, keys, scores);
        const uint8_t* mask = hidden ? hidden + (chunk * size + w) * padded : nullptr;
        softmax(scores, bias + head * tokens * padded, mask, scale, queries, padded, row, p, sums);
        product(queries, dim, sizeof(T) == 2 ? padded : tokens, padded, ld, p, v, result);
        T* to = slot(chunk) + w * queries * channels + head * dim;
        for (int64_t i = 0; i < queries; i++)
          for (int64_t j = 0; j < dim; j += 16)
            store(to + i * channels + j,
                  _mm512_mul_ps(_mm512_loadu_ps(result + i * dim + j), constant(1.f / sums[i])));
      }
    }
  };
  const auto second = [&](int64_t chunk, int64_t group) {
    const int64_t each = tokens / queries,
                  start = chunk * size * queries;  // all tokens, or the first of a window
    linear(proj, panels * group / groups, panels * (group + 1) / groups, slot(chunk), channels,
           count(chunk) * queries, (float*)memory(), [&](int64_t i, int64_t column, __m512 value) {
             store(out + (start + i) * channels + column,
                   _mm512_add_ps(load(x + (start + i) * each * channels + column), value));
           });
  };
  run<T>(chunks, groups, threads, first, second);
}

template <typename X, typename T>
void mlp(const float* x, X* out, int64_t all, float eps, const float* norm_scale, const float* norm_shift,
         Linear<T> fc1, Linear<T> fc2, int64_t threads) {
  const int64_t channels = fc1.in, hidden = fc1.columns;
  int64_t size = std::max<int64_t>(ROWS, CACHE / ((channels + hidden) * (int64_t)sizeof(T)) / ROWS * ROWS);
  size = std::min(size, std::max(ROWS, ((all + threads - 1) / threads + 15) / 16 * 16));  // rows of a chunk
  const int64_t chunks = (all + size - 1) / size;
  const int64_t panels1 = hidden / fc1.width, panels2 = channels / fc2.width;
  const int64_t groups = chunks < threads ? std::min({(threads + chunks - 1) / chunks, panels1, panels2}) : 1;
  T* between = (T*)common.get((groups > 1 ? chunks : threads) * size * hidden * sizeof(T));
  const auto slot = [&](int64_t chunk) {
    return between + (groups > 1 ? chunk : omp_get_thread_num()) * size * hidden;
  };
  const auto count = [&](int64_t chunk) { return std::min(size, all - chunk * size); };
  const auto memory = [&]() {
    return own.get(4 * ROWS * std::max(fc1.width, fc2.width) + sizeof(T) * size * channels + 256);
  };

  const auto first = [&](int64_t chunk, int64_t group) {
    char* left = memory();
    float* c = take<float>(left, ROWS * fc1.width);
    T* normed = take<T>(left, size * channels);
    T* to = slot(chunk);
    for (int64_t i = 0; i < count(chunk); i++)
      layer_norm(x + (chunk * size + i) * channels, channels, norm_scale, norm_shift, eps,
                 normed + i * channels);
    linear(fc1, panels1 * group / groups, panels1 * (group + 1) / groups, normed, channels, count(chunk), c,
           [&](int64_t i, int64_t column, __m512 value) { store(to + i * hidden + column, gelu(value)); });
  };
  const auto second = [&](int64_t chunk, int64_t group) {
    linear(fc2, panels2 * group / groups, panels2 * (group + 1) / groups, slot(chunk), hidden, count(chunk),
           (float*)memory(), [&](int64_t i, int64_t column, __m512 value) {
             const int64_t at = (chunk * size + i) * channels + column;
             store(out + at, _mm512_add_ps(load(x + at), value));
           });
  };
  run<T>(chunks, groups, threads, first, second);
}

}  // namespace

// x + proj(attention(qkv(norm(x)))) of windows x (windows, tokens, C), for the first `queries` tokens of each
// window (1 or all): out (windows, queries, C). A panel of qkv has the queries, keys and values of a head.
// The bias is (heads, tokens, padded) with -inf beyond the tokens, hidden is (windows, padded) or null;
// padded is tokens rounded up to 16.
#define ATTEND(name, X, T)                                                                                 \
  extern "C" void name(const X* x, float* out, int64_t windows, int64_t tokens, int64_t queries,           \
                       int64_t dim, int64_t heads, float eps, float scale, const float* norm_scale,        \
                       const float* norm_shift, const T* qkv, const float* qkv_bias, const T* proj,        \
                       const float* proj_bias, int64_t width, const float* bias, const uint8_t* hidden,    \
                       int64_t threads) {                                                                  \
    attend<X, T>(x, out, windows, tokens, queries, heads, eps, scale, norm_scale, norm_shift,              \
                 {qkv, qkv_bias, dim, 3 * dim, 3 * dim / heads}, {proj, proj_bias, dim, dim, width}, bias, \
                 hidden, threads);                                                                         \
  }
ATTEND(attend_float32_float32, float, float)
ATTEND(attend_bfloat16_float32, float, bits)
ATTEND(attend_bfloat16_bfloat16, bits, bits)

// x + fc2(gelu(fc1(norm(x)))) of tokens x (rows, C): out (rows, C), which may be x.
#define MLP(name, X, T)                                                                                   \
  extern "C" void name(const float* x, X* out, int64_t rows, int64_t dim, int64_t hidden, float eps,      \
                       const float* norm_scale, const float* norm_shift, const T* fc1,                    \
                       const float* bias1, int64_t width1, const T* fc2, const float* bias2,              \
                       int64_t width2, int64_t threads) {                                                 \
    mlp<X, T>(x, out, rows, eps, norm_scale, norm_shift, {fc1, bias1, dim, hidden, width1},               \
              {fc2, bias2, hidden, dim, width2}, threads);                                                \
  }
MLP(mlp_float32_float32, float, float)
MLP(mlp_bfloat16_float32, float, bits)
MLP(mlp_bfloat16_bfloat16, bits, bits)

// Whether PyTorch multiplies small blocks of a dtype on this processor, and as it is called here.
template <typename T>
int can_multiply(T one, T two) {
  T a[16 * 32], b[32 * 16];
  float c[16 * 16];
  std::fill(a, a + 16 * 32, one);
  std::fill(b, b + 32 * 16, two);
  try {
    product(16, 16, 32, 32, 16, a, b, c);
    release(a);
  } catch (...) {
    return 0;
  }
  return std::all_of(c, c + 16 * 16, [](float x) { return x == 64; });
}
extern "C" int can_multiply_float32() { return can_multiply<float>(1, 2); }
extern "C" int can_multiply_bfloat16() { return can_multiply<bits>(0x3f80, 0x4000); }

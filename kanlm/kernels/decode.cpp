// One token through a whole decoder, in one call, batch 1, fp32 (decode.py packs the weights and lists the operations).
//
// Legend: I inputs, O outputs, W columns of a tile, K functions of an input, T coefficients of a polynomial piece,
// E head dim, S positions of the cache.
//
// At batch 1 every weight is read once for one multiply-add, so bytes bound the time. Matrices are packed in tiles of W
// output columns, [tile][I][W]: a tile is one sequential stream, and no sum has to be taken across a vector. Every
// output is computed whole by one thread, so the result does not depend on the number of threads.

#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "exponential.h"

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int L = BYTES / 4;       // floats in a vector
constexpr int W = 32;              // columns of a tile
constexpr int VECS = W / L;        // vectors in a tile's row
constexpr int SPAN = 512;          // columns of an edge layer whose sums stay in the nearest cache
constexpr int AHEAD = 2;           // inputs that an edge layer fetches ahead,
constexpr int LEAD = 1024;         // that many bytes of each: then the processor has seen the stream
constexpr int LINE = 64;           // bytes of a line of a cache
constexpr int TERMS = 8;           // the most functions of an input that are not zero
constexpr int CUBIC = 4;           // coefficients of a cubic piece
constexpr int SHORT = 16;          // cells of a table that stays in registers
constexpr int BANKS = BYTES / 16;  // sums of a column that wait for each other: together they hide the latency

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef float loose __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int8_t bytes __attribute__((vector_size(L)));

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline vec load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)  // GCC 12 converts lane by lane where it is left to it
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    bytes packed;
    std::memcpy(&packed, p, L);
    return __builtin_convertvector(__builtin_convertvector(packed, ints), vec);
#endif
}
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }

inline float total(vec v) {
    float sum = 0;
    for (int l = 0; l < L; ++l) sum += v[l];
    return sum;
}

inline float exponential(float x) { return exponential_of<int32_t>(x); }
inline vec exponential(vec x) { return exponential_of<ints>(x); }

template <typename V>
inline V silu(V x) {
    return x / (1.0f + exponential(-x));
}

inline vec gelu(vec x) {  // Phi after Abramowitz & Stegun 1964, 7.1.26, error below 1e-7
    const vec z = (x < 0 ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    const vec tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
                      0.254829592f) * t * exponential(-0.5f * x * x) * 0.5f;
    return x * (x < 0 ? tail : 1.0f - tail);
}

}  // namespace

extern "C" {

enum Kind { EMBED, NORM, MATRIX, ATTENTION, TABLE, SHORT_TABLE, RATIONAL, SILU, GELU, RELU, SQUARE, XIELU, POLYNORM, MULTIPLY, ADD,
            EDGE, FEATURES };

// As decode.py's Operation. A second input u multiplies what TABLE .. XIELU compute.
struct Operation {
    int32_t kind, barrier;     // barrier: wait for the other threads first
    int32_t accumulate, int8;  // y is added to; weights are int8 with a scale for each column
    const float *a, *u;
    float* y;
    const void* w;
    const float* s;
    int64_t I, O, K;
    int32_t order, cells, groups, silu, periodic;
    float lo, inv_h, eps;
};

struct Decoder {
    const Operation* operations;
    int64_t count, capacity;  // of the cache, in positions
    const float *embedding, *cosines, *sines;  // angles [capacity, E / 2]
    float* scores;                             // [threads, capacity]
};

}  // extern "C"

namespace {

struct Share {
    int64_t begin, end;
};

inline Share share_of(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// Where a point lies in a uniform grid: a piece is evaluated at r in [0, 1], and beyond the grid along its tangent.
struct Place {
    int64_t cell;
    float r, e;
};

inline Place place(float x, const Operation& k) {
    float t = (x - k.lo) * k.inv_h;
    if (k.periodic) t -= std::floor(t / float(k.cells)) * float(k.cells);
    const float inside = t > 0 ? std::min(t, float(k.cells - 1)) : 0.0f;  // 0 of a NaN, which stays one in r
    const int64_t cell = int64_t(inside);
    const float local = t - float(cell), r = local < 0 ? 0.0f : local > 1 ? 1.0f : local;
    return {cell, r, local - r};
}

// The polynomial p [terms] at a place.
inline float piece(const float* p, int terms, const Place& at) {
    float value = p[terms - 1], slope = 0;
    for (int j = terms - 2; j >= 0; --j) {
        slope = slope * at.r + value;
        value = value * at.r + p[j];
    }
    return value + at.e * slope;
}

inline float tabulated(const Operation& k, const float* table, float x) {  // table [cells, order + 1]
    const Place at = place(x, k);
    const float* p = table + at.cell * (k.order + 1);
    return (k.order == 3 ? piece(p, 4, at) : piece(p, k.order + 1, at)) + (k.silu ? silu(x) : 0.0f);
}

// Where L points lie in a grid that does not repeat.
struct Places {
    ints cell;
    vec r, e;
};

inline Places place(vec x, const Operation& k) {
    const vec zero = {}, one = zero + 1.0f, top = zero + float(k.cells - 1);
    const vec t = (x - k.lo) * k.inv_h;
    const vec inside = t > 0 ? (t < top ? t : top) : zero;
    const ints cell = __builtin_convertvector(inside, ints);
    const vec local = t - __builtin_convertvector(cell, vec), r = local < 0 ? zero : local > 1 ? one : local;
    return {cell, r, local - r};
}

// p [terms]: the coefficients of each lane's own polynomial, or of one polynomial for all.
template <typename C>
inline vec piece(const C* p, int terms, const Places& at) {
    const vec zero = {};
    vec value = zero + p[terms - 1], slope = zero;
    for (int j = terms - 2; j >= 0; --j) {
        slope = slope * at.r + value;
        value = value * at.r + p[j];
    }
    return value + at.e * slope;
}

// Every lane's row of a table [cells, 4], one vector for each column.
inline void gather(const float* table, ints cell, vec* p) {
#if defined(__AVX512F__)
    for (int j = 0; j < 4; ++j) p[j] = (vec)_mm512_i32gather_ps((__m512i)(cell * 4 + j), table, 4);
#elif defined(__AVX2__)  // rows are 16 bytes: four loads of two rows, then 4 x 4 transposed in each half
    alignas(BYTES) uint32_t first[L];  // by way of memory: one load a lane instead of two operations
    *reinterpret_cast<ints*>(first) = cell * 4;
    __m256 rows[4];
    for (int l = 0; l < 4; ++l)
        rows[l] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(table + first[l])),
                                       _mm_loadu_ps(table + first[l + 4]), 1);
    const __m256 a = _mm256_unpacklo_ps(rows[0], rows[1]), b = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 c = _mm256_unpacklo_ps(rows[2], rows[3]), d = _mm256_unpackhi_ps(rows[2], rows[3]);
    p[0] = (vec)_mm256_shuffle_ps(a, c, 0x44), p[1] = (vec)_mm256_shuffle_ps(a, c, 0xEE);
    p[2] = (vec)_mm256_shuffle_ps(b, d, 0x44), p[3] = (vec)_mm256_shuffle_ps(b, d, 0xEE);
#else
    for (int l = 0; l < L; ++l)
        for (int j = 0; j < 4; ++j) p[j][l] = table[cell[l] * 4 + j];
#endif
}

// A table [4, 16] by power and cell: it stays in registers, and a lookup is a permutation of them.
struct ShortTable {
#if defined(__AVX512F__)
    vec rows[CUBIC];
    explicit ShortTable(const float* table) {
        for (int j = 0; j < CUBIC; ++j) rows[j] = load(table + j * SHORT);
    }
    vec at(int j, ints cell) const { return (vec)_mm512_permutexvar_ps((__m512i)cell, (__m512)rows[j]); }
#elif defined(__AVX2__)
    vec low[CUBIC], high[CUBIC];
    explicit ShortTable(const float* table) {
        for (int j = 0; j < CUBIC; ++j) low[j] = load(table + j * SHORT), high[j] = load(table + j * SHORT + L);
    }
    vec at(int j, ints cell) const {
        const __m256i lane = (__m256i)cell;
        const __m256 in_high = (__m256)(cell << 28);  // a cell from 8 on has a sign
        return (vec)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)low[j], lane),
                                     _mm256_permutevar8x32_ps((__m256)high[j], lane), in_high);
    }
#else
    const float* table;
    explicit ShortTable(const float* table) : table(table) {}
    vec at(int j, ints cell) const {
        vec value;
        for (int l = 0; l < L; ++l) value[l] = table[j * SHORT + cell[l]];
        return value;
    }
#endif
};

// What `tabulated` gives for L values of one group at once on a grid that does not repeat.
template <bool IS_CUBIC>
inline vec tabulated(const Operation& k, const float* table, vec x) {
    const Places at = place(x, k);
    vec p[8];  // of each lane's piece
    if (IS_CUBIC) {
        gather(table, at.cell, p);
    } else {
        for (int l = 0; l < L; ++l)
            for (int j = 0; j <= k.order; ++j) p[j][l] = table[at.cell[l] * (k.order + 1) + j];
    }
    const vec value = piece(p, IS_CUBIC ? CUBIC : k.order + 1, at);
    return k.silu ? value + silu(x) : value;
}
inline vec tabulated(const Operation& k, const float* table, vec x) {
    return k.order == 3 ? tabulated<true>(k, table, x) : tabulated<false>(k, table, x);
}

inline vec rational(const float* c, vec x) {
    vec p = vec{} + c[5];
    for (int n = 4; n >= 0; --n) p = p * x + c[n];
    const vec first = (c[6] + c[7] * x) * x, second = (c[8] + c[9] * x) * x;
    return p / (1.0f + first * first + second * second);
}

void normalize(const Operation& k) {  // weights w, or none
    const float* weight = static_cast<const float*>(k.w);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < k.I; ++i) squares += k.a[i] * k.a[i];
    const float scale = 1.0f / std::sqrt(squares / float(k.I) + k.eps);
    if (weight)
        for (int64_t i = 0; i < k.I; ++i) k.y[i] = k.a[i] * scale * weight[i];
    else
        for (int64_t i = 0; i < k.I; ++i) k.y[i] = k.a[i] * scale;
}

// Adds the sums of columns from `first` on to y, or puts them there.
inline void put(const Operation& k, int64_t first, int64_t count, const float* sums) {
    for (int64_t o = 0; o < std::min(count, k.O - first); ++o) {
        const float value = k.s ? sums[o] * k.s[first + o] : sums[o];
        k.y[first + o] = k.accumulate ? k.y[first + o] + value : value;
    }
}

// N vectors of a tile, the columns from `first` on.
template <int N, typename X>
inline void sum_tile(const Operation& k, int64_t first) {
    const X* w = static_cast<const X*>(k.w) + first * k.I;
    vec sums[BANKS][N] = {};
    int64_t i = 0;
    for (; i + BANKS <= k.I; i += BANKS)
        for (int b = 0; b < BANKS; ++b)
            for (int v = 0; v < N; ++v) sums[b][v] += k.a[i + b] * load(w + (i + b) * W + v * L);
    for (; i < k.I; ++i)
        for (int v = 0; v < N; ++v) sums[0][v] += k.a[i] * load(w + i * W + v * L);
    for (int b = 1; b < BANKS; ++b)
        for (int v = 0; v < N; ++v) sums[0][v] += sums[b][v];
    alignas(64) float columns[N * L];
    for (int v = 0; v < N; ++v) store(columns + v * L, sums[0][v]);
    put(k, first, N * L, columns);
}

template <typename X>
void matrix(const Operation& k, int thread, int threads) {
    const Share tiles = share_of((k.O + W - 1) / W, thread, threads);
    for (int64_t first = tiles.begin * W; first < tiles.end * W; first += W) {
        if (k.O - first <= L) sum_tile<1, X>(k, first);  // the others of the last tile are padding
        else if (k.O - first <= W / 2) sum_tile<VECS / 2, X>(k, first);
        else sum_tile<VECS, X>(k, first);
    }
}

// sums [count] += sum_j values[j * stride] rows[j * P ..] (+ value_of_base base[..]); T terms, or `terms` where T is 0.
template <int T, typename X>
inline void add_rows(float* sums, int64_t count, const X* rows, int64_t P, const float* values, int64_t stride, int terms,
                     const X* base, float value_of_base) {
    if (T) terms = T;
    vec factors[T ? T : TERMS];  // no store below can reach them
    for (int j = 0; j < terms; ++j) factors[j] = vec{} + values[j * stride];
    for (int64_t o = 0; o < count; o += L) {
        vec even = {}, odd = base ? value_of_base * load(base + o) : vec{};
        for (int j = 0; j < terms; ++j) (j & 1 ? odd : even) += factors[j] * load(rows + j * P + o);
        store(sums + o, load(sums + o) + (even + odd));
    }
}

// A layer of edge functions: only the terms that are not zero at an input are read. Weights w: those of the base branch
// (silu) [I, P], then [I, functions, P], P = O in whole tiles: what is read of an input is one stretch of memory and long
// enough for the processor to see a stream. u is scratch of (T + 2) I floats for the terms' values [T, I], SiLU and places;
// s has the pieces [T, T] (function, power), then the columns' scales of int8 weights.
template <typename X>
void edge(Operation k, int thread, int threads) {
    const int terms = k.order + 1;
    const float* pieces = k.s;
    float *values = const_cast<float*>(k.u), *bases = values + terms * k.I, *cells = bases + k.I;
    k.s = k.int8 ? k.s + terms * terms : nullptr;
    const Share inputs = share_of(k.I, thread, threads), tiles = share_of((k.O + W - 1) / W, thread, threads);
    int64_t i = inputs.begin;
    for (; !k.periodic && i + L <= inputs.end; i += L) {
        const vec x = load(k.a + i);
        const Places at = place(x, k);
        for (int j = 0; j < terms; ++j) store(values + j * k.I + i, piece(pieces + j * terms, terms, at));
        if (k.silu) store(bases + i, silu(x));
        store(cells + i, __builtin_convertvector(at.cell, vec));
    }
    for (; i < inputs.end; ++i) {
        const Place at = place(k.a[i], k);
        for (int j = 0; j < terms; ++j) values[j * k.I + i] = piece(pieces + j * terms, terms, at);
        if (k.silu) bases[i] = silu(k.a[i]);
        cells[i] = float(at.cell);
    }
#pragma omp barrier
    const int64_t P = (k.O + W - 1) / W * W, functions = k.K - k.silu;
    const X *base = k.silu ? static_cast<const X*>(k.w) : nullptr, *weights = static_cast<const X*>(k.w) + k.silu * k.I * P;
    for (int64_t first = tiles.begin * W; first < tiles.end * W; first += SPAN) {
        const int64_t count = std::min<int64_t>(SPAN, tiles.end * W - first);
        alignas(64) float sums[SPAN];
        std::fill(sums, sums + count, 0.0f);
        auto rows_of = [&](int64_t i) { return weights + (i * functions + int64_t(cells[i])) * P + first; };
        for (int64_t i = 0; i < k.I; ++i) {
            if (i + AHEAD < k.I) {
                const char* next = reinterpret_cast<const char*>(rows_of(i + AHEAD));
                for (int at = 0; at < LEAD; at += LINE) __builtin_prefetch(next + at);
            }
            const X* own_base = base ? base + i * P + first : nullptr;
            if (terms == 4) add_rows<4>(sums, count, rows_of(i), P, values + i, k.I, 4, own_base, bases[i]);
            else add_rows<0>(sums, count, rows_of(i), P, values + i, k.I, terms, own_base, bases[i]);
        }
        put(k, first, count, sums);
    }
}

// y [K, I]: K tabulated functions of every input, and with a base branch SiLU as the last of them.
void features(Operation k, int thread, int threads) {
    const Share inputs = share_of(k.I, thread, threads);
    const int64_t functions = k.K - k.silu, size = int64_t(k.cells) * (k.order + 1);
    const bool base = k.silu;
    k.silu = 0;
    for (int64_t m = 0; m < functions; ++m) {
        const float* own = static_cast<const float*>(k.w) + m * size;
        int64_t i = inputs.begin;
        for (; !k.periodic && i + L <= inputs.end; i += L) store(k.y + m * k.I + i, tabulated(k, own, load(k.a + i)));
        for (; i < inputs.end; ++i) k.y[m * k.I + i] = tabulated(k, own, k.a[i]);
    }
    float* last = k.y + functions * k.I;
    int64_t i = base ? inputs.begin : inputs.end;
    for (; i + L <= inputs.end; i += L) store(last + i, silu(load(k.a + i)));
    for (; i < inputs.end; ++i) last[i] = silu(k.a[i]);
}

inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + half] = second * cosines[i] + first * sines[i];
    }
}

inline float dot(const float* a, const float* b, int64_t n) {
    vec sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L)
        for (int b2 = 0; b2 < 2; ++b2) sums[b2] += load(a + i + b2 * L) * load(b + i + b2 * L);
    for (; i + L <= n; i += L) sums[0] += load(a + i) * load(b + i);
    float sum = total(sums[0] + sums[1]);
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// a: queries [O, E], keys [K, E], values [K, E]; w and s: cache of keys and values [K, capacity, E]; eps: scale of scores.
void attention(const Decoder& d, const Operation& k, int64_t position, int thread, int threads) {
    const int64_t E = k.I, half = E / 2, serves = k.O / k.K;
    const float *cosines = d.cosines + position * half, *sines = d.sines + position * half;
    float* scores = d.scores + thread * d.capacity;
    float* a = const_cast<float*>(k.a);
    const Share own = share_of(k.K, thread, threads);
    for (int64_t c = own.begin; c < own.end; ++c) {
        float* keys = static_cast<float*>(const_cast<void*>(k.w)) + c * d.capacity * E;
        float* values = const_cast<float*>(k.s) + c * d.capacity * E;
        rotate(a + (k.O + c) * E, cosines, sines, half);
        std::memcpy(keys + position * E, a + (k.O + c) * E, E * sizeof(float));
        std::memcpy(values + position * E, a + (k.O + k.K + c) * E, E * sizeof(float));
        for (int64_t head = c * serves; head < (c + 1) * serves; ++head) {
            float *query = a + head * E, *y = k.y + head * E;
            rotate(query, cosines, sines, half);
            float highest = -INFINITY, sum = 0;
            for (int64_t s = 0; s <= position; ++s) {
                scores[s] = dot(query, keys + s * E, E) * k.eps;
                highest = std::max(highest, scores[s]);
            }
            for (int64_t s = 0; s <= position; ++s) scores[s] = exponential(scores[s] - highest);
            for (int64_t s = 0; s <= position; ++s) sum += scores[s];
            std::fill(y, y + E, 0.0f);
            for (int64_t s = 0; s <= position; ++s) {
                const float weight = scores[s] / sum;
                for (int64_t e = 0; e < E; ++e) y[e] += weight * values[s * E + e];
            }
        }
    }
}

void polynorm(const Operation& k) {  // w: a_1, a_2, a_3, a_0
    const float* w = static_cast<const float*>(k.w);
    double squares[3] = {};
    for (int64_t i = 0; i < k.I; ++i) {
        const double x2 = double(k.a[i]) * k.a[i];
        squares[0] += x2, squares[1] += x2 * x2, squares[2] += x2 * x2 * x2;
    }
    float scale[3];
    for (int n = 0; n < 3; ++n) scale[n] = w[n] / float(std::sqrt(squares[n] / double(k.I) + k.eps));
    for (int64_t i = 0; i < k.I; ++i)
        k.y[i] = ((scale[2] * k.a[i] + scale[1]) * k.a[i] + scale[0]) * k.a[i] + w[3];
}

// y = phi(a) * u over [begin, end). phi: vec -> vec. y shares nothing with a and u.
template <typename F>
inline void each(const Operation& k, int64_t begin, int64_t end, F phi) {
    auto at = [&](int64_t i) {
        const vec value = phi(load(k.a + i));
        store(k.y + i, k.u ? value * load(k.u + i) : value);
    };
    int64_t i = begin;
    for (; i + L <= end; i += L) at(i);
    if (i < end && end - begin >= L) {
        at(end - L);  // repeats some of the vector before
        return;
    }
    for (; i < end; ++i) k.y[i] = phi(vec{} + k.a[i])[0] * (k.u ? k.u[i] : 1.0f);
}

// The same group by group. phi_of: group -> its function.
template <typename F>
inline void each_group(const Operation& k, Share own, F phi_of) {
    const int64_t width = k.I / k.groups;
    for (int64_t group = own.begin / width; group * width < own.end; ++group)
        each(k, std::max(own.begin, group * width), std::min(own.end, (group + 1) * width), phi_of(group));
}

void table(Operation k, Share own) {  // a copy that no store can reach
    const float* tables = static_cast<const float*>(k.w);
    const int64_t width = k.I / k.groups, size = int64_t(k.cells) * (k.order + 1);
    if (k.periodic || width < L)
        for (int64_t i = own.begin; i < own.end; ++i)
            k.y[i] = tabulated(k, tables + i / width * size, k.a[i]) * (k.u ? k.u[i] : 1.0f);
    else
        each_group(k, own, [&](int64_t group) {
            return [&k, own = tables + group * size](vec x) { return tabulated(k, own, x); };
        });
}

void short_table(Operation k, Share own) {
    const float* tables = static_cast<const float*>(k.w);
    each_group(k, own, [&](int64_t group) {
        return [&k, rows = ShortTable(tables + group * CUBIC * SHORT)](vec x) {
            const Places at = place(x, k);
            vec p[CUBIC];
            for (int j = 0; j < CUBIC; ++j) p[j] = rows.at(j, at.cell);
            const vec value = piece(p, CUBIC, at);
            return k.silu ? value + silu(x) : value;
        };
    });
}

void rational(Operation k, Share own) {
    const float* coefficients = static_cast<const float*>(k.w);
    each_group(k, own, [&](int64_t group) {
        return [&k, own = coefficients + group * 10](vec x) {
            const vec value = rational(own, x);
            return k.silu ? value + silu(x) : value;
        };
    });
}

void run(const Decoder& d, const Operation& k, int64_t token, int64_t position, int thread, int threads) {
    const float *a = k.a, *w = static_cast<const float*>(k.w);
    const Share own = share_of(k.I, thread, threads);
    auto each = [&](auto phi) { ::each(k, own.begin, own.end, phi); };
    switch (k.kind) {
        case EMBED:
            if (!thread) std::memcpy(k.y, d.embedding + token * k.I, k.I * sizeof(float));
            break;
        case NORM:
            if (!thread) normalize(k);
            break;
        case MATRIX: k.int8 ? matrix<int8_t>(k, thread, threads) : matrix<float>(k, thread, threads); break;
        case ATTENTION: attention(d, k, position, thread, threads); break;
        case TABLE: table(k, own); break;
        case SHORT_TABLE: short_table(k, own); break;
        case RATIONAL: rational(k, own); break;
        case SILU: each([](vec x) { return silu(x); }); break;
        case GELU: each([](vec x) { return gelu(x); }); break;
        case RELU: each([](vec x) { return x < 0 ? vec{} : x; }); break;
        case SQUARE: each([](vec x) { return x * x; }); break;
        case XIELU:  // w: a_p, a_n, b
            each([&](vec x) {
                const vec below = exponential(x > 0 ? vec{} : x) - 1.0f - x;
                return (x > 0 ? w[0] * x * x : w[1] * below) + w[2] * x;
            });
            break;
        case POLYNORM:
            if (!thread) polynorm(k);
            break;
        case MULTIPLY: each([](vec x) { return x; }); break;
        case ADD:
            for (int64_t i = own.begin; i < own.end; ++i) k.y[i] = a[i] + k.u[i];
            break;
        case EDGE: k.int8 ? edge<int8_t>(k, thread, threads) : edge<float>(k, thread, threads); break;
        case FEATURES: features(k, thread, threads); break;
    }
}

}  // namespace

extern "C" {

// Columns of a tile, which weights are packed for.
int64_t kanlm_decode_tile() { return W; }

// The token's logits go to where the last operation writes; its keys and values to `position` of the cache.
void kanlm_decode_step(const Decoder* d, int64_t token, int64_t position, int32_t wanted) {
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (int64_t n = 0; n < d->count; ++n) {
            const Operation& operation = d->operations[n];
            if (operation.barrier && threads > 1) {
#pragma omp barrier
            }
            run(*d, operation, token, position, thread, threads);
        }
    }
}

}  // extern "C"

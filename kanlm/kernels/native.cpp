// Fused CPU kernels for uniform B-splines of order 1 to 3, called through ctypes (native.py).
//
// Legend: N rows (tokens), C channels, I in, O out, P = O rounded up to whole vectors, K basis functions,
// G intervals, T = order + 1 terms that are not zero at a point.
//
// A uniform B-spline needs no recursion: with t = (x - lo) / h, cell = clamp(floor t, 0, G - 1) and r = t - cell,
// the T functions cell .. cell + order are fixed polynomials of r. Outside the grid a function continues along its
// tangent: r is clamped to [0, 1] and the excess e = (t - cell) - r multiplies the derivative, so
// B_j = p_j(r) + e p_j'(r) and dB_j/dt = p_j'(r) everywhere.
//
// Vectors are GCC/Clang vector extensions, not intrinsics: the compiler lowers them to what the machine has.
// All reductions have a fixed order for a given number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int V = 16;  // floats in a vector
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef float vec_u __attribute__((vector_size(64), aligned(4), may_alias));

const ivec lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_u*>(p) = v; }
inline vec splat(float f) { return vec{} + f; }
inline vec vmin(vec a, vec b) { return a < b ? a : b; }  // a NaN becomes b
inline vec vmax(vec a, vec b) { return a > b ? a : b; }
inline ivec to_int(vec v) { return __builtin_convertvector(v, ivec); }
inline vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

inline int64_t whole(int64_t n) { return (n + V - 1) / V * V; }

template <typename X>
struct Scratch {  // uninitialised, aligned to a vector
    X* data;
    explicit Scratch(int64_t n) : data(static_cast<X*>(std::aligned_alloc(64, whole(n) * sizeof(X)))) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
};

inline vec vexp(vec x) {  // 2^n * e^f with |f| <= ln2 / 2; relative error below 2e-7 in [-87, 88]
    vec y = vmax(vmin(x, splat(88.0f)), splat(-87.0f));
    vec scaled = y * 1.44269504f;
    ivec n = to_int(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)));
    vec f = y - to_float(n) * 0.693359375f - to_float(n) * -2.12194440e-4f;
    vec p = splat(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return p * (vec)((n + 127) << 23);
}

// Where a point lies in the grid.
struct Place {
    ivec cell;
    vec r, e;
};

inline Place place(vec x, float lo, float inv_h, int G) {
    vec t = (x - lo) * inv_h;
    vec inside = vmin(vmax(t, splat(0.0f)), splat(float(G - 1)));  // NaN becomes 0 here and stays NaN in r
    ivec cell = to_int(inside);
    vec local = t - to_float(cell);
    vec r = local < 0 ? splat(0.0f) : (local > 1 ? splat(1.0f) : local);
    return {cell, r, local - r};
}

// The T polynomials p_j(r) and their derivatives.
template <int T>
inline void segments(vec r, vec* p, vec* d) {
    vec q = 1.0f - r;
    if constexpr (T == 2) {
        p[0] = q;
        p[1] = r;
        d[0] = splat(-1.0f);
        d[1] = splat(1.0f);
    } else if constexpr (T == 3) {
        p[0] = 0.5f * q * q;
        p[1] = 0.5f + r * q;
        p[2] = 0.5f * r * r;
        d[0] = -q;
        d[1] = 1.0f - 2.0f * r;
        d[2] = r;
    } else {
        vec r2 = r * r, q2 = q * q;
        p[0] = q2 * q * (1.0f / 6);
        p[1] = (0.5f * r - 1.0f) * r2 + 2.0f / 3;
        p[2] = (0.5f * q - 1.0f) * q2 + 2.0f / 3;
        p[3] = r2 * r * (1.0f / 6);
        d[0] = -0.5f * q2;
        d[1] = (1.5f * r - 2.0f) * r;
        d[2] = (2.0f - 1.5f * q) * q;
        d[3] = 0.5f * r2;
    }
}

// The derivative of sum_j c_j p_j is a spline of one order less in c_{j+1} - c_j: its T - 1 functions at r.
template <int T>
inline void slope_segments(vec r, vec* q) {
    vec unused[T];
    if constexpr (T == 2) q[0] = splat(1.0f);
    else segments<T - 1>(r, q, unused);
}

// Elementwise: y = phi(a) * u

struct Elementwise {
    const float *a, *u, *g, *tables;  // u may be null
    float *y, *da, *du;
    double* sums;  // gradient of the tables, [threads, groups, size]
    int64_t N, C, groups;
    int cells;
    float lo, inv_h;
    int64_t size;  // floats of one group's table
};

// What a call of kanlm_elementwise_value needs beside a, u and y.
struct Function {
    const float* tables;
    int64_t C, groups;
    int kind, order, cells;
    float lo, inv_h;
    int silu;
};

// Loads or stores n <= V floats; the rest reads as zero.
inline vec load_part(const float* p, int n) {
    if (n == V) return load(p);
    float buffer[V] = {};
    std::memcpy(buffer, p, n * sizeof(float));
    return load(buffer);
}
inline void store_part(float* p, vec v, int n) {
    if (n == V) return store(p, v);
    float buffer[V];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(float));
}

inline void add_silu(vec a, vec& value, vec& slope) {
    vec sigmoid = 1.0f / (1.0f + vexp(-a));
    value += a * sigmoid;
    slope += sigmoid * (1.0f + a * (1.0f - sigmoid));
}

// A function is built for the channels [c, c + V) of one group, or of several groups where those are narrower than a
// vector (NARROW). `accumulate` adds w * d phi / d table over the
// lanes [from, to); `flush` ends that.

// A spline's table holds T rows of `cells` coefficients of powers of r. With at most 32 cells a row stays in two
// registers and a lookup is one permutation; otherwise (REGISTERS = 0) it reads memory.
template <int T, int REGISTERS, bool SILU>
struct Spline {
    const Elementwise& k;
    const float* rows;
    vec low[T], high[T];
    ivec offset;  // of each lane's group, in floats
    Place s;

    Spline(const Elementwise& k, int64_t c, bool narrow) : k(k), offset{}, sums(k.g ? int64_t(k.cells) * T * V : 0) {
        if (k.g) std::fill(sums.data, sums.data + int64_t(k.cells) * T * V, 0.0f);
        lowest = ivec{} + int32_t(k.cells);
        highest = ivec{} - 1;
        const int64_t width = k.C / k.groups, group = c / width;
        rows = k.tables + group * k.size;
        if (narrow)
            for (int l = 0; l < V; ++l)
                offset[l] = int32_t((std::min(c + l, k.C - 1) / width - group) * k.size);
        for (int j = 0; j < T; ++j) {
            float padded[2 * V] = {};
            if (REGISTERS) std::memcpy(padded, rows + j * k.cells, k.cells * sizeof(float));
            low[j] = load(padded);
            high[j] = load(padded + V);
        }
    }
    vec at(int j) const {
        if constexpr (REGISTERS == 1) return __builtin_shuffle(low[j], s.cell);
        if constexpr (REGISTERS == 2) return __builtin_shuffle(low[j], high[j], s.cell);
        ivec index = offset + s.cell;
        vec out;
        for (int l = 0; l < V; ++l) out[l] = rows[j * k.cells + index[l]];
        return out;
    }
    void evaluate(vec a, vec& value, vec& slope) {
        s = place(a, k.lo, k.inv_h, k.cells);
        value = at(T - 1);
        slope = splat(0.0f);
        for (int j = T - 2; j >= 0; --j) {
            slope = slope * s.r + value;
            value = value * s.r + at(j);
        }
        value += s.e * slope;
        slope *= k.inv_h;
        if (SILU) add_silu(a, value, slope);
    }
    // d phi / d coefficient_j = r^j + e j r^(j-1). Terms wait in a small buffer, which `flush` sums cell by cell with
    // masked additions, only over the cells that occur.
    void accumulate(vec, vec w, int from, int to) {
        waiting_cell[waiting] = lane_numbers >= from && lane_numbers < to ? s.cell : -1;
        lowest = s.cell < lowest ? s.cell : lowest;
        highest = s.cell > highest ? s.cell : highest;
        vec power = w, below = splat(0.0f);
        for (int j = 0; j < T; ++j) {
            part[waiting][j] = power + s.e * (float(j) * below);
            below = power;
            power *= s.r;
        }
        if (++waiting == BUFFER) flush();
    }
    void flush() {
        int first = k.cells, last = -1;
        for (int l = 0; l < V; ++l) {
            first = std::min(first, int(lowest[l]));
            last = std::max(last, int(highest[l]));
        }
        for (int cell = first; cell <= last; ++cell) {
            vec total[T];
            for (int j = 0; j < T; ++j) total[j] = load(sums.data + (int64_t(cell) * T + j) * V);
            for (int n = 0; n < waiting; ++n) {
                ivec here = waiting_cell[n] == cell;
                for (int j = 0; j < T; ++j) total[j] += here ? part[n][j] : splat(0.0f);
            }
            for (int j = 0; j < T; ++j) store(sums.data + (int64_t(cell) * T + j) * V, total[j]);
        }
        waiting = 0;
        lowest = ivec{} + int32_t(k.cells);
        highest = ivec{} - 1;
    }
    // Adds lane l's gradient to `total` [size].
    void reduce(int l, double* total) const {
        for (int cell = 0; cell < k.cells; ++cell)
            for (int j = 0; j < T; ++j) total[j * k.cells + cell] += sums.data[(int64_t(cell) * T + j) * V + l];
    }

    static constexpr int BUFFER = 32;
    ivec waiting_cell[BUFFER], lowest, highest;
    vec part[BUFFER][T];
    int waiting = 0;
    Scratch<float> sums;  // [cells, T, V]
};

// P(x) / Q(x), P = sum_n p_n x^n (n <= 5), Q = 1 + f1^2 + f2^2, f1 = q0 x + q1 x^2, f2 = q2 x + q3 x^2; size 10.
template <bool SILU>
struct Rational {
    vec c[10];
    vec first, second, inverse, ratio;

    Rational(const Elementwise& k, int64_t channel, bool) {
        const int64_t width = k.C / k.groups;
        for (int j = 0; j < 10; ++j)
            for (int l = 0; l < V; ++l) c[j][l] = k.tables[std::min(channel + l, k.C - 1) / width * 10 + j];
    }
    void evaluate(vec x, vec& value, vec& slope) {
        vec p = c[5], dp = splat(0.0f);
        for (int n = 4; n >= 0; --n) {
            dp = dp * x + p;
            p = p * x + c[n];
        }
        first = (c[6] + c[7] * x) * x;
        second = (c[8] + c[9] * x) * x;
        inverse = 1.0f / (1.0f + first * first + second * second);
        vec dq = 2.0f * (first * (c[6] + 2.0f * c[7] * x) + second * (c[8] + 2.0f * c[9] * x));
        ratio = p * inverse;
        value = ratio;
        slope = (dp - ratio * dq) * inverse;
        if (SILU) add_silu(x, value, slope);
    }
    void accumulate(vec x, vec w, int from, int) {
        w = lane_numbers < from ? splat(0.0f) : w * inverse;  // lanes beyond the last have w = 0
        vec power = w;
        for (int j = 0; j < 6; ++j) {
            total[j] += power;
            power *= x;
        }
        vec shared = -2.0f * w * ratio * x;
        total[6] += shared * first;
        total[7] += shared * first * x;
        total[8] += shared * second;
        total[9] += shared * second * x;
    }
    void flush() {}
    void reduce(int l, double* sum) const {
        for (int j = 0; j < 10; ++j) sum[j] += total[j][l];
    }

    vec total[10] = {};
};

// The activations of the MLP arms, fused the same way; no table.
template <int KIND>
struct Fixed {
    Fixed(const Elementwise&, int64_t, bool) {}
    void evaluate(vec x, vec& value, vec& slope) {
        value = slope = splat(0.0f);
        if constexpr (KIND == 0) {
            add_silu(x, value, slope);
        } else if constexpr (KIND == 1) {  // GELU; Phi after Abramowitz & Stegun 1964, 7.1.26, error below 1e-7
            vec z = (x < 0 ? -x : x) * 0.70710678f, density = vexp(-0.5f * x * x);
            vec t = 1.0f / (1.0f + 0.3275911f * z);
            vec tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
                        0.254829592f) * t * density * 0.5f;
            vec cdf = x < 0 ? tail : 1.0f - tail;
            value = x * cdf;
            slope = cdf + x * density * 0.39894228f;
        } else {  // squared ReLU; a NaN stays one
            vec above = x < 0 ? splat(0.0f) : x;
            value = above * above;
            slope = 2.0f * above;
        }
    }
    void accumulate(vec, vec, int, int) {}
    void flush() {}
    void reduce(int, double*) const {}
};

constexpr int64_t SMALL = 1 << 14;  // vector lanes of work for which waking a second thread does not pay

constexpr int64_t ROWS = 32;    // rows whose values stay in the second-level cache while all groups visit them
constexpr int64_t BLOCKS = 16;  // blocks of rows accumulated in fp32 before the sum goes on in fp64

// The vector at `at`, of which the lanes [first, last) are new; the lanes before are computed twice, with one result.
template <typename F, bool BACKWARD>
inline void step(const Elementwise& k, F& function, int64_t at, int first, int last) {
    vec a = load_part(k.a + at, last), u = k.u ? load_part(k.u + at, last) : splat(1.0f), value, slope;
    function.evaluate(a, value, slope);
    if constexpr (!BACKWARD) {
        store_part(k.y + at, value * u, last);
    } else {
        vec g = load_part(k.g + at, last), gu = g * u;
        store_part(k.da + at, gu * slope, last);
        if (k.du) store_part(k.du + at, g * value, last);
        function.accumulate(a, gu, first, last);
    }
}

// Rows [begin, end). Row by row where a group fills a vector, else in strips of V channels.
template <typename F, bool BACKWARD>
void elementwise_rows(const Elementwise& k, int64_t begin, int64_t end, double* sums) {
    const int64_t width = k.C / k.groups, strip = width < V ? V : width;
    const int64_t last_row = std::min(end, begin + ROWS * BLOCKS);
    std::vector<std::unique_ptr<F>> functions;
    for (int64_t c0 = 0; c0 < k.C; c0 += strip) functions.push_back(std::make_unique<F>(k, c0, width < V));
    for (int64_t block = begin; block < last_row; block += ROWS)
        for (int64_t c0 = 0; c0 < k.C; c0 += strip) {
            const int64_t channels = std::min(strip, k.C - c0), full = channels / V * V, rest = channels - full;
            F& function = *functions[c0 / strip];
            for (int64_t row = block; row < std::min(last_row, block + ROWS); ++row) {
                const int64_t at = row * k.C + c0;
                for (int64_t c = 0; c < full; c += V) step<F, BACKWARD>(k, function, at + c, 0, V);
                if (rest && full) step<F, BACKWARD>(k, function, at + channels - V, V - rest, V);
                else if (rest) step<F, BACKWARD>(k, function, at, 0, int(rest));
            }
        }
    if (BACKWARD)
        for (int64_t c0 = 0; c0 < k.C; c0 += strip) {
            F& function = *functions[c0 / strip];
            function.flush();
            for (int64_t l = 0; l < std::min<int64_t>(V, k.C - c0); ++l)
                function.reduce(int(l), sums + (c0 + (width < V ? l : 0)) / width * k.size);
        }
}

template <typename F>
void elementwise(const Elementwise& k, int threads) {
    const int64_t rows = ROWS * BLOCKS;
    if (k.N * k.C < SMALL) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < threads; ++piece) {
        const int64_t begin = piece * k.N / threads, end = (piece + 1) * k.N / threads;
        for (int64_t row = begin; row < end; row += rows) {
            if (k.g) elementwise_rows<F, true>(k, row, end, k.sums ? k.sums + piece * k.groups * k.size : nullptr);
            else elementwise_rows<F, false>(k, row, end, nullptr);
        }
    }
}

template <int T, bool SILU>
void spline(const Elementwise& k, int threads) {
    if (k.C / k.groups < V || k.cells > 2 * V) return elementwise<Spline<T, 0, SILU>>(k, threads);
    if (k.cells > V) return elementwise<Spline<T, 2, SILU>>(k, threads);
    elementwise<Spline<T, 1, SILU>>(k, threads);
}

// Full edge: y[n, o] += sum_i sum_j B_j(x[n, i]) w[i, cell + j, o]

struct Edge {
    const float *x, *w, *g;
    float *y, *dx, *dw;
    int64_t N, I, P, K;
    int G;
    float lo, inv_h;
};

// Values b [T, n] (or the T - 1 terms of a slope) and cells of n points; n is padded up to whole vectors in the scratch.
template <int T, bool SLOPE>
inline void evaluate(const float* x, int64_t n, float lo, float inv_h, int G, float* b, int64_t stride, int32_t* cell) {
    for (int64_t i = 0; i < n; i += V) {
        Place s = place(load_part(x + i, int(std::min<int64_t>(V, n - i))), lo, inv_h, G);
        vec p[T], d[T];
        if constexpr (SLOPE) {
            slope_segments<T>(s.r, p);
            for (int j = 0; j < T - 1; ++j) store(b + j * stride + i, p[j] * inv_h);
        } else {
            segments<T>(s.r, p, d);
            for (int j = 0; j < T; ++j) store(b + j * stride + i, p[j] + s.e * d[j]);
        }
        *reinterpret_cast<ivec*>(cell + i) = s.cell;
    }
}

constexpr int64_t TOKENS = 128;   // rows of a tile: coefficients beyond the second-level cache are read once for all
constexpr int64_t PANEL = 64;     // inputs whose basis values are alive at once
constexpr int64_t TILE_VECS = 8;  // output vectors of a tile

// Coefficients are packed in column tiles [I, K, TILE_VECS * V] one after the other (the last one narrower), so that
// the rows a tile works on are contiguous and do not fall on the same cache sets.
struct Tile {
    int64_t first, vecs;  // in vectors
    Tile(int64_t number, int64_t P) : first(number * TILE_VECS), vecs(std::min(TILE_VECS, P / V - number * TILE_VECS)) {}
};
inline int64_t tiles_of(int64_t P) { return (P / V + TILE_VECS - 1) / TILE_VECS; }

template <int T, bool SLOPE>
inline void evaluate_panel(const Edge& k, int64_t row, int64_t tokens, int64_t i, float* b, int32_t* cell) {
    for (int64_t t = 0; t < tokens; ++t)
        evaluate<T, SLOPE>(k.x + (row + t) * k.I + i, std::min(PANEL, k.I - i), k.lo, k.inv_h, k.G, b + t * T * PANEL, PANEL,
                           cell + t * PANEL);
}

template <int T, int NV>
inline void forward_tile(const Edge& k, int64_t tokens, int64_t row, int64_t first, int64_t o, const float* b,
                         const int32_t* cell) {
    constexpr int64_t INPUTS = T == 2 ? 8 : 4;  // their rows of w stay in the first-level cache
    const float* tile = k.w + k.I * k.K * o;
    const int64_t last = std::min(k.I, first + PANEL);
    for (int64_t i0 = first; i0 < last; i0 += INPUTS) {
        const int64_t i1 = std::min(last, i0 + INPUTS);
        for (int64_t t = 0; t < tokens; ++t) {
            float* y = k.y + (row + t) * k.P + o;
            vec acc[NV];
            for (int v = 0; v < NV; ++v) acc[v] = load(y + v * V);
            for (int64_t i = i0; i < i1; ++i) {
                const float* w = tile + (i * k.K + cell[t * PANEL + i - first]) * (NV * V);
                for (int j = 0; j < T; ++j) {
                    const float f = b[(t * T + j) * PANEL + i - first];
                    for (int v = 0; v < NV; ++v) acc[v] += f * load(w + (j * NV + v) * V);
                }
            }
            for (int v = 0; v < NV; ++v) store(y + v * V, acc[v]);
        }
    }
}

// The sums of four vectors, each in four equal lanes.
inline vec sums(vec a, vec b, vec c, vec d) {
    const ivec low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const ivec even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const ivec by_two = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
    const ivec by_one = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    vec ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 8);
    vec cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, low + 8);
    vec s = __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, even + 4);
    s += __builtin_shuffle(s, by_two);
    return s + __builtin_shuffle(s, by_one);
}

template <int T, int NV>
inline void input_gradient_tile(const Edge& k, int64_t tokens, int64_t row, int64_t first, int64_t o, const float* b,
                                const int32_t* cell) {
    const float* tile = k.w + k.I * k.K * o;
    const int64_t last = std::min(k.I, first + PANEL);
    for (int64_t i0 = first; i0 < last; i0 += 4) {
        const int64_t inputs = std::min<int64_t>(4, last - i0);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* g = k.g + (row + t) * k.P + o;
            vec grad[NV], total[4] = {};
            for (int v = 0; v < NV; ++v) grad[v] = load(g + v * V);
            for (int64_t n = 0; n < inputs; ++n) {
                const int64_t i = i0 + n;
                const float* w = tile + (i * k.K + cell[t * PANEL + i - first]) * (NV * V);
                vec even = splat(0.0f), odd = splat(0.0f);
                for (int v = 0; v < NV; ++v) {
                    vec s = b[t * T * PANEL + i - first] * load(w + v * V);
                    for (int j = 1; j < T - 1; ++j) s += b[(t * T + j) * PANEL + i - first] * load(w + (j * NV + v) * V);
                    (v % 2 ? odd : even) += s * grad[v];
                }
                total[n] = even + odd;
            }
            vec s = sums(total[0], total[1], total[2], total[3]);
            float* dx = k.dx + (row + t) * k.I + i0;
            for (int64_t n = 0; n < inputs; ++n) dx[n] += s[4 * n];
        }
    }
}

#define FOR_WIDTH(NV, CALL)       \
    switch (NV) {                 \
        case 1: CALL(1); break;   \
        case 2: CALL(2); break;   \
        case 3: CALL(3); break;   \
        case 4: CALL(4); break;   \
        case 5: CALL(5); break;   \
        case 6: CALL(6); break;   \
        case 7: CALL(7); break;   \
        default: CALL(8); break;  \
    }

template <int T>
void edge_forward(const Edge& k, int threads) {
    const int64_t rows = (k.N + TOKENS - 1) / TOKENS, columns = tiles_of(k.P);
    // With few rows (decoding) the columns are divided among the threads too, and each evaluates the basis.
    const int64_t parts = rows >= threads ? 1 : columns;
    if (k.N * k.I * k.P < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        Scratch<float> b(std::min(TOKENS, k.N) * T * PANEL);
        Scratch<int32_t> cell(std::min(TOKENS, k.N) * PANEL);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < rows * parts; ++job) {
            const int64_t row = job / parts * TOKENS, part = job % parts, n = std::min(TOKENS, k.N - row);
            for (int64_t i = 0; i < k.I; i += PANEL) {
                evaluate_panel<T, false>(k, row, n, i, b.data, cell.data);
                for (int64_t c = part; c < columns; c += parts) {
                    const Tile tile(c, k.P);
#define CALL(NV) forward_tile<T, NV>(k, n, row, i, tile.first * V, b.data, cell.data)
                    FOR_WIDTH(tile.vecs, CALL)
#undef CALL
                }
            }
        }
    }
}

// What a call for a few rows (decoding) needs beside x and y. w [I, K, P] is packed; with a base branch its weights are
// the last of the K rows of an input.
struct Few {
    const float* w;
    int64_t I, O, K;
    int order, G, base;
    float lo, inv_h;
};

// Columns [o, o + NV * V) of one row, of which `columns` are written.
template <int T, int NV, bool BASE>
inline void few_tile(const Few& k, const float* x, int64_t o, int64_t columns, float* y) {
    alignas(64) float b[(T + 1) * PANEL];
    alignas(64) int32_t cell[PANEL];
    const float* tile = k.w + k.I * k.K * o;
    vec acc[NV] = {};
    for (int64_t first = 0; first < k.I; first += PANEL) {
        const int64_t n = std::min(PANEL, k.I - first);
        evaluate<T, false>(x + first, n, k.lo, k.inv_h, k.G, b, PANEL, cell);
        if constexpr (BASE)
            for (int64_t i = 0; i < n; i += V) {
                vec value = splat(0.0f), slope = splat(0.0f);
                add_silu(load_part(x + first + i, int(std::min<int64_t>(V, n - i))), value, slope);
                store(b + T * PANEL + i, value);
            }
        for (int64_t i = 0; i < n; ++i) {
            const float* rows = tile + (first + i) * k.K * (NV * V);
            const float* w = rows + cell[i] * (NV * V);
            for (int j = 0; j < T; ++j)
                for (int v = 0; v < NV; ++v) acc[v] += b[j * PANEL + i] * load(w + (j * NV + v) * V);
            if constexpr (BASE)
                for (int v = 0; v < NV; ++v) acc[v] += b[T * PANEL + i] * load(rows + ((k.K - 1) * NV + v) * V);
        }
    }
    for (int v = 0; v < NV && v * V < columns; ++v)
        store_part(y + o + v * V, acc[v], int(std::min<int64_t>(V, columns - v * V)));
}

template <int T, bool BASE>
void edge_few(const Few& k, const float* x, float* y, int64_t N, int threads) {
    const int64_t P = whole(k.O), tiles = tiles_of(P);
    if (N * k.I * P < SMALL) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < N * tiles; ++job) {
        const Tile tile(job % tiles, P);
        const int64_t row = job / tiles, o = tile.first * V;
#define CALL(NV) few_tile<T, NV, BASE>(k, x + row * k.I, o, std::min<int64_t>(NV * V, k.O - o), y + row * k.O)
        FOR_WIDTH(tile.vecs, CALL)
#undef CALL
    }
}

// Differences of neighbouring coefficients of an input, packed as they are; the last of an input is not used.
void differences(const Edge& k, float* to, int threads) {
    for (int64_t c = 0; c < tiles_of(k.P); ++c) {
        const Tile tile(c, k.P);
        const int64_t width = tile.vecs * V, start = k.I * k.K * tile.first * V;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < k.I; ++i) {
            const float* w = k.w + start + i * k.K * width;
            float* d = to + start + i * k.K * width;
            for (int64_t at = 0; at < (k.K - 1) * width; ++at) d[at] = w[at + width] - w[at];
        }
    }
}

template <int T>
void edge_input_gradient(Edge k, int threads) {
    Scratch<float> steps(k.I * k.K * k.P);
    differences(k, steps.data, threads);
    k.w = steps.data;
    const int64_t rows = (k.N + TOKENS - 1) / TOKENS, columns = tiles_of(k.P);
#pragma omp parallel num_threads(threads)
    {
        Scratch<float> b(std::min(TOKENS, k.N) * T * PANEL);
        Scratch<int32_t> cell(std::min(TOKENS, k.N) * PANEL);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < rows; ++job) {
            const int64_t row = job * TOKENS, n = std::min(TOKENS, k.N - row);
            std::fill(k.dx + row * k.I, k.dx + (row + n) * k.I, 0.0f);
            for (int64_t i = 0; i < k.I; i += PANEL) {
                evaluate_panel<T, true>(k, row, n, i, b.data, cell.data);
                for (int64_t c = 0; c < columns; ++c) {
                    const Tile tile(c, k.P);
#define CALL(NV) input_gradient_tile<T, NV>(k, n, row, i, tile.first * V, b.data, cell.data)
                    FOR_WIDTH(tile.vecs, CALL)
#undef CALL
                }
            }
        }
    }
}

// The rows of dw that belong to one cell stay in registers while the rows of g that fall into it stream past.
template <int T, int NV>
inline void coefficient_tile(const float* g, int64_t P, const int32_t* order, int64_t begin, int64_t end,
                             const float* b, int64_t stride, float* dw, int64_t width) {
    vec acc[T][NV];
    for (int j = 0; j < T; ++j)
        for (int v = 0; v < NV; ++v) acc[j][v] = load(dw + j * width + v * V);
    for (int64_t at = begin; at < end; ++at) {
        const float* row = g + int64_t(order[at]) * P;
        for (int v = 0; v < NV; ++v) {
            vec grad = load(row + v * V);
            for (int j = 0; j < T; ++j) acc[j][v] += b[j * stride + at] * grad;
        }
    }
    for (int j = 0; j < T; ++j)
        for (int v = 0; v < NV; ++v) store(dw + j * width + v * V, acc[j][v]);
}

// x is transposed here: [I, N]. dw, packed like w, is overwritten.
template <int T>
void edge_coefficient_gradient(const Edge& k, int threads) {
    constexpr int64_t VECS = T == 2 ? 8 : 4;  // T * VECS accumulators fit the registers
    const int64_t vecs = k.P / V;
    // A block of g fits half of a second-level cache of 1 MiB.
    const int64_t rows = std::max<int64_t>(128, std::min<int64_t>(4096, whole((1 << 17) / k.P)));
#pragma omp parallel num_threads(threads)
    {
        Scratch<float> b(T * rows), sorted(T * rows);
        Scratch<int32_t> cell(rows), order(rows);
        std::vector<int64_t> start(k.G + 1);
        for (int64_t row = 0; row < k.N; row += rows) {
            const int64_t n = std::min(rows, k.N - row);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < k.I; ++i) {
                evaluate<T, false>(k.x + i * k.N + row, n, k.lo, k.inv_h, k.G, b.data, rows, cell.data);
                std::fill(start.begin(), start.end(), 0);
                for (int64_t t = 0; t < n; ++t) ++start[cell.data[t] + 1];
                for (int c = 0; c < k.G; ++c) start[c + 1] += start[c];
                for (int64_t t = 0; t < n; ++t) {
                    const int64_t at = start[cell.data[t]]++;
                    order.data[at] = int32_t(t);
                    for (int j = 0; j < T; ++j) sorted.data[j * rows + at] = b.data[j * rows + t];
                }
                for (int64_t v = 0; v < vecs; v += VECS) {
                    const Tile tile(v / TILE_VECS, k.P);
                    const int64_t width = tile.vecs * V;
                    float* dw = k.dw + k.I * k.K * tile.first * V + i * k.K * width + (v - tile.first) * V;
                    const int64_t n_vecs = std::min(VECS, vecs - v);
                    if (row == 0)
                        for (int64_t m = 0; m < k.K; ++m) std::fill(dw + m * width, dw + m * width + n_vecs * V, 0.0f);
                    for (int c = 0; c < k.G; ++c) {  // start[c] is now the end of cell c
                        const int64_t begin = c ? start[c - 1] : 0;
                        if (begin == start[c]) continue;
#define CALL(NV)                                                                                          \
    coefficient_tile<T, NV>(k.g + row * k.P + v * V, k.P, order.data, begin, start[c], sorted.data, rows, \
                            dw + c * width, width)
                        FOR_WIDTH(n_vecs, CALL)
#undef CALL
                    }
                }
            }
        }
    }
}

// weight [O, K, I] to packed tiles (columns beyond O are zero), or back.
template <bool BACK>
void repack(float* weight, float* packed, int64_t O, int64_t I, int64_t K, int64_t P, int threads) {
    const int64_t columns = tiles_of(P), blocks = (I + V - 1) / V;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t block = 0; block < blocks; ++block) {
            const Tile tile(c, P);
            const int64_t width = tile.vecs * V, first = tile.first * V, i0 = block * V, i1 = std::min(I, i0 + V);
            float* to = packed + I * K * first;
            for (int64_t m = 0; m < K; ++m)
                for (int64_t o = 0; o < width; ++o)
                    for (int64_t i = i0; i < i1; ++i) {
                        float& there = to[(i * K + m) * width + o];
                        if (!BACK) there = first + o < O ? weight[((first + o) * K + m) * I + i] : 0.0f;
                        else if (first + o < O) weight[((first + o) * K + m) * I + i] = there;
                    }
        }
}

#define FOR_ORDER(ORDER, CALL)   \
    if (ORDER == 1) CALL(2);     \
    else if (ORDER == 2) CALL(3); \
    else CALL(4);

}  // namespace

extern "C" {

void kanlm_edge_pack(const float* weight, float* packed, int64_t O, int64_t I, int64_t K, int64_t P, int threads) {
    repack<false>(const_cast<float*>(weight), packed, O, I, K, P, threads);
}

void kanlm_edge_unpack(float* weight, const float* packed, int64_t O, int64_t I, int64_t K, int64_t P, int threads) {
    repack<true>(weight, const_cast<float*>(packed), O, I, K, P, threads);
}

// y = phi(a) * u where g is null, else the gradients da, du (where not null) and sums [threads, groups, size], which is
// zero on entry. kind 0: B-splines, tables [groups, order + 1, cells]; 1: rational, tables [groups, 10];
// 2, 3, 4: SiLU, GELU, squared ReLU, without a table. silu: SiLU is added to a learned function.
void kanlm_elementwise(const float* a, const float* u, const float* g, float* y, float* da, float* du,
                       const float* tables, double* sums, int64_t N, int64_t C, int64_t groups, int kind, int order,
                       int cells, float lo, float inv_h, int silu, int threads) {
    const int64_t size = kind == 0 ? (order + 1) * cells : kind == 1 ? 10 : 0;
    Elementwise k{a, u, g, tables, y, da, du, sums, N, C, groups, cells, lo, inv_h, size};
    if (kind == 0) {
        if (silu) {
#define CALL(T) spline<T, true>(k, threads)
            FOR_ORDER(order, CALL)
        } else {
#undef CALL
#define CALL(T) spline<T, false>(k, threads)
            FOR_ORDER(order, CALL)
        }
#undef CALL
    } else if (kind == 1) {
        silu ? elementwise<Rational<true>>(k, threads) : elementwise<Rational<false>>(k, threads);
    } else if (kind == 2) {
        elementwise<Fixed<0>>(k, threads);
    } else if (kind == 3) {
        elementwise<Fixed<1>>(k, threads);
    } else {
        elementwise<Fixed<2>>(k, threads);
    }
}

// y = phi(a) * u without gradients: kanlm_elementwise whose unchanging arguments are in `k`.
void kanlm_elementwise_value(const Function* k, const float* a, const float* u, float* y, int64_t N, int threads) {
    kanlm_elementwise(a, u, nullptr, y, nullptr, nullptr, k->tables, nullptr, N, k->C, k->groups, k->kind, k->order,
                      k->cells, k->lo, k->inv_h, k->silu, threads);
}

// y [N, O] of a few rows x [N, I], the base branch included.
void kanlm_edge_few(const Few* k, const float* x, float* y, int64_t N, int threads) {
    if (k->base) {
#define CALL(T) edge_few<T, true>(*k, x, y, N, threads)
        FOR_ORDER(k->order, CALL)
    } else {
#undef CALL
#define CALL(T) edge_few<T, false>(*k, x, y, N, threads)
        FOR_ORDER(k->order, CALL)
    }
#undef CALL
}

// y [N, P] is added to.
void kanlm_edge_forward(const float* x, const float* w, float* y, int64_t N, int64_t I, int64_t P, int64_t K, int order,
                        int G, float lo, float inv_h, int threads) {
    Edge k{x, w, nullptr, y, nullptr, nullptr, N, I, P, K, G, lo, inv_h};
#define CALL(T) edge_forward<T>(k, threads)
    FOR_ORDER(order, CALL)
#undef CALL
}

void kanlm_edge_input_gradient(const float* x, const float* w, const float* g, float* dx, int64_t N, int64_t I,
                               int64_t P, int64_t K, int order, int G, float lo, float inv_h, int threads) {
    Edge k{x, w, g, nullptr, dx, nullptr, N, I, P, K, G, lo, inv_h};
#define CALL(T) edge_input_gradient<T>(k, threads)
    FOR_ORDER(order, CALL)
#undef CALL
}

void kanlm_edge_coefficient_gradient(const float* x_transposed, const float* g, float* dw, int64_t N, int64_t I,
                                     int64_t P, int64_t K, int order, int G, float lo, float inv_h, int threads) {
    Edge k{x_transposed, nullptr, g, nullptr, nullptr, dw, N, I, P, K, G, lo, inv_h};
#define CALL(T) edge_coefficient_gradient<T>(k, threads)
    FOR_ORDER(order, CALL)
#undef CALL
}

}  // extern "C"

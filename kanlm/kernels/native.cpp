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
// Vectors are GCC/Clang vector extensions, which the compiler lowers to what the machine has; intrinsics stand only where GCC
// lowers them badly.
// All reductions have a fixed order for a given number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "exponential.h"

namespace {

// Floats in a vector: those of a register. GCC takes wider ones apart lane by lane where it shuffles, compares or converts.
#if defined(__AVX512F__)
constexpr int V = 16;
#else
constexpr int V = 8;
#endif
constexpr int ROUNDED = 16;  // sizes of rows are multiples of this on every machine; cpu.py rounds the same
typedef float vec __attribute__((vector_size(4 * V)));
typedef int32_t ivec __attribute__((vector_size(4 * V)));
typedef float vec_u __attribute__((vector_size(4 * V), aligned(4), may_alias));

// Permutations of the lanes of one or two vectors. `unpack` and `pair` interleave within quarters of four lanes.
#if defined(__AVX512F__)
const ivec lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
const ivec unpack = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
const ivec pair = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
const ivec halves = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
const ivec quarters = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
#else
const ivec lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7};
const ivec unpack = {0, 8, 1, 9, 4, 12, 5, 13};
const ivec pair = {0, 1, 8, 9, 4, 5, 12, 13};
const ivec halves = {0, 1, 2, 3, 8, 9, 10, 11};
const ivec quarters = {0, 1, 4, 5, 8, 9, 12, 13};
#endif

inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_u*>(p) = v; }
inline vec splat(float f) { return vec{} + f; }
inline vec vmin(vec a, vec b) { return a < b ? a : b; }  // a NaN becomes b
inline vec vmax(vec a, vec b) { return a > b ? a : b; }
inline ivec to_int(vec v) { return __builtin_convertvector(v, ivec); }
inline vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

inline int64_t whole(int64_t n) { return (n + ROUNDED - 1) / ROUNDED * ROUNDED; }

int poison = 0;  // tests set it: scratch then starts as NaN (floats) and -1 (integers)

template <typename X>
struct Scratch {  // uninitialised, aligned to a vector
    X* data;
    explicit Scratch(int64_t n) : data(static_cast<X*>(std::aligned_alloc(64, whole(n) * sizeof(X)))) {
        if (poison) std::memset(data, 0xff, whole(n) * sizeof(X));
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
};

template <typename X, int64_t n>
struct Local {  // the same on the stack
    alignas(64) X data[n];
    Local() {
        if (poison) std::memset(data, 0xff, sizeof(data));
    }
};

inline vec exponential(vec x) { return exponential_of<ivec>(x); }

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

// Elementwise: y = phi(a) * u, or phi(a) * psi(u); with norm(a) and norm(u) in their place where the function says so,
// norm(x) = x / sqrt(mean x^2 + eps) over a row's channels. phi and psi have the same channels and groups.

// A function but for its coefficients, as native.py's Plan. Bit 0 of `normed`: a is; bit 1: u is.
struct Plan {
    int64_t C, groups;
    int kind, order, cells;
    float lo, inv_h;
    int silu, normed;
    float eps;
};
enum Kind { SPLINE, RATIONAL, SILU, GELU, RELU2, IDENTITY };
const Plan NO_FUNCTION{0, 0, IDENTITY};

// Splines: of every cell the coefficients of four powers of r, zero above the order. Where a lookup permutes registers
// (AVX-512) those of one power lie together, else those of one cell.
constexpr int POWERS = 4;
#if defined(__AVX512F__)
inline int64_t place_in_table(int cells, int power, int cell) { return power * whole(cells) + cell; }
#else
inline int64_t place_in_table(int, int power, int cell) { return POWERS * cell + power; }
#endif
inline int64_t size_of_spline(int cells) { return POWERS * whole(cells); }
inline int64_t size_of_table(const Plan& f) {
    return f.kind == SPLINE ? size_of_spline(f.cells) : f.kind == RATIONAL ? 10 : 0;
}

// Of spline functions [T], in a cell where none of them is zero, the coefficients [T] of the powers of r.
template <int T>
constexpr double pieces[T][T] = {};
template <>
constexpr double pieces<2>[2][2] = {{1, -1}, {0, 1}};
template <>
constexpr double pieces<3>[3][3] = {{0.5, -1, 0.5}, {0.5, 1, -1}, {0, 0, 0.5}};
template <>
constexpr double pieces<4>[4][4] = {
    {1 / 6., -0.5, 0.5, -1 / 6.}, {4 / 6., 0, -1, 0.5}, {1 / 6., 0.5, 0.5, -0.5}, {0, 0, 0, 1 / 6.}};

// tables [groups, size] of splines with coefficients [groups, cells + T - 1]
template <int T>
void make_tables(const Plan& f, const float* coefficients, float* tables) {
    const int64_t size = size_of_spline(f.cells);
    std::fill(tables, tables + f.groups * size, 0.0f);
    for (int64_t group = 0; group < f.groups; ++group, tables += size, coefficients += f.cells + T - 1)
        for (int cell = 0; cell < f.cells; ++cell)
            for (int p = 0; p < T; ++p) {
                float total = 0.0f;
                for (int j = 0; j < T; ++j) total += float(pieces<T>[j][p]) * coefficients[cell + j];
                tables[place_in_table(f.cells, p, cell)] = total;
            }
}

// A function with its tables [groups, size]: made of a spline's coefficients, a rational function's as they are.
struct Function : Plan {
    Scratch<float> made;
    const float* tables;

    Function(const Plan& plan, const float* coefficients)
        : Plan(plan), made(kind == SPLINE ? groups * size_of_spline(cells) : 0), tables(coefficients) {
        if (kind != SPLINE) return;
        tables = made.data;
        if (order == 1) make_tables<2>(plan, coefficients, made.data);
        else if (order == 2) make_tables<3>(plan, coefficients, made.data);
        else make_tables<4>(plan, coefficients, made.data);
    }
};

struct Elementwise {
    const Function &f, &s;  // phi; psi, or phi again where there is none
    const float *a, *u, *g;  // u may be null, g is null in forward
    float *y, *da, *du;
    int64_t N;
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
    vec sigmoid = 1.0f / (1.0f + exponential(-a));
    value += a * sigmoid;
    slope += sigmoid * (1.0f + a * (1.0f - sigmoid));
}

inline float sum_of_lanes(vec v) {
    for (int half = V / 2; half > 1; half /= 2) v += __builtin_shuffle(v, lane_numbers ^ half);
    return v[0] + v[1];
}

// Below, a function is built for the channels [c, c + V): all of one group, or of several groups where those are narrower
// than a vector (`narrow`). `accumulate` adds w * d phi / d table over the lanes [from, to) to what waits in the buffer,
// `finish` adds that to fp32 `sums` [sums_size], and `reduce` adds those to the fp64 gradients of the tables.

// Of each lane, the place of its group's table.
inline ivec table_of_lane(const Function& f, int64_t c, int64_t size) {
    const int64_t width = f.C / f.groups;
    ivec at;
    for (int l = 0; l < V; ++l) at[l] = int32_t(std::min(c + l, f.C - 1) / width * size);
    return at;
}

typedef float quad __attribute__((vector_size(16), may_alias));
inline const float* floats_at(const float* begin, int64_t bytes) {
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(begin) + bytes);
}
constexpr int64_t ALL = 1 << 30;  // vectors of a row

// What a function keeps beside the values at hand: nothing.
struct Nothing {
    static constexpr int64_t VECTORS = ALL;
    explicit Nothing(const Function&) {}
};

// Four vectors transposed in each run of four lanes: its lane i of result j was lane j of vector i.
inline void turn(const vec* p, vec* turned) {
    vec a = __builtin_shuffle(p[0], p[1], unpack), b = __builtin_shuffle(p[2], p[3], unpack);
    vec c = __builtin_shuffle(p[0], p[1], unpack + 2), d = __builtin_shuffle(p[2], p[3], unpack + 2);
    turned[0] = __builtin_shuffle(a, b, pair), turned[1] = __builtin_shuffle(a, b, pair + 2);
    turned[2] = __builtin_shuffle(c, d, pair), turned[3] = __builtin_shuffle(c, d, pair + 2);
}

#if defined(__AVX512F__)

// Terms of the coefficient sums of splines, which wait for `flush`.
template <int T>
struct Waiting {
    static constexpr int64_t VECTORS = ALL;
    static constexpr int MOST = 32;
    static constexpr int MASKED = 26;  // vectors read for one that waits, above which scattering is faster; measured
    ivec cell[MOST];
    vec part[MOST][T];  // by power
    int count = 0;

    explicit Waiting(const Function&) {
        if (poison) std::memset(cell, 0xff, sizeof(cell)), std::memset(part, 0xff, sizeof(part));
    }

    // The sums over equal cells: by_cell [cells, T, V] and by_lane [V, cells, 4].
    // Where few cells occur, masked sums in registers; else a lane adds to a table of its own, so that two terms of one
    // vector never meet in memory.
    __attribute__((noinline)) void flush(float* by_cell, float* by_lane, int cells) {
        ivec lowest = cell[0], highest = cell[0];
        for (int n = 1; n < count; ++n) {
            lowest = cell[n] < lowest ? cell[n] : lowest;
            highest = cell[n] > highest ? cell[n] : highest;
        }
        for (int half = V / 2; half; half /= 2) {
            ivec low = __builtin_shuffle(lowest, lane_numbers ^ half), high = __builtin_shuffle(highest, lane_numbers ^ half);
            lowest = low < lowest ? low : lowest;
            highest = high > highest ? high : highest;
        }
        const int first = lowest[0], last = highest[0];
        if ((last - first + 1) * (T + 1) > MASKED) {
            for (int n = 0; n < count; ++n) scatter(n, by_lane, cells);
        } else {
            for (int c = first; c <= last; ++c) {
                vec total[T];
                for (int j = 0; j < T; ++j) total[j] = load(by_cell + (int64_t(c) * T + j) * V);
                for (int n = 0; n < count; ++n) {
                    ivec here = cell[n] == c;
                    for (int j = 0; j < T; ++j) total[j] += here ? part[n][j] : splat(0.0f);
                }
                for (int j = 0; j < T; ++j) store(by_cell + (int64_t(c) * T + j) * V, total[j]);
            }
        }
        count = 0;
    }
    void scatter(int n, float* by_lane, int cells) {
        vec third = T > 2 ? part[n][T > 2 ? 2 : 0] : splat(0.0f), fourth = T > 3 ? part[n][T > 3 ? 3 : 0] : splat(0.0f);
        const vec parts[4] = {part[n][0], part[n][1], third, fourth};
        vec turned[4];  // lane l's powers are quad l / 4 of turned[l % 4]
        turn(parts, turned);
        const quad* powers = reinterpret_cast<const quad*>(turned);
        for (int l = 0; l < V; ++l) {
            quad* total = reinterpret_cast<quad*>(by_lane + (int64_t(l) * cells + cell[n][l]) * 4);
            *total += powers[l % 4 * (V / 4) + l / 4];
        }
    }
};

// A spline. With at most 32 cells a row of its table stays in two registers and a lookup is one permutation; otherwise
// (REGISTERS = 0) it reads memory.
template <int T, int REGISTERS, bool WITH_SILU>
struct Spline {
    const Function& f;
    const float* rows;
    const int64_t stride;
    vec low[T], high[T];
    ivec offset;  // of each lane's group, in floats
    Place s;

    static constexpr bool BY_ROW = false;
    using Buffer = Waiting<T>;

    Spline(const Function& f, int64_t c, bool narrow) : f(f), rows(f.tables), stride(whole(f.cells)) {
        if (REGISTERS) {
            rows += c / (f.C / f.groups) * size_of_spline(f.cells);
            for (int j = 0; j < T; ++j) low[j] = load(rows + j * stride);
            if (REGISTERS == 2)
                for (int j = 0; j < T; ++j) high[j] = load(rows + j * stride + V);
        } else {
            offset = table_of_lane(f, c, size_of_spline(f.cells));
        }
    }
    vec at(int j) const {
        if constexpr (REGISTERS == 1) return __builtin_shuffle(low[j], s.cell);
        if constexpr (REGISTERS == 2) return __builtin_shuffle(low[j], high[j], s.cell);
        ivec index = offset + s.cell;
        vec out;
        for (int l = 0; l < V; ++l) out[l] = rows[j * stride + index[l]];
        return out;
    }
    template <bool>
    void find(Buffer&, int, int64_t, vec) {}
    void evaluate(const Buffer&, int, vec a, vec& value, vec& slope) {
        s = place(a, f.lo, f.inv_h, f.cells);
        value = at(T - 1);
        slope = splat(0.0f);
        for (int j = T - 2; j >= 0; --j) {
            slope = slope * s.r + value;
            value = value * s.r + at(j);
        }
        value += s.e * slope;
        slope *= f.inv_h;
        if (WITH_SILU) add_silu(a, value, slope);
    }
    static int64_t sums_size(const Function& f) { return f.cells * (T + 4) * V; }
    static float* by_lane(const Function& f, float* sums) { return sums + f.cells * T * V; }

    // d phi / d coefficient_j = r^j + e j r^(j-1)
    void accumulate(Buffer& waiting, int, float* sums, vec, vec w, int from, int to) {
        if (from != 0 || to != V) w = lane_numbers >= from && lane_numbers < to ? w : splat(0.0f);
        waiting.cell[waiting.count] = s.cell;
        vec power = w, below = splat(0.0f);
        for (int j = 0; j < T; ++j) {
            waiting.part[waiting.count][j] = power + s.e * (float(j) * below);
            below = power;
            power *= s.r;
        }
        if (++waiting.count == Buffer::MOST) waiting.flush(sums, by_lane(f, sums), f.cells);
    }
    void finish(Buffer& waiting, float* sums) {
        if (waiting.count) waiting.flush(sums, by_lane(f, sums), f.cells);
    }
    static void reduce(const Function& f, float* sums, int64_t c, bool narrow, double* gradient) {
        const int64_t width = f.C / f.groups, size = size_of_spline(f.cells);
        for (int cell = 0; cell < f.cells; ++cell)
            for (int j = 0; j < T; ++j) {
                vec total = load(sums + (int64_t(cell) * T + j) * V);
                for (int l = 0; l < V; ++l) total[l] += by_lane(f, sums)[(int64_t(l) * f.cells + cell) * 4 + j];
                const int64_t at = place_in_table(f.cells, j, cell);
                if (!narrow) gradient[c / width * size + at] += sum_of_lanes(total);
                else
                    for (int64_t l = 0; l < std::min<int64_t>(V, f.C - c); ++l)
                        gradient[(c + l) / width * size + at] += total[l];
            }
    }
};

#else

#if defined(__AVX__)  // GCC 12 permutes whole registers where it is left to it
inline vec joined(const float* low, const float* high) {
    return (vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(low)), _mm_load_ps(high), 1);
}
inline quad half_of(vec v, int half) {
    return half ? (quad)_mm256_extractf128_ps((__m256)v, 1) : (quad)_mm256_castps256_ps128((__m256)v);
}
#else
inline vec joined(const float* low, const float* high) {
    return vec{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
}
inline quad half_of(vec v, int half) { return half ? quad{v[4], v[5], v[6], v[7]} : quad{v[0], v[1], v[2], v[3]}; }
#endif

// The splines of whole rows; the lanes of a vector may belong to several groups. A lookup reads a lane's coefficients as one
// quad. `find` says where inputs lie some vectors before `evaluate` asks: the processor does not look as far ahead.
// Places count the bytes of tables; those of the sums, of V lanes, are V times as far.
template <int T, bool WITH_SILU>
struct Spline {
    static constexpr bool BY_ROW = true;
    static constexpr int CELL = POWERS * sizeof(float);
    const float* table;
    const vec lo, inv_h, cells, last;

    struct Buffer {
        static constexpr int64_t VECTORS = 8;
        const bool narrow;
        Scratch<int32_t> offsets;  // [vectors, 2, V]: where the table and the sums of each lane's function begin
        Local<int32_t, VECTORS * V> rows, totals;  // where its cell's are; without `totals` the sums lie as the tables do
        Local<float, VECTORS * V> within, beyond;  // r and e

        explicit Buffer(const Function& f) : narrow(f.C / f.groups < V), offsets((f.C + V - 1) / V * 2 * V) {
            const int64_t size = size_of_spline(f.cells) * sizeof(float);
            for (int64_t v = 0; v * V < f.C; ++v) {
                ivec* to = reinterpret_cast<ivec*>(offsets.data + v * 2 * V);
                to[0] = table_of_lane(f, first_channel(f, v), size);
                to[1] = ivec{} + int32_t(v * size);
            }
        }
        const int32_t* sums_of(int slot) const { return (narrow ? totals : rows).data + slot * V; }
        static int64_t first_channel(const Function& f, int64_t v) {
            return std::max<int64_t>(0, std::min(v * V, f.C - V));
        }
    };

    Spline(const Function& f, int64_t, bool)
        : table(f.tables), lo(splat(f.lo)), inv_h(splat(f.inv_h)), cells(splat(float(f.cells))), last(cells - 1.0f) {}
    template <bool BACKWARD>
    void find(Buffer& at, int slot, int64_t v, vec a) {
        const ivec* offset = reinterpret_cast<const ivec*>(at.offsets.data + v * 2 * V);
        const vec t = (a - lo) * inv_h, inside = vmin(cells, vmax(splat(0.0f), t));  // NaN stays one
        const ivec cell = to_int(vmin(inside, last));
        store(at.within.data + slot * V, inside - to_float(cell));
        store(at.beyond.data + slot * V, t - inside);
        *reinterpret_cast<ivec*>(at.rows.data + slot * V) = cell * CELL + offset[0];
        if (BACKWARD && at.narrow) *reinterpret_cast<ivec*>(at.totals.data + slot * V) = cell * CELL + offset[1];
    }
    void evaluate(const Buffer& at, int slot, vec a, vec& value, vec& slope) const {
        const int32_t* row = at.rows.data + slot * V;
        const vec r = load(at.within.data + slot * V), e = load(at.beyond.data + slot * V);
        vec two[4], c[4];  // rows of lanes l and l + 4; coefficients of a power
        for (int l = 0; l < 4; ++l) two[l] = joined(floats_at(table, row[l]), floats_at(table, row[l + 4]));
        turn(two, c);
        slope = c[T - 1];
        value = slope * r + c[T - 2];
        for (int j = T - 3; j >= 0; --j) {
            slope = slope * r + value;
            value = value * r + c[j];
        }
        value += e * slope;
        slope *= inv_h;
        if (WITH_SILU) add_silu(a, value, slope);
    }
    static int64_t sums_size(const Function& f) {
        return std::min(f.groups, (f.C + V - 1) / V) * size_of_spline(f.cells) * V;
    }

    // d phi / d coefficient_j = r^j + e j r^(j-1), added to sums of each lane's own: two lanes never meet in memory
    void accumulate(const Buffer& at, int slot, float* sums, vec, vec w, int from, int to) const {
        if (from != 0 || to != V) w = lane_numbers >= from && lane_numbers < to ? w : splat(0.0f);
        const vec r = load(at.within.data + slot * V), e = load(at.beyond.data + slot * V);
        vec part[4] = {w}, near = r, turned[4];
        for (int j = 1; j < 4; ++j) {
            near += e;
            part[j] = j < T ? w * near : splat(0.0f);
            w *= r;
        }
        turn(part, turned);
        const int32_t* place = at.sums_of(slot);
        for (int l = 0; l < V; ++l) {
            int64_t at = place[l];
            char* column = reinterpret_cast<char*>(sums) + l * CELL;
            const quad sum = *reinterpret_cast<quad*>(column + at * V) + half_of(turned[l % 4], l / 4);
            asm("" : "+r"(at));  // else GCC computes the address first: one instruction more a lane
            *reinterpret_cast<quad*>(column + at * V) = sum;
        }
    }
    void finish(Buffer&, float*) {}
    static void reduce(const Function& f, const float* sums, int64_t, bool narrow, double* gradient) {
        const int64_t width = f.C / f.groups, size = size_of_spline(f.cells), parts = sums_size(f) / (size * V);
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t cell = 0; cell < f.cells; ++cell) {
                const float* sum = sums + (part * size + cell * POWERS) * V;
                double total[T] = {};
                for (int l = 0; l < V; ++l) {
                    for (int j = 0; j < T; ++j) total[j] += sum[l * POWERS + j];
                    if (!narrow && l < V - 1) continue;
                    const int64_t group = narrow ? std::min(Buffer::first_channel(f, part) + l, f.C - 1) / width : part;
                    double* to = gradient + group * size + cell * POWERS;
                    for (int j = 0; j < T; ++j) to[j] += total[j], total[j] = 0;
                }
            }
    }
};

#endif

// P(x) / Q(x), P = sum_n p_n x^n (n <= 5), Q = 1 + f1^2 + f2^2, f1 = q0 x + q1 x^2, f2 = q2 x + q3 x^2; size 10.
template <bool WITH_SILU>
struct Rational {
    vec c[10], total[10] = {};
    vec first, second, inverse, ratio;

    static constexpr bool BY_ROW = false;
    using Buffer = Nothing;

    Rational(const Function& f, int64_t channel, bool narrow) {
        if (narrow) {
            const ivec at = table_of_lane(f, channel, 10);
            for (int j = 0; j < 10; ++j)
                for (int l = 0; l < V; ++l) c[j][l] = f.tables[at[l] + j];
        } else {
            const float* table = f.tables + channel / (f.C / f.groups) * 10;
            for (int j = 0; j < 10; ++j) c[j] = splat(table[j]);
        }
    }
    template <bool>
    void find(Buffer&, int, int64_t, vec) {}
    void evaluate(const Buffer&, int, vec x, vec& value, vec& slope) {
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
        if (WITH_SILU) add_silu(x, value, slope);
    }
    static int64_t sums_size(const Function&) { return 10 * V; }

    void accumulate(Buffer&, int, float*, vec x, vec w, int from, int to) {
        if (from != 0 || to != V) w = lane_numbers >= from && lane_numbers < to ? w : splat(0.0f);
        w *= inverse;
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
    void finish(Buffer&, float* sums) {
        for (int j = 0; j < 10; ++j) store(sums + j * V, load(sums + j * V) + total[j]);
    }
    static void reduce(const Function& f, float* sums, int64_t channel, bool, double* gradient) {
        const int64_t width = f.C / f.groups;
        for (int64_t l = 0; l < std::min<int64_t>(V, f.C - channel); ++l)
            for (int j = 0; j < 10; ++j) gradient[(width < V ? channel + l : channel) / width * 10 + j] += sums[j * V + l];
    }
};

// The activations of the MLP arms, fused the same way; no table.
template <int KIND>
struct Fixed {
    static constexpr bool BY_ROW = false;
    using Buffer = Nothing;

    Fixed(const Function&, int64_t, bool) {}
    template <bool>
    void find(Buffer&, int, int64_t, vec) {}
    void evaluate(const Buffer&, int, vec x, vec& value, vec& slope) {
        value = slope = splat(0.0f);
        if constexpr (KIND == SILU) {
            add_silu(x, value, slope);
        } else if constexpr (KIND == GELU) {  // Phi after Abramowitz & Stegun 1964, 7.1.26, error below 1e-7
            vec z = (x < 0 ? -x : x) * 0.70710678f, density = exponential(-0.5f * x * x);
            vec t = 1.0f / (1.0f + 0.3275911f * z);
            vec tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
                        0.254829592f) * t * density * 0.5f;
            vec cdf = x < 0 ? tail : 1.0f - tail;
            value = x * cdf;
            slope = cdf + x * density * 0.39894228f;
        } else if constexpr (KIND == IDENTITY) {  // for its norm
            value = x;
            slope = splat(1.0f);
        } else {  // squared ReLU; a NaN stays one
            vec above = x < 0 ? splat(0.0f) : x;
            value = above * above;
            slope = 2.0f * above;
        }
    }
    static int64_t sums_size(const Function&) { return 0; }
    void accumulate(Buffer&, int, float*, vec, vec, int, int) {}
    void finish(Buffer&, float*) {}
    static void reduce(const Function&, float*, int64_t, bool, double*) {}
};

constexpr int64_t SMALL = 1 << 14;  // vector lanes of work for which waking a second thread does not pay

constexpr int64_t ROWS = 32;    // rows whose values stay in the second-level cache while all groups visit them
constexpr int64_t BLOCKS = 16;  // blocks of rows accumulated in fp32 before the sum goes on in fp64

// The factors of the norms of a block of rows; 1 where there is none.
struct Scales {
    float a[ROWS], u[ROWS];

    Scales(const Elementwise& k, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            a[row - begin] = k.f.normed & 1 ? of(k.a + row * k.f.C, k.f) : 1.0f;
            u[row - begin] = k.f.normed & 2 ? of(k.u + row * k.f.C, k.f) : 1.0f;
        }
    }
    static float of(const float* x, const Function& f) {
        return 1.0f / std::sqrt(dot(x, x, f.C) / float(f.C) + f.eps);
    }
    static float dot(const float* x, const float* y, int64_t n) {
        vec total[4] = {};
        int64_t i = 0;
        for (; i + 4 * V <= n; i += 4 * V)
            for (int j = 0; j < 4; ++j) total[j] += load(x + i + j * V) * load(y + i + j * V);
        for (; i < n; i += V) {
            const int part = int(std::min<int64_t>(V, n - i));
            total[0] += load_part(x + i, part) * load_part(y + i, part);
        }
        return sum_of_lanes((total[0] + total[1]) + (total[2] + total[3]));
    }
    // d [rows, C], the gradient by norm(x), becomes that by x: s (d - norm(x) mean(d norm(x))).
    static void through(const Function& f, const float* x, const float* scale, float* d, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row, x += f.C, d += f.C) {
            const float s = scale[row], mean = s * s * s * dot(x, d, f.C) / float(f.C);
            for (int64_t c = 0; c < f.C; c += V) {
                const int part = int(std::min<int64_t>(V, f.C - c));
                store_part(d + c, s * load_part(d + c, part) - mean * load_part(x + c, part), part);
            }
        }
    }
};

// One of the two functions on a strip of channels, and where the sums of its coefficients are kept, or null.
template <typename F>
struct Side {
    F function;
    typename F::Buffer& buffer;
    float* sums;

    template <bool BACKWARD>
    void find(int slot, int64_t v, vec x) { function.template find<BACKWARD>(buffer, slot, v, x); }
    void accumulate(int slot, vec x, vec w, int first, int last) {
        if (sums) function.accumulate(buffer, slot, sums, x, w, first, last);
    }
};

// The vector at `at`, of which the lanes [first, last) are new; the lanes before are computed twice, with one result.
template <typename F, typename S, bool BACKWARD>
inline void step(const Elementwise& k, Side<F>& phi, Side<S>& psi, int slot, float scale_a, float scale_u, int64_t at,
                 int first, int last) {
    // Fetch what comes: of whole rows the one after the next, of a group's part of a row, too short for the processor to see
    // a stream, what the next block needs.
    const int64_t ahead = at + (F::BY_ROW || k.f.groups == 1 ? 2 : ROWS) * k.f.C;
    __builtin_prefetch(k.a + ahead, 0, 3);
    if (k.u) __builtin_prefetch(k.u + ahead, 0, 3);
    vec a = load_part(k.a + at, last) * scale_a, u = k.u ? load_part(k.u + at, last) * scale_u : splat(1.0f);
    vec value, slope, factor, factor_slope;
    phi.function.evaluate(phi.buffer, slot, a, value, slope);
    psi.function.evaluate(psi.buffer, slot, u, factor, factor_slope);
    if constexpr (!BACKWARD) {
        store_part(k.y + at, value * factor, last);
    } else {
        __builtin_prefetch(k.g + ahead, 0, 3);
        __builtin_prefetch(k.da + ahead, 1, 3);
        if (k.du) __builtin_prefetch(k.du + ahead, 1, 3);
        vec g = load_part(k.g + at, last), by_phi = g * factor, by_psi = g * value;
        store_part(k.da + at, by_phi * slope, last);
        if (k.du) store_part(k.du + at, by_psi * factor_slope, last);
        phi.accumulate(slot, a, by_phi, first, last);
        psi.accumulate(slot, u, by_psi, first, last);
    }
}

// Calls visit(slot, c, first) for the vectors that cover the channels [begin, end), at least V. The lanes before `first` of
// the vector at c are covered twice.
template <typename Visit>
inline void each_vector(int64_t begin, int64_t end, Visit visit) {
    int slot = 0;
    int64_t c = begin;
    for (; c + V <= end; c += V) visit(slot++, c, 0);
    if (c < end) visit(slot, end - V, int(c - (end - V)));
}

// `channels` of a row from `at` on.
template <typename F, typename S, bool BACKWARD>
inline void part_of_row(const Elementwise& k, Side<F>& phi, Side<S>& psi, float scale_a, float scale_u, int64_t at,
                        int64_t channels) {
    if (channels < V) {
        phi.template find<BACKWARD>(0, 0, load_part(k.a + at, int(channels)) * scale_a);
        if (k.u) psi.template find<BACKWARD>(0, 0, load_part(k.u + at, int(channels)) * scale_u);
        return step<F, S, BACKWARD>(k, phi, psi, 0, scale_a, scale_u, at, 0, int(channels));
    }
    for (int64_t begin = 0; begin < channels; begin += F::Buffer::VECTORS * V) {
        const int64_t end = std::min(channels, begin + F::Buffer::VECTORS * V);
        each_vector(begin, end, [&](int slot, int64_t c, int) {
            phi.template find<BACKWARD>(slot, begin / V + slot, load(k.a + at + c) * scale_a);
            if (k.u) psi.template find<BACKWARD>(slot, begin / V + slot, load(k.u + at + c) * scale_u);
        });
        each_vector(begin, end, [&](int slot, int64_t c, int first) {
            step<F, S, BACKWARD>(k, phi, psi, slot, scale_a, scale_u, at + c, first, V);
        });
    }
}

// The sums of a function's coefficients, of every strip, for `gradient`; none without one.
template <typename F>
struct Sums {
    const Function& f;
    double* gradient;
    const int64_t size;
    Scratch<float> data;

    Sums(const Function& f, int64_t strips, double* gradient)
        : f(f), gradient(gradient), size(gradient ? F::sums_size(f) : 0), data(strips * size) {
        std::fill(data.data, data.data + strips * size, 0.0f);
    }
    float* of(int64_t strip) { return size ? data.data + strip * size : nullptr; }
    void reduce(int64_t strip, int64_t c0, bool narrow) {
        if (size) F::reduce(f, of(strip), c0, narrow, gradient);
    }
};

// Rows [begin, end): whole ones, or in strips, a group's channels or V where groups are narrower.
template <typename F, typename S, bool BACKWARD>
void elementwise_rows(const Elementwise& shared, int64_t begin, int64_t end, double* gradient, double* gradient_of_psi) {
    const Elementwise k = shared;  // a copy that no store can reach
    const int64_t C = k.f.C, width = C / k.f.groups, strip = F::BY_ROW ? C : std::max<int64_t>(width, V);
    const int64_t strips = (C + strip - 1) / strip;
    const bool narrow = width < V;
    Sums<F> sums(k.f, strips, gradient);
    Sums<S> sums_of_psi(k.s, strips, gradient_of_psi);
    typename F::Buffer buffer(k.f);
    typename S::Buffer buffer_of_psi(k.s);
    for (int64_t block = begin; block < end; block += ROWS) {
        const int64_t stop = std::min(end, block + ROWS);
        const Scales scales(k, block, stop);
        for (int64_t n = 0; n < strips; ++n) {
            const int64_t c0 = n * strip;
            Side<F> phi{F(k.f, c0, narrow), buffer, sums.of(n)};
            Side<S> psi{S(k.s, c0, narrow), buffer_of_psi, sums_of_psi.of(n)};
            for (int64_t row = block; row < stop; ++row)
                part_of_row<F, S, BACKWARD>(k, phi, psi, scales.a[row - block], scales.u[row - block], row * C + c0,
                                            std::min(strip, C - c0));
            if (phi.sums) phi.function.finish(buffer, phi.sums);
            if (psi.sums) psi.function.finish(buffer_of_psi, psi.sums);
        }
        if constexpr (BACKWARD) {
            const int64_t at = block * C;
            if (k.f.normed & 1) scales.through(k.f, k.a + at, scales.a, k.da + at, stop - block);
            if (k.f.normed & 2) scales.through(k.f, k.u + at, scales.u, k.du + at, stop - block);
        }
    }
    for (int64_t n = 0; n < strips; ++n) {
        sums.reduce(n, n * strip, narrow);
        sums_of_psi.reduce(n, n * strip, narrow);
    }
}

// What the threads add up of a function's gradient, [threads, groups, size] fp64; nothing where it is not wanted.
struct Totals {
    const Function& f;
    const int64_t size;
    std::vector<double> sums;

    Totals(const Function& f, bool wanted, int threads)
        : f(f), size(f.groups * size_of_table(f)), sums(wanted ? threads * size : 0) {}
    double* of(int64_t piece) { return sums.empty() ? nullptr : sums.data() + piece * size; }
    void write(float* dc, int threads);
    template <int T>
    void of_tables(float* dc) const;
};

// psi is the identity where S is.
template <typename F, typename S = Fixed<IDENTITY>>
void elementwise(const Elementwise& k, Totals& of_phi, Totals& of_psi, int threads) {
    const int64_t rows = ROWS * BLOCKS;
    if (k.N * k.f.C < SMALL) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < threads; ++piece) {
        const int64_t begin = piece * k.N / threads, end = (piece + 1) * k.N / threads;
        for (int64_t row = begin; row < end; row += rows) {
            const int64_t stop = std::min(end, row + rows);
            if (k.g) elementwise_rows<F, S, true>(k, row, stop, of_phi.of(piece), of_psi.of(piece));
            else elementwise_rows<F, S, false>(k, row, stop, nullptr, nullptr);
        }
    }
}

// A product of two functions is written for those of one kind without a base.
template <typename F, bool WITH_SILU>
void one_or_two(const Elementwise& k, Totals& of_phi, Totals& of_psi, int threads) {
    if constexpr (!WITH_SILU)
        if (&k.s != &k.f) return elementwise<F, F>(k, of_phi, of_psi, threads);
    elementwise<F>(k, of_phi, of_psi, threads);
}

template <int T, bool WITH_SILU>
void spline(const Elementwise& k, Totals& of_phi, Totals& of_psi, int threads) {
#if defined(__AVX512F__)
    const int cells = std::max(k.f.cells, k.s.cells);
    if (k.f.C / k.f.groups < V || cells > 2 * V || (k.f.cells > V) != (k.s.cells > V))
        return one_or_two<Spline<T, 0, WITH_SILU>, WITH_SILU>(k, of_phi, of_psi, threads);
    if (cells > V) return one_or_two<Spline<T, 2, WITH_SILU>, WITH_SILU>(k, of_phi, of_psi, threads);
    one_or_two<Spline<T, 1, WITH_SILU>, WITH_SILU>(k, of_phi, of_psi, threads);
#else
    one_or_two<Spline<T, WITH_SILU>, WITH_SILU>(k, of_phi, of_psi, threads);
#endif
}

template <int T>
void spline(const Elementwise& k, Totals& of_phi, Totals& of_psi, int threads) {
    k.f.silu ? spline<T, true>(k, of_phi, of_psi, threads) : spline<T, false>(k, of_phi, of_psi, threads);
}

void elementwise(const Elementwise& k, Totals& of_phi, Totals& of_psi, int threads) {
    switch (k.f.kind) {
        case SPLINE:
            if (k.f.order == 1) return spline<2>(k, of_phi, of_psi, threads);
            if (k.f.order == 2) return spline<3>(k, of_phi, of_psi, threads);
            return spline<4>(k, of_phi, of_psi, threads);
        case RATIONAL:
            if (k.f.silu) return one_or_two<Rational<true>, true>(k, of_phi, of_psi, threads);
            return one_or_two<Rational<false>, false>(k, of_phi, of_psi, threads);
        case SILU: return elementwise<Fixed<SILU>>(k, of_phi, of_psi, threads);
        case GELU: return elementwise<Fixed<GELU>>(k, of_phi, of_psi, threads);
        case IDENTITY: return elementwise<Fixed<IDENTITY>>(k, of_phi, of_psi, threads);
        default: return elementwise<Fixed<RELU2>>(k, of_phi, of_psi, threads);
    }
}

// The gradient of the coefficients [groups, K].
void Totals::write(float* dc, int threads) {
    if (!dc) return;
    for (int piece = 1; piece < threads; ++piece)
        for (int64_t at = 0; at < size; ++at) sums[at] += sums[piece * size + at];
    if (f.kind == RATIONAL) std::copy(sums.begin(), sums.begin() + size, dc);
    else if (f.order == 1) of_tables<2>(dc);
    else if (f.order == 2) of_tables<3>(dc);
    else of_tables<4>(dc);
}

template <int T>
void Totals::of_tables(float* dc) const {
    const int64_t K = f.cells + T - 1, table = size_of_table(f);
    for (int64_t group = 0; group < f.groups; ++group)
        for (int64_t m = 0; m < K; ++m) {
            double total = 0;
            for (int64_t j = std::max<int64_t>(0, m - f.cells + 1); j < std::min<int64_t>(T, m + 1); ++j) {
                double of_cell = 0;
                for (int p = 0; p < T; ++p)
                    of_cell += pieces<T>[j][p] * sums[group * table + place_in_table(f.cells, p, int(m - j))];
                total += of_cell;
            }
            dc[group * K + m] = float(total);
        }
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

// The sums of four vectors, each in a quarter of the lanes.
inline vec sums(vec a, vec b, vec c, vec d) {
    vec ab = __builtin_shuffle(a, b, halves) + __builtin_shuffle(a, b, halves + V / 2);
    vec cd = __builtin_shuffle(c, d, halves) + __builtin_shuffle(c, d, halves + V / 2);
    vec s = __builtin_shuffle(ab, cd, quarters) + __builtin_shuffle(ab, cd, quarters + V / 4);
    for (int step = V / 8; step; step /= 2) s += __builtin_shuffle(s, lane_numbers ^ step);
    return s;
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
            for (int64_t n = 0; n < inputs; ++n) dx[n] += s[V / 4 * n];
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
    Local<float, (T + 1) * PANEL> values;
    Local<int32_t, PANEL> cells;
    float* b = values.data;
    int32_t* cell = cells.data;
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
    constexpr int64_t VECS = (T == 2 ? 8 : 4) / (16 / V);  // T * VECS accumulators fit the registers
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

// Whether scratch starts as NaN from now on.
void kanlm_poison(int on) { poison = on; }

void kanlm_edge_pack(const float* weight, float* packed, int64_t O, int64_t I, int64_t K, int64_t P, int threads) {
    repack<false>(const_cast<float*>(weight), packed, O, I, K, P, threads);
}

void kanlm_edge_unpack(float* weight, const float* packed, int64_t O, int64_t I, int64_t K, int64_t P, int threads) {
    repack<true>(weight, const_cast<float*>(packed), O, I, K, P, threads);
}

// y = phi(a) * u, or phi(a) * psi(u) where psi is no null; c and c_of_psi are their coefficients
void kanlm_elementwise(const Plan* phi, const Plan* psi, const float* c, const float* c_of_psi, const float* a,
                       const float* u, float* y, int64_t N, int threads) {
    const Function first(*phi, c), second(psi ? *psi : NO_FUNCTION, c_of_psi);
    Totals none(first, false, threads);
    elementwise(Elementwise{first, psi ? second : first, a, u, nullptr, y, nullptr, nullptr, N}, none, none, threads);
}

// The gradients of the sum of g times that by a, u and the functions' coefficients; du and the coefficients' may be null.
void kanlm_elementwise_gradient(const Plan* phi, const Plan* psi, const float* c, const float* c_of_psi, const float* a,
                                const float* u, const float* g, float* da, float* du, float* dc, float* dc_of_psi,
                                int64_t N, int threads) {
    const Function first(*phi, c), second(psi ? *psi : NO_FUNCTION, c_of_psi);
    Totals of_phi(first, dc, threads), of_psi(second, dc_of_psi, threads);
    elementwise(Elementwise{first, psi ? second : first, a, u, g, nullptr, da, du, N}, of_phi, of_psi, threads);
    of_phi.write(dc, threads);
    of_psi.write(dc_of_psi, threads);
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

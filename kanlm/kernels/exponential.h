// e^x in fp32 of a number or of the lanes of a vector, for native.cpp and decode.cpp.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// 2^n e^f with |f| <= ln2 / 2; relative error below 2e-7 in [-87, 88], where x is cut off; a NaN stays one.
// Floats: float, or a vector of them; Ints: int32_t, or a vector of as many.
template <typename Ints, typename Floats>
inline Floats exponential_of(Floats x) {
    const Floats zero = {}, least = zero - 87.0f, most = zero + 88.0f;
    const Floats below = most < x ? most : x, y = least > below ? least : below;
    const Floats scaled = y * 1.44269504f, nearest = scaled + (scaled < 0 ? zero - 0.5f : zero + 0.5f);
    Ints n;
    Floats whole;
    if constexpr (std::is_same_v<Floats, float>) {
        n = int32_t(nearest);
        whole = float(n);
    } else {
        n = __builtin_convertvector(nearest, Ints);
        whole = __builtin_convertvector(n, Floats);
    }
    const Floats f = y - whole * 0.693359375f - whole * -2.12194440e-4f;
    Floats p = zero + 1.0f / 5040;
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const Ints bits = (n + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

}  // namespace

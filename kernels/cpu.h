// What the CPU kernels share: element types, their conversion to fp32, exp and log.
//
// Compiled with -ffp-contract=off: a fused multiply-add happens only where one is written. And with
// -fno-trapping-math, which changes no result: without it a loop that selects is not vectorised for AVX2.

#pragma once

#include <cstdint>
#include <cstring>

#include "instructions.h"

namespace {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float load(const float& value) { return value; }

INLINE float load(const BFloat16& value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

INLINE float load(const Float16& value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
    // Exponent and mantissa in place, times 2^112 for the other bias: exact for subnormal numbers too.
    const uint32_t finite = to_bits(from_bits(rest) * from_bits(0x77800000));
    return from_bits(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : finite));
}

INLINE void store(float& place, float value) { place = value; }

INLINE void store(BFloat16& place, float value) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float exp_of_negative(float x) {  // relative error 2e-7; 0 below -87
    const float shifted = x * 1.44269504f + 12582912.0f;  // the last bits hold round(x / ln 2)
    const float twos = shifted - 12582912.0f;
    const float rest = (x - twos * 0.693359375f) - twos * -2.12194440e-4f;
    float sum = 1.0f / 5040;
    sum = sum * rest + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    const float power = from_bits(to_bits(sum) + (to_bits(shifted) << 23));
    return x < -87.0f ? 0.0f : power;
}

INLINE float log_of_probability(float x) {  // absolute error 1e-7 times |log x|; finite, if meaningless, at 0
    const uint32_t bits = to_bits(x) - 0x3f3504f3;  // so that the mantissa lies in sqrt(1/2)..sqrt(2)
    const float exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
    const float mantissa = from_bits((bits & 0x007fffff) + 0x3f3504f3);
    const float ratio = (mantissa - 1.0f) / (mantissa + 1.0f), square = ratio * ratio;  // log m = 2 atanh(ratio)
    const float series = 2.0f + square * (2.0f / 3 + square * (2.0f / 5 + square * (2.0f / 7 + square * (2.0f / 9))));
    return exponent * 0.693147181f + ratio * series;
}

}  // namespace

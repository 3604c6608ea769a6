// What the CPU kernels share: element types, their conversion to fp32, and the choice of instruction set.
//
// Compiled with -ffp-contract=off: a fused multiply-add happens only where one is written.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
// One binary serves all x86-64 machines: the loader picks the clone for the machine at hand.
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE __attribute__((always_inline)) inline

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

INLINE float load(const double& value) { return static_cast<float>(value); }

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

}  // namespace

// 32 elements at a time, in fp32: what the compiler makes one or more vector instructions of on any machine.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes or returns a vector is inlined
#endif

namespace {

constexpr int64_t LANES = 16, WIDTH = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct Pair {  // of bf16: the even elements and the odd ones, which takes no permutation
    Floats first, second;
};

INLINE Pair operator+(const Pair& a, const Pair& b) { return {a.first + b.first, a.second + b.second}; }
INLINE Pair operator-(const Pair& a, const Pair& b) { return {a.first - b.first, a.second - b.second}; }
INLINE Pair operator*(const Pair& a, const Pair& b) { return {a.first * b.first, a.second * b.second}; }

INLINE Pair zero_where_not_positive(const Pair& x, const Pair& y) {  // x, or 0 where y <= 0: NaN counts as positive
    return {y.first <= 0 ? Floats{} : x.first, y.second <= 0 ? Floats{} : x.second};
}

INLINE Pair load(const float* place, int64_t i) {
    Pair pair;
    std::memcpy(&pair, place + i, sizeof pair);
    return pair;
}

INLINE Pair load(const BFloat16* place, int64_t i) {
    Words words;
    std::memcpy(&words, place + i, sizeof words);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000)};
}

INLINE void save(float* place, int64_t i, const Pair& pair) { std::memcpy(place + i, &pair, sizeof pair); }

// To nearest, ties to even. NaN stays NaN without a case of its own: one that arithmetic makes has no low bits.
INLINE void save(BFloat16* place, int64_t i, const Pair& pair) {
    const Words first = (Words)pair.first, second = (Words)pair.second;
    const Words low = (first + 0x7fff + ((first >> 16) & 1)) >> 16;
    const Words high = (second + 0x7fff + ((second >> 16) & 1)) & 0xffff0000;
    const Words words = low | high;
    std::memcpy(place + i, &words, sizeof words);
}

INLINE int64_t first_lane(const float*, int64_t lane) { return lane; }
INLINE int64_t second_lane(const float*, int64_t lane) { return LANES + lane; }
INLINE int64_t first_lane(const BFloat16*, int64_t lane) { return 2 * lane; }
INLINE int64_t second_lane(const BFloat16*, int64_t lane) { return 2 * lane + 1; }

// values[c], ..., values[c + 31] in the order of `load` for elements of type T; after the last of `count` comes the
// first again.
template <typename T>
INLINE Pair spread(const float* values, int64_t c, int64_t count) {
    const T* type = nullptr;
    Pair pair;
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t first = c + first_lane(type, lane), second = c + second_lane(type, lane);
        pair.first[lane] = values[first < count ? first : first - count];
        pair.second[lane] = values[second < count ? second : second - count];
    }
    return pair;
}

// The inverse, without the coming round.
template <typename T>
INLINE void collect(float* values, int64_t c, const Pair& pair) {
    const T* type = nullptr;
    for (int64_t lane = 0; lane < LANES; ++lane) {
        values[c + first_lane(type, lane)] = pair.first[lane];
        values[c + second_lane(type, lane)] = pair.second[lane];
    }
}

}  // namespace

// The hot loops are compiled three times, for more and more of x86-64's instructions, and one version is in force.
//
//     template <typename T> INLINE void add(T* sums, const T* values, int64_t count) { ...a loop... }
//     in_force<add<float>>(sums, values, count);
//
// The functions of a loop are INLINE all the way down, so that each version is compiled as a whole. On other
// processors, and with other compilers, there is the plain version only.

#pragma once

#include <atomic>

#define INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define HAS_VERSIONS
#define FOR_AVX2 __attribute__((target("arch=x86-64-v3"), noinline))
#define FOR_AVX512 __attribute__((target("arch=x86-64-v4"), noinline))
#endif

enum Instructions : int { PLAIN = 0, AVX2 = 1, AVX512 = 2 };  // the same as INSTRUCTION_SETS in cpu.py

extern std::atomic<int> fastsnap_instructions;  // in instructions.cpp

namespace {

#ifdef HAS_VERSIONS
template <auto function, typename... Arguments>
FOR_AVX2 auto for_avx2(Arguments&... arguments) {
    return function(arguments...);
}

template <auto function, typename... Arguments>
FOR_AVX512 auto for_avx512(Arguments&... arguments) {
    return function(arguments...);
}
#endif

// function(arguments...) in the version in force.
template <auto function, typename... Arguments>
auto in_force(Arguments&&... arguments) {
#ifdef HAS_VERSIONS
    const int instructions = fastsnap_instructions.load(std::memory_order_relaxed);
    if (instructions == AVX512) return for_avx512<function>(arguments...);
    if (instructions == AVX2) return for_avx2<function>(arguments...);
#endif
    return function(arguments...);
}

}  // namespace

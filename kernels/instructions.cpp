// Which version of the hot loops is in force: see instructions.h.

#include "instructions.h"

extern "C" int fastsnap_best_instructions() {  // of those that the loops are compiled for, on this processor
#ifdef HAS_VERSIONS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return AVX512;
    if (__builtin_cpu_supports("x86-64-v3")) return AVX2;
#endif
    return PLAIN;
}

std::atomic<int> fastsnap_instructions{fastsnap_best_instructions()};

// From now on these, or the best ones if this processor does not have them; returns those in force so far.
extern "C" int fastsnap_use_instructions(int wanted) {
    const int best = fastsnap_best_instructions();
    return fastsnap_instructions.exchange(wanted < best ? wanted : best);
}

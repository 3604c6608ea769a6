// The update of all tensors in one call, in the arithmetic of torch.optim.SGD: see State and Rule in update.py.
//
// Every element is computed on its own and every fused multiply-add is written out, so the result depends neither on
// the number of threads nor on the instruction set.

#include <cstdint>

#include "cpu.h"

namespace {

enum class Type : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Chunk {
    int64_t tensor, begin, flat, length;  // begin: in the tensor; flat: in the flat tensors; all in elements
};

struct Step {  // the numbers of one update
    float rate, momentum, nesterov, inverse_scale, average_weight;
};

template <typename Weight, typename Gradient>
INLINE void step_chunk(Weight* __restrict weights, float* __restrict momentum, const Gradient* __restrict gradient,
                       int64_t length, float decay, Step step) {
    for (int64_t i = 0; i < length; ++i) {
        const float weight = load(weights[i]);
        const float direction = __builtin_fmaf(decay, weight, load(gradient[i]) * step.inverse_scale);
        const float velocity = step.momentum * momentum[i] + direction;
        const float move = step.nesterov != 0 ? __builtin_fmaf(step.momentum, velocity, direction) : velocity;
        momentum[i] = velocity;
        store(weights[i], __builtin_fmaf(-step.rate, move, weight));
    }
}

// Parameters that somebody else has written, so that they no longer are the master values rounded, count.
INLINE void take_over_chunk(const BFloat16* __restrict parameters, float* __restrict masters, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
        BFloat16 rounded;
        store(rounded, masters[i]);
        masters[i] = rounded.bits == parameters[i].bits ? masters[i] : load(parameters[i]);
    }
}

INLINE void round_chunk(const float* __restrict weights, BFloat16* __restrict copy, int64_t length) {
    for (int64_t i = 0; i < length; ++i) store(copy[i], weights[i]);
}

template <typename Weight>
INLINE void average_chunk(const Weight* __restrict weights, float* __restrict mean, int64_t length, float share) {
    for (int64_t i = 0; i < length; ++i) mean[i] = __builtin_fmaf(share, load(weights[i]) - mean[i], mean[i]);
}

}  // namespace

struct Update {  // the same layout as UpdateArguments in update_cpu.py; copy, average, scale and found_inf may be null
    const Chunk* chunks;
    int64_t chunk_count;
    const int64_t* addresses;  // of the gradients, 0: none
    const float* factors;  // of each tensor: weight decay, and what the rate is multiplied by
    void* weights;
    float* momentum;
    BFloat16* copy;
    float* mean;
    int64_t* clock;
    const float* rate;
    const float* scale;
    const float* found_inf;
    Type weight_type, gradient_type;
    int64_t nesterov, master, threads;
    double momentum_coefficient, average_decay;
};

namespace {

template <typename Weight, typename Gradient>
void update_chunk(const Update& update, const Chunk& chunk, const Step& numbers) {
    Weight* weights = static_cast<Weight*>(update.weights) + chunk.flat;
    const int64_t address = update.addresses[chunk.tensor];
    if constexpr (sizeof(Weight) == sizeof(float))
        if (update.master != 0) in_force<take_over_chunk>(update.copy + chunk.flat, weights, chunk.length);
    if (address != 0) {
        const float* factors = update.factors + 2 * chunk.tensor;
        Step scaled = numbers;
        scaled.rate *= factors[1];
        in_force<step_chunk<Weight, Gradient>>(weights, update.momentum + chunk.flat,
                                               reinterpret_cast<const Gradient*>(address) + chunk.begin, chunk.length,
                                               factors[0], scaled);
    }
    if constexpr (sizeof(Weight) == sizeof(float))
        if (update.copy != nullptr) in_force<round_chunk>(weights, update.copy + chunk.flat, chunk.length);
    if (update.mean != nullptr)
        in_force<average_chunk<Weight>>(weights, update.mean + chunk.flat, chunk.length, numbers.average_weight);
}

template <typename Weight, typename Gradient>
void update_chunks(const Update& update, const Step& numbers) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(static_cast<int>(update.threads))
    for (int64_t i = 0; i < update.chunk_count; ++i)
        update_chunk<Weight, Gradient>(update, update.chunks[i], numbers);
}

template <typename Weight>
void update_of_type(const Update& update, const Step& numbers) {
    switch (update.gradient_type) {
        case Type::float32: return update_chunks<Weight, float>(update, numbers);
        case Type::bfloat16: return update_chunks<Weight, BFloat16>(update, numbers);
        case Type::float16: return update_chunks<Weight, Float16>(update, numbers);
    }
}

}  // namespace

// Returns the number of updates done, this one included. The schedule goes on even when GradScaler skips the update.
extern "C" int64_t fastsnap_update(const Update* arguments) {
    const Update& update = *arguments;
    update.clock[0] += 1;
    if (update.found_inf != nullptr && *update.found_inf != 0) return update.clock[0];
    double share = 0;
    if (update.average_decay != 0) {  // then mean is null only if all tensors are empty
        update.clock[1] += 1;
        share = 1.0 / static_cast<double>(update.clock[1]);
        if (share < 1 - update.average_decay) share = 1 - update.average_decay;
    }
    const float inverse_scale = update.scale == nullptr ? 1.0f : 1.0f / *update.scale;
    const Step numbers{*update.rate, static_cast<float>(update.momentum_coefficient),
                       static_cast<float>(update.nesterov), inverse_scale, static_cast<float>(share)};
    if (update.weight_type == Type::float32)
        update_of_type<float>(update, numbers);
    else
        update_of_type<BFloat16>(update, numbers);
    return update.clock[0];
}

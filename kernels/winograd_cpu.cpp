// 3x3 convolutions with stride 1 and padding 1 in fp32, and their gradients, with 16 products where 36 are usual: see
// convolution.py, and winograd.h for the method.
//
// At each of a window's 16 places, the sum over channels (for the weights' gradient: over tiles) is a matrix product.
// 16 tiles make a chunk, whose places stay in the caches. A chunk is computed by one thread. For the weights' gradient
// the chunks are dealt to parts, whose number depends on the shape alone, and the parts are added in order: the bits
// depend neither on the number of threads nor on the instruction set.

#include <algorithm>
#include <cstdint>

#include "instructions.h"

// The instruction set in force; there is no kernel for the plain one.
extern "C" int fastsnap_winograd_instructions() { return fastsnap_instructions.load(std::memory_order_relaxed); }

#ifdef HAS_VERSIONS

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the intrinsics' own header, with GCC 12
#include <immintrin.h>
#include <omp.h>

#include "winograd.h"

namespace {

// -- matrix products of 16 rows and 16 columns
//
//     product[row][column] = sum over blocks and k < count of
//         left[block * BLOCK + row * ROW + k * STEP] * right[block * BLOCK + k * LANES + column]
//
// on top of what `product` holds, where it is to ADD.

using Product = void(const float* left, const float* right, int64_t blocks, int64_t count, float* product);

template <int64_t ROW, int64_t STEP, bool ADD>
FOR_AVX512 void multiply_avx512(const float* left, const float* right, int64_t blocks, int64_t count, float* product) {
    __m512 sum[LANES];
#pragma GCC unroll 16
    for (int64_t row = 0; row < LANES; ++row)
        sum[row] = ADD ? _mm512_load_ps(product + row * LANES) : _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; ++block, left += BLOCK, right += BLOCK)
        for (int64_t k = 0; k < count; ++k) {
            const __m512 columns = _mm512_load_ps(right + k * LANES);
#pragma GCC unroll 16
            for (int64_t row = 0; row < LANES; ++row)
                sum[row] = _mm512_fmadd_ps(_mm512_set1_ps(left[row * ROW + k * STEP]), columns, sum[row]);
        }
#pragma GCC unroll 16
    for (int64_t row = 0; row < LANES; ++row) _mm512_store_ps(product + row * LANES, sum[row]);
}

template <int64_t ROW, int64_t STEP, bool ADD>
FOR_AVX2 void multiply_avx2(const float* all_left, const float* all_right, int64_t blocks, int64_t count,
                            float* product) {
    constexpr int64_t ROWS = 4, HALF = LANES / 2;  // 8 sums in the registers
    for (int64_t first = 0; first < LANES; first += ROWS, product += ROWS * LANES) {
        const float *left = all_left + first * ROW, *right = all_right;
        __m256 sum[ROWS][2];
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row) {
            sum[row][0] = ADD ? _mm256_load_ps(product + row * LANES) : _mm256_setzero_ps();
            sum[row][1] = ADD ? _mm256_load_ps(product + row * LANES + HALF) : _mm256_setzero_ps();
        }
        for (int64_t block = 0; block < blocks; ++block, left += BLOCK, right += BLOCK)
            for (int64_t k = 0; k < count; ++k) {
                const __m256 lower = _mm256_load_ps(right + k * LANES);
                const __m256 upper = _mm256_load_ps(right + k * LANES + HALF);
#pragma GCC unroll 4
                for (int64_t row = 0; row < ROWS; ++row) {
                    const __m256 factor = _mm256_set1_ps(left[row * ROW + k * STEP]);
                    sum[row][0] = _mm256_fmadd_ps(factor, lower, sum[row][0]);
                    sum[row][1] = _mm256_fmadd_ps(factor, upper, sum[row][1]);
                }
            }
#pragma GCC unroll 4
        for (int64_t row = 0; row < ROWS; ++row) {
            _mm256_store_ps(product + row * LANES, sum[row][0]);
            _mm256_store_ps(product + row * LANES + HALF, sum[row][1]);
        }
    }
}

Product* product_over_channels(const Winograd& w) {  // left[channel / 16][tile][channel % 16]
    return w.instructions == AVX512 ? multiply_avx512<LANES, 1, false> : multiply_avx2<LANES, 1, false>;
}

Product* product_over_tiles(const Winograd& w) {  // left[tile][channel]
    return w.instructions == AVX512 ? multiply_avx512<1, LANES, true> : multiply_avx2<1, LANES, true>;
}

// -- all of it

void convolve_chunk(const Plan& plan, Chunk chunk, const float* weights, float* windows, float* products) {
    const Winograd& w = plan.winograd;
    Product* const multiply = product_over_channels(w);
    in_force<transform_windows>(plan, chunk, windows);
    for (int64_t out = 0; out < w.out_channels; out += LANES) {
        // The last products take the place of the windows, which then are not needed again: less to keep in the cache.
        const bool last = out + LANES == w.out_channels;
        float* const to = last ? windows : products;
        const int64_t stride = last ? plan.in_stride : BLOCK + GAP;
        for (int64_t place = 0; place < PLACES; ++place, weights += w.in_channels * LANES)
            multiply(windows + place * plan.in_stride, weights, w.in_channels / LANES, LANES, to + place * stride);
        in_force<write_tiles>(plan, chunk, out, to, stride);
    }
}

bool convolve(const Winograd& w) {
    const Plan plan(w);
    const int64_t windows = PLACES * plan.in_stride, own = windows + PLACES * (BLOCK + GAP);
    float* const weights = static_cast<float*>(_mm_malloc((plan.weights + w.threads * own) * sizeof(float), 64));
    if (weights == nullptr) return false;
#pragma omp parallel num_threads(static_cast<int>(w.threads))
    {
        float* const scratch = weights + plan.weights + omp_get_thread_num() * own;
        std::fill(scratch, scratch + own, 0.0f);  // a chunk that is not full multiplies what is there
#pragma omp for schedule(static)
        for (int64_t task = 0; task < w.out_channels / LANES * w.in_channels; ++task)
            in_force<transform_weights>(w, task / w.in_channels * LANES, task % w.in_channels, weights);
#pragma omp for schedule(static)
        for (int64_t index = 0; index < plan.chunks; ++index)
            convolve_chunk(plan, chunk_of(plan, index), weights, scratch, scratch + windows);
    }
    _mm_free(weights);
    return true;
}

// sums[out / 16][place][in][out % 16] of one part of the chunks
void sum_part(const Plan& plan, int64_t part, float* windows, float* tiles, float* sums) {
    const Winograd& w = plan.winograd;
    Product* const multiply = product_over_tiles(w);
    std::fill(sums, sums + plan.weights, 0.0f);
    for (int64_t index = plan.chunks * part / plan.parts; index < plan.chunks * (part + 1) / plan.parts; ++index) {
        const Chunk chunk = chunk_of(plan, index);
        in_force<transform_windows>(plan, chunk, windows);
        in_force<transform_tiles>(plan, chunk, tiles);
        for (int64_t place = 0; place < PLACES; ++place)
            for (int64_t out = 0; out < w.out_channels; out += LANES)
                for (int64_t in = 0; in < w.in_channels; in += LANES)
                    multiply(windows + place * plan.in_stride + in * TILES,
                             tiles + place * plan.out_stride + out * TILES, 1, chunk.count,
                             sums + (out * PLACES + place * LANES) * w.in_channels + in * LANES);
    }
}

bool differentiate(const Winograd& w) {
    const Plan plan(w);
    const int64_t windows = PLACES * plan.in_stride, own = windows + PLACES * plan.out_stride;
    const int64_t threads = std::min(w.threads, plan.parts);
    float* const sums =
        static_cast<float*>(_mm_malloc((plan.parts * plan.weights + threads * own) * sizeof(float), 64));
    if (sums == nullptr) return false;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        float* const scratch = sums + plan.parts * plan.weights + omp_get_thread_num() * own;
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < plan.parts; ++part)
            sum_part(plan, part, scratch, scratch + windows, sums + part * plan.weights);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < w.out_channels / LANES * w.in_channels; ++task)
            in_force<write_weights>(plan, sums, task / w.in_channels * LANES, task % w.in_channels);
    }
    _mm_free(sums);
    return true;
}

}  // namespace

// Both return whether there was memory for it.
extern "C" int fastsnap_winograd_convolution(const Winograd* winograd) { return convolve(*winograd); }
extern "C" int fastsnap_winograd_weight_gradient(const Winograd* winograd) { return differentiate(*winograd); }

#endif

// Gradient of a 3x3 convolution's weights from bf16 activations, with AVX512-BF16: see convolution.py.
//
// As a matrix product it has few rows and columns (channels) and a long sum (pixels). vdpbf16ps adds the products of
// two pixels to each of 16 sums, so pixels are taken in pairs, side by side in a row of the image:
//
//     sum[tap][out][in] += gradient[pixel][out] * input[pixel + tap][in] + the same of the next pixel
//
// 8 output channels x 3 taps x 16 input channels are summed in registers. Images are dealt to parts, whose number
// depends on the shape alone, and the parts are added in order: the bits do not depend on the number of threads.

#include <algorithm>
#include <cstdint>

#include "cpu.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define HAS_AVX512_BF16
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the intrinsics' own header, with GCC 12
#endif
#include <immintrin.h>
#include <omp.h>
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#endif

struct Convolution {  // the same layout as ConvolutionArguments in convolution_cpu.py
    const BFloat16* input;            // [images, height, width, in_channels]
    const BFloat16* output_gradient;  // [images, out_height, out_width, out_channels]
    float* weight_gradient;           // [out_channels, 3, 3, in_channels]
    int64_t images, height, width, in_channels, out_height, out_width, out_channels, stride, threads;
};

extern "C" int fastsnap_convolution_supported() {
#ifdef HAS_AVX512_BF16
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

#ifdef HAS_AVX512_BF16

namespace {

constexpr int64_t TAPS = 3;        // along an axis; the padding is 1
constexpr int64_t LANES = 16;      // input channels handled at once
constexpr int64_t ROWS = 8;        // output channels handled at once
constexpr int64_t PAIRS = 128;     // of pixels, at least, before the sums leave the registers
constexpr int64_t SUMS = 1 << 18;  // fp32 numbers in the parts together: a megabyte, to stay in a second-level cache
constexpr int64_t MOST_PARTS = 16;

struct Plan {
    explicit Plan(const Convolution& c)
        : convolution(c),
          pairs((c.out_width + 1) / 2),
          chunk((PAIRS - 1) / (pairs * c.out_height) + 1),
          chunks((c.images - 1) / chunk + 1),
          slices(c.in_channels / LANES),
          sums(c.out_channels * TAPS * TAPS * LANES),
          parts(std::min({MOST_PARTS, chunks, SUMS / (sums * slices)})),
          packed_input(chunk * c.height * pairs * TAPS),
          packed_gradient(chunk * c.out_height * pairs * c.out_channels / LANES) {}

    const Convolution& convolution;
    const int64_t pairs;   // of pixels in a row of the output, the last with a zero if the width is odd
    const int64_t chunk;   // images packed together
    const int64_t chunks;
    const int64_t slices;  // of 16 input channels
    const int64_t sums;    // of a slice
    const int64_t parts;
    const int64_t packed_input, packed_gradient;  // vectors of a chunk
};

// 16 channels of pixel x of a row, zeros outside
AVX512_BF16 INLINE __m256i load(const BFloat16* row, int64_t x, int64_t width, int64_t channels) {
    const __m256i* pixel = reinterpret_cast<const __m256i*>(row + x * channels);
    return x >= 0 && x < width ? _mm256_loadu_si256(pixel) : _mm256_setzero_si256();
}

AVX512_BF16 INLINE __m512i interleave(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// packed[image][row][pair][tap][channel]: the two pixels of the input that the tap takes to the output's pair
AVX512_BF16 void pack_input(const Plan& plan, const BFloat16* images, int64_t count, int64_t slice, __m512i* packed) {
    const Convolution& c = plan.convolution;
    for (int64_t row = 0; row < count * c.height; ++row) {
        const BFloat16* line = images + row * c.width * c.in_channels + slice * LANES;
        __m512i last = _mm512_setzero_si512();
        for (int64_t pair = 0; pair < plan.pairs; ++pair)
            for (int64_t tap = 0; tap < TAPS; ++tap) {
                const int64_t x = 2 * pair * c.stride + tap - 1;
                const bool again = c.stride == 1 && tap == 0 && pair > 0;  // the last tap of the pair before
                if (!again)
                    last = interleave(load(line, x, c.width, c.in_channels),
                                      load(line, x + c.stride, c.width, c.in_channels));
                _mm512_store_si512(packed++, last);
            }
    }
}

// packed[image][row][pair][channel]
AVX512_BF16 void pack_gradient(const Plan& plan, const BFloat16* images, int64_t count, __m512i* packed) {
    const Convolution& c = plan.convolution;
    for (int64_t row = 0; row < count * c.out_height; ++row) {
        const BFloat16* line = images + row * c.out_width * c.out_channels;
        for (int64_t x = 0; x < c.out_width; x += 2)
            for (int64_t channel = 0; channel < c.out_channels; channel += LANES)
                _mm512_store_si512(packed++, interleave(load(line + channel, x, c.out_width, c.out_channels),
                                                        load(line + channel, x + 1, c.out_width, c.out_channels)));
    }
}

// sums[out channel][tap][in channel] += products over all pairs of `count` images, for one row of taps and 8 channels
AVX512_BF16 void add_products(const Plan& plan, const __m512i* input, const int32_t* gradient, int64_t count,
                              int64_t tap_row, float* sums) {
    const Convolution& c = plan.convolution;
    __m512 sum[ROWS][TAPS];
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t tap = 0; tap < TAPS; ++tap) sum[row][tap] = _mm512_load_ps(sums + (row * TAPS + tap) * LANES);
    for (int64_t image = 0; image < count; ++image)
        for (int64_t y = 0; y < c.out_height; ++y) {
            const int64_t from = y * c.stride + tap_row - 1;
            if (from < 0 || from >= c.height) continue;
            const __m512i* in = input + (image * c.height + from) * plan.pairs * TAPS;
            const int32_t* out = gradient + (image * c.out_height + y) * plan.pairs * c.out_channels;
            for (int64_t pair = 0; pair < plan.pairs; ++pair, in += TAPS, out += c.out_channels) {
                __m512bh taken[TAPS];
                for (int64_t tap = 0; tap < TAPS; ++tap) taken[tap] = (__m512bh)_mm512_load_si512(in + tap);
#pragma GCC unroll 8
                for (int64_t row = 0; row < ROWS; ++row) {
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(out[row]);
#pragma GCC unroll 3
                    for (int64_t tap = 0; tap < TAPS; ++tap)
                        sum[row][tap] = _mm512_dpbf16_ps(sum[row][tap], taken[tap], both);
                }
            }
        }
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t tap = 0; tap < TAPS; ++tap) _mm512_store_ps(sums + (row * TAPS + tap) * LANES, sum[row][tap]);
}

// sums[row of taps][out channel][tap][in channel] of one part of the images and one slice of the input channels
void sum_part(const Plan& plan, int64_t part, int64_t slice, __m512i* input, __m512i* gradient, float* sums) {
    const Convolution& c = plan.convolution;
    const int64_t begin = plan.chunks * part / plan.parts, end = plan.chunks * (part + 1) / plan.parts;
    std::fill(sums, sums + plan.sums, 0.0f);
    for (int64_t image = begin * plan.chunk; image < std::min(end * plan.chunk, c.images); image += plan.chunk) {
        const int64_t count = std::min(plan.chunk, c.images - image);
        pack_input(plan, c.input + image * c.height * c.width * c.in_channels, count, slice, input);
        pack_gradient(plan, c.output_gradient + image * c.out_height * c.out_width * c.out_channels, count, gradient);
        for (int64_t tap = 0; tap < TAPS; ++tap)
            for (int64_t out = 0; out < c.out_channels; out += ROWS)
                add_products(plan, input, reinterpret_cast<int32_t*>(gradient) + out, count, tap,
                             sums + (tap * c.out_channels + out) * TAPS * LANES);
    }
}

AVX512_BF16 void add_parts(const Plan& plan, const float* sums, int64_t out) {
    const Convolution& c = plan.convolution;
    for (int64_t slice = 0; slice < plan.slices; ++slice)
        for (int64_t tap = 0; tap < TAPS * TAPS; ++tap) {
            const float* from = sums + slice * plan.sums;
            from += ((tap / TAPS * c.out_channels + out) * TAPS + tap % TAPS) * LANES;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t part = 0; part < plan.parts; ++part)
                sum = _mm512_add_ps(sum, _mm512_load_ps(from + part * plan.slices * plan.sums));
            _mm512_storeu_ps(c.weight_gradient + (out * TAPS * TAPS + tap) * c.in_channels + slice * LANES, sum);
        }
}

bool sum_all(const Convolution& c) {
    const Plan plan(c);
    const int64_t tasks = plan.parts * plan.slices, threads = std::min(c.threads, tasks);
    const int64_t own = plan.packed_input + plan.packed_gradient, shared = tasks * plan.sums / LANES;
    __m512i* const scratch = static_cast<__m512i*>(_mm_malloc((shared + threads * own) * sizeof(__m512i), 64));
    if (scratch == nullptr) return false;
    float* const sums = reinterpret_cast<float*>(scratch);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        __m512i* const input = scratch + shared + omp_get_thread_num() * own;
        __m512i* const gradient = input + plan.packed_input;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task)
            sum_part(plan, task / plan.slices, task % plan.slices, input, gradient, sums + task * plan.sums);
#pragma omp for schedule(static)
        for (int64_t out = 0; out < c.out_channels; ++out) add_parts(plan, sums, out);
    }
    _mm_free(scratch);
    return true;
}

}  // namespace

// Returns whether there was memory for it.
extern "C" int fastsnap_convolution_weight_gradient(const Convolution* convolution) { return sum_all(*convolution); }

#endif

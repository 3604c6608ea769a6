// 3x3 convolutions with stride 1 and padding 1 in fp32, and their gradients, with 16 products where 36 are usual: see
// convolution.py.
//
// Winograd's F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308). A tile of 2x2 pixels of the output depends on a window
// of 4x4 pixels of the input. Windows, tiles and weights are transformed, with additions alone, to 16 places each:
//
//     output = A' [(G weight G') * (B' window B)] A    gradient of the weights = G' [(A tile A') * (B' window B)] G
//
// At each place, the sum over channels (or over tiles) is a matrix product. 16 tiles make a chunk, whose places stay in
// the caches; a chunk is computed by one thread, and for the weights' gradient the chunks are dealt to parts, whose
// number depends on the shape alone and which are added in order: the bits depend neither on the number of threads nor
// on the instruction set.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "lanes.h"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the intrinsics' own header, with GCC 12
#endif
#include <immintrin.h>
#include <omp.h>
#define AVX512 __attribute__((target("avx512f")))
#define AVX2 __attribute__((target("avx2,fma")))
#endif

struct Winograd {  // the same layout as WinogradArguments in winograd_cpu.py
    const float* input;            // [images, height, width, in_channels]
    const float* weight;           // [out_channels, 3, 3, in_channels]; turned: [in_channels, 3, 3, out_channels]
    float* output;                 // [images, height, width, out_channels]
    const float* output_gradient;  // likewise
    float* weight_gradient;        // [out_channels, 3, 3, in_channels]
    int64_t images, height, width, in_channels, out_channels, turned, instructions, threads;
};

enum Instructions : int64_t { NONE, WITH_AVX2, WITH_AVX512 };

// The best instruction set that this processor has.
extern "C" int64_t fastsnap_winograd_instructions() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return WITH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
    return NONE;
}

#if defined(__x86_64__)

namespace {

constexpr int64_t TAPS = 3;      // along an axis
constexpr int64_t TILE = 2;      // pixels of the output along an axis
constexpr int64_t WINDOW = 4;    // pixels of the input, along an axis, that a tile depends on
constexpr int64_t PLACES = WINDOW * WINDOW;
constexpr int64_t TILES = 16;    // in a chunk: as many sums as AVX-512's registers hold next to what is multiplied
constexpr int64_t BLOCK = TILES * LANES;
constexpr int64_t GAP = LANES;   // between places: without it they would all fall into the same few lines of a cache
constexpr int64_t MOST_CHANNELS = 64;
constexpr int64_t SUMS = 1 << 18;  // fp32 numbers in the parts together: a megabyte, to stay in a second-level cache
constexpr int64_t FEWEST_PARTS = 4, MOST_PARTS = 16;

alignas(64) const float ZEROS[MOST_CHANNELS] = {};

INLINE Floats read(const float* place) {
    Floats values;
    std::memcpy(&values, place, sizeof values);
    return values;
}

INLINE void write(float* place, const Floats& values) { std::memcpy(place, &values, sizeof values); }

struct Plan {
    explicit Plan(const Winograd& w)
        : winograd(w),
          tiles_down((w.height + TILE - 1) / TILE),
          tiles_across((w.width + TILE - 1) / TILE),
          tiles(w.images * tiles_down * tiles_across),
          chunks((tiles + TILES - 1) / TILES),
          in_stride(w.in_channels * TILES + GAP),
          out_stride(w.out_channels * TILES + GAP),
          weights(PLACES * w.in_channels * w.out_channels),
          parts(std::min(chunks, std::clamp(SUMS / weights, FEWEST_PARTS, MOST_PARTS))) {}

    const Winograd& winograd;
    const int64_t tiles_down, tiles_across, tiles, chunks;
    const int64_t in_stride, out_stride;  // from place to place, in a chunk's windows and tiles
    const int64_t weights;                // transformed ones
    const int64_t parts;                  // of the sums over tiles
};

struct Chunk {
    int64_t first, count;  // tiles
};

INLINE Chunk chunk_of(const Plan& plan, int64_t index) {
    return {index * TILES, std::min(TILES, plan.tiles - index * TILES)};
}

struct Tile {
    int64_t image, y, x;  // of its first pixel
};

INLINE Tile tile_of(const Plan& plan, int64_t index) {
    const int64_t row = index / plan.tiles_across;
    return {row / plan.tiles_down, row % plan.tiles_down * TILE, index % plan.tiles_across * TILE};
}

INLINE void advance(const Winograd& w, Tile& tile) {
    if ((tile.x += TILE) < w.width) return;
    tile.x = 0;
    if ((tile.y += TILE) < w.height) return;
    tile.y = 0;
    ++tile.image;
}

// Channels of a pixel, zeros outside.
INLINE const float* pixel(const Winograd& w, const float* images, int64_t channels, int64_t image, int64_t y,
                          int64_t x) {
    const bool inside = y >= 0 && y < w.height && x >= 0 && x < w.width;
    return inside ? images + ((image * w.height + y) * w.width + x) * channels : ZEROS;
}

// -- transforms

// places[place][channel / 16][tile][channel % 16] = B' window B
CLONES void transform_windows(const Plan& plan, Chunk chunk, float* places) {
    const Winograd& w = plan.winograd;
    Tile tile = tile_of(plan, chunk.first);
    for (int64_t index = 0; index < chunk.count; ++index, advance(w, tile)) {
        const float* window[WINDOW][WINDOW];
        for (int64_t row = 0; row < WINDOW; ++row)
            for (int64_t column = 0; column < WINDOW; ++column)
                window[row][column] =
                    pixel(w, w.input, w.in_channels, tile.image, tile.y + row - 1, tile.x + column - 1);
        for (int64_t channel = 0; channel < w.in_channels; channel += LANES) {
            Floats half[WINDOW][WINDOW];
            for (int64_t column = 0; column < WINDOW; ++column) {
                Floats in[WINDOW];
                for (int64_t row = 0; row < WINDOW; ++row) in[row] = read(window[row][column] + channel);
                half[0][column] = in[0] - in[2];
                half[1][column] = in[1] + in[2];
                half[2][column] = in[2] - in[1];
                half[3][column] = in[1] - in[3];
            }
            float* to = places + channel * TILES + index * LANES;
            for (const Floats(&row)[WINDOW] : half) {
                write(to, row[0] - row[2]);
                write(to + plan.in_stride, row[1] + row[2]);
                write(to + 2 * plan.in_stride, row[2] - row[1]);
                write(to + 3 * plan.in_stride, row[1] - row[3]);
                to += WINDOW * plan.in_stride;
            }
        }
    }
}

// places[place][channel / 16][tile][channel % 16] = A tile A' of the output's gradient
CLONES void transform_tiles(const Plan& plan, Chunk chunk, float* places) {
    const Winograd& w = plan.winograd;
    Tile tile = tile_of(plan, chunk.first);
    for (int64_t index = 0; index < chunk.count; ++index, advance(w, tile)) {
        const float* from[TILE][TILE];
        for (int64_t row = 0; row < TILE; ++row)
            for (int64_t column = 0; column < TILE; ++column)
                from[row][column] =
                    pixel(w, w.output_gradient, w.out_channels, tile.image, tile.y + row, tile.x + column);
        for (int64_t channel = 0; channel < w.out_channels; channel += LANES) {
            Floats half[WINDOW][TILE];
            for (int64_t column = 0; column < TILE; ++column) {
                const Floats upper = read(from[0][column] + channel), lower = read(from[1][column] + channel);
                half[0][column] = upper;
                half[1][column] = upper + lower;
                half[2][column] = upper - lower;
                half[3][column] = -lower;
            }
            float* to = places + channel * TILES + index * LANES;
            for (const Floats(&row)[TILE] : half) {
                write(to, row[0]);
                write(to + plan.out_stride, row[0] + row[1]);
                write(to + 2 * plan.out_stride, row[0] - row[1]);
                write(to + 3 * plan.out_stride, -row[1]);
                to += WINDOW * plan.out_stride;
            }
        }
    }
}

// 16 channels of the output = A' places A; places[place][tile][channel]
CLONES void write_tiles(const Plan& plan, Chunk chunk, int64_t channel, const float* places) {
    const Winograd& w = plan.winograd;
    Tile tile = tile_of(plan, chunk.first);
    for (int64_t index = 0; index < chunk.count; ++index, advance(w, tile)) {
        Floats half[TILE][WINDOW];
        for (int64_t column = 0; column < WINDOW; ++column) {
            Floats in[WINDOW];
            for (int64_t row = 0; row < WINDOW; ++row)
                in[row] = read(places + (row * WINDOW + column) * (BLOCK + GAP) + index * LANES);
            half[0][column] = in[0] + in[1] + in[2];
            half[1][column] = in[1] - in[2] - in[3];
        }
        for (int64_t row = 0; row < TILE && tile.y + row < w.height; ++row) {
            const Floats* in = half[row];
            float* to = w.output + channel;
            to += ((tile.image * w.height + tile.y + row) * w.width + tile.x) * w.out_channels;
            write(to, in[0] + in[1] + in[2]);
            if (tile.x + 1 < w.width) write(to + w.out_channels, in[1] - in[2] - in[3]);
        }
    }
}

// places[out / 16][place][in][out % 16] = G weight G', for one `in` and 16 `out`
CLONES void transform_weights(const Winograd& w, int64_t out, int64_t in, float* places) {
    Floats taken[TAPS][TAPS], half[WINDOW][TAPS];
    for (int64_t tap = 0; tap < TAPS * TAPS; ++tap)
        for (int64_t lane = 0; lane < LANES; ++lane)
            taken[tap / TAPS][tap % TAPS][lane] =
                w.turned ? w.weight[(in * TAPS * TAPS + TAPS * TAPS - 1 - tap) * w.out_channels + out + lane]
                         : w.weight[((out + lane) * TAPS * TAPS + tap) * w.in_channels + in];
    for (int64_t column = 0; column < TAPS; ++column) {
        const Floats outer = (taken[0][column] + taken[2][column]) * 0.5f, inner = taken[1][column] * 0.5f;
        half[0][column] = taken[0][column];
        half[1][column] = outer + inner;
        half[2][column] = outer - inner;
        half[3][column] = taken[2][column];
    }
    const int64_t stride = w.in_channels * LANES;
    float* to = places + out * PLACES * w.in_channels + in * LANES;
    for (const Floats(&row)[TAPS] : half) {
        const Floats outer = (row[0] + row[2]) * 0.5f, inner = row[1] * 0.5f;
        write(to, row[0]);
        write(to + stride, outer + inner);
        write(to + 2 * stride, outer - inner);
        write(to + 3 * stride, row[2]);
        to += WINDOW * stride;
    }
}

// The gradient of 16 `out` and one `in` = G' places G; sums[part][out / 16][place][in][out % 16]
CLONES void write_weights(const Plan& plan, const float* sums, int64_t out, int64_t in) {
    const Winograd& w = plan.winograd;
    Floats sum[WINDOW][WINDOW] = {}, half[TAPS][WINDOW];
    for (int64_t part = 0; part < plan.parts; ++part) {
        const float* from = sums + part * plan.weights + out * PLACES * w.in_channels + in * LANES;
        for (int64_t place = 0; place < PLACES; ++place)
            sum[place / WINDOW][place % WINDOW] += read(from + place * w.in_channels * LANES);
    }
    for (int64_t column = 0; column < WINDOW; ++column) {
        const Floats even = (sum[1][column] + sum[2][column]) * 0.5f;
        half[0][column] = sum[0][column] + even;
        half[1][column] = (sum[1][column] - sum[2][column]) * 0.5f;
        half[2][column] = even + sum[3][column];
    }
    for (int64_t row = 0; row < TAPS; ++row) {
        const Floats even = (half[row][1] + half[row][2]) * 0.5f;
        const Floats gradient[TAPS] = {half[row][0] + even, (half[row][1] - half[row][2]) * 0.5f, even + half[row][3]};
        for (int64_t column = 0; column < TAPS; ++column)
            for (int64_t lane = 0; lane < LANES; ++lane)
                w.weight_gradient[((out + lane) * TAPS * TAPS + row * TAPS + column) * w.in_channels + in] =
                    gradient[column][lane];
    }
}

// -- matrix products of 16 rows and 16 columns:
//    product[row][column] (+)= sum over blocks and k < count of left[block][row * ROW + k * STEP] * right[block][k][column]

using Product = void(const float* left, const float* right, int64_t blocks, int64_t count, float* product);

template <int64_t ROW, int64_t STEP, bool ADD>
AVX512 void multiply_avx512(const float* left, const float* right, int64_t blocks, int64_t count, float* product) {
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
AVX2 void multiply_avx2(const float* all_left, const float* all_right, int64_t blocks, int64_t count, float* product) {
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
                const __m256 lower = _mm256_load_ps(right + k * LANES), upper = _mm256_load_ps(right + k * LANES + HALF);
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

Product* sum_over_channels(const Winograd& w) {  // left[channel / 16][tile][channel % 16]
    return w.instructions == WITH_AVX512 ? multiply_avx512<LANES, 1, false> : multiply_avx2<LANES, 1, false>;
}

Product* sum_over_tiles(const Winograd& w) {  // left[tile][channel]
    return w.instructions == WITH_AVX512 ? multiply_avx512<1, LANES, true> : multiply_avx2<1, LANES, true>;
}

// -- all of it

void convolve_chunk(const Plan& plan, Chunk chunk, const float* weights, float* windows, float* products) {
    const Winograd& w = plan.winograd;
    Product* const multiply = sum_over_channels(w);
    transform_windows(plan, chunk, windows);
    for (int64_t out = 0; out < w.out_channels; out += LANES) {
        for (int64_t place = 0; place < PLACES; ++place, weights += w.in_channels * LANES)
            multiply(windows + place * plan.in_stride, weights, w.in_channels / LANES, LANES,
                     products + place * (BLOCK + GAP));
        write_tiles(plan, chunk, out, products);
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
            transform_weights(w, task / w.in_channels * LANES, task % w.in_channels, weights);
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
    Product* const multiply = sum_over_tiles(w);
    std::fill(sums, sums + plan.weights, 0.0f);
    for (int64_t index = plan.chunks * part / plan.parts; index < plan.chunks * (part + 1) / plan.parts; ++index) {
        const Chunk chunk = chunk_of(plan, index);
        transform_windows(plan, chunk, windows);
        transform_tiles(plan, chunk, tiles);
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
            write_weights(plan, sums, task / w.in_channels * LANES, task % w.in_channels);
    }
    _mm_free(sums);
    return true;
}

}  // namespace

// Both return whether there was memory for it.
extern "C" int fastsnap_winograd_convolution(const Winograd* winograd) { return convolve(*winograd); }
extern "C" int fastsnap_winograd_weight_gradient(const Winograd* winograd) { return differentiate(*winograd); }

#endif

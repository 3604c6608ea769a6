// Winograd's F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308): the order of the tiles, and the transforms.
//
// A tile of 2x2 pixels of the output depends on a window of 4x4 pixels of the input. Windows, tiles and weights are
// transformed, with additions alone, to 16 places each; what is multiplied at a place is for winograd_cpu.cpp:
//
//     output = A' [(G weight G') * (B' window B)] A    gradient of the weights = G' [(A tile A') * (B' window B)] G

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "lanes.h"

struct Winograd {  // the same layout as WinogradArguments in winograd_cpu.py
    const float* input;            // [images, height, width, in_channels]
    const float* weight;           // [out_channels, 3, 3, in_channels]; turned: [in_channels, 3, 3, out_channels]
    float* output;                 // [images, height, width, out_channels]
    const float* output_gradient;  // likewise
    float* weight_gradient;        // [out_channels, 3, 3, in_channels]
    int64_t images, height, width, in_channels, out_channels, turned, instructions, threads;
};

namespace {

constexpr int64_t TAPS = 3;    // along an axis; the padding is 1
constexpr int64_t TILE = 2;    // pixels of the output along an axis
constexpr int64_t WINDOW = 4;  // pixels of the input, along an axis, that a tile depends on
constexpr int64_t PLACES = WINDOW * WINDOW;
constexpr int64_t TILES = 16;  // in a chunk
constexpr int64_t BLOCK = TILES * LANES;
constexpr int64_t GAP = LANES;  // between places: without it they would all fall into the same few lines of a cache
constexpr int64_t MOST_CHANNELS = 64;  // the same as in convolution.py
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
INLINE void transform_windows(const Plan& plan, Chunk chunk, float* places) {
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
INLINE void transform_tiles(const Plan& plan, Chunk chunk, float* places) {
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

// 16 channels of the output = A' places A; places[place][tile][channel], `stride` from place to place
INLINE void write_tiles(const Plan& plan, Chunk chunk, int64_t channel, const float* places, int64_t stride) {
    const Winograd& w = plan.winograd;
    const int64_t below = TILE * w.width * w.out_channels;  // to the next row of tiles, which the caches get in advance
    Tile tile = tile_of(plan, chunk.first);
    for (int64_t index = 0; index < chunk.count; ++index, advance(w, tile)) {
        Floats half[TILE][WINDOW];
        for (int64_t column = 0; column < WINDOW; ++column) {
            Floats in[WINDOW];
            for (int64_t row = 0; row < WINDOW; ++row)
                in[row] = read(places + (row * WINDOW + column) * stride + index * LANES);
            half[0][column] = in[0] + in[1] + in[2];
            half[1][column] = in[1] - in[2] - in[3];
        }
        for (int64_t row = 0; row < TILE && tile.y + row < w.height; ++row) {
            const Floats* in = half[row];
            float* to = w.output + channel;
            to += ((tile.image * w.height + tile.y + row) * w.width + tile.x) * w.out_channels;
            write(to, in[0] + in[1] + in[2]);
            __builtin_prefetch(to + below, 1);
            if (tile.x + 1 == w.width) continue;
            write(to + w.out_channels, in[1] - in[2] - in[3]);
            __builtin_prefetch(to + below + w.out_channels, 1);
        }
    }
}

// places[out / 16][place][in][out % 16] = G weight G', for one `in` and 16 `out`
INLINE void transform_weights(const Winograd& w, int64_t out, int64_t in, float* places) {
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
INLINE void write_weights(const Plan& plan, const float* sums, int64_t out, int64_t in) {
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

}  // namespace

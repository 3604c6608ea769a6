// Crops of uint8 images, brought to a size (antialiased bilinear), mirrored and coloured, one image per thread at a time.
//
// Columns are resized pixel by pixel, three channels as a vector of four; rows by whole rows, which the compiler
// vectorises. So whichever leaves fewer columns to resize goes first: the columns where the image is enlarged, the rows
// where it shrinks. Either way a row is finished before the next one begins, and never leaves the nearest cache. For that
// the mean of the resized image, which the colour transform needs, is taken beforehand: it is a weighted sum of the
// pixels that come in. Each number has its one order of additions: neither threads nor instruction sets change a bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu.h"

namespace {

typedef float Four __attribute__((vector_size(16)));

constexpr int64_t ROOM = 4;  // floats behind a row

struct Crop {  // the same as the columns of `crops` in resized_crop_cpu.py
    int64_t image, row_bytes, top, left, height, width, flip;
};

// What each of `size` positions takes of `length` pixels: PyTorch's antialiased linear filter.
struct Taps {
    std::vector<int64_t> first, count;
    std::vector<float> weights, totals;  // totals: what each pixel gives to all positions together
    int64_t most = 0;

    void fill(int64_t length, int64_t size) {
        const double scale = static_cast<double>(length) / size, support = std::max(scale, 1.0);
        most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
        first.resize(size);
        count.resize(size);
        weights.assign(size * most, 0.0f);
        std::vector<double> given(length), own(most);
        for (int64_t i = 0; i < size; ++i) {
            const double centre = scale * (i + 0.5);
            first[i] = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
            const int64_t end = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), length);
            count[i] = std::min(end - first[i], most);
            double sum = 0;
            std::fill(own.begin(), own.end(), 0.0);
            for (int64_t k = 0; k < count[i]; ++k) {
                own[k] = std::max(0.0, 1.0 - std::abs((first[i] + k + 0.5 - centre) / support));
                sum += own[k];
            }
            for (int64_t k = 0; k < count[i]; ++k) {
                weights[i * most + k] = static_cast<float>(own[k] / sum);
                given[first[i] + k] += own[k] / sum;
            }
        }
        totals.assign(given.begin(), given.end());
    }
};

template <typename T>
INLINE void add_row(float* sums, const T* row, float weight, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sums[i] += weight * static_cast<float>(row[i]);
}

template <typename T>
INLINE void set_row(float* sums, const T* row, float weight, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sums[i] = weight * static_cast<float>(row[i]);
}

INLINE Four load_four(const float* place) {
    Four four;
    std::memcpy(&four, place, sizeof four);
    return four;
}

// A row of `width` pixels from the row `source`, which ends in ROOM numbers; mirrored or not.
template <int64_t channels>
INLINE void resize_columns(float* to, const float* source, const Taps& columns, int64_t width, bool flip) {
    const int64_t step = flip ? -channels : channels;
    float* place = flip ? to + (width - 1) * channels : to;
    for (int64_t x = 0; x < width; ++x, place += step) {
        const float* weights = &columns.weights[x * columns.most];
        const float* from = source + columns.first[x] * channels;
        Four pixel = weights[0] * load_four(from);
        for (int64_t k = 1; k < columns.count[x]; ++k) pixel += weights[k] * load_four(from + k * channels);
        std::memcpy(place, &pixel, channels * sizeof(float));
    }
}

constexpr int64_t BLOCK = 48;  // numbers, of whole pixels and whole vectors

// The sums over the resized image, by channel: in fp32 by position within a block of a row, then in double.
template <int64_t channels>
INLINE void sum_resized(double* sums, const uint8_t* image, int64_t row_bytes, const Taps& rows, int64_t height,
                        const float* column_totals, int64_t values) {
    for (int64_t y = 0; y < height; ++y) {
        const uint8_t* row = image + y * row_bytes;
        float parts[BLOCK] = {};
        int64_t i = 0;
        for (; i + BLOCK <= values; i += BLOCK)
            for (int64_t j = 0; j < BLOCK; ++j) parts[j] += column_totals[i + j] * static_cast<float>(row[i + j]);
        for (int64_t j = 0; i + j < values; ++j) parts[j] += column_totals[i + j] * static_cast<float>(row[i + j]);
        for (int64_t j = 0; j < BLOCK; ++j) sums[j % channels] += rows.totals[y] * static_cast<double>(parts[j]);
    }
}

// The colour transform as a sum over the numbers around each one: a channel's neighbours of the same pixel are at most
// two places away, and what is of another pixel has the factor 0.
template <int64_t channels>
struct Colour {
    float factors[5][BLOCK] = {}, constant[BLOCK];

    INLINE Colour(const float* values, const double* mean, int64_t pixels) {
        const float *matrix = values, *of_mean = matrix + channels * channels, *offset = of_mean + channels * channels;
        for (int64_t j = 0; j < BLOCK; ++j) {
            const int64_t c = j % channels;
            double sum = offset[c];
            for (int64_t k = 0; k < channels; ++k) {
                sum += of_mean[c * channels + k] * (mean[k] / static_cast<double>(pixels));
                factors[k - c + 2][j] = matrix[c * channels + k];
            }
            constant[j] = static_cast<float>(sum);
        }
    }

    INLINE void apply(float* output, const float* values, int64_t count) const {
        int64_t i = 0;
        for (; i + BLOCK <= count; i += BLOCK) apply_to_block(output + i, values + i, BLOCK);
        apply_to_block(output + i, values + i, count - i);
    }

    INLINE void apply_to_block(float* output, const float* values, int64_t count) const {
        if constexpr (channels == 1) {
            for (int64_t j = 0; j < count; ++j) output[j] = constant[j] + factors[2][j] * values[j];
        } else {
            for (int64_t j = 0; j < count; ++j)
                output[j] = constant[j] + factors[0][j] * values[j - 2] + factors[1][j] * values[j - 1] +
                            factors[2][j] * values[j] + factors[3][j] * values[j + 1] + factors[4][j] * values[j + 2];
        }
    }
};

// What a thread works with, from crop to crop.
struct Workspace {
    Taps rows, columns;
    int64_t height = -1, width = -1;
    std::vector<float> sums, ring, row, column_totals;
};

template <int64_t channels>
INLINE void crop_one(const Crop& crop, const float* colours, float* output, int64_t height, int64_t width,
                     Workspace& work) {
    const int64_t values = crop.width * channels, row = width * channels;
    if (crop.height != work.height) work.rows.fill(work.height = crop.height, height);
    if (crop.width != work.width) {
        work.columns.fill(work.width = crop.width, width);
        work.column_totals.resize(values);
        for (int64_t i = 0; i < values; ++i) work.column_totals[i] = work.columns.totals[i / channels];
    }
    const Taps& rows = work.rows;
    const auto* image = reinterpret_cast<const uint8_t*>(crop.image) + crop.top * crop.row_bytes + crop.left * channels;
    double sums[channels] = {};
    sum_resized<channels>(sums, image, crop.row_bytes, rows, crop.height, work.column_totals.data(), values);
    const Colour<channels> colour(colours, sums, height * width);

    // Behind the last pixel of a row, and before the first, its neighbours must be numbers.
    work.sums.assign(values + ROOM, 0.0f);
    work.row.assign(row + 2 * ROOM, 0.0f);
    float *whole = work.sums.data(), *resized = work.row.data() + ROOM;
    const bool enlarged = crop.height < height;
    if (enlarged) work.ring.resize(rows.most * row + ROOM);
    int64_t done = 0;  // rows of the image whose columns are resized
    for (int64_t y = 0; y < height; ++y) {
        const float* weights = &rows.weights[y * rows.most];
        for (int64_t k = 0; k < rows.count[y]; ++k) {
            const int64_t source = rows.first[y] + k;
            if (k > 0 && weights[k] == 0.0f) continue;
            if (!enlarged) {
                const uint8_t* bytes = image + source * crop.row_bytes;
                if (k == 0) set_row(whole, bytes, weights[k], values);
                else add_row(whole, bytes, weights[k], values);
                continue;
            }
            for (; done <= source; ++done) {
                set_row(whole, image + done * crop.row_bytes, 1.0f, values);
                resize_columns<channels>(&work.ring[done % rows.most * row], whole, work.columns, width, crop.flip);
            }
            const float* resized_columns = &work.ring[source % rows.most * row];
            if (k == 0) set_row(resized, resized_columns, weights[k], row);
            else add_row(resized, resized_columns, weights[k], row);
        }
        if (!enlarged) resize_columns<channels>(resized, whole, work.columns, width, crop.flip);
        colour.apply(output + y * row, resized, row);
    }
}

template <int64_t channels>
void crop_all(const Crop* crops, const float* colours, float* output, int64_t count, int64_t height, int64_t width,
              int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Workspace work;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i)
            in_force<crop_one<channels>>(crops[i], colours + i * (2 * channels + 1) * channels,
                                         output + i * height * width * channels, height, width, work);
    }
}

}  // namespace

// The first crop that is not within its image, or -1.
static int64_t first_outside(const Crop* crops, const int64_t* sizes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const Crop& crop = crops[i];
        const bool inside = crop.top >= 0 && crop.left >= 0 && crop.height >= 1 && crop.width >= 1 &&
                            crop.top + crop.height <= sizes[2 * i] && crop.left + crop.width <= sizes[2 * i + 1];
        if (!inside) return i;
    }
    return -1;
}

// sizes: height and width of each crop's image. Returns -1, or the first crop that is not within its image.
extern "C" int64_t fastsnap_resized_crops(const int64_t* crops, const int64_t* sizes, const float* colours, float* output, int64_t count,
                                       int64_t height, int64_t width, int64_t channels, int64_t threads) {
    const auto* all = reinterpret_cast<const Crop*>(crops);
    const int64_t outside = first_outside(all, sizes, count);
    if (outside >= 0) return outside;
    if (channels == 3) crop_all<3>(all, colours, output, count, height, width, threads);
    else crop_all<1>(all, colours, output, count, height, width, threads);
    return -1;
}

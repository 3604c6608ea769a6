// Crops of uint8 images, brought to a size (antialiased bilinear), mirrored and coloured, one image per thread at a time.
//
// Rows first: sums of whole rows of bytes, which the compiler vectorises. Then columns, a pixel of three channels as a
// vector of four, which is why a row ends in some room. The colour transform needs the mean of the resized image, so it
// is a second pass over what is still in the cache. Each number has its one order of additions: neither the number of
// threads nor the instruction set changes a bit.

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
    std::vector<float> weights;
    int64_t most = 0;

    void fill(int64_t length, int64_t size) {
        const double scale = static_cast<double>(length) / size, support = std::max(scale, 1.0);
        most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
        first.resize(size);
        count.resize(size);
        weights.assign(size * most, 0.0f);
        for (int64_t i = 0; i < size; ++i) {
            const double centre = scale * (i + 0.5);
            first[i] = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
            const int64_t end = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), length);
            count[i] = std::min(end - first[i], most);
            double sum = 0;
            std::vector<double> own(most);
            for (int64_t k = 0; k < count[i]; ++k) {
                own[k] = std::max(0.0, 1.0 - std::abs((first[i] + k + 0.5 - centre) / support));
                sum += own[k];
            }
            for (int64_t k = 0; k < count[i]; ++k) weights[i * most + k] = static_cast<float>(own[k] / sum);
        }
    }
};

INLINE void add_row(float* sums, const uint8_t* row, float weight, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sums[i] += weight * static_cast<float>(row[i]);
}

INLINE void set_row(float* sums, const uint8_t* row, float weight, int64_t count) {
    for (int64_t i = 0; i < count; ++i) sums[i] = weight * static_cast<float>(row[i]);
}

INLINE Four load_four(const float* place) {
    Four four;
    std::memcpy(&four, place, sizeof four);
    return four;
}

template <int64_t channels>
INLINE void save_pixel(float* place, const Four& pixel) {
    std::memcpy(place, &pixel, channels * sizeof(float));
}

template <int64_t channels>
INLINE void crop_one(const Crop& crop, const Taps& rows, const Taps& columns, float* sums, const float* colour,
                     float* output, int64_t height, int64_t width) {
    const auto* image = reinterpret_cast<const uint8_t*>(crop.image) + crop.top * crop.row_bytes + crop.left * channels;
    const int64_t row_values = crop.width * channels;
    double mean[4] = {};
    for (int64_t y = 0; y < height; ++y) {
        const float* weights = &rows.weights[y * rows.most];
        for (int64_t k = 0; k < rows.count[y]; ++k) {
            const uint8_t* row = image + (rows.first[y] + k) * crop.row_bytes;
            if (k == 0) set_row(sums, row, weights[0], row_values);
            else if (weights[k] != 0.0f) add_row(sums, row, weights[k], row_values);
        }
        Four total = {};
        for (int64_t x = 0; x < width; ++x) {
            const float* own = &columns.weights[x * columns.most];
            const float* place = sums + columns.first[x] * channels;
            Four pixel = {};
            for (int64_t k = 0; k < columns.count[x]; ++k) pixel += own[k] * load_four(place + k * channels);
            total += pixel;
            const int64_t to = crop.flip ? width - 1 - x : x;
            save_pixel<channels>(output + (y * width + to) * channels, pixel);
        }
        for (int64_t c = 0; c < channels; ++c) mean[c] += total[c];
    }
    // colour: matrix, what it adds of the mean, and an offset, [C, C], [C, C] and [C].
    const float *matrix = colour, *of_mean = colour + channels * channels, *offset = of_mean + channels * channels;
    Four column[channels] = {}, constant = {};  // a number in every lane: what lies in memory may be a slow one
    for (int64_t c = 0; c < channels; ++c) {
        double value = offset[c];
        for (int64_t k = 0; k < channels; ++k) value += of_mean[c * channels + k] * (mean[k] / (height * width));
        constant[c] = static_cast<float>(value);
        for (int64_t k = 0; k < channels; ++k) column[k][c] = matrix[c * channels + k];
    }
    for (int64_t i = 0; i < height * width; ++i) {
        float* place = output + i * channels;
        Four pixel = constant;
        for (int64_t k = 0; k < channels; ++k) pixel += place[k] * column[k];
        save_pixel<channels>(place, pixel);
    }
}

template <int64_t channels>
INLINE void crop_range(const Crop* crops, const float* colours, float* output, int64_t first, int64_t end, int64_t height,
                       int64_t width, Taps& rows, Taps& columns, std::vector<float>& sums) {
    int64_t last_height = -1, last_width = -1;
    for (int64_t i = first; i < end; ++i) {
        const Crop& crop = crops[i];
        if (crop.height != last_height) rows.fill(last_height = crop.height, height);
        if (crop.width != last_width) columns.fill(last_width = crop.width, width);
        sums.resize(std::max<size_t>(sums.size(), crop.width * channels + ROOM));
        // Behind the last pixel its vector of four reaches into what is never used, but must be a number.
        std::fill(sums.begin() + crop.width * channels, sums.begin() + crop.width * channels + ROOM, 0.0f);
        crop_one<channels>(crop, rows, columns, sums.data(), colours + i * (2 * channels + 1) * channels,
                           output + i * height * width * channels, height, width);
    }
}

template <int64_t channels>
void crop_all(const Crop* crops, const float* colours, float* output, int64_t count, int64_t height, int64_t width,
              int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Taps rows, columns;
        std::vector<float> sums;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i)
            in_force<crop_range<channels>>(crops, colours, output, i, i + 1, height, width, rows, columns, sums);
    }
}

}  // namespace

extern "C" void fastsnap_resized_crops(const int64_t* crops, const float* colours, float* output, int64_t count,
                                       int64_t height, int64_t width, int64_t channels, int64_t threads) {
    const auto* all = reinterpret_cast<const Crop*>(crops);
    if (channels == 3) crop_all<3>(all, colours, output, count, height, width, threads);
    else crop_all<1>(all, colours, output, count, height, width, threads);
}

// relu(batch_norm(input) + shortcut) and its gradients, in two passes each: see batch_norm.py.
//
// Activations are rows of channels, in channels-last memory. Two rows are handled as one row of twice the columns where
// the channels are not a multiple of 32. Sums are taken over blocks of rows of a fixed size and then over the blocks in
// order, so that the result depends neither on the number of threads nor on the instruction set.

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu.h"
#include "lanes.h"

struct BatchNorm {  // the same layout as BatchNormArguments in batch_norm_cpu.py
    const void* input;
    const void* shortcut;  // may be null
    void* output;
    const float* weight;
    const float* bias;
    float* mean;               // of the batch, or those to normalise with
    float* inverse_deviation;  // likewise
    float* running_mean;
    float* running_variance;
    const void* output_gradient;
    void* input_gradient;
    void* shortcut_gradient;  // may be null
    float* weight_gradient;
    float* bias_gradient;
    int64_t rows, channels, bfloat16, training, threads;
    double momentum, epsilon;
};

namespace {

constexpr int64_t BLOCK = 8192;  // elements: a block of every tensor stays in the second cache
constexpr int64_t CHAINS = 2;    // independent sums, for the latency of an addition

struct Block {
    int64_t rows, columns;
};

struct Line {  // by channel; the input's gradient is scale * (masked gradient) - (slope * (input - mean) + offset)
    float *scale, *slope, *offset;
};

// -- one block

template <typename T>
INLINE void sum_block(const T* __restrict input, Block block, float* __restrict shifts, float* __restrict sums,
                      float* __restrict squares) {
    for (int64_t c = 0; c < block.columns; c += WIDTH) {
        const Pair shift = load(input, c);  // near the mean, so that the squares do not cancel
        Pair sum[CHAINS] = {}, square[CHAINS] = {};
        for (int64_t row = 0; row < block.rows; row += CHAINS)
            for (int64_t k = 0; k < CHAINS && row + k < block.rows; ++k) {
                const Pair x = load(input, (row + k) * block.columns + c) - shift;
                sum[k] = sum[k] + x;
                square[k] = square[k] + x * x;
            }
        collect<T>(shifts, c, shift);
        collect<T>(sums, c, sum[0] + sum[1]);
        collect<T>(squares, c, square[0] + square[1]);
    }
}

template <typename T>
INLINE void normalize_block(const T* __restrict input, const T* __restrict shortcut, T* __restrict output, Block block,
                            const BatchNorm& norm) {
    for (int64_t c = 0; c < block.columns; c += WIDTH) {
        const Pair mean = spread<T>(norm.mean, c, norm.channels), bias = spread<T>(norm.bias, c, norm.channels);
        const Pair scale =
            spread<T>(norm.weight, c, norm.channels) * spread<T>(norm.inverse_deviation, c, norm.channels);
        for (int64_t row = 0; row < block.rows; ++row) {
            const int64_t i = row * block.columns + c;
            Pair y = (load(input, i) - mean) * scale + bias;
            if (shortcut != nullptr) y = y + load(shortcut, i);
            save(output, i, zero_where_not_positive(y, y));
        }
    }
}

template <typename T>
INLINE void sum_gradient_block(const T* __restrict input, const T* __restrict output, const T* __restrict gradient,
                               T* __restrict masked, Block block, const BatchNorm& norm, float* __restrict sums,
                               float* __restrict products) {
    for (int64_t c = 0; c < block.columns; c += WIDTH) {
        const Pair mean = spread<T>(norm.mean, c, norm.channels);
        Pair sum[CHAINS] = {}, product[CHAINS] = {};
        for (int64_t row = 0; row < block.rows; row += CHAINS)
            for (int64_t k = 0; k < CHAINS && row + k < block.rows; ++k) {
                const int64_t i = (row + k) * block.columns + c;
                const Pair g = zero_where_not_positive(load(gradient, i), load(output, i));
                if (masked != nullptr) save(masked, i, g);
                sum[k] = sum[k] + g;
                product[k] = product[k] + g * (load(input, i) - mean);
            }
        collect<T>(sums, c, sum[0] + sum[1]);
        collect<T>(products, c, product[0] + product[1]);
    }
}

template <typename T>
INLINE void gradient_block(const T* __restrict input, const T* __restrict output, const T* __restrict gradient,
                           const T* __restrict masked, T* __restrict input_gradient, Block block,
                           const BatchNorm& norm, const Line& line) {
    for (int64_t c = 0; c < block.columns; c += WIDTH) {
        const Pair mean = spread<T>(norm.mean, c, norm.channels), scale = spread<T>(line.scale, c, norm.channels);
        const Pair slope = spread<T>(line.slope, c, norm.channels), offset = spread<T>(line.offset, c, norm.channels);
        for (int64_t row = 0; row < block.rows; ++row) {
            const int64_t i = row * block.columns + c;
            const Pair g = masked != nullptr ? load(masked, i)
                                             : zero_where_not_positive(load(gradient, i), load(output, i));
            save(input_gradient, i, scale * g - ((load(input, i) - mean) * slope + offset));
        }
    }
}

// A pointer that is null is written as such: it gets a loop of its own, without the branch.

template <typename T>
INLINE void normalize_rows(const T* input, const T* shortcut, T* output, Block block, const BatchNorm& norm) {
    if (shortcut == nullptr)
        normalize_block<T>(input, nullptr, output, block, norm);
    else
        normalize_block(input, shortcut, output, block, norm);
}

template <typename T>
INLINE void sum_gradient_rows(const T* input, const T* output, const T* gradient, T* masked, Block block,
                              const BatchNorm& norm, float* sums, float* products) {
    if (masked == nullptr)
        sum_gradient_block<T>(input, output, gradient, nullptr, block, norm, sums, products);
    else
        sum_gradient_block(input, output, gradient, masked, block, norm, sums, products);
}

template <typename T>
INLINE void gradient_rows(const T* input, const T* output, const T* gradient, const T* masked, T* input_gradient,
                          Block block, const BatchNorm& norm, const Line& line) {
    if (masked == nullptr)
        gradient_block<T>(input, output, gradient, nullptr, input_gradient, block, norm, line);
    else
        gradient_block(input, output, gradient, masked, input_gradient, block, norm, line);
}

// -- all blocks

class Blocks {
public:
    explicit Blocks(const BatchNorm& norm)
        : columns(norm.channels % WIDTH == 0 ? norm.channels : 2 * norm.channels),
          count((norm.rows * norm.channels / columns + rows() - 1) / rows()),
          last_(norm.rows * norm.channels / columns - (count - 1) * rows()),
          threads_(static_cast<int>(norm.threads)) {}

    const int64_t columns, count;

    Block block(int64_t index) const { return {index + 1 < count ? rows() : last_, columns}; }

    template <typename Work>
    void for_each(Work work) const {  // work(index of the block, its first element)
#pragma omp parallel for schedule(static) num_threads(threads_)
        for (int64_t index = 0; index < count; ++index) work(index, index * rows() * columns);
    }

private:
    int64_t rows() const { return BLOCK > columns ? BLOCK / columns : 1; }

    const int64_t last_;
    const int threads_;
};

template <typename T>
const T* at(const void* tensor, int64_t offset) {
    return tensor == nullptr ? nullptr : static_cast<const T*>(tensor) + offset;
}

template <typename T>
T* at(void* tensor, int64_t offset) {
    return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + offset;
}

template <typename T>
void take_moments(const BatchNorm& norm, const Blocks& blocks) {
    const int64_t size = blocks.count * blocks.columns;
    std::vector<float> shifts(size), sums(size), squares(size);
    blocks.for_each([&](int64_t index, int64_t begin) {
        const int64_t row = index * blocks.columns;
        in_force<sum_block<T>>(at<T>(norm.input, begin), blocks.block(index), &shifts[row], &sums[row],
                               &squares[row]);
    });
    for (int64_t c = 0; c < norm.channels; ++c) {
        double mean = 0, square = 0, seen = 0;  // Chan et al. 1983, the parallel form of Welford's method
        for (int64_t i = c; i < size; i += norm.channels) {
            const double rows = static_cast<double>(blocks.block(i / blocks.columns).rows), all = seen + rows;
            const double average = sums[i] / rows, step = shifts[i] + average - mean;
            square += squares[i] - sums[i] * average + step * step * seen * rows / all;
            mean += step * rows / all;
            seen = all;
        }
        const double variance = square / seen, unbiased = seen > 1 ? square / (seen - 1) : variance;
        const double old = 1 - norm.momentum;
        norm.mean[c] = static_cast<float>(mean);
        norm.inverse_deviation[c] = static_cast<float>(1 / std::sqrt(variance + norm.epsilon));
        norm.running_mean[c] = static_cast<float>(old * norm.running_mean[c] + norm.momentum * mean);
        norm.running_variance[c] = static_cast<float>(old * norm.running_variance[c] + norm.momentum * unbiased);
    }
}

template <typename T>
void forward(const BatchNorm& norm) {
    const Blocks blocks(norm);
    if (norm.training) take_moments<T>(norm, blocks);
    blocks.for_each([&](int64_t index, int64_t i) {
        in_force<normalize_rows<T>>(at<T>(norm.input, i), at<T>(norm.shortcut, i), at<T>(norm.output, i),
                                    blocks.block(index), norm);
    });
}

template <typename T>
void sum_gradients(const BatchNorm& norm, const Blocks& blocks, const Line& line) {
    const int64_t size = blocks.count * blocks.columns;
    std::vector<float> sums(size), products(size);
    blocks.for_each([&](int64_t index, int64_t i) {
        const int64_t row = index * blocks.columns;
        in_force<sum_gradient_rows<T>>(at<T>(norm.input, i), at<T>(norm.output, i), at<T>(norm.output_gradient, i),
                                       at<T>(norm.shortcut_gradient, i), blocks.block(index), norm, &sums[row],
                                       &products[row]);
    });
    const double rows = static_cast<double>(norm.rows);
    for (int64_t c = 0; c < norm.channels; ++c) {
        double sum = 0, product = 0;
        for (int64_t i = c; i < size; i += norm.channels) {
            sum += sums[i];
            product += products[i];
        }
        const double inverse = norm.inverse_deviation[c], scale = norm.weight[c] * inverse;
        norm.bias_gradient[c] = static_cast<float>(sum);
        norm.weight_gradient[c] = static_cast<float>(product * inverse);
        line.scale[c] = static_cast<float>(scale);
        line.slope[c] = static_cast<float>(scale * inverse * inverse * product / rows);
        line.offset[c] = static_cast<float>(scale * sum / rows);
    }
}

template <typename T>
void backward(const BatchNorm& norm) {
    const Blocks blocks(norm);
    std::vector<float> scale(norm.channels), slope(norm.channels), offset(norm.channels);
    const Line line{scale.data(), slope.data(), offset.data()};
    sum_gradients<T>(norm, blocks, line);
    const void* masked = norm.shortcut_gradient;
    blocks.for_each([&](int64_t index, int64_t i) {
        in_force<gradient_rows<T>>(at<T>(norm.input, i), at<T>(norm.output, i), at<T>(norm.output_gradient, i),
                                   at<T>(masked, i), at<T>(norm.input_gradient, i), blocks.block(index), norm, line);
    });
}

}  // namespace

extern "C" void fastsnap_batch_norm_forward(const BatchNorm* norm) {
    norm->bfloat16 ? forward<BFloat16>(*norm) : forward<float>(*norm);
}

extern "C" void fastsnap_batch_norm_backward(const BatchNorm* norm) {
    norm->bfloat16 ? backward<BFloat16>(*norm) : backward<float>(*norm);
}

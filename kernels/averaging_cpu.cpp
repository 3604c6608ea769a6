// Statistics of the ensembles of m = 1..M members, sample by sample: see EnsembleStatistics in averaging_reference.py.
//
// A sample's classes stay in the nearest cache while all members are added, so each logit is read once from memory.
// Sums run in fp32 over blocks of classes and in fp64 over the blocks: 1e-6 for tens of thousands of classes too. A
// block's sum has as many parts as a vector has elements, so its last bits depend on the instruction set; they do not
// depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu.h"

namespace {

constexpr int64_t BLOCK = 256;  // classes
constexpr int64_t PADDING = 16;  // classes; rows are padded with impossible classes, so that loops have no remainders

constexpr float LARGEST = 3.4028235e38f;  // finite number
struct Row {
    float best;
    int invalid;  // whether a logit is NaN or infinite
};

template <typename Type>
INLINE Row read(const Type* logits, int64_t stride, int64_t classes, float* values) {
    int invalid = 0;
    float best = -INFINITY;
#pragma omp simd reduction(| : invalid) reduction(max : best)
    for (int64_t c = 0; c < classes; ++c) {
        const float value = load(logits[c * stride]);
        values[c] = value;
        invalid |= !(std::fabs(value) <= LARGEST);
        best = value > best ? value : best;
    }
    return {best, invalid};
}

// fp64 logits count as their distances from the largest of the row, which then is 0: rounded as they are, large ones
// would lose what tells them apart.
INLINE Row read(const double* logits, int64_t stride, int64_t classes, float* values) {
    int invalid = 0;
    double best = -INFINITY;
#pragma omp simd reduction(| : invalid) reduction(max : best)
    for (int64_t c = 0; c < classes; ++c) {
        const double value = logits[c * stride];
        invalid |= !(std::fabs(value) <= LARGEST);
        best = value > best ? value : best;
    }
#pragma omp simd
    for (int64_t c = 0; c < classes; ++c) {
        const double distance = logits[c * stride] - best;
        values[c] = static_cast<float>(distance < -LARGEST ? -LARGEST : distance);
    }
    return {0, invalid};
}

template <typename Type>
INLINE Row read_row(const Type* logits, int64_t stride, int64_t classes, float* values) {
    // Adjacent classes get a loop of their own, since this one takes much of the time.
    return stride == 1 ? read(logits, 1, classes, values) : read(logits, stride, classes, values);
}

INLINE int32_t first_index(const float* values, int32_t classes, float value) {
    int32_t first = classes;
#pragma omp simd reduction(min : first)
    for (int32_t c = 0; c < classes; ++c) {
        const int32_t here = values[c] == value ? c : classes;
        first = here < first ? here : first;
    }
    return first;
}

INLINE int32_t classes_before(const float* values, int32_t classes, int32_t label) {
    const float value = values[label];
    int32_t before = 0;
#pragma omp simd reduction(+ : before)
    for (int32_t c = 0; c < classes; ++c) before += (values[c] > value) | ((values[c] == value) & (c < label));
    return before;
}

struct Softmax {
    double sum, log_sum, entropy;
};

// values -> exp((values - best) / temperature)
template <bool divided>
INLINE Softmax exponentials(float* values, int64_t classes, float best, float temperature) {
    double sum = 0, weighted = 0;
    for (int64_t begin = 0; begin < classes; begin += BLOCK) {
        const int64_t end = begin + BLOCK < classes ? begin + BLOCK : classes;
        float block_sum = 0, block_weighted = 0;
#pragma omp simd reduction(+ : block_sum, block_weighted)
        for (int64_t c = begin; c < end; ++c) {
            const float below = divided ? (values[c] - best) / temperature : values[c] - best;
            const float distance = below < -1000.0f ? -1000.0f : below;  // exp is 0 long before; avoids 0 * infinity
            const float power = exp_of_negative(distance);
            values[c] = power;
            block_sum += power;
            block_weighted += power * distance;
        }
        sum += block_sum;
        weighted += block_weighted;
    }
    const double log_sum = std::log(sum);
    return {sum, log_sum, log_sum - weighted / sum};
}

INLINE Softmax softmax_of(float* values, int64_t classes, float best, float temperature) {
    return temperature == 1.0f ? exponentials<false>(values, classes, best, 1.0f)
                               : exponentials<true>(values, classes, best, temperature);
}

struct Reduction {
    float best;
    double squares, entropy;
};

INLINE Reduction add_and_reduce(float* sums, const float* powers, int64_t classes, float factor, float inverse_total) {
    Reduction all{0, 0, 0};
    float best = 0;
    for (int64_t begin = 0; begin < classes; begin += BLOCK) {
        const int64_t end = begin + BLOCK < classes ? begin + BLOCK : classes;
        float squares = 0, entropy = 0;
#pragma omp simd reduction(+ : squares, entropy) reduction(max : best)
        for (int64_t c = begin; c < end; ++c) {
            sums[c] += factor * powers[c];
            best = sums[c] > best ? sums[c] : best;
            const float probability = sums[c] * inverse_total;
            squares += probability * probability;
            entropy -= probability * log_of_probability(probability);
        }
        all.squares += squares;
        all.entropy += entropy;
    }
    all.best = best;
    return all;
}

}  // namespace

struct Averaging {  // the same layout as AveragingArguments in averaging_cpu.py
    const void* logits;
    int64_t type, member_stride, sample_stride, class_stride;
    int64_t members, samples, classes;
    const int64_t* order;  // [M] members in the order in which they join; the weights and invalid are in this order
    const double *rescalings, *weights, *totals;  // [M], see weight_tables
    const int64_t* labels;  // [N] or null
    int64_t* prediction;  // [M, N], as all down to disagreement
    float* confidence;
    float* label_log_probability;  // null without labels, as label_rank
    int32_t* label_rank;
    float* sum_of_squares;
    float* entropy;
    float* mutual_information;
    int32_t* disagreement;
    float* probabilities;  // [N, C] or null
    int64_t* invalid;  // [M] number of samples with NaN or infinite logits
    int64_t threads;
    double temperature;
};

namespace {

struct Weight {
    double rescaling, value, total, log_rescaling, log_value, log_total;
};

struct Scratch {  // of one thread
    std::vector<float> sums, values;  // [padded classes]
    std::vector<int32_t> votes;  // [M]
};

struct Progress {  // of one sample
    double entropies = 0, log_label = -INFINITY;
};

double add_logs(double a, double b) {  // log(exp(a) + exp(b))
    const double high = a > b ? a : b, low = a > b ? b : a;
    return high + std::log(1 + std::exp(low - high));
}

template <typename Type>
INLINE float read_logits(const Averaging& job, int64_t m, int64_t sample, float* values) {
    const Type* logits =
        static_cast<const Type*>(job.logits) + job.order[m] * job.member_stride + sample * job.sample_stride;
    const Row row = read_row(logits, job.class_stride, job.classes, values);
    if (row.invalid) {
#pragma omp atomic
        job.invalid[m] += 1;
    }
    return row.best;
}

INLINE void add_member(const Averaging& job, int64_t m, int64_t sample, float best, const Weight& weight,
                       Scratch& scratch, Progress& progress) {
    const int64_t out = m * job.samples + sample, padded = static_cast<int64_t>(scratch.sums.size());
    const int32_t classes = static_cast<int32_t>(padded);
    float *sums = scratch.sums.data(), *values = scratch.values.data();
    scratch.votes[m] = first_index(values, classes, best);
    const double label_distance =
        job.labels == nullptr ? 0 : (static_cast<double>(values[job.labels[sample]]) - best) / job.temperature;
    const Softmax softmax = softmax_of(values, padded, best, static_cast<float>(job.temperature));
    if (weight.rescaling != 1)
        for (int64_t c = 0; c < padded; ++c) sums[c] *= static_cast<float>(weight.rescaling);
    const Reduction mean = add_and_reduce(sums, values, padded, static_cast<float>(weight.value / softmax.sum),
                                          static_cast<float>(1 / weight.total));
    const int32_t prediction = first_index(sums, classes, mean.best);
    progress.entropies = weight.rescaling * progress.entropies + weight.value * softmax.entropy;
    job.prediction[out] = prediction;
    job.confidence[out] = static_cast<float>(mean.best / weight.total);
    job.sum_of_squares[out] = static_cast<float>(mean.squares);
    job.entropy[out] = static_cast<float>(mean.entropy);
    job.mutual_information[out] = static_cast<float>(std::fmax(mean.entropy - progress.entropies / weight.total, 0));
    int32_t against = 0;
    for (int64_t voter = 0; voter <= m; ++voter) against += scratch.votes[voter] != prediction;
    job.disagreement[out] = against;
    if (job.labels == nullptr) return;
    progress.log_label = add_logs(weight.log_rescaling + progress.log_label,
                                  weight.log_value + label_distance - softmax.log_sum);
    job.label_log_probability[out] = static_cast<float>(std::fmax(progress.log_label - weight.log_total, -LARGEST));
    job.label_rank[out] = classes_before(sums, classes, static_cast<int32_t>(job.labels[sample]));
}

template <typename Type>
INLINE void average_sample(const Averaging& job, int64_t sample, const std::vector<Weight>& weights, Scratch& scratch) {
    std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0f);
    Progress progress;
    for (int64_t m = 0; m < job.members; ++m) {
        std::fill(scratch.values.begin() + job.classes, scratch.values.end(), -INFINITY);
        const float best = read_logits<Type>(job, m, sample, scratch.values.data());
        add_member(job, m, sample, best, weights[m], scratch, progress);
    }
    if (job.probabilities == nullptr) return;
    for (int64_t c = 0; c < job.classes; ++c)
        job.probabilities[sample * job.classes + c] = static_cast<float>(scratch.sums[c] / weights.back().total);
}

template <typename Type>
void average_samples(const Averaging& job) {
    std::vector<Weight> weights;
    for (int64_t m = 0; m < job.members; ++m) {
        const double rescaling = job.rescalings[m], value = job.weights[m], total = job.totals[m];
        weights.push_back({rescaling, value, total, std::log(rescaling), std::log(value), std::log(total)});
    }
    const size_t padded = static_cast<size_t>((job.classes + PADDING - 1) / PADDING * PADDING);
#pragma omp parallel num_threads(static_cast<int>(job.threads))
    {
        Scratch scratch{std::vector<float>(padded), std::vector<float>(padded), std::vector<int32_t>(weights.size())};
#pragma omp for schedule(static)
        for (int64_t sample = 0; sample < job.samples; ++sample)
            in_force<average_sample<Type>>(job, sample, weights, scratch);
    }
}

}  // namespace

extern "C" void fastsnap_average(const Averaging* job) {
    switch (job->type) {
        case 0: return average_samples<float>(*job);
        case 1: return average_samples<BFloat16>(*job);
        case 2: return average_samples<Float16>(*job);
        case 3: return average_samples<double>(*job);
    }
}

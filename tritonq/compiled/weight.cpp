// Folding, observing and quantizing a weight, seen as rows of out channels; see tritonq/reference/weight.py.
#include "common.h"

extern "C" {

// Smallest and largest folded value of each row. Returns whether all are finite.
int weight_extremes(const float* weight, int64_t rows, int64_t columns, const float* fold, float* low, float* high) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelFrom)
    for (int64_t i = 0; i < rows; i++) {
        const float* row = weight + i * columns;
        float smallest = kInfinity, largest = -kInfinity, nan = 0;
        // A NaN compares as neither; times zero it shows in a sum, as an infinity does.
#pragma omp simd reduction(min : smallest) reduction(max : largest) reduction(+ : nan)
        for (int64_t k = 0; k < columns; k++) {
            smallest = row[k] < smallest ? row[k] : smallest;
            largest = row[k] > largest ? row[k] : largest;
            nan += row[k] * 0.0f;
        }
        const float one = smallest * fold[i], other = largest * fold[i];
        low[i] = (one < other ? one : other) + nan, high[i] = (one > other ? one : other) + nan;
    }
    for (int64_t i = 0; i < rows; i++)
        if (!std::isfinite(low[i]) || !std::isfinite(high[i])) return 0;
    return 1;
}

// The running ranges of rows and their scales, zero points being 0. Returns whether some code of low..high lies outside
// quant_min..quant_max.
int weight_ranges(
    const float* low, const float* high, int64_t rows, int observes, const Rule* rule, float* min_val, float* max_val,
    float* scale) {
    int clips = 0;
    for (int64_t i = 0; i < rows; i++) {
        if (observes) {
            merge_range(low[i], high[i], min_val[i], max_val[i], *rule);
            follow_range(min_val[i], max_val[i], scale + i, nullptr, *rule);
        }
        const float inverse = 1.0f / scale[i];
        const float lowest = __builtin_rintf(low[i] * inverse), highest = __builtin_rintf(high[i] * inverse);
        clips |= !(lowest >= rule->quant_min && highest <= rule->quant_max);
    }
    return clips;
}

// round(weight fold / scale), between bounds where `clips`; `scales` is 1 where one scale serves all rows.
void weight_codes(
    const float* weight, int64_t rows, int64_t columns, const float* fold, const float* scale, int64_t scales, int clips,
    float lowest, float highest, float* codes) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelFrom)
    for (int64_t i = 0; i < rows; i++) {
        const float *row = weight + i * columns, factor = fold[i], inverse = 1.0f / scale[scales == 1 ? 0 : i];
        float* to = codes + i * columns;
        if (clips) {
#pragma omp simd
            for (int64_t k = 0; k < columns; k++) to[k] = clip(__builtin_rintf(row[k] * factor * inverse), lowest, highest);
        } else {
#pragma omp simd
            for (int64_t k = 0; k < columns; k++) to[k] = __builtin_rintf(row[k] * factor * inverse);
        }
    }
}

// Gradients of weight (which may be `gradient` itself) and fold from that of the codes.
void weight_backward(
    const float* gradient, const float* weight, int64_t rows, int64_t columns, const float* fold, const float* unit,
    const float* scale, int64_t scales, int clips, float lowest, float highest, float* dweight, float* dfold) {
#pragma omp parallel for schedule(static) if (rows * columns > kParallelFrom)
    for (int64_t i = 0; i < rows; i++) {
        const float *dcodes = gradient + i * columns, *row = weight + i * columns;
        const float factor = fold[i] / unit[i], own = fold[i], inverse = clips ? 1.0f / scale[scales == 1 ? 0 : i] : 0;
        float* to = dweight + i * columns;
        double total = 0;
        for (int64_t start = 0; start < columns; start += kChunk) {
            const int64_t end = columns - start < kChunk ? columns : start + kChunk;
            float some = 0;
            if (clips) {
#pragma omp simd reduction(+ : some)
                for (int64_t k = start; k < end; k++) {
                    const float step = __builtin_rintf(row[k] * own * inverse);
                    const float g = step >= lowest && step <= highest ? dcodes[k] : 0.0f;
                    some += g * row[k];
                    to[k] = g * factor;
                }
            } else {
#pragma omp simd reduction(+ : some)
                for (int64_t k = start; k < end; k++) {
                    some += dcodes[k] * row[k];
                    to[k] = dcodes[k] * factor;
                }
            }
            total += some;
        }
        dfold[i] = static_cast<float>(total) / unit[i];
    }
}

// s = gamma / sigma, or 1 / sigma where that is tiny, and 1 / sigma; see tritonq/reference/fold.py.
void nonzero_fold(
    const float* running_var, const float* gamma, int64_t channels, float eps, float tiny, float* fold, float* inverse) {
    for (int64_t j = 0; j < channels; j++) {
        inverse[j] = 1.0f / std::sqrt(running_var[j] + eps);
        const float product = gamma ? gamma[j] * inverse[j] : inverse[j];
        fold[j] = gamma && std::fabs(product) < tiny ? inverse[j] : product;
    }
}

// d gamma; see tritonq/functional/conv_bn.py.
void gamma_gradient(
    const float* gamma, const float* fold, const float* inverse_std, const float* eps_share, const float* sum_gn,
    const float* dfold, int64_t channels, float tiny, float* dgamma) {
    for (int64_t j = 0; j < channels; j++) {
        const float sign = fold[j] > 0 ? 1.0f : fold[j] < 0 ? -1.0f : 0.0f;
        const float direct = sum_gn[j] * sign, through = dfold[j] * inverse_std[j] - direct * eps_share[j];
        dgamma[j] = std::fabs(gamma[j] * inverse_std[j]) >= tiny ? direct + through : direct;
    }
}

// A step's weight: its fold, ranges and codes; `vectors` gets fold, 1 / sigma, fold / scale and a copy of the scale, one
// after the other. Returns whether values were clipped, or -1 if some are not finite: then nothing else was written.
int step_weight(
    const float* weight, int64_t rows, int64_t columns, const float* running_var, const float* gamma, float eps,
    float tiny, const Rule* rule, float* min_val, float* max_val, float* scale, int observes, float* vectors,
    float* codes) {
    float *fold = vectors, *inverse_std = fold + rows, *ratio = inverse_std + rows, *unit = ratio + rows;
    std::vector<float> low(rows), high(rows);
    nonzero_fold(running_var, gamma, rows, eps, tiny, fold, inverse_std);
    if (!weight_extremes(weight, rows, columns, fold, low.data(), high.data())) return -1;
    const int clips = weight_ranges(low.data(), high.data(), rows, observes, rule, min_val, max_val, scale);
    for (int64_t i = 0; i < rows; i++) unit[i] = scale[i], ratio[i] = fold[i] / scale[i];
    const float lowest = static_cast<float>(rule->quant_min), highest = static_cast<float>(rule->quant_max);
    weight_codes(weight, rows, columns, fold, unit, rows, clips, lowest, highest, codes);
    return clips;
}

// Gradients of a step's weight (which may be `gradient` itself) and of gamma from that of the codes.
void step_weight_backward(
    const float* gradient, const float* weight, int64_t rows, int64_t columns, const float* gamma, const float* fold,
    const float* inverse_std, const float* unit, const float* eps_share, const float* sum_gn, const float* scale,
    float tiny, int clips, float lowest, float highest, float* dweight, float* dgamma) {
    std::vector<float> dfold(rows);
    weight_backward(
        gradient, weight, rows, columns, fold, unit, scale, rows, clips, lowest, highest, dweight, dfold.data());
    gamma_gradient(gamma, fold, inverse_std, eps_share, sum_gn, dfold.data(), rows, tiny, dgamma);
}

}  // extern "C"

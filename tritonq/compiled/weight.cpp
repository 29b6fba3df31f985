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

// The running ranges of a symmetric type without zero points, and its scales; see update_range and range_to_qparams.
// `constant` is negative for running minimum and maximum. `copy_above` is negative where none is given. Returns whether
// some code of low..high lies outside quant_min..quant_max.
int weight_ranges(
    const float* low, const float* high, int64_t rows, int observes, double constant, double copy_above, float half,
    float eps, int quant_min, int quant_max, float* min_val, float* max_val, float* scale) {
    int clips = 0;
    for (int64_t i = 0; i < rows; i++) {
        if (observes) {
            if (constant < 0) {
                min_val[i] = low[i] < min_val[i] ? low[i] : min_val[i];
                max_val[i] = high[i] > max_val[i] ? high[i] : max_val[i];
            } else {
                const double magnitude = max_val[i] > -min_val[i] ? max_val[i] : -min_val[i];
                const double found = high[i] > -low[i] ? high[i] : -low[i];
                const float share = static_cast<float>(constant);
                if (!(min_val[i] <= max_val[i]) || (copy_above >= 0 && found > copy_above * magnitude)) {
                    min_val[i] = low[i], max_val[i] = high[i];
                } else {
                    min_val[i] += (low[i] - min_val[i]) * share;
                    max_val[i] += (high[i] - max_val[i]) * share;
                }
            }
            const float largest = (-min_val[i] > max_val[i] ? -min_val[i] : max_val[i]) / half;
            scale[i] = largest > eps ? largest : eps;
        }
        const float inverse = 1.0f / scale[i];
        clips |= !(__builtin_rintf(low[i] * inverse) >= quant_min && __builtin_rintf(high[i] * inverse) <= quant_max);
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

}  // extern "C"

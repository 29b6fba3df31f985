// Sums that are observed and rounded, with one bit per element, and codes of tensors on a grid; see
// tritonq/reference/residual.py and tritonq/reference/input_codes.py.
#include "common.h"

extern "C" {

// y = a + b, or where b is null y itself, and its smallest and largest value. Returns whether all are finite.
static int join_sum(const float* a, const float* b, int64_t count, float* y, float* range) {
    float smallest = kInfinity, largest = -kInfinity, nan = 0;
    if (b) {
#pragma omp parallel for simd schedule(static) reduction(min : smallest) reduction(max : largest) reduction(+ : nan) if (count > kParallelFrom)
        for (int64_t i = 0; i < count; i++) {
            const float sum = a[i] + b[i];
            y[i] = sum;
            smallest = sum < smallest ? sum : smallest;
            largest = sum > largest ? sum : largest;
            nan += sum * 0.0f;
        }
        range[0] = smallest, range[1] = largest;
        return std::isfinite(nan);
    }
    // A NaN compares as neither; times zero it shows in a sum, as an infinity does.
#pragma omp parallel for simd schedule(static) reduction(min : smallest) reduction(max : largest) reduction(+ : nan) if (count > kParallelFrom)
    for (int64_t i = 0; i < count; i++) {
        smallest = y[i] < smallest ? y[i] : smallest;
        largest = y[i] > largest ? y[i] : largest;
        nan += y[i] * 0.0f;
    }
    range[0] = smallest, range[1] = largest;
    return std::isfinite(nan);
}

// Rounds `y` in place and packs where its gradient passes: plane p of `length` elements is bit p of every byte.
static void join_apply(float* y, int64_t count, int64_t length, const Tail* tail, uint8_t* mask) {
    constexpr int64_t kBlock = 4096;
    const Tail t = *tail;
#pragma omp parallel for schedule(static) if (count > kParallelFrom)
    for (int64_t start = 0; start < length; start += kBlock) {
        const int64_t end = length - start < kBlock ? length : start + kBlock;
        for (int64_t j = start; j < end; j++) mask[j] = 0;
        for (int plane = 0; plane < 8; plane++) {
            float* from = y + plane * length;
            const int64_t last = count - plane * length < end ? count - plane * length : end;
#pragma omp simd
            for (int64_t j = start; j < last; j++) {
                mask[j] |= static_cast<uint8_t>(passes(from[j], t) << plane);
                from[j] = t.rounds ? rounded(from[j], t) : clip(from[j], t.floor, t.ceiling);
            }
        }
    }
}

// What follows an operation in C++ other than the one that computed it.
void tail_of(Tail* tail, const Rule* rule, int rounds, float ceiling, const float* scale, const int32_t* zero_point) {
    *tail = make_tail(rounds, scale, zero_point, rule ? rule->quant_min : 0, rule ? rule->quant_max : 0, ceiling);
}

// The sum of a and b (null: a alone, which is `y`), observed, rounded and with its mask. Returns whether all values are
// finite; if not, only `y` was written.
int join_forward(
    const float* a, const float* b, int64_t count, int64_t length, const Rule* rule, int observes, int rounds,
    float ceiling, float* min_val, float* max_val, float* scale, int32_t* zero_point, float* y, uint8_t* mask) {
    float range[2];
    if (!join_sum(a, b, count, y, range)) return 0;
    if (observes) observe_range(range[0], range[1], ceiling, min_val, max_val, scale, zero_point, *rule);
    Tail tail;
    tail_of(&tail, rule, rounds, ceiling, scale, zero_point);
    join_apply(y, count, length, &tail, mask);
    return 1;
}

// dy where the bit is set, else 0.
void join_backward(const float* dy, const uint8_t* mask, int64_t count, int64_t length, float* result) {
#pragma omp parallel for schedule(static) if (count > kParallelFrom)
    for (int plane = 0; plane < 8; plane++) {
        const int64_t start = plane * length, size = count - start < length ? count - start : length;
        const float* from = dy + start;
        float* to = result + start;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) to[j] = (mask[j] >> plane) & 1 ? from[j] : 0.0f;
    }
}

// round(x / scale) + shift as int8. With `checks`, returns whether (code - shift) scale is x everywhere.
int codes_of_values(const float* x, int64_t count, float inverse, float scale, float shift, int checks, int8_t* codes) {
    int wrong = 0;
    if (checks) {
#pragma omp parallel for simd schedule(static) reduction(| : wrong) if (count > kParallelFrom)
        for (int64_t i = 0; i < count; i++) {
            const float step = __builtin_rintf(x[i] * inverse), code = step + shift;
            wrong |= !((code - shift) * scale == x[i] && code >= -128.0f && code <= 127.0f);
            codes[i] = static_cast<int8_t>(static_cast<int32_t>(code));
        }
        return !wrong;
    }
#pragma omp parallel for simd schedule(static) if (count > kParallelFrom)
    for (int64_t i = 0; i < count; i++)
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(x[i] * inverse) + shift));
    return 1;
}

// (code - shift) scale.
void values_of_codes(const int8_t* codes, int64_t count, float scale, float shift, float* x) {
#pragma omp parallel for simd schedule(static) if (count > kParallelFrom)
    for (int64_t i = 0; i < count; i++) x[i] = (static_cast<float>(codes[i]) - shift) * scale;
}

}  // extern "C"

// What the compiled operators share. Arithmetic is that of tritonq.reference, which is the specification.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Work below this many elements is done by one thread: waking others takes longer.
constexpr int64_t kParallelFrom = 1 << 15;
// Elements that are summed in float32 before sums go on in float64; they fit the first cache.
constexpr int64_t kChunk = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One rounding where PyTorch's own vector code has one: TRITONQ_FMA says so.
static inline float multiply_add(float a, float b, float c) {
#if TRITONQ_FMA
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// What follows an operation: a ReLU up to `ceiling` (`floor` is 0; without a ReLU both are infinite), and where `rounds`
// a grid, whose steps from zero are lowest..highest. The bounds allow for the ReLU.
struct Tail {
    int32_t rounds;
    float inverse, scale, lowest, highest, floor, ceiling;
};

// How a batch changes a running range, and how scale and zero point follow from it; see update_range and
// range_to_qparams. `constant` is negative for running extremes, `copy_above` is negative where none is given.
// `fixed` says that every zero point is `zero_point`; else `megengine` chooses between the two rules for it.
struct Rule {
    double constant, copy_above, fall;
    float reach, eps;
    int32_t fixed, zero_point, megengine, quant_min, quant_max;
};

static inline void merge_range(float low, float high, float& min_val, float& max_val, const Rule& rule) {
    if (rule.constant < 0) {
        min_val = low < min_val ? low : min_val;
        max_val = high > max_val ? high : max_val;
        return;
    }
    const double running = max_val > -min_val ? max_val : -min_val, batch = high > -low ? high : -low;
    const bool grows = batch > rule.copy_above * running, falls = running > rule.fall * batch && batch != 0;
    if (!(min_val <= max_val) || (rule.copy_above >= 0 && (grows || falls))) {
        min_val = low, max_val = high;
        return;
    }
    const float share = static_cast<float>(rule.constant);
    min_val += share * (low - min_val);
    max_val += share * (high - max_val);
}

// `zero_point` may be null.
static inline void follow_range(float low, float high, float* scale, int32_t* zero_point, const Rule& rule) {
    float found, zero = static_cast<float>(rule.zero_point);
    if (rule.fixed) {
        found = (-low >= high ? -low : high) / rule.reach;
        found = found >= rule.eps ? found : rule.eps;
    } else {
        low = low <= 0 ? low : 0, high = high >= 0 ? high : 0;
        const float lowest = static_cast<float>(rule.quant_min), highest = static_cast<float>(rule.quant_max);
        found = (high - low) / static_cast<float>(rule.quant_max - rule.quant_min);
        found = found >= rule.eps ? found : rule.eps;
        const float ratio = low / found;
        zero = lowest - (rule.megengine ? std::round(ratio) : __builtin_rintf(ratio));
        if (!rule.megengine) zero = zero >= lowest ? (zero <= highest ? zero : highest) : lowest;
    }
    *scale = found;
    if (zero_point) *zero_point = static_cast<int32_t>(zero);
}

static inline float clip(float x, float lowest, float highest) {
    x = x < lowest ? lowest : x;
    return x > highest ? highest : x;
}

// Running range and grid of one tensor, from the ends of a batch before a ReLU up to `ceiling` (NaN: none).
static inline void observe_range(
    float low, float high, float ceiling, float* min_val, float* max_val, float* scale, int32_t* zero_point,
    const Rule& rule) {
    if (ceiling == ceiling) low = clip(low, 0, ceiling), high = clip(high, 0, ceiling);
    merge_range(low, high, *min_val, *max_val, rule);
    follow_range(*min_val, *max_val, scale, zero_point, rule);
}

// What follows an operation with a ReLU up to `ceiling` (NaN: none) and, where `rounds`, a grid; see tail_of.
static inline Tail make_tail(
    int rounds, const float* scale, const int32_t* zero_point, int quant_min, int quant_max, float ceiling) {
    const bool rectifies = ceiling == ceiling;
    Tail tail{rounds, 0, 0, -kInfinity, kInfinity, rectifies ? 0 : -kInfinity, rectifies ? ceiling : kInfinity};
    if (!rounds) return tail;
    const float zero = zero_point ? static_cast<float>(*zero_point) : 0;
    tail.scale = *scale;
    tail.inverse = 1.0f / tail.scale;
    tail.lowest = static_cast<float>(quant_min) - zero;
    tail.highest = static_cast<float>(quant_max) - zero;
    if (!rectifies) return tail;
    tail.lowest = tail.lowest > 0 ? tail.lowest : 0;
    const float top = tail.ceiling * tail.inverse, step = std::isfinite(top) ? __builtin_rintf(top) : top;
    tail.highest = step < tail.highest ? step : tail.highest;
    return tail;
}

// The nearest step, ties to even; NaN stays NaN.
static inline float rounded(float y, const Tail& tail) {
    return clip(__builtin_rintf(y * tail.inverse), tail.lowest, tail.highest) * tail.scale;
}

// Whether a gradient passes; without a grid the inverse is 0 and the bounds are infinite.
static inline bool passes(float y, const Tail& tail) {
    const float step = __builtin_rintf(y * tail.inverse);
    return (y > tail.floor) & (y < tail.ceiling) & (step >= tail.lowest) & (step <= tail.highest);
}

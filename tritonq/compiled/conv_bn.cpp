// The tail of a convolution with BatchNorm; see tritonq/reference/conv_bn.py.
//
// A tensor is seen in one of two ways: `outer`, (batch, channels, inner), where the elements of a channel lie together;
// else (rows, channels), where channels lie innermost. There batch is the number of rows, and inner is 1.
#include "common.h"

namespace {

// Rows are cut into this many ranges, which are summed in order: results do not depend on the number of threads.
constexpr int64_t kRanges = 16;

// Count, mean and sum of squared deviations, merged by the formula of Chan, Golub and LeVeque (1983).
struct Moments {
    double count = 0, mean = 0, squares = 0;

    void merge(double other_count, double other_mean, double other_squares) {
        if (other_count == 0) return;
        const double total = count + other_count, delta = other_mean - mean;
        squares += other_squares + delta * delta * (count * other_count / total);
        mean += delta * (other_count / total);
        count = total;
    }
};

void add_chunk(Moments& moments, float& low, float& high, const float* x, int64_t length) {
    float sum = 0, smallest = low, largest = high;
#pragma omp simd reduction(+ : sum) reduction(min : smallest) reduction(max : largest)
    for (int64_t i = 0; i < length; i++) {
        sum += x[i];
        smallest = x[i] < smallest ? x[i] : smallest;
        largest = x[i] > largest ? x[i] : largest;
    }
    low = smallest, high = largest;
    const float about = sum / static_cast<float>(length);
    float rest = 0, squares = 0;
#pragma omp simd reduction(+ : rest, squares)
    for (int64_t i = 0; i < length; i++) {
        const float deviation = x[i] - about;
        rest += deviation;
        squares += deviation * deviation;
    }
    const double correction = static_cast<double>(rest) / static_cast<double>(length);
    moments.merge(static_cast<double>(length), about + correction, squares - rest * correction);
}

// Moments of each channel over a range of rows.
struct RangeOfRows {
    std::vector<double> mean, squares;
    std::vector<float> low, high, about, rest, part;
    double count = 0;

    explicit RangeOfRows(int64_t channels)
        : mean(channels), squares(channels), low(channels, kInfinity), high(channels, -kInfinity), about(channels),
          rest(channels), part(channels) {}

    void add(const float* x, int64_t rows, int64_t channels) {
        float *low_ = low.data(), *high_ = high.data(), *about_ = about.data(), *rest_ = rest.data(), *part_ = part.data();
        for (int64_t j = 0; j < channels; j++) about_[j] = rest_[j] = part_[j] = 0;
        for (int64_t i = 0; i < rows; i++) {
            const float* row = x + i * channels;
#pragma omp simd
            for (int64_t j = 0; j < channels; j++) {
                about_[j] += row[j];
                low_[j] = row[j] < low_[j] ? row[j] : low_[j];
                high_[j] = row[j] > high_[j] ? row[j] : high_[j];
            }
        }
        const float length = static_cast<float>(rows);
        for (int64_t j = 0; j < channels; j++) about_[j] /= length;
        for (int64_t i = 0; i < rows; i++) {
            const float* row = x + i * channels;
#pragma omp simd
            for (int64_t j = 0; j < channels; j++) {
                const float deviation = row[j] - about_[j];
                rest_[j] += deviation;
                part_[j] += deviation * deviation;
            }
        }
        const double total = count + static_cast<double>(rows), weight = static_cast<double>(rows) / total;
        for (int64_t j = 0; j < channels; j++) {
            const double correction = static_cast<double>(rest_[j]) / static_cast<double>(rows);
            const double delta = about_[j] + correction - mean[j];
            squares[j] += part_[j] - rest_[j] * correction + delta * delta * (count * weight);
            mean[j] += delta * weight;
        }
        count = total;
    }
};

int64_t rows_at_a_time(int64_t channels) { return channels < 2 * kChunk ? 2 * kChunk / channels : 1; }

}  // namespace

extern "C" {

// Mean, biased variance, smallest and largest value of each channel.
static void tail_statistics(
    const float* c, int64_t batch, int64_t channels, int64_t inner, int outer, float* mean, float* var, float* low,
    float* high) {
    const int64_t elements = batch * channels * inner;
    if (outer) {
#pragma omp parallel for schedule(static) if (elements > kParallelFrom)
        for (int64_t j = 0; j < channels; j++) {
            Moments moments;
            float smallest = kInfinity, largest = -kInfinity;
            for (int64_t i = 0; i < batch; i++) {
                const float* plane = c + (i * channels + j) * inner;
                for (int64_t k = 0; k < inner; k += kChunk)
                    add_chunk(moments, smallest, largest, plane + k, inner - k < kChunk ? inner - k : kChunk);
            }
            mean[j] = static_cast<float>(moments.mean);
            var[j] = static_cast<float>(moments.squares / moments.count);
            low[j] = smallest, high[j] = largest;
        }
        return;
    }
    const int64_t step = rows_at_a_time(channels);
    std::vector<RangeOfRows> ranges(kRanges, RangeOfRows(channels));
#pragma omp parallel for schedule(static) if (elements > kParallelFrom)
    for (int64_t r = 0; r < kRanges; r++) {
        const int64_t end = batch * (r + 1) / kRanges;
        for (int64_t i = batch * r / kRanges; i < end; i += step)
            ranges[r].add(c + i * channels, end - i < step ? end - i : step, channels);
    }
    for (int64_t j = 0; j < channels; j++) {
        Moments moments;
        float smallest = kInfinity, largest = -kInfinity;
        for (const RangeOfRows& range : ranges) {
            moments.merge(range.count, range.mean[j], range.squares[j]);
            smallest = range.low[j] < smallest ? range.low[j] : smallest;
            largest = range.high[j] > largest ? range.high[j] : largest;
        }
        mean[j] = static_cast<float>(moments.mean);
        var[j] = static_cast<float>(moments.squares / moments.count);
        low[j] = smallest, high[j] = largest;
    }
}

// Statistics to slope and shift, the update of the running statistics, and the range of the result before the ReLU.
// `results` holds mean, var, low and high of the channels, then room for inverse_std, gain, slope, shift, eps_share.
// `gamma`, `beta` and `bias` may be null. Returns whether every value
// of the convolution's output and of the result is finite; if not, nothing is updated.
static int tail_finish(
    float* results, int64_t channels, float unbiased, const float* ratio, const float* gamma, const float* beta,
    const float* bias, float* running_mean, float* running_var, float momentum, float eps, float* range) {
    const float *mean = results, *var = mean + channels, *low = var + channels, *high = low + channels;
    float* inverse_std = results + 4 * channels;
    float *gain = inverse_std + channels, *slope = gain + channels, *shift = slope + channels, *share = shift + channels;
    for (int64_t j = 0; j < channels; j++)
        if (!std::isfinite(var[j]) || !std::isfinite(low[j]) || !std::isfinite(high[j])) return 0;
    float smallest = kInfinity, largest = -kInfinity;
    for (int64_t j = 0; j < channels; j++) {
        const float eps_part = ratio[j] * ratio[j] * eps, total = var[j] + eps_part;
        inverse_std[j] = 1.0f / std::sqrt(total);
        gain[j] = gamma ? std::fabs(gamma[j]) : 1.0f;
        slope[j] = gain[j] * inverse_std[j];
        shift[j] = beta ? multiply_add(-slope[j], mean[j], beta[j]) : -slope[j] * mean[j];
        share[j] = eps_part / total;
        // Slopes are not negative and rounding keeps order: these are the smallest and the largest result.
        const float one = multiply_add(low[j], slope[j], shift[j]), other = multiply_add(high[j], slope[j], shift[j]);
        smallest = one < smallest ? one : smallest;
        largest = other > largest ? other : largest;
        if (!std::isfinite(one) || !std::isfinite(other)) return 0;
    }
    range[0] = smallest, range[1] = largest;
    for (int64_t j = 0; j < channels; j++) {
        float batch_mean = mean[j] / ratio[j];
        if (bias) batch_mean += bias[j];
        const float batch_var = var[j] / (ratio[j] * ratio[j]) * unbiased;
        running_mean[j] += (batch_mean - running_mean[j]) * momentum;
        running_var[j] += (batch_var - running_var[j]) * momentum;
    }
    return 1;
}

// FQ(relu?(slope c + shift)).
void tail_apply(
    const float* c, int64_t batch, int64_t channels, int64_t inner, int outer, const float* slope, const float* shift,
    const Tail* tail, float* y) {
    const int64_t rows = outer ? batch * channels : batch, length = outer ? inner : channels;
    const Tail t = *tail;
#pragma omp parallel for schedule(static) if (rows * length > kParallelFrom)
    for (int64_t i = 0; i < rows; i++) {
        const float* from = c + i * length;
        float* to = y + i * length;
        if (outer) {
            const float a = slope[i % channels], b = shift[i % channels];
            if (t.rounds) {
#pragma omp simd
                for (int64_t k = 0; k < length; k++) to[k] = rounded(multiply_add(from[k], a, b), t);
            } else {
#pragma omp simd
                for (int64_t k = 0; k < length; k++) to[k] = clip(multiply_add(from[k], a, b), t.floor, t.ceiling);
            }
        } else if (t.rounds) {
#pragma omp simd
            for (int64_t k = 0; k < length; k++) to[k] = rounded(multiply_add(from[k], slope[k], shift[k]), t);
        } else {
#pragma omp simd
            for (int64_t k = 0; k < length; k++)
                to[k] = clip(multiply_add(from[k], slope[k], shift[k]), t.floor, t.ceiling);
        }
    }
}

// The gradient of c, sum g and sum g (c - mean) inverse_std, with g = dy where it passes slope c + shift, else 0.
void tail_backward(
    const float* dy, const float* c, int64_t batch, int64_t channels, int64_t inner, int outer, const float* mean,
    const float* inverse_std, const float* slope, const float* shift, const Tail* tail, float* sums, float* dc) {
    const Tail t = *tail;
    const int64_t elements = batch * channels * inner;
    const float count = static_cast<float>(batch * inner);
    float *sum_g = sums, *sum_gn = sums + channels;
    if (outer) {
#pragma omp parallel for schedule(static) if (elements > kParallelFrom)
        for (int64_t j = 0; j < channels; j++) {
            const float a = slope[j], b = shift[j], centre = mean[j];
            double all = 0, products = 0;
            for (int64_t i = 0; i < batch; i++) {
                const float *dy_ = dy + (i * channels + j) * inner, *c_ = c + (i * channels + j) * inner;
                for (int64_t start = 0; start < inner; start += kChunk) {
                    const int64_t end = inner - start < kChunk ? inner : start + kChunk;
                    float some = 0, some_products = 0;
#pragma omp simd reduction(+ : some, some_products)
                    for (int64_t k = start; k < end; k++) {
                        const float y = multiply_add(c_[k], a, b), g = passes(y, t) ? dy_[k] : 0.0f;
                        some += g;
                        some_products += g * (c_[k] - centre);
                    }
                    all += some, products += some_products;
                }
            }
            sum_g[j] = static_cast<float>(all);
            sum_gn[j] = static_cast<float>(products) * inverse_std[j];
            const float share = a / -count, pull = share * inverse_std[j] * sum_gn[j], offset = share * sum_g[j];
            for (int64_t i = 0; i < batch; i++) {
                const int64_t at = (i * channels + j) * inner;
                const float *dy_ = dy + at, *c_ = c + at;
                float* dc_ = dc + at;
#pragma omp simd
                for (int64_t k = 0; k < inner; k++) {
                    const float y = multiply_add(c_[k], a, b), g = passes(y, t) ? dy_[k] : 0.0f;
                    dc_[k] = multiply_add(g, a, multiply_add(c_[k] - centre, pull, offset));
                }
            }
        }
        return;
    }
    const int64_t step = rows_at_a_time(channels);
    std::vector<double> totals(kRanges * 2 * channels, 0.0);
#pragma omp parallel for schedule(static) if (elements > kParallelFrom)
    for (int64_t r = 0; r < kRanges; r++) {
        std::vector<float> some(2 * channels);
        double* total = totals.data() + r * 2 * channels;
        float *some_g = some.data(), *some_gc = some.data() + channels;
        const int64_t end = batch * (r + 1) / kRanges;
        for (int64_t start = batch * r / kRanges; start < end; start += step) {
            for (int64_t j = 0; j < 2 * channels; j++) some[j] = 0;
            for (int64_t i = start; i < (end - start < step ? end : start + step); i++) {
                const float *dy_ = dy + i * channels, *c_ = c + i * channels;
#pragma omp simd
                for (int64_t j = 0; j < channels; j++) {
                    const float y = multiply_add(c_[j], slope[j], shift[j]), g = passes(y, t) ? dy_[j] : 0.0f;
                    some_g[j] += g;
                    some_gc[j] += g * (c_[j] - mean[j]);
                }
            }
            for (int64_t j = 0; j < 2 * channels; j++) total[j] += some[j];
        }
    }
    std::vector<float> affine(2 * channels);
    float *pull = affine.data(), *offset = affine.data() + channels;
    for (int64_t j = 0; j < channels; j++) {
        double all = 0, products = 0;
        for (int64_t r = 0; r < kRanges; r++) {
            all += totals[r * 2 * channels + j];
            products += totals[(r * 2 + 1) * channels + j];
        }
        sum_g[j] = static_cast<float>(all);
        sum_gn[j] = static_cast<float>(products) * inverse_std[j];
        const float share = slope[j] / -count;
        pull[j] = share * inverse_std[j] * sum_gn[j], offset[j] = share * sum_g[j];
    }
#pragma omp parallel for schedule(static) if (elements > kParallelFrom)
    for (int64_t i = 0; i < batch; i++) {
        const float *dy_ = dy + i * channels, *c_ = c + i * channels;
        float* dc_ = dc + i * channels;
#pragma omp simd
        for (int64_t j = 0; j < channels; j++) {
            const float y = multiply_add(c_[j], slope[j], shift[j]), g = passes(y, t) ? dy_[j] : 0.0f;
            dc_[j] = multiply_add(g, slope[j], multiply_add(c_[j] - mean[j], pull[j], offset[j]));
        }
    }
}

// What a step computes from the convolution's output: statistics, then the range of the result and its grid (`rule` is
// null without one), then the result. `results` is as in tail_finish. Returns whether every value is finite; if not,
// nothing but memory of this call was written.
int tail_forward(
    const float* c, int64_t batch, int64_t channels, int64_t inner, int outer, float* results, const float* ratio,
    const float* gamma, const float* beta, const float* bias, float* running_mean, float* running_var, float momentum,
    float eps, const Rule* rule, int observes, int rounds, float ceiling, float* min_val, float* max_val, float* scale,
    int32_t* zero_point, float* y) {
    tail_statistics(
        c, batch, channels, inner, outer, results, results + channels, results + 2 * channels, results + 3 * channels);
    const double count = static_cast<double>(batch * inner);
    const float unbiased = static_cast<float>(count / (count - 1));
    float range[2];
    if (!tail_finish(
            results, channels, unbiased, ratio, gamma, beta, bias, running_mean, running_var, momentum, eps, range))
        return 0;
    if (observes) observe_range(range[0], range[1], ceiling, min_val, max_val, scale, zero_point, *rule);
    const Tail tail = make_tail(
        rounds, scale, zero_point, rule ? rule->quant_min : 0, rule ? rule->quant_max : 0, ceiling);
    tail_apply(c, batch, channels, inner, outer, results + 6 * channels, results + 7 * channels, &tail, y);
    return 1;
}

}  // extern "C"

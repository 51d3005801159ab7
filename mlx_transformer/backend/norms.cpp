// LayerNorm (centered) and RMSNorm over the last axis, and their gradients, float32; included by primitives.cpp.

struct Rows {
    Place x;
    int d;
    long count;

    explicit Rows(const Place& x) : x(x), d(x.shape[3]), count(long(x.shape[0]) * x.shape[1] * x.shape[2]) {}

    // Call f with each row of x, in row-major order.
    template <class F>
    void each(F f) const {
        for (int row = 0; row < x.shape[0]; row++)
            for (int head = 0; head < x.shape[1]; head++)
                for (int i = 0; i < x.shape[2]; i++) f(x.at(row, head) + i * x.step[2]);
    }
};

// Mean (0 unless centered) and 1 / sqrt(variance + eps) of a row.
template <bool centered>
std::pair<float, float> statistics(const float* x, int d, float eps) {
    float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int i = 0; i < d; i++) mean += centered ? x[i] : 0;
    mean /= d;
#pragma omp simd reduction(+ : square)
    for (int i = 0; i < d; i++) square += (x[i] - mean) * (x[i] - mean);
    return {mean, 1 / std::sqrt(square / d + eps)};
}

template <bool centered>
Task begin_norm(const Arrays& in, Arrays& out, const Numbers& values) {
    return [x = Place(in[0]), weight = Place(in[1]), bias = Place(in.back()), biased = in.size() > 2,
            y = out[0].data<float>(), eps = values[0]] {
        std::vector<float> room[3];
        const float *w = weight.flat(room[1]), *b = biased ? bias.flat(room[2]) : nullptr;
        Rows rows(x.with_rows(room[0]));
        float* to = y;
        rows.each([&](const float* from) {
            auto [mean, scale] = statistics<centered>(from, rows.d, eps);
            if (b)
                for (int i = 0; i < rows.d; i++) to[i] = (from[i] - mean) * scale * w[i] + b[i];
            else
                for (int i = 0; i < rows.d; i++) to[i] = (from[i] - mean) * scale * w[i];
            to += rows.d;
        });
    };
}

// With n the normalized row and g the gradient of w n + b: that of x is scale (g w - mean(g w) - n mean(g w n)), without
// mean(g w) unless centered.
template <bool centered>
Task begin_norm_gradient(const Arrays& in, Arrays& out, const Numbers& values) {
    return [x = Place(in[0]), weight = Place(in[1]), g = Place(in[2]), gx = out[0].data<float>(),
            gw = out[1].data<float>(), gb = out[2].data<float>(), eps = values[0]] {
        std::vector<float> room[3];
        const float *w = weight.flat(room[1]), *by = g.flat(room[2]);
        Rows rows(x.with_rows(room[0]));
        float* to = gx;
        int d = rows.d;
        std::fill_n(gw, d, 0.0f), std::fill_n(gb, d, 0.0f);
        rows.each([&](const float* from) {
            auto [mean, scale] = statistics<centered>(from, d, eps);
            float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
            for (int i = 0; i < d; i++) sum += by[i] * w[i], along += by[i] * w[i] * (from[i] - mean);
            sum = centered ? sum / d : 0, along *= scale / d;
#pragma omp simd
            for (int i = 0; i < d; i++) {
                float normed = (from[i] - mean) * scale;
                to[i] = scale * (by[i] * w[i] - sum - normed * along);
                gw[i] += by[i] * normed;
                gb[i] += by[i];
            }
            to += d, by += d;
        });
    };
}

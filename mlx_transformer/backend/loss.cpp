// Cross-entropy of a linear head with its gradients, float32; included by primitives.cpp. ops/loss.py has the equations.
//
// A chunk of tokens at a time: the product with the weights, then each token's logits become their gradient in the first
// cache, then the products with it. One chunk's logits are in memory, and none is written twice.

// tanh of u; nan for nan.
Lanes tanh_of(Lanes u) {
    Lanes e = exp_nonpositive(u < 0 ? 2 * u : -2 * u), t = (1 - e) / (1 + e);
    return u < 0 ? -t : t;
}

struct Loss {
    Place h, weight, targets, weights;  // weights: of the tokens; those of h if no gradient is wanted
    int tokens, d, vocab, chunk;
    float smoothing, cap;  // cap: 0 for none
    float *losses, *gh, *gw;

    static Task begin(const Arrays& in, Arrays& out, const Numbers& values) {
        bool gradients = out.size() > 1;
        int tokens = in[0].shape(0), d = in[0].shape(1), vocab = in[1].shape(0);
        Loss work{Place(in[0]), Place(in[1]), Place(in[2]), Place(in[gradients ? 3 : 0]), tokens, d, vocab, int(values[2]),
                  values[0], values[1], out[0].data<float>(), gradients ? out[1].data<float>() : nullptr,
                  gradients ? out[2].data<float>() : nullptr};
        return [work] { work.all(); };
    }

    void all() const {
        std::vector<float> room[2];
        const float *h = this->h.flat(room[0]), *w = weight.flat(room[1]);
        int ld = padded(vocab, kLanes), most = std::min(chunk, tokens);
        std::unique_ptr<float[]> own(new float[long(most) * ld + 16]);
        float* logits = (float*)(((uintptr_t)own.get() + 63) / 64 * 64);
        for (int first = 0; first < tokens; first += chunk, h += long(chunk) * d) {
            int count = std::min(chunk, tokens - first);
            cblas_sgemm(kRowMajor, kPlain, kTransposed, count, vocab, d, 1, h, d, w, d, 0, logits, ld);
            for (int r = 0; r < count; r++) token(first + r, logits + long(r) * ld, ld);
            if (!gh) continue;
            float* to = gh + long(first) * d;
            cblas_sgemm(kRowMajor, kPlain, kPlain, count, d, vocab, 1, logits, ld, w, d, 0, to, d);
            cblas_sgemm(kRowMajor, kTransposed, kPlain, vocab, d, count, 1, logits, ld, h, d, first ? 1 : 0, gw, d);
        }
        if (!tokens && gh) std::fill_n(gw, long(vocab) * d, 0.0f);
    }

    // Compute one token's loss, and from its logits (ld) their gradient.
    void token(int i, float* l, int ld) const {
        for (int j = 0; cap && j < ld; j += kLanes) lanes(l + j) = cap * tanh_of(lanes(l + j) / cap);
        for (int j = vocab; j < ld; j++) l[j] = -INFINITY;
        int target = targets.at<int>(0, 0)[i * targets.step[3]];
        float at_target = l[target], sum = 0, share = smoothing / vocab;
        if (smoothing)
#pragma omp simd reduction(+ : sum)
            for (int j = 0; j < vocab; j++) sum += l[j];
        std::unique_ptr<float[]> slopes(cap && gh ? new float[ld] : nullptr);
        for (int j = 0; slopes && j < ld; j += kLanes) {
            Lanes u = lanes(l + j) / cap;
            lanes(&slopes[j]) = 1 - u * u;
        }
        auto [inverse, log_sum] = exponentials(l, ld);
        losses[i] = log_sum - (1 - smoothing) * at_target - share * sum;
        if (!gh) return;
        float w = weights.at(0, 0)[i * weights.step[3]];
        for (int j = 0; j < ld; j += kLanes) lanes(l + j) = lanes(l + j) * (inverse * w) - share * w;
        l[target] -= (1 - smoothing) * w;
        for (int j = 0; slopes && j < ld; j += kLanes) lanes(l + j) *= lanes(&slopes[j]);
    }
};

// Selective scan (Gu & Dao 2023, arXiv 2312.00752, alg. 2) and its gradient, float32; included by primitives.cpp.
//
// With MLX's operations each token's state, N numbers per channel, goes to memory several times, and forward and backward
// pass keep it for all tokens. Here it stays in registers and the first-level cache: one channel per lane of a vector at a
// time. The gradient starts at the states between chunks and computes those within a chunk again.

// Reads and writes of up to kLanes channels, `step` numbers apart; the other lanes are 0.
inline Lanes read(const float* from, int lanes, long step = 1) {
    Lanes to = {};
    if (lanes == kLanes && step == 1) std::memcpy(&to, from, sizeof to);
    else for (int i = 0; i < lanes; i++) to[i] = from[i * step];
    return to;
}
inline void write(float* to, Lanes from, int lanes, long step = 1) {
    if (lanes == kLanes && step == 1) std::memcpy(to, &from, sizeof from);
    else for (int i = 0; i < lanes; i++) to[i * step] = from[i];
}

// Addresses of row-contiguous arrays: x, dt (B, L, E), a (E, N), b, c (B, L, N), states (K + 1, B, E, N).
struct Scan {
    int batch, length, width, size, chunk;  // B, L, E, N and the tokens of a chunk
    const float *x, *dt, *a, *b, *c;

    static Scan of(const Arrays& in, int chunk) {
        auto data = [&](int i) { return in[i].data<float>(); };
        return {in[0].shape(0), in[0].shape(1), in[0].shape(2), in[2].shape(1), chunk,
                data(0), data(1), data(2), data(3), data(4)};
    }
    long token(int row, int t) const { return long(row) * length + t; }
    long channel(int row, int e) const { return (long(row) * width + e) * size; }

    // One token of the channels from e on: h (N lanes) becomes the next state; the decays are kept if `decays` is given.
    void advance(long token, int e, int lanes, const Lanes* rates, Lanes* h, Lanes* decays, float* y) const {
        Lanes step = read(dt + token * width + e, lanes), input = step * read(x + token * width + e, lanes), sum = {};
        const float *to_state = b + token * size, *to_output = c + token * size;
        for (int n = 0; n < size; n++) {
            Lanes decay = exp_nonpositive(step * rates[n]);
            h[n] = decay * h[n] + input * to_state[n];
            sum += h[n] * to_output[n];
            if (decays) decays[n] = decay;
        }
        if (y) write(y + token * width + e, sum, lanes);
    }

    void forward(const float* state, float* y, float* states) const {
        std::vector<Lanes> rates(size), h(size);
        long stride = long(batch) * width * size;
        std::copy(state, state + stride, states);
        for (int row = 0; row < batch; row++)
            for (int e = 0; e < width; e += kLanes) {
                int lanes = std::min(kLanes, width - e);
                for (int n = 0; n < size; n++) {
                    rates[n] = read(a + long(e) * size + n, lanes, size);
                    h[n] = read(state + channel(row, e) + n, lanes, size);
                }
                float* kept = states + channel(row, e);
                for (int t = 0; t < length; t++) {
                    advance(token(row, t), e, lanes, rates.data(), h.data(), nullptr, y);
                    if ((t + 1) % chunk && t + 1 < length) continue;
                    kept += stride;
                    for (int n = 0; n < size; n++) write(kept + n, h[n], lanes, size);
                }
            }
    }
};

struct ScanGradient : Scan {
    const float *states, *dy, *dstates;
    float *dx, *ddt, *da, *db, *dc, *dstate;

    // The gradients of one token, given that of its state, which becomes that of the state before.
    void one(long token, int e, int lanes, const Lanes* rates, const Lanes* before, const Lanes* h, const Lanes* decays,
             Lanes* dh, Lanes* drates) const {
        long at = token * width + e;
        Lanes step = read(dt + at, lanes), input = read(x + at, lanes), output = read(dy + at, lanes);
        Lanes dinput = {}, dstep = {}, stepped = step * input;
        for (int n = 0; n < size; n++) {
            Lanes g = dh[n] + output * c[token * size + n];
            dc[token * size + n] += sum_of(output * h[n]);
            db[token * size + n] += sum_of(g * stepped);
            dinput += g * b[token * size + n];
            dh[n] = g * decays[n];
            Lanes dexponent = dh[n] * before[n];
            dstep += dexponent * rates[n];
            drates[n] += dexponent * step;
        }
        write(dx + at, dinput * step, lanes);
        write(ddt + at, dstep + dinput * input, lanes);
    }

    void backward() const {
        long stride = long(batch) * width * size;
        std::vector<Lanes> rates(size), dh(size), drates(size), decays(size * chunk), h(size * (chunk + 1));
        std::fill(da, da + long(width) * size, 0.0f);
        std::fill(db, db + token(batch, 0) * size, 0.0f);
        std::fill(dc, dc + token(batch, 0) * size, 0.0f);
        for (int e = 0; e < width; e += kLanes) {
            int lanes = std::min(kLanes, width - e);
            std::fill(drates.begin(), drates.end(), Lanes{});
            for (int n = 0; n < size; n++) rates[n] = read(a + long(e) * size + n, lanes, size);
            for (int row = 0; row < batch; row++) {
                int last = (length + chunk - 1) / chunk;
                const float* given = dstates + last * stride + channel(row, e);
                for (int n = 0; n < size; n++) dh[n] = read(given + n, lanes, size);
                for (int k = last - 1; k >= 0; k--) {
                    int start = k * chunk, count = std::min(chunk, length - start);
                    for (int n = 0; n < size; n++) h[n] = read(states + k * stride + channel(row, e) + n, lanes, size);
                    for (int t = 0; t < count; t++) {
                        Lanes *before = &h[t * size], *own = before + size;
                        std::copy(before, own, own);
                        advance(token(row, start + t), e, lanes, rates.data(), own, &decays[t * size], nullptr);
                    }
                    for (int t = count - 1; t >= 0; t--)
                        one(token(row, start + t), e, lanes, rates.data(), &h[t * size], &h[(t + 1) * size],
                            &decays[t * size], dh.data(), drates.data());
                    given -= stride;
                    for (int n = 0; n < size; n++) dh[n] += read(given + n, lanes, size);
                }
                for (int n = 0; n < size; n++) write(dstate + channel(row, e) + n, dh[n], lanes, size);
            }
            for (int n = 0; n < size; n++) write(da + long(e) * size + n, drates[n], lanes, size);
        }
    }
};

Task begin_scan(const Arrays& in, Arrays& out, const Numbers& values) {
    int chunk = int(values[0]);
    return [scan = Scan::of(in, chunk), state = in[5].data<float>(), y = out[0].data<float>(),
            states = out[1].data<float>()] { scan.forward(state, y, states); };
}

Task begin_scan_gradient(const Arrays& in, Arrays& out, const Numbers& values) {
    auto data = [&](int i) { return in[i].data<float>(); };
    auto to = [&](int i) { return out[i].data<float>(); };
    ScanGradient scan{Scan::of(in, int(values[0])), data(5), data(6), data(7), to(0), to(1), to(2), to(3), to(4), to(5)};
    return [scan] { scan.backward(); };
}

// The functions that Python calls, with float32 arrays; ops/scan.py documents them.

void check_scan(const mx::array& x, const mx::array& dt, const mx::array& a, const mx::array& b, const mx::array& c,
                int chunk) {
    bool axes = x.ndim() == 3 && a.ndim() == 2 && b.ndim() == 3 && chunk > 0 && x.shape(1) > 0;
    expect(axes && x.shape() == dt.shape() && b.shape() == c.shape() && a.shape(0) == x.shape(2) &&
               b.shape() == mx::Shape{x.shape(0), x.shape(1), a.shape(1)},
           "selective_scan: expected x, dt (B, L, E), a (E, N), b, c (B, L, N), chunk above 0");
}

Arrays contiguous(Arrays all) {
    for (auto& one : all) one = mx::contiguous(one);
    return all;
}

mx::Shape states_of(const mx::array& x, const mx::array& a, int chunk) {
    return {(x.shape(1) + chunk - 1) / chunk + 1, x.shape(0), x.shape(2), a.shape(1)};
}

Arrays selective_scan(const mx::array& x, const mx::array& dt, const mx::array& a, const mx::array& b, const mx::array& c,
                      const mx::array& state, int chunk) {
    check_scan(x, dt, a, b, c, chunk);
    expect(state.shape() == mx::Shape{x.shape(0), x.shape(2), a.shape(1)}, "selective_scan: the state is not (B, E, N)");
    return made("CpuSelectiveScan", begin_scan, {float(chunk)}, {x.shape(), states_of(x, a, chunk)},
                         contiguous({x, dt, a, b, c, state}));
}

Arrays selective_scan_gradient(const mx::array& x, const mx::array& dt, const mx::array& a, const mx::array& b,
                               const mx::array& c, const mx::array& states, const mx::array& dy,
                               const mx::array& dstates, int chunk) {
    check_scan(x, dt, a, b, c, chunk);
    auto shape = states_of(x, a, chunk);
    expect(dy.shape() == x.shape() && states.shape() == shape && dstates.shape() == shape,
           "selective_scan_gradient: expected states (K + 1, B, E, N), and gradients of the shape of the values");
    mx::Shape state(shape.begin() + 1, shape.end());
    return made("CpuSelectiveScanGradient", begin_scan_gradient, {float(chunk)},
                         {x.shape(), x.shape(), a.shape(), b.shape(), b.shape(), state},
                         contiguous({x, dt, a, b, c, states, dy, dstates}));
}

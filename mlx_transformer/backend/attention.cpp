// Attention of many queries and its gradient, float32; included by primitives.cpp.
//
// One head of keys and values at a time is packed, padded to whole vectors; then `kRows` queries at a time meet the keys
// that any of them sees. Their scores stay in the first cache, and are computed again for the gradient: of the softmax
// only the logarithm of the sum is kept. Nothing is copied between the layouts of heads and tokens: inputs are read
// through their strides, results lie in memory as (B, L, heads, width).

constexpr int kTall = kLanes == 16 ? 8 : 4;  // rows of a tile of sums, which fill the registers
constexpr int kRows = 16;
typedef int Order __attribute__((vector_size(16)));

// Zeros for several matrices, aligned to cache lines.
struct Room {
    std::vector<float> all;
    float* next;

    explicit Room(long floats) : all(floats + 16 * 16) { next = all.data(); }
    float* take(long floats) {
        float* own = (float*)(((uintptr_t)next + 63) / 64 * 64);
        next = own + floats;
        return own;
    }
};

// `kTall` rows and `width` vectors of c (+)= a b; a's elements lie `down` and `along` apart.
template <int width>
void tile(int k, const float* a, long down, long along, const float* b, long ldb, float* c, long ldc, bool add) {
    Lanes sums[kTall][width];
    for (int r = 0; r < kTall; r++)
        for (int w = 0; w < width; w++) sums[r][w] = add ? Lanes(lanes(c + r * ldc + w * kLanes)) : Lanes{};
    for (int p = 0; p < k; p++, a += along, b += ldb)
        for (int r = 0; r < kTall; r++)
            for (int w = 0; w < width; w++) sums[r][w] += a[r * down] * lanes(b + w * kLanes);
    for (int r = 0; r < kTall; r++)
        for (int w = 0; w < width; w++) lanes(c + r * ldc + w * kLanes) = sums[r][w];
}

// c (m, n) (+)= a (m, k) b (k, n); m is a multiple of kTall, n of kLanes. BLAS packs such small factors for too long.
void product(int m, int n, int k, const float* a, long down, long along, const float* b, long ldb, float* c, long ldc,
             bool add = false) {
    int j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes)
        for (int i = 0; i < m; i += kTall) tile<2>(k, a + i * down, down, along, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; j < n; j += kLanes)
        for (int i = 0; i < m; i += kTall) tile<1>(k, a + i * down, down, along, b + j, ldb, c + i * ldc + j, ldc, add);
}

Four mixed(Four a, Four b, Order order) { return __builtin_shuffle(a, b, order); }

// to (width, ld) = from (rows, width) transposed.
void transpose(const float* from, long step, int rows, int width, float* to, long ld) {
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float* at[4];
        for (int r = 0; r < 4; r++) at[r] = from + (i + r) * step;
        int p = 0;
        for (; p + 4 <= width; p += 4) {
            Four v[4];
            for (int r = 0; r < 4; r++) v[r] = *(const Four*)(at[r] + p);
            Four ab = mixed(v[0], v[1], Order{0, 4, 1, 5}), cd = mixed(v[2], v[3], Order{0, 4, 1, 5});
            Four ba = mixed(v[0], v[1], Order{2, 6, 3, 7}), dc = mixed(v[2], v[3], Order{2, 6, 3, 7});
            *(Four*)(to + p * ld + i) = mixed(ab, cd, Order{0, 1, 4, 5});
            *(Four*)(to + (p + 1) * ld + i) = mixed(ab, cd, Order{2, 3, 6, 7});
            *(Four*)(to + (p + 2) * ld + i) = mixed(ba, dc, Order{0, 1, 4, 5});
            *(Four*)(to + (p + 3) * ld + i) = mixed(ba, dc, Order{2, 3, 6, 7});
        }
        for (; p < width; p++)
            for (int r = 0; r < 4; r++) to[p * ld + i + r] = at[r][p];
    }
    for (; i < rows; i++)
        for (int p = 0; p < width; p++) to[p * ld + i] = from[i * step + p];
}

// to (rows, width) = factor * from, with `ld` and `step` floats from row to row.
void copy(const float* __restrict from, long step, int rows, int width, float* __restrict to, long ld, float factor = 1) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++) to[r * ld + i] = factor * from[r * step + i];
}

struct Attention {
    Place q, k, v, mask;  // mask: that of v if there is none
    enum { none, bools, numbers } kind;
    float scale;
    int heads, per_group, queries, keys, d, width;
    int keys_padded, d_padded, width_padded;

    Attention(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array* mask, float scale)
        : q(q), k(k), v(v), mask(mask ? *mask : v), kind(!mask ? none : mask->dtype() == mx::bool_ ? bools : numbers),
          scale(scale), heads(q.shape(1)), per_group(q.shape(1) / k.shape(1)), queries(q.shape(2)), keys(k.shape(2)),
          d(q.shape(3)), width(v.shape(3)), keys_padded(padded(keys, kLanes)), d_padded(padded(d, kLanes)),
          width_padded(padded(width, kLanes)) {}
};

// The keys that each query of one row and head sees: none from `end` on, and all before it if `whole`.
struct Seen {
    const Attention& own;
    const char* plane = nullptr;
    std::vector<int> end;
    std::vector<char> whole;

    explicit Seen(const Attention& own) : own(own), end(own.queries, own.keys), whole(own.queries, 1) {}

    template <class T, class Sees>
    void look_at(int row, int head, Sees sees) {
        const T* m = own.mask.at<T>(row, head);
        if (plane == (const char*)m) return;
        plane = (const char*)m;
        long step = own.mask.step[3];
        for (int i = 0; i < own.queries; i++) {
            const T* line = m + i * own.mask.step[2];
            int last = own.keys, seen = 0;
            while (last && !sees(line[(last - 1) * step])) last--;
            for (int j = 0; j < last; j++) seen += sees(line[j * step]);
            end[i] = last, whole[i] = own.kind == Attention::bools && seen == last;
        }
    }

    void look(int row, int head) {
        if (own.kind == Attention::bools) look_at<bool>(row, head, [](bool sees) { return sees; });
        if (own.kind == Attention::numbers) look_at<float>(row, head, [](float added) { return added != -INFINITY; });
    }

    // The first key, in whole vectors, that none of `count` queries sees.
    int limit(int first, int count) const {
        int most = 0;
        for (int i = first; i < first + count; i++) most = end[i] > most ? end[i] : most;
        return padded(most, kLanes);
    }

    // Mask the scores (limit) of one query.
    void hide(int row, int head, int i, float* s, int limit) const {
        long step = own.mask.step[3], line = i * own.mask.step[2];
        if (!whole[i] && own.kind == Attention::bools)
            for (int j = 0; j < end[i]; j++) s[j] += own.mask.at<bool>(row, head)[line + j * step] ? 0 : -INFINITY;
        if (own.kind == Attention::numbers)
            for (int j = 0; j < end[i]; j++) s[j] += own.mask.at(row, head)[line + j * step];
        for (int j = end[i]; j < limit; j++) s[j] = -INFINITY;
    }
};

struct Forward : Attention {
    float *o, *log_sums;  // (B, queries, heads, width), (B, heads, queries)

    static Task begin(const Arrays& in, Arrays& out, const Numbers& values) {
        Attention all(in[0], in[1], in[2], in.size() > 3 ? &in[3] : nullptr, values[0]);
        return [work = Forward{all, out[0].data<float>(), out[1].data<float>()}] {
            Forward own = work;
            std::vector<float> room[3];
            own.q = own.q.with_rows(room[0]), own.k = own.k.with_rows(room[1]), own.v = own.v.with_rows(room[2]);
            long reads = long(own.keys) * own.per_group * own.queries;
            mlx_transformer_divide(some, &own, own.k.shape[0] * own.k.shape[1], reads);
        };
    }

    // Items are the heads of keys and values of all rows of the batch.
    static void some(const void* work, int first, int last) {
        auto& own = *static_cast<const Forward*>(work);
        Room room(long(own.keys_padded) * (own.d_padded + own.width_padded + kRows) +
                  kRows * (own.d_padded + own.width_padded));
        float *kt = room.take(own.d_padded * long(own.keys_padded)), *v = room.take(own.keys_padded * own.width_padded);
        float *q = room.take(kRows * own.d_padded), *s = room.take(kRows * own.keys_padded);
        float* sums = room.take(kRows * own.width_padded);
        Seen seen(own);
        for (int i = first; i < last; i++) {
            int groups = own.k.shape[1], row = i / groups, group = i % groups;
            transpose(own.k.at(row, group), own.k.step[2], own.keys, own.d, kt, own.keys_padded);
            copy(own.v.at(row, group), own.v.step[2], own.keys, own.width, v, own.width_padded);
            for (int head = group * own.per_group; head < (group + 1) * own.per_group; head++) {
                seen.look(row, head);
                for (int at = 0; at < own.queries; at += kRows) own.tile_of(row, head, at, seen, kt, v, q, s, sums);
            }
        }
    }

    void tile_of(int row, int head, int at, const Seen& seen, const float* kt, const float* v, float* q, float* s,
                 float* sums) const {
        int count = std::min(kRows, queries - at), tall = padded(count, kTall), limit = seen.limit(at, count);
        copy(this->q.at(row, head) + at * this->q.step[2], this->q.step[2], count, d, q, d_padded, scale);
        product(tall, limit, d, q, d_padded, 1, kt, keys_padded, s, keys_padded);
        float shares[kRows];
        for (int r = 0; r < count; r++) {
            seen.hide(row, head, at + r, s + r * keys_padded, limit);
            auto [share, log_sum] = exponentials(s + r * keys_padded, limit);
            shares[r] = share, log_sums[(long(row) * heads + head) * queries + at + r] = log_sum;
        }
        product(tall, width_padded, limit, s, keys_padded, 1, v, width_padded, sums, width_padded);
        for (int r = 0; r < count; r++) {
            float* to = o + ((long(row) * queries + at + r) * heads + head) * width;
            for (int i = 0; i < width; i++) to[i] = shares[r] * sums[r * width_padded + i];
        }
    }
};

struct Backward : Attention {
    Place o, log_sums, go;  // go: the gradient of o
    float *gq, *gk, *gv;    // (B, tokens, heads, d or width)

    static Task begin(const Arrays& in, Arrays& out, const Numbers& values) {
        Attention all(in[0], in[1], in[2], in.size() > 6 ? &in[6] : nullptr, values[0]);
        Backward work{all, Place(in[3]), Place(in[4]), Place(in[5]),
                      out[0].data<float>(), out[1].data<float>(), out[2].data<float>()};
        return [work] {
            Backward own = work;
            std::vector<float> room[5];
            own.q = own.q.with_rows(room[0]), own.k = own.k.with_rows(room[1]), own.v = own.v.with_rows(room[2]);
            own.o = own.o.with_rows(room[3]), own.go = own.go.with_rows(room[4]);
            long reads = 2L * own.keys * own.per_group * own.queries;
            mlx_transformer_divide(some, &own, own.k.shape[0] * own.k.shape[1], reads);
        };
    }

    // Packed factors: kt, vt transposed; q times scale; s becomes the weights, t the gradient of the scores.
    struct Packed {
        float *kt, *vt, *k, *gk, *gv, *q, *go, *gq, *s, *t;
    };

    static void some(const void* work, int first, int last) {
        auto& own = *static_cast<const Backward*>(work);
        long keys = own.keys_padded, d = own.d_padded, width = own.width_padded;
        Room room(keys * (3 * d + 2 * width + 2 * kRows) + kRows * (2 * d + width) + 10 * 16);
        Packed p{};
        p.kt = room.take(d * keys), p.vt = room.take(width * keys), p.k = room.take(keys * d);
        p.gk = room.take(keys * d), p.gv = room.take(keys * width);
        p.q = room.take(kRows * d), p.go = room.take(kRows * width), p.gq = room.take(kRows * d);
        p.s = room.take(kRows * keys), p.t = room.take(kRows * keys);
        Seen seen(own);
        for (int i = first; i < last; i++) own.head_of_keys(i / own.k.shape[1], i % own.k.shape[1], seen, p);
    }

    void head_of_keys(int row, int group, Seen& seen, const Packed& p) const {
        int groups = heads / per_group;
        transpose(k.at(row, group), k.step[2], keys, d, p.kt, keys_padded);
        transpose(v.at(row, group), v.step[2], keys, width, p.vt, keys_padded);
        copy(k.at(row, group), k.step[2], keys, d, p.k, d_padded);
        std::fill_n(p.gk, long(keys_padded) * d_padded, 0.0f);
        std::fill_n(p.gv, long(keys_padded) * width_padded, 0.0f);
        for (int head = group * per_group; head < (group + 1) * per_group; head++) {
            seen.look(row, head);
            for (int at = 0; at < queries; at += kRows) tile_of(row, head, at, seen, p);
        }
        copy(p.gk, d_padded, keys, d, gk + (long(row) * keys * groups + group) * d, groups * d);
        copy(p.gv, width_padded, keys, width, gv + (long(row) * keys * groups + group) * width, groups * width);
    }

    void tile_of(int row, int head, int at, const Seen& seen, const Packed& p) const {
        int count = std::min(kRows, queries - at), tall = padded(count, kTall), limit = seen.limit(at, count);
        if (count < kRows)  // rows that an earlier tile has left
            for (float* rows : {p.q, p.go}) std::fill_n(rows, kRows * (rows == p.q ? d_padded : width_padded), 0.0f);
        copy(q.at(row, head) + at * q.step[2], q.step[2], count, d, p.q, d_padded, scale);
        copy(go.at(row, head) + at * go.step[2], go.step[2], count, width, p.go, width_padded);
        product(tall, limit, d, p.q, d_padded, 1, p.kt, keys_padded, p.s, keys_padded);
        product(tall, limit, width, p.go, width_padded, 1, p.vt, keys_padded, p.t, keys_padded);
        for (int r = 0; r < count; r++) {
            float *s = p.s + r * keys_padded, *t = p.t + r * keys_padded, total = 0;
            const float *from = o.at(row, head) + (at + r) * o.step[2], *by = p.go + r * width_padded;
#pragma omp simd reduction(+ : total)
            for (int i = 0; i < width; i++) total += from[i] * by[i];
            float log_sum = log_sums.at(row, head)[(at + r) * log_sums.step[2]];
            seen.hide(row, head, at + r, s, limit);
            for (int j = 0; j < limit; j += kLanes) {
                Lanes weight = exp_nonpositive(lanes(s + j) - log_sum);
                lanes(s + j) = weight, lanes(t + j) = weight * (lanes(t + j) - total);
            }
        }
        for (int r = count; r < tall; r++)
            for (float* rows : {p.s, p.t}) std::fill_n(rows + r * keys_padded, limit, 0.0f);
        product(tall, d_padded, limit, p.t, keys_padded, 1, p.k, d_padded, p.gq, d_padded);
        product(limit, d_padded, tall, p.t, 1, keys_padded, p.q, d_padded, p.gk, d_padded, true);
        product(limit, width_padded, tall, p.s, 1, keys_padded, p.go, width_padded, p.gv, width_padded, true);
        copy(p.gq, d_padded, count, d, gq + ((long(row) * queries + at) * heads + head) * d, heads * d, scale);
    }
};

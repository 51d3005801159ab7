// What MLX's matmul calls on a Linux CPU instead of the BLAS in its wheel; blas.py says which library it hands on to.
//
// A BLAS packs both factors first, which pays over many rows and not over the one row (or few) of a decoding step: there
// the second factor, the weights, is read once and used as it lies. Nothing of the C++ library is used: jit.py has to be
// the first to bring that in.

#include <stdlib.h>

typedef void sgemm(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));

namespace {

constexpr int kPlain = 111, kTransposed = 112, kRowMajor = 101;
constexpr int kLine = 16;  // floats of a cache line
constexpr int kAhead = 8192;  // floats: what lies so far behind is fetched already; 0.95 -> 0.5 ms for base's cold weights
constexpr int kWidth = 8;  // rows of B at a time; measured: with more, registers for their addresses run out
constexpr int kFewRows = 16;  // measured: with more of them packing pays
constexpr int kDeepest = 4096;  // columns of A that few_rows has room for

float total(Lanes v) {
    float sums[kLanes];
    *(Lanes*)sums = v;
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// c = alpha * value + beta * c; beta 0 does not read c, which may hold anything.
void put(float& c, float alpha, float value, float beta) { c = beta ? alpha * value + beta * c : alpha * value; }

// c (n) = a (k) B^T, B (n, k), which is read as it lies.
void row_by_rows(int n, int k, float alpha, const float* a, const float* b, long ldb, float beta, float* c) {
    constexpr int groups = 4;
    for (int j = 0; j < n; j++) {
        const float* row = b + j * ldb;
        Lanes sums[groups] = {};
        int p = 0;
        for (; p + groups * kLanes <= k; p += groups * kLanes) {
            for (int q = p; q < p + groups * kLanes; q += kLine) __builtin_prefetch(row + q + kAhead);
            for (int g = 0; g < groups; g++)
                sums[g] += *(const Lanes*)(a + p + g * kLanes) * *(const Lanes*)(row + p + g * kLanes);
        }
        for (; p + kLanes <= k; p += kLanes) sums[0] += *(const Lanes*)(a + p) * *(const Lanes*)(row + p);
        float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; p < k; p++) sum += a[p] * row[p];
        put(c[j], alpha, sum, beta);
    }
}

// c (count * kLanes) = a (k) B, of whose rows B so many columns are used. Two rows at a time: an addition takes a while.
template <int count>
void lanes_by_columns(int k, float alpha, const float* a, const float* b, long ldb, float beta, float* c) {
    Lanes even[count] = {}, odd[count] = {};
    int p = 0;
    for (; p + 2 <= k; p += 2, b += 2 * ldb)
        for (int g = 0; g < count; g++) {
            __builtin_prefetch(b + g * kLanes + kAhead);
            __builtin_prefetch(b + ldb + g * kLanes + kAhead);
            even[g] += a[p] * *(const Lanes*)(b + g * kLanes);
            odd[g] += a[p + 1] * *(const Lanes*)(b + ldb + g * kLanes);
        }
    if (p < k)
        for (int g = 0; g < count; g++) even[g] += a[p] * *(const Lanes*)(b + g * kLanes);
    for (int g = 0; g < count; g++) {
        Lanes sums = even[g] + odd[g];
        for (int i = 0; i < kLanes; i++) put(c[g * kLanes + i], alpha, sums[i], beta);
    }
}

// c (n) = a (k) B, B (k, n).
void row_by_columns(int n, int k, float alpha, const float* a, const float* b, long ldb, float beta, float* c) {
    constexpr int groups = 4;
    int j = 0;
    for (; j + groups * kLanes <= n; j += groups * kLanes)
        lanes_by_columns<groups>(k, alpha, a, b + j, ldb, beta, c + j);
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) lanes_by_columns<2>(k, alpha, a, b + j, ldb, beta, c + j);
    for (; j + kLanes <= n; j += kLanes) lanes_by_columns<1>(k, alpha, a, b + j, ldb, beta, c + j);
    for (; j < n; j++) {
        float sum = 0;
        for (int p = 0; p < k; p++) sum += a[p] * b[p * ldb + j];
        put(c[j], alpha, sum, beta);
    }
}

// sums (count) = columns (k, kLanes) times each of `count` rows of B: a lane is a row of A.
template <int count>
void lanes_by_rows(int k, const float* columns, const float* b, long ldb, Lanes* sums) {
    Lanes own[count] = {};
    auto add = [&](int p) {
        Lanes column = *(const Lanes*)(columns + p * kLanes);
        for (int j = 0; j < count; j++) own[j] += column * b[j * ldb + p];
    };
    int p = 0;
    for (; p + kLine <= k; p += kLine) {
        for (int j = 0; j < count; j++) __builtin_prefetch(b + (count + j) * ldb + p);
        for (int q = p; q < p + kLine; q++) add(q);
    }
    for (; p < k; p++) add(p);
    for (int j = 0; j < count; j++) sums[j] = own[j];
}

// C (m, n) = A (m, k) B^T with m <= kLanes, k <= kDeepest, B (n, k).
void few_rows(int m, int n, int k, float alpha, const float* a, long lda, const float* b, long ldb, float beta, float* c,
              long ldc) {
    static thread_local float* columns_of_thread;
    if (!columns_of_thread) columns_of_thread = (float*)malloc(sizeof(float) * kDeepest * kLanes);
    float* const columns = columns_of_thread;
    for (int p = 0; p < k; p++)
        for (int i = 0; i < kLanes; i++) columns[p * kLanes + i] = i < m ? a[i * lda + p] : 0;
    Lanes sums[kWidth];
    for (int j = 0; j < n; j += kWidth) {
        int here = n - j < kWidth ? n - j : kWidth;
        if (here == kWidth)
            lanes_by_rows<kWidth>(k, columns, b + j * ldb, ldb, sums);
        else
            for (int i = 0; i < here; i++) lanes_by_rows<1>(k, columns, b + (j + i) * ldb, ldb, sums + i);
        for (int i = 0; i < m; i++)
            for (int q = 0; q < here; q++) put(c[i * ldc + j + q], alpha, sums[q][i], beta);
    }
}

}  // namespace

extern "C" {
sgemm* mlx_transformer_sgemm;  // set from Python
long mlx_transformer_calls;    // how often MLX came by; a rough count, threads do not wait for each other

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
    ++mlx_transformer_calls;
    bool plain = order == kRowMajor && ta == kPlain;
    if (plain && tb == kPlain && m == 1)
        return row_by_columns(n, k, alpha, a, b, ldb, beta, c);
    if (plain && tb == kTransposed && m < 4) {
        for (int i = 0; i < m; i++) row_by_rows(n, k, alpha, a + (long)i * lda, b, ldb, beta, c + (long)i * ldc);
        return;
    }
    if (plain && tb == kTransposed && m <= kFewRows && k <= kDeepest) {
        for (int i = 0; i < m; i += kLanes)
            few_rows(m - i < kLanes ? m - i : kLanes, n, k, alpha, a + (long)i * lda, lda, b, ldb, beta,
                     c + (long)i * ldc, ldc);
        return;
    }
    mlx_transformer_sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}

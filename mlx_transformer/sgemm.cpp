// What MLX's matmul calls on a Linux CPU instead of the BLAS in its wheel; blas.py says which library it hands on to.
//
// A BLAS packs both factors first, which pays over many rows and not over the one row (or few) of a decoding step: there
// the second factor, the weights, is read once and used as it lies. Nothing of the C++ library is used: jit.py has to be
// the first to bring that in.

#include <stdlib.h>

typedef void sgemm(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
typedef float Lanes __attribute__((vector_size(32), aligned(4)));

namespace {

constexpr int kPlain = 111, kTransposed = 112, kRowMajor = 101;
constexpr int kLanes = 8;
constexpr int kFewRows = 16;  // measured: with more of them packing pays
constexpr int kDeepest = 4096;  // columns of A that few_rows has room for

float total(Lanes v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// c = alpha * value + beta * c; beta 0 does not read c, which may hold anything.
void put(float& c, float alpha, float value, float beta) { c = beta ? alpha * value + beta * c : alpha * value; }

// c (n) = a (k) B^T, B (n, k): four rows of B at a time share what is loaded of a.
void row_by_rows(int n, int k, float alpha, const float* a, const float* b, long ldb, float beta, float* c) {
    constexpr int rows = 4;
    int j = 0;
    for (; j + rows <= n; j += rows) {
        const float* row = b + j * ldb;
        Lanes sums[rows] = {};
        int p = 0;
        for (; p + kLanes <= k; p += kLanes)
            for (int i = 0; i < rows; i++) sums[i] += *(const Lanes*)(a + p) * *(const Lanes*)(row + i * ldb + p);
        for (int i = 0; i < rows; i++) {
            float sum = total(sums[i]);
            for (int q = p; q < k; q++) sum += a[q] * row[i * ldb + q];
            put(c[j + i], alpha, sum, beta);
        }
    }
    for (; j < n; j++) {
        float sum = 0;
        for (int p = 0; p < k; p++) sum += a[p] * b[j * ldb + p];
        put(c[j], alpha, sum, beta);
    }
}

// c (n) = a (k) B, B (k, n): 32 columns at a time.
void row_by_columns(int n, int k, float alpha, const float* a, const float* b, long ldb, float beta, float* c) {
    constexpr int groups = 4;
    int j = 0;
    for (; j + groups * kLanes <= n; j += groups * kLanes) {
        Lanes sums[groups] = {};
        for (int p = 0; p < k; p++)
            for (int g = 0; g < groups; g++) sums[g] += a[p] * *(const Lanes*)(b + p * ldb + j + g * kLanes);
        for (int i = 0; i < groups * kLanes; i++) put(c[j + i], alpha, sums[i / kLanes][i % kLanes], beta);
    }
    for (; j < n; j++) {
        float sum = 0;
        for (int p = 0; p < k; p++) sum += a[p] * b[p * ldb + j];
        put(c[j], alpha, sum, beta);
    }
}

// sums (count) = columns (k, 8) times each of `count` rows of B: a lane is a row of A.
template <int count>
void lanes_by_rows(int k, const float* columns, const float* b, long ldb, Lanes* sums) {
    Lanes own[count] = {};
    for (int p = 0; p < k; p++) {
        Lanes column = *(const Lanes*)(columns + p * kLanes);
        for (int j = 0; j < count; j++) own[j] += column * b[j * ldb + p];
    }
    for (int j = 0; j < count; j++) sums[j] = own[j];
}

// C (m, n) = A (m, k) B^T with m <= 8, k <= kDeepest, B (n, k).
void few_rows(int m, int n, int k, float alpha, const float* a, long lda, const float* b, long ldb, float beta, float* c,
              long ldc) {
    constexpr int width = 12;  // accumulators that fit into 16 registers beside what they are fed with
    static thread_local float* columns_of_thread;
    if (!columns_of_thread) columns_of_thread = (float*)malloc(sizeof(float) * kDeepest * kLanes);
    float* const columns = columns_of_thread;
    for (int p = 0; p < k; p++)
        for (int i = 0; i < kLanes; i++) columns[p * kLanes + i] = i < m ? a[i * lda + p] : 0;
    Lanes sums[width];
    for (int j = 0; j < n; j += width) {
        int here = n - j < width ? n - j : width;
        if (here == width)
            lanes_by_rows<width>(k, columns, b + j * ldb, ldb, sums);
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

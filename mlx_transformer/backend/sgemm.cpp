// The cblas_sgemm that MLX's matmul calls on a Linux CPU; it passes most calls to the library chosen in blas.py.
// It also divides work between threads: its own products and that of primitives.cpp.
//
// A BLAS packs both factors first, which pays for many rows but not for the few rows of a decoding step: these are
// computed here, reading the second factor, the weights, once and in place. So are products of many rows on one thread
// with AVX-512, as in a training step. The C++ standard library is not used, since jit.py must be the first to load it.

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef void sgemm(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef float Four __attribute__((vector_size(16), aligned(4)));
typedef int Order __attribute__((vector_size(16)));

namespace {

constexpr int kPlain = 111, kTransposed = 112, kRowMajor = 101;
constexpr int kLine = 16;  // floats of a cache line
constexpr int kAhead = 8192;  // floats: prefetch distance; 0.95 -> 0.5 ms for the cold weights of size base
constexpr int kWidth = 8;  // rows of B at a time; measured: with more, registers for their addresses run out
constexpr int kFewRows = 16;  // measured: with more rows packing pays
constexpr int kDeepest = 4096;  // the most columns of A that columns_of can hold
constexpr int kPart = 32768;  // floats that a thread reads before it takes more work

typedef void part(const void* work, int first, int last);

// Items of work, which threads take `at_once` at a time, so that the caller never waits for a thread that has not begun.
struct Job {
    part* some;
    const void* work;
    int items, at_once, next = 0;  // next: the first item not taken

    void take() {
        for (int first; (first = __atomic_fetch_add(&next, at_once, __ATOMIC_RELAXED)) < items;)
            some(work, first, first + at_once < items ? first + at_once : items);
    }
};

Job* open_job;  // the job that helpers work on
int calls;      // how often helpers were woken
int inside;     // helpers that may be working on the job
int helpers;    // helpers started
bool taken;     // whether a job has the helpers

void* help(void*) {
    for (int seen = 0;;) {
        __atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST);
        if (Job* job = __atomic_load_n(&open_job, __ATOMIC_SEQ_CST)) job->take();
        __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &calls, FUTEX_WAIT_PRIVATE, seen, nullptr);
        seen = __atomic_load_n(&calls, __ATOMIC_SEQ_CST);
    }
}

// Do `items` of work, each of which reads `reads` floats, with helpers unless another job has them. A thread takes a
// multiple of `group` items at a time.
void divide(part* some, const void* work, int items, long reads, int group, int threads) {
    int groups = (kPart / (reads > 1 ? reads : 1) + group - 1) / group;
    Job job{some, work, items, group * (groups ? groups : 1)};
    if (threads < 2) return some(work, 0, items);
    if (job.items <= job.at_once || __atomic_exchange_n(&taken, true, __ATOMIC_ACQUIRE)) return job.take();
    for (pthread_t thread; helpers < threads - 1 && !pthread_create(&thread, nullptr, help, nullptr); helpers++)
        pthread_detach(thread);
    __atomic_store_n(&open_job, &job, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &calls, FUTEX_WAKE_PRIVATE, threads - 1);
    job.take();
    __atomic_store_n(&open_job, nullptr, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&inside, __ATOMIC_SEQ_CST)) sched_yield();  // a helper may need this core
    __atomic_store_n(&taken, false, __ATOMIC_RELEASE);
}

Four sum_of_fours(Lanes v) {
    Four parts[kLanes / 4];
    *(Lanes*)parts = v;
    for (int i = 1; i < kLanes / 4; i++) parts[0] += parts[i];
    return parts[0];
}

Four mixed(Four a, Four b, Order order) { return __builtin_shuffle(a, b, order); }

// The sum over the lanes of each of four vectors.
Four totals(const Lanes* v) {
    Four a = sum_of_fours(v[0]), b = sum_of_fours(v[1]), c = sum_of_fours(v[2]), d = sum_of_fours(v[3]);
    Four ab = mixed(a, b, Order{0, 4, 2, 6}) + mixed(a, b, Order{1, 5, 3, 7});
    Four cd = mixed(c, d, Order{0, 4, 2, 6}) + mixed(c, d, Order{1, 5, 3, 7});
    return mixed(ab, cd, Order{0, 1, 4, 5}) + mixed(ab, cd, Order{2, 3, 6, 7});
}

void transpose(Four* v) {
    Four ab = mixed(v[0], v[1], Order{0, 4, 1, 5}), cd = mixed(v[2], v[3], Order{0, 4, 1, 5});
    Four ba = mixed(v[0], v[1], Order{2, 6, 3, 7}), dc = mixed(v[2], v[3], Order{2, 6, 3, 7});
    v[0] = mixed(ab, cd, Order{0, 1, 4, 5}), v[1] = mixed(ab, cd, Order{2, 3, 6, 7});
    v[2] = mixed(ba, dc, Order{0, 1, 4, 5}), v[3] = mixed(ba, dc, Order{2, 3, 6, 7});
}

// c = alpha * value + beta * c; beta 0 does not read c, which may hold anything.
void put(float& c, float alpha, float value, float beta) { c = beta ? alpha * value + beta * c : alpha * value; }
void put(Four& c, float alpha, Four value, float beta) { c = beta ? alpha * value + beta * c : alpha * value; }

// c (n) = a (k) B^T, B (n, k), read in place: four rows at a time if they are short, else one.
void row_by_rows(int n, int k, float alpha, const float* a, const float* b, long ldb, float beta, float* c) {
    int j = 0;
    for (; j + 4 <= n && k <= 4 * kLanes; j += 4, b += 4 * ldb) {
        Lanes sums[4] = {};
        int p = 0;
        for (; p + kLanes <= k; p += kLanes)
            for (int r = 0; r < 4; r++) {
                __builtin_prefetch(b + r * ldb + p + kAhead);
                sums[r] += *(const Lanes*)(a + p) * *(const Lanes*)(b + r * ldb + p);
            }
        Four sum = totals(sums);
        for (; p < k; p++)
            for (int r = 0; r < 4; r++) sum[r] += a[p] * b[r * ldb + p];
        put(*(Four*)(c + j), alpha, sum, beta);
    }
    for (; j < n; j++, b += ldb) {
        Lanes sums[4] = {};
        int p = 0;
        for (; p + 4 * kLanes <= k; p += 4 * kLanes) {
            for (int q = p; q < p + 4 * kLanes; q += kLine) __builtin_prefetch(b + q + kAhead);
            for (int g = 0; g < 4; g++) sums[g] += *(const Lanes*)(a + p + g * kLanes) * *(const Lanes*)(b + p + g * kLanes);
        }
        for (; p + kLanes <= k; p += kLanes) sums[0] += *(const Lanes*)(a + p) * *(const Lanes*)(b + p);
        Four parts = totals(sums);
        float sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        for (; p < k; p++) sum += a[p] * b[p];
        put(c[j], alpha, sum, beta);
    }
}

// c (count * kLanes) = a (k) B, for the first columns of B. Two rows at a time, to hide the latency of additions.
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

// sums (count) = columns (k, kLanes) times each of `count` rows of B; each lane is a row of A.
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

// C (m, n) = alpha A B^T + beta C; the items are the rows of B (n, k). a holds A's columns (k, kLanes).
struct Product {
    int m, k;
    float alpha;
    const float *a, *b;
    long ldb;
    float beta;
    float* c;
    long ldc;

    static void some(const void* work, int first, int last) { static_cast<const Product*>(work)->rows_of_b(first, last); }
    void rows_of_b(int first, int last) const;
};

void Product::rows_of_b(int first, int last) const {
    Lanes sums[kWidth];
    for (int j = first; j < last; j += kWidth) {
        const float* rows = b + j * ldb;
        int here = last - j < kWidth ? last - j : kWidth, q = 0;
        if (here == kWidth)
            lanes_by_rows<kWidth>(k, a, rows, ldb, sums);
        else
            for (int i = 0; i < here; i++) lanes_by_rows<1>(k, a, rows + i * ldb, ldb, sums + i);
        for (; q + 4 <= here; q += 4)
            for (int i = 0; i < m; i += 4) {
                Four block[4];
                for (int r = 0; r < 4; r++) block[r] = ((const Four*)(sums + q + r))[i / 4];
                transpose(block);
                for (int r = 0; r < 4 && i + r < m; r++) put(*(Four*)(c + (i + r) * ldc + j + q), alpha, block[r], beta);
            }
        for (; q < here; q++)
            for (int i = 0; i < m; i++) put(c[i * ldc + j + q], alpha, sums[q][i], beta);
    }
}

// The columns (k, kLanes) of A (m, k), m <= kLanes, k <= kDeepest; the thread's next call overwrites them.
float* columns_of(int m, int k, const float* a, long lda) {
    static thread_local float* columns;
    if (!columns) columns = (float*)malloc(sizeof(float) * kDeepest * kLanes);
    for (int p = 0; p < k; p++)
        for (int i = 0; i < kLanes; i++) columns[p * kLanes + i] = i < m ? a[i * lda + p] : 0;
    return columns;
}

#ifdef __AVX512F__
// Products of many rows: B is packed into panels of two vectors, A is read in place. A tile of 8 rows of A against a panel
// needs 10 loads for 16 multiplications, so that one thread of a Zen 4 core does 105 to 115 GFLOP/s at widths of 64 to
// 4096, where OpenBLAS, which packs both factors, does 90 to 100.
constexpr int kTall = 8, kPanel = 2 * kLanes;
constexpr int kDeep = 256, kWide = 512;  // rows and columns of B packed at once: half of the second cache

// C (kTall, kPanel) = alpha A panel + beta C; elements of A are `down` and `along` apart.
void tile(int k, float alpha, const float* a, long down, long along, const float* panel, float beta, float* c, long ldc) {
    Lanes sums[kTall][2] = {};
    for (int p = 0; p < k; p++, a += along, panel += kPanel)
        for (int r = 0; r < kTall; r++)
            for (int w = 0; w < 2; w++) sums[r][w] += a[r * down] * *(const Lanes*)(panel + w * kLanes);
    for (int r = 0; r < kTall; r++)
        for (int w = 0; w < 2; w++) {
            Lanes& to = *(Lanes*)(c + r * ldc + w * kLanes);
            to = beta ? alpha * sums[r][w] + beta * to : alpha * sums[r][w];
        }
}

// panel (k, kPanel) = B, or the transposed B (kPanel, k).
void pack(int k, const float* b, long ldb, bool transposed, float* panel) {
    if (!transposed) {
        for (int p = 0; p < k; p++)
            for (int w = 0; w < 2; w++) *(Lanes*)(panel + p * kPanel + w * kLanes) = *(const Lanes*)(b + p * ldb + w * kLanes);
        return;
    }
    for (int j = 0; j < kPanel; j += 4) {
        int p = 0;
        for (; p + 4 <= k; p += 4) {
            Four block[4];
            for (int r = 0; r < 4; r++) block[r] = *(const Four*)(b + (j + r) * ldb + p);
            transpose(block);
            for (int r = 0; r < 4; r++) *(Four*)(panel + (p + r) * kPanel + j) = block[r];
        }
        for (; p < k; p++)
            for (int r = 0; r < 4; r++) panel[p * kPanel + j + r] = b[(j + r) * ldb + p];
    }
}

// C (m, n) = alpha A B + beta C, with A (m, k) as in `tile`; m is a multiple of kTall, n of kPanel.
void product_of_many_rows(int m, int n, int k, float alpha, const float* a, long down, long along, const float* b, long ldb,
                          bool transposed, float beta, float* c, long ldc) {
    static thread_local float* panels;
    if (!panels) panels = (float*)aligned_alloc(64, sizeof(float) * kDeep * kWide);
    for (int first = 0; first < n; first += kWide)
        for (int top = 0; top < k; top += kDeep) {
            int deep = k - top < kDeep ? k - top : kDeep, end = n - first < kWide ? n : first + kWide;
            for (int j = first; j < end; j += kPanel) {
                const float* from = transposed ? b + j * ldb + top : b + top * ldb + j;
                pack(deep, from, ldb, transposed, panels + (j - first) * deep);
            }
            for (int i = 0; i < m; i += kTall)
                for (int j = first; j < end; j += kPanel)
                    tile(deep, alpha, a + i * down + top * along, down, along, panels + (j - first) * deep, top ? 1 : beta,
                         c + i * ldc + j, ldc);
        }
}
#endif

}  // namespace

extern "C" {
sgemm* mlx_transformer_sgemm;  // set from Python
int mlx_transformer_threads;   // threads of a product or other work
long mlx_transformer_calls;    // calls by MLX: a rough count, as it is not atomic

void mlx_transformer_divide(part* some, const void* work, int items, long reads) {
    divide(some, work, items, reads, 1, mlx_transformer_threads);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
    ++mlx_transformer_calls;
    bool plain = order == kRowMajor && ta == kPlain;
    if (plain && tb == kPlain && m == 1)
        return row_by_columns(n, k, alpha, a, b, ldb, beta, c);
    if (plain && tb == kTransposed && m < 4) {
        for (int i = 0; i < m; i++)
            row_by_rows(n, k, alpha, a + (long)i * lda, b, ldb, beta, c + (long)i * ldc);
        return;
    }
    if (plain && tb == kTransposed && m <= kFewRows && k <= kDeepest) {
        for (int i = 0; i < m; i += kLanes) {
            int rows = m - i < kLanes ? m - i : kLanes;
            const float* columns = columns_of(rows, k, a + (long)i * lda, lda);
            float* own = c + (long)i * ldc;
            Product product{rows, k, alpha, columns, b, ldb, beta, own, ldc};
            divide(Product::some, &product, n, k, kWidth, mlx_transformer_threads);
        }
        return;
    }
#ifdef __AVX512F__
    bool one = order == kRowMajor && mlx_transformer_threads == 1, twice = ta != kPlain && tb != kPlain;
    if (one && !twice && m >= 2 * kPanel && n >= kPanel && k) {
        int rows = m / kTall * kTall, columns = n / kPanel * kPanel;
        bool across = ta != kPlain, transposed = tb != kPlain;
        product_of_many_rows(rows, columns, k, alpha, a, across ? 1 : lda, across ? lda : 1, b, ldb, transposed, beta, c, ldc);
        if (columns < n)
            mlx_transformer_sgemm(order, ta, tb, rows, n - columns, k, alpha, a, lda,
                                  b + (long)columns * (transposed ? ldb : 1), ldb, beta, c + columns, ldc);
        if (rows < m)
            mlx_transformer_sgemm(order, ta, tb, m - rows, n, k, alpha, a + (long)rows * (across ? 1 : lda), lda, b, ldb,
                                  beta, c + (long)rows * ldc, ldc);
        return;
    }
#endif
    mlx_transformer_sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}

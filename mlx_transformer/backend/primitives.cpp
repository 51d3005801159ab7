// MLX primitives for a Linux CPU: attention, norms and the loss, with their gradients. extension.py builds them.
//
// With MLX's own operations the attention of a head is two small products and a softmax of four passes, with copies
// between the layouts of heads and tokens, and a norm is five operations. In a step of a small model, or of one token,
// the cost of an operation exceeds its arithmetic.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace nb = nanobind;
namespace mx = mlx::core;

extern "C" {  // sgemm.cpp
void mlx_transformer_divide(void (*part)(const void*, int, int), const void* work, int items, long reads);
void cblas_sgemm(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
}

namespace {

constexpr int kRowMajor = 101, kPlain = 111, kTransposed = 112;  // of cblas_sgemm
using Arrays = std::vector<mx::array>;
using Optional = const std::optional<mx::array>&;
using Task = std::function<void()>;
using Numbers = std::array<float, 3>;

// A primitive whose float32 outputs are computed by a task on one of MLX's threads.
class Own : public mx::Primitive {
  public:
    // Called when the graph is scheduled, with shapes and addresses known; the task runs when the inputs are computed.
    using Begin = Task (*)(const Arrays& in, Arrays& out, const Numbers& numbers);

    Own(const char* name, Begin begin, Numbers numbers)
        : Primitive(mx::default_stream(mx::default_device())), name_(name), begin(begin), numbers(numbers) {}

    void eval_cpu(const Arrays& in, Arrays& out) override {
        for (auto& one : out) one.set_data(mx::allocator::malloc(one.nbytes()));
        mx::cpu::get_command_encoder(stream()).dispatch(begin(in, out, numbers));
    }
    void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("these operations are for a CPU"); }
    const char* name() const override { return name_; }
    bool is_equivalent(const Primitive& other) const override {
        auto& own = static_cast<const Own&>(other);
        return begin == own.begin && numbers == own.numbers;
    }

  private:
    const char* name_;
    Begin begin;
    Numbers numbers;
};

Arrays made(const char* name, Own::Begin begin, Numbers numbers, std::vector<mx::Shape> shapes, Arrays in,
            Optional last = {}) {
    if (last) in.push_back(*last);
    std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
    auto primitive = std::make_shared<Own>(name, begin, numbers);
    return mx::array::make_arrays(std::move(shapes), dtypes, primitive, std::move(in));
}

// Address, shape and strides of a float32 array or a bool mask, as four axes: missing ones are added in front, and an axis
// of length 1 is broadcast.
struct Place {
    const void* data;
    int shape[4] = {1, 1, 1, 1};
    long step[4] = {};
    bool dense;  // row-contiguous

    explicit Place(const mx::array& a) : data(a.data<char>()), dense(a.flags().row_contiguous) {
        for (int i = 0, lacks = 4 - int(a.ndim()); i < int(a.ndim()); i++) {
            shape[lacks + i] = a.shape(i);
            step[lacks + i] = a.shape(i) == 1 ? 0 : a.strides(i);
        }
    }

    template <class T = float>
    const T* at(int row, int head) const {
        return static_cast<const T*>(data) + row * step[0] + head * step[1];
    }

    // The elements in row-major order, copied to `room` if they are not contiguous.
    const float* flat(std::vector<float>& room) const {
        if (dense) return at(0, 0);
        room.clear();
        for (int row = 0; row < shape[0]; row++)
            for (int head = 0; head < shape[1]; head++)
                for (int i = 0; i < shape[2]; i++)
                    for (int j = 0; j < shape[3]; j++) room.push_back(at(row, head)[i * step[2] + j * step[3]]);
        return room.data();
    }

    // The same array with a contiguous last axis.
    Place with_rows(std::vector<float>& room) const {
        if (step[3] == 1) return *this;
        Place copy = *this;
        copy.data = flat(room);
        copy.step[3] = 1, copy.step[2] = shape[3];
        copy.step[1] = copy.step[2] * shape[2], copy.step[0] = copy.step[1] * shape[1];
        return copy;
    }
};

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Anywhere __attribute__((vector_size(4 * kLanes), aligned(4)));  // in memory that is not aligned
typedef int Ints __attribute__((vector_size(4 * kLanes)));
typedef float Four __attribute__((vector_size(16), aligned(4)));

int padded(int n, int to) { return (n + to - 1) / to * to; }
Anywhere& lanes(float* p) { return *(Anywhere*)p; }
const Anywhere& lanes(const float* p) { return *(const Anywhere*)p; }

float sum_of(Lanes all) {
    Four parts[kLanes / 4];
    std::memcpy(parts, &all, sizeof all);
    for (int i = 1; i < kLanes / 4; i++) parts[0] += parts[i];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// e^x for x <= 0 and -inf; nan for nan. The polynomial of ops/fastmath.py, which explains its coefficients. In vectors,
// since g++ turns the same loop over numbers into one with branches.
inline Lanes exp_nonpositive(Lanes x) {
    Lanes y = x * 1.4426950408889634f;
    y = y < -127 ? Lanes{} - 127 : y;
    Ints n = __builtin_convertvector(y, Ints);
    Lanes f = y - __builtin_convertvector(n, Lanes), f2 = f * f;
    Lanes mantissa = (1 + 1.38628744f * f) +
                     f2 * ((0.480360286f + 0.110594716f * f) + f2 * (0.0184115962f + 0.00188980727f * f));
    Ints bits = (n + 126) * (1 << 23) + __builtin_convertvector(mantissa * (1 << 23) + 0.5f, Ints);
    return (Lanes)bits + (y - y);
}

// p = exp(p - max(p)); returns 1 / sum(p) and log(sum(exp(p))) of the former p, or 2 and inf where all keys are masked.
// p has whole vectors.
std::pair<float, float> exponentials(float* p, int count) {
    Lanes tops = Lanes{} - 3.4e38f, sums = {};
    for (int j = 0; j < count; j += kLanes) tops = lanes(p + j) > tops ? lanes(p + j) : tops;
    float top = tops[0];
    for (int i = 1; i < kLanes; i++) top = tops[i] > top ? tops[i] : top;
    for (int j = 0; j < count; j += kLanes) sums += lanes(p + j) = exp_nonpositive(lanes(p + j) - top);
    float sum = sum_of(sums);
    if (sum < 0.5f) return {2, INFINITY};  // the sum is at least 1, or 0
    return {1 / sum, top + std::log(sum)};
}

#include "attention.cpp"


// Attention of one query, as in decoding: its heads are shared by the threads, and nothing is packed.
struct SingleQuery {
    Place q, k, v, mask;  // mask: that of v if there is none
    enum { none, bools, numbers } kind;
    float scale;
    float* out;

    static Task begin(const Arrays& in, Arrays& out, const Numbers& values) {
        auto& mask = in.back();
        auto kind = in.size() == 3 ? none : mask.dtype() == mx::bool_ ? bools : numbers;
        SingleQuery work{Place(in[0]), Place(in[1]), Place(in[2]), Place(mask), kind, values[0], out[0].data<float>()};
        return [work] {
            SingleQuery own = work;
            std::vector<float> room[3];
            own.q = own.q.with_rows(room[0]), own.k = own.k.with_rows(room[1]), own.v = own.v.with_rows(room[2]);
            long reads = long(own.k.shape[2]) * (own.k.shape[3] + own.v.shape[3]);
            mlx_transformer_divide(some, &own, own.q.shape[0] * own.q.shape[1], reads);
        };
    }

    // Items are the heads of all rows of the batch.
    static void some(const void* work, int first, int last) {
        auto& own = *static_cast<const SingleQuery*>(work);
        std::vector<float> p(padded(own.k.shape[2], kLanes), -INFINITY);
        for (int heads = own.q.shape[1], i = first; i < last; i++) own.one(i / heads, i % heads, p.data());
    }

    void one(int row, int head, float* p) const {
        int heads = q.shape[1], group = head / (heads / k.shape[1]), keys = k.shape[2], d = k.shape[3];
        const float *query = q.at(row, head), *key = k.at(row, group), *value = v.at(row, group);
        cblas_sgemm(kRowMajor, kPlain, kTransposed, 1, keys, d, scale, query, d, key, k.step[2], 0, p, keys);
        for (int j = 0; kind == bools && j < keys; j++)
            p[j] += mask.at<bool>(row, head)[j * mask.step[3]] ? 0 : -INFINITY;
        for (int j = 0; kind == numbers && j < keys; j++) p[j] += mask.at(row, head)[j * mask.step[3]];
        float share = exponentials(p, padded(keys, kLanes)).first;
        for (int j = keys; j < padded(keys, kLanes); j++) p[j] = -INFINITY;
        int width = v.shape[3];
        float* o = out + (long(row) * heads + head) * width;
        cblas_sgemm(kRowMajor, kPlain, kPlain, 1, width, keys, share, p, keys, value, v.step[2], 0, o, width);
    }
};

#include "norms.cpp"
#include "loss.cpp"

// The functions that Python calls, with float32 arrays; `ops` documents them.

void expect(bool fits, const char* shapes) {
    if (!fits) throw std::invalid_argument(shapes);
}

// q (B, H, L, d), k (B, G, C, d), v (B, G, C, e), mask bool or float32 and broadcast to (B, H, L, C).
void check(const mx::array& q, const mx::array& k, const mx::array& v, Optional mask) {
    bool four = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && (!mask || mask->ndim() <= 4);
    expect(four && q.shape(3) == k.shape(3) && k.shape(2) == v.shape(2) && k.shape(1) == v.shape(1) &&
               k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0 && q.shape(0) == k.shape(0) && k.shape(0) == v.shape(0),
           "attend: expected q (B, H, L, d), k (B, G, C, d), v (B, G, C, e), where G divides H");
    int scores[] = {k.shape(2), q.shape(2), q.shape(1), q.shape(0)};  // from the last axis
    for (int i = 0; mask && i < int(mask->ndim()); i++)
        expect(mask->shape(-1 - i) == 1 || mask->shape(-1 - i) == scores[i], "attend: the mask is not (B, H, L, C)");
}

mx::array by_heads(const mx::array& x) { return mx::transpose(x, {0, 2, 1, 3}); }

mx::array attend_one(const mx::array& q, const mx::array& k, const mx::array& v, Optional mask, float scale) {
    check(q, k, v, mask);
    expect(q.shape(2) == 1, "attend: expected q (B, H, 1, d)");
    mx::Shape shape{q.shape(0), q.shape(1), 1, v.shape(3)};
    return made("CpuAttentionOfOne", SingleQuery::begin, {scale}, {shape}, {q, k, v}, mask)[0];
}

// The output, and log(sum(exp(scores))) (B, H, L, 1).
Arrays attend(const mx::array& q, const mx::array& k, const mx::array& v, Optional mask, float scale) {
    check(q, k, v, mask);
    int rows = q.shape(0), heads = q.shape(1), length = q.shape(2);
    std::vector<mx::Shape> shapes{{rows, length, heads, v.shape(3)}, {rows, heads, length, 1}};
    auto out = made("CpuAttention", Forward::begin, {scale}, shapes, {q, k, v}, mask);
    return {by_heads(out[0]), out[1]};
}

// The gradients of q, k and v, from the results of `attend` and the gradient of its output.
Arrays attend_gradient(const mx::array& q, const mx::array& k, const mx::array& v, Optional mask, float scale,
                       const mx::array& o, const mx::array& log_sums, const mx::array& go) {
    check(q, k, v, mask);
    std::vector<mx::Shape> shapes;
    for (auto& x : {q, k, v}) shapes.push_back({x.shape(0), x.shape(2), x.shape(1), x.shape(3)});
    auto out = made("CpuAttentionGradient", Backward::begin, {scale}, shapes, {q, k, v, o, log_sums, go}, mask);
    return {by_heads(out[0]), by_heads(out[1]), by_heads(out[2])};
}

// x (..., D) with at most four axes, weight and bias (D).
mx::array norm(const char* name, Own::Begin begin, const mx::array& x, const mx::array& weight, Optional bias, float eps) {
    auto fits = [&](const mx::array& own) { return own.ndim() == 1 && own.shape(0) == x.shape(-1); };
    expect(x.ndim() > 0 && x.ndim() <= 4 && fits(weight) && (!bias || fits(*bias)),
           "norm: expected x (..., D) of four axes at most, weight and bias (D)");
    return made(name, begin, {eps}, {x.shape()}, {x, weight}, bias)[0];
}

mx::array layer_norm(const mx::array& x, const mx::array& weight, Optional bias, float eps) {
    return norm("CpuLayerNorm", begin_norm<true>, x, weight, bias, eps);
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
    return norm("CpuRMSNorm", begin_norm<false>, x, weight, {}, eps);
}

// The gradients of x, weight and bias, from that of the output.
Arrays layer_norm_gradient(const mx::array& x, const mx::array& weight, const mx::array& g, float eps) {
    std::vector<mx::Shape> shapes{x.shape(), weight.shape(), weight.shape()};
    return made("CpuLayerNormGradient", begin_norm_gradient<true>, {eps}, shapes, {x, weight, g});
}

Arrays rms_norm_gradient(const mx::array& x, const mx::array& weight, const mx::array& g, float eps) {
    std::vector<mx::Shape> shapes{x.shape(), weight.shape(), weight.shape()};
    return made("CpuRMSNormGradient", begin_norm_gradient<false>, {eps}, shapes, {x, weight, g});
}

// h (N, D), weight (V, D), targets (N) int32, weights (N): the losses (N), and given weights the gradients of
// sum(weights * losses) for h and weight.
Arrays cross_entropy(const mx::array& h, const mx::array& weight, const mx::array& targets, Optional weights,
                     float smoothing, float cap, int chunk) {
    expect(h.ndim() == 2 && weight.ndim() == 2 && h.shape(1) == weight.shape(1) && targets.dtype() == mx::int32 &&
               targets.shape() == mx::Shape{h.shape(0)} && (!weights || weights->shape() == targets.shape()),
           "cross_entropy: expected h (N, D), weight (V, D), targets (N) int32 and weights (N)");
    std::vector<mx::Shape> shapes{targets.shape()};
    if (weights) shapes.insert(shapes.end(), {h.shape(), weight.shape()});
    return made("CpuCrossEntropy", Loss::begin, {smoothing, cap, float(chunk)}, shapes, {h, weight, targets}, weights);
}

#include "scan.cpp"

}  // namespace

NB_MODULE(primitives, module) {
    auto q = nb::arg("q"), k = nb::arg("k"), v = nb::arg("v"), scale = nb::arg("scale");
    auto mask = nb::arg("mask").none();
    module.def("attend_one", &attend_one, q, k, v, mask, scale);
    module.def("attend", &attend, q, k, v, mask, scale);
    module.def("attend_gradient", &attend_gradient, q, k, v, mask, scale, nb::arg("o"), nb::arg("log_sums"),
               nb::arg("go"));
    auto x = nb::arg("x"), weight = nb::arg("weight"), g = nb::arg("g"), eps = nb::arg("eps");
    module.def("layer_norm", &layer_norm, x, weight, nb::arg("bias").none(), eps);
    module.def("rms_norm", &rms_norm, x, weight, eps);
    module.def("layer_norm_gradient", &layer_norm_gradient, x, weight, g, eps);
    module.def("rms_norm_gradient", &rms_norm_gradient, x, weight, g, eps);
    module.def("cross_entropy", &cross_entropy, nb::arg("h"), weight, nb::arg("targets"), nb::arg("weights").none(),
               nb::arg("smoothing"), nb::arg("cap"), nb::arg("chunk"));
    module.def("selective_scan", &selective_scan);
    module.def("selective_scan_gradient", &selective_scan_gradient);
}

// MLX primitives for a decoding step on a Linux CPU: attention of one query, and norms. extension.py builds them, together
// with scan.cpp.
//
// With MLX's own operations the attention of a head is two small products and a softmax of four passes, all heads on one
// thread, and a norm is five operations. In a step of one token the overhead of an operation exceeds its arithmetic.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
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

// A primitive whose float32 output is computed by a task on one of MLX's threads.
class Own : public mx::Primitive {
  public:
    // Called when the graph is scheduled, with shapes and addresses known; the task runs when the inputs are computed.
    using Begin = Task (*)(const Arrays& in, mx::array& out, float number);

    Own(const char* name, Begin begin, float number)
        : Primitive(mx::default_stream(mx::default_device())), name_(name), begin(begin), number(number) {}

    void eval_cpu(const Arrays& in, Arrays& out) override {
        out[0].set_data(mx::allocator::malloc(out[0].nbytes()));
        mx::cpu::get_command_encoder(stream()).dispatch(begin(in, out[0], number));
    }
    void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("these operations are for a CPU"); }
    const char* name() const override { return name_; }
    bool is_equivalent(const Primitive& other) const override {
        auto& own = static_cast<const Own&>(other);
        return begin == own.begin && number == own.number;
    }

  private:
    const char* name_;
    Begin begin;
    float number;
};

mx::array made(const char* name, Own::Begin begin, float number, mx::Shape shape, Arrays in, Optional last = {}) {
    if (last) in.push_back(*last);
    return mx::array(std::move(shape), mx::float32, std::make_shared<Own>(name, begin, number), std::move(in));
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

// e^x for x <= 0 and -inf; nan for nan. The polynomial of ops/fastmath.py, which explains its coefficients.
inline float exp_nonpositive(float x) {
    float y = x * 1.4426950408889634f;
    y = y < -127 ? -127 : y;
    int n = int(y);
    float f = y - n, f2 = f * f;
    float mantissa = (1 + 1.38628744f * f) +
                     f2 * ((0.480360286f + 0.110594716f * f) + f2 * (0.0184115962f + 0.00188980727f * f));
    int bits = (n + 126) * (1 << 23) + int(mantissa * (1 << 23) + 0.5f);
    return x == x ? std::bit_cast<float>(bits) : x;
}

// p = exp(p - max(p)); returns 1 / sum(p), or 2 where all keys are masked.
float exponentials(float* p, int count) {
    float top = -3.4e38f, sum = 0;
#pragma omp simd reduction(max : top)
    for (int j = 0; j < count; j++) top = p[j] > top ? p[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < count; j++) sum += p[j] = exp_nonpositive(p[j] - top);
    return 1 / (sum < 0.5f ? 0.5f : sum);  // the sum is at least 1, or 0
}

struct Attention {
    Place q, k, v, mask;  // mask: that of v if there is none
    enum { none, bools, numbers } kind;
    float scale;
    float* out;

    static Task begin(const Arrays& in, mx::array& out, float scale) {
        auto& mask = in.back();
        auto kind = in.size() == 3 ? none : mask.dtype() == mx::bool_ ? bools : numbers;
        Attention work{Place(in[0]), Place(in[1]), Place(in[2]), Place(mask), kind, scale, out.data<float>()};
        return [work] {
            Attention own = work;
            std::vector<float> room[3];
            own.q = own.q.with_rows(room[0]), own.k = own.k.with_rows(room[1]), own.v = own.v.with_rows(room[2]);
            long reads = long(own.k.shape[2]) * (own.k.shape[3] + own.v.shape[3]);
            mlx_transformer_divide(some, &own, own.q.shape[0] * own.q.shape[1], reads);
        };
    }

    // Items are the heads of all rows of the batch.
    static void some(const void* work, int first, int last) {
        auto& own = *static_cast<const Attention*>(work);
        std::vector<float> p(own.k.shape[2]);
        for (int heads = own.q.shape[1], i = first; i < last; i++) own.one(i / heads, i % heads, p.data());
    }

    void one(int row, int head, float* p) const {
        int heads = q.shape[1], group = head / (heads / k.shape[1]), keys = k.shape[2], d = k.shape[3];
        const float *query = q.at(row, head), *key = k.at(row, group), *value = v.at(row, group);
        cblas_sgemm(kRowMajor, kPlain, kTransposed, 1, keys, d, scale, query, d, key, k.step[2], 0, p, keys);
        for (int j = 0; kind == bools && j < keys; j++)
            p[j] += mask.at<bool>(row, head)[j * mask.step[3]] ? 0 : -INFINITY;
        for (int j = 0; kind == numbers && j < keys; j++) p[j] += mask.at(row, head)[j * mask.step[3]];
        float share = exponentials(p, keys);
        int width = v.shape[3];
        float* o = out + (long(row) * heads + head) * width;
        cblas_sgemm(kRowMajor, kPlain, kPlain, 1, width, keys, share, p, keys, value, v.step[2], 0, o, width);
    }
};

template <bool centered>
Task begin_norm(const Arrays& in, mx::array& out, float eps) {
    return [x = Place(in[0]), weight = Place(in[1]), bias = Place(in.back()), biased = in.size() > 2,
            o = out.data<float>(), eps] {
        std::vector<float> room[3];
        const float *from = x.flat(room[0]), *w = weight.flat(room[1]), *b = biased ? bias.flat(room[2]) : nullptr;
        int rows = x.shape[0] * x.shape[1] * x.shape[2], d = x.shape[3];
        float* to = o;
        for (int r = 0; r < rows; r++, from += d, to += d) {
            float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
            for (int i = 0; i < d; i++) mean += centered ? from[i] : 0;
            mean /= d;
#pragma omp simd reduction(+ : square)
            for (int i = 0; i < d; i++) square += (from[i] - mean) * (from[i] - mean);
            float scale = 1 / std::sqrt(square / d + eps);
            for (int i = 0; i < d; i++) to[i] = (from[i] - mean) * scale * w[i] + (b ? b[i] : 0);
        }
    };
}

// The functions that Python calls, with float32 arrays; `ops` documents them.

void expect(bool fits, const char* shapes) {
    if (!fits) throw std::invalid_argument(shapes);
}

// q (B, H, 1, d), k (B, G, C, d), v (B, G, C, e), mask bool or float32 and broadcast to (B, H, 1, C).
mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, Optional mask, float scale) {
    bool four = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && (!mask || mask->ndim() <= 4);
    expect(four && q.shape(2) == 1 && q.shape(3) == k.shape(3) && k.shape(2) == v.shape(2) && k.shape(1) == v.shape(1) &&
               k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0 && q.shape(0) == k.shape(0) && k.shape(0) == v.shape(0),
           "attend: expected q (B, H, 1, d), k (B, G, C, d), v (B, G, C, e), where G divides H");
    int scores[] = {k.shape(2), 1, q.shape(1), q.shape(0)};  // from the last axis
    for (int i = 0; mask && i < int(mask->ndim()); i++)
        expect(mask->shape(-1 - i) == 1 || mask->shape(-1 - i) == scores[i], "attend: the mask is not (B, H, 1, C)");
    return made("CpuAttention", Attention::begin, scale, {q.shape(0), q.shape(1), 1, v.shape(3)}, {q, k, v}, mask);
}

// x (..., D) with at most four axes, weight and bias (D).
mx::array norm(const char* name, Own::Begin begin, const mx::array& x, const mx::array& weight, Optional bias, float eps) {
    auto fits = [&](const mx::array& own) { return own.ndim() == 1 && own.shape(0) == x.shape(-1); };
    expect(x.ndim() > 0 && x.ndim() <= 4 && fits(weight) && (!bias || fits(*bias)),
           "norm: expected x (..., D) of four axes at most, weight and bias (D)");
    return made(name, begin, eps, x.shape(), {x, weight}, bias);
}

mx::array layer_norm(const mx::array& x, const mx::array& weight, Optional bias, float eps) {
    return norm("CpuLayerNorm", begin_norm<true>, x, weight, bias, eps);
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
    return norm("CpuRMSNorm", begin_norm<false>, x, weight, {}, eps);
}

}  // namespace

void add_scan(nb::module_& module);  // scan.cpp

NB_MODULE(primitives, module) {
    module.def("attend", &attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("mask").none(), nb::arg("scale"));
    module.def("layer_norm", &layer_norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("eps"));
    module.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"));
    add_scan(module);
}

// Shared by the kernels: vector types, readers and writers for every dtype, and the parallel region of a pass.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__FLT16_MAX__)
#define HAS_HALF 1
#else
#define HAS_HALF 0
#endif

enum Type : int32_t { F32, F64, BF16, F16, U8, I8, I16, I32, I64, U16, U32, BOOL };

// Reported by a call in place of the flags of invalid values.
static constexpr int32_t NO_MEMORY = 1 << 30;

// A tensor (images, classes, pixels) anywhere in memory; strides in elements.
struct View {
  void *data;
  int64_t image, cls, pixel;
  int32_t type;
};

template <class R> struct Simd {
  static constexpr int lanes = 64 / sizeof(R);
  typedef R vec __attribute__((vector_size(64)));
  typedef typename std::conditional<sizeof(R) == 4, int32_t, int64_t>::type integer;
  typedef integer mask __attribute__((vector_size(64)));
  static inline vec load(const R *p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(R *p, vec v) { std::memcpy(p, &v, sizeof v); }
  static inline vec all(R value) { return value - vec{}; }
};

template <class M> static inline bool any(M mask) {
  int64_t parts[sizeof(M) / 8], together = 0;
  std::memcpy(parts, &mask, sizeof mask);
  for (int64_t part : parts) together |= part;
  return together != 0;
}

typedef double eight __attribute__((vector_size(64)));

// The sum of all lanes, in double.
static inline double sum(eight v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

typedef Simd<float>::vec vfloat;
typedef Simd<float>::mask vint;
typedef Simd<double>::vec vdouble;

// Interleaves the steps for N vectors, as in one vector each step would wait for the one before.
#define EACH _Pragma("GCC unroll 8") for (int u = 0; u < N; u++)

// e^x for x <= 88; NaN stays NaN, and below -87, where float32 has no normal numbers left, it is 0.
template <int N> static inline void exp_each(vfloat (&x)[N]) {
  const vfloat least = Simd<float>::all(-87.f), magic = Simd<float>::all(12583039.f);  // 1.5 2^23 + 127
  vfloat n[N], r[N], q[N];
  vint exponent[N];
  EACH r[u] = x[u] < least ? least : x[u];
  EACH n[u] = r[u] * 1.44269504f + magic;
  EACH exponent[u] = (vint)n[u] << 23;
  EACH n[u] -= magic;
  EACH r[u] = r[u] - n[u] * 0.693359375f + n[u] * 2.12194440e-4f;
  EACH q[u] = r[u] * 1.9875691500e-4f + 1.3981999507e-3f;
  EACH q[u] = q[u] * r[u] + 8.3334519073e-3f;
  EACH q[u] = q[u] * r[u] + 4.1665795894e-2f;
  EACH q[u] = q[u] * r[u] + 1.6666665459e-1f;
  EACH q[u] = q[u] * r[u] + 5.0000001201e-1f;
  EACH q[u] = q[u] * (r[u] * r[u]) + r[u] + 1.f;
  EACH x[u] = x[u] < least ? vfloat{} : q[u] * (vfloat)exponent[u];
}
static inline vfloat exp_(vfloat x) {
  vfloat one[1] = {x};
  exp_each(one);
  return one[0];
}

// log(1 + r) for r >= 0, given 1/(1 + r) (Cephes' polynomial), with a correction for the rounding of 1 + r.
static inline vfloat log1p_(vfloat r, vfloat inverse) {
  vfloat u = r + 1.f;
  vint bits = (vint)u;
  vint k = (bits - 0x3f3504f3) >> 23;
  vint mantissa = bits - (k << 23);
  vfloat f = (vfloat)mantissa - 1.f, e = __builtin_convertvector(k, vfloat), z = f * f;
  vfloat q = f * 7.0376836292e-2f - 1.1514610310e-1f;
  q = q * f + 1.1676998740e-1f;
  q = q * f - 1.2420140846e-1f;
  q = q * f + 1.4249322787e-1f;
  q = q * f - 1.6668057665e-1f;
  q = q * f + 2.0000714765e-1f;
  q = q * f - 2.4999993993e-1f;
  q = q * f + 3.3333331174e-1f;
  q = q * f * z - e * 2.12194440e-4f - z * 0.5f;
  vfloat result = f + q + e * 0.693359375f;
  // (u - u) propagates infinity and NaN, which the operations on bits above lose.
  return result + (r - (u - 1.f)) * inverse + (u - u);
}

// log(1 + x) for x in [0, 1] (Chebyshev fit of log(1 + x)/x; within 1.5e-7 of it, relatively).
static inline vfloat log1p_of_share(vfloat x) {
  vfloat q = x * -0.0032563785f + 0.019907162f;
  q = q * x - 0.0570642f;
  q = q * x + 0.10614265f;
  q = q * x - 0.15311863f;
  q = q * x + 0.19678117f;
  q = q * x - 0.24954559f;
  q = q * x + 0.33330005f;
  q = q * x - 0.49999905f;
  return (q * x + 1.f) * x;
}

#define LANEWISE(name, function)                                                                                       \
  template <class V> static inline V name(V x) {                                                                       \
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(x[0]); lane++) x[lane] = function(x[lane]);                      \
    return x;                                                                                                          \
  }
LANEWISE(exact_exp, std::exp)
LANEWISE(exact_log1p, std::log1p)
LANEWISE(log_, std::log)
static inline vdouble exp_(vdouble x) { return exact_exp(x); }
template <int N> static inline void exp_each(vdouble (&x)[N]) { EACH x[u] = exact_exp(x[u]); }
static inline vdouble log1p_(vdouble r, vdouble) { return exact_log1p(r); }
static inline vdouble log1p_of_share(vdouble x) { return exact_log1p(x); }

// A sum over many vectors: a few are added in their own type, which rounds little, then in double.
template <class R> struct Sum;
template <> struct Sum<double> {
  eight total = {};
  void take(vdouble part) { total += part; }
};
template <> struct Sum<float> {
  eight total = {};
  void take(vfloat v) {
    typedef float half __attribute__((vector_size(32)));
    // Lane by lane, as taking the address of v would keep it in memory in the loop that computes it.
    const half low = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
    const half high = {v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
    total += __builtin_convertvector(low, eight) + __builtin_convertvector(high, eight);
  }
};

// The upper half of a float32.
struct BFloat {
  uint16_t bits;
  BFloat() = default;
  explicit BFloat(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    // Rounds to nearest, ties to even, and preserves NaN.
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
  }
  explicit BFloat(double value) : BFloat(static_cast<float>(value)) {}
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  explicit operator double() const { return static_cast<float>(*this); }
};

// A byte that is true unless it is 0.
struct Bool {
  uint8_t byte;
  Bool() = default;
  template <class R> explicit Bool(R value) : byte(value != 0) {}
  explicit operator float() const { return byte ? 1 : 0; }
  explicit operator double() const { return byte ? 1 : 0; }
};

// Calls `f` with a pointer to element `at`, of the element's type.
template <class F> static void with_type(const View &v, int64_t at, const F &f) {
  switch (v.type) {
  case F32: return f(static_cast<float *>(v.data) + at);
  case F64: return f(static_cast<double *>(v.data) + at);
  case BF16: return f(static_cast<BFloat *>(v.data) + at);
#if HAS_HALF
  case F16: return f(static_cast<_Float16 *>(v.data) + at);
#endif
  case U8: return f(static_cast<uint8_t *>(v.data) + at);
  case I8: return f(static_cast<int8_t *>(v.data) + at);
  case I16: return f(static_cast<int16_t *>(v.data) + at);
  case I32: return f(static_cast<int32_t *>(v.data) + at);
  case BOOL: return f(static_cast<Bool *>(v.data) + at);
  case U16: return f(static_cast<uint16_t *>(v.data) + at);
  case U32: return f(static_cast<uint32_t *>(v.data) + at);
  default: return f(static_cast<int64_t *>(v.data) + at);
  }
}

// Reads and converts `n` values of a row.
template <class R> static void read(const View &v, int64_t image, int64_t cls, int64_t pixel, R *__restrict to, int64_t n) {
  with_type(v, image * v.image + cls * v.cls + pixel * v.pixel, [&](const auto *from) {
    if (v.pixel == 1)
      for (int64_t j = 0; j < n; j++) to[j] = static_cast<R>(from[j]);
    else
      for (int64_t j = 0; j < n; j++) to[j] = static_cast<R>(from[j * v.pixel]);
  });
}

// Reads all classes at once, for memory in which the classes of a pixel are adjacent, into rows `step` apart.
template <class R>
static void read_across(const View &v, int64_t image, int64_t pixel, int64_t classes, R *__restrict to, int64_t step, int64_t n) {
  with_type(v, image * v.image + pixel * v.pixel, [&](const auto *from) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t c = 0; c < classes; c++) to[c * step + j] = static_cast<R>(from[j * v.pixel + c]);
  });
}

template <class R> static void write(const View &v, int64_t image, int64_t cls, int64_t pixel, const R *__restrict from, int64_t n) {
  with_type(v, image * v.image + cls * v.cls + pixel * v.pixel, [&](auto *to) {
    typedef typename std::remove_reference<decltype(*to)>::type S;
    if (v.pixel == 1)
      for (int64_t j = 0; j < n; j++) to[j] = static_cast<S>(from[j]);
    else
      for (int64_t j = 0; j < n; j++) to[j * v.pixel] = static_cast<S>(from[j]);
  });
}

template <class R>
static void write_across(const View &v, int64_t image, int64_t pixel, int64_t classes, const R *__restrict from, int64_t step, int64_t n) {
  with_type(v, image * v.image + pixel * v.pixel, [&](auto *to) {
    typedef typename std::remove_reference<decltype(*to)>::type S;
    for (int64_t j = 0; j < n; j++)
      for (int64_t c = 0; c < classes; c++) to[j * v.pixel + c] = static_cast<S>(from[c * step + j]);
  });
}

// Memory of a thread that is kept between calls, so that no call pays for fresh pages.
struct Scratch {
  char *data = nullptr;
  size_t size = 0, used = 0;
  ~Scratch() { std::free(data); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    std::free(data);
    size = (bytes + 4095) / 4096 * 4096;
    data = static_cast<char *>(std::aligned_alloc(4096, size));
    if (!data) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  template <class T> T *take(size_t count) {
    T *result = reinterpret_cast<T *>(data + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return result;
  }
};

// GOMP_parallel of the OpenMP that PyTorch has loaded: using its threads, no second pool competes with them.
typedef void (*Region)(void (*)(void *), void *, unsigned, unsigned);

// Units of work that threads take one by one. The result of a unit does not depend on the thread.
template <class F> struct Team {
  const F &unit;
  int64_t units;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  static void run(void *self) {
    Team &team = *static_cast<Team *>(self);
    try {
      for (int64_t at; (at = team.next.fetch_add(1)) < team.units;) team.unit(at);
    } catch (...) {
      team.failed = true;  // An exception must not leave an OpenMP thread.
    }
  }
};

// Returns whether every unit completed; false if memory ran out.
template <class F> static bool in_parallel(int64_t units, int32_t threads, void *region, const F &unit) {
  Team<F> team{unit, units};
  const int64_t useful = threads < units ? threads : units;
  if (useful <= 1) {
    Team<F>::run(&team);
  } else if (region) {
    reinterpret_cast<Region>(region)(&Team<F>::run, &team, static_cast<unsigned>(useful), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(useful);
    for (int64_t i = 1; i < useful; i++) others.emplace_back(&Team<F>::run, &team);
    Team<F>::run(&team);
    for (std::thread &other : others) other.join();
  }
  return !team.failed;
}

// Runs a call without letting an exception through its C interface.
template <class C, class F> static void guarded(C *call, const F &run) {
  try {
    run();
  } catch (...) {
    call->invalid = NO_MEMORY;
  }
}

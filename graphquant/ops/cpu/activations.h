// The activations of ops/numerics.py, by their position in NAMES; -1 for none.
#pragma once

#include "rows.h"

namespace graphquant {

inline Vec sigmoid(Vec x) { return splat(1) / (splat(1) + exp(splat(0) - x)); }

// relu(x) - a/2 erfc(a / sqrt 2), a = |x|, and erfc(..) = Q(a)^16 with Q a polynomial that was fitted to it on [0, 7]:
// 6e-7 off at most, 2e-5 of itself. No division, and no cancellation for negative x.
struct Gelu {
  Vec operator()(Vec x) const {
    Vec a = smaller(splat(7), magnitude(x)), q = splat(Q[8]);
    for (int i = 7; i >= 0; i--) q = fma(q, a, splat(Q[i]));
    q = q * q, q = q * q, q = q * q, q = q * q;
    return (x - smaller(splat(0), x)) - splat(0.5f) * a * q;
  }
  static constexpr float Q[9] = {1.00000012f,     -0.0498730838f,  -0.0186243448f,  -0.00135254522f, 0.00064051908f,
                                 -1.31951128e-05f, -7.34430387e-06f, 7.02346654e-07f, -2.01680397e-08f};
};
struct GeluTanh {  // x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
  Vec operator()(Vec x) const { return x * sigmoid(x * fma(x * x, splat(0.0713548162726f), splat(1.59576912160573f))); }
};
struct QuickGelu {
  Vec operator()(Vec x) const { return x * sigmoid(splat(1.702f) * x); }
};
struct Silu {
  Vec operator()(Vec x) const { return x * sigmoid(x); }
};
struct Relu {
  Vec operator()(Vec x) const { return larger(splat(0), x); }
};
struct Relu2 {
  Vec operator()(Vec x) const {
    Vec r = larger(splat(0), x);
    return r * r;
  }
};
struct Identity {
  Vec operator()(Vec x) const { return x; }
};

constexpr const char* NAMES[] = {"gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2"};

template <class F>
void by_activation(int64_t act, F f) {
  switch (act) {
    case 0: return f(Gelu{});
    case 1: return f(GeluTanh{});
    case 2: return f(QuickGelu{});
    case 3: return f(Silu{});
    case 4: return f(Relu{});
    case 5: return f(Relu2{});
    default: return f(Identity{});
  }
}

}  // namespace graphquant

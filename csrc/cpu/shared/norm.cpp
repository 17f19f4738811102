#include "norm.h"

#include <algorithm>
#include <utility>

#include "parallel.h"

namespace dla_fast::cpu {

template <class T>
std::vector<T> repeated(const std::vector<T>& values, int64_t times) {
  std::vector<T> out;
  out.reserve(values.size() * times);
  for (int64_t i = 0; i < times; ++i) out.insert(out.end(), values.begin(), values.end());
  return out;
}

template std::vector<float> repeated(const std::vector<float>&, int64_t);
template std::vector<double> repeated(const std::vector<double>&, int64_t);

template <class A>
void NormVectors<A>::repeat(int64_t times) {
  for (std::vector<A>* v : {&center, &rstd, &scale, &shift}) *v = repeated(*v, times);
}

template struct NormVectors<float>;
template struct NormVectors<double>;

template <class A>
void GradientSums::finalise(A* sum_dy, A* sum_dy_xhat) const {
  for (const auto& [from, to] : {std::pair(&dy, sum_dy), std::pair(&dy_xhat, sum_dy_xhat)}) {
    std::vector<double> sum(channels, 0.0);
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t c = 0; c < channels; ++c) sum[c] += (*from)[group * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<A>(sum[c]);
  }
}

template void GradientSums::finalise(float*, float*) const;
template void GradientSums::finalise(double*, double*) const;

template <class A>
void MomentPartials<A>::finalise(A* mean_data, A* var_data) const {
  double total = 0;
  for (const int64_t n : count) total += static_cast<double>(n);
  if (total == 0) {
    std::fill_n(mean_data, channels, A(0));
    std::fill_n(var_data, channels, A(0));
    return;
  }
  parallel(channels, 8 * groups, [&](int64_t c0, int64_t c1) {
    std::vector<double> m(c1 - c0, 0.0), s(c1 - c0, 0.0);
    for (int64_t g = 0; g < groups; ++g) {
      const double n = static_cast<double>(count[g]);
      for (int64_t c = c0; c < c1; ++c) m[c - c0] += n * mean[g * channels + c] + delta[g * channels + c];
    }
    for (double& v : m) v /= total;
    for (int64_t g = 0; g < groups; ++g) {
      if (count[g] == 0) continue;
      const double n = static_cast<double>(count[g]), inverse = 1 / n;
      for (int64_t c = c0; c < c1; ++c) {
        const double rest = delta[g * channels + c];
        const double off = mean[g * channels + c] + rest * inverse - m[c - c0];
        s[c - c0] += m2[g * channels + c] - rest * rest * inverse + n * off * off;
      }
    }
    for (int64_t c = c0; c < c1; ++c) {
      mean_data[c] = static_cast<A>(m[c - c0]);
      // A maximum that lets NaN through.
      const double v = s[c - c0] / total;
      var_data[c] = static_cast<A>(v < 0 ? 0 : v);
    }
  });
}

template struct MomentPartials<float>;
template struct MomentPartials<double>;

}  // namespace dla_fast::cpu

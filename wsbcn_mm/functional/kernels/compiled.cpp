// The passes over contiguous float32 activations, and the coefficients of
// Batch-Channel Normalization, for processors.
//
// Activations are rows of one sample's channel each. A pass takes its rows in
// the order of memory, shared out between threads; what it says of a row does
// not depend on how many there are. Sums are taken in float over a block and
// in double over blocks.
//
// Plain C functions, so that this builds in a second, without the headers of
// torch, and works with every version of it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// One version of a loop for each generation of processors, chosen at run
// time: what builds a package seldom knows what it will run on.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_PROCESSOR \
  __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

constexpr int64_t kLanes = 32;    // partial sums that do not wait for others
constexpr int64_t kBlock = 2048;  // floats: 8 KiB, read twice, stay in L1

// In halves, which a processor adds at once; the lanes are used up.
inline float sum(float *lanes) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// Squares about each block's own mean, joined as in Chan et al. 1979: exact
// where E[x^2] - E[x]^2 cancels, and memory is read once.
FOR_EACH_PROCESSOR
void row_moments(const float *x, int64_t length, float *mean_out,
                 float *var_out) {
  double mean = 0, squares = 0;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = std::min(kBlock, length - begin);
    const float *block = x + begin;
    float lanes[kLanes] = {0};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] += block[i + j];
    for (int64_t j = 0; i + j < count; ++j) lanes[j] += block[i + j];
    const double block_mean = static_cast<double>(sum(lanes)) / count;
    const float center = block_mean;
    float square_lanes[kLanes] = {0};
    for (i = 0; i + kLanes <= count; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        const float centered = block[i + j] - center;
        square_lanes[j] += centered * centered;
      }
    for (int64_t j = 0; i + j < count; ++j) {
      const float centered = block[i + j] - center;
      square_lanes[j] += centered * centered;
    }
    const double rounding = block_mean - center;
    const double delta = block_mean - mean;
    const double share = static_cast<double>(count) / (begin + count);
    squares += sum(square_lanes) - count * rounding * rounding +
               delta * delta * share * begin;
    mean += delta * share;
  }
  *mean_out = mean;
  *var_out = std::max(squares / length, 0.0);
}

FOR_EACH_PROCESSOR
void row_affine(const float *x, int64_t length, float center, float scale,
                float shift, float *result) {
  for (int64_t i = 0; i < length; ++i)
    result[i] = (x[i] - center) * scale + shift;
}

FOR_EACH_PROCESSOR
void row_reduce(const float *grad, const float *x, int64_t length,
                float center, float *total_out, float *product_out) {
  double total = 0, product = 0;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = std::min(kBlock, length - begin);
    const float *g = grad + begin, *block = x + begin;
    float lanes[kLanes] = {0}, product_lanes[kLanes] = {0};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        lanes[j] += g[i + j];
        product_lanes[j] += g[i + j] * (block[i + j] - center);
      }
    for (int64_t j = 0; i + j < count; ++j) {
      lanes[j] += g[i + j];
      product_lanes[j] += g[i + j] * (block[i + j] - center);
    }
    total += sum(lanes);
    product += sum(product_lanes);
  }
  *total_out = total;
  *product_out = product;
}

FOR_EACH_PROCESSOR
void row_input_grad(const float *grad, const float *x, int64_t length,
                    float center, float scale, float slope, float offset,
                    float *result) {
  for (int64_t i = 0; i < length; ++i)
    result[i] = grad[i] * scale + ((x[i] - center) * slope + offset);
}

// Of a channel over some images: see functional/gradient_statistics.py.
struct Statistics {
  double mean, var, grad, cov;
};

// Those of two parts together, of which the first has this share.
Statistics pooled(const Statistics &a, double share, const Statistics &b) {
  const double cross = share * (1 - share) * (a.mean - b.mean);
  const auto average = [share](double of_a, double of_b) {
    return share * of_a + (1 - share) * of_b;
  };
  return {average(a.mean, b.mean),
          average(a.var, b.var) + cross * (a.mean - b.mean),
          average(a.grad, b.grad),
          average(a.cov, b.cov) + cross * (a.grad - b.grad)};
}

// What the gradient is fitted to besides the present images: nothing without
// a history.
struct History {
  const float *statistics;  // (4, channels)
  const double share;       // of it in all
  float *present, *joined;  // results, (4, channels) each
};

// Batch-Channel Normalization's coefficients, a group of a sample at a time:
// few numbers, so in double and by one thread. The notation is that of
// BatchChannelCoefficients.
struct Group {
  const int64_t channels, size, pairs;  // all; in a group; affines in a group
  const double eps;
  const float *mean, *var;  // (samples, channels)
  const float *batch_weight, *batch_bias, *weight, *bias;
  const float *running_mean, *running_var;

  int64_t index = 0, first = 0;       // of the group, of its first channel
  double q = 0;                       // 1 / std of the group
  std::vector<double> a, centered;    // slope of the first affine, m' - M
  std::vector<double> grad_a, grad_b;  // summed over samples
  std::vector<double> grad_gamma, grad_beta;
  std::vector<Statistics> present;  // of the images so far

  // Begin with a group of channels.
  void enter(int64_t group) {
    index = group;
    first = group * size;
    for (auto *sums : {&a, &centered, &grad_a, &grad_b}) sums->assign(size, 0);
    for (auto *sums : {&grad_gamma, &grad_beta}) sums->assign(pairs, 0);
    for (int64_t k = 0; k < size; ++k)
      a[k] = batch_weight[first + k] / std(first + k);
  }

  double std(int64_t c) const { return std::sqrt(running_var[c] + eps); }

  int64_t pair(int64_t k) const { return pairs == 1 ? 0 : k; }

  double gamma(int64_t k) const { return weight[index * pairs + pair(k)]; }

  // How far the mean of a sample's channel is from the estimate.
  double moved(int64_t sample, int64_t k) const {
    return static_cast<double>(mean[sample * channels + first + k]) -
           running_mean[first + k];
  }

  // Find what is the sample's own.
  void normalize(int64_t sample) {
    double total = 0, squares = 0;
    for (int64_t k = 0; k < size; ++k) {
      centered[k] = a[k] * moved(sample, k) + batch_bias[first + k];
      total += centered[k];
    }
    for (int64_t k = 0; k < size; ++k) {
      centered[k] -= total / size;
      squares += centered[k] * centered[k] +
                 a[k] * a[k] * var[sample * channels + first + k];
    }
    q = 1 / std::sqrt(squares / size + eps);
  }

  void coefficients(int64_t sample, float *scale, float *shift) {
    normalize(sample);
    for (int64_t k = 0; k < size; ++k) {
      const int64_t i = sample * channels + first + k;
      scale[i] = gamma(k) * q * a[k];
      shift[i] =
          gamma(k) * q * centered[k] + bias[index * pairs + pair(k)];
    }
  }

  // From gradients of the coefficients to those of the sample's moments, and
  // to the sample's share in those of the parameters.
  void pull_back(int64_t sample, const float *grad_scale,
                 const float *grad_shift, float *grad_mean, float *grad_var) {
    normalize(sample);
    double through_p = 0, through_q = 0;
    for (int64_t k = 0; k < size; ++k) {
      const int64_t i = sample * channels + first + k;
      const double grad_p = a[k] * grad_scale[i] + centered[k] * grad_shift[i];
      grad_gamma[pair(k)] += grad_p * q;
      grad_beta[pair(k)] += grad_shift[i];
      through_q += gamma(k) * grad_p;
      through_p += gamma(k) * q * grad_shift[i];
    }
    const double of_var = -0.5 * q * q * q * through_q / size;
    for (int64_t k = 0; k < size; ++k) {
      const int64_t i = sample * channels + first + k;
      const double p = gamma(k) * q;
      const double of_mean = p * grad_shift[i] - through_p / size +
                             2 * of_var * centered[k];
      grad_mean[i] = a[k] * of_mean;
      grad_var[i] = a[k] * a[k] * of_var;
      grad_a[k] += p * grad_scale[i] + 2 * a[k] * var[i] * of_var +
                   moved(sample, k) * of_mean;
      grad_b[k] += of_mean;
    }
  }

  // Add an image's statistics to those of the images before it; comes after
  // its pull_back.
  void measure(int64_t sample, int64_t length, const float *grad_scale,
               const float *grad_mean, const float *grad_var) {
    present.resize(size);
    for (int64_t k = 0; k < size; ++k) {
      const int64_t i = sample * channels + first + k;
      const double scale = gamma(k) * q * a[k];
      const Statistics image{
          mean[i], var[i], static_cast<double>(grad_mean[i]) / length,
          (scale * grad_scale[i] + 2.0 * grad_var[i] * var[i]) / length};
      present[k] =
          sample ? pooled(image, 1.0 / (sample + 1), present[k]) : image;
    }
  }

  // Subtract the fit to all images from the gradients of the moments: the
  // subtract_fit of gradient_statistics.py.
  void subtract_fit(int64_t samples, int64_t length, const History &history,
                    float *grad_mean, float *grad_var) const {
    for (int64_t k = 0; k < size; ++k) {
      const int64_t c = first + k;
      const auto read = [&](int64_t row) -> double {
        return history.statistics[row * channels + c];
      };
      const Statistics all =
          pooled({read(0), read(1), read(2), read(3)}, history.share,
                 present[k]);
      const auto write = [&](float *rows, const Statistics &s) {
        const double values[] = {s.mean, s.var, s.grad, s.cov};
        for (int64_t row = 0; row < 4; ++row)
          rows[row * channels + c] = values[row];
      };
      write(history.present, present[k]);
      write(history.joined, all);
      const double tiny = std::numeric_limits<float>::min();
      const double beta = all.cov / (all.var + std::max(eps, tiny));
      for (int64_t n = 0; n < samples; ++n) {
        const int64_t i = n * channels + c;
        grad_mean[i] -= length * (all.grad + beta * (mean[i] - all.mean));
        grad_var[i] -= length * beta / 2;
      }
    }
  }

  // Write the gradients of the group's parameters, after its last sample.
  void leave(float *grad_batch_weight, float *grad_batch_bias,
             float *grad_weight, float *grad_bias) const {
    for (int64_t k = 0; k < size; ++k) {
      grad_batch_weight[first + k] = grad_a[k] / std(first + k);
      grad_batch_bias[first + k] = grad_b[k];
    }
    for (int64_t k = 0; k < pairs; ++k) {
      grad_weight[index * pairs + k] = grad_gamma[k];
      grad_bias[index * pairs + k] = grad_beta[k];
    }
  }
};

}  // namespace

extern "C" {

int64_t source_checksum() { return WSBCN_MM_CHECKSUM; }

void moments(const float *x, int64_t rows, int64_t length, int threads,
             float *mean, float *var) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    row_moments(x + r * length, length, mean + r, var + r);
}

void affine(const float *x, int64_t rows, int64_t length, int threads,
            const float *center, const float *scale, const float *shift,
            float *result) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    row_affine(x + r * length, length, center[r], scale[r], shift[r],
               result + r * length);
}

void reduce(const float *grad, const float *x, int64_t rows, int64_t length,
            int threads, const float *center, float *total, float *product) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    row_reduce(grad + r * length, x + r * length, length, center[r],
               total + r, product + r);
}

void input_grad(const float *grad, const float *x, int64_t rows,
                int64_t length, int threads, const float *center,
                const float *scale, const float *slope, const float *offset,
                float *result) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    row_input_grad(grad + r * length, x + r * length, length, center[r],
                   scale[r], slope[r], offset[r], result + r * length);
}

void batch_channel(int64_t samples, int64_t channels, int64_t num_groups,
                   int64_t pairs, double eps, const float *mean,
                   const float *var, const float *batch_weight,
                   const float *batch_bias, const float *weight,
                   const float *bias, const float *running_mean,
                   const float *running_var, float *scale, float *shift) {
  Group group{channels,   channels / num_groups, pairs,        eps,
              mean,       var,                   batch_weight, batch_bias,
              weight,     bias,                  running_mean, running_var};
  for (int64_t g = 0; g < num_groups; ++g) {
    group.enter(g);
    for (int64_t n = 0; n < samples; ++n)
      group.coefficients(n, scale, shift);
  }
}

void batch_channel_grad(
    int64_t samples, int64_t channels, int64_t num_groups, int64_t pairs,
    double eps, const float *mean, const float *var,
    const float *batch_weight, const float *batch_bias, const float *weight,
    const float *bias, const float *running_mean, const float *running_var,
    const float *grad_scale, const float *grad_shift, float *grad_mean,
    float *grad_var, float *grad_batch_weight, float *grad_batch_bias,
    float *grad_weight, float *grad_bias) {
  Group group{channels,   channels / num_groups, pairs,        eps,
              mean,       var,                   batch_weight, batch_bias,
              weight,     bias,                  running_mean, running_var};
  for (int64_t g = 0; g < num_groups; ++g) {
    group.enter(g);
    for (int64_t n = 0; n < samples; ++n)
      group.pull_back(n, grad_scale, grad_shift, grad_mean, grad_var);
    group.leave(grad_batch_weight, grad_batch_bias, grad_weight, grad_bias);
  }
}

// `momentum` < 0 stands for none. See estimates_from_moments.
void moved_estimates(int64_t samples, int64_t channels, int64_t count,
                     double momentum, int annealing, const float *mean,
                     const float *var, const float *running_mean,
                     const float *running_var, float *new_mean,
                     float *new_var) {
  double rate = momentum;
  if (momentum < 0)
    rate = 1.0 / count;
  else if (annealing)
    rate = std::max(momentum, 1.0 / (count + 1));
  for (int64_t c = 0; c < channels; ++c) {
    const double old_mean = running_mean[c], old_var = running_var[c];
    double delta = 0, squares = 0;
    for (int64_t n = 0; n < samples; ++n) {
      const double moved = mean[n * channels + c] - old_mean;
      delta += moved;
      squares += var[n * channels + c] + moved * moved;
    }
    new_mean[c] = old_mean + rate * delta / samples;
    new_var[c] = old_var + rate * (squares / samples - old_var);
    if (!std::isfinite(new_mean[c]) || !std::isfinite(new_var[c])) {
      new_mean[c] = old_mean;
      new_var[c] = old_var;
    }
  }
}

// A whole backward pass: reduce, batch_channel_grad, input_grad. A group's
// activations are still in the cache when they are read again. `small` has
// room for four numbers a row. With a history the gradient is fitted to it.
void batch_channel_backward(
    const float *grad, const float *x, int64_t length, int threads,
    int64_t samples, int64_t channels, int64_t num_groups, int64_t pairs,
    double eps, const float *mean, const float *var,
    const float *batch_weight, const float *batch_bias, const float *weight,
    const float *bias, const float *running_mean, const float *running_var,
    float *small, float *result, float *grad_batch_weight,
    float *grad_batch_bias, float *grad_weight, float *grad_bias,
    const float *statistics, double share, float *present, float *joined) {
  const History history{statistics, share, present, joined};
  const int64_t rows = samples * channels;
  float *grad_scale = small, *grad_shift = small + rows;
  float *grad_mean = small + 2 * rows, *grad_var = small + 3 * rows;
#pragma omp parallel num_threads(threads)
  {
    Group group{channels,   channels / num_groups, pairs,        eps,
                mean,       var,                   batch_weight, batch_bias,
                weight,     bias,                  running_mean, running_var};
#pragma omp for schedule(static)
    for (int64_t g = 0; g < num_groups; ++g) {
      const auto reduce_and_pull_back = [&](int64_t n) {
        const int64_t begin = n * channels + group.first;
        for (int64_t r = begin; r < begin + group.size; ++r)
          row_reduce(grad + r * length, x + r * length, length, mean[r],
                     grad_shift + r, grad_scale + r);
        group.pull_back(n, grad_scale, grad_shift, grad_mean, grad_var);
      };
      const auto write_result = [&](int64_t n) {
        const int64_t begin = n * channels + group.first;
        for (int64_t r = begin; r < begin + group.size; ++r) {
          const double scale =
              group.gamma(r - begin) * group.q * group.a[r - begin];
          // The centre is the mean as well: d/dm of (x - m) * scale.
          row_input_grad(grad + r * length, x + r * length, length, mean[r],
                         scale, 2.0 * grad_var[r] / length,
                         (grad_mean[r] - scale * grad_shift[r]) / length,
                         result + r * length);
        }
      };
      group.enter(g);
      for (int64_t n = 0; n < samples; ++n) {
        reduce_and_pull_back(n);
        if (statistics)
          group.measure(n, length, grad_scale, grad_mean, grad_var);
        else
          write_result(n);
      }
      if (statistics) {
        group.subtract_fit(samples, length, history, grad_mean, grad_var);
        for (int64_t n = 0; n < samples; ++n) {
          group.normalize(n);
          write_result(n);
        }
      }
      group.leave(grad_batch_weight, grad_batch_bias, grad_weight, grad_bias);
    }
  }
}
}

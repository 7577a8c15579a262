// The rate at which this machine's vector units multiply and add: what the rasteriser's floor is computed from.
// Prints lane operations per second of `peak THREADS`, a fused product and sum of one float counting as one.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;  // independent, so that no sum waits for the one before; they all fit into registers
constexpr long kSteps = 2000000;

int main(int, char** arguments) {
  using Clock = std::chrono::steady_clock;
  const int threads = std::atoi(arguments[1]);
  std::atomic<float> sink{0};
  double best = 0;
  for (int repeat = 0; repeat < 9; ++repeat) {  // the best: only disturbances make it slower
    const auto start = Clock::now();
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back([&] {
        Vec sum[kChains];
        const Vec factor = Vec{} + 0.999f * threads, term = Vec{} + 1e-3f * threads;
        for (Vec& v : sum) v = term;
        for (long step = 0; step < kSteps; ++step)
          for (Vec& v : sum) v = v * factor + term;
        float total = 0;
        for (const Vec& v : sum) total += v[0];
        sink = total;
      });
    for (std::thread& thread : running) thread.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = double(kSteps) * kChains * (kBytes / sizeof(float)) * threads / seconds;
    best = rate > best ? rate : best;
  }
  std::printf("%.6g\n", best);
  return sink == 0.5f;  // keeps the sums alive
}

// A small coverage-guided fuzzer: fuzz SECONDS SEED [FILE...]
//
// GCC calls __sanitizer_cov_trace_pc at every branch of the code under test (-fsanitize-coverage=trace-pc; this file is
// compiled without). An input that reaches a new pair of consecutive places, or one of them another order of magnitude
// of times, is kept and mutated further, as AFL does. An input that crashes, hangs or gives a wrong result is left in
// the file crash-input; `fuzz 0 0 crash-input` runs it again.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

using Input = std::vector<uint8_t>;

void run_target(const uint8_t* data, size_t size);  // fuzz_targets.cpp; aborts on a wrong result

extern "C" void __sanitizer_set_death_callback(void (*)(void));

namespace {

constexpr size_t kPlaces = 1 << 16;
uint8_t hits[kPlaces];    // of the current input
uint8_t seen[kPlaces];    // orders of magnitude of hits, as bits, of all inputs
uint32_t previous_place;
Input current;

void save_input() {
  std::ofstream("crash-input", std::ios::binary).write(reinterpret_cast<const char*>(current.data()), current.size());
  static const char text[] = "the input is in crash-input\n";
  if (write(2, text, sizeof text - 1) < 0) std::_Exit(1);
}

void died(int signal) {
  save_input();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

// True if the current input reached something new.
bool run(const Input& input) {
  current = input;
  std::memset(hits, 0, sizeof hits);
  previous_place = 0;
  alarm(20);
  run_target(current.data(), current.size());
  alarm(0);
  bool fresh = false;
  for (size_t i = 0; i < kPlaces; ++i) {
    if (!hits[i]) continue;
    const uint8_t order = hits[i] < 4 ? 1u << (hits[i] - 1) : hits[i] < 16 ? 8 : hits[i] < 64 ? 16 : 32;
    fresh |= (seen[i] & order) == 0;
    seen[i] |= order;
  }
  return fresh;
}

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : bits_(seed) {}

  uint32_t below(size_t n) { return static_cast<uint32_t>(bits_() % (n ? n : 1)); }

  Input from(const std::vector<Input>& corpus) {
    Input x = corpus[below(corpus.size())];
    for (uint32_t times = 1 + below(6); times > 0; --times) {
      const uint32_t at = below(x.size());
      switch (below(7)) {
        case 0:
          if (!x.empty()) x[at] ^= 1u << below(8);
          break;
        case 1:
          if (!x.empty()) x[at] = static_cast<uint8_t>(bits_());
          break;
        case 2:
          if (!x.empty()) x[at] += static_cast<uint8_t>(below(9)) - 4;
          break;
        case 3: {  // a word that is likely to be special
          static const uint32_t special[] = {0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x7F7FFFFF, 0x3F800000,
                                             0x00800000, 0x1AF1D2F7, 0xFFFFFFFF};
          if (x.size() >= 4) std::memcpy(&x[below(x.size() - 3)], &special[below(std::size(special))], 4);
          break;
        }
        case 4:
          x.insert(x.begin() + at, 1 + below(8), static_cast<uint8_t>(bits_()));
          break;
        case 5:
          if (x.size() > 8) x.erase(x.begin() + below(x.size() - 8), x.begin() + below(8) + x.size() - 8);
          break;
        default: {  // the end of another one
          const Input& y = corpus[below(corpus.size())];
          x.resize(at);
          x.insert(x.end(), y.begin() + below(y.size()), y.end());
        }
      }
    }
    if (x.size() > 4096) x.resize(4096);
    return x;
  }

 private:
  std::mt19937 bits_;
};

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const uint32_t place = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(__builtin_return_address(0)) * 0x9E3779B1u >> 8);
  uint8_t& count = hits[(place ^ previous_place) % kPlaces];
  count += count < 255;
  previous_place = place >> 1;
}

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 60;
  Mutator mutate(argc > 2 ? std::atoi(argv[2]) : 0);
  __sanitizer_set_death_callback(save_input);
  for (int signal : {SIGABRT, SIGALRM}) std::signal(signal, died);
  std::vector<Input> corpus;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) return std::perror(argv[i]), 2;
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    run(corpus.back());
  }
  if (corpus.empty()) corpus.push_back(Input(32));
  const auto start = std::chrono::steady_clock::now();
  const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  int64_t runs = 0;
  for (; passed() < seconds; ++runs) {
    Input input = mutate.from(corpus);
    if (run(input)) corpus.push_back(std::move(input));
  }
  size_t places = 0;
  for (uint8_t s : seen) places += s != 0;
  std::printf("%lld inputs, %zu kept, %zu places reached\n", static_cast<long long>(runs), corpus.size(), places);
  if (places < 100) return std::puts("no coverage: is the code instrumented?"), 1;
}

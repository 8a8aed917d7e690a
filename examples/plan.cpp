// How much memory a model needs, from the headers of its files alone.
//
//   plan MODEL [MEMORY_GB [RANKS]]
#include <iostream>
#include <quantal/quantal.hpp>
#include <string>

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: plan MODEL [MEMORY_GB [RANKS]]\n";
    return 2;
  }
  try {
    quantal::PlanOptions options;
    options.backend = quantal::Backend::CUDA;
    options.mode = quantal::PlanMode::kQlora;
    options.memory_bytes = static_cast<std::int64_t>(1e9 * (argc > 2 ? std::stod(argv[2]) : 24));
    options.world_size = argc > 3 ? std::stoll(argv[3]) : 1;
    std::cout << quantal::plan(argv[1], options).to_text() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "plan: " << error.what() << "\n";
    return 1;
  }
}

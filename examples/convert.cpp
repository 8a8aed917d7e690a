// Converts a model to another dialect: first what would survive, then the conversion.
//
//   convert FROM TO [DIALECT]        DIALECT: bnb, hqq, mlx, quanto, gguf or dense; default hqq
#include <iostream>
#include <quantal/quantal.hpp>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: convert FROM TO [DIALECT]\n";
    return 2;
  }
  quantal::ConvertOptions options;
  options.to = argc > 3 ? argv[3] : "hqq";
  options.save.overwrite = true;
  try {
    std::cout << quantal::plan_convert(argv[1], options, argv[2]).text() << "\n";
    const quantal::ConvertReport done = quantal::convert(argv[1], argv[2], options);
    std::cout << "wrote " << argv[2] << " (" << done.layout << "), "
              << (done.lossless() ? "nothing was lost" : "see the table for what was lost") << "\n";
  } catch (const quantal::Error& error) {
    std::cerr << "convert: " << error.what() << "\n";
    return 1;
  }
}

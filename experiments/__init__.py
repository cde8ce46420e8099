"""What proves the claims of the documentation and is not part of the product: controls, experiments, benchmarks."""

"""The paper's experiments: which there are, their rows, tables, figures and benchmarks."""

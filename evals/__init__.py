"""What the two evaluations are made of: files and rules of the benchmarks, metrics, fine-tuning."""

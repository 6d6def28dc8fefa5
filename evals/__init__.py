"""Question answering, the harness, and what they share with eval_superglue.py: files, rules, metrics, fine-tuning."""

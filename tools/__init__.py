"""Beside training: ask a trained model, exchange it with `transformers`, time it."""

"""Networks by name. A backbone is any module ``[B, C, *S] -> logits [B, K, *S]``."""

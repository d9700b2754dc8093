"""The LM head: hidden states to log-probabilities, scores and ranking loss, without full logits."""

"""What the model will see and learn, looked at before training: tokens, checks, counts, cost."""

"""What a step and an epoch cost, and the paper's experiments; measured."""

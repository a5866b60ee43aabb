"""Weightings: from the Gramian of m gradients to the weights of their sum."""

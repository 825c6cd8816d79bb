"""Per-example gradients: one pass gives loss, exact norms, exact dots with every direction and a sketch."""

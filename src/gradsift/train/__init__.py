"""Fine-tuning on a selection: plans, steps, penalties, step hooks, the trainer and the plain loop."""

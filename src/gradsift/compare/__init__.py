"""Methods against honest baselines at equal total cost: worlds, arms, cells, analysis."""

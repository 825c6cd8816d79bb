"""gradsift picks the training examples that teach a domain without forgetting, and proves the choice."""

__version__ = "0.1.0"

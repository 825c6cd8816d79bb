"""The stage graph: rows, tokens, signals, problem, selection, files. Each stage is a function of typed inputs."""

from gradsift.pipeline.run import Outcome, Progress, Silent, select

__all__ = ["Outcome", "Progress", "Silent", "select"]

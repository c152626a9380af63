"""Experiment 3: what a frozen text encoder tells a frozen picture generator through one linear prefix."""

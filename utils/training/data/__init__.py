"""Training data: source files, task examples, the tokenised cache."""
